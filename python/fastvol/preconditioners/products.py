"""Products of the Hessian, or of the Gauss-Newton matrix, of an objective with many vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._layout import ParameterLayout
from .._objective import PREFIX, Batch, Objective
from ..errors import FastvolError

Kind = Literal["hessian", "ggn"]
Via = Literal["auto", "curvlinops", "torch"]
# What one batch does to rows of the working dtype: [k, size] -> [k, size].
_BatchProduct = Callable[[Tensor], Tensor]

NO_GRADIENTS_NEEDED = (
    "these need no gradients: preconditioner=None, a diagonal, a matrix or an operator of your "
    "own, or an Adam optimizer that has stepped; method='splitting' needs none either"
)
# Rows that share one pass, and what they may take; more rows fall out of cache.
_ROWS = 32
_ROWS_BYTES = 4 << 20
_ACTIVATION_BYTES = 256 << 20


class Products:
    r"""rows ↦ rows · S H S, H the Hessian or Gauss-Newton matrix of the whole objective at θ*.

    Gradients are differentiated once more in reverse mode over a graph that is kept from product
    to product where there is one batch: one vector then costs about one gradient, where
    forward-over-reverse, which builds all anew, was measured to cost 2.6 times as much, and
    curvlinops, which does the same, 2.9 times (a net of 235,146 parameters on one core; in blocks
    of 32 and more vectors of a small net they differ by less than a third).

    Args:
        objective, layout: the loss, and the moved parameters.
        scale: s, float64 ``[size]`` on the CPU; 0 where a coordinate does not move.
        kind: which matrix.
        via: ``"curvlinops"`` or ``"torch"``; ``"auto"`` takes curvlinops where it is installed and
            the problem fits its interface.

    Raises:
        FastvolError: at a product: PyTorch cannot differentiate the loss twice, or the product is
            not finite.
        ValueError: ``kind`` is ``"ggn"`` and there is no data.
    """

    def __init__(
        self,
        objective: Objective,
        layout: ParameterLayout,
        scale: Tensor,
        kind: Kind,
        via: Via = "torch",
        name: str | None = None,
    ) -> None:
        if kind == "ggn" and not objective.module.with_data:
            raise ValueError(
                "preconditioner='ggn' needs data=: only a loss_fn(output, target) separates the "
                "model's outputs from the loss on them; use preconditioner='hessian'"
            )
        self.kind = kind
        # What errors call it.
        self._name = name or kind
        self.n_products = 0
        self._objective = objective
        self._layout = layout
        self._index = (scale > 0).nonzero().flatten()
        self._scale = scale[self._index]
        self.dim = len(self._index)
        self._linops = None if via == "torch" else _curvlinops(objective, layout, kind)
        if via == "curvlinops" and self._linops is None:
            raise FastvolError(
                f"preconditioner={kind!r}: curvlinops is not installed, or cannot take this model, "
                "loss_fn and data"
            )
        # One graph may be kept. Those of many batches would be as large as all data together.
        self._keeps = objective.in_memory and len(list(objective.batches())) == 1
        self._kept: _BatchProduct | None = None
        row = layout.size * torch.finfo(layout.dtype).bits // 8
        activations = max(objective.bytes_per_ray(), 1)
        self._chunk = max(1, min(_ROWS, _ROWS_BYTES // row, _ACTIVATION_BYTES // activations))

    @property
    def via(self) -> str:
        """Whose products they are."""
        return "torch.autograd" if self._linops is None else "curvlinops"

    def __call__(self, rows: Tensor) -> Tensor:
        """float64 ``[k, d]`` on the CPU, and back."""
        layout = self._layout
        given = torch.zeros((len(rows), layout.size), dtype=layout.dtype)
        given[:, self._index] = (rows * self._scale).to(layout.dtype)
        given = given.to(layout.device)
        total = torch.zeros((len(rows), self.dim), dtype=torch.float64)
        weight = 0.0
        with _quiet(), _explained(self._name):
            for batch_weight, product in self._batch_products():
                weight += batch_weight
                for start in range(0, len(rows), self._chunk):
                    part = slice(start, start + self._chunk)
                    moved = product(given[part]).detach().to("cpu", torch.float64)
                    total[part] += batch_weight * moved[:, self._index]
        self.n_products += len(rows)
        total *= self._scale / weight
        if not bool(torch.isfinite(total).all()):
            raise FastvolError(
                f"preconditioner={self._name!r}: the second derivatives of loss_fn at the model's "
                "parameters are not finite; use preconditioner='boundary', which needs none"
            )
        return total

    def _batch_products(self) -> Iterator[tuple[float, _BatchProduct]]:
        if self._linops is not None:
            yield from self._linops
            return
        make = _hessian_product if self.kind == "hessian" else _ggn_product
        for batch in self._objective.batches():
            product = self._kept or make(self._objective, self._layout, batch)
            if self._keeps:
                self._kept = product
            yield batch.weight, product


def _hessian_product(objective: Objective, layout: ParameterLayout, batch: Batch) -> _BatchProduct:
    theta = layout.flatten().requires_grad_()
    with torch.enable_grad():
        value = objective.call(layout.unflatten(theta, PREFIX), batch)
        if not value.requires_grad:
            return torch.zeros_like
        _refuse_once_differentiable(value)
        (slope,) = torch.autograd.grad(
            value.reshape(()), theta, create_graph=True, materialize_grads=True
        )
    return lambda rows: _pull([slope], [theta], [rows])[0]


def _ggn_product(objective: Objective, layout: ParameterLayout, batch: Batch) -> _BatchProduct:
    theta = layout.flatten().requires_grad_()
    model, loss_fn = objective.module.model, objective.module.loss_fn
    with torch.enable_grad():
        output = functional_call(model, layout.unflatten(theta), batch.args, batch.kwargs)
        leaves, structure = tree_flatten(output)
        moving = [i for i, leaf in enumerate(leaves) if _depends(leaf)]
        if not moving:
            return torch.zeros_like
        outputs = [leaves[i] for i in moving]
        _refuse_once_differentiable(*outputs)
        # Jᵀ u is linear in u: its own reverse mode gives J.
        weights = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        (pulled,) = torch.autograd.grad(outputs, theta, weights, create_graph=True)
        points = [output.detach().requires_grad_() for output in outputs]
        for i, point in zip(moving, points, strict=True):
            leaves[i] = point
        value = loss_fn(tree_unflatten(leaves, structure), batch.target)
        if not _depends(value):
            return torch.zeros_like
        _refuse_once_differentiable(value)
        slopes = torch.autograd.grad(
            value.reshape(()), points, create_graph=True, materialize_grads=True
        )

    def product(rows: Tensor) -> Tensor:
        tangents = _pull([pulled], weights, [rows])
        bent = _pull(slopes, points, tangents)
        return _pull(outputs, [theta], bent)[0]

    return product


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _refuse_once_differentiable(*values: Tensor) -> None:
    """Looks through the graph for backward passes that would count as constants.

    Raises:
        RuntimeError: an ``autograd.Function`` has a backward pass marked ``once_differentiable``.
    """
    seen: set[Any] = set()
    nodes: list[Any] = [value.grad_fn for value in values]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        wrapper = getattr(backward, "__code__", None) if hasattr(backward, "__wrapped__") else None
        if wrapper and wrapper.co_filename == once_differentiable.__code__.co_filename:
            raise RuntimeError(f"{type(node).__name__} is marked once_differentiable")
        nodes.extend(parent for parent, _ in node.next_functions)


def _pull(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], rows: Sequence[Tensor]
) -> list[Tensor]:
    """The pull-back of each row: ``[k, *outputs]`` to ``[k, *inputs]``."""
    count = len(rows[0])
    kept = [(output, row) for output, row in zip(outputs, rows, strict=True) if _depends(output)]

    def pulled(rows: Sequence[Tensor], batched: bool) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                [output for output, _ in kept],
                inputs,
                rows,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        )

    if not kept:
        found: list[Tensor | None] = [None] * len(inputs)
    else:
        weights = [row for _, row in kept]
        if count > 1:
            try:
                found = pulled(weights, batched=True)
            except RuntimeError:
                # An operator that vmap cannot take, or too little memory for all rows at once.
                alone = [pulled([w[i] for w in weights], batched=False) for i in range(count)]
                found = [
                    None if column[0] is None else torch.stack([c for c in column if c is not None])
                    for column in zip(*alone, strict=True)
                ]
        else:
            found = [
                None if slope is None else slope[None]
                for slope in pulled([w[0] for w in weights], batched=False)
            ]
    return [
        point.new_zeros((count, *point.shape)) if slope is None else slope
        for point, slope in zip(inputs, found, strict=True)
    ]


def _curvlinops(
    objective: Objective, layout: ParameterLayout, kind: Kind
) -> list[tuple[float, _BatchProduct]] | None:
    """The products by curvlinops, one operator a batch, or ``None`` where it cannot be used."""
    loss_fn = _known_loss(objective.module.loss_fn)
    if loss_fn is None or not objective.module.with_data:
        return None
    if not objective.in_memory or not layout.is_single_dtype:
        return None
    batches = list(objective.batches())
    for batch in batches:
        one_tensor = len(batch.args) == 1 and isinstance(batch.args[0], Tensor)
        if not one_tensor or batch.kwargs or not isinstance(batch.target, Tensor):
            return None
    try:
        with warnings.catch_warnings():
            # What its own imports are told is of no interest to the caller.
            warnings.simplefilter("ignore")
            from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError:
        return None
    make = HessianLinearOperator if kind == "hessian" else GGNLinearOperator
    model = objective.module.model
    named = dict(model.named_parameters())
    parameters = [named[segment.name] for segment in layout.segments]

    def product_of(batch: Batch) -> _BatchProduct:
        data = [(batch.args[0], batch.target)]
        # Its own check of determinism draws from the global generator.
        operator = make(model, loss_fn, parameters, data, check_deterministic=False)

        def product(rows: Tensor) -> Tensor:
            columns: Tensor = operator @ rows.T.contiguous()
            return columns.T

        return product

    try:
        products = [(batch.weight, product_of(batch)) for batch in batches]
        with _quiet():
            products[0][1](torch.zeros((1, layout.size), dtype=layout.dtype, device=layout.device))
    except Exception:
        return None
    return products


def _known_loss(loss_fn: Any) -> nn.Module | None:
    modules = {
        F.cross_entropy: nn.CrossEntropyLoss,
        F.mse_loss: nn.MSELoss,
        F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    }
    # A subclass may compute something else.
    if isinstance(loss_fn, nn.Module) and type(loss_fn) in modules.values():
        return loss_fn
    for function, module in modules.items():
        if loss_fn is function:
            known: nn.Module = module()
            return known
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Attention that can be differentiated twice, and none of PyTorch's advice to itself."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # Its forward mode, which curvlinops uses, compiles its own formulas at the first use.
        warnings.filterwarnings("ignore", message="`torch.jit.script`")
        yield


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except FastvolError:
        raise
    except Exception as error:
        raise FastvolError(
            f"preconditioner={name!r} needs second derivatives of loss_fn, which PyTorch does not "
            f"give here ({type(error).__name__}: {error}); use preconditioner='boundary', which "
            "needs only gradients"
        ) from error
