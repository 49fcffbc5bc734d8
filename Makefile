VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
EXTRAS := train,test,bench,docs

.PHONY: setup demo test test-all lint docs build gpu bench

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hycam-kernels needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(BIN)/hycam train

test: setup lint docs
	$(BIN)/pytest -m "not slow and not gpu"

test-all: setup lint
	$(BIN)/pytest -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict

build: setup
	$(BIN)/python -m build

# with the Python and torch that the machine has: no virtual environment, no network
OUT ?= results
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

bench: setup
	$(BIN)/pytest benchmarks --benchmark-only
