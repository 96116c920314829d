"""The lane loop in C++, in PyTorch, and through the public call: one search, the same radii."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import fastvol
from fastvol import _core
from fastvol._reference import noise
from fastvol._reference import search as reference

LOOPS = {"cpp": _core.search, "torch": reference.search}


class RayLosses:
    """Losses given per item as a function of the radius, as the loop sees them."""

    def __init__(
        self, losses: list[Callable[[float], float]], flag_above: float = math.inf
    ) -> None:
        self.losses = losses
        self.flag_above = flag_above
        self.items: dict[int, int] = {}
        self.loads: list[tuple[list[int], list[int]]] = []
        self.rounds = 0

    def load(self, lanes: np.ndarray, items: np.ndarray) -> None:
        self.loads.append((lanes.tolist(), items.tolist()))
        self.items.update(zip(lanes.tolist(), items.tolist(), strict=True))

    def loss(self, lanes: np.ndarray, radii: np.ndarray) -> object:
        self.rounds += 1
        assert lanes.tolist() == sorted(lanes.tolist())
        values = np.array(
            [self.losses[self.items[i]](r) for i, r in zip(lanes.tolist(), radii, strict=True)]
        )
        if math.isinf(self.flag_above):
            return values
        return np.minimum(values, self.flag_above), values > self.flag_above


def run(loop: Callable, engine: RayLosses, **changes: object) -> tuple:
    n = len(engine.losses)
    options = {
        "lanes": 5,
        "mode": "search",
        "loss0": 0.0,
        "threshold": 1.0,
        "xtol": 1e-6,
        "log_cap": 10.0,
        "slope": 2.0,
        **changes,
    }
    start = options.pop("start", np.zeros(n))
    return loop(engine, np.asarray(start, dtype=np.float64), **options)


def power(radius: float, exponent: float) -> Callable[[float], float]:
    return lambda r: (r / radius) ** exponent


@pytest.mark.parametrize("loop", LOOPS)
def test_radii_of_powers_are_exact(loop: str) -> None:
    roots = np.exp(np.linspace(-12.0, 9.0, 40))
    engine = RayLosses([power(root, 0.5 + i % 7) for i, root in enumerate(roots)])
    log_radius, status, evaluations, reentrant = run(LOOPS[loop], engine)
    np.testing.assert_allclose(log_radius, np.log(roots), rtol=0, atol=1e-12)
    assert not status.any()
    assert not reentrant.any()
    assert evaluations.max() < 60


@pytest.mark.parametrize("loop", LOOPS)
def test_lanes_are_refilled_in_order(loop: str) -> None:
    engine = RayLosses([power(math.exp(i % 5), 2.0) for i in range(23)])
    run(LOOPS[loop], engine, lanes=4)
    items = [item for _, batch in engine.loads for item in batch]
    assert items == list(range(23))
    assert engine.loads[0] == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert all(lanes == sorted(lanes) for lanes, _ in engine.loads)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_pathology_has_its_status(loop: str) -> None:
    losses = [
        power(2.0, 2.0),
        lambda r: 0.5,  # never crosses
        lambda r: math.nan if r > 3.0 else 0.25 * r**2 / 9,  # bounded by nan
        lambda r: math.inf if r > 0.3 else 0.0,  # flat, then infinite
        lambda r: 2.0 if r > 0.7 else 0.1,  # a step
        lambda r: (r / 5.0) ** 2 - 0.5 * math.exp(-r),  # below the loss at the centre first
        lambda r: -math.inf if r > 4.0 else 0.0,  # minus infinity is not inside either
        power(1e-9, 2.0),
    ]
    log_radius, status, _, _ = run(LOOPS[loop], RayLosses(losses))
    kinds = reference.Status
    assert [kinds(s) for s in status] == [
        kinds.CONVERGED,
        kinds.UNBOUNDED,
        kinds.NONFINITE,
        kinds.NONFINITE,
        kinds.CONVERGED,
        kinds.CONVERGED,
        kinds.NONFINITE,
        kinds.CONVERGED,
    ]
    assert log_radius[1] == 10.0
    np.testing.assert_allclose(np.exp(log_radius[2:5]), [3.0, 0.3, 0.7], rtol=2e-6)
    root = math.exp(log_radius[5])
    assert (root / 5.0) ** 2 - 0.5 * math.exp(-root) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(np.exp(log_radius[6:8]), [4.0, 1e-9], rtol=2e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_running_out_of_evaluations_keeps_the_inside_end(loop: str) -> None:
    log_radius, status, evaluations, _ = run(
        LOOPS[loop], RayLosses([power(100.0, 2.0)]), max_evaluations=3
    )
    assert status[0] == reference.Status.FAILED
    assert evaluations[0] == 3
    assert log_radius[0] < math.log(100.0)


@pytest.mark.parametrize("loop", LOOPS)
def test_flagged_losses_bound_and_are_not_interpolated(loop: str) -> None:
    losses = [power(root, 3.0) for root in (0.5, 2.0, 20.0)]
    plain, *_ = run(LOOPS[loop], RayLosses(losses))
    flagged, status, *_ = run(LOOPS[loop], RayLosses(losses, flag_above=1.5))
    assert not status.any()
    np.testing.assert_allclose(flagged, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_scan_finds_the_first_crossing(loop: str) -> None:
    def reentrant(r: float) -> float:  # leaves at 1, is back from 1.15, leaves at 1.2
        return r**2 if r < 1.15 else 0.9 * (r / 1.2) ** 4 + 0.1 * (r / 1.2) ** 2

    engine = RayLosses([reentrant, power(1.2, 2.0)])
    known = np.log([1.2, 1.2])
    log_radius, status, _, flags = run(LOOPS[loop], engine, mode="scan", start=known)
    np.testing.assert_allclose(np.exp(log_radius), [1.0, 1.2], rtol=1e-6)
    assert flags.tolist() == [1, 0]
    assert not status.any()


def test_both_loops_move_alike() -> None:
    generator = np.random.default_rng(5)
    roots = np.exp(generator.normal(size=200))
    losses = [
        (lambda r, a=a, p=p: (r / a) ** p * (1 + 0.3 * math.sin(r)))
        for a, p in zip(roots, 1 + 3 * generator.random(200), strict=True)
    ]
    outcomes = [run(loop, RayLosses(losses), lanes=7, slope=2.5) for loop in LOOPS.values()]
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])
    np.testing.assert_array_equal(outcomes[0][2], outcomes[1][2])


@pytest.mark.parametrize("loop", LOOPS)
def test_an_exception_of_the_engine_comes_through(loop: str) -> None:
    class Broken(RayLosses):
        def loss(self, lanes: np.ndarray, radii: np.ndarray) -> object:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(LOOPS[loop], Broken([power(1.0, 2.0)]))


class Quadratic(nn.Module):
    """L = ½ Σ h w² in float64."""

    def __init__(self, curvature: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(curvature), dtype=torch.float64))
        self.register_buffer("curvature", curvature.to(torch.float64))

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.curvature * self.w.square()).sum()


@pytest.mark.parametrize("antithetic", [False, True])
def test_three_loops_give_the_same_radii_on_a_quadratic(antithetic: bool) -> None:
    d, n = 50, 600
    curvature = torch.logspace(-2, 2, d, dtype=torch.float64)
    model = Quadratic(curvature)
    options = {"n": n, "threshold": 0.3, "seed": 11, "rtol": 1e-10, "antithetic": antithetic}
    results = {
        backend: fastvol.estimate(model, lambda m: m(), backend=backend, **options)
        for backend in ("cpp", "torch")
    }
    z = torch.empty((n, d), dtype=torch.float64)
    norm, _ = noise.normals(z, 11, 0, np.arange(n), antithetic=antithetic)
    u = z / torch.from_numpy(norm)[:, None]
    exact = 0.5 * torch.log(2 * 0.3 / (curvature * u.square()).sum(dim=1))
    for result in results.values():
        np.testing.assert_allclose(result.log_radii, exact.numpy(), rtol=0, atol=1e-9)
        assert not result.status.any()
    np.testing.assert_allclose(
        results["cpp"].log_volume, results["torch"].log_volume, rtol=0, atol=1e-7
    )


def test_one_plan_repeats_bitwise_and_other_plans_agree_within_rtol() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x, y = torch.randn(40, 8), torch.randn(40, 1)
    call = {"data": (x, y), "n": 1500, "increase": 0.5, "rtol": 1e-4}
    first = fastvol.estimate(model, nn.functional.mse_loss, **call)
    again = fastvol.estimate(model, nn.functional.mse_loss, plan=first.plan, **call)
    np.testing.assert_array_equal(first.log_radii, again.log_radii)
    assert first.log_volume == again.log_volume
    for other in ({"lanes": 1}, {"lanes": 7}, {"backend": "torch"}):
        result = fastvol.estimate(model, nn.functional.mse_loss, **call, **other)
        np.testing.assert_allclose(result.log_radii, first.log_radii, rtol=0, atol=1e-4)


class Reentrant(nn.Module):
    """A unit ball, but for one direction: flat there, it leaves at 1, is back from 1.1 to 1.2."""

    def __init__(self, axis: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(axis.numel(), dtype=torch.float64))
        self.register_buffer("axis", axis)

    def forward(self) -> torch.Tensor:
        r = self.w.square().sum().sqrt()
        on_axis = (self.axis @ self.w) > (1 - 1e-9) * torch.clamp(r, min=1e-300)
        flat = 1e-6 * r.square()
        gap = (r > 1.0) & (r < 1.1)
        planted = torch.where(gap, 2.0, torch.where(r <= 1.2, flat, (r / 1.2).square()))
        return torch.where(on_axis, planted, r.square())


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_the_leaders_audit_catches_one_reentrant_ray_in_ten_thousand(backend: str) -> None:
    d, n = 100, 10_000
    z = torch.empty((1, d), dtype=torch.float64)
    norm, _ = noise.normals(z, 3, 0, np.array([4321]))
    largest_found: list[float] = []
    result = fastvol.estimate(
        Reentrant((z / norm[0]).flatten()),
        lambda m: m(),
        n=n,
        threshold=1.0,
        seed=3,
        backend=backend,
        callbacks=[lambda progress: largest_found.append(float(progress.log_radii.max()))],
    )
    # The search itself ends at 1.2: 18 nats in the log weight, 9 in the log volume.
    assert max(largest_found) == pytest.approx(math.log(1.2), abs=1e-3)
    assert result.log_radii[4321] == pytest.approx(0.0, abs=1e-3)
    ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    assert result.log_volume == pytest.approx(ball, abs=1e-3)
    assert any("re-enter" in warning for warning in result.warnings)


def test_first_crossing_scans_every_ray() -> None:
    class Shell(Quadratic):
        def forward(self) -> torch.Tensor:
            r = self.w.square().sum().sqrt()
            return torch.where(r > 1.3, (r / 3.0) ** 2, r**2)

    model = Shell(torch.ones(5))
    result = fastvol.estimate(model, lambda m: m(), n=300, threshold=1.0, first_crossing=True)
    np.testing.assert_allclose(result.log_radii, 0.0, rtol=0, atol=1e-6)
    assert 0.0 <= result.reentrant_fraction <= 1.0
