"""The loss as one function of the moved parameters, over fixed data."""

from __future__ import annotations

import copy
import inspect
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler

from ._sharding import Group
from ._sums import Running
from ._weights import is_nonnegative, mean_weight, takes_classes
from .errors import FastvolError


@dataclass(frozen=True)
class Batch:
    """What one call of the loss sees, on the model's device.

    ``args`` and ``kwargs`` go to the model (both empty for a ``loss_fn(model)``), ``target`` to the
    loss: for a batch that is a dict, the dict. ``weight`` is the batch's share in the mean:
    examples, or tokens where some are ignored.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    weight: float


class _LossModule(nn.Module):
    """The user's model and loss as one module, so that one ``functional_call`` reaches both."""

    loss_fn: Callable[..., Any]

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], with_data: bool) -> None:
        super().__init__()
        self.model = model
        # Kept out of the module's children: a loss that is a module may hold parameters of its own.
        self.__dict__["loss_fn"] = loss_fn
        self.with_data = with_data

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
        if not self.with_data:
            return self.loss_fn(self.model)
        return self.loss_fn(self.model(*args, **kwargs), target)


PREFIX = "model."
# A loss that cannot be negative may be so in its last digits.
_ROUNDING = 1e-6
_ACTIVATIONS_PER_INPUT = 4


class Objective:
    """L(θ) on a fixed set of data: the weighted mean of the batches' losses.

    Args:
        model: the (unwrapped) module.
        loss_fn: ``loss_fn(model)`` or, with data, ``loss_fn(output, target)``.
        data: ``None``, ``(inputs, targets)`` or a dict, or an iterable of such batches.
        device: where the model stands; batches are moved there.
        group: the processes that hold the model; each has its own data, and the loss is the mean
            over all of them.

    Raises:
        TypeError, ValueError: naming ``loss_fn`` or ``data``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Any,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        _check_reduction(loss_fn)
        self._loss_fn = loss_fn
        self._device = device
        self.module = _LossModule(model, loss_fn, with_data=data is not None)
        self._stream: Iterable[Any] | None = None
        self._batches: list[Batch] | None = None
        self._reference_targets: list[Any] | None = None
        self._largest_batch = 0
        self._group = group or Group()
        # Of a stream: a digest of each batch, as it was when it was first read.
        self._prints: list[Any] | None = None
        self._weight: float | None = None
        self._is_in_step = False
        self._is_nonnegative = is_nonnegative(loss_fn, model)
        # What an engine has written down of the loss, by whatever that depends on.
        self.graphs: dict[Any, dict[Any, Any]] = {}
        self.epsilon = torch.finfo(torch.float32).eps
        # L(θ*), and how long it takes, from prepare() on.
        self.loss0 = self.seconds = math.nan
        if data is None:
            self._batches = [Batch((), {}, None, 1.0)]
        elif isinstance(data, Mapping) and _holds_tensors(data):
            self._batches = [self._dict_batch(data, 0)]
        elif _is_one_batch(data):
            self._batches = [self._batch(data, 0)]
        elif isinstance(data, (list, tuple)):
            if not data:
                raise ValueError("data is empty")
            self._batches = [self._batch(item, i) for i, item in enumerate(data)]
        elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping, Tensor)):
            if isinstance(data, Iterator):
                raise TypeError(
                    "data is an iterator, which can be read only once; pass the batches as a list, "
                    "or an object that starts again at each iter(), such as a DataLoader"
                )
            self._stream = data
        else:
            raise TypeError(
                "data must be (inputs, targets), a dict of tensors, or an iterable of such "
                "batches, got "
                f"{type(data).__name__}"
            )
        self._refuse_unordered(data)

    @property
    def loss_fn(self) -> Callable[..., Any]:
        """The caller's loss."""
        return self._loss_fn

    @property
    def has_own_targets(self) -> bool:
        """Whether the targets are the model's own outputs at θ*."""
        return self._reference_targets is not None

    @property
    def in_memory(self) -> bool:
        """Whether the batches are held, rather than read anew for every evaluation."""
        return self._batches is not None

    def bytes_per_ray(self) -> int:
        """A guess at the activations that one ray needs: some times its largest batch of inputs."""
        return _ACTIVATIONS_PER_INPUT * self._largest_batch

    @property
    def largest_batch(self) -> int:
        """Examples of the largest batch in memory."""
        return max((_examples(b.args or b.kwargs) for b in self._batches or ()), default=0)

    @property
    def examples(self) -> int:
        """Examples of all batches in memory."""
        return sum(_examples(b.args or b.kwargs) for b in self._batches or ())

    def batches(self) -> Iterator[Batch]:
        """The batches in order, without those in which no example counts.

        Raises:
            ValueError: a stream gave other batches, or another order, than when it was first read.
        """
        if self._batches is not None:
            # Processes that hold their data have as many batches each as at the first look.
            own = (batch for batch in self._batches if batch.weight)
            yield from own if self._is_in_step else self._group.in_step(own)
            self._is_in_step = True
        else:
            yield from self._group.in_step(self._read_again())

    def _read_again(self) -> Iterator[Batch]:
        assert self._stream is not None
        prints, seen = self._prints, 0
        for index, item in enumerate(self._stream):
            batch = self._batch(item, index)
            if prints is not None and prints[index : index + 1] != [_digest(batch)]:
                raise ValueError(_CHANGED.format(f"batch {index} is not what it was"))
            seen = index + 1
            # The mean over no target at all is NaN.
            if batch.weight:
                yield batch
        if prints is not None and seen != len(prints):
            raise ValueError(_CHANGED.format(f"{seen} batches came instead of {len(prints)}"))

    @property
    def weight(self) -> float:
        """The sum of all batches' weights, in all processes."""
        if self._weight is None:
            self._weight = self._sum(sum(batch.weight for batch in self.batches()))
        return self._weight

    def _sum(self, value: float) -> float:
        return float(self._group.sum(value)[0])

    def running(self, count: int, limit: float = math.inf) -> Running:
        """Sums of ``count`` rays' losses that stop at ``limit``, where losses cannot be negative.

        Args:
            count: rays.
            limit: as in :meth:`fastvol.engines.protocol.Engine.loss`.
        """
        if not self._is_nonnegative:
            limit = math.inf
        return Running(count, self.weight, limit, self._group)

    def split(self, batch: Batch, rows: int) -> list[Batch]:
        """Batches of at most ``rows`` examples each that have the same weighted mean.

        That holds where the loss is a mean over examples that do not see each other. A batch whose
        parts do not all have as many rows comes back whole.
        """
        length = rows_of(batch)
        if not rows or length is None:
            return [batch]
        parts = [self._part(batch, slice(i, min(i + rows, length))) for i in range(0, length, rows)]
        return [part for part in parts if part.weight]

    def thinned(self, examples: int) -> Objective | None:
        """The loss on about so many of the examples in memory, spread evenly over them.

        ``None`` where there are not twice as many, or where the batches are not made of rows.
        """
        lengths = [rows_of(batch) for batch in self._batches or ()]
        whole = [length for length in lengths if length is not None]
        if not whole or len(whole) < len(lengths) or sum(whole) < 2 * examples:
            return None
        step = sum(whole) // examples
        thinned = copy.copy(self)
        # A batch shorter than the step still gives its first example.
        thinned._batches = [
            self._part(batch, slice(0, length, step))
            for batch, length in zip(self._batches or (), whole, strict=True)
        ]
        thinned._weight = None
        return thinned if any(batch.weight for batch in thinned._batches) else None

    def _part(self, batch: Batch, rows: slice) -> Batch:
        """Some rows of a batch."""
        leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs, batch.target))
        some = [leaf[rows] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs, target = pytree.tree_unflatten(some, spec)
        examples = len(range(rows.stop)[rows])
        return Batch(
            args, kwargs, target, mean_weight(self._loss_fn, self.module.model, target, examples)
        )

    def call(self, parameters: Mapping[str, Tensor] | None, batch: Batch) -> Any:
        """What the user's loss returns for one batch; its exceptions are named after it.

        Args:
            parameters: values by name, :data:`PREFIX` included; ``None`` for the model's own.
            batch: one of :meth:`batches`.
        """
        inputs = (batch.args, batch.kwargs, batch.target)
        try:
            if parameters is None:
                return self.module(*inputs)
            return functional_call(self.module, dict(parameters), inputs)
        except FastvolError:
            raise
        except Exception as error:
            text = f"loss_fn (or the model inside it) raised {type(error).__name__}: {error}"
            if batch.kwargs:
                text += f"; data gave the model the keyword arguments {[*map(str, batch.kwargs)]}"
            raise FastvolError(text) from error

    def prepare(self, parameters: Mapping[str, Tensor] | None) -> float:
        """Evaluates the loss at θ* twice and returns it.

        Args:
            parameters: copies of the parameters at θ*, so that nothing can write to the model's;
                or ``None`` for the model's own.

        Raises:
            ValueError, TypeError: the loss is not a finite scalar, or the two calls differ.
        """
        if hasattr(self._loss_fn, "reference_target"):
            self._keep_reference_targets()
        first = self._inspect(parameters)
        began = time.perf_counter()
        second = self._inspect(parameters)
        self.seconds = time.perf_counter() - began
        if first != first:
            raise ValueError("loss_fn is NaN at the model's parameters; there is no minimum here")
        if first in (float("inf"), float("-inf")):
            raise ValueError(f"loss_fn is {first} at the model's parameters")
        # Reductions on several threads may round differently; anything beyond that is noise.
        allowed = 16 * torch.finfo(torch.float32).eps * max(abs(first), abs(second))
        if abs(first - second) > allowed:
            raise ValueError(
                f"loss_fn gave {first!r} and then {second!r} for the same parameters; "
                + self._suspect()
            )
        self.loss0 = first
        return first

    def _inspect(self, parameters: Mapping[str, Tensor] | None) -> float:
        total, weight = 0.0, 0.0
        with torch.no_grad():
            for batch in self._watched():
                value = self.call(parameters, batch)
                self.epsilon = _epsilon(value, parameters or dict(self.module.named_parameters()))
                own = as_float(value)
                # A loss that was taken for one that cannot be negative.
                self._is_nonnegative = self._is_nonnegative and not own < -_ROUNDING
                total += batch.weight * own
                weight += batch.weight
                self._largest_batch = max(self._largest_batch, _bytes((batch.args, batch.kwargs)))
        total, weight = (float(x) for x in self._group.sum([total, weight]))
        self._is_nonnegative = not self._group.any(not self._is_nonnegative)
        if weight == 0:
            raise ValueError("data is empty: it holds no batch, or no example that counts")
        self._weight = weight
        return total / weight

    def _watched(self) -> Iterator[Batch]:
        """The batches; of a stream that is read for the first time their digests are kept."""
        if self._stream is None or self._prints is not None:
            return self.batches()
        return self._group.in_step(self._recorded(self._stream))

    def _recorded(self, stream: Iterable[Any]) -> Iterator[Batch]:
        prints: list[Any] = []
        for index, item in enumerate(stream):
            batch = self._batch(item, index)
            prints.append(_digest(batch))
            if batch.weight:
                yield batch
        self._prints = prints

    def _keep_reference_targets(self) -> None:
        make: Any = self._loss_fn.reference_target  # type: ignore[attr-defined]
        if not self.module.with_data:
            raise ValueError("loss_fn compares outputs with those at the minimum: it needs data=")
        with torch.no_grad():
            targets = [
                make(self.module.model(*batch.args, **batch.kwargs)) for batch in self.batches()
            ]
        self._reference_targets = targets
        if self._batches is not None:
            self._batches = [
                Batch(b.args, b.kwargs, target, b.weight)
                for b, target in zip(self._batches, targets, strict=True)
            ]

    def _batch(self, item: Any, index: int) -> Batch:
        if isinstance(item, Mapping) and _holds_tensors(item):
            return self._dict_batch(item, index)
        # A dict or a tensor of length 2 would unpack too, into something else.
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(
                "data must hold (inputs, targets) pairs, or dicts of what the model is called "
                f"with; batch {index} is {_describe(item)}"
            )
        inputs, target = item
        inputs, target = self._to_device(inputs), self._to_device(target)
        examples = _examples(inputs)
        if examples == 0:
            raise ValueError(f"data: batch {index} is empty")
        both = isinstance(inputs, Tensor) and isinstance(target, Tensor) and target.dim() > 0
        if both and target.shape[0] != examples:
            raise ValueError(
                f"data: batch {index} has {examples} inputs but {target.shape[0]} targets"
            )
        weight = mean_weight(self._loss_fn, self.module.model, target, examples)
        if self._reference_targets is not None:
            if index >= len(self._reference_targets):
                raise ValueError("data gave more batches than when it was first read")
            target = self._reference_targets[index]
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), target, weight)
        if isinstance(inputs, (tuple, list)):
            return Batch(tuple(inputs), {}, target, weight)
        return Batch((inputs,), {}, target, weight)

    def _dict_batch(self, item: Mapping[str, Any], index: int) -> Batch:
        """A batch that is a dict goes to the model as keyword arguments, and to the loss whole."""
        if takes_classes(self._loss_fn):
            raise TypeError(
                f"data: batch {index} is a dict, so that loss_fn is called with the model's output "
                "and that dict; take fastvol.losses.model_loss for the loss that the model itself "
                "returns, a loss_fn(output, batch) of your own, or (inputs, targets) pairs"
            )
        inputs = self._to_device(item)
        examples = _examples(inputs)
        if examples == 0:
            raise ValueError(f"data: batch {index} is empty")
        weight = mean_weight(self._loss_fn, self.module.model, inputs, examples)
        target: Any = inputs
        if self._reference_targets is not None:
            target = self._reference_targets[index]
        return Batch((), inputs, target, weight)

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                raise ValueError("data holds a tensor on the meta device, which has no values")
            return value.detach().to(self._device)
        if isinstance(value, Mapping):
            return {key: self._to_device(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(self._to_device(entry) for entry in value)
        return value

    def _refuse_unordered(self, data: Any) -> None:
        if isinstance(data, DataLoader) and isinstance(
            getattr(data, "sampler", None), RandomSampler
        ):
            raise ValueError(
                "data is a DataLoader that shuffles; the loss must be over fixed data in a fixed "
                "order: build it with shuffle=False"
            )

    def _suspect(self) -> str:
        noisy = sorted(
            {
                type(m).__name__
                for m in self.module.modules()
                if m.training and "Dropout" in type(m).__name__
            }
        )
        if noisy:
            return f"{', '.join(noisy)} in training mode draws new noise at every call"
        return (
            "it must be a fixed function of them: look for dropout called in training mode, random "
            "augmentation, sampling, a shuffled loader, or state kept between calls"
        )


def as_float(value: Any) -> float:
    """A scalar loss as a Python float.

    Raises:
        TypeError, ValueError: ``value`` is not a real scalar; the message names ``loss_fn``.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"loss_fn must return a scalar, got a tensor of shape {tuple(value.shape)}; reduce "
                "it with .mean()"
            )
        if value.is_complex():
            raise TypeError("loss_fn must return a real number, got a complex one")
        if value.is_meta:
            raise ValueError("loss_fn returned a tensor on the meta device, which has no value")
        return float(value.item())
    if value is None:
        raise TypeError("loss_fn returned None; it must return the loss")
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"loss_fn must return a scalar, got {_describe(value)}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"loss_fn must return a scalar, got {_describe(value)}: {error}") from error


def _is_one_batch(data: Any) -> bool:
    # (inputs, targets) against a pair of batches: a batch is itself a pair, a target is not.
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    inputs, target = data
    if isinstance(inputs, Mapping):
        # Two dicts with the same names are two batches.
        return not isinstance(target, Mapping) or set(target) != set(inputs)
    if isinstance(inputs, Tensor):
        return True
    return isinstance(inputs, (tuple, list)) and isinstance(target, (Tensor, type(None)))


def _examples(inputs: Any) -> int:
    """The length of the first dimension of the first tensor found."""
    if isinstance(inputs, Tensor):
        return int(inputs.shape[0]) if inputs.dim() else 1
    entries: Iterable[Any] = ()
    if isinstance(inputs, Mapping):
        entries = inputs.values()
    elif isinstance(inputs, (tuple, list)):
        entries = inputs
    for entry in entries:
        if isinstance(entry, (Tensor, Mapping, tuple, list)):
            return _examples(entry)
    return 1


def rows_of(batch: Batch) -> int | None:
    """The rows of a batch, where all of its tensors have as many."""
    leaves = pytree.tree_leaves((batch.args, batch.kwargs, batch.target))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    lengths = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if len(lengths) != 1 or not all(tensor.dim() for tensor in tensors):
        return None
    return int(lengths.pop())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_bytes(entry) for entry in value.values())
    if isinstance(value, (tuple, list)):
        return sum(_bytes(entry) for entry in value)
    return 0


def _epsilon(value: Any, parameters: Mapping[str, Tensor]) -> float:
    """Relative spacing of the numbers that a loss is computed in."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.finfo(value.dtype).eps
    return torch.finfo(next(iter(parameters.values())).dtype).eps


def _check_reduction(loss_fn: Any) -> None:
    reduction = getattr(loss_fn, "reduction", "mean")
    if isinstance(loss_fn, nn.Module) and reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"loss_fn has reduction={reduction!r}; it must return the mean over the batch"
        )


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(entry, Tensor) for entry in value.values())


_CHANGED = (
    "data gave other batches, or another order, when it was read again ({}); the loss must be over "
    "fixed data: turn shuffling and random augmentation off"
)
# Entries of a tensor that its digest looks at.
_LOOKED_AT = 4096


def _digest(value: Any) -> Any:
    """Enough of a batch to notice that it, or its order, changed; it costs next to nothing."""
    if isinstance(value, Batch):
        return _digest((value.args, value.kwargs, value.target))
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.numel() == 0:
            return tuple(value.shape)
        flat = value.detach().reshape(-1)
        # An odd step does not keep to one column of the usual widths.
        step = max(1, flat.numel() // _LOOKED_AT) | 1
        some = flat[::step].contiguous().view(torch.uint8).cpu().numpy()
        return tuple(value.shape), zlib.crc32(some.tobytes())
    if isinstance(value, Mapping):
        return tuple((key, _digest(entry)) for key, entry in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_digest(entry) for entry in value)
    return repr(value) if not inspect.isroutine(value) else None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list, Mapping)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"of type {type(value).__name__}"
