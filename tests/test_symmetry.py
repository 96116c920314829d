"""Every symmetry that is counted is applied to a model; those that are not counted must fail."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from fastvol import FastvolError, FastvolWarning
from fastvol._symmetry import SymmetryLogCount, symmetry_log_count

LOG2 = math.log(2)
Parameters = dict[str, Tensor]


def log_factorial(n: int) -> float:
    return math.log(math.factorial(n))


def randomise(model: nn.Module) -> nn.Module:
    """Float64, eval mode, and no parameter or buffer at the value that it starts from."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


def values(model: nn.Module) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_same_function(model: nn.Module, changed: Parameters, x: Tensor) -> bool:
    """Whether the model with these parameters, and its own buffers, gives the same outputs."""
    original = values(model)
    assert any(not torch.equal(original[name], changed[name]) for name in original)
    with torch.no_grad():
        before, after = model(x), functional_call(model, changed, (x,))
    assert before.std() > 1e-3
    return torch.allclose(before, after, rtol=1e-8, atol=1e-9 * float(before.abs().max()))


def along(tensor: Tensor, axis: int, width: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies ``change`` to the ``width`` equal blocks of one axis, brought to the front."""
    moved = tensor.movedim(axis, 0)
    return change(moved.reshape(width, -1)).reshape(moved.shape).movedim(0, axis)


@dataclass
class Units:
    """Hidden units, and where they lie: the axes of the tensors of weights around them."""

    width: int
    incoming: Sequence[tuple[str, int]]
    outgoing: Sequence[tuple[str, int]]
    odd: bool

    def permute(self, parameters: Parameters, order: Tensor) -> None:
        for name, axis in (*self.incoming, *self.outgoing):
            parameters[name] = along(parameters[name], axis, self.width, lambda b: b[order])

    def flip(self, parameters: Parameters, signs: Tensor) -> None:
        def change(blocks: Tensor) -> Tensor:
            return blocks * signs[:, None]

        for name, axis in (*self.incoming, *self.outgoing):
            parameters[name] = along(parameters[name], axis, self.width, change)


def shuffle(n: int) -> Tensor:
    """A random permutation that is not the identity."""
    while True:
        order = torch.randperm(n)
        if not torch.equal(order, torch.arange(n)):
            return order


def dense(name: str) -> list[tuple[str, int]]:
    return [(f"{name}.weight", 0), (f"{name}.bias", 0)]


def plain_cases() -> dict[str, tuple[nn.Module, tuple[int, ...], list[Units], float]]:
    """Models, inputs, units, and the log number of flips beside those of the units."""
    linear, conv2 = nn.Linear, nn.Conv2d
    return {
        "mlp": (
            nn.Sequential(linear(3, 5), nn.Tanh(), linear(5, 4), nn.ReLU(), linear(4, 2)),
            (7, 3),
            [
                Units(5, dense("0"), [("2.weight", 1)], True),
                Units(4, dense("2"), [("4.weight", 1)], False),
            ],
            0.0,
        ),
        "average pooling": (
            nn.Sequential(
                conv2(2, 3, 3, padding=1),
                nn.Tanh(),
                nn.AvgPool2d(2, padding=1),
                conv2(3, 4, 2),
                nn.Softsign(),
                nn.Flatten(),
                nn.Dropout(),
                linear(4 * 12, 5),
                nn.Tanhshrink(),
                linear(5, 2),
            ),
            (3, 2, 7, 9),
            [
                Units(3, dense("0"), [("3.weight", 1)], True),
                Units(4, dense("3"), [("7.weight", 1)], True),
                Units(5, dense("7"), [("9.weight", 1)], True),
            ],
            0.0,
        ),
        "max pooling": (
            nn.Sequential(
                nn.Conv1d(2, 3, 3, bias=False),
                nn.Tanh(),
                nn.MaxPool1d(2),
                nn.Conv1d(3, 4, 2),
                nn.Hardtanh(-0.5, 0.5),
                nn.AdaptiveAvgPool1d(1),
                nn.Flatten(),
                linear(4, 2),
            ),
            (3, 2, 11),
            [
                Units(3, [("0.weight", 0)], [("3.weight", 1)], False),
                Units(4, dense("3"), [("7.weight", 1)], True),
            ],
            0.0,
        ),
        "paddings": (
            nn.Sequential(
                nn.Conv3d(1, 3, 2),
                nn.Softshrink(0.1),
                nn.ReplicationPad3d(1),
                nn.ConstantPad3d(1, 0.0),
                nn.Upsample(scale_factor=2),
                nn.Conv3d(3, 2, 3, padding=1, padding_mode="circular"),
                nn.Hardshrink(0.1),
                nn.ConstantPad3d(1, 0.3),
                nn.Conv3d(2, 2, 3),
            ),
            (2, 1, 3, 3, 3),
            [
                Units(3, dense("0"), [("5.weight", 1)], True),
                Units(2, dense("5"), [("8.weight", 1)], False),
            ],
            0.0,
        ),
        "decoder": (
            nn.Sequential(
                linear(3, 16),
                nn.Tanh(),
                nn.Unflatten(1, (4, 2, 2)),
                nn.ConvTranspose2d(4, 3, 3, stride=2),
                nn.Tanh(),
                nn.ConvTranspose2d(3, 1, 2),
            ),
            (5, 3),
            [
                Units(4, dense("0"), [("3.weight", 0)], True),
                Units(3, [("3.weight", 1), ("3.bias", 0)], [("5.weight", 0)], True),
            ],
            0.0,
        ),
        "slopes": (
            nn.Sequential(linear(3, 5), nn.PReLU(5), linear(5, 4), nn.PReLU(), linear(4, 2)),
            (7, 3),
            [
                Units(5, [*dense("0"), ("1.weight", 0)], [("2.weight", 1)], False),
                Units(4, dense("2"), [("4.weight", 1)], False),
            ],
            0.0,
        ),
        # The sign of what is normalised, and of the norm's weight: see test_norm_signs.
        "layer norm": (
            nn.Sequential(
                conv2(1, 3, 2),
                nn.LayerNorm([3, 3, 4]),
                nn.ReLU(),
                nn.Flatten(),
                linear(36, 5),
                nn.LayerNorm(5),
                nn.ReLU(),
                linear(5, 2),
            ),
            (2, 1, 4, 5),
            [
                Units(3, [*dense("0"), *dense("1")], [("4.weight", 1)], False),
                Units(5, [*dense("4"), *dense("5")], [("7.weight", 1)], False),
            ],
            2 * LOG2,
        ),
        "batch statistics": (
            nn.Sequential(
                linear(3, 5),
                nn.BatchNorm1d(5, track_running_stats=False),
                nn.ReLU(),
                linear(5, 4),
                nn.RMSNorm(4),
                nn.ReLU(),
                linear(4, 2),
            ),
            (40, 3),
            [
                Units(5, [*dense("0"), *dense("1")], [("3.weight", 1)], False),
                Units(4, [*dense("3"), ("4.weight", 0)], [("6.weight", 1)], False),
            ],
            9 * LOG2,
        ),
        "softmax": (
            nn.Sequential(linear(3, 4), nn.Softmax(1), linear(4, 2)),
            (7, 3),
            [Units(4, dense("0"), [("2.weight", 1)], False)],
            0.0,
        ),
    }


@pytest.mark.parametrize("name", plain_cases())
def test_permutations_and_flips_are_what_is_counted(name: str) -> None:
    model, shape, places, log_more = plain_cases()[name]
    randomise(model)
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(3):
        changed = values(model)
        for units in places:
            units.permute(changed, shuffle(units.width))
        assert is_same_function(model, changed, x)
    for units in places:
        # Incoming and outgoing weights have to move together.
        changed = values(model)
        order = torch.arange(units.width).roll(1)
        Units(units.width, units.incoming, [], True).permute(changed, order)
        assert not is_same_function(model, changed, x)
        for unit in range(units.width):
            signs = torch.ones(units.width, dtype=torch.float64)
            signs[unit] = -1
            changed = values(model)
            units.flip(changed, signs)
            assert is_same_function(model, changed, x) == units.odd
    count = symmetry_log_count(model)
    log_permutations = sum(log_factorial(units.width) for units in places)
    log_flips = sum(units.width * LOG2 for units in places if units.odd) + log_more
    assert count.log_permutations == pytest.approx(log_permutations, rel=1e-12)
    assert count.log_sign_flips == pytest.approx(log_flips, rel=1e-12)
    assert float(count) == pytest.approx(log_permutations + log_flips, rel=1e-12)
    assert [u.units for u in count.units] == [units.width for units in places]
    assert not any(u.held for u in count.units)


def signed_permutations(n: int) -> Tensor:
    """All 2^n n! of them, float64 ``[2^n n!, n, n]``."""
    unit = torch.eye(n, dtype=torch.float64)
    return torch.stack(
        [
            unit[list(order)] * torch.tensor(signs, dtype=torch.float64)[:, None]
            for order in itertools.permutations(range(n))
            for signs in itertools.product((1, -1), repeat=n)
        ]
    )


SYMMETRIC = [
    (nn.Tanh(), 0.0, 0.0),
    (nn.Softsign(), 0.0, 0.0),
    (nn.Tanhshrink(), 0.0, 0.0),
    (nn.Softshrink(0.3), 0.0, 0.0),
    (nn.Hardshrink(0.3), 0.0, 0.0),
    (nn.Hardtanh(-0.7, 0.7), 0.0, 0.0),
    (nn.Hardtanh(-0.5, 1.0), 0.25, 0.25),
    (nn.ReLU6(), 3.0, 3.0),
    (nn.Sigmoid(), 0.0, 0.5),
    (nn.Hardsigmoid(), 0.0, 0.5),
]
ASYMMETRIC = [
    nn.ReLU(), nn.LeakyReLU(0.1), nn.RReLU(), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU(),
    nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Softplus(), nn.LogSigmoid(),
    nn.Threshold(0.1, 0.2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "p", "q"),
    [*SYMMETRIC, *((activation, 0.0, 0.0) for activation in ASYMMETRIC)],
    ids=repr,
)
def test_brute_force_on_a_tiny_network(activation: nn.Module, p: float, q: float) -> None:
    # All pairs of a signed permutation of the incoming weights and one of the outgoing ones, with
    # the biases that take up a centre of symmetry (p, q).
    model = randomise(nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 1)))
    with torch.no_grad():
        model[0].weight.mul_(3.0)
        x = 2 * torch.randn(50, 2, dtype=torch.float64)
        group = signed_permutations(3)
        weight, bias = group @ model[0].weight, group @ (model[0].bias - p) + p
        hidden = activation(x @ weight.mT + bias[:, None])
        outgoing = model[2].weight[0] @ group.mT
        last = model[2].bias + q * (model[2].weight.sum() - outgoing.sum(1))
        outputs = torch.einsum("pnh,qh->pqn", hidden, outgoing) + last[:, None]
        same = ((outputs - model(x)[:, 0]).abs() < 1e-10).all(dim=-1)
        pairs = same.nonzero()
        copies = torch.cat(
            [
                weight[pairs[:, 0]].flatten(1),
                bias[pairs[:, 0]],
                outgoing[pairs[:, 1]],
                last[pairs[:, 1], None],
            ],
            dim=1,
        )
    distinct = len(torch.unique(copies, dim=0))
    assert distinct == len(pairs) == (6 if activation in ASYMMETRIC else 48)
    assert math.exp(symmetry_log_count(model)) == pytest.approx(distinct)


def convolutions(widths: Sequence[int], groups: Sequence[int], norms: dict[int, int]) -> nn.Module:
    """1-D convolutions; ``norms`` gives the groups of a GroupNorm after some of them."""
    layers: list[nn.Module] = []
    for i, g in enumerate(groups):
        layers.append(nn.Conv1d(widths[i], widths[i + 1], 2, groups=g))
        if i in norms:
            layers.append(nn.GroupNorm(norms[i], widths[i + 1]))
        layers.append(nn.ReLU())
    return randomise(nn.Sequential(*layers))


def without_groups(model: nn.Module) -> nn.Module:
    """The same function with dense convolutions: zeros where the groups had no weights."""
    model = copy.deepcopy(model)
    for i, layer in enumerate(model):
        if not isinstance(layer, nn.Conv1d):
            continue
        full = nn.Conv1d(layer.in_channels, layer.out_channels, 2).double()
        n_in, n_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        with torch.no_grad():
            full.weight.zero_()
            full.bias.copy_(layer.bias)
            for g in range(layer.groups):
                rows = slice(g * n_out, (g + 1) * n_out)
                full.weight[rows, g * n_in : (g + 1) * n_in] = layer.weight[rows]
        model[i] = full
    return model


@pytest.mark.parametrize(
    ("widths", "groups", "norms"),
    [
        ((2, 4, 4, 2), (1, 2, 1), {}),
        ((2, 4, 4, 2), (1, 4, 1), {}),
        ((2, 2, 4, 2), (1, 2, 1), {}),
        ((1, 4, 2, 3), (1, 2, 1), {}),
        ((4, 4, 3, 2), (2, 1, 1), {}),
        ((2, 3, 4, 2), (1, 1, 2), {}),
        ((4, 4, 4, 4), (2, 2, 2), {}),
        ((1, 4, 4, 4, 1), (1, 2, 2, 1), {}),
        ((1, 4, 4, 4, 1), (1, 2, 4, 1), {}),
        ((1, 4, 4, 2, 1), (1, 4, 2, 1), {}),
        ((4, 4, 4, 4, 1), (2, 4, 2, 1), {}),
        ((1, 4, 4, 4, 1), (1, 4, 1, 1), {1: 2}),
        ((2, 4, 2), (1, 1), {0: 2}),
        ((2, 4, 2), (1, 1), {0: 4}),
        ((2, 4, 2), (1, 1), {0: 1}),
        ((2, 4, 4, 2), (1, 2, 1), {0: 4}),
        ((2, 4, 4, 2), (1, 2, 1), {1: 4}),
        ((2, 4, 4, 2), (1, 4, 1), {0: 2}),
        ((2, 4, 4, 2), (1, 4, 1), {1: 2}),
        ((1, 2, 6, 1), (1, 2, 1), {1: 6}),
    ],
)
def test_brute_force_on_groups(
    widths: tuple[int, ...], groups: tuple[int, ...], norms: dict[int, int]
) -> None:
    model = convolutions(widths, groups, norms)
    full = without_groups(model)
    x = torch.randn(2, widths[0], len(groups) + 3, dtype=torch.float64)
    torch.testing.assert_close(full(x), model(x))
    layers = [i for i, layer in enumerate(full) if isinstance(layer, nn.Conv1d)]
    parameters = values(full)

    # Extends by one layer at a time: permutations of the units before it are given.
    def count(place: int, before: Tensor, changed: Parameters) -> int:
        name = layers[place]
        last = place == len(layers) - 1
        width = widths[place + 1]
        found = 0
        for order in [range(width)] if last else itertools.permutations(range(width)):
            after = torch.tensor(order)
            weight = parameters[f"{name}.weight"]
            new = weight[after][:, before]
            # What stands where the groups have no weights is no parameter.
            if bool(new[weight == 0].any()):
                continue
            trial = {**changed, f"{name}.weight": new}
            for moved in (f"{name}.bias", f"{name + 1}.weight", f"{name + 1}.bias"):
                if moved in parameters:
                    trial[moved] = parameters[moved][after]
            if not last:
                found += count(place + 1, after, trial)
                continue
            with torch.no_grad():
                found += torch.allclose(functional_call(full, trial, (x,)), full(x), atol=1e-10)
        return found

    found = count(0, torch.arange(widths[0]), parameters)
    assert math.exp(symmetry_log_count(model).log_permutations) == pytest.approx(found)


def all_signs(n: int) -> list[Tensor]:
    """All but the identity."""
    return [
        torch.tensor(s, dtype=torch.float64)
        for s in itertools.product((1, -1), repeat=n)
        if min(s) < 0
    ]


def around_norm(norm: nn.Module, activation: nn.Module, bias: bool) -> tuple[nn.Module, Tensor]:
    """Two layers with a norm of 4 units between them, and inputs."""
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        layers, shape = (nn.Linear(2, 4, bias=bias), nn.Linear(4, 1)), (6, 2)
    else:
        layers, shape = (nn.Conv1d(2, 4, 2, bias=bias), nn.Conv1d(4, 1, 2)), (6, 2, 5)
    model = nn.Sequential(layers[0], copy.deepcopy(norm), activation, layers[1])
    return randomise(model), torch.randn(shape, dtype=torch.float64)


def flip_before(model: nn.Module, parameters: Parameters, signs: Tensor) -> Parameters:
    """Flips what is normalised and the norm's weight; an offset makes up for the running mean."""
    new = dict(parameters)
    incoming = [(name, 0) for name in ("0.weight", "0.bias") if name in new]
    Units(4, incoming, [("1.weight", 0)], True).flip(new, signs)
    mean = getattr(model[1], "running_mean", None)
    if mean is not None and "0.bias" in new:
        new["0.bias"] = new["0.bias"] + (1 - signs) * mean
    elif mean is not None:
        slope = parameters["1.weight"] / torch.sqrt(model[1].running_var + model[1].eps)
        new["1.bias"] = new["1.bias"] - (1 - signs) * slope * mean
    return new


def flip_after(parameters: Parameters, signs: Tensor) -> Parameters:
    """Flips the norm's weight and bias, and the outgoing weights."""
    new = dict(parameters)
    incoming = [(name, 0) for name in ("1.weight", "1.bias") if name in new]
    Units(4, incoming, [("3.weight", 1)], True).flip(new, signs)
    return new


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()], ids=repr)
@pytest.mark.parametrize(
    ("norm", "n_signs"),
    [
        (nn.GroupNorm(2, 4), 2),
        (nn.GroupNorm(1, 4), 1),
        (nn.LayerNorm(4), 1),
        (nn.RMSNorm(4), 4),
        (nn.InstanceNorm1d(4, affine=True), 4),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 4),
        (nn.BatchNorm1d(4, track_running_stats=False), 4),
        (nn.BatchNorm1d(4), 4),
    ],
    ids=repr,
)
def test_norm_signs(norm: nn.Module, n_signs: int, activation: nn.Module, bias: bool) -> None:
    model, x = around_norm(norm, activation, bias)
    odd = isinstance(activation, nn.Tanh)
    start = values(model)
    before = sum(is_same_function(model, flip_before(model, start, s), x) for s in all_signs(4))
    after = sum(is_same_function(model, flip_after(start, s), x) for s in all_signs(4))
    assert 1 + before == 2**n_signs
    assert 1 + after == (2**4 if odd else 1)
    expected = (n_signs + 4 * odd) * LOG2
    assert symmetry_log_count(model).log_sign_flips == pytest.approx(expected)


def permute_batch_norm(model: nn.Module, p: Parameters, order: Tensor) -> Parameters:
    """Exchanges the units of '0' through the BatchNorm '1', whose buffers stay."""
    new = dict(p)
    Units(4, dense("0"), [("3.weight", 1)], True).permute(new, order)
    mean, root = model[1].running_mean, torch.sqrt(model[1].running_var + model[1].eps)
    slope = p.get("1.weight", torch.ones(4, dtype=torch.float64)) / root
    if "1.weight" in p:
        new["1.weight"] = slope[order] * root
        new["1.bias"] = p["1.bias"][order] + slope[order] * (mean - mean[order])
    else:
        scale = (slope[order] / slope)[:, None, None]
        new["0.weight"] = new["0.weight"] * scale
        new["0.bias"] = (new["0.bias"] - mean[order]) * scale.flatten() + mean
    return new


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_are_made_up_for(affine: bool) -> None:
    model, x = around_norm(nn.BatchNorm1d(4, affine=affine), nn.ReLU(), True)
    start = values(model)
    naive = dict(start)
    incoming = [*dense("0"), *(dense("1") if affine else [])]
    Units(4, incoming, [("3.weight", 1)], True).permute(naive, torch.tensor([1, 0, 2, 3]))
    assert not is_same_function(model, naive, x)
    for order in itertools.islice(itertools.permutations(range(4)), 1, None):
        changed = permute_batch_norm(model, start, torch.tensor(order))
        assert is_same_function(model, changed, x)
    assert symmetry_log_count(model).log_permutations == pytest.approx(log_factorial(4))


def log_abs_det(model: nn.Module, change: Callable[[Parameters], Parameters]) -> float:
    start = values(model)
    sizes = [v.numel() for v in start.values()]

    def flat(theta: Tensor) -> Tensor:
        pieces = zip(start.items(), theta.split(sizes), strict=True)
        new = change({name: piece.view_as(value) for (name, value), piece in pieces})
        return torch.cat([new[name].reshape(-1) for name in start])

    theta = torch.cat([v.reshape(-1) for v in start.values()])
    # Affine: its derivative is the same everywhere.
    jacobian = torch.func.jacrev(flat)(theta)
    there = torch.func.jacrev(flat)(theta + torch.randn_like(theta))
    torch.testing.assert_close(jacobian, there)
    return float(torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("affine", [True, False])
def test_permuting_through_batch_norm_keeps_volume(affine: bool) -> None:
    model, _ = around_norm(nn.BatchNorm1d(4, affine=affine), nn.ReLU(), True)
    order = torch.tensor([2, 0, 3, 1])
    assert log_abs_det(model, lambda p: permute_batch_norm(model, p, order)) == pytest.approx(
        0.0, abs=1e-10
    )


@pytest.mark.parametrize("bias", [True, False])
def test_flipping_before_batch_norm_keeps_volume(bias: bool) -> None:
    model, _ = around_norm(nn.BatchNorm1d(4), nn.ReLU(), bias)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    assert log_abs_det(model, lambda p: flip_before(model, p, signs)) == pytest.approx(
        0.0, abs=1e-10
    )


def flip_centred(model: nn.Module, p: Parameters, signs: Tensor, c: float, q: float) -> Parameters:
    """Flips the units of '0' about c; the bias of '3' takes up f(2c - z) = 2q - f(z)."""
    new = dict(p)
    axis = 0 if isinstance(model[3], nn.ConvTranspose2d) else 1
    Units(3, dense("0"), [("3.weight", axis)], True).flip(new, signs)
    new["0.bias"] = new["0.bias"] + (1 - signs) * c
    # (v - v') is 2v where it flips, 0 elsewhere.
    lost = (p["3.weight"] - new["3.weight"]).movedim(axis, 1).flatten(1).sum(1)
    new["3.bias"] = p["3.bias"] + q * lost
    return new


@pytest.mark.parametrize(
    ("between", "last", "exact"),
    [
        (nn.AvgPool2d(2), nn.Conv2d(3, 2, 2), True),
        (nn.AvgPool2d(3, padding=1), nn.Conv2d(3, 2, 2), False),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.Conv2d(3, 2, 2), True),
        (nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(3, 2, 2), False),
        (nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(3, 2, 2), True),
        (nn.ReflectionPad2d(1), nn.Conv2d(3, 2, 2), True),
        (nn.ZeroPad2d(1), nn.Conv2d(3, 2, 2), False),
        (nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 2, 2), True),
        (nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), False),
        (nn.Identity(), nn.Conv2d(3, 2, 3, padding=1), False),
        (nn.Identity(), nn.Conv2d(3, 2, 3, padding="same"), False),
        (nn.Identity(), nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), True),
        (nn.Identity(), nn.ConvTranspose2d(3, 2, 2), False),
        (nn.Tanh(), nn.Conv2d(3, 2, 2), False),
        (nn.Hardtanh(0.2, 0.8), nn.Conv2d(3, 2, 2), True),
    ],
    ids=repr,
)
def test_sigmoid_flips_only_where_a_bias_takes_up_its_centre(
    between: nn.Module, last: nn.Module, exact: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2, padding=1), nn.Sigmoid(), between, last)
    randomise(model)
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    start = values(model)
    for signs in all_signs(3):
        changed = flip_centred(model, start, signs, 0.0, 0.5)
        assert is_same_function(model, changed, x) == exact
    assert symmetry_log_count(model).log_sign_flips == pytest.approx(3 * LOG2 * exact)
    if exact:
        signs = all_signs(3)[1]
        log_volume = log_abs_det(model, lambda p: flip_centred(model, p, signs, 0.0, 0.5))
        assert log_volume == pytest.approx(0, abs=1e-10)


def test_relu6_flips_about_three() -> None:
    for pad, exact in ((3.0, True), (0.0, False)):
        model = nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.ReLU6(), nn.ConstantPad2d(1, pad), nn.Conv2d(3, 2, 2)
        )
        randomise(model)
        x = 4 * torch.randn(4, 1, 6, 6, dtype=torch.float64)
        for signs in all_signs(3):
            changed = flip_centred(model, values(model), signs, 3.0, 3.0)
            assert is_same_function(model, changed, x) == exact
        assert symmetry_log_count(model).log_sign_flips == pytest.approx(3 * LOG2 * exact)


def test_sigmoid_does_not_flip_without_the_biases() -> None:
    without = [nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2, bias=False)]
    assert symmetry_log_count(nn.Sequential(*without)).log_sign_flips == 0
    # Odd about 1/2: the bias before it has to move, too.
    before = [nn.Linear(3, 4, bias=False), nn.Hardtanh(0.0, 1.0), nn.Linear(4, 2)]
    assert symmetry_log_count(nn.Sequential(*before)).log_sign_flips == 0


def test_a_batch_norm_takes_up_a_centre() -> None:
    model = randomise(
        nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    )
    x = torch.randn(20, 2, dtype=torch.float64)
    norm = model[2]
    for signs in all_signs(4):
        new = values(model)
        Units(4, dense("0"), [("2.weight", 0)], True).flip(new, signs)
        slope = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        # z - mean turns into (1 - z) - mean = -(z - mean) + 1 - 2 mean.
        new["2.bias"] = new["2.bias"] + (1 - signs) / 2 * slope * (1 - 2 * norm.running_mean)
        assert is_same_function(model, new, x)
    assert symmetry_log_count(model).log_sign_flips == pytest.approx(4 * LOG2)


def test_batch_norm_after_flatten_has_a_sign_for_each_channel_and_each_feature() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.Flatten(), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 2)
    )
    randomise(model)
    x = torch.randn(6, 1, 5, dtype=torch.float64)
    count = symmetry_log_count(model)
    # A channel and the weights of its 4 positions; then a feature and its outgoing weights.
    assert count.log_sign_flips == pytest.approx((3 + 12) * LOG2)
    assert count.log_permutations == pytest.approx(log_factorial(3))
    start = values(model)
    norm = model[2]
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    new = dict(start)
    Units(3, dense("0"), [("2.weight", 0)], True).flip(new, signs)
    slope = start["2.weight"] / torch.sqrt(norm.running_var + norm.eps)
    each = signs.repeat_interleave(4)
    new["2.bias"] = start["2.bias"] - (1 - each) * slope * norm.running_mean
    assert is_same_function(model, new, x)
    signs = torch.ones(12, dtype=torch.float64)
    signs[7] = -1
    new = dict(start)
    Units(12, dense("2"), [("4.weight", 1)], True).flip(new, signs)
    assert is_same_function(model, new, x)


def test_a_norm_on_the_inputs_or_outputs_has_signs_but_no_permutations() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.BatchNorm1d(5)
    )
    randomise(model)
    x = torch.randn(6, 3, dtype=torch.float64)
    count = symmetry_log_count(model)
    assert count.log_permutations == pytest.approx(log_factorial(4))
    assert count.log_sign_flips == pytest.approx((3 + 5) * LOG2)
    assert [(u.name, u.held) for u in count.units] == [
        ("input", "inputs"),
        ("1", ""),
        ("3", "outputs"),
    ]
    new = values(model)
    signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    Units(3, dense("0"), [("1.weight", 1)], True).flip(new, signs)
    assert is_same_function(model, new, x)


def test_groups_within_groups() -> None:
    # 8 channels in 2 groups of a convolution, each of 2 groups of a norm, each of 2 channels.
    model = convolutions((1, 8, 2, 1), (1, 2, 1), {0: 4})
    in_norm = 2
    in_convolution = in_norm**2 * 2
    assert math.exp(symmetry_log_count(model).log_permutations) == pytest.approx(
        in_convolution**2 * 2
    )


def test_a_norm_after_a_view_has_a_sign_for_each_channel() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (4, 2)), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 1, 1)
    )
    randomise(model)
    assert symmetry_log_count(model) == pytest.approx(log_factorial(4) + 4 * LOG2)
    norm = model[2]
    slope = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    x = torch.randn(9, 3, dtype=torch.float64)
    for signs in all_signs(4):
        new = values(model)
        Units(4, dense("0"), [("2.weight", 0)], True).flip(new, signs)
        new["2.bias"] = new["2.bias"] - (1 - signs) * slope * norm.running_mean
        assert is_same_function(model, new, x)


def test_positions_that_a_pool_mixes_do_not_flip_one_by_one() -> None:
    def network(pool: nn.Module) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.LayerNorm([2, 3, 3]), nn.Tanh(), pool, nn.Flatten(),
            nn.Linear(2 * (9 if isinstance(pool, nn.Identity) else 4), 1),
        )  # fmt: skip

    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for pool, free in ((nn.Identity(), 18), (nn.AvgPool2d(2, stride=1), 2)):
        model = randomise(network(pool))
        # One flip of everything before the norm.
        expected = (1 + free) * LOG2
        assert symmetry_log_count(model).log_sign_flips == pytest.approx(expected)
        for units, exact in ((free, True), (18, free == 18)):
            signs = torch.ones(units, dtype=torch.float64)
            signs[1] = -1
            new = values(model)
            Units(units, dense("1"), [], True).flip(new, signs)
            if exact:
                Units(units, [], [("5.weight", 1)], True).flip(new, signs)
            assert is_same_function(model, new, x) == exact


@pytest.mark.parametrize(
    ("norm", "n_signs"),
    [
        (nn.RMSNorm(4, elementwise_affine=False), 4),
        (nn.LayerNorm(4, elementwise_affine=False), 1),
        (nn.BatchNorm1d(4, affine=False, track_running_stats=False), 4),
    ],
    ids=repr,
)
def test_norms_without_weights_pass_flips_on(norm: nn.Module, n_signs: int) -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    for activation, odd in ((nn.Tanh(), True), (nn.Hardtanh(0.0, 1.0), False), (nn.ReLU(), False)):
        model = randomise(nn.Sequential(nn.Linear(3, 4), norm, activation, nn.Linear(4, 2)))
        found = 1
        for signs in all_signs(4):
            new = values(model)
            Units(4, dense("0"), [("3.weight", 1)], True).flip(new, signs)
            found += is_same_function(model, new, x)
        assert found == (2**n_signs if odd else 1)
        expected = n_signs * LOG2 * odd
        assert symmetry_log_count(model).log_sign_flips == pytest.approx(expected)


def test_a_centred_norm_takes_up_a_centre_without_a_bias() -> None:
    norm = nn.LayerNorm(4, bias=False)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), norm, nn.ReLU(), nn.Linear(4, 2))
    randomise(model)
    new = values(model)
    signs = -torch.ones(4, dtype=torch.float64)
    Units(4, dense("0"), [("2.weight", 0)], True).flip(new, signs)
    assert is_same_function(model, new, torch.randn(9, 3, dtype=torch.float64))
    assert symmetry_log_count(model).log_sign_flips == pytest.approx(LOG2)


def test_known_numbers() -> None:
    linear, relu = nn.Linear, nn.ReLU
    mnist = nn.Sequential(
        nn.Flatten(), linear(784, 256), relu(), linear(256, 128), relu(), linear(128, 10)
    )
    expected = math.lgamma(257) + math.lgamma(129)
    assert symmetry_log_count(mnist) == pytest.approx(expected, rel=1e-13)
    spirals = [linear(2, 32)]
    for _ in range(4):
        spirals += [relu(), linear(32, 32)]
    spirals += [relu(), linear(32, 1)]
    assert symmetry_log_count(nn.Sequential(*spirals)) == pytest.approx(5 * math.lgamma(33))
    tanh = nn.Sequential(linear(2, 8), nn.Tanh(), linear(8, 8), nn.Tanh(), linear(8, 1))
    assert symmetry_log_count(tanh) == pytest.approx(2 * log_factorial(8) + 16 * LOG2)
    cnn = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), relu(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), relu(), nn.MaxPool2d(2), nn.Flatten(),
        linear(64 * 8 * 8, 100), relu(), nn.Dropout(), linear(100, 10),
    )  # fmt: skip
    expected = sum(log_factorial(n) for n in (32, 64, 100)) + 32 * LOG2
    assert symmetry_log_count(cnn) == pytest.approx(expected)
    assert symmetry_log_count(linear(4, 3)) == 0.0


class Written(nn.Module):
    """The same network in the words of ``forward``."""

    def __init__(self, flatten: str) -> None:
        super().__init__()
        self.scale = 0.5
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(inplace=True)))
        self.second = nn.Conv2d(4, 6, 2)
        self.hidden = nn.Linear(6 if flatten == "mean" else 6 * 4, 5)
        self.out = nn.Linear(5, 2)
        self.flatten = flatten
        self.kept: list[Any] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        n = x.shape[0]
        x = (x - 0.1) / self.scale
        h = F.max_pool2d(self.features(x), 2)
        if mask is not None:
            h = h * mask
        h = F.avg_pool2d(torch.tanh(self.second(h)), 2, padding=1)
        self.last = h
        self.kept.append(h)
        if self.flatten == "view":
            h = h.view(n, -1)
        elif self.flatten == "reshape":
            h = torch.reshape(h, (h.size(0), h.size(1) * h.size(2) * h.size(3)))
        elif self.flatten == "number":
            h = h.contiguous().view(-1, 24)
        elif self.flatten == "flatten":
            h = torch.flatten(h, start_dim=1)
        elif self.flatten == "method":
            h = h.flatten(1)
        elif self.flatten == "mean":
            h = h.mean(dim=(-1,), keepdim=True)
            h = h.mean(2).squeeze(-1)
        h = F.dropout(self.hidden(h).tanh(), 0.5, training=self.training)
        out = self.out(h)
        return F.log_softmax(out * torch.sigmoid(out), dim=1)


WAYS = ["view", "reshape", "number", "flatten", "method", "mean"]


@pytest.mark.parametrize("flatten", WAYS)
def test_forward_may_be_written_in_functions(flatten: str) -> None:
    model = Written(flatten)
    assert model(torch.randn(3, 1, 9, 9)).shape == (3, 2)
    count = symmetry_log_count(model)
    assert count.log_permutations == pytest.approx(sum(log_factorial(n) for n in (4, 6, 5)))
    assert count.log_sign_flips == pytest.approx(11 * LOG2)
    assert [u.name for u in count.units] == ["features.0", "second", "hidden"]


@pytest.mark.parametrize(
    ("function", "flips"),
    [
        (torch.relu, 0), (F.relu, 0), (F.gelu, 0), (F.silu, 0), (F.leaky_relu, 0),
        (F.elu, 0), (F.softplus, 0), (F.logsigmoid, 0), (F.threshold, 0), (F.mish, 0),
        (torch.tanh, 4), (F.tanh, 4), (F.softsign, 4), (F.tanhshrink, 4), (F.hardshrink, 4),
        (F.softshrink, 4), (F.hardtanh, 4), (torch.sigmoid, 4), (F.sigmoid, 4), (F.hardsigmoid, 4),
        (F.relu6, 4),
    ],
)  # fmt: skip
def test_functions_count_as_their_modules(function: Callable[..., Tensor], flips: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = function(h, 0.1, 0.2) if function is F.threshold else function(h)
            return self.second(h)

    assert symmetry_log_count(Net()).log_sign_flips == pytest.approx(flips * LOG2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_are_looked_through() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    expected = log_factorial(4) + 4 * LOG2
    assert symmetry_log_count(torch.compile(model, backend="eager")) == pytest.approx(expected)
    assert symmetry_log_count(nn.DataParallel(model)) == pytest.approx(expected)


def test_the_count_is_a_float_that_says_where_it_comes_from() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    count = symmetry_log_count(model)
    assert isinstance(count, float)
    assert isinstance(count, SymmetryLogCount)
    assert -10.0 + count == pytest.approx(-10.0 + log_factorial(4) + 4 * LOG2)
    again = pickle.loads(pickle.dumps(count))
    assert again == count
    assert again.units == count.units == copy.deepcopy(count).units
    assert repr(count) == repr(float(count))


def test_a_frozen_layer_holds_the_units_beside_it() -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(),
            nn.Linear(6, 2),
        )  # fmt: skip

    free, model = network(), network()
    model[2].weight.requires_grad_(False)
    count = symmetry_log_count(model)
    assert count == pytest.approx(log_factorial(6) + 6 * LOG2)
    assert [bool(u.held) for u in count.units] == [True, True, False]
    assert "'2' (Linear) is frozen" in count.units[0].held
    # The same through a choice of parameters.
    assert symmetry_log_count(free, parameters=["0.*", "2.bias", "4.*", "6.*"]) == count
    assert symmetry_log_count(free, parameters=lambda name, _: name != "2.weight") == count
    assert symmetry_log_count(free, parameters="0.*") == 0.0
    with pytest.raises(ValueError, match="matches no parameter"):
        symmetry_log_count(free, parameters="head.*")


def test_frozen_values_that_a_symmetry_leaves_alone_hold_nothing() -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(9, 3, dtype=torch.float64)
    weights = ["*.weight"]
    assert symmetry_log_count(model, parameters=weights) == 0.0
    # Equal biases leave the permutations, biases of zero the flips as well.
    with torch.no_grad():
        model[0].bias.fill_(0.3)
    count = symmetry_log_count(model, parameters=weights)
    assert (count.log_permutations, count.log_sign_flips) == (pytest.approx(log_factorial(4)), 0)
    with torch.no_grad():
        model[0].bias.zero_()
    count = symmetry_log_count(model, parameters=weights)
    assert count == pytest.approx(log_factorial(4) + 4 * LOG2)
    new = values(model)
    units = Units(4, [("0.weight", 0)], [("2.weight", 1)], True)
    units.permute(new, torch.tensor([3, 1, 0, 2]))
    units.flip(new, torch.tensor([-1.0, 1, 1, -1], dtype=torch.float64))
    assert is_same_function(model, new, x)
    # A committee: the outgoing weights are frozen, and the same for all.
    committee = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    committee[2].requires_grad_(False)
    assert symmetry_log_count(committee) == 0.0
    with torch.no_grad():
        committee[2].weight.copy_(torch.tensor([[1.0], [-2.0]]).expand(2, 4))
    count = symmetry_log_count(committee)
    assert (count.log_permutations, count.log_sign_flips) == (pytest.approx(log_factorial(4)), 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_grouped_convolutions_hold_by_input(transposed: bool) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    model = nn.Sequential(nn.Conv1d(2, 6, 2), nn.ReLU(), kind(6, 4, 1, groups=2))
    model[2].requires_grad_(False)
    assert symmetry_log_count(model) == 0.0
    # The same for each input, in each of its group's two outputs: 3! in each group.
    with torch.no_grad():
        if transposed:
            model[2].weight.copy_(torch.tensor([1.0, -2.0]).reshape(1, 2, 1).expand(6, 2, 1))
        else:
            row = torch.tensor([1.0, -2.0, 1.0, -2.0])
            model[2].weight.copy_(row.reshape(4, 1, 1).expand(4, 3, 1))
    assert symmetry_log_count(model) == pytest.approx(2 * log_factorial(3))
    x = torch.randn(3, 2, 5)
    new = values(model)
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    new["0.weight"], new["0.bias"] = new["0.weight"][order], new["0.bias"][order]
    with torch.no_grad():
        torch.testing.assert_close(functional_call(model, new, (x,)), model(x))


def test_frozen_norms_hold_where_their_values_differ() -> None:
    def network(norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), norm, nn.ReLU(), nn.Linear(4, 2))

    for norm in (nn.LayerNorm(4), nn.BatchNorm1d(4)):
        model = network(norm)
        norm.requires_grad_(False)
        # As they start: ones and zeros.
        assert symmetry_log_count(model).log_permutations == pytest.approx(log_factorial(4))
        randomise(model)
        count = symmetry_log_count(model)
        assert count == 0.0
        assert "'2'" in count.units[0].held
    # Right after a layer, the layer's own affine map makes up for a frozen BatchNorm.
    direct = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    randomise(direct)
    direct[1].requires_grad_(False)
    assert symmetry_log_count(direct) == pytest.approx(log_factorial(4))
    start = values(direct)
    norm, order = direct[1], torch.tensor([1, 3, 2, 0])
    slope = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    offset = norm.bias - slope * norm.running_mean
    new = dict(start)
    Units(4, dense("0"), [("3.weight", 1)], True).permute(new, order)
    scale = (slope[order] / slope).detach()
    new["0.weight"] = new["0.weight"] * scale[:, None]
    new["0.bias"] = (new["0.bias"] * slope[order] + offset[order] - offset).detach() / slope
    new["0.bias"] = new["0.bias"].detach()
    assert is_same_function(direct, new, torch.randn(8, 3, dtype=torch.float64))


def test_a_frozen_slope_passes_flips_where_something_makes_up_for_its_offset() -> None:
    def network(**options: Any) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(3, 4, **options), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
        )
        return randomise(model)

    model = network()
    model[1].requires_grad_(False)
    assert symmetry_log_count(model).log_sign_flips == pytest.approx(4 * LOG2)
    norm = model[1]
    slope = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    offset = norm.bias.detach() - slope * norm.running_mean
    signs = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    new = values(model)
    Units(4, dense("0"), [("3.weight", 1)], True).flip(new, signs)
    new["0.bias"] = new["0.bias"] - (1 - signs) * offset / slope
    assert is_same_function(model, new, torch.randn(8, 3, dtype=torch.float64))
    # Neither bias moves.
    model = network(bias=False)
    model[1].requires_grad_(False)
    assert symmetry_log_count(model).log_sign_flips == 0
    # The norm's own bias does.
    model[1].bias.requires_grad_(True)
    assert symmetry_log_count(model).log_sign_flips == pytest.approx(4 * LOG2)
    # Only its weight does: its mean is not made up for, nor can its bias flip.
    model[1].bias.requires_grad_(False)
    model[1].weight.requires_grad_(True)
    assert symmetry_log_count(model).log_sign_flips == 0


def test_batch_norms_that_move_in_part() -> None:
    # Its bias is frozen: what flips before it is made up for by the layer's bias.
    model, x = around_norm(nn.BatchNorm1d(4), nn.Tanh(), True)
    model[1].bias.requires_grad_(False)
    start = values(model)
    for signs in all_signs(4):
        assert is_same_function(model, flip_before(model, start, signs), x)
        changed = {**flip_after(start, signs), "1.bias": start["1.bias"]}
        assert not is_same_function(model, changed, x)
    count = symmetry_log_count(model)
    assert (count.log_permutations, count.log_sign_flips) == (0, pytest.approx(4 * LOG2))
    # There, one bias for each channel does not do for a mean for each feature.
    flat = nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.Flatten(), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 2)
    )
    randomise(flat)
    flat[2].bias.requires_grad_(False)
    assert symmetry_log_count(flat) == 0.0
    flat[2].requires_grad_(False)
    assert symmetry_log_count(flat) == 0.0
    # Nothing has an offset.
    bare, _ = around_norm(nn.BatchNorm1d(4, affine=False), nn.Tanh(), False)
    assert symmetry_log_count(bare) == 0.0
    # A unit whose frozen slope is zero has a constant output, which neither moves nor flips.
    model, _ = around_norm(nn.BatchNorm1d(4), nn.Tanh(), True)
    model[1].requires_grad_(False)
    assert symmetry_log_count(model) == pytest.approx(log_factorial(4) + 4 * LOG2)
    with torch.no_grad():
        model[1].weight[2] = 0.0
    assert symmetry_log_count(model) == 0.0


def test_a_frozen_norm_does_not_take_up_a_centre() -> None:
    norm = nn.BatchNorm1d(4).requires_grad_(False)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), norm, nn.Tanh(), nn.Linear(4, 2)).eval()
    assert symmetry_log_count(model) == pytest.approx(log_factorial(4))


def test_the_bias_of_one_norm_makes_up_for_the_mean_of_the_next() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.Flatten(), nn.BatchNorm1d(12), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 2),
    )  # fmt: skip
    randomise(model)
    model[2].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    assert symmetry_log_count(model) == pytest.approx(3 * LOG2)
    start, new = values(model), values(model)
    signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    Units(3, dense("0"), [("3.weight", 0)], True).flip(new, signs)
    first, second = model[2], model[3]
    slope = start["2.weight"] / torch.sqrt(first.running_var + first.eps)
    # y - m of the second turns into its negative.
    each = signs.repeat_interleave(4)
    offset = start["2.bias"] - slope * first.running_mean
    new["2.bias"] = start["2.bias"] + (1 - each) * (second.running_mean - offset)
    assert is_same_function(model, new, torch.randn(7, 1, 5, dtype=torch.float64))


def test_linear_layers_in_a_row_are_a_lower_bound_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 5), nn.Linear(5, 2))
    with pytest.warns(FastvolWarning, match=r"between '0' and '2'.* lower bound.*1 more") as caught:
        count = symmetry_log_count(model)
    assert caught[0].filename == __file__
    assert count == pytest.approx(log_factorial(4) + log_factorial(5) + 9 * LOG2)
    averaged = [nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)]
    with pytest.warns(FastvolWarning, match="between '0' and '3'"):
        symmetry_log_count(nn.Sequential(*averaged))
    # The units of a depthwise convolution do not mix; nor do they where each has a maximum or
    # statistics of its own, or each position a weight.
    for between in (
        [nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)],
        [nn.MaxPool2d(2)],
        [nn.LayerNorm([4, 5, 5])],
        [nn.InstanceNorm2d(4)],
        [nn.GroupNorm(2, 4)],
    ):
        separable = nn.Sequential(nn.Conv2d(1, 4, 1), *between, nn.Conv2d(4, 2, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            symmetry_log_count(separable)


def rotation(n: int) -> Tensor:
    """A random orthogonal matrix that leaves the vector of ones where it is."""
    ones = torch.ones(n, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.randn(n, n - 1, dtype=torch.float64)], 1))[0]
    inner = torch.linalg.qr(torch.randn(n - 1, n - 1, dtype=torch.float64))[0]
    turned = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner)
    return basis @ turned @ basis.T


@pytest.mark.parametrize(
    "norm",
    [nn.Identity(), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(1, 4), nn.RMSNorm(4)],
    ids=repr,
)
def test_what_is_warned_of_is_a_continuous_symmetry(norm: nn.Module) -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)))
    start = values(model)
    gamma = start.get("1.weight", torch.ones(4, dtype=torch.float64))
    beta = start.get("1.bias", torch.zeros(4, dtype=torch.float64))
    if isinstance(norm, nn.BatchNorm1d):
        # Then z, minus the mean, is what is mixed.
        gamma = gamma / torch.sqrt(norm.running_var + norm.eps)
    mean = getattr(norm, "running_mean", torch.zeros(4, dtype=torch.float64))
    mix = rotation(4)
    new = dict(start)
    new["0.weight"] = mix @ start["0.weight"]
    new["0.bias"] = mix @ (start["0.bias"] - mean) + mean
    new["2.weight"] = start["2.weight"] * gamma @ mix.T / gamma
    new["2.bias"] = start["2.bias"] + (start["2.weight"] - new["2.weight"]) @ beta
    assert is_same_function(model, new, torch.randn(9, 3, dtype=torch.float64))
    with pytest.warns(FastvolWarning, match="between '0' and '2'"):
        symmetry_log_count(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    with pytest.raises(FastvolError, match="TorchScript"):
        symmetry_log_count(scripted)


class Block(nn.Module):
    """One hidden layer, and something that is not a stack."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mask", torch.ones(4))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.first(x))
        if self.kind == "residual":
            h = h + torch.tanh(self.middle(h))
        elif self.kind == "input":
            h = torch.tanh(self.middle(h)) + x
        elif self.kind == "shared":
            h = torch.tanh(self.middle(torch.tanh(self.middle(h))))
        elif self.kind == "raw":
            h = h * self.gain
        elif self.kind == "mask":
            h = h * self.mask
        elif self.kind == "scale":
            h = h * 0.5
        elif self.kind == "control":
            h = h if h.sum() > 0 else -h
        elif self.kind == "hidden":
            return self.last(h), h
        elif self.kind == "branches":
            return self.middle(h) * self.last(h)
        elif self.kind == "dropout":
            h = F.dropout(h)
        elif self.kind == "transpose":
            h = h.t().view(4, -1).t()
        elif self.kind == "batch":
            h = h.reshape(-1, 2)
        elif self.kind == "swap":
            h = h.view(h.size(1), -1)
        elif self.kind == "clamp":
            h = F.hardtanh(h, -1.0, h.size(0))
        return self.last(h)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("residual", "'add'.* earlier operation"),
        ("input", "'add'.* something else than the output"),
        ("shared", r"'middle' \(Linear\) uses a parameter that 'middle' \(Linear\) uses too"),
        ("raw", "'gain' is a parameter that is used outside any layer"),
        ("mask", "'mul'.* something else"),
        ("scale", "'mul'.*not known here"),
        ("control", "torch.fx cannot trace the forward of Block"),
        ("hidden", "'output'.* earlier operation"),
        ("branches", r"'last' \(Linear\) takes the output of an earlier operation"),
        ("dropout", "'dropout'.* random in eval mode"),
        ("transpose", "'t'.*not known here"),
        ("batch", "reshapes the 4 units of 'first' to 2"),
        ("swap", "first axis is not the examples"),
        ("clamp", "max_val that is computed in forward"),
    ],
)
def test_what_is_not_a_stack_is_refused(kind: str, message: str) -> None:
    with pytest.raises(FastvolError, match=f"model: .*{message}.*pass "):
        symmetry_log_count(Block(kind))


class Traced(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.bias


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: nn.LSTM(4, 4), r"'0' \(LSTM\)"),
        (lambda: nn.TransformerEncoderLayer(4, 2), r"'0' \(TransformerEncoderLayer\)"),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), r"'0' \(Embedding\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GLU(), nn.Linear(2, 2)), r"'1' \(GLU\)"),
        (lambda: nn.Sequential(Traced(4, 4), nn.ReLU()), "'0.weight'"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "'0'"),
        (lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 2)), "hooks"),
        (tied, r"'2' \(Linear\) uses a parameter that '0' \(Linear\) uses too"),
        (hooked, r"'1' \(ReLU\) has forward hooks"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Linear(4, 2)),
            r"'2' \(Linear\) takes 4 inputs.*units of '0' with positions \(Flatten",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(6, 2)),
            r"'2' \(Linear\) takes 6 inputs",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.LayerNorm(4), nn.Conv2d(4, 2, 2)),
            r"'1' \(LayerNorm\) normalises over \[4\]",
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.MaxPool1d(2), nn.Linear(2, 2)),
            r"'1' \(MaxPool1d\) acts on the units",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(1, 4, 2), nn.Flatten(0), nn.Linear(8, 2)),
            "flattens more than the units",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 9), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 1, 1)),
            "reshapes the 9 units of '0' to 2 channels",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv1d(1, 12, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv1d(12, 4, 1, groups=4)
            ),
            "groups that do not lie within each other",
        ),
    ],
)
def test_unknown_layers_are_refused_by_name(layers: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(FastvolError, match=f"model.*{message}"):
        symmetry_log_count(layers())


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        symmetry_log_count(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter to move"):
        symmetry_log_count(nn.Sequential(nn.Tanh()))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Identity(), Written("view")).train(training)
    model[1].features.eval()
    model(torch.randn(3, 1, 9, 9))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    kept = list(model[1].kept)
    modes = [module.training for module in model.modules()]
    unknown = nn.Sequential(model, nn.LSTM(2, 2)).train(training)
    model[1].features.eval()
    generator = torch.get_rng_state()
    symmetry_log_count(model)
    with pytest.raises(FastvolError):
        symmetry_log_count(unknown)
    assert modes == [module.training for module in model.modules()]
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())
    assert len(kept) == len(model[1].kept)
    assert all(a is b for a, b in zip(kept, model[1].kept, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(generator, torch.get_rng_state())
