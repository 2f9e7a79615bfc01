# make run and make test need nothing but Python >= 3.11 and make on Linux.
PYTHON ?= python3
BIN := .venv/bin
# Documents with numbers generated from records.
GENERATED := README.md docs/verdicts.md docs/error-rates.md

.PHONY: setup run test check format claims baseline clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vbench needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

run: setup
	$(BIN)/vbench run --suite all

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check
	$(BIN)/pytest
	for doc in $(GENERATED); do $(BIN)/vbench claims check $$doc || exit 1; done

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

claims: setup
	for doc in $(GENERATED); do $(BIN)/vbench claims update $$doc || exit 1; done

# Keep from RUN (folders of runs) the records the documents rest on; prints old and new: make baseline RUN=... MACHINE=h200
baseline: setup
	$(BIN)/vbench baseline update $(RUN) --baseline results/baselines/$(MACHINE) --document $(GENERATED) --write

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis results/runs
