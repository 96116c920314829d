"""What a method is given, for tests of its parts: the problem of a call, and fields of its rays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastvol
from benchmarks.proofs import bodies
from fastvol import methods
from fastvol._problem import Problem
from fastvol._proposal import Proposal
from fastvol.methods._search import make_pilot, pilot_source
from fastvol.sampling.field import RayField


def within(
    monkeypatch: pytest.MonkeyPatch,
    body: bodies.Body,
    use: Callable[[Problem], Any],
    *,
    at: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    """What ``use`` says of the problem that :func:`fastvol.estimate` would hand to its method.

    Args:
        monkeypatch: puts ``use`` in the method's place for this one call.
        body: where the basin is; its threshold is 1.
        use: called with the problem while the model is prepared.
        at: where the model stands, [d]; the body moves with it.
        options: of ``estimate``.
    """
    model, loss = standing(body, at)
    with monkeypatch.context() as patch:
        patch.setattr(methods, "get", lambda name: lambda problem: [use(problem)])
        settings = {"n": 1000, "threshold": 1.0, "progress": False, "lanes": 16, **options}
        return fastvol.estimate(model, loss, **settings)


def standing(
    body: bodies.Body, at: torch.Tensor | None = None
) -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]:
    """A model at the centre of a body, and its loss; the centre is the origin by default."""
    model = body.model()
    if at is None:
        return model, bodies.loss
    centre = at.clone()
    with torch.no_grad():
        model.w.copy_(centre)
    return model, lambda m: m.value(m.w - centre)


def open_field(problem: Problem, law: Proposal | None = None, lanes: int = 16) -> RayField:
    """The rays of a law."""
    threshold = problem.thresholds[0]
    pilot, _ = make_pilot(problem, pilot_source(problem, problem.engine(), law), threshold)
    return RayField(problem, threshold, pilot, law, lanes)
