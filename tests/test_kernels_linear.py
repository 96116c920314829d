"""The kernels of layers on rays against their definitions: interpreted, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_tolerances import assert_close, layer
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from fastvol import kernels
from fastvol._reference import perturbed
from fastvol.kernels import linear
from fastvol.kernels.activations import ACTIVATIONS
from fastvol.kernels.launch import interpreted
from fastvol.kernels.linear import linear_kernel

INTERPRETED = interpreted(linear_kernel)
DEVICE = "cpu" if INTERPRETED else "cuda"
IDS = np.array([3, 2**62 + 2**32], dtype=np.int64)
COEFFICIENT = np.array([0.1, 10.0])
SEED, STREAM = 2**64 - 3, 2**32 - 2
# rows, inputs, outputs, where the weights begin
SHAPES = [
    (63, 60, 17, 0),
    (2, 60, 1, 3),
    (5, 1, 1, 1),
    (1, 257, 3, 2),
    (65, 63, 10, 3),
    (2, 62, 33, 2),
    (2, 62, 1, 1),
]
REAL = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def given(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Whatever a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*args, **options):
        result = empty(*args, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr("fastvol.kernels.linear.torch.empty", poisoned)


def compare(kernel: str, *args, precision: str, **options):
    found = getattr(kernels, kernel)(*args, precision=precision, **options)
    definition = getattr(perturbed, kernel)(*args, precision=precision, **options)
    for one, wanted in zip(found, definition, strict=True):
        assert_close(one, wanted, layer(precision, found.dtype))
    return found


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "offset", "precision"),
    [*((*shape, "tf32") for shape in SHAPES), (*SHAPES[0], "bf16"), (*SHAPES[4], "bf16")],
)
def test_linear(rows, inputs, outputs, offset, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    lanes = 2 if inputs == 60 else 1
    weight, bias = given(outputs, inputs), given(outputs)
    x = given(lanes, rows, inputs, dtype=dtype)
    compare(
        "perturbed_linear", x, weight, bias, COEFFICIENT[-lanes:], SEED, STREAM, IDS[-lanes:],
        offset=offset, scale=given(outputs, inputs).abs(), bias_scale=given(outputs).abs(),
        antithetic=True, activation="relu", precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(63, 60, 17), (2, 3, 1)])
def test_direction(rows, inputs, outputs):
    x = given(rows, inputs)
    options = {"offset": 2, "bias_offset": 4000, "scale": given(outputs).abs(), "bias": True}
    change = compare("direction_linear", x, outputs, SEED, STREAM, IDS, precision="fp32", **options)
    weight, bias = given(outputs, inputs), given(outputs)
    whole = kernels.perturbed_linear(
        x, weight, bias, COEFFICIENT, SEED, STREAM, IDS,
        offset=2, bias_offset=4000, scale=options["scale"], precision="fp32",
    )  # fmt: skip
    c = torch.from_numpy(COEFFICIENT).to(change).view(2, 1, 1)
    split = F.linear(x, weight, bias) + c * change
    for one, other in zip(split, whole, strict=True):
        assert_close(one, other, 2 * layer("fp32", torch.float32))


def test_offsets_beyond_32_bits():
    offset = 2**33 + 5
    x = given(3, 8)
    options = {"bias": True, "offset": offset}
    compare("direction_linear", x, 6, SEED, STREAM, IDS, precision="ieee", **options)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation):
    x, weight = 3 * given(7, 8), given(5, 8)
    compare(
        "perturbed_linear", x, weight, None, COEFFICIENT, SEED, STREAM, IDS,
        activation=activation, precision="ieee",
    )  # fmt: skip


def test_nan_stays():
    x = given(2, 8)
    x[1, 3] = float("nan")
    options = {"activation": "relu", "precision": "ieee"}
    y = kernels.perturbed_linear(x, given(5, 8), None, COEFFICIENT, SEED, STREAM, IDS, **options)
    assert y[:, 1].isnan().all()
    assert not y[:, 0].isnan().any()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(
    ("size", "filters", "options"),
    [
        ((9, 7), (5, 3, 3, 3), {"padding": 1}),
        ((12, 12), (17, 1, 5, 5), {}),
        ((9, 8), (4, 3, 2, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        ((4, 4), (1, 1, 1, 1), {"stride": 3}),
        ((5, 5), (4, 1, 3, 3), {"groups": 2}),
    ],
)
def test_convolution(size, filters, options, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    channels = filters[1] * options.get("groups", 1)
    weight, bias = given(*filters), given(filters[0])
    options = {**options, "offset": 5, "scale": given(*filters).abs(), "precision": precision}
    lanes = given(2, 2, channels, *size, dtype=dtype)
    compare(
        "perturbed_conv2d", lanes, weight, bias, COEFFICIENT, SEED, STREAM, IDS,
        bias_scale=given(filters[0]).abs(), activation="relu", antithetic=True, **options,
    )  # fmt: skip
    options["scale"] = given(filters[0]).abs()
    compare(
        "direction_conv2d", lanes[0], filters, SEED, STREAM, IDS,
        bias=True, bias_offset=4001, **options,
    )  # fmt: skip


def test_strides_of_images_do_not_matter():
    x = given(2, 3, 6, 6)
    options = {"offset": 1, "precision": "ieee"}
    one = kernels.direction_conv2d(x, (4, 3, 3, 3), SEED, STREAM, IDS, **options)
    other = kernels.direction_conv2d(
        x.contiguous(memory_format=torch.channels_last), (4, 3, 3, 3), SEED, STREAM, IDS, **options
    )
    assert torch.equal(one, other)


def test_what_is_refused():
    x, weight = given(3, 8), given(5, 8)
    directions = (COEFFICIENT, SEED, STREAM, IDS)
    with pytest.raises(ValueError, match="x must have 8 inputs"):
        kernels.perturbed_linear(given(3, 7), weight, None, *directions)
    with pytest.raises(ValueError, match="x must have 2 axes, or 3 of which the first counts"):
        kernels.perturbed_linear(given(3, 3, 8), weight, None, *directions)
    with pytest.raises(ValueError, match="activation must be None or one of"):
        kernels.perturbed_linear(x, weight, None, *directions, activation="softmax")
    with pytest.raises(ValueError, match="precision must be one of"):
        kernels.perturbed_linear(x, weight, None, *directions, precision="fp8")
    with pytest.raises(ValueError, match="scale must be contiguous of shape"):
        kernels.perturbed_linear(x, weight, None, *directions, scale=given(8))
    with pytest.raises(ValueError, match="bias must be contiguous of shape"):
        kernels.perturbed_linear(x, weight, given(4), *directions)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        kernels.perturbed_linear(x.double(), weight, None, *directions)
    with pytest.raises(ValueError, match="x is smaller than the kernel"):
        kernels.direction_conv2d(given(1, 1, 2, 2), (1, 1, 3, 3), SEED, STREAM, IDS)


@pytest.mark.parametrize(("capability", "base"), [(80, True), (86, True), (89, False), (90, True)])
def test_tiles_fit_into_the_shared_memory_of_a_card(capability, base, monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "_capability", lambda device: capability)
    monkeypatch.setattr(linear, "interpreted", lambda kernel: False)
    monkeypatch.setattr(linear, "launch", lambda *args, fixed, **options: seen.append(fixed.kwargs))
    x = torch.empty(2, 600, 256, device="meta")
    for precision in ("bf16", "tf32", "fp32"):
        kernels.perturbed_linear(
            x, torch.empty(128, 256, device="meta"), None, COEFFICIENT, SEED, STREAM, IDS,
            precision=precision, base=x[0] if base else None,
        )  # fmt: skip
    operands = 2 if base else 1
    room = {80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
    for sizes in seen:
        read = sizes["ROWS"] * sizes["PARTS"] * sizes["INPUTS"] * 4 * operands
        # Beside the weights.
        assert read <= room - 16384


@pytest.mark.gpu
@REAL
@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "offset"),
    [(600, 784, 256, 0), (600, 256, 256, 200_960), (600, 256, 10, 266_752), (2048, 1024, 1024, 3)],
)
def test_layers_of_real_size_on_a_gpu(rows, inputs, outputs, offset, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    lanes = 16
    ids, c = np.arange(lanes), np.geomspace(1e-3, 1, lanes)
    x, weight = given(lanes, rows, inputs, dtype=dtype), given(outputs, inputs)
    compare(
        "perturbed_linear", x, weight, given(outputs), c, SEED, STREAM, ids,
        offset=offset, scale=given(outputs).abs(), antithetic=True, activation="relu",
        precision=precision,
    )  # fmt: skip
    compare(
        "direction_linear", x[0], outputs, SEED, STREAM, ids, offset=offset, precision=precision
    )


@pytest.mark.gpu
@REAL
def test_launch_parameters_are_tuned_on_a_gpu():
    # All of them are compiled, which takes a while: of one form.
    kernels.set_tuning(True)
    try:
        compare(
            "direction_linear", given(600, 784), 256, SEED, STREAM, np.arange(16), precision="tf32"
        )
    finally:
        kernels.set_tuning(False)


@pytest.mark.gpu
@REAL
@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3", "ieee"])
def test_convolutions_of_real_size_on_a_gpu(precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ids, c = np.arange(8), np.geomspace(1e-3, 1, 8)
    for channels, filters, size in ((1, 16, 28), (16, 32, 14), (3, 64, 32)):
        x = given(8, 200, channels, size, size, dtype=dtype)
        weight = given(filters, channels, 3, 3)
        compare(
            "perturbed_conv2d", x, weight, given(filters), c, SEED, STREAM, ids,
            offset=7, padding=1, activation="relu", precision=precision,
        )  # fmt: skip


@pytest.mark.gpu
@REAL
def test_a_captured_layer_follows_its_lanes_on_a_gpu():
    x, weight = given(100, 64), given(32, 64)
    ids = torch.arange(4, device="cuda")
    c = torch.ones(4, dtype=torch.float64, device="cuda")

    def layer_of_lanes() -> Tensor:
        return kernels.perturbed_linear(x, weight, None, c, SEED, STREAM, ids, precision="ieee")

    layer_of_lanes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer_of_lanes()
    ids += 7
    c *= 0.5
    graph.replay()
    assert torch.equal(captured, layer_of_lanes())
