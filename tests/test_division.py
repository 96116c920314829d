"""Rays in parts: what is sent, how they are divided, that they are evaluated as the whole is."""

from __future__ import annotations

import math
import time
from typing import Any

import calls
import numpy as np
import pytest
import rays
import torch
import torch.distributed as dist

import fastvol
from benchmarks.proofs import bodies
from fastvol._problem import Problem
from fastvol._proposal import Proposal
from fastvol._tasks import _in_a_file
from fastvol.engines import Plan
from fastvol.preconditioners import Diagonal
from fastvol.sampling import division
from fastvol.sampling.division import Division, processes_for
from fastvol.sampling.evaluation import Sheet
from fastvol.sampling.field import Level, RayField

D = 7
BODY = bodies.rotated_ellipsoid(D, 50.0, seed=1)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_a_sheet_comes_as_it_was_sent(dtype: torch.dtype | None) -> None:
    columns = {
        "x": np.array([1.0, -0.0, math.inf, 0.1 + 0.2])[::-1],
        "status": np.array([1, 2, 3, 0], dtype=np.uint8),
    }
    vectors = None if dtype is None else torch.randn(4, 6).to(dtype)[:, ::2]
    info = {"kind": "search", "options": {"log_cap": math.inf, "xtol": 1e-3 / 3}}
    sent = Sheet(columns, vectors, info)
    come = Sheet.from_bytes(sent.to_bytes())
    assert come.info == info
    assert len(come) == 4
    for name, column in columns.items():
        assert come.columns[name].tobytes() == column.tobytes()
        assert come.columns[name].dtype == column.dtype
    if vectors is None:
        assert come.vectors is None
    else:
        assert come.vectors is not None
        assert come.vectors.dtype == dtype
        assert torch.equal(come.vectors, vectors)


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_parts_cover_all_rays(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(problem: Problem) -> None:
        divided = Division(problem, 16, parts)
        for count in range(1, 70):
            spans = divided.spans(count)
            rows = [row for span in spans for row in range(span.start, span.stop)]
            assert rows == list(range(count))
            assert len(spans) <= parts
            sizes = [span.stop - span.start for span in spans]
            assert max(sizes) - min(sizes) <= 1
            assert len(spans) == 1 or min(sizes) >= division.LEAST_ROWS
            if count <= 16:
                # One batch of a part's engine.
                assert max(sizes) <= divided._lanes

    rays.within(monkeypatch, BODY, use)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("engine", ["general", "layered", "inplace"])
def test_parts_are_evaluated_as_the_whole_is(
    engine: str, preconditioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = None
    if preconditioned:
        scales = torch.linspace(0.5, 2.0, D, dtype=torch.float64)
        law = Proposal(Diagonal(scales), name="test")
    level = Level(0.7, math.inf)

    def use(problem: Problem) -> None:
        whole = rays.open_field(problem, law)
        several = RayField(problem, whole.threshold, whole.pilot, law, 16, 3)
        units = whole.isotropic(np.arange(16), 1000)
        found = []
        for field in (whole, several):
            ends = field.measure(units)
            first, _ = field.first_crossings(ends)
            rows = field.directions(units)
            inside = [field.inside(rows, ends.log_multiples + step) for step in (-0.01, 0.01)]
            gradient = field.gradient(units, ends.log_multiples)
            forces = [field.force(units, 0.1, level, refinements=n) for n in (0, 2)]
            found.append((ends, first, inside, gradient, forces, field.n_loss, field.n_grad))
        one, other = found
        np.testing.assert_allclose(one[0].log_radii, other[0].log_radii, atol=1e-12)
        assert (one[0].status == other[0].status).all()
        np.testing.assert_allclose(one[1], other[1], atol=1e-12)
        assert one[2][0].all()
        assert not one[2][1].any()
        assert np.array_equal(one[2], other[2])
        torch.testing.assert_close(one[3], other[3])
        for (force, guess), (force_too, guess_too) in zip(one[4], other[4], strict=True):
            torch.testing.assert_close(force, force_too)
            np.testing.assert_allclose(guess, guess_too, atol=1e-9)
        assert one[5:] == other[5:]

    rays.within(monkeypatch, BODY, use, engine=engine)


@pytest.mark.parametrize(("pause", "expected"), [(0.0, 1), (0.1, 6)])
def test_short_losses_are_not_divided(
    pause: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "_SHORTEST", 0.05)

    def use(problem: Problem) -> None:
        engine = problem.engine(8)
        real = type(engine).loss

        def slow(self: Any, *args: Any, **options: Any) -> Any:
            time.sleep(pause)
            return real(self, *args, **options)

        monkeypatch.setattr(type(engine), "loss", slow)
        setting = (
            problem.objective, problem.layout, problem.ray_scale, problem.plan, problem.backend,
        )  # fmt: skip
        assert processes_for(setting, 6, problem.typical_radius) == expected

    rays.within(monkeypatch, BODY, use)


def test_the_plan_says_for_how_many_processes() -> None:
    plan = Plan("general", 2, 4, True, "float64", 1, 1, "cpp", processes=3)
    assert Plan.from_description(plan.describe()) == plan
    # One of before there were any.
    old = {name: value for name, value in plan.describe().items() if name != "processes"}
    assert Plan.from_description(old).processes == 1
    for wrong in (0, 2.0, True, 2**17):
        with pytest.raises(ValueError, match="'processes'"):
            Plan.from_description({**old, "processes": wrong})


def test_alone_a_given_plan_keeps_its_parts() -> None:
    result = calls.divided("annealed")
    assert result.plan["processes"] == 4
    assert "parts" not in result.provenance
    model, data = calls.problem()
    own = fastvol.estimate(
        model, torch.nn.functional.mse_loss, 50, data=data, increase=1.0, progress=False
    )
    assert own.plan["processes"] == 1


def test_a_file_is_no_place_for_tasks(tmp_path: Any) -> None:
    assert _in_a_file(dist.PrefixStore("a", dist.FileStore(str(tmp_path / "store"), 1)))
    assert not _in_a_file(dist.PrefixStore("a", dist.PrefixStore("b", dist.HashStore())))
