"""``fastvol.prior_mass``: how much of the initialisation's law solves the task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from . import _backend
from ._arguments import boolean, is_auto, numbers_of, whole
from ._bars import progress_bar
from ._layout import ParameterLayout, ParameterSelector
from ._objective import PREFIX, Objective
from ._precision import products
from ._prior_ladder import STATE_BYTES, Ladder, Level, make_ladder, run_ladder, thinned
from ._prior_moves import Prior, PriorEngine
from ._prior_result import PriorMass
from ._running import Threads, quiet_vmap, read_plan
from ._state import preserved, unwrap
from .engines import measure_plan, warn_of_single_rays
from .measures import Gaussian

_LEAST_N = 1000
# Plain draws serve where the budget would hit so often.
_PLAIN_HITS = 300
_FIRST_SHARE = 0.05
# Of the budget, over the states of one of the pilot's levels.
_PILOT_SHARE = 400
_LEAST_PILOT, _MOST_PILOT = 256, 4096
_PILOT_MOST = 0.5
_REHEARSAL_SHARE = 0.2
_LEAST_CHAINS = 16
_LENGTH = 16
_MOST_CHAINS = 1024
_LANES_BYTES = 256 << 20
_MOST_LANES = 1024
_SOLUTIONS = 64


def prior_mass(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    n: float = 1e5,
    *,
    data: Any = None,
    threshold: float | Sequence[float],
    std: float | Mapping[str, Any] | Tensor,
    mean: float | Mapping[str, Any] | Tensor = 0.0,
    parameters: ParameterSelector = None,
    seed: int = 0,
    replicates: int = 2,
    chains: int | Literal["auto"] = "auto",
    plan: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PriorMass:
    r"""Log mass (nats) of all parameters with a loss of at most τ, under a normal law.

    .. math:: \log P(L(\theta) \le \tau), \qquad \theta \sim N(\mathrm{mean}, \mathrm{std}^2)

    over every parameter that moves. With the law of the initialisation this is the chance that a
    freshly initialised network solves the task, whichever basin it lies in; nothing is asked of the
    model's present parameters, and the set need not be star-shaped or connected.

    Where plain draws hit often enough they are used. Else subset simulation leads down a ladder of
    losses (Au & Beck 2001; waste-free as in Dau & Chopin 2022) that a pilot lays out: states at or
    below one rung move by Crank–Nicolson steps, with step lengths along the axes of the population,
    and a share of them lies at or below the next. Each run gives an unbiased estimate of the mass
    and, from the family tree of its chains, an error; the result is the mean of the runs. It takes
    no gradients. Classes of solutions that are too rare for any chain to enter at the rungs
    where they split off are missed.

    Args:
        model: the module, in ``eval()`` mode while it is evaluated. Its parameters, buffers, mode
            and gradients, and the global random state, are as they were afterwards, also after an
            exception. Parameters that do not move keep their values.
        loss_fn, data: as for :func:`estimate`; a loss that jumps, or has ties, will do. A loss that
            is not finite is above every threshold, but at the model's parameters it must be finite.
        n: budget in loss evaluations, at least 1,000; kept to within a few per cent as
            long as it pays for 32 states on every rung of every run.
        threshold: τ; or a sequence, all served by one run (see :meth:`PriorMass.at`).
        std: standard deviation: a positive number, a mapping from parameter name to a number or a
            tensor that broadcasts to that parameter, or a tensor with an entry per moved
            coordinate.
        mean: of the law, in the same forms; any finite values.
        parameters: which parameters move, as for :func:`estimate`.
        seed: of all noise; 0 ≤ seed < 2⁶⁴.
        replicates: independent runs.
        chains: of each run; by default about a sixteenth of a population.
        plan: ``result.plan`` of an earlier run, for a bitwise repeat on the same machine.
        progress: show a progress bar on a terminal.

    Returns:
        A :class:`PriorMass`.

    Raises:
        TypeError, ValueError: an argument, named in the message, is not usable.
        FastvolError: the loss raised.

    Example:
        >>> import torch, fastvol
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda m: m.weight.square().sum()
        >>> result = fastvol.prior_mass(model, loss, threshold=2e-6, std=1.0)
        >>> abs(result.log_mass - -13.8) < 0.5
        True
    """
    began = time.perf_counter()
    count = whole(n, "n", least=_LEAST_N, below=2**40)
    seed = whole(seed, "seed", least=0, below=2**64)
    repeats = whole(replicates, "replicates", least=1, below=1000)
    chain_count = None if is_auto(chains) else whole(chains, "chains", least=8, below=2**16)
    progress = boolean(progress, "progress")
    thresholds, _ = numbers_of(threshold, "threshold")
    law = Gaussian(std)
    inner = unwrap(model)
    layout = ParameterLayout(inner, parameters)
    scale = layout.expand(law.std, "std")
    center = _expand_mean(layout, mean)
    theta = layout.flatten()
    backend = _backend.select("auto")
    lanes = max(1, min(_MOST_LANES, _LANES_BYTES // (layout.size * theta.element_size())))

    given = None if plan is None else read_plan(plan, backend, layout, None)

    with preserved(inner), Threads(given), quiet_vmap(), products(tf32=False):
        objective = Objective(inner, loss_fn, data, layout.device)
        objective.prepare(layout.unflatten(theta.clone(), PREFIX))
        if given is None:
            given, trouble = measure_plan(
                objective,
                layout,
                scale,
                backend,
                lanes=None,
                block=lanes,
                radius=math.sqrt(layout.size),
                rays=count,
            )
            torch.set_num_threads(given.threads)
            warn_of_single_rays(given, trouble)
            given = replace(given, lanes=lanes, chunk=min(given.chunk, lanes), keep_rows=True)
        engine = PriorEngine(objective, layout, center, scale, given, backend)
        with progress_bar(count, "loss", shown=progress) as bar:
            prior = Prior(engine, backend, seed, theta, given.noise_threads, bar.update)
            result = _run(prior, min(thresholds), count, repeats, chain_count)
    ladder, runs, states, remarks = result
    return PriorMass(
        thresholds=tuple(thresholds),
        n=count,
        n_loss=prior.n_loss,
        seconds=time.perf_counter() - began,
        seed=seed,
        dim=layout.size,
        std=law.describe()["std"],
        replicates=repeats,
        plan=given.describe(),
        rungs=np.array(ladder.rungs, dtype=np.float64),
        solutions=engine.points(states),
        _runs=tuple(map(tuple, runs)),
        _layout=layout,
        _plateau=ladder.plateau,
        _remarks=tuple(remarks),
    )


def _run(
    prior: Prior, threshold: float, n: int, replicates: int, chains: int | None
) -> tuple[Ladder, list[list[Level]], Tensor, list[str]]:
    """The pilot, then the main runs."""
    rng = np.random.default_rng([prior.seed & 0xFFFFFFFF, prior.seed >> 32, 29])
    states = min(max(n // _PILOT_SHARE, _LEAST_PILOT), _MOST_PILOT)
    losses = prior.draw_losses(0, max(states, round(_FIRST_SHARE * n)))
    hits = int((losses <= threshold).sum())
    if hits * n >= _PLAIN_HITS * len(losses):
        ladder = Ladder((), (), (), False, True, math.log(hits / len(losses)))
    else:
        most = max(int(_PILOT_MOST * n) - prior.n_loss, 0)
        ladder = make_ladder(prior, losses, threshold, states, most, rng)
    remarks: list[str] = []
    if ladder.rungs:
        # A rehearsal, which does not count: what it learns of the moves is fixed thereafter.
        sizes = _sizes(prior, _REHEARSAL_SHARE * max(n - prior.n_loss, 0), ladder, chains)
        levels, _, ladder = _one(prior, ladder, threshold, sizes, 1, rng, learn=True)
        ladder = thinned(ladder, levels, threshold)
    sizes = _sizes(prior, max(n - prior.n_loss, 0) / replicates, ladder, chains)
    if ladder.rungs and sizes[1] < _LENGTH // 2:
        remarks.append(
            f"n = {n} pays for chains of {sizes[1]} states on each of {len(ladder.rungs)} rungs "
            "only; raise n"
        )
    runs, found = [], []
    for index in range(replicates):
        levels, end, _ = _one(prior, ladder, threshold, sizes, index + 2, rng)
        runs.append(levels)
        found.append(end[: max(_SOLUTIONS // replicates, 1)])
    return ladder, runs, torch.cat(found), remarks


def _sizes(prior: Prior, losses: float, ladder: Ladder, chains: int | None) -> tuple[int, int]:
    """M and K of a run that may take so many losses."""
    population = losses / (len(ladder.rungs) + 1)
    if chains is None:
        most = min(STATE_BYTES // (prior.dim * prior.like.element_size()), _MOST_CHAINS)
        chains = max(min(int(population / _LENGTH), most), _LEAST_CHAINS)
    # The state that a chain starts from costs nothing.
    free = len(ladder.rungs) / (len(ladder.rungs) + 1)
    return chains, max(int(population / chains + free), 2)


def _one(
    prior: Prior,
    ladder: Ladder,
    threshold: float,
    sizes: tuple[int, int],
    number: int,
    rng: np.random.Generator,
    *,
    learn: bool = False,
) -> tuple[list[Level], Tensor, Ladder]:
    """Run number so and so, each with streams of noise of its own."""
    return run_ladder(
        prior,
        ladder,
        threshold,
        chains=sizes[0],
        length=sizes[1],
        stream=number << 20,
        rng=rng,
        learn=learn,
    )


def _expand_mean(layout: ParameterLayout, mean: Any) -> Tensor:
    """The mean of every coordinate, float64 ``[d]`` on the CPU."""
    if isinstance(mean, np.ndarray) and mean.dtype.kind in "fiu":
        mean = torch.as_tensor(mean)
    if isinstance(mean, Mapping):
        flat = layout._expand_mapping(mean, "mean")
    elif isinstance(mean, Tensor):
        if mean.is_complex() or mean.numel() not in (1, layout.size):
            raise ValueError(
                f"mean must be a real tensor with one entry or {layout.size} entries (one per "
                f"moved coordinate), got {mean.dtype} of shape {tuple(mean.shape)}"
            )
        flat = mean.detach().to("cpu", torch.float64).reshape(-1).expand(layout.size).clone()
    else:
        (value,), single = numbers_of(mean, "mean") if np.isscalar(mean) else ((0.0,), False)
        if not single:
            raise TypeError(
                "mean must be a number, a mapping from parameter name to values, or a tensor, got "
                f"{type(mean).__name__}"
            )
        flat = torch.full((layout.size,), value, dtype=torch.float64, device="cpu")
    if not bool(torch.isfinite(flat.to(layout.dtype)).all()):
        raise ValueError(f"mean must be finite in every coordinate, as {layout.dtype}")
    return flat
