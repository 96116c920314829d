#!/usr/bin/env bash
# Builds fastvol, runs the tests that need a GPU, and measures the table of gpu.py; under 9 minutes.
#
#     benchmarks/gpu.sh [WHEELS]
#
# Needs a GPU and PyTorch, Triton, pybind11, CMake and a C++ compiler; no network. WHEELS is a folder
# of wheels for what else is missing: pytest, hypothesis, scipy, tqdm, safetensors, arviz-stats.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

if [ -n "${1:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps "$1"/*.whl || exit 1
fi
if ! timeout 110 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps .; then
    echo "not installed; built in place instead"
    "$python" setup.py --quiet build_ext --inplace || echo "without the compiled extension"
    export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"

if "$python" -c "import pytest, hypothesis" 2>/dev/null; then
    timeout 120 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
    tests=$?
else
    echo "the tests need pytest and hypothesis, which are not here"
    tests=-1
fi
timeout 290 "$python" -m benchmarks.gpu --seconds 240 --tests "$tests"
