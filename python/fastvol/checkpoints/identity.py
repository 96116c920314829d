"""What a folder belongs to: digests of the model and the data, and what was asked.

Two runs are the same if these agree. What is computed (the loss at θ* and at two points around it)
agrees to the loss's own rounding only, so that a folder can move to another machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._backend import Backend
from .._layout import ParameterLayout
from .._objective import PREFIX, Batch, Objective, as_float, rows_of
from .._sharding import Group, whole_of

# Of the engines' measurements; see ``fastvol.engines``.
_PROBE_STREAM = 2
_PROBES = (1.0, 10.0)
# Bytes of an example's digest.
_DIGEST = 16


@dataclass(frozen=True)
class Identity:
    """What a run is.

    Args:
        exact: JSON-ready, must be equal.
        losses: L(θ*), and L at two points around it.
        tolerance: relative, of the losses.
    """

    exact: dict[str, Any]
    losses: tuple[float, ...]
    tolerance: float

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.exact, "losses": list(self.losses)}

    def differences(self, other: Mapping[str, Any], whose: str = "the folder") -> list[str]:
        """In what ``other``, another's description, is another run; in words, both values named."""
        found = []
        for name in [*self.exact, *(set(other) - set(self.exact) - {"losses"})]:
            here, there = self.exact.get(name), other.get(name)
            if here != there:
                found.append(
                    f"{name.replace('_', ' ')} is {_brief(here)}, {whose}'s is {_brief(there)}"
                )
        losses = other.get("losses", [])
        if not _agree(self.losses, losses, self.tolerance):
            found.append(
                f"the loss at the model's parameters and at two points around them is "
                f"{_brief(list(self.losses))}, {whose}'s is {_brief(losses)}"
            )
        return found


def identify(
    objective: Objective,
    layout: ParameterLayout,
    backend: Backend,
    *,
    model: Mapping[str, str],
    loss0: float,
    scale: Tensor | None,
    radius: float,
    asked: Mapping[str, Any],
) -> Identity:
    """The identity of a call.

    Args:
        objective, layout, backend: of the call; the model stands prepared.
        model: :func:`digest_model` of it, from before anything was evaluated.
        loss0: L(θ*).
        scale: the coordinates of a ray, float64 ``[size]``; ``None`` for a model that losses are
            not made around, since it cannot be called with other parameters than its own.
        radius: length of a step around θ*.
        asked: JSON-ready, the arguments that the numbers depend on.
    """
    data = None
    if objective.module.with_data:
        data = digest_data(objective, layout.group)
    exact = {
        "parameters": layout.describe(),
        **model,
        "loss_fn": name_of(objective.loss_fn),
        "data_sha256": data,
        **asked,
    }
    losses: list[float] = []
    if scale is not None:
        losses = _losses_around(objective, layout, backend, scale, radius)
    double = objective.epsilon < 1e-12 and layout.dtype == torch.float64
    tolerance = 1e-9 if double else max(1e-3, 8.0 * objective.epsilon)
    # As a file gives it back.
    exact = json.loads(json.dumps(exact))
    return Identity(exact, (loss0, *losses), tolerance)


def digest_model(model: nn.Module) -> dict[str, str]:
    """SHA-256 of all parameters, and of all buffers, with their names."""
    return {
        "parameters_sha256": _digest(model.named_parameters()),
        "buffers_sha256": _digest(model.named_buffers()),
    }


def digest_data(objective: Objective, group: Group) -> str:
    """SHA-256 of the examples that a loss sees, in all processes.

    Their mean does not depend on their order, nor on how they are divided into batches and among
    processes. Targets that were computed do not count.
    """
    own = bytearray()
    for batch in objective.batches():
        for digest in _digests(batch, targets=not objective.has_own_targets):
            own += digest
    everything = b"".join(group.gather(_distinct(own)))
    return hashlib.sha256(_distinct(everything)).hexdigest()


def _distinct(digests: bytes | bytearray) -> bytes:
    """Each of some digests once, in order."""
    words = np.frombuffer(digests, dtype=np.uint64).reshape(-1, _DIGEST // 8)
    return np.unique(words, axis=0).tobytes()


def _digests(batch: Batch, *, targets: bool) -> Iterator[bytes]:
    """Of each example, or of the whole batch where it is not made of rows."""
    told = (batch.args, batch.kwargs, batch.target if targets else None)
    leaves, spec = pytree.tree_flatten(told)
    common = hashlib.sha256(str(spec).encode())
    rows = rows_of(batch)
    tensors = []
    for leaf in leaves:
        if rows is None or not isinstance(leaf, Tensor) or leaf.is_sparse:
            _update(common, leaf)
        else:
            common.update(f"{leaf.dtype} {tuple(leaf.shape[1:])}".encode())
            tensors.append(_bytes_of(leaf).reshape(rows, leaf[0].nbytes))
    for row in range(rows or 1):
        sha = common.copy()
        for tensor in tensors:
            sha.update(tensor[row])
        yield sha.digest()[:_DIGEST]


def digest_value(value: Any) -> Any:
    """JSON-ready, enough to tell one argument from another: text as it is, tensors by digest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        sha = hashlib.sha256()
        _update(sha, torch.as_tensor(value))
        return {"sha256": sha.hexdigest(), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(key): digest_value(entry) for key, entry in value.items()}
    if isinstance(value, torch.optim.Optimizer):
        state = [
            digest_value(dict(sorted(value.state[p].items(), key=lambda entry: entry[0])))
            for group in value.param_groups
            for p in group["params"]
            if p in value.state
        ]
        return {"optimizer": type(value).__name__, "state": state}
    describe = getattr(value, "describe", None)
    if callable(describe):
        return describe()
    return type(value).__name__


def name_of(loss_fn: Callable[..., Any]) -> str:
    """What a loss is called. Where two are called alike their values tell them apart."""
    if isinstance(loss_fn, functools.partial):
        options = ", ".join(f"{k}={digest_value(v)!r}" for k, v in loss_fn.keywords.items())
        return f"partial({name_of(loss_fn.func)}, {options})"
    if isinstance(loss_fn, nn.Module):
        return f"{type(loss_fn).__name__}({loss_fn.extra_repr()})"
    return str(getattr(loss_fn, "__qualname__", type(loss_fn).__name__)).rpartition(".")[2]


def _losses_around(
    objective: Objective,
    layout: ParameterLayout,
    backend: Backend,
    scale: Tensor,
    radius: float,
) -> list[float]:
    theta = layout.flatten()
    moving = scale > 0
    z = torch.empty((1, int(moving.sum())), dtype=layout.dtype, device=layout.device)
    backend.normals(z, 0, _PROBE_STREAM, np.array([0], dtype=np.int64))
    step = torch.zeros(layout.size, dtype=torch.float64)
    direction = z[0].to("cpu", torch.float64)
    step[moving] = scale[moving] * direction / direction.norm()
    losses = []
    with torch.no_grad():
        for factor in _PROBES:
            point = theta + (factor * radius * step).to(theta)
            total = weight = 0.0
            for batch in objective.batches():
                value = objective.call(layout.unflatten(point, PREFIX), batch)
                total += batch.weight * as_float(value)
                weight += batch.weight
            losses.append(total / weight)
    return losses


def _agree(ours: Iterable[float], theirs: Any, tolerance: float) -> bool:
    ours = list(ours)
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    size = max((abs(v) for v in ours if math.isfinite(v)), default=0.0)
    return all(
        abs(a - b) <= tolerance * size
        if math.isfinite(a) and math.isfinite(b)
        else math.isfinite(a) == math.isfinite(b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    sha = hashlib.sha256()
    for name, tensor in named:
        sha.update(name.encode())
        _update(sha, whole_of(tensor))
    return sha.hexdigest()


def _update(sha: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        sha.update(repr(digest_value(value)).encode())
        return
    sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
    plain = value.detach()
    if plain.is_sparse:
        plain = plain.coalesce()
        for part in (plain.indices(), plain.values()):
            _update(sha, part)
        return
    sha.update(_bytes_of(plain))


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    # Through bytes, since NumPy does not know every dtype.
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    flat: npt.NDArray[np.uint8] = plain.numpy()
    return flat


def _brief(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."
