"""The one place that chooses who computes: Triton kernels, the C++ core, the PyTorch reference."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import NotAvailableError, warn

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

BUILD_HINT = "build it with `pip install .` (or `python setup.py build_ext --inplace`)"


@dataclass(frozen=True)
class Backend:
    """The functions of one backend; the signatures are those of ``fastvol._reference``.

    ``write_normals`` is ``normals`` without waiting: what it returns stays on the device.
    ``fell_back`` says what the backend leaves to another one, and why. What has no faster form in a
    backend is the reference's.
    """

    name: str
    normals: Callable[..., tuple[Float, Float]]
    write_normals: Callable[..., tuple[Tensor, Tensor]]
    perturb: Callable[..., None]
    ray_losses: Callable[..., tuple[Float, Bool]]
    threshold_step: Callable[..., None]
    refill: Callable[..., Tensor]
    direction_reductions: Callable[..., tuple[Tensor, Tensor]]
    direction_linear: Callable[..., Tensor]
    direction_conv2d: Callable[..., Tensor]
    perturbed_linear: Callable[..., Tensor]
    perturbed_conv2d: Callable[..., Tensor]
    scaled_add: Callable[..., Tensor]
    search: Callable[..., Any]
    run_rounds: Callable[..., None]
    log_ball_volume: Callable[[int], float]
    log_radial_lebesgue: Callable[..., Float]
    log_radial_gaussian: Callable[..., Float]
    LogMeanExp: Callable[[], Any]
    fell_back: tuple[str, ...] = ()


def select(backend: str, device: torch.device | None = None) -> Backend:
    """The backend by name: ``"auto"``, ``"cpp"``, ``"torch"``, ``"triton"``.

    Args:
        backend: its name.
        device: where the model stands: on a GPU ``"auto"`` is ``"triton"``, where that can be
            imported, and else says why not. ``None`` is a CPU.

    Raises:
        ValueError: an unknown name, or ``"cpp"`` where the extension is not built.
        NotAvailableError: ``"triton"`` where it cannot run.
    """
    if backend not in ("auto", "cpp", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'cpp', 'torch' or 'triton', got {backend!r}")
    on_gpu = device is not None and device.type == "cuda"
    if backend == "triton" or (backend == "auto" and on_gpu):
        trouble = _triton_trouble(device)
        if trouble is None:
            return _triton_backend(_without_triton())
        if backend == "auto":
            return replace(_without_triton(), fell_back=(f"triton: {trouble}",))
        raise NotAvailableError(
            f"backend='triton' cannot run here: {trouble}; backend='auto' runs on any device that "
            "PyTorch knows"
        )
    if backend == "torch":
        return _torch_backend()
    core = _import_core()
    if core is not None:
        return _cpp_backend(core)
    if backend == "cpp":
        raise ValueError(f"backend='cpp' needs the compiled extension: {BUILD_HINT}")
    _warn_once()
    return _torch_backend()


def _without_triton() -> Backend:
    core = _import_core()
    return _torch_backend() if core is None else _cpp_backend(core)


def formulas() -> Backend:
    """Whatever is there, for arithmetic on finished radii: the same numbers either way."""
    return _without_triton()


def _import_core() -> ModuleType | None:
    try:
        from . import _core
    except ImportError:
        return None
    return _core


@functools.cache
def _warn_once() -> None:
    warn(
        "fastvol runs without its compiled extension: the same numbers, slower. To have it, "
        + BUILD_HINT,
    )


@functools.cache
def _torch_backend() -> Backend:
    from ._reference import (
        accumulate,
        losses,
        noise,
        perturbed,
        radial,
        refill,
        rounds,
        search,
        threshold_step,
    )

    return Backend(
        name="torch",
        normals=noise.normals,
        write_normals=_written(noise.normals),
        perturb=noise.perturb,
        ray_losses=losses.ray_losses,
        threshold_step=threshold_step.threshold_step,
        refill=refill.refill,
        direction_reductions=noise.direction_reductions,
        direction_linear=perturbed.direction_linear,
        direction_conv2d=perturbed.direction_conv2d,
        perturbed_linear=perturbed.perturbed_linear,
        perturbed_conv2d=perturbed.perturbed_conv2d,
        scaled_add=perturbed.scaled_add,
        search=search.search,
        run_rounds=rounds.run_rounds,
        log_ball_volume=radial.log_ball_volume,
        log_radial_lebesgue=radial.log_radial_lebesgue,
        log_radial_gaussian=radial.log_radial_gaussian,
        LogMeanExp=accumulate.LogMeanExp,
    )


@functools.cache
def _cpp_backend(core: Any) -> Backend:
    from ._reference import noise

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
        if scale is not None and scale.numel() != theta0.numel():
            scale = scale.repeat_interleave(noise.width_of(scale, theta0.numel()))
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

    return replace(
        reference,
        name="cpp",
        normals=normals,
        write_normals=_written(normals),
        perturb=perturb,
        ray_losses=ray_losses,
        search=core.search,
        run_rounds=core.run_rounds,
        log_ball_volume=core.log_ball_volume,
        log_radial_lebesgue=core.log_radial_lebesgue,
        log_radial_gaussian=core.log_radial_gaussian,
        LogMeanExp=core.LogMeanExp,
    )


def _triton_trouble(device: torch.device | None) -> str | None:
    """Why the kernels cannot run on tensors of a device; ``None`` stands for any."""
    try:
        import triton

        from .kernels import losses
    except ImportError as error:
        return f"it cannot be imported ({error})"
    if not isinstance(losses.sum_kernel, triton.JITFunction):
        # Triton's interpreter, which runs on tensors of any device.
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if device is not None and device.type != "cuda":
        return f"the model stands on {device}, not on a GPU"
    return None


@functools.cache
def _triton_backend(fallback: Backend) -> Backend:
    from . import kernels
    from .kernels import losses, refill, threshold_step
    from .kernels.launch import interpreted as is_interpreted

    interpreted = is_interpreted(losses.sum_kernel)
    fell_back = []

    def runs(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
        return (tensor.is_cuda or interpreted) and tensor.dtype in dtypes

    def chosen(name: str, dtypes: tuple[torch.dtype, ...]) -> Callable[..., Any]:
        """The kernel for tensors and options that it knows, else what there was before."""
        before: Callable[..., Any] = getattr(fallback, name)
        kernel = getattr(kernels, name, None)
        if kernel is None:
            fell_back.append(f"triton: there is no kernel for {name}")
            return before
        known = inspect.signature(kernel).parameters.keys()

        def function(out: Tensor, *args: Any, threads: int = 1, **options: Any) -> Any:
            if runs(out, dtypes) and options.keys() <= known:
                return kernel(out, *args, **options)
            return before(out, *args, threads=threads, **options)

        return function

    exact = (torch.float32, torch.float64)
    write = chosen("write_normals", exact)

    def write_normals(
        out: Tensor, seed: int, stream: int, ids: Int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        there: Any = ids
        if out.is_cuda:
            # Without waiting for what the device has to do before.
            there = torch.from_numpy(np.ascontiguousarray(ids)).to(out.device, non_blocking=True)
        told: tuple[Tensor, Tensor] = write(out, seed, stream, there, **options)
        return told

    def normals(*args: Any, **options: Any) -> tuple[Float, Float]:
        norm, dot = write_normals(*args, **options)
        return norm.cpu().numpy(), dot.cpu().numpy()

    def ray_losses(
        outputs: Tensor, target: Tensor, *, threads: int = 1, **options: Any
    ) -> tuple[Float, Bool]:
        if runs(outputs, losses.DTYPES) and target.device == outputs.device:
            return losses.ray_losses(outputs, target, **options)
        return fallback.ray_losses(outputs, target, threads=threads, **options)

    def layer(name: str) -> Callable[..., Tensor]:
        before, kernel = getattr(fallback, name), getattr(kernels, name)

        def function(x: Tensor, *args: Any, **options: Any) -> Tensor:
            known = runs(x, (torch.float32, torch.bfloat16, torch.float16))
            result: Tensor = (kernel if known else before)(x, *args, **options)
            return result

        return function

    def reductions(d: int, seed: int, stream: int, ids: Any, **options: Any) -> Any:
        there = torch.device(options.get("device", "cpu"))
        if there.type == "cuda":
            # Without waiting, as above.
            ids = torch.from_numpy(np.ascontiguousarray(ids)).to(there, non_blocking=True)
        elif not interpreted:
            return fallback.direction_reductions(d, seed, stream, ids, **options)
        return kernels.direction_reductions(d, seed, stream, ids, **options)

    def step(state: Any, outputs: Tensor, target: Tensor | None, **options: Any) -> None:
        if runs(outputs, losses.DTYPES):
            threshold_step.threshold_step(state, outputs, target, **options)
        else:
            fallback.threshold_step(state, outputs, target, **options)

    return replace(
        fallback,
        name="triton",
        normals=normals,
        write_normals=write_normals,
        perturb=chosen("perturb", losses.DTYPES),
        ray_losses=ray_losses,
        threshold_step=step,
        refill=refill.refill,
        direction_reductions=reductions,
        direction_linear=layer("direction_linear"),
        direction_conv2d=layer("direction_conv2d"),
        perturbed_linear=layer("perturbed_linear"),
        perturbed_conv2d=layer("perturbed_conv2d"),
        scaled_add=layer("scaled_add"),
        fell_back=tuple(fell_back),
    )


def _written(normals: Callable[..., tuple[Float, Float]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``write_normals`` of a backend that has to wait for the noise."""

    def write_normals(out: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        norm, dot = normals(out, *args, **options)
        return torch.from_numpy(norm).to(out.device), torch.from_numpy(dot).to(out.device)

    return write_normals
