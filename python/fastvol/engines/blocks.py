"""How many directions make a block: what is kept, shared and, by a kill, lost at once."""

from __future__ import annotations

import math

import torch

_USUAL = 1024
# On a GPU many lanes run dry at the end of a block.
_USUAL_ON_DEVICE = 8192
# Longer than that nobody wants to lose; shorter, and keeping it costs more than 1 %. Seconds.
_LONGEST, _SHORTEST = 30.0, 0.15
# Where some processes share a run each is to have so many, so that the last ones end together.
_EACH = 8
# Times the usual size, at the most.
_GROWTH = 4


def usual_block(device: torch.device) -> int:
    """Directions of a block where nothing is known of their price."""
    return _USUAL if device.type == "cpu" else _USUAL_ON_DEVICE


def fitting_block(
    device: torch.device, seconds: float, *, least: int, rays: int, shares: int
) -> int:
    """The usual size, but for directions so dear, or so cheap, that another one is better.

    Args:
        device: where they are settled.
        seconds: of a direction.
        least: a block of fewer wastes lanes.
        rays: of the run.
        shares: processes, or devices, that take blocks.

    Returns:
        A power of two.
    """
    block = usual_block(device)
    least = min(max(least, 1), block)
    seconds = max(seconds, 1e-9)
    most = _LONGEST / seconds
    if shares > 1:
        most = min(most, max(rays / (_EACH * shares), 4 * _SHORTEST / seconds))
    if block > most:
        return 1 << max(math.ceil(math.log2(least)), math.floor(math.log2(max(most, 1.0))))
    while block * seconds < _SHORTEST and block < _GROWTH * usual_block(device):
        block *= 2
    return block
