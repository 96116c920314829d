"""The loss as one function of the moved parameters, over fixed data."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler

from .errors import FastvolError


@dataclass(frozen=True)
class Batch:
    """What one call of the loss sees, on the model's device.

    ``args`` and ``kwargs`` go to the model (both empty for a ``loss_fn(model)``), ``target`` to the
    loss; ``weight`` is the batch's share in the mean: examples, or tokens where some are ignored.
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
_ACTIVATIONS_PER_INPUT = 4


class Objective:
    """L(θ) on a fixed set of data: the weighted mean of the batches' losses.

    Args:
        model: the (unwrapped) module.
        loss_fn: ``loss_fn(model)`` or, with data, ``loss_fn(output, target)``.
        data: ``None``, ``(inputs, targets)``, or an iterable of such batches.
        device: where the model stands; batches are moved there.

    Raises:
        TypeError, ValueError: naming ``loss_fn`` or ``data``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Any,
        device: torch.device,
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
        # What an engine has written down of the loss, by whatever that depends on.
        self.graphs: dict[Any, dict[Any, Any]] = {}
        self.epsilon = torch.finfo(torch.float32).eps
        if data is None:
            self._batches = [Batch((), {}, None, 1.0)]
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
                "data must be (inputs, targets) or an iterable of such batches, got "
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

    def batches(self) -> Iterator[Batch]:
        """The batches in order, without those in which no example counts."""
        if self._batches is not None:
            yield from (batch for batch in self._batches if batch.weight)
            return
        assert self._stream is not None
        for index, item in enumerate(self._stream):
            batch = self._batch(item, index)
            # The mean over no target at all is NaN.
            if batch.weight:
                yield batch

    def split(self, batch: Batch, rows: int) -> list[Batch]:
        """Batches of at most ``rows`` examples each that have the same weighted mean.

        That holds where the loss is a mean over examples that do not see each other. A batch whose
        parts do not all have as many rows comes back whole.
        """
        everything = (batch.args, batch.kwargs, batch.target)
        parts, spec = pytree.tree_flatten(everything)
        lengths = {p.shape[0] for p in parts if isinstance(p, Tensor) and p.dim()}
        if (
            not rows
            or len(lengths) != 1
            or any(isinstance(p, Tensor) and not p.dim() for p in parts)
        ):
            return [batch]
        (length,) = lengths
        result = []
        for first in range(0, length, rows):
            some = [p[first : first + rows] if isinstance(p, Tensor) else p for p in parts]
            args, kwargs, target = pytree.tree_unflatten(some, spec)
            examples = min(rows, length - first)
            weight = _mean_weight(self._loss_fn, target, examples)
            result.append(Batch(args, kwargs, target, weight))
        return [part for part in result if part.weight]

    def call(self, parameters: Mapping[str, Tensor], batch: Batch) -> Any:
        """What the user's loss returns for one batch; its exceptions are named after it.

        Args:
            parameters: values by name, :data:`PREFIX` included.
            batch: one of :meth:`batches`.
        """
        try:
            return functional_call(
                self.module, dict(parameters), (batch.args, batch.kwargs, batch.target)
            )
        except FastvolError:
            raise
        except Exception as error:
            raise FastvolError(
                f"loss_fn (or the model inside it) raised {type(error).__name__}: {error}"
            ) from error

    def prepare(self, parameters: Mapping[str, Tensor]) -> float:
        """Evaluates the loss at θ* twice and returns it.

        Args:
            parameters: copies of the parameters at θ*, so that nothing can write to the model's.

        Raises:
            ValueError, TypeError: the loss is not a finite scalar, or the two calls differ.
        """
        if hasattr(self._loss_fn, "reference_target"):
            self._keep_reference_targets()
        first, first_prints = self._inspect(parameters)
        second, second_prints = self._inspect(parameters)
        if first != first:
            raise ValueError("loss_fn is NaN at the model's parameters; there is no minimum here")
        if first in (float("inf"), float("-inf")):
            raise ValueError(f"loss_fn is {first} at the model's parameters")
        if first_prints != second_prints:
            raise ValueError(
                "data gave other batches, or another order, when it was read a second time; the "
                "loss must be over fixed data: turn shuffling and random augmentation off"
            )
        # Reductions on several threads may round differently; anything beyond that is noise.
        allowed = 16 * torch.finfo(torch.float32).eps * max(abs(first), abs(second))
        if abs(first - second) > allowed:
            raise ValueError(
                f"loss_fn gave {first!r} and then {second!r} for the same parameters; "
                + self._suspect()
            )
        return first

    def _inspect(self, parameters: Mapping[str, Tensor]) -> tuple[float, list[Any]]:
        prints = []
        total, weight = 0.0, 0.0
        with torch.no_grad():
            for batch in self.batches():
                value = self.call(parameters, batch)
                self.epsilon = _epsilon(value, parameters)
                total += batch.weight * as_float(value)
                weight += batch.weight
                self._largest_batch = max(self._largest_batch, _bytes((batch.args, batch.kwargs)))
                if not self.in_memory:
                    prints.append(_fingerprint((batch.args, batch.kwargs, batch.target)))
        if weight == 0:
            raise ValueError("data is empty: it holds no batch, or no example that counts")
        return total / weight, prints

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
        # A dict or a tensor of length 2 would unpack too, into something else.
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(
                f"data must hold (inputs, targets) pairs; batch {index} is {_describe(item)}"
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
        weight = _mean_weight(self._loss_fn, target, examples)
        if self._reference_targets is not None:
            if index >= len(self._reference_targets):
                raise ValueError("data gave more batches than when it was first read")
            target = self._reference_targets[index]
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), target, weight)
        if isinstance(inputs, (tuple, list)):
            return Batch(tuple(inputs), {}, target, weight)
        return Batch((inputs,), {}, target, weight)

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
    if isinstance(inputs, (Tensor, Mapping)):
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


def _mean_weight(loss_fn: Any, target: Any, examples: int) -> float:
    """What the mean that ``loss_fn`` takes over one batch divides by.

    The examples; for PyTorch's classification losses, also inside ``functools.partial``, the
    targets that are not ignored, times their class weights.
    """
    options: Mapping[str, Any] = {}
    if isinstance(loss_fn, functools.partial):
        loss_fn, options = loss_fn.func, loss_fn.keywords
    if isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        options = {"ignore_index": loss_fn.ignore_index, "weight": loss_fn.weight}
    elif loss_fn not in (F.cross_entropy, F.nll_loss):
        return float(examples)
    if not isinstance(target, Tensor) or target.is_floating_point():
        return float(examples)
    kept = target != options.get("ignore_index", -100)
    class_weight = options.get("weight")
    if class_weight is not None:
        return float(class_weight.to(target.device)[target[kept]].sum())
    return float(kept.sum())


def _check_reduction(loss_fn: Any) -> None:
    reduction = getattr(loss_fn, "reduction", "mean")
    if isinstance(loss_fn, nn.Module) and reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"loss_fn has reduction={reduction!r}; it must return the mean over the batch"
        )


def _fingerprint(value: Any) -> Any:
    """Enough of a batch to notice that it, or its order, changed."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return tuple(value.shape)
        flat = value.detach().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        # NaN marks missing data; it has to equal itself.
        finite = flat.to(torch.float64).nan_to_num(nan=1e5, posinf=1e6, neginf=-1e6)
        ramp = torch.linspace(1.0, 2.0, flat.numel(), dtype=torch.float64, device=flat.device)
        return (tuple(value.shape), float(torch.dot(finite, ramp)))
    if isinstance(value, Mapping):
        return tuple((key, _fingerprint(entry)) for key, entry in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_fingerprint(entry) for entry in value)
    return repr(value) if not inspect.isroutine(value) else None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list, Mapping)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"of type {type(value).__name__}"
