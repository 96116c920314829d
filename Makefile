# Everything a newcomer types. Each target makes .venv and installs what it needs, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Each process of the tests takes half a gigabyte.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc python -name '*.?pp' -o -name '*.py' -o -name '*.pyi')

.PHONY: demo test lint format sanitize bench proof clean

demo: $(VENV)/.package  ## measure a trained network and its poisoned twin
	$(BIN)/fastvol demo

test: $(VENV)/.package $(VENV)/.extra-test  ## the test suite
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.extra-dev  ## what pre-commit runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.?pp')

format: $(VENV)/.extra-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.?pp')

sanitize: $(VENV)/.extra-dev  ## the core's own tests under ASan and UBSan, warnings as errors
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFASTVOL_BUILD_TESTS=ON -DFASTVOL_BUILD_PYTHON=OFF -DFASTVOL_SANITIZE=ON -DFASTVOL_WERROR=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

bench: $(VENV)/.package $(VENV)/.extra-test  ## ratios against what is used today, written to benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark-only

proof: $(VENV)/.package $(VENV)/.extra-test  ## the long proofs, written to benchmarks/results/
	$(BIN)/python -m benchmarks.proofs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra of pyproject.toml. torch comes first and alone: the pinned version is the
# build without CUDA packages.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt torch
	touch $@

$(VENV)/.extra-%: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -c constraints.txt $$($(BIN)/python .ci/requirements.py $*)
	touch $@

$(VENV)/.package: $(VENV)/.extra-demo $(SOURCES)
	$(PIP) --no-deps --force-reinstall .
	touch $@

.PRECIOUS: $(VENV)/.extra-%

clean:
	rm -rf $(VENV) build
