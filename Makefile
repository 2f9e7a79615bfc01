# make run and make test need nothing but Python >= 3.11 and make on Linux.
PYTHON ?= python3
BIN := .venv/bin

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
	$(BIN)/vbench claims check README.md

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

claims: setup
	$(BIN)/vbench claims update README.md

# Keep from RUN (a run's folder) the records the README rests on: make baseline RUN=... MACHINE=h200
baseline: setup
	$(BIN)/python -m vbench.baseline README.md $(RUN) results/baselines/$(MACHINE)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis results/runs
