# make run and make test need nothing but Python >= 3.11 and make on Linux.
PYTHON ?= python3
BIN := .venv/bin
# Documents with numbers generated from records.
GENERATED := README.md docs/verdicts.md docs/error-rates.md docs/search.md docs/accuracy.md

# How much of the ahead-of-time gate: quick (a sample of every kernel) or standard (every table entry).
GATE := quick
# A second Triton, the version of the machines our GPU records are from, in a folder that goes in front on the path.
OTHER_TRITON := build/triton-3.6
# transformers, in a folder of its own: the one thing its tests need beyond the first environment.
TRANSFORMERS := build/transformers
RUNS := results/runs
# Chromium's engine, in a folder of its own: the report's tests in a browser.
BROWSER := build/browser
# Test files run side by side, in the order of their names: by their number of tests, some of the longest came last.
WORKERS := 2

.PHONY: setup run test check gate wheel-test models-test browser-test format claims matrix features controls baseline clean

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

test: check gate wheel-test models-test
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	for doc in $(GENERATED); do $(BIN)/vbench claims check $$doc || exit 1; done
	$(BIN)/python docs/tuning/targets.py --check

gate: setup $(OTHER_TRITON)/.ready
	$(BIN)/vbench run --suite compile --effort $(GATE) --out $(RUNS)
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) $(BIN)/vbench run --suite compile --backend triton --effort $(GATE) --out $(RUNS)
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) $(BIN)/vbench run --suite fp4 --op fp4_dequantize --backend triton --out $(RUNS)

$(OTHER_TRITON)/.ready: constraints.triton-3.6.txt | setup
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) -r $<
	@touch $@

# The import comes first: without the package these tests would be skipped.
models-test: setup $(TRANSFORMERS)/.ready
	PYTHONPATH=$(CURDIR)/$(TRANSFORMERS) $(BIN)/python -c 'import transformers'
	PYTHONPATH=$(CURDIR)/$(TRANSFORMERS) $(BIN)/pytest -q tests/test_virtualize_hf.py \
		tests/test_virtual_estimate.py::test_transformers_own_code_is_traced_or_its_absence_named

$(TRANSFORMERS)/.ready: constraints.transformers.txt | setup
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --no-compile --target $(@D) -r $<
	@touch $@

# The import comes first: without the engine these tests would be skipped.
browser-test: setup $(BROWSER)/.ready
	PYTHONPATH=$(CURDIR)/$(BROWSER) $(BIN)/python -c 'import PySide6.QtWebEngineWidgets'
	PYTHONPATH=$(CURDIR)/$(BROWSER) $(BIN)/pytest -q tests/test_report_browser.py

$(BROWSER)/.ready: constraints.browser.txt | setup
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --no-compile --target $(@D) -r $<
	@touch $@

wheel-test: setup build/wheel-env/.ready
	$(BIN)/python tests/wheel_check.py build/wheel-env

build/wheel-env/.ready: pyproject.toml constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt .
	$(@D)/bin/pip uninstall --quiet --yes vbench-kernels
	@touch $@

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

claims: setup
	for doc in $(GENERATED); do $(BIN)/vbench claims update $$doc || exit 1; done
	$(BIN)/python docs/tuning/targets.py --write

# What each kernel takes, as the kernels themselves say; a test holds the document to it.
matrix: setup
	sed -i '/^## /,$$d' docs/matrix.md
	$(BIN)/vbench list --matrix --device cpu >> docs/matrix.md
	sed -i '/^## /,$$d' docs/conformance.md
	$(BIN)/vbench list --matrix --kept results/conformance/h200.jsonl >> docs/conformance.md

# Feature by attention kernel, as the kernels themselves say; a test holds the document to it.
features: setup
	sed -i '/^## /,$$d' docs/attention.md
	$(BIN)/python docs/tuning/attention_features.py >> docs/attention.md

# Controls over K and the list of them; a test holds the document to the corpus.
controls: setup
	$(BIN)/python -m vbench.controls.table > docs/controls.md

# Keep from RUN (folders of runs) the records the documents rest on; prints old and new: make baseline RUN=... MACHINE=h200
baseline: setup
	$(BIN)/vbench baseline update $(RUN) --baseline results/baselines/$(MACHINE) --document $(GENERATED) --write

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis results/runs
