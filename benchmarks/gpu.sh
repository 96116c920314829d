#!/usr/bin/env bash
# Builds fastvol, runs the tests that need a GPU, and measures the table of gpu.py; under 9 minutes.
# With what is left of them the kernels' other tests run too, and compute-sanitizer looks at them.
#
#     benchmarks/gpu.sh [WHEELS]
#
# Needs a GPU and PyTorch, Triton, SciPy, tqdm, safetensors, arviz-stats, and to build with setuptools,
# pybind11, CMake and a C++ compiler; pytest and hypothesis for the tests; no network. WHEELS is a
# folder of wheels for what is missing of these. Nothing is installed but into a folder that is gone
# afterwards. RESULTS names the folder for the figures. Where the sources come without their history,
# COMMIT names the commit that is kept with the figures.
set -u
# As the caller names them, before the folder changes.
[ -z "${1:-}" ] || wheels=$(realpath -e "$1") || exit 1
[ -z "${RESULTS:-}" ] || RESULTS=$(realpath -m "$RESULTS")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
install() {
    timeout "$1" "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" \
        --disable-pip-version-check "${@:2}"
}

# What one step cannot do does not keep the others from what they can.
if [ -n "${wheels:-}" ]; then
    for wheel in "$wheels"/*.whl; do
        install 20 "$wheel" || echo "not installed: $wheel"
    done
fi
# Whole runs need all of these: without one the minutes on the card would be lost.
"$python" - <<'END' || exit 2
import importlib

def trouble(name):
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{name} ({type(error).__name__}: {error})"

names = ("torch", "triton", "numpy", "scipy.linalg", "tqdm", "safetensors", "arviz_stats.base")
missing = [text for text in map(trouble, names) if text]
if missing:
    raise SystemExit("cannot be imported: " + "; ".join(missing) + "; give a folder of their wheels")
import torch
if not torch.cuda.is_available():
    raise SystemExit("PyTorch sees no GPU")
END
if ! install 100 --no-build-isolation .; then
    echo "not installed; built in place instead"
    timeout 60 "$python" setup.py --quiet build_ext --inplace || echo "without the compiled extension"
    export PYTHONPATH="$PWD/python:$PYTHONPATH"
fi
export PYTHONPATH="$PYTHONPATH:$PWD"

if "$python" -c "import pytest, hypothesis" 2>/dev/null; then
    # Most of their time is the compiler's, which uses one core for each kernel.
    workers=$("$python" -c "import xdist, os; print('-n', min(8, os.cpu_count()))" 2>/dev/null)
    # A warning of a version that the project is not developed with is no failure.
    # shellcheck disable=SC2046,SC2086
    timeout 120 "$python" -m pytest -q -m gpu -W default --durations 5 $workers \
        -p no:cacheprovider $(grep -l "mark\.gpu" tests/test_*.py)
    tests=$?
else
    echo "the tests need pytest and hypothesis, which are not here"
    tests=-1
fi
# The rest of 9 minutes; what has been measured by then is kept.
left=$((530 - SECONDS))
timeout "$left" "$python" -m benchmarks.gpu --seconds $((left - 50)) --tests "$tests" \
    ${RESULTS:+--out "$RESULTS"}
status=$?

# With the time that is left: awkward sizes, which elsewhere are the interpreter's, and whether any
# access goes astray.
kernels="tests/test_kernels_noise.py tests/test_threshold_step.py tests/test_refill.py
    tests/test_kernels_linear.py"
left=$((535 - SECONDS))
if [ "$tests" -ge 0 ] && [ "$left" -gt 20 ]; then
    # shellcheck disable=SC2086
    timeout "$left" "$python" -m pytest -q -m "not gpu and not slow" -W default $workers \
        -p no:cacheprovider $kernels
    echo "the kernels' other tests on the card ended with $?"
fi
left=$((535 - SECONDS))
if [ "$tests" -ge 0 ] && [ "$left" -gt 40 ] && command -v compute-sanitizer >/dev/null; then
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$left" \
        compute-sanitizer --target-processes all --error-exitcode 9 \
        "$python" -m pytest -q -x -m "not gpu and not slow" -W default -p no:cacheprovider $kernels
    echo "compute-sanitizer ended with $? (9: it found something, 124: there was no more time)"
fi
exit $status
