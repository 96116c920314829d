"""How much of a device's memory an engine may take, and how arrays get there."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

# On a CPU larger buffers only fall out of the caches.
_CPU_ROWS, _CPU_CHUNK, _CPU_KEPT = 512 << 20, 256 << 20, 1 << 30
# Of what is free on a GPU: directions, one chunk's parameters and data, what is kept of directions.
_ROWS_SHARE, _CHUNK_SHARE, _KEPT_SHARE = 0.2, 0.25, 0.25
# What the rest of a run, and the private pool of a captured round, may need besides a measured one.
_PEAK_SHARE = 0.45


def rows_bytes(device: torch.device) -> int:
    """For directions that are kept from one evaluation to the next."""
    return _CPU_ROWS if device.type != "cuda" else int(_ROWS_SHARE * free_bytes(device))


def chunk_bytes(device: torch.device) -> int:
    """For the perturbed parameters and the data of rays that are evaluated together."""
    return _CPU_CHUNK if device.type != "cuda" else int(_CHUNK_SHARE * free_bytes(device))


def kept_bytes(device: torch.device) -> int:
    """For what is kept of the directions on all lanes for all radii."""
    return _CPU_KEPT if device.type != "cuda" else int(_KEPT_SHARE * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """What a GPU has left, the blocks that PyTorch holds without use included."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused)


class Peak:
    """The most that was allocated since it was made, against what a run may take."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._held = torch.cuda.memory_allocated(device)
            self._room = _PEAK_SHARE * free_bytes(device)
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def is_too_high(self) -> bool:
        """Never on a CPU, where nothing is measured."""
        if self._device.type != "cuda":
            return False
        return torch.cuda.max_memory_allocated(self._device) - self._held > self._room


def to_device(array: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """An array on a device, without waiting for what the device has to do before.

    The array may be reused at once where the device is not the host: it has been staged by then.
    A tensor is there already.
    """
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(array).to(device, non_blocking=True)
