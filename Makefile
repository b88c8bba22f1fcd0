# make run [ARGS='prompt="a cat" seed=3']    draw an image; the arguments are run.py's
# make test [ARGS='-k timeline'] [WORKERS=4]  run the tests in two processes or more; the arguments are pytest's
# make test-thorough                         run the long products of cases that it leaves out (docs/tests.md)
# make test-demo                             run the demo's tests in a browser; installs gradio
# make lint
# make package                               build the wheel and try it in an empty environment; needs a package index
# make test-lowest                           run tests with the lowest versions that the requirements files allow
# make docs                                  build the docs site into site/, strictly
# make assets [ARGS='again=[plans]']         make anew what depends on the embedded models' weights (CONTRIBUTING.md)
# make demo [ARGS='--port 8080']             serve the page to try it on, at 127.0.0.1; the arguments are h2cache demo's
# bash run_exper.sh --help                   the paper's tables and figures
#
# The packages live in .venv, made by PYTHON (3.11 or newer). They are installed again only when a requirements file has
# changed: each stamp is made by the last command of its recipe, so an interrupted install leaves none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
ARGS ?=
WORKERS ?= 2
OLD := 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is too old: make PYTHON=python3.11 or newer")'

.PHONY: run test test-thorough test-demo test-lowest lint docs assets demo package

run: $(VENV)/run.stamp
	$(BIN)/python run.py $(ARGS)

# Each process begins with a part of its own, so that what the tests of a file share is made once, and helps out at the end.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not thorough" $(ARGS)

test-thorough: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m thorough $(ARGS)

test-demo: $(VENV)/dev.stamp $(VENV)/demo.stamp
	$(BIN)/python -m pytest tests/eval/test_demo.py $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

package:
	bash tools/try_package.sh

test-lowest:
	bash tools/try_lowest.sh

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

assets: $(VENV)/eval.stamp
	$(BIN)/python -m tools.assets $(ARGS)

demo: $(VENV)/demo.stamp
	$(BIN)/h2cache demo $(ARGS)

$(VENV)/run.stamp: requirements.txt
	@$(PIP) --version > /dev/null 2>&1 || { $(PYTHON) -c $(OLD) && $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/eval.stamp: requirements-eval.txt $(VENV)/run.stamp
	$(PIP) install -r requirements-eval.txt
	@touch $@

# The program itself comes with an editable installation: the clone's files are what runs.
$(VENV)/demo.stamp: pyproject.toml $(VENV)/eval.stamp
	$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt requirements-docs.txt $(VENV)/eval.stamp
	$(PIP) install -r requirements-dev.txt
	@touch $@
