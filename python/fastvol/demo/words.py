"""The demo's outcome as a table and as a sentence."""

from __future__ import annotations

from ..result import VolumeEstimate
from .twins import Demo, Twin

# What it takes to call one basin the larger.
_SURE = 0.975


def finding(demo: Demo) -> str:
    """The comparison in a sentence or two."""
    comparison = demo.comparison
    if not comparison.reliable:
        return f"{_verdict(demo)}: there is no radius at which both are reliable. Raise n."
    where = "Without a cap"
    if demo.radius is not None:
        where = f"Within R = {demo.radius:#.3g}, the largest radius reliable for both"
    return (
        f"{_verdict(demo)}. {where}: log(clean volume / poisoned volume) = "
        f"{comparison.log_ratio:.2f} ± {comparison.stderr:.2f} nats; probability that the clean "
        f"basin is the larger: {_probability(comparison.probability)}."
    )


def title(demo: Demo) -> str:
    """The finding, for above the figure."""
    comparison = demo.comparison
    if not comparison.reliable:
        return f"{_verdict(demo)}:\nthere is no radius at which both are reliable"
    where = "" if demo.radius is None else f" within R = {demo.radius:#.3g}"
    return (
        f"{_verdict(demo)}:\nlog volume ratio {comparison.log_ratio:.2f} ± "
        f"{comparison.stderr:.2f} nats{where}, at the same training loss"
    )


def _verdict(demo: Demo) -> str:
    comparison = demo.comparison
    if comparison.reliable and comparison.probability >= _SURE:
        return "The clean network's basin is larger than its poisoned twin's"
    if comparison.reliable and comparison.probability <= 1 - _SURE:
        return "The poisoned twin's basin is larger than the clean network's"
    return "This run cannot tell which of the two basins is the larger"


def _probability(chance: float) -> str:
    if chance > 0.9999:
        return "above 0.9999"
    return "below 0.0001" if chance < 0.0001 else f"{chance:.4f}"


def table(demo: Demo) -> str:
    """Both networks side by side, one quantity a line."""
    twins = (demo.clean, demo.poisoned)
    radius = demo.radius
    rows = [
        ("", ["clean", "poisoned"]),
        ("training images", [str(t.training_images) for t in twins]),
        ("  of these with a wrong label", [str(t.wrong_labels) for t in twins]),
        ("steps of training", [str(t.steps) for t in twins]),
        ("loss on its own training set", [f"{t.training_loss:.5f}" for t in twins]),
        ("loss on the clean images", [f"{t.clean_loss:.5f}" for t in twins]),
        ("test accuracy", [f"{t.test_accuracy:.1%}" for t in twins]),
        ("mean log radius", [f"{t.mean_log_radius:.3f}" for t in twins]),
        ("reliable radius", [f"{t.estimate.reliable_radius:#.3g}" for t in twins]),
    ]
    if radius is not None:
        values = [_filled(t, radius) for t in twins]
        rows.append((f"log filled fraction φ(R), R = {radius:#.3g}", values))
    rows += [
        ("log volume without a cap", [_uncapped(t.estimate) for t in twins]),
        ("directions n", [str(t.estimate.n) for t in twins]),
        ("seconds", [f"{t.estimate.seconds:.1f}" for t in twins]),
        ("ms per direction", [f"{1e3 * t.estimate.seconds / t.estimate.n:.2f}" for t in twins]),
    ]
    left = max(len(name) for name, _ in rows)
    right = max(len(cell) for _, cells in rows for cell in cells)
    lines = [
        f"{name:<{left}}  " + "  ".join(f"{cell:>{right}}" for cell in cells)
        for name, cells in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(
        f"d = {demo.clean.estimate.dim} parameters; basin: loss on the clean images up to "
        f"{demo.threshold:g}; filter metric, nats"
    )
    return "\n".join(lines)


def _filled(twin: Twin, radius: float) -> str:
    value, stderr = twin.filled(radius)
    # Where no ray ends within R there is no spread to estimate an error from.
    return "0 (full ball)" if value == 0 == stderr else f"{value:.2f} ± {stderr:.2f}"


def _uncapped(result: VolumeEstimate) -> str:
    if result.reliable:
        return f"{result.log_volume_metric:.2f} ± {result.stderr:.2f}"
    return f"≥ {result.log_volume_metric:.0f} (a bound)"
