"""The one place that chooses who computes: the C++ core or the PyTorch reference."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import FastvolWarning, NotAvailableError

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

BUILD_HINT = "build it with `pip install .` (or `python setup.py build_ext --inplace`)"


@dataclass(frozen=True)
class Backend:
    """The functions of one backend; the signatures are those of ``fastvol._reference``."""

    name: str
    normals: Callable[..., tuple[Float, Float]]
    perturb: Callable[..., None]
    ray_losses: Callable[..., tuple[Float, Bool]]
    search: Callable[..., Any]
    log_ball_volume: Callable[[int], float]
    log_radial_lebesgue: Callable[..., Float]
    log_radial_gaussian: Callable[..., Float]
    LogMeanExp: Callable[[], Any]


def select(backend: str) -> Backend:
    """The backend by name: ``"auto"``, ``"cpp"``, ``"torch"``.

    Raises:
        ValueError: an unknown name, or ``"cpp"`` where the extension is not built.
        NotAvailableError: ``"triton"``.
    """
    if backend == "triton":
        raise NotAvailableError(
            "backend='triton' is not part of this version; use backend='auto', which runs on any "
            "device that PyTorch knows"
        )
    if backend not in ("auto", "cpp", "torch"):
        raise ValueError(f"backend must be 'auto', 'cpp', 'torch' or 'triton', got {backend!r}")
    if backend == "torch":
        return _torch_backend()
    core = _import_core()
    if core is not None:
        return _cpp_backend(core)
    if backend == "cpp":
        raise ValueError(f"backend='cpp' needs the compiled extension: {BUILD_HINT}")
    _warn_once()
    return _torch_backend()


def formulas() -> Backend:
    """Whatever is there, for arithmetic on finished radii: the same numbers either way."""
    core = _import_core()
    return _torch_backend() if core is None else _cpp_backend(core)


def _import_core() -> ModuleType | None:
    try:
        from . import _core
    except ImportError:
        return None
    return _core


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "fastvol runs without its compiled extension: the same numbers, slower. To have it, "
        + BUILD_HINT,
        FastvolWarning,
        stacklevel=4,
    )


@functools.cache
def _torch_backend() -> Backend:
    from ._reference import accumulate, losses, noise, radial, search

    return Backend(
        name="torch",
        normals=noise.normals,
        perturb=noise.perturb,
        ray_losses=losses.ray_losses,
        search=search.search,
        log_ball_volume=radial.log_ball_volume,
        log_radial_lebesgue=radial.log_radial_lebesgue,
        log_radial_gaussian=radial.log_radial_gaussian,
        LogMeanExp=accumulate.LogMeanExp,
    )


@functools.cache
def _cpp_backend(core: Any) -> Backend:
    reference = _torch_backend()

    def on_cpu(out: Tensor) -> bool:
        # Noise on another device is made there, by the reference.
        return out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64)

    def normals(
        out: Tensor,
        seed: int,
        stream: int,
        ids: Int,
        *,
        antithetic: bool = False,
        scale: Tensor | None = None,
        project: Tensor | None = None,
        threads: int = 1,
        first: int = 0,
    ) -> tuple[Float, Float]:
        if not on_cpu(out):
            return reference.normals(
                out,
                seed,
                stream,
                ids,
                antithetic=antithetic,
                scale=scale,
                project=project,
                first=first,
            )
        norm, dot = core.normals(
            out.numpy(),
            seed,
            stream,
            ids,
            antithetic=antithetic,
            scale=None if scale is None else scale.numpy(),
            project=None if project is None else project.numpy(),
            threads=threads,
            first=first,
        )
        return norm, dot

    def perturb(
        out: Tensor,
        theta0: Tensor,
        coefficient: Float,
        seed: int,
        stream: int,
        ids: Int,
        *,
        antithetic: bool = False,
        scale: Tensor | None = None,
        threads: int = 1,
        first: int = 0,
    ) -> None:
        if not on_cpu(out):
            reference.perturb(
                out,
                theta0,
                coefficient,
                seed,
                stream,
                ids,
                antithetic=antithetic,
                scale=scale,
                first=first,
            )
            return
        core.perturb(
            out.numpy(),
            theta0.numpy(),
            coefficient,
            seed,
            stream,
            ids,
            antithetic=antithetic,
            scale=None if scale is None else scale.numpy(),
            threads=threads,
            first=first,
        )

    def ray_losses(
        outputs: Tensor,
        target: Tensor,
        *,
        kind: str,
        limit: Float | None = None,
        ignore_index: int = -100,
        threads: int = 1,
    ) -> tuple[Float, Bool]:
        wanted = torch.int64 if kind == "cross_entropy" else outputs.dtype
        if not on_cpu(outputs) or target.device.type != "cpu" or target.dtype != wanted:
            return reference.ray_losses(
                outputs, target, kind=kind, limit=limit, ignore_index=ignore_index
            )
        sums, outside = core.ray_losses(
            outputs.detach().contiguous().numpy(),
            target.detach().contiguous().numpy(),
            kind=kind,
            limit=limit,
            ignore_index=ignore_index,
            threads=threads,
        )
        return sums, outside

    return Backend(
        name="cpp",
        normals=normals,
        perturb=perturb,
        ray_losses=ray_losses,
        search=core.search,
        log_ball_volume=core.log_ball_volume,
        log_radial_lebesgue=core.log_radial_lebesgue,
        log_radial_gaussian=core.log_radial_gaussian,
        LogMeanExp=core.LogMeanExp,
    )
