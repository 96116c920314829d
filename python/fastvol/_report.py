"""A result in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .measures import Gaussian

if TYPE_CHECKING:
    from .result import VolumeEstimate


def one_line(result: VolumeEstimate) -> str:
    """The quantity, its error, and whether it is only a bound."""
    value, relation = result.log_volume, "=" if result.reliable else ">="
    error = f" ± {result.stderr:.3g}" if result.reliable else ""
    trust = "reliable" if result.reliable else "NOT reliable: a lower bound"
    if result.by_chains and not result.reliable:
        value, trust = result.lower_bound(), "NOT reliable: a lower bound, at 95 % confidence"
    return (
        f"{type(result).__name__}({_quantity(result)} {relation} {value:.6g}{error} nats, "
        f"d={result.dim}, n={result.n}, {trust})"
    )


def summary(result: VolumeEstimate) -> str:
    """Several lines: the number, how far to trust it, what to do next, what it cost."""
    name = _quantity(result)
    lines = []
    if result.reliable:
        low, high = result.ci()
        lines.append(
            f"{name} = {result.log_volume:.6g} ± {result.stderr:.2g} nats "
            f"(95 % interval {low:.6g} to {high:.6g})"
        )
    elif result.by_chains:
        lines.append(
            f"{name} is above {result.lower_bound():.6g} nats with 95 % confidence: a lower bound, "
            "not the value"
        )
        lines.append(
            f"the chains themselves say {result.log_volume:.6g} ± {result.stderr:.2g} nats, which "
            "cannot be relied on; where they mix too little the true value is larger"
        )
    else:
        lines.append(
            f"{name} is at least {result.log_volume:.6g} nats: this is a lower bound, not the value"
        )
        lines.append(
            f"with 95 % confidence it is above {result.lower_bound():.6g} nats; the true value may "
            "be larger by far more than any error bar of this run"
        )
    if isinstance(result.measure, Gaussian):
        lines.append(f"measure: normal law around the {result.measure.center}")
    else:
        cap = result.measure.max_radius
        within = "" if math.isinf(cap) else f" within radius {cap:.6g}"
        lines.append(
            f"measure: volume{within}; in metric coordinates ({_metric(result)}) "
            f"{result.log_volume_metric:.6g} nats, log mean power {result.log_mean_power:.6g}"
        )
    lines.append(_reach(result))
    counted = "states of chains" if result.by_chains else "directions"
    lines.append(
        f"d = {result.dim}, n = {result.n} {counted}, effective sample size {result.ess:.4g}, loss "
        f"{result.config['loss0']:.4g} at the minimum, threshold {result.config['threshold']:.4g}"
    )
    lines.extend(f"note: {warning}" for warning in result.warnings)
    if not result.reliable:
        lines.append(f"next: {_advice(result)}")
    spent = f"{result.n_loss} loss evaluations"
    if result.n_grad:
        spent += f" and {result.n_grad} gradients"
    if not result.by_chains:
        spent += f" ({result.n_loss / result.n:.1f} losses a direction)"
    lines.append(
        f"{result.method} method, {spent} in "
        f"{result.seconds:.3g} s; {result.plan['engine']} engine, {result.plan['chunk']} rays at "
        f"once, {result.plan['backend']} loop"
    )
    return "\n".join(lines)


def _quantity(result: VolumeEstimate) -> str:
    return "log mass" if isinstance(result.measure, Gaussian) else "log volume"


def _metric(result: VolumeEstimate) -> str:
    metric = result.config["metric"]
    return metric if isinstance(metric, str) else "given scales"


def _reach(result: VolumeEstimate) -> str:
    radius = result.reliable_radius
    gaussian = isinstance(result.measure, Gaussian)
    if math.isinf(radius) and gaussian:
        return "the profile is reliable at every multiple of the given std"
    if math.isinf(radius):
        return "the profile is reliable at every radius"
    if radius == 0:
        return "the profile is reliable at no radius"
    at = result.profile([radius])
    value, error = float(at.log_fraction[0]), float(at.stderr[0])
    if gaussian:
        return (
            f"reliable up to {radius:.4g} times the given std, where the log mass is {value:.4g} ± "
            f"{error:.2g} nats"
        )
    return (
        f"reliable up to radius {radius:.4g}, where the basin fills a fraction of the ball of log "
        f"{value:.4g} ± {error:.2g} nats"
    )


def _advice(result: VolumeEstimate) -> str:
    if result.by_chains:
        return (
            "raise n, which buys longer chains; or another preconditioner; or a smaller cap or "
            "std, up to the reliable one"
        )
    if isinstance(result.measure, Gaussian):
        return "a smaller std, more directions, or result.profile() for the mass at smaller std"
    if result.reliable_radius > 0:
        return (
            "compare basins by result.profile() up to the reliable radius (fastvol.compare does), "
            f"cap the measure there (Lebesgue(max_radius={result.reliable_radius:.4g})), or raise "
            "n, which buys reach"
        )
    return "raise n; at least a few hundred directions are needed for any radius to be reliable"
