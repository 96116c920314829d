"""``fastvol.estimate``: checks a call, chooses how to carry it out, and runs the method."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from . import _backend, engines, methods
from ._arguments import boolean, is_auto, numbers_of, positive, string, whole
from ._devices import elsewhere, read_devices
from ._interrupts import interruptible
from ._layout import ParameterLayout, ParameterSelector
from ._memory import within_memory
from ._objective import PREFIX, Objective
from ._precision import products
from ._problem import Problem, Progress, typical_radius
from ._processes import team
from ._resuming import agree, plan_of_folder
from ._running import Threads, quiet_vmap, read_plan
from ._scale import Scale
from ._sharding import reshard
from ._state import preserved, unwrap
from ._version import __version__
from ._work import Work
from .checkpoints import identify
from .checkpoints.folder import folder_path
from .checkpoints.identity import digest_model, digest_value
from .engines import Plan, choose_plan, plan_in_place, reason_to_write
from .errors import NotAvailableError
from .measures import Gaussian, Lebesgue
from .methods._laws import NAMES as PRECONDITIONERS
from .metrics import Metric, metric_scale
from .result import Rays, VolumeEstimate
from .sampling.division import helping, processes_for

# Told from a caller's own 0.1 by identity, so that threshold= and increase= together are an error.
_DEFAULT_INCREASE: float = 0.1
_DEFAULT_MEASURE = Lebesgue()


@overload
def estimate(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    n: float = ...,
    *,
    threshold: float | None = ...,
    increase: float = ...,
    **options: Any,
) -> VolumeEstimate: ...


@overload
def estimate(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    n: float = ...,
    *,
    threshold: Sequence[float] | None = ...,
    increase: float | Sequence[float] = ...,
    **options: Any,
) -> list[VolumeEstimate]: ...


# The overloads leave out the options that do not change the type of the answer.
def estimate(  # type: ignore[misc]
    model: nn.Module,
    loss_fn: Callable[..., Any],
    n: float = 1e6,
    *,
    data: Any = None,
    threshold: float | Sequence[float] | None = None,
    increase: float | Sequence[float] = _DEFAULT_INCREASE,
    metric: Metric = "euclidean",
    measure: Lebesgue | Gaussian = _DEFAULT_MEASURE,
    method: str = "auto",
    preconditioner: Any = "auto",
    parameters: ParameterSelector = None,
    rtol: float | Literal["auto"] = "auto",
    seed: int = 0,
    replicates: int = 2,
    antithetic: bool | Literal["auto"] = "auto",
    noise: str = "full",
    first_crossing: bool = False,
    engine: str = "auto",
    backend: str = "auto",
    device: Any = None,
    lanes: int | Literal["auto"] = "auto",
    plan: Mapping[str, Any] | None = None,
    checkpoint: Any = None,
    on_interrupt: str = "raise",
    distributed: bool = True,
    progress: bool = True,
    callbacks: Iterable[Callable[[Progress], Any]] = (),
) -> VolumeEstimate | list[VolumeEstimate]:
    r"""Log volume (nats) of the basin around a model's parameters θ*.

    The star basin is the set of points θ* + t·u that are reached from θ* before the loss L first
    exceeds the threshold τ. With r(u) the radius along a uniformly drawn unit direction u, in
    metric coordinates,

    .. math:: \log V = \log V_d(1) + \log E[r(u)^d],

    and under a normal law the mean of its radial integrals (see :class:`Gaussian`). In many
    dimensions nearly all of E[r^d] is carried by directions that are never drawn. Four methods draw
    them: ``"radial"`` isotropically; ``"preconditioned"`` along P u, counted with their density;
    ``"annealed"`` by chains from W^0 to W^1, W the radial integral (waste-free tempering, Dau &
    Chopin 2022, with geodesic Hamiltonian moves); ``"splitting"`` by a ladder of balls (Au & Beck
    2001, with Crank–Nicolson moves), for any d and without gradients. ``"auto"`` takes the cheapest
    that a pilot expects to pass. Where ``result.reliable`` is false the number is a lower bound,
    and ``result.profile()`` tells the volume up to the radius where it can be trusted.

    Args:
        model: the trained module. It is evaluated in ``eval()`` mode; its parameters, buffers, mode
            and gradients, and the global random state, are as they were afterwards, also after an
            exception. ``torch.compile`` and DDP wrappers are looked through. One that FSDP2 shards
            is measured by the same call in all its processes; each may have its own part of
            ``data``.
        loss_fn: ``loss_fn(model) -> scalar`` without ``data``; with it
            ``loss_fn(output, target) -> scalar``, the mean over the batch.
        n: number of directions, a whole number (``1e6`` is one). For ``"annealed"`` and
            ``"splitting"`` the budget is what n plain directions would cost, a gradient counting as
            three losses.
        data: ``(inputs, targets)``, or an iterable of such batches that can be read again and
            again in the same order, which is checked. ``inputs`` may be a tensor, a tuple of
            arguments, or a dict of keyword arguments. A batch may also be a dict alone, as Hugging
            Face's models take it: then ``loss_fn(output, batch)`` gets the dict, and
            ``fastvol.losses.model_loss`` is the loss that the model returns. Batches are weighted
            by examples, or by tokens where PyTorch's own classification losses or the model's
            ignore some, and moved to the model's device.
        threshold: τ, the same units as the loss; a sequence gives one result each, from the same
            directions.
        increase: τ − L(θ*), where ``threshold`` is not given; or a sequence.
        metric: coordinates in which length and volume are measured: ``"euclidean"``, ``"filter"``,
            a :class:`FilterMetric`, or positive scales (a mapping by parameter name, or a tensor).
        measure: :class:`Lebesgue` or :class:`Gaussian`.
        method: ``"auto"``, ``"radial"``, ``"preconditioned"``, ``"annealed"`` or ``"splitting"``.
        preconditioner: P, in metric coordinates (for a Gaussian measure in units of its std): it
            changes how many rays it takes, never the answer. ``"hessian"``, ``"ggn"`` (with
            ``data``), ``"lowrank"``, ``"diagonal"``: (I + s·H)^(−1/2) with s chosen by a pilot;
            ``"boundary"``: learned from where rays end and how the loss rises there; an optimizer
            that keeps second moments (Adam); a diagonal ``[d]``, a mapping by parameter name, a
            matrix ``[d, d]``, or an operator with ``matvec``, ``rmatvec`` and ``logabsdet``.
            ``"auto"`` lets a pilot choose; ``None`` is isotropic. ``"annealed"`` starts from it and
            learns on.
        parameters: which parameters move: names, shell-style patterns, or a predicate
            ``(name, parameter) -> bool``. All that require gradients by default.
        rtol: relative tolerance of a radius; ``"auto"`` lets a pilot of 32 directions choose, so
            that it costs at most 0.02 nats or what the loss's rounding allows.
        seed: which directions; 0 ≤ seed < 2⁶⁴.
        replicates: independent runs of ``"annealed"`` and ``"splitting"``, whose spread is part of
            the error.
        antithetic: whether directions 2i and 2i+1 are ± one vector. ``"auto"`` is ``False``.
        noise: ``"full"``, or ``"rowspace"`` to draw only the part of a direction that the inputs of
            the first linear layer can see, and the length of the rest by its law: other directions
            of the same law, cheaper where the examples are fewer than that layer's inputs. For
            ``method="radial"`` around the minimum, with one scale in each row of that layer.
        first_crossing: scan every ray for a crossing before the one found, instead of the rays that
            carry the weight and a few at random.
        engine: ``"layered"`` evaluates a traced model with a ray axis, and makes what is linear in
            the parameters once a direction; ``"general"`` runs any module; ``"inplace"`` writes
            rays into the model's own parameters, one at a time, and restores them: for models too
            large to batch, and sharded ones. ``"auto"`` measures the first two where the model can
            be traced, and takes the third where copies are too large, or cannot be had;
            ``provenance["engine_reason"]`` says why it chose.
        backend: who runs the loop and makes the noise: ``"cpp"``, ``"torch"``, or ``"triton"`` on a
            GPU. ``"auto"`` takes the best that can be had; ``provenance["fell_back"]`` says what
            could not.
        device: the model's own, if given; for independent rays also a sequence of devices of its
            kind, the model's among them, or ``"all"``: a copy of the model works on each.
        lanes: rays in flight; measured by default.
        plan: ``result.plan`` of an earlier run, for a bitwise repeat on the same machine.
        checkpoint: a folder that keeps what is done, made if it is missing: the same call
            continues there, with a larger n as well (n means total), on as many processes as there
            are. It is carried out as the folder says, bit for bit the same, unless ``plan``,
            ``engine``, ``backend`` or ``lanes`` ask for something else: then radii agree within
            ``rtol``. Chains go on from their last level; with another n they are other runs. A
            folder of another model, loss, data, metric or seed is refused.
        on_interrupt: ``"return"`` gives, after Ctrl-C or SIGTERM, the estimate from the directions
            settled so far, or from the runs of chains that are done, with a warning; ``"raise"`` an
            :class:`Interrupted`, as do runs on several processes, and where there is nothing yet.
        distributed: share the work with the other processes of a process group, or of ``torchrun``,
            which all have to make the same call; ``False`` where one of them calls alone.
        progress: show a progress bar on a terminal.
        callbacks: each is called with a :class:`Progress` after every block of directions of
            independent rays: 1,024 of them, on a GPU 8,192; fewer where these would take more than
            half a minute, more where they take next to nothing.

    Returns:
        A :class:`VolumeEstimate` (from chains a :class:`PathEstimate`); a list of them for a
        sequence of thresholds or increases.

    Raises:
        TypeError, ValueError: an argument, named in the message, is not usable: also a loss at θ*
            that is not finite, exceeds the threshold, or differs between two calls.
        FastvolError: the loss raised, or an argument is of a later version
            (:class:`NotAvailableError`), or ``checkpoint`` belongs to another run.
        Interrupted: Ctrl-C or SIGTERM came; it is a KeyboardInterrupt, and says what is kept.

    Example:
        >>> import torch, fastvol
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> loss = lambda m: sum((p - 1).square().sum() for p in m.parameters())
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> result = fastvol.estimate(model, loss, n=1000, threshold=1.0)
        >>> round(result.log_volume, 4)  # a disc of radius 1: log(pi)
        1.1447
    """
    began = time.perf_counter()
    run_method = methods.get(string(method, "method"))
    if _check_noise(noise, method, engine) == "rowspace":
        run_method, engine = methods.get("radial"), "layered"
    _check_preconditioner(preconditioner)
    work = Work(on_interrupt=_check_on_interrupt(on_interrupt))
    if checkpoint is not None:
        # Only the process that leads has to see where it is to be.
        with suppress(FileNotFoundError):
            folder_path(checkpoint)
    engines.check_name(string(engine, "engine"))
    _backend.select(string(backend, "backend"))
    count = whole(n, "n", least=1, below=2**63)
    try:
        Rays.empty(count)
    except (MemoryError, ValueError, OverflowError):
        raise ValueError(
            f"n is {count}: the radii of so many directions do not fit in memory"
        ) from None
    seed = whole(seed, "seed", least=0, below=2**64)
    repeats = whole(replicates, "replicates", least=1, below=1000)
    tolerance = None if is_auto(rtol) else positive(rtol, "rtol", most=0.5)
    lane_count = None if is_auto(lanes) else whole(lanes, "lanes", least=1)
    paired = False if is_auto(antithetic) else boolean(antithetic, "antithetic")
    first_crossing = boolean(first_crossing, "first_crossing")
    distributed = boolean(distributed, "distributed")
    progress = boolean(progress, "progress")
    calls = _callables(callbacks)
    if not isinstance(measure, (Lebesgue, Gaussian)):
        raise TypeError(
            f"measure must be fastvol.Lebesgue or fastvol.Gaussian, got {type(measure).__name__}"
        )

    inner = unwrap(model)
    # FSDP2 registers what it has gathered in place of the shards.
    reshard(inner)
    layout = ParameterLayout(inner, parameters)
    if layout.size > 2**34:
        raise ValueError("model moves more than 2^34 coordinates, the range of the noise's counter")
    devices = read_devices(device, layout.device)
    chosen_backend = _backend.select(backend, layout.device)
    scale, metric_name = metric_scale(metric, layout, used=isinstance(measure, Lebesgue))
    ray_scale = Scale.given(layout, measure.std, "std") if isinstance(measure, Gaussian) else scale
    given_plan = None if plan is None else read_plan(plan, chosen_backend, layout, lane_count)
    start = typical_radius(ray_scale)
    writing = reason_to_write(engine if given_plan is None else given_plan.engine, layout, inner)
    if layout.is_sharded and method not in ("auto", "radial"):
        raise NotAvailableError(
            f"method={method!r} keeps directions, which no process has whole of a sharded module; "
            "use method='radial'"
        )
    if writing and len(devices) > 1:
        raise NotAvailableError(
            f"device names several, but the in-place engine is used ({writing}), which works with "
            "the model itself; use one process a device, with torchrun"
        )

    with (
        interruptible(work),
        team() if distributed and not layout.is_sharded else nullcontext() as work.team,
        preserved(inner, layout),
        Threads(given_plan),
        quiet_vmap(),
        products(tf32=False),
    ):
        work.group = layout.group
        shared = checkpoint is not None or not work.alone
        model_digest = digest_model(inner) if shared else {}
        if checkpoint is not None:
            work.open(checkpoint)
        objective = Objective(inner, loss_fn, data, layout.device, layout.group)
        if writing:
            layout.keep()
        loss0 = objective.prepare(None if writing else layout.unflatten(layout.flatten(), PREFIX))
        asked = {
            "metric": metric_name,
            "measure": measure.describe(),
            "method": method,
            "preconditioner": digest_value(preconditioner),
            "rtol": "auto" if tolerance is None else tolerance,
            "seed": seed,
            "replicates": repeats,
            "antithetic": paired,
            "noise": noise,
            "first_crossing": first_crossing,
        }
        identity = None
        if shared:
            identity = identify(
                objective,
                layout,
                chosen_backend,
                model=model_digest,
                loss0=loss0,
                scale=None if writing else ray_scale.flat,
                radius=0.1 * start,
                asked=asked,
            )
        trouble = None
        # Together the processes of a group take one block at a time.
        shares = max(len(devices), 1 if work.team is None else work.team.size)

        def plan_for(stored: Mapping[str, Any] | None, loss0: float) -> Plan:
            nonlocal trouble
            _thresholds(threshold, increase, loss0, objective.epsilon)
            found, chosen = given_plan, chosen_backend
            block = None
            if stored is not None:
                block = stored["block"]
                if found is None:
                    found, chosen = plan_of_folder(
                        stored,
                        layout,
                        engine="inplace" if layout.is_sharded else engine,
                        backend=backend,
                        lanes=lane_count,
                    )
            is_new = found is None
            if found is None and writing is not None:
                found = plan_in_place(
                    objective,
                    layout,
                    chosen,
                    lanes=lane_count,
                    block=block,
                    rays=count,
                    reason=writing,
                    shares=shares,
                )
            elif found is None:
                found, trouble = choose_plan(
                    engine,
                    objective,
                    layout,
                    ray_scale,
                    chosen,
                    lanes=lane_count,
                    block=block,
                    radius=0.1 * start,
                    rays=count,
                    shares=shares,
                )
                if noise == "rowspace":
                    found = replace(found, cached=True)
            if is_new and work.team is not None and method != "radial" and noise == "full":
                setting = (objective, layout, ray_scale, found, chosen)
                found = replace(found, processes=processes_for(setting, work.team.size, start))
            return found

        versions = _versions(layout)
        loss0, chosen_plan = agree(work, checkpoint, identity, loss0, plan_for, versions)
        chosen_backend = _backend.select(chosen_plan.backend, layout.device)
        thresholds, single = _thresholds(threshold, increase, loss0, objective.epsilon)
        work.threads = chosen_plan.threads
        torch.set_num_threads(chosen_plan.threads)
        config = {
            "layout": layout.describe(),
            "point_sha256": scale.digest(),
            "metric": metric_name,
            "measure": measure.describe(),
            "loss0": loss0,
            "n": count,
            "seed": seed,
            "antithetic": paired,
            "noise": noise,
            "rtol": tolerance,
            "first_crossing": first_crossing,
        }
        problem = Problem(
            objective=objective,
            layout=layout,
            measure=measure,
            metric_scale=scale,
            ray_scale=ray_scale,
            typical_radius=start,
            loss0=loss0,
            thresholds=thresholds,
            n=count,
            seed=seed,
            antithetic=paired,
            noise=noise,
            preconditioner=preconditioner,
            replicates=repeats,
            rtol=tolerance,
            first_crossing=first_crossing,
            plan=chosen_plan,
            backend=chosen_backend,
            config=work.told(lambda: config),
            provenance={
                **versions,
                **_how(chosen_plan, chosen_backend, trouble),
                "processes": layout.group.size if work.team is None else work.team.size,
                "devices": [str(each) for each in devices],
            },
            progress=progress and work.leads,
            callbacks=calls if work.leads else (),
            began=began,
            work=work,
        )
        if len(devices) > 1:
            others = elsewhere(problem, devices[1:], loss_fn, data, parameters)
            problem = replace(problem, elsewhere=others)
        with helping(problem):
            results = within_memory(run_method, problem)
    return results[0] if single else results


def _versions(layout: ParameterLayout) -> dict[str, Any]:
    return {
        "fastvol": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(layout.device),
    }


def _how(plan: Plan, backend: _backend.Backend, trouble: str | None) -> dict[str, Any]:
    fell_back = [*backend.fell_back]
    if trouble is not None:
        fell_back.append(f"vmap: {trouble}")
    return {
        "engine": plan.engine,
        "engine_reason": plan.reason,
        "backend": plan.backend,
        "fell_back": fell_back,
    }


def _thresholds(
    threshold: Any, increase: Any, loss0: float, epsilon: float
) -> tuple[tuple[float, ...], bool]:
    """The absolute thresholds, and whether one was asked for rather than a sequence.

    ``epsilon`` is the relative spacing of the losses: a threshold within two steps of the loss at
    θ* cannot be told from it.
    """
    if threshold is not None and increase is not _DEFAULT_INCREASE:
        raise ValueError("threshold and increase exclude each other; give one of them")
    given, name = (threshold, "threshold") if threshold is not None else (increase, "increase")
    values, single = numbers_of(given, name)
    if name == "increase":
        if any(value <= 0 for value in values):
            raise ValueError(f"increase must be positive, got {given}")
        values = [loss0 + value for value in values]
    for value in values:
        if value < loss0:
            raise ValueError(
                f"threshold {value} is below the loss at the model's parameters, {loss0}: they do "
                "not lie in the basin"
            )
        step = epsilon * max(abs(value), abs(loss0))
        if (value > loss0 or name == "increase") and value - loss0 < 2 * step:
            raise ValueError(
                f"{name} {given} leaves {value - loss0:.3g} above the loss at the model's "
                f"parameters, {loss0}, which is computed in steps of {step:.3g}: take a larger "
                "one, or compute the loss in a wider dtype"
            )
    return tuple(values), single


def _check_preconditioner(preconditioner: Any) -> None:
    if isinstance(preconditioner, str) and preconditioner not in ("auto", *PRECONDITIONERS):
        raise ValueError(
            f"preconditioner must be 'auto', None, one of {list(PRECONDITIONERS)}, an optimizer, a "
            f"diagonal, a matrix or an operator, got {preconditioner!r}"
        )


def _check_noise(noise: Any, method: str, engine: Any) -> str:
    if string(noise, "noise") not in ("full", "rowspace"):
        raise ValueError(f"noise must be 'full' or 'rowspace', got {noise!r}")
    if noise == "rowspace" and method not in ("auto", "radial"):
        raise ValueError(f"noise='rowspace' is for method='radial', not for method={method!r}")
    if noise == "rowspace" and engine not in ("auto", "layered"):
        raise ValueError(f"noise='rowspace' needs engine='layered', got engine={engine!r}")
    return str(noise)


def _check_on_interrupt(on_interrupt: Any) -> str:
    if string(on_interrupt, "on_interrupt") not in ("raise", "return"):
        raise ValueError(f"on_interrupt must be 'raise' or 'return', got {on_interrupt!r}")
    return str(on_interrupt)


def _callables(callbacks: Any) -> tuple[Callable[[Progress], Any], ...]:
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        raise TypeError("callbacks must be a sequence of callables")
    result = tuple(callbacks)
    for callback in result:
        if not callable(callback):
            raise TypeError(f"callbacks must be callable, got {type(callback).__name__}")
    return result
