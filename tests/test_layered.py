"""The layered engine: its losses and gradients are the general engine's, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol.engines import Dense, GeneralEngine, Indexed, Plan, planning
from fastvol.engines.layered import LayeredEngine, UntraceableError, onednn, operations

SEED = 5
N = 7
LANES = 4
PLAN = Plan("layered", 3, LANES, True, "float64", 1, 1, "cpp", cached=True)

needs_onednn = pytest.mark.skipif(
    not onednn.is_available(torch.float32, torch.device("cpu")),
    reason="PyTorch has been built without oneDNN",
)


class Residual(nn.Module):
    """A block with a skip connection and a write in place, as in a ResNet."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1, stride=stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.norm(self.first(x))))
        y += self.skip(x)
        return self.relu(y)


class Attention(nn.Module):
    """Pre-norm self-attention over learned embeddings, causal, with a tied read-out."""

    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8, bias=False)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places
        n, t, c = h.shape
        parts = self.qkv(self.norm(h)).split(c, dim=2)
        q, k, v = (part.view(n, t, 2, c // 2).transpose(1, 2) for part in parts)
        mask = torch.ones(t, t, dtype=torch.bool).tril() if self.mask else None
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not self.mask)
        h = h + self.out(a.transpose(1, 2).reshape(n, t, c))
        return F.gelu(h).mean(1) @ self.tokens.weight.T


class Branches(nn.Module):
    """Concatenation, slices, matrix products of parameters, a parameter times another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(4))
        self.mix = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.a(x), torch.tanh(self.b(x))], dim=1)
        h = torch.einsum("ni,ij->nj", h, self.mix * self.gain)
        return h[:, 1:] * x[:, :1] + h[:, :1].abs().sqrt() / (1 + self.gain.sum() ** 2)


class Buffers(nn.Module):
    """A buffer and a frozen layer before the first that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("shift", torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.frozen(x) + self.shift))


def vectors() -> Tensor:
    return torch.randn(N, 6)


def images(size: int = 6, channels: int = 2) -> Tensor:
    return torch.randn(N, channels, size, size)


def tokens() -> Tensor:
    return torch.randint(11, (N, 5))


def head(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(),
    nn.Softsign(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.ReLU6(), nn.LogSigmoid(),
    nn.PReLU(), nn.Softmax(dim=1), nn.LogSoftmax(dim=-1), nn.Tanhshrink(), nn.Threshold(0.1, 0.2),
]  # fmt: skip

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        f"{type(a).__name__}-{i}": (
            lambda a=a: nn.Sequential(nn.Linear(6, 5), a, nn.Linear(5, 3)),
            vectors,
        )
        for i, a in enumerate(ACTIVATIONS)
    },
    "linear": (lambda: nn.Linear(6, 3), vectors),
    "no-bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3)), vectors),
    "bilinear": (lambda: _Twice(nn.Bilinear(6, 6, 3)), vectors),
    "conv1d": (
        lambda: head(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3), features=8),
        lambda: torch.randn(N, 2, 6),
    ),
    "conv2d": (
        lambda: head(
            nn.Conv2d(2, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, groups=2),
            features=16,
        ),
        images,
    ),
    "conv2d-strided": (
        lambda: head(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 2), features=12), images,
    ),
    "conv2d-wide": (
        lambda: head(nn.Conv2d(20, 3, 3, dilation=2), nn.ReLU(), features=12),
        lambda: images(channels=20),
    ),
    "conv3d": (
        lambda: head(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, 2), features=16),
        lambda: torch.randn(N, 1, 4, 4, 4),
    ),
    "transposed": (
        lambda: head(
            nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.Tanh(),
            nn.ConvTranspose2d(3, 1, 2), features=225,
        ),
        images,
    ),
    "transposed-1d-3d": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 2, 3), nn.Tanh(), nn.Unflatten(2, (2, 2, 2)),
            nn.ConvTranspose3d(2, 1, 2), nn.Flatten(), nn.Linear(27, 3),
        ),
        lambda: torch.randn(N, 2, 6),
    ),
    "batch-norm": (
        lambda: head(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False),
            features=64,
        ),
        images,
    ),
    "batch-norm-1d": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh()),
        vectors,
    ),
    "group-norm": (
        lambda: head(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.InstanceNorm2d(4, affine=True),
            features=64,
        ),
        images,
    ),
    "layer-norm": (
        lambda: nn.Sequential(
            nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(),
            nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4), nn.Linear(4, 3),
        ),
        vectors,
    ),
    "pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        images,
    ),
    "pooling-1d": (
        lambda: head(
            nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Tanh(), nn.AvgPool1d(2), nn.Upsample(4),
            features=16,
        ),
        lambda: torch.randn(N, 2, 8),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 3)), vectors,
    ),
    "residual": (
        lambda: head(nn.Conv2d(2, 4, 3), Residual(4), Residual(4, 2), features=16), images,
    ),
    "attention": (Attention, tokens),
    "attention-mask": (partial(Attention, mask=True), tokens),
    "encoder": (
        lambda: nn.Sequential(
            nn.Embedding(11, 8),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"),
            nn.Flatten(),
            nn.Linear(40, 3),
        ),
        tokens,
    ),
    "embedding-bag": (lambda: nn.Sequential(nn.EmbeddingBag(11, 4), nn.Linear(4, 3)), tokens),
    "branches": (Branches, vectors),
    "buffers": (Buffers, vectors),
}  # fmt: skip


class _Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def build(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    plan: Plan = PLAN,
    *,
    scale: Tensor | None = None,
    parameters: Any = None,
) -> tuple[LayeredEngine, GeneralEngine]:
    model = model.eval()
    layout = ParameterLayout(model, parameters)
    objective = Objective(model, loss_fn, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    if scale is None:
        scale = torch.ones(layout.size, dtype=torch.float64)
    plan = replace(plan, dtype=str(layout.dtype).removeprefix("torch."))
    backend = _backend.select("cpp")
    return (
        LayeredEngine(objective, layout, scale, plan, backend),
        GeneralEngine(objective, layout, scale, replace(plan, chunk=1), backend),
    )


def check(engines: tuple[LayeredEngine, GeneralEngine], rtol: float = 1e-10) -> None:
    """The same directions on both: losses on all lanes and on some, then gradients."""
    ids, some = np.arange(LANES), np.array([0, 2, 3])
    radii = np.array([0.3, 1.0, 2.5, 0.1])
    for engine in engines:
        engine.load(ids, Indexed(SEED, ids))
    ours, theirs = engines
    for _ in range(2):
        np.testing.assert_allclose(ours.loss(radii).values, theirs.loss(radii).values, rtol=rtol)
    np.testing.assert_allclose(
        ours.loss(2 * radii[some], some).values,
        theirs.loss(2 * radii[some], some).values,
        rtol=rtol,
    )
    for engine in engines:
        engine.load(some[1:], Indexed(SEED, 10 * some[1:]))
    np.testing.assert_allclose(ours.loss(radii).values, theirs.loss(radii).values, rtol=rtol)
    (loss, slope), (wanted, wanted_slope) = (engine.loss_and_grad(radii) for engine in engines)
    np.testing.assert_allclose(loss, wanted, rtol=rtol)
    largest = float(wanted_slope.abs().max())
    assert float((slope - wanted_slope).abs().max()) <= 10 * rtol * largest


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, cached: bool) -> None:
    make, inputs = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        try:
            model, x = make().double(), inputs()
            with torch.no_grad():
                outputs = model.eval()(x)
            target = torch.randint(outputs.shape[1], (N,))
        finally:
            torch.set_default_dtype(torch.float32)
    check(build(model, F.cross_entropy, (x, target), replace(PLAN, cached=cached)))


def outputs_for(loss: str) -> tuple[int, Tensor]:
    return {
        "classes": (3, torch.tensor([0, 2, 1, 1, 0, 2, 2])),
        "ignored": (3, torch.tensor([0, -100, 1, 1, -100, 2, 2])),
        "values": (3, torch.randn(N, 3, dtype=torch.float64)),
        "bits": (3, torch.randint(2, (N, 3)).double()),
        "shares": (3, torch.randn(N, 3, dtype=torch.float64).softmax(1)),
    }[loss]


LOSSES: list[tuple[Any, str]] = [
    (F.cross_entropy, "classes"),
    (nn.CrossEntropyLoss(), "ignored"),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), "classes"),
    (partial(F.cross_entropy, label_smoothing=0.1), "classes"),
    (F.cross_entropy, "shares"),
    (F.mse_loss, "values"),
    (nn.MSELoss(), "values"),
    (F.l1_loss, "values"),
    (nn.SmoothL1Loss(), "values"),
    (nn.HuberLoss(), "values"),
    (F.binary_cross_entropy_with_logits, "bits"),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()), "bits"),
    (lambda out, t: F.nll_loss(out.log_softmax(1), t), "classes"),
    (lambda out, t: F.kl_div(out.log_softmax(1), t, reduction="batchmean"), "shares"),
    (lambda out, t: ((out - t) ** 2).sum(1).sqrt().mean(), "values"),
    (lambda out, t: F.multi_margin_loss(out, t), "classes"),
    (lambda out, t: out.logsumexp(1).mean() - out.gather(1, t[:, None]).mean(), "classes"),
]


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(("loss_fn", "kind"), LOSSES)
def test_losses(loss_fn: Any, kind: str, rows: int) -> None:
    torch.manual_seed(2)
    width, target = outputs_for(kind)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, width)).double()
    x = torch.randn(N, 6, dtype=torch.float64)
    check(build(model, loss_fn, (x, target), replace(PLAN, rows=rows)))


def test_loss_of_the_model_alone() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(N, 6, dtype=torch.float64)

    def loss_fn(m: nn.Module) -> Tensor:
        ridge = sum(p.square().sum() for p in m.parameters())
        return m(x).square().mean() + 0.1 * ridge

    check(build(model, loss_fn, None))


@pytest.mark.parametrize("parameters", [None, ["0.weight", "2.bias"], "2.*"])
def test_some_parameters_and_scales(parameters: Any) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = torch.randn(N, 6, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    scale = torch.rand(ParameterLayout(model, parameters).size, dtype=torch.float64)
    for moving in (scale + 0.1, torch.where(scale > 0.3, scale, 0.0)):
        check(build(model, F.mse_loss, data, scale=moving, parameters=parameters))


def test_tied_parameters_are_one() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    data = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    engines = build(model, F.mse_loss, data)
    assert engines[0].dim == 16 + 8
    check(engines)


def test_several_batches_and_dense_rays() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [
        (torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 1, 5, 2)
    ]
    engines = build(model, F.cross_entropy, batches)
    check(engines)
    directions = torch.randn(2, engines[0].dim, dtype=torch.float64)
    lanes = np.array([3, 1])
    values = []
    for engine in engines:
        engine.load(lanes, Dense(directions))
        values.append(engine.loss(np.array([0.2, 0.4]), lanes).values)
    np.testing.assert_allclose(*values, rtol=1e-12)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("rows", [0, 20])
def test_losses_beyond_the_limit(loss_fn: Any, rows: int) -> None:
    """Lower bounds above it, flagged; the others in full."""
    torch.manual_seed(15)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2000, 6).double()
    target = torch.randn(2000, 3).double()
    if loss_fn is F.cross_entropy:
        target = torch.randint(3, (2000,))
    ours, theirs = build(model, loss_fn, (x, target), replace(PLAN, rows=rows))
    ids, radii = np.arange(LANES), np.array([0.01, 3.0, 9.0, 30.0])
    for engine in (ours, theirs):
        engine.load(ids, Indexed(SEED, ids))
    exact = theirs.loss(radii).values
    order = np.argsort(exact)
    limit = float(np.sqrt(exact[order[1]] * exact[order[2]]))
    losses = ours.loss(radii, limit=limit)
    assert losses.outside is not None
    beyond = exact > limit
    assert losses.outside.tolist() == beyond.tolist()
    np.testing.assert_allclose(losses.values[~beyond], exact[~beyond], rtol=1e-12)
    assert (losses.values[beyond] > limit).all()
    assert (losses.values[beyond] <= exact[beyond] * (1 + 1e-12)).all()
    # Something was saved.
    assert losses.values[order[3]] < exact[order[3]]
    assert ours.loss(radii).outside is None


@pytest.mark.parametrize("scaled", [False, True])
def test_antithetic_pairs(scaled: bool) -> None:
    """Partners share their noise; in whatever order and place they are loaded."""
    torch.manual_seed(14)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = torch.randn(N, 6).double(), torch.randn(N, 3).double()
    scale = torch.rand(43, dtype=torch.float64) + 0.5
    scale[::5] = 0.0
    engines = build(model, F.mse_loss, data, scale=scale if scaled else None)
    radii = np.array([0.3, 1.0, 2.5, 0.1])
    order = [([0, 1, 2, 3], [0, 1, 2, 3]), ([1, 3], [5, 4]), ([0], [7]), ([2, 0], [6, 3])]
    # The same direction twice, then its opposite.
    order += [([1], [6]), ([2], [8]), ([1], [9]), ([0], [7])]
    for lanes, ids in order:
        infos, values = [], []
        for engine in engines:
            rays = Indexed(SEED, np.array(ids), antithetic=True)
            infos.append(engine.load(np.array(lanes), rays))
            values.append(engine.loss(radii).values)
        np.testing.assert_allclose(*values, rtol=1e-12)
        for mine, theirs in zip(*infos, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def test_keyword_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor, *, extra: Tensor) -> Tensor:
            return self.a(x) * self.b(extra)

    torch.manual_seed(7)
    inputs = {"x": torch.randn(N, 6).double(), "extra": torch.randn(N, 2).double()}
    check(build(Pair().double(), F.mse_loss, (inputs, torch.randn(N, 3).double())))


@pytest.mark.parametrize("name", ["residual", "attention", "pooling"])
def test_single_precision(name: str) -> None:
    """To float rounding, in the memory order that convolutions like best."""
    make, inputs = MODELS[name]
    torch.manual_seed(8)
    model, x = make(), inputs()
    target = torch.randint(3, (N,))
    check(build(model, F.cross_entropy, (x, target)), rtol=2e-5)


@needs_onednn
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("branches", "double-buffer")]
)
def test_products_by_onednn(name: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SMALL_PRODUCT", 0)
    make, inputs = MODELS[name]
    torch.manual_seed(8)
    model, x = make(), inputs()
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.float()
    with torch.no_grad():
        target = torch.randint(model.float().eval()(x).shape[1], (N,))
    plan = replace(PLAN, products="onednn", cached=cached)
    check(build(model, F.cross_entropy, (x, target), plan), rtol=5e-5)


@needs_onednn
@pytest.mark.parametrize("bias", ["none", "one", "rays"])
@pytest.mark.parametrize("rows_of_rays", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_linear_of_rays(count: int, rows_of_rays: bool, bias: str) -> None:
    rows = torch.randn(count, 63, 17) if rows_of_rays else torch.randn(63, 17)
    # A slice of a longer row, as the engine's parameters are.
    weight = torch.randn(count, 400)[:, 3 : 3 + 19 * 17].view(count, 19, 17)
    added = {"none": None, "one": torch.randn(19), "rays": torch.randn(count, 19)}[bias]
    found = onednn.linear_of_rays(rows, weight, added)
    wanted = torch.matmul(rows.double(), weight.double().mT)
    if added is not None:
        wanted = wanted + (added[:, None] if bias == "rays" else added)
    assert found.shape == (count, 63, 19)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_onednn_is_for_float32_alone() -> None:
    rows, weight = torch.randn(5, 4).double(), torch.randn(3, 4).double()
    assert torch.equal(onednn.linear(rows, weight, None), F.linear(rows, weight))
    assert not onednn.is_available(torch.float64, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = onednn.linear(rows.float(), weight.float(), None)
        assert coarse.dtype == F.linear(rows.float(), weight.float()).dtype == torch.bfloat16
    # The plan of another dtype does no harm.
    model, data = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), None
    data = torch.randn(N, 4).double(), torch.randint(3, (N,))
    check(build(model, F.cross_entropy, data, replace(PLAN, products="onednn")))


@needs_onednn
@pytest.mark.parametrize("pays", [True, False])
def test_products_are_chosen_by_measurement(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = planning._Trial.seconds

    def timed(self: Any, engine: Any) -> float:
        by_onednn = isinstance(engine, LayeredEngine) and engine._plan.products == "onednn"
        return seconds(self, engine) * (1e-3 if by_onednn is pays else 1.0)

    monkeypatch.setattr(planning._Trial, "seconds", timed)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(40, 20)
    call: dict[str, Any] = {"data": (x, model(x).argmax(1)), "method": "radial", "progress": False}
    result = fastvol.estimate(model, F.cross_entropy, 40, engine="layered", **call)
    assert result.plan["products"] == ("onednn" if pays else "torch")
    again = fastvol.estimate(model, F.cross_entropy, 40, plan=result.plan, **call)
    assert np.array_equal(again.log_radii, result.log_radii)
    plan = {**result.plan, "products": "abacus"}
    with pytest.raises(ValueError, match=r"plan\['products'\]"):
        fastvol.estimate(model, F.cross_entropy, 40, plan=plan, **call)


def test_inputs_are_not_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x * 1).mul_(2.0))

    torch.manual_seed(9)
    x, target = torch.randn(N, 6).double(), torch.randn(N, 3).double()
    before = x.clone()
    check(build(Writes().double(), F.mse_loss, (x, target)))
    assert torch.equal(x, before)


class _Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if float(h.sum()) > 0 else -h


class _WritesToView(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        h[:, 0] = 1.0
        return h


class _Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Branching(6, 3), "depends on values"),
        (_WritesToView(6, 3), "writes to a tensor"),
        (_Noisy(6, 3), "random"),
    ],
)
def test_what_cannot_be_traced(model: nn.Module, reason: str) -> None:
    data = torch.randn(N, 6), torch.randn(N, 3)
    with pytest.raises(UntraceableError, match=reason):
        build(model, F.mse_loss, data)
    with pytest.raises(ValueError, match=f"engine='layered'.*{reason}"):
        fastvol.estimate(model, F.mse_loss, n=4, data=data, increase=1.0, engine="layered")


def test_a_loss_that_mixes_examples_is_not_split() -> None:
    """The choice is checked against the model: parts that see each other give another loss."""
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x, target = torch.randn(600, 6), torch.randn(600, 3)

    def loss_fn(out: Tensor, wanted: Tensor) -> Tensor:
        return (out - out.mean(0) - wanted).square().mean()

    call: dict[str, Any] = {"n": 200, "data": (x, target), "method": "radial", "progress": False}
    layered = fastvol.estimate(model, loss_fn, engine="layered", **call)
    assert layered.plan["engine"] == "layered"
    assert layered.plan["rows"] == 0
    general = fastvol.estimate(model, loss_fn, engine="general", **call)
    np.testing.assert_allclose(layered.log_radii, general.log_radii, atol=1e-3)


def test_estimate_chooses_and_says_why() -> None:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    x, target = torch.randn(400, 64), torch.randint(10, (400,))
    call: dict[str, Any] = {"data": (x, target), "method": "radial", "progress": False}
    result = fastvol.estimate(model, F.cross_entropy, n=3000, **call)
    assert result.provenance["engine"] == result.plan["engine"]
    assert "layered" in result.provenance["engine_reason"]
    general = fastvol.estimate(model, F.cross_entropy, n=50, engine="general", **call)
    assert general.plan["engine"] == "general"
    # The same directions, whichever engine ran.
    np.testing.assert_allclose(result.log_radii[:50], general.log_radii, atol=2e-3)
    again = fastvol.estimate(model, F.cross_entropy, n=50, plan=result.plan, **call)
    assert np.array_equal(again.log_radii, result.log_radii[:50]) or again.plan == result.plan


def test_untraceable_models_fall_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    # However fast the machine is, nothing is too short to be traced.
    monkeypatch.setattr(planning, "_SHORT_RUN", 0.0)
    torch.manual_seed(12)
    model = _Branching(6, 3)
    data = torch.randn(3000, 6), torch.randn(3000, 3)
    with pytest.warns(fastvol.FastvolWarning, match="one at a time"):
        result = fastvol.estimate(
            model, F.mse_loss, n=3000, data=data, method="radial", progress=False
        )
    assert result.provenance["engine"] == "general"
    assert "depends on values" in result.provenance["engine_reason"]


def test_annealed_runs_on_it() -> None:
    """Gradients and dense rays of a method with chains."""
    torch.manual_seed(13)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = torch.randn(N, 6).double(), torch.randn(N, 3).double()
    call: dict[str, Any] = {
        "n": 300, "data": data, "method": "annealed", "measure": fastvol.Gaussian(0.3),
        "preconditioner": None, "replicates": 1, "progress": False,
    }  # fmt: skip
    ours = fastvol.estimate(model, F.mse_loss, engine="layered", **call)
    theirs = fastvol.estimate(model, F.mse_loss, engine="general", **call)
    assert ours.plan["engine"] == "layered"
    assert abs(ours.log_volume - theirs.log_volume) < 3 * (ours.stderr + theirs.stderr)
