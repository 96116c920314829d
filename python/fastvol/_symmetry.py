"""How many copies of a basin a network's discrete symmetries make in parameter space.

The model is traced into one chain of layers and walked once. Between two layers with weight
matrices lie the *units* that the first makes and the second reads; what is learnt about them on
the way says which permutations and sign flips leave the function as it was.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._layout import ParameterLayout, ParameterSelector
from ._state import preserved, unwrap
from .errors import FastvolError, warn

# f(2p − z) = 2q − f(z) for all z.
Point = tuple[float, float]
_ORIGIN: Point = (0.0, 0.0)


@dataclass(frozen=True)
class UnitSymmetry:
    """What the units between two layers contribute.

    Args:
        name: of the layer that makes them; ``"input"`` for the network's inputs.
        units: how many can be told apart: neurons, or channels.
        log_permutations: nats; what a run of grouped layers shares stands at the first of its
            units.
        log_sign_flips: nats.
        held: why they are not permuted; empty where they are.
    """

    name: str
    units: int
    log_permutations: float
    log_sign_flips: float
    held: str = ""


class SymmetryLogCount(float):
    """The natural log of a number of copies: a float that also says where it comes from.

    Attributes:
        units: one :class:`UnitSymmetry` for each place between two layers, in order.
    """

    units: tuple[UnitSymmetry, ...]

    def __new__(cls, units: Iterable[UnitSymmetry]) -> SymmetryLogCount:
        units = tuple(units)
        self = super().__new__(cls, math.fsum(u.log_permutations + u.log_sign_flips for u in units))
        self.units = units
        return self

    def __getnewargs__(self) -> tuple[Any]:
        return (self.units,)

    @property
    def log_permutations(self) -> float:
        """The part that permutations of units make, nats."""
        return math.fsum(unit.log_permutations for unit in self.units)

    @property
    def log_sign_flips(self) -> float:
        """The part that sign flips make, nats."""
        return math.fsum(unit.log_sign_flips for unit in self.units)


def symmetry_log_count(
    model: nn.Module, *, parameters: ParameterSelector = None
) -> SymmetryLogCount:
    r"""Log number (nats) of the copies of a basin that the network's discrete symmetries make.

    Exchanging two hidden units, with their incoming and outgoing weights, leaves the function as
    it was; so does flipping the sign of all weights into and out of a unit whose activation is odd.
    Hidden layers of n_1, n_2, … units make

    .. math:: \log N = \sum_l \log n_l! \;[\, + \, n_l \log 2 \text{ where activations are odd}]

    copies of every basin of a loss that depends on the outputs alone (Hecht-Nielsen 1990, "On the
    algebraic structure of feedforward network weight spaces"; Chen, Lu & Hecht-Nielsen 1993, "On
    the geometry of feedforward neural network error surfaces", for tanh: 2^n n!). The log volume of
    all copies is log V plus this number, provided that their star basins do not overlap.

    What is counted is exactly true of the parameters, with buffers as they are, in eval mode:

    - permutations of neurons and channels (a channel that is flattened moves as a block). Grouped
      convolutions and GroupNorm leave those that map groups onto groups: within each group, and
      of groups as wholes.
    - sign flips through odd activations (Tanh, Softsign, Tanhshrink, Softshrink, Hardshrink,
      Hardtanh about 0), and through those odd about another point, f(2p − z) = 2q − f(z): Sigmoid,
      Hardsigmoid, any Hardtanh, ReLU6. There the biases before and after take up p and q, and have
      to move; a zero-padded layer cannot take up q ≠ 0. Average pooling commutes with flips, max
      pooling does not.
    - the sign of what stands before a norm and of the norm's own weight, whatever the activation:
      one a unit for BatchNorm, InstanceNorm and RMSNorm, one a group for GroupNorm and LayerNorm.
      An odd activation after the norm has its own flips besides: 4^n in all for BatchNorm and tanh.

    Each is an affine map of the parameters with determinant ±1, so that every copy of a star basin
    is a star basin of equal volume. Plain permutations and flips are orthogonal too: under a cap
    or an isotropic normal law, about each copy's own minimum or the origin, copies weigh the same.
    Those in which a bias, or a BatchNorm that has running statistics, makes up for a constant are
    not: under these measures their copies differ.

    Not counted: continuous symmetries, such as the rescaling of ReLU, LeakyReLU or PReLU units and
    of weights before a norm (they are part of the basin's own shape), and maps that change volume
    (the flip of a PReLU unit, which inverts its slope). Where copies coincide (two identical units,
    or a dead one), the number is an upper bound on distinct copies. Between two layers with
    nothing but linear operations any invertible mixing of units is a symmetry (with GroupNorm,
    LayerNorm or RMSNorm alone, any rotation that it allows); the permutations and flips are counted
    then, as a lower bound, with a :class:`FastvolWarning`.

    A symmetry that would have to change a tensor that does not move is not counted: units beside a
    frozen layer are not permuted, unless what is frozen is the same for all of them (biases that
    are all zero, say), and not flipped, unless it is zero. Other frozen values are taken to be all
    different, up to sign.

    Args:
        model: a stack of Linear, Conv and ConvTranspose layers, with activations, norms, pooling,
            padding, Dropout, Flatten and reshapes, as modules or as functions in ``forward``. It is
            read with ``torch.fx``, and is as it was afterwards. Linear layers are taken to see
            ``[examples, features]``. Any operation may come before the first parameter and after
            the last. ``torch.compile`` and DDP wrappers are looked through.
        parameters: which parameters move, as in :func:`fastvol.estimate`.

    Returns:
        A float, whose ``units`` say what each layer contributes.

    Raises:
        TypeError: ``model`` is not a module.
        FastvolError: ``model`` is not such a stack (residual connections, shared layers, attention,
            recurrence, layers not known here); the message names the place.
        ValueError: as :func:`fastvol.estimate` for ``parameters``.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> round(symmetry_log_count(mlp), 1)  # log 256!
        1167.3
    """
    model = unwrap(model)
    layout = ParameterLayout(model, parameters)
    named = dict(model.named_parameters())
    moving = {id(named[segment.name]) for segment in layout.segments}
    with torch.no_grad():
        walk = _Walk(moving)
        for step in _chain(model):
            walk.take(step)
        walk.finish()
    if walk.linear:
        warn(
            "symmetry_log_count: no nonlinearity acts on single units between "
            f"{' and '.join(map(repr, walk.linear[0]))}, so that they mix continuously without a "
            "change of the function; their permutations and sign flips are counted, as a lower "
            "bound"
            + (f" (and at {len(walk.linear) - 1} more places)" if len(walk.linear) > 1 else ""),
        )
    return SymmetryLogCount(walk.result())


# What the tables say of an activation: its point of symmetry, None where it has none.
_POINTS: dict[str, Point | None] = {
    "tanh": _ORIGIN,
    "softsign": _ORIGIN,
    "tanhshrink": _ORIGIN,
    "softshrink": _ORIGIN,
    "hardshrink": _ORIGIN,
    "sigmoid": (0.0, 0.5),
    "hardsigmoid": (0.0, 0.5),
    "relu6": (3.0, 3.0),
    **dict.fromkeys(
        (
            "relu", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
            "hardswish", "softplus", "logsigmoid", "threshold", "softmax", "log_softmax", "softmin",
        )
    ),
}  # fmt: skip
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Softsign: "softsign",
    nn.Tanhshrink: "tanhshrink",
    nn.Softshrink: "softshrink",
    nn.Hardshrink: "hardshrink",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.ReLU6: "relu6",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.RReLU: "rrelu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Softplus: "softplus",
    nn.LogSigmoid: "logsigmoid",
    nn.Threshold: "threshold",
    nn.Softmax: "softmax",
    nn.Softmax2d: "softmax",
    nn.LogSoftmax: "log_softmax",
    nn.Softmin: "softmin",
}
_IDENTITIES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
# Average with weights that add up to one wherever they stand.
_AVERAGES = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_CONSTANT_PADS = (
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _functions() -> dict[Any, str]:
    """Functions, and names of methods, by what the walk calls them."""
    known: dict[Any, str] = {}

    def add(name: str, *spellings: str) -> None:
        for spelling in spellings:
            known[spelling] = name
            for module in (torch, F):
                function = getattr(module, spelling, None)
                if callable(function):
                    known[function] = name

    for name in (*_POINTS, "hardtanh"):
        add(name, name, name + "_")
    for k in "123":
        add("max_pool", f"max_pool{k}d", f"adaptive_max_pool{k}d")
        add("avg_pool", f"avg_pool{k}d")
        add("average", f"adaptive_avg_pool{k}d")
    add("average", "interpolate")
    dropouts = ("dropout", "dropout1d", "dropout2d", "dropout3d")
    add("dropout", *dropouts, "alpha_dropout", "feature_alpha_dropout")
    add("identity", "contiguous", "clone")
    add("reshape", "view", "reshape")
    for name in ("pad", "flatten", "unflatten", "squeeze", "mean", "amax"):
        add(name, name)
    return known


_FUNCTIONS = _functions()


@dataclass(frozen=True)
class _Step:
    """One operation of the chain: a module, or a function or method on the current tensor."""

    name: str
    where: str
    module: nn.Module | None = None
    node: fx.Node | None = None

    def refuse(self, why: str) -> NoReturn:
        raise FastvolError(
            f"model: {self.where} {why}; symmetry_log_count reads a stack of Linear, Conv and "
            "ConvTranspose layers with activations, norms, pooling and Flatten between them: pass "
            "the part of the model that is one"
        )

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the function, counted from the tensor that it acts on."""
        assert self.node is not None
        given = self.node.args[position : position + 1] or [self.node.kwargs.get(name, default)]
        if isinstance(given[0], fx.Node):
            self.refuse(f"takes a {name} that is computed in forward")
        return given[0]


class _Tracer(fx.Tracer):
    """Looks into modules that the user wrote, and takes PyTorch's own as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        base = _torch_class(m)
        return base is not None and base not in _CONTAINERS


def _torch_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of PyTorch whose forward the module runs."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.") and issubclass(cls, nn.Module):
            same = type(module).forward is cls.forward and "forward" not in vars(module)
            return cls if same else None
    return None


def _chain(model: nn.Module) -> Iterator[_Step]:
    """The operations from the first with parameters to the last, each on the one before."""
    root, nodes = _trace(model)
    owners = [i for i, node in enumerate(nodes) if _parameters(root, node)]
    if not owners:
        raise FastvolError(
            "model: its forward uses none of its parameters; symmetry_log_count needs a stack of "
            "layers"
        )
    seen: dict[int, str] = {}
    shapes: set[fx.Node] = set()
    behind: set[fx.Node] = set()
    current: fx.Node | None = None
    for index, node in enumerate(nodes):
        if _is_shape(node, shapes):
            shapes.add(node)
            continue
        if index < owners[0]:
            continue
        step = _step(root, node)
        parameters = _parameters(root, node)
        for parameter in parameters:
            if id(parameter) in seen:
                step.refuse(f"uses a parameter that {seen[id(parameter)]} uses too")
            seen[id(parameter)] = step.where
        inputs = [source for source in node.all_input_nodes if source not in shapes]
        if behind.intersection(inputs):
            step.refuse("takes the output of an earlier operation, past those between")
        if index > owners[-1]:
            continue
        if node.op == "get_attr":
            if parameters:
                step.refuse("is a parameter that is used outside any layer known here")
            continue
        if len(inputs) != 1 or current not in (None, inputs[0]):
            step.refuse("takes something else than the output of the operation before it")
        if current is not None:
            behind.add(current)
        current = node
        yield step


def _trace(model: nn.Module) -> tuple[nn.Module, list[fx.Node]]:
    """The operations of the forward, and the module that they name their modules from."""
    if isinstance(model, torch.jit.ScriptModule):
        raise FastvolError(
            "model is a TorchScript module, which torch.fx cannot read; pass the module that it "
            "was made from"
        )
    if model._forward_hooks or model._forward_pre_hooks:
        raise FastvolError(
            "model has forward hooks, which may change what passes through; remove them"
        )
    with preserved(model), _attributes_kept(model):
        try:
            # A root's own forward is traced, so one of PyTorch's modules needs a root around it.
            tracer = _Tracer()
            root = nn.Sequential(model) if tracer.is_leaf_module(model, "") else model
            # Arguments that have a default are not what the network is a function of.
            defaults = {
                name: argument.default
                for name, argument in inspect.signature(root.forward).parameters.items()
                if argument.default is not inspect.Parameter.empty
            }
            return root, list(tracer.trace(root, concrete_args=defaults or None).nodes)
        except Exception as error:
            raise FastvolError(
                f"model: torch.fx cannot trace the forward of {type(model).__name__} "
                f"({type(error).__name__}: {error}); pass a part of it, or an nn.Sequential of its "
                "layers"
            ) from error


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    # A forward that keeps an activation on self would leave a proxy there.
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    lists = [(v, list(v)) for _, kept in before for v in kept.values() if isinstance(v, list)]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
        for values, kept_values in lists:
            values[:] = kept_values


def _parameters(root: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(root.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(root.get_submodule(owner), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _is_shape(node: fx.Node, shapes: set[fx.Node]) -> bool:
    """Whether the node is about a tensor's shape, type or place."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    inputs = node.all_input_nodes
    return bool(inputs) and shapes.issuperset(inputs)


def _step(root: nn.Module, node: fx.Node) -> _Step:
    if node.op == "call_module":
        name = str(node.target)
        module = root.get_submodule(name)
        step = _Step(name, f"{name!r} ({type(module).__name__})", module=module)
        if module._forward_hooks or module._forward_pre_hooks:
            step.refuse("has forward hooks, which may change what passes through")
        return step
    if node.op == "get_attr":
        return _Step(str(node.target), f"{str(node.target)!r}", node=node)
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _Step(node.name, f"the operation {target!r} in forward ({node.name!r})", node=node)


@dataclass
class _Joint:
    """Sign flips between two tensors of weights: the first turns z into shift − z.

    Args:
        count: flips that are independent of each other.
        shift: None where the offsets of the first can make it anything.
        offsets: how many of those there are.
    """

    count: int
    shift: float | None
    offsets: int


@dataclass
class _Units:
    """The units between two layers, as far as the walk has come.

    Args:
        name: of the layer that makes them.
        width: how many there are; 0 where the network's inputs are not known yet.
        form: of the tensor: ``"vector"`` [examples, units], ``"maps"`` [examples, units,
            positions…], ``"flat"`` [examples, units · positions], ``"input"`` where not known.
        rank: axes of positions of ``"maps"``.
        held: why they cannot be permuted.
        joint: the flips that are still open.
    """

    name: str
    width: int
    form: str
    rank: int = 0
    held: str = ""
    joint: _Joint | None = None
    weight_moves: bool = False
    bias_moves: bool = False
    # Outputs of the layer itself, before any reshape.
    made: int = 0
    # Nothing but the layer's own affine map so far.
    direct: bool = True
    # No nonlinearity that acts on one unit at a time so far.
    linear: bool = True
    # Whether a norm took their mean away.
    centred: bool = False
    flips: int = 0
    # Into how many groups norms divide the units.
    divisions: list[int] = field(default_factory=list)

    def hold(self, why: str) -> None:
        self.held = self.held or why

    def reflect(self, point: Point | None) -> None:
        """Every z passes f(2p − z) = 2q − f(z); None where f has no such point."""
        if self.joint is None:
            return
        if point is None or self.joint.shift not in (None, 2 * point[0]):
            self.joint = None
        else:
            self.joint.shift = 2 * point[1]

    def activate(self, point: Point | None) -> None:
        self.linear = self.direct = False
        self.reflect(point)

    def mix_positions(self) -> None:
        self.direct = False
        self.limit(self.width)

    def limit(self, count: int) -> None:
        if self.joint is not None:
            self.joint.count = min(self.joint.count, count)

    def close(self) -> None:
        """The second tensor of weights takes the flips up."""
        if self.joint is not None:
            self.flips += self.joint.count
            self.joint = None

    def open(self, count: int, weight_moves: bool, bias: Tensor | None, bias_moves: bool) -> None:
        """A first tensor of weights."""
        self.joint = None
        if weight_moves and (bias is None or bias_moves or _is_zero(bias)):
            self.joint = _Joint(count, None if bias_moves else 0.0, count)


class _Walk:
    """Takes the chain's steps in order."""

    def __init__(self, moving: set[int]) -> None:
        self._moving = moving
        self._done: list[_Units] = []
        # Groups of the layer after each of the units.
        self._groups: list[int] = []
        self._units = _Units("input", 0, "input", held="inputs")
        self.linear: list[tuple[str, str]] = []

    def take(self, step: _Step) -> None:
        if step.module is not None:
            self._module(step, step.module)
        else:
            self._function(step)

    def finish(self) -> None:
        self._units.hold("outputs")
        self._done.append(self._units)

    def result(self) -> Iterator[UnitSymmetry]:
        log_permutations = _log_permutations(self._done, self._groups)
        for units, log_count in zip(self._done, log_permutations, strict=True):
            # Inputs and outputs are of interest only where a norm beside them has signs.
            if units.flips or units.held not in ("inputs", "outputs"):
                yield UnitSymmetry(
                    units.name, units.width, log_count, units.flips * math.log(2), units.held
                )

    def _moves(self, parameter: Tensor | None) -> bool:
        return parameter is not None and id(parameter) in self._moving

    def _module(self, step: _Step, module: Any) -> None:
        base = _torch_class(module)
        # Parametrizations, pruning and weight norm keep their parameters under other names.
        if any(name not in ("weight", "bias") for name, _ in module.named_parameters()):
            base = None
        units = self._units
        if base in _ACTIVATIONS:
            units.activate(_POINTS[_ACTIVATIONS[base]])
        elif base is nn.Hardtanh:
            units.activate(_middle(module.min_val, module.max_val))
        elif base in _IDENTITIES:
            pass
        elif base is nn.Linear:
            self._layer(step, module, module.in_features, module.out_features)
        elif base in (*_CONVOLUTIONS, *_TRANSPOSED):
            self._layer(step, module, module.in_channels, module.out_channels)
        elif base in (*_BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm):
            self._norm(step, module, base)
        elif base is nn.PReLU:
            self._prelu(step, module)
        elif base in _MAX_POOLS:
            if getattr(module, "return_indices", False):
                step.refuse("returns indices")
            self._maps(step)
            units.activate(None)
        elif base in _AVERAGE_POOLS:
            divisor = getattr(module, "divisor_override", None)
            self._average_pool(step, module.padding, module.count_include_pad, divisor)
        elif base in _AVERAGES:
            self._average(step)
        elif base in _CONSTANT_PADS:
            self._maps(step)
            self._pad(module.value)
        elif base is nn.Flatten:
            self._flatten(step, module.start_dim, module.end_dim)
        elif base is nn.Unflatten:
            self._unflatten(step, module.dim, module.unflattened_size)
        else:
            step.refuse("has symmetries that are not known here")

    def _function(self, step: _Step) -> None:
        assert step.node is not None
        name = _FUNCTIONS.get(step.node.target, "") if step.node.op != "get_attr" else ""
        units = self._units
        if name in _POINTS:
            units.activate(_POINTS[name])
        elif name == "hardtanh":
            low, high = step.argument(1, "min_val", -1.0), step.argument(2, "max_val", 1.0)
            units.activate(_middle(low, high))
        elif name == "dropout":
            if step.argument(2, "training", step.node.kwargs.get("train", True)):
                step.refuse("is random in eval mode too (pass training=self.training)")
        elif name == "max_pool":
            self._maps(step)
            units.activate(None)
        elif name == "avg_pool":
            self._average_pool(
                step,
                step.argument(3, "padding", 0),
                step.argument(5, "count_include_pad", True),
                step.argument(6, "divisor_override"),
            )
        elif name == "average":
            self._average(step)
        elif name == "pad":
            if len(step.argument(1, "pad")) > 2 * self._maps(step):
                step.refuse("pads the units")
            if step.argument(2, "mode", "constant") == "constant":
                self._pad(step.argument(3, "value") or 0.0)
            else:
                units.mix_positions()
        elif name == "flatten":
            self._flatten(step, step.argument(1, "start_dim", 0), step.argument(2, "end_dim", -1))
        elif name == "unflatten":
            self._unflatten(step, step.argument(1, "dim"), step.argument(2, "sizes"))
        elif name == "reshape":
            self._reshape(step)
        elif name in ("squeeze", "mean", "amax"):
            self._reduce(step, name)
        elif name != "identity":
            step.refuse("has symmetries that are not known here")

    def _layer(self, step: _Step, module: Any, n_in: int, n_out: int) -> None:
        """A layer with a matrix of weights: the end of some units and the beginning of others."""
        units = self._units
        linear = isinstance(module, nn.Linear)
        weight, bias = module.weight, module.bias
        weight_moves, bias_moves = self._moves(weight), self._moves(bias)
        self._expect(step, n_in, "vector" if linear else "maps")

        if not (weight_moves or units.held or _is_uniform(_by_input(module), units.width)):
            units.hold(f"{step.where} is frozen")
        transposed = isinstance(module, _TRANSPOSED)
        padded = not linear and (transposed or _pads_with_zeros(module))
        if padded:
            units.reflect(_ORIGIN)
        units.limit(n_in)
        shift = units.joint.shift if units.joint is not None else None
        if weight_moves and (shift in (None, 0.0) or bias_moves):
            units.close()
        units.joint = None

        groups = 1 if linear else module.groups
        if units.linear and units.weight_moves and weight_moves:
            before = self._groups[-1] if self._groups else 1
            # A norm that takes the mean away leaves two units only their sign.
            if units.width // max(before, groups, *units.divisions, 1) > 1 + units.centred:
                self.linear.append((units.name, step.name))
        self._done.append(units)
        self._groups.append(groups)

        rank = 0 if linear else module.weight.dim() - 2
        self._units = new = _Units(
            step.name,
            n_out,
            "vector" if linear else "maps",
            rank,
            weight_moves=weight_moves,
            bias_moves=bias_moves,
            made=n_out,
        )
        if not weight_moves:
            new.hold(f"{step.where} is frozen")
        if bias is not None and not bias_moves and not _is_uniform(bias, n_out):
            new.hold(f"the bias of {step.where} is frozen")
        new.open(n_out, weight_moves, bias, bias_moves)

    def _norm(self, step: _Step, module: Any, base: type[nn.Module]) -> None:
        """Standardises z, then multiplies it by gamma and adds beta."""
        units = self._units
        size, division = self._norm_shape(step, module, base)
        gamma, beta = getattr(module, "weight", None), getattr(module, "bias", None)
        gamma_moves, beta_moves = self._moves(gamma), self._moves(beta)
        mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
        frozen = [t for t in (gamma, beta) if t is not None and not self._moves(t)]
        # z turns into slope · z + offset where gamma does not move.
        dead_slope, offset, off_centre = False, beta, False
        if mean is None or variance is None:
            # The statistics move with the units, as long as these keep their groups.
            units.divisions.append(division)
            units.centred |= not isinstance(module, nn.RMSNorm)
            if isinstance(module, nn.RMSNorm):
                units.reflect(_ORIGIN)
            elif units.joint is not None:
                units.limit(division)
                # A shift that all have in common goes with the mean.
                units.joint.shift = 0.0
        else:
            frozen += [mean, variance]
            slope = (1.0 if gamma is None else gamma) / torch.sqrt(variance + module.eps)
            offset = -slope * mean if beta is None else beta - slope * mean
            dead_slope, off_centre = bool((slope == 0).any()), not _is_zero(mean)
            # Statistics that differ between units are made up for by gamma and beta, or by the
            # layer before, whose affine map this one only continues.
            absorbed = units.direct and units.made == size
            absorbed &= not (gamma_moves or dead_slope) and (units.bias_moves or beta_moves)
            if (gamma_moves and beta_moves) or absorbed:
                frozen = []
        if not (units.held or all(_is_uniform(tensor, units.width) for tensor in frozen)):
            units.hold(f"{step.where} has fixed values that differ between units")
        units.direct = False

        units.limit(size)
        joint = units.joint
        # Whether there is an offset of its own for each of the norm's units.
        adjustable = joint is not None and joint.shift is None and joint.offsets == size
        centred = joint is not None and joint.shift in (None, 0.0)
        if gamma_moves:
            # z and gamma change sign together; an offset makes up for twice the mean.
            if beta_moves or adjustable or (centred and not off_centre):
                units.close()
            units.open(size, True, beta, beta_moves)
        elif joint is not None and beta_moves:
            joint.shift, joint.offsets = None, size
        elif joint is not None and not (adjustable and not dead_slope):
            if centred and (offset is None or _is_zero(offset)):
                joint.shift = 0.0
            else:
                units.joint = None

    def _norm_shape(self, step: _Step, module: Any, base: type[nn.Module]) -> tuple[int, int]:
        """How many weights the norm has, and into how many groups it divides the units."""
        units = self._units
        if base in (nn.LayerNorm, nn.RMSNorm):
            shape = tuple(module.normalized_shape)
            if units.form == "input":
                units.width = units.width or shape[0]
            elif len(shape) != 1 + units.rank or (units.form == "maps" and shape[0] != units.width):
                step.refuse(
                    f"normalises over {list(shape)}, which is not all of the "
                    f"{units.width} units of {units.name!r} and their positions"
                )
            if len(shape) > 1:
                units.linear = False
            size = math.prod(shape)
            self._expect(step, size, "any" if units.form in ("input", "maps") else "vector")
            return size, 1
        size = module.num_channels if base is nn.GroupNorm else module.num_features
        if base in _INSTANCE_NORMS and units.form != "input":
            self._maps(step)
        self._expect(step, size, units.form)
        return size, module.num_groups if base is nn.GroupNorm else size

    def _prelu(self, step: _Step, module: nn.PReLU) -> None:
        units = self._units
        if module.num_parameters > 1:
            self._expect(step, module.num_parameters, units.form)
            weight = module.weight
            if not (self._moves(weight) or units.held or _is_uniform(weight, units.width)):
                units.hold(f"{step.where} is frozen")
        units.activate(None)

    def _expect(self, step: _Step, size: int, form: str) -> None:
        """Checks that ``size`` inputs are the units, or blocks of equal size, one for each."""
        units = self._units
        if units.form == "input":
            units.width = units.width or size
            return
        blocks = form == "any" or units.form == "flat"
        fits = size % units.width == 0 if blocks else size == units.width
        right = form in ("any", units.form) or (form == "vector" and units.form == "flat")
        if not (fits and right):
            shape = {"vector": "", "maps": " with positions", "flat": ", flattened"}[units.form]
            step.refuse(
                f"takes {size} inputs, which are not the {units.width} units of {units.name!r}"
                f"{shape} (Flatten or a view may be missing before it)"
            )

    def _maps(self, step: _Step) -> int:
        """Checks that the tensor has positions; how many axes of them."""
        if self._units.form == "input":
            return 3
        if self._units.form != "maps":
            step.refuse(f"acts on the units of {self._units.name!r}, not on their positions")
        return self._units.rank

    def _average_pool(self, step: _Step, padding: Any, counted: bool, divisor: Any) -> None:
        self._average(step)
        if divisor is not None or (counted and _any_padding(padding)):
            self._units.reflect(_ORIGIN)

    def _average(self, step: _Step) -> None:
        self._maps(step)
        self._units.mix_positions()

    def _pad(self, value: float) -> None:
        self._units.mix_positions()
        self._units.reflect((value, value))

    def _flatten(self, step: _Step, start: int, end: int) -> None:
        units = self._units
        if units.form == "input":
            return
        axes = 2 + units.rank
        first, last = start % axes, end % axes
        if units.form == "maps" and (first, last) == (1, axes - 1):
            units.form, units.rank = "flat", 0
        elif units.form == "maps" and first > 1:
            units.rank -= max(last - first, 0)
        elif first != 1 or units.form == "maps":
            step.refuse(f"flattens more than the units and their positions (start_dim={start})")

    def _unflatten(self, step: _Step, dim: Any, sizes: Any) -> None:
        if dim not in (1, -1) or self._units.form == "maps":
            step.refuse("unflattens an axis that is not the units")
        # Unflatten takes names too, as pairs.
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        self._reshape_to(step, [s[1] if isinstance(s, tuple) else s for s in sizes])

    def _reshape(self, step: _Step) -> None:
        assert step.node is not None
        sizes: Any = step.node.args[1:] or step.node.kwargs.get("shape", ())
        if sizes and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        if not sizes or not _is_batch(sizes[0]):
            step.refuse("reshapes to something whose first axis is not the examples")
        self._reshape_to(step, list(sizes[1:]))

    def _reshape_to(self, step: _Step, sizes: Sequence[Any]) -> None:
        """Reshapes to [examples, *sizes]."""
        units = self._units
        if units.form == "input":
            return
        size = sizes[0] if sizes else None
        if len(sizes) == 1:
            blocks = isinstance(size, int) and size % units.width == 0
            fits = size == units.width if units.form == "vector" else blocks
            if isinstance(size, int) and size != -1 and not fits:
                step.refuse(f"reshapes the {units.width} units of {units.name!r} to {size}")
            if units.form == "maps":
                units.form, units.rank = "flat", 0
            return
        if not isinstance(size, int) or size < 1:
            step.refuse("reshapes to a number of channels that is not written as a number")
        # Neurons become the positions of fewer channels.
        fits = units.width % size == 0 if units.form == "vector" else units.width == size
        if not fits:
            step.refuse(f"reshapes the {units.width} units of {units.name!r} to {size} channels")
        units.width, units.form, units.rank = size, "maps", len(sizes) - 1

    def _reduce(self, step: _Step, name: str) -> None:
        """``mean``, ``amax`` or ``squeeze`` over axes of positions."""
        rank = self._maps(step)
        units = self._units
        if units.form == "input":
            return
        dims = step.argument(1, "dim") or ()
        dims = (dims,) if isinstance(dims, int) else dims
        if not dims or not all(isinstance(dim, int) for dim in dims):
            step.refuse("reduces axes that are not written as numbers")
        axes = {dim % (rank + 2) for dim in dims}
        if axes & {0, 1}:
            step.refuse("reduces the examples or the units")
        if name == "mean":
            units.mix_positions()
        elif name == "amax":
            units.activate(None)
        if name == "squeeze" or not step.argument(2, "keepdim", False):
            units.rank -= len(axes)
            if units.rank == 0:
                units.form = "vector"


def _log_permutations(units: Sequence[_Units], groups: Sequence[int]) -> list[float]:
    """Log number of permutations, nats, at each of the units.

    A layer of g groups ties blocks of the units before it to blocks of those after it, and a norm
    of g groups ties units within themselves. Blocks that lie within larger blocks are permuted
    within them.
    """
    log_counts = [0.0] * len(units)
    divisions = []
    for unit in units:
        width = max(unit.width, 1)
        for division in unit.divisions:
            if width % division and division % width:
                raise FastvolError(
                    f"model: a norm divides the units of {unit.name!r} into {division} groups "
                    f"across its {width} units; symmetry_log_count needs groups of whole units"
                )
        divisions.append({min(division, width) for division in unit.divisions})

    def count(first: int, last: int, block: int, copies: int) -> None:
        """Units first … last within one of ``block`` blocks; ``copies`` such blocks are alike."""
        begin = first
        for end in range(first, last + 1):
            # A layer of no more groups than this is dense within the block.
            if end == last or groups[end] <= block:
                piece(begin, end, block, copies)
                begin = end + 1

    def piece(first: int, last: int, block: int, copies: int) -> None:
        free = not any(unit.held for unit in units[first : last + 1])
        finer = set(groups[first:last]).union(*divisions[first : last + 1])
        finer = {g for g in finer if g > block}
        if not finer:
            if free:
                log_counts[first] += copies * math.lgamma(units[first].width // block + 1)
            return
        smallest = min(finer)
        if smallest % block or any(g % smallest for g in finer):
            raise FastvolError(
                f"model: the layers and norms from {units[first].name!r} on have groups that do "
                f"not lie within each other ({sorted(finer | {block})}); symmetry_log_count needs "
                "each number of groups to divide the next larger"
            )
        if free:
            log_counts[first] += copies * math.lgamma(smallest // block + 1)
        count(first, last, smallest, copies * (smallest // block))

    count(0, len(units) - 1, 1, 1)
    return log_counts


def _middle(low: float, high: float) -> Point:
    middle = 0.5 * (low + high)
    return middle, middle


def _is_zero(tensor: Tensor) -> bool:
    return bool((tensor == 0).all())


def _is_uniform(tensor: Tensor, width: int) -> bool:
    """Whether ``width`` equal blocks of the first axis hold the same values."""
    if tensor.numel() <= 1:
        return True
    rows = tensor.reshape(width, -1)
    return bool((rows == rows[:1]).all())


def _by_input(module: Any) -> Tensor:
    """The weights with what each of the layer's inputs has in a block of the first axis."""
    weight: Tensor = module.weight
    # Blocks of a grouped convolution come out in another order, which does not matter here.
    return weight if isinstance(module, _TRANSPOSED) else weight.transpose(0, 1)


def _any_padding(padding: Any) -> bool:
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _pads_with_zeros(module: Any) -> bool:
    if module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return bool(module.padding == "same" and any(k > 1 for k in module.kernel_size))
    return _any_padding(module.padding)


def _is_batch(size: Any) -> bool:
    """Whether the first size of a reshape is the examples: a number, or size(0) of a tensor."""
    if isinstance(size, int):
        return True
    if not isinstance(size, fx.Node):
        return False
    index: Any = size.args[1] if len(size.args) > 1 else size.kwargs.get("dim")
    return size.target in ("size", operator.getitem) and isinstance(index, int) and index == 0
