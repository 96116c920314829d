"""Triton kernels. Each has its definition in :mod:`fastvol._reference`, by the same name.

Importing this package needs ``triton``; nothing else in fastvol imports it unasked.
"""

from __future__ import annotations

from .launch import set_tuning
from .linear import direction_conv2d, direction_linear, perturbed_conv2d, perturbed_linear
from .noise import direction_reductions, normals, perturb, write_normals
from .pointwise import scaled_add

__all__ = [
    "direction_conv2d",
    "direction_linear",
    "direction_reductions",
    "normals",
    "perturb",
    "perturbed_conv2d",
    "perturbed_linear",
    "scaled_add",
    "set_tuning",
    "write_normals",
]
