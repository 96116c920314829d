# Everything a newcomer types. Each target makes .venv and installs what it needs, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc python -name '*.?pp' -o -name '*.py' -o -name '*.pyi')

.PHONY: demo test lint format sanitize bench proof clean

demo: $(VENV)/.package  ## measure a trained network and its poisoned twin
	$(BIN)/fastvol demo

test: $(VENV)/.package  ## the test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.requirements  ## what pre-commit runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.?pp')

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.?pp')

sanitize: $(VENV)/.requirements  ## the core's own tests under ASan and UBSan, warnings as errors
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFASTVOL_BUILD_TESTS=ON -DFASTVOL_BUILD_PYTHON=OFF -DFASTVOL_SANITIZE=ON -DFASTVOL_WERROR=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

bench: $(VENV)/.package  ## ratios against what is used today, written to benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark-only

proof: $(VENV)/.package  ## the long proofs, written to benchmarks/results/
	$(BIN)/python -m benchmarks.proofs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the pinned version is the build without CUDA packages.
$(VENV)/.requirements: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt $$($(BIN)/python .ci/requirements.py demo table test dev)
	touch $@

$(VENV)/.package: $(VENV)/.requirements $(SOURCES)
	$(PIP) --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf $(VENV) build
