"""Triton kernels. Each has its definition in :mod:`fastvol._reference`, by the same name.

Importing this package needs ``triton``; nothing else in fastvol imports it unasked.
"""

from __future__ import annotations

from .launch import set_tuning
from .noise import direction_reductions, normals, perturb, write_normals

__all__ = ["direction_reductions", "normals", "perturb", "set_tuning", "write_normals"]
