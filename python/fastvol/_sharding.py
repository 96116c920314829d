"""Modules whose parameters are sharded over processes: what this one holds, and sums over all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .errors import FastvolError, NotAvailableError

Float = npt.NDArray[np.float64]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Span:
    """Entries ``start`` to ``start + length`` of a local tensor, and where they lie in the whole.

    ``coordinate`` counts the entries of the whole parameter in row-major order.
    """

    start: int
    coordinate: int
    length: int


@dataclass(frozen=True)
class Local:
    """What this process holds of one parameter.

    Args:
        values: the entries, sharing memory with the model; writing to them does not count as a
            change of the parameter in autograd.
        rows: first row of the whole parameter's dimension 0 that is here.
        whole_rows: whether its rows are here whole.
        spans: where the entries lie in the whole parameter.
        counts: whether they enter a sum over all processes; of replicas only one does.
    """

    values: Tensor
    rows: int
    whole_rows: bool
    spans: tuple[Span, ...]
    counts: bool


class Group:
    """The processes that hold a module together; one alone by default.

    Args:
        mesh: their ``DeviceMesh``.
        device: of the module.
    """

    def __init__(self, mesh: Any = None, device: torch.device | None = None) -> None:
        self._mesh = mesh
        self._device = device

    @property
    def alone(self) -> bool:
        """Whether the module is all here."""
        return self._mesh is None

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.alone else int(self._mesh.size())

    @property
    def is_first(self) -> bool:
        """Whether this process stands at the origin of the mesh."""
        return self.alone or not any(self._mesh.get_coordinate())

    def sum(self, values: Any) -> Float:
        """The sum over all processes of a float64 array; the same bits on each."""
        own = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if self.alone:
            return own
        result: Float = self._reduced(torch.from_numpy(own.copy())).numpy()
        return result

    def _reduced(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        total = values.to(self._device)
        for dimension in range(self._mesh.ndim):
            torch.distributed.all_reduce(total, group=self._mesh.get_group(dimension))
        return total.cpu()

    def gather(self, data: bytes) -> list[bytes]:
        """What each process has, in the order of the mesh, on all of them."""
        if self.alone:
            return [data]
        coordinate, shape = self._mesh.get_coordinate(), self._mesh.shape
        own = int(np.ravel_multi_index(coordinate, shape))
        lengths = np.zeros(self.size)
        lengths[own] = len(data)
        # Each byte is another one's zero.
        ends = np.cumsum(self.sum(lengths)).astype(np.int64)
        everything = torch.zeros(int(ends[-1]), dtype=torch.uint8)
        starts = ends - np.diff(ends, prepend=0)
        if data:
            bits = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            everything[starts[own] : ends[own]] = bits
        whole = self._reduced(everything).numpy().tobytes()
        return [whole[a:b] for a, b in zip(starts, ends, strict=True)]

    def told(self, make: Callable[[], bytes]) -> bytes:
        """What the first process makes, on all of them.

        Raises:
            FastvolError: it failed; there the failure itself.
        """
        if self.alone:
            return make()
        failure, data = None, b""
        if self.is_first:
            try:
                data = b"+" + make()
            except BaseException as error:
                failure, data = error, f"-{type(error).__name__}: {error}".encode()
        data = self.gather(data)[0]
        if failure is not None:
            raise failure
        if data.startswith(b"-"):
            raise FastvolError(f"another process has failed: {data[1:].decode()}")
        return data[1:]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any of the processes."""
        return flag if self.alone else bool(self.sum(float(flag))[0] > 0)

    def in_step(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, as long as every process has one: forward passes are made together.

        Raises:
            ValueError: some processes have more items than others. FastvolError: another process
                failed to read its own.
        """
        if self.alone:
            yield from items
            return
        size = float(self.size)
        iterator = iter(items)
        while True:
            failure: BaseException | None = None
            item: Any = None
            ended = False
            try:
                item = next(iterator)
            except StopIteration:
                ended = True
            except Exception as error:
                failure = error
            n_ended, n_failed = self.sum([float(ended), float(failure is not None)])
            if failure is not None:
                raise failure
            if n_failed:
                raise FastvolError("data could not be read in another of the processes")
            if n_ended == size:
                return
            if n_ended:
                raise ValueError(
                    "data has more batches in some processes than in others; a sharded module "
                    "needs the same number in each"
                )
            yield item


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``."""
    # A DTensor can only exist where its module has been imported.
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor")


def whole_of(parameter: Tensor) -> Tensor:
    """The whole of a parameter, which all processes bring together where it is sharded."""
    if not is_sharded(parameter):
        return parameter.detach()
    sharded: Any = parameter
    return gathered(sharded.to_local().detach(), parameter, parameter.shape)


def gathered(values: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """The whole of a tensor that is divided as the sharded parameter ``like`` is.

    Args:
        values: what is here of it.
        like: a ``DTensor``.
        shape: of the whole; its dimensions are the first ones of ``like``.
    """
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    whole: Tensor = DTensor.from_local(
        values,
        sharded.device_mesh,
        sharded.placements,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    ).full_tensor()
    return whole


def reshard(model: nn.Module) -> None:
    """Lets FSDP2 put every parameter back into shards, so that the next pass gathers them anew."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            release: Any = module.reshard
            release()


def group_of(parameters: Iterable[tuple[str, Tensor]], device: torch.device) -> Group:
    """The processes over which some parameters are sharded.

    Raises:
        NotAvailableError: they are sharded over different meshes.
    """
    mesh = None
    for name, parameter in parameters:
        if not is_sharded(parameter):
            continue
        own = parameter.device_mesh  # type: ignore[attr-defined]
        if mesh is not None and own != mesh:
            raise NotAvailableError(
                f"model parameter {name!r} is sharded over {own}, others over {mesh}; this version "
                "has modules on one device mesh"
            )
        mesh = own
    return Group(mesh, device)


def local_part(name: str, parameter: Tensor, group: Group) -> Local:
    """What this process holds of a parameter.

    Raises:
        NotAvailableError: it is sharded in a way that this version does not know.
    """
    if not is_sharded(parameter):
        values = parameter.data
        span = Span(0, 0, values.numel())
        return Local(values, 0, True, (span,), group.is_first)
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = parameter
    shape = list(sharded.shape)
    starts, sizes = [0] * len(shape), list(shape)
    mesh, counts = sharded.device_mesh, True
    for dimension, placement in enumerate(sharded.placements):
        rank, count = mesh.get_coordinate()[dimension], mesh.size(dimension)
        if type(placement) is Replicate:
            counts = counts and rank == 0
        elif type(placement) is Shard:
            at = placement.dim
            step = -(-sizes[at] // count)
            first = min(rank * step, sizes[at])
            starts[at] += first
            sizes[at] = min(step, sizes[at] - first)
        else:
            raise NotAvailableError(
                f"model parameter {name!r} has the placement {placement}; this version knows "
                "Shard and Replicate"
            )
    with torch.no_grad():
        values = sharded.to_local().detach()
    if list(values.shape) != sizes:
        raise NotAvailableError(
            f"model parameter {name!r} has a shard of shape {tuple(values.shape)} where "
            f"{tuple(sizes)} was expected; this version does not know how it is divided"
        )
    rows = starts[0] if shape else 0
    whole = sizes[1:] == shape[1:]
    return Local(values, rows, whole, tuple(_spans(shape, starts, sizes)), counts)


def _spans(shape: list[int], starts: list[int], sizes: list[int]) -> Iterator[Span]:
    """The stretches of a box inside a row-major array, in the box's own row-major order."""
    if 0 in sizes:
        return
    # Dimensions from `inner` on are there whole, and so is one piece of the one before.
    inner = len(shape)
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    length = int(np.prod(sizes[inner:], dtype=np.int64))
    base = starts[inner] * strides[inner] if shape else 0
    for number, index in enumerate(np.ndindex(*sizes[:inner])):
        outer = sum((starts[i] + k) * strides[i] for i, k in enumerate(index))
        yield Span(number * length, outer + base, length)
