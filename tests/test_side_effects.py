"""A run leaves the model, the gradients and the random generators as they were, however it ends."""

from __future__ import annotations

import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvol

# Blocks of 4 directions, so that a callback comes long before the run is over.
PLAN = {
    "engine": "general",
    "chunk": 1,
    "lanes": 4,
    "keep_rows": True,
    "dtype": "float32",
    "threads": 1,
    "noise_threads": 1,
    "backend": "cpp",
    "block": 4,
}
PLAN64 = {**PLAN, "dtype": "float64"}
N = 9


class PlannedError(Exception):
    """Raised by a loss or a callback on purpose."""


def raw(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    flat = tensor.detach().reshape(-1).contiguous()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def observe(model: nn.Module) -> dict[str, Any]:
    """Everything that a run could leave changed, in comparable form."""
    seen: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen[f"parameter {name}"] = (
            id(parameter),
            parameter.data_ptr(),
            raw(parameter),
            parameter.requires_grad,
            id(parameter.grad),
            raw(parameter.grad),
        )
    for name, buffer in model.named_buffers(remove_duplicate=False):
        seen[f"buffer {name}"] = (id(buffer), buffer.data_ptr(), raw(buffer))
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"module {name}"] = (id(module), module.training, sorted(vars(module)))
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    seen["generators"] = (
        raw(torch.get_rng_state()),
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2:],
    )
    seen["torch"] = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    return seen


def with_gradients(model: nn.Module) -> nn.Module:
    """Fills ``.grad`` of every other parameter that has one."""
    for parameter in list(model.parameters())[::2]:
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    return model


class Tied(nn.Module):
    """Embedding and read-out share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.readout = nn.Linear(3, 5, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.embedding(tokens))


class Counting(nn.Module):
    """Writes to its buffers in evaluation mode too: one in place, one by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("undefined", torch.full((2,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.assigned = self.assigned + 1
        self.undefined += 1
        return self.linear(x)


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    for _ in range(3):
        model(torch.randn(6, 3))
    model.train()
    model[1].eval()
    return model


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def mixed_modes() -> nn.Module:
    model = nn.Sequential(dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)))
    model.eval()
    model[0][1].train()
    model[1].training = True
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": batch_norm,
    "dropout": dropout,
    "tied weights": Tied,
    "partly frozen": partly_frozen,
    "mixed modes": mixed_modes,
    "writes to buffers": Counting,
}


def problem(name: str) -> tuple[nn.Module, Callable[..., Any], tuple[Tensor, Tensor]]:
    """A model, its loss and data; the loss draws from every global generator."""
    model = with_gradients(MODELS[name]())
    x = torch.randint(5, (6,)) if name == "tied weights" else torch.randn(6, 3)
    target = torch.randint(2, (6,))

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        torch.rand(3)
        random.random()
        np.random.rand(2)  # noqa: NPY002
        return F.cross_entropy(output, target)

    return model, loss_fn, (x, target)


@pytest.mark.parametrize("name", MODELS)
def test_success(name: str) -> None:
    model, loss_fn, data = problem(name)
    before = observe(model)
    result = fastvol.estimate(model, loss_fn, n=N, data=data, plan=PLAN)
    assert np.isfinite(result.log_volume)
    assert observe(model) == before


@pytest.mark.parametrize("raised", [PlannedError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["at once", "after a block"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_raises(name: str, when: str, raised: type[BaseException]) -> None:
    model, quiet, data = problem(name)
    armed = when == "at once"

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if armed:
            raise raised("here")
        return quiet(output, target)

    def arm(progress: fastvol.Progress) -> None:
        nonlocal armed
        armed = True

    before = observe(model)
    expected = KeyboardInterrupt if raised is KeyboardInterrupt else fastvol.FastvolError
    with pytest.raises(expected, match="here") as caught:
        fastvol.estimate(model, loss_fn, n=N, data=data, plan=PLAN, callbacks=[arm])
    if raised is PlannedError:
        assert isinstance(caught.value.__cause__, PlannedError)
    assert observe(model) == before


@pytest.mark.parametrize("raised", [PlannedError, KeyboardInterrupt])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_callback_raises(backend: str, raised: type[BaseException]) -> None:
    model, loss_fn, data = problem("dropout")
    seen = []

    def stop(progress: fastvol.Progress) -> None:
        seen.append(progress.n_done)
        if progress.n_done == 8:
            raise raised("enough")

    before = observe(model)
    with pytest.raises(raised, match="enough"):
        fastvol.estimate(
            model, loss_fn, n=N, data=data, backend=backend, plan={**PLAN, "backend": backend},
            callbacks=[stop],
        )  # fmt: skip
    assert seen == [4, 8]
    assert observe(model) == before


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_interrupt_signal(backend: str) -> None:
    model, loss_fn, data = problem("batch norm")
    done = []

    def interrupt_soon(progress: fastvol.Progress) -> None:
        done.append(progress.n_done)
        if len(done) == 1:
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()

    before = observe(model)
    with pytest.raises(KeyboardInterrupt):
        fastvol.estimate(
            model, loss_fn, n=100_000, data=data, method="radial", backend=backend,
            # Screens for so long a run would be measured for a minute.
            plan={**PLAN, "backend": backend, "screening": "off"}, callbacks=[interrupt_soon],
        )  # fmt: skip
    assert 4 <= done[-1] < 100_000
    assert observe(model) == before


@pytest.mark.parametrize("raised", [None, PlannedError, KeyboardInterrupt])
def test_under_vmap(raised: type[BaseException] | None) -> None:
    model = with_gradients(dropout())
    x, target = torch.randn(6, 3), torch.randint(2, (6,))
    armed = False

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if armed:
            raise raised("here")
        return F.cross_entropy(output, target)

    def arm(progress: fastvol.Progress) -> None:
        nonlocal armed
        armed = raised is not None

    plan = {**PLAN, "chunk": 4}
    before = observe(model)
    if raised is None:
        fastvol.estimate(model, loss_fn, n=N, data=(x, target), plan=plan)
    else:
        expected = KeyboardInterrupt if raised is KeyboardInterrupt else fastvol.FastvolError
        with pytest.raises(expected, match="here"):
            fastvol.estimate(model, loss_fn, n=N, data=(x, target), plan=plan, callbacks=[arm])
    assert observe(model) == before


def test_buffers_after_failed_vmap() -> None:
    """The probe of vmap leaves a batched tensor in the buffer that the model assigns."""
    model = Counting()
    model.linear.requires_grad_(True)

    def loss_fn(model: nn.Module) -> Tensor:
        model.assigned = model.linear.bias * 2
        return model.linear.weight.square().sum() + model.linear.bias.square().sum()

    before = observe(model)
    fastvol.estimate(model, loss_fn, n=8, lanes=4, threshold=10.0)
    assert observe(model) == before


def test_gradients_written_by_the_loss() -> None:
    """A loss may call backward; what it adds to ``.grad`` of a parameter that stays is undone."""
    model = with_gradients(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    x = torch.randn(4, 2)

    def loss_fn(model: nn.Module) -> float:
        with torch.enable_grad():
            loss = model(x).square().mean()
            loss.backward()
        return float(loss)

    before = observe(model)
    result = fastvol.estimate(model, loss_fn, n=4, parameters="1.*", increase=1.0, plan=PLAN)
    assert result.dim == 3
    assert observe(model) == before


def test_mode_changed_by_the_loss() -> None:
    """Batch statistics of training mode are a fixed function too; the running ones are restored."""
    model = batch_norm()
    x, target = torch.randn(6, 3), torch.randint(2, (6,))

    def loss_fn(model: nn.Module) -> Tensor:
        model.train()
        return F.cross_entropy(model(x), target)

    before = observe(model)
    fastvol.estimate(model, loss_fn, n=8, plan=PLAN)
    assert observe(model) == before


def test_dropout_is_switched_off() -> None:
    """In training mode the loss would differ between calls; evaluation mode makes it a function."""
    model = dropout()
    x, target = torch.randn(6, 3), torch.randint(2, (6,))
    training = fastvol.estimate(model, F.cross_entropy, n=8, data=(x, target), plan=PLAN)
    model.eval()
    evaluation = fastvol.estimate(model, F.cross_entropy, n=8, data=(x, target), plan=PLAN)
    assert np.array_equal(training.log_radii, evaluation.log_radii)


def test_global_generators_do_not_matter() -> None:
    model, loss_fn, data = problem("dropout")
    first = fastvol.estimate(model, loss_fn, n=8, data=data, plan=PLAN)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    second = fastvol.estimate(model, loss_fn, n=8, data=data, plan=PLAN)
    assert np.array_equal(first.log_radii, second.log_radii)


def test_compiled_model() -> None:
    model = with_gradients(dropout())
    try:
        compiled = torch.compile(model, backend="eager")
    except RuntimeError as error:
        pytest.skip(f"torch.compile is not available: {error}")
    x, target = torch.randn(6, 3), torch.randint(2, (6,))
    before = observe(compiled)
    through = fastvol.estimate(compiled, F.cross_entropy, n=8, data=(x, target), plan=PLAN)
    assert observe(compiled) == before
    plain = fastvol.estimate(model, F.cross_entropy, n=8, data=(x, target), plan=PLAN)
    assert np.array_equal(through.log_radii, plain.log_radii)
    assert through.config == plain.config


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One gloo process; no network."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_model() -> None:
    model = with_gradients(batch_norm())
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, target = torch.randn(6, 3), torch.randint(2, (6,))
    before = observe(wrapped)
    through = fastvol.estimate(wrapped, F.cross_entropy, n=8, data=(x, target), plan=PLAN)
    assert observe(wrapped) == before
    plain = fastvol.estimate(model, F.cross_entropy, n=8, data=(x, target), plan=PLAN)
    assert np.array_equal(through.log_radii, plain.log_radii)
    assert through.config == plain.config


@pytest.mark.parametrize("convert", [torch.Tensor.mean, float], ids=["tensor", "float"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformer(attention: str, convert: Callable[[Tensor], Any]) -> None:
    """Whether or not vmap can run it; a loss that leaves PyTorch never does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    model = with_gradients(transformers.GPT2LMHeadModel(config)).train()
    tokens = torch.randint(11, (2, 6))

    def loss_fn(model: nn.Module) -> Tensor:
        return convert(model(input_ids=tokens, labels=tokens).loss)

    before = observe(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fastvol.estimate(model, loss_fn, n=2, lanes=2, rtol=1e-3)
    assert observe(model) == before
    fell_back = result.provenance["fell_back"]
    assert [w.category for w in caught] == [fastvol.FastvolWarning] * len(fell_back)
    assert len(fell_back) == 1 or convert is not float
    # The read-out is tied to the embedding: counted once.
    assert result.dim == sum(p.numel() for p in model.parameters())
    singly = fastvol.estimate(model, loss_fn, n=2, plan={**PLAN, "lanes": 2}, rtol=1e-3)
    np.testing.assert_allclose(result.log_radii, singly.log_radii, rtol=0, atol=2e-3)


class Lazy:
    """Batches made anew at every reading, never all at once."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.x), self.size):
            yield self.x[start : start + self.size].clone(), self.y[start : start + self.size]


def in_every_form(x: Tensor, y: Tensor) -> dict[str, Any]:
    """The same examples, in uneven batches of 4, as everything that ``data`` may be."""
    batches = list(zip(x.split(4), y.split(4), strict=True))
    return {
        "list": batches,
        "tuple": tuple(batches),
        "keywords": [({"input": a}, b) for a, b in batches],
        "loader": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=False),
        "lazy": Lazy(x, y, 4),
        "lazy, singly": Lazy(x, y, 1),
    }


OPTIONS: dict[str, Any] = {"n": 4, "rtol": 1e-12}


@pytest.mark.parametrize("chunk", [1, 4])
def test_every_form_of_data_agrees(
    regression: tuple[nn.Module, tuple[Tensor, Tensor]], chunk: int
) -> None:
    model, (x, y) = regression
    options = {**OPTIONS, "plan": {**PLAN64, "chunk": chunk}}
    whole = fastvol.estimate(model, F.mse_loss, data=(x, y), **options)
    closure = fastvol.estimate(model, lambda m: F.mse_loss(m(x), y), **options)
    assert np.array_equal(whole.log_radii, closure.log_radii)
    for form, data in in_every_form(x, y).items():
        before = observe(model)
        other = fastvol.estimate(model, F.mse_loss, data=data, **options)
        np.testing.assert_allclose(
            other.log_radii, whole.log_radii, rtol=0, atol=1e-10, err_msg=form
        )
        assert observe(model) == before, form


def test_shuffling_is_refused(regression: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    model, (x, y) = regression
    before = observe(model)
    with pytest.raises(ValueError, match=r"data is a DataLoader that shuffles"):
        fastvol.estimate(
            model, F.mse_loss, data=DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
        )
    assert observe(model) == before


def test_other_order_is_noticed(regression: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    model, (x, y) = regression

    class Shuffled(Lazy):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            order = torch.randperm(len(self.x))
            yield from zip(self.x[order].split(4), self.y[order].split(4), strict=True)

    before = observe(model)
    with pytest.raises(ValueError, match=r"data gave other batches, or another order"):
        fastvol.estimate(model, F.mse_loss, data=Shuffled(x, y, 4))
    assert observe(model) == before


def test_undefined_entries_in_data(regression: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    """NaN marks a missing target; that is no change of the data between two readings."""
    model, (x, y) = regression
    y[3], y[4] = float("nan"), float("-inf")

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        known = target.isfinite()
        return torch.where(known, output - target.nan_to_num(0.0), 0.0).square().mean()

    whole = fastvol.estimate(model, loss_fn, data=(x, y), plan=PLAN64, **OPTIONS)
    lazy = fastvol.estimate(model, loss_fn, data=Lazy(x, y, 4), plan=PLAN64, **OPTIONS)
    np.testing.assert_allclose(lazy.log_radii, whole.log_radii, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(
            weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1
        ),
        nn.CrossEntropyLoss(ignore_index=1),
    ],
    ids=["function", "module", "weights", "weights and smoothing", "ignore_index=1"],
)
@pytest.mark.parametrize("chunk", [1, 4])
def test_weighted_mean(
    classification: tuple[nn.Module, tuple[Tensor, Tensor]], loss_fn: Any, chunk: int
) -> None:
    """Ignored targets do not count, nor does a batch that has no other."""
    model, (x, y) = classification
    ignored = getattr(loss_fn, "ignore_index", -100)
    y[[0, 2, 3]] = ignored
    y[4:8] = ignored
    options = {**OPTIONS, "plan": {**PLAN64, "chunk": chunk}}
    whole = fastvol.estimate(model, loss_fn, data=(x, y), **options)
    expected = F.cross_entropy(
        model(x).detach(), y, weight=getattr(loss_fn, "weight", None), ignore_index=ignored,
        label_smoothing=getattr(loss_fn, "label_smoothing", 0.0),
    )  # fmt: skip
    assert whole.config["loss0"] == pytest.approx(float(expected), rel=1e-14)
    forms = in_every_form(x, y)
    for form in ("list", "loader", "lazy"):
        other = fastvol.estimate(model, loss_fn, data=forms[form], **options)
        assert other.config["loss0"] == pytest.approx(float(expected), rel=1e-14), form
        np.testing.assert_allclose(
            other.log_radii, whole.log_radii, rtol=0, atol=1e-10, err_msg=form
        )


def test_token_weights() -> None:
    """Sequences of uneven length, padded with the ignored index: the mean is over tokens."""
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7)).double()
    tokens, labels = torch.randint(7, (5, 4)), torch.randint(7, (5, 4))
    for row, length in enumerate([4, 1, 3, 0, 2]):
        labels[row, length:] = -100

    def flat(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens).movedim(-1, 1)

    closure = fastvol.estimate(model, lambda m: flat(m(tokens), labels), plan=PLAN64, **OPTIONS)
    rows = [(tokens[i : i + 1], labels[i : i + 1]) for i in range(5)]
    batches = fastvol.estimate(Classes(), F.cross_entropy, data=rows, plan=PLAN64, **OPTIONS)
    np.testing.assert_allclose(batches.log_radii, closure.log_radii, rtol=0, atol=1e-10)


def test_a_loss_that_writes_to_a_frozen_parameter_is_told() -> None:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)

    def loss(m: nn.Linear) -> torch.Tensor:
        with torch.no_grad():
            m.bias.add_(0.0)
        return m.weight.square().sum()

    with pytest.raises(fastvol.FastvolError, match=r"loss_fn .* 'bias'"):
        fastvol.estimate(model, loss, n=10, increase=1.0)
