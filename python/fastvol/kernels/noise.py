"""Directions, and points on their rays, in one pass over memory.

The functions are those of :mod:`fastvol._reference.noise`, for tensors on a GPU. The noise is made
in registers: nothing is read but what is added or multiplied, and nothing written but the result.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from .._reference import noise as reference
from .launch import bucket, launch, per_lane, signed_word
from .philox import normals_of_blocks, to_bfloat16_and_back, vector_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UNSPECIALISED = [
    "seed_low",
    "seed_high",
    "stream",
    "lanes",
    "parts",
    "bucket",
    "row_stride",
    "block0",
    "width",
]
# Tiles that one program sums up. It fixes the order of a sum, so it is never tuned.
_TILES_A_SUM = 8


@triton.jit
def _flat(
    z0: tl.tensor, z1: tl.tensor, z2: tl.tensor, z3: tl.tensor, BLOCKS: tl.constexpr
) -> tl.tensor:
    """Coordinates in order; what one thread has made stays with it."""
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * BLOCKS)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def perturb_kernel(
    out: tl.tensor,
    theta0: tl.tensor,
    scale: tl.tensor,
    coefficient: tl.tensor,
    ids: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    stream: tl.tensor,
    d: tl.tensor,
    row_stride: tl.tensor,
    lanes: tl.tensor,
    block0: tl.tensor,
    width: tl.tensor,
    bucket: tl.tensor,
    ANTITHETIC: tl.constexpr,
    SCALE: tl.constexpr,
    DOUBLE: tl.constexpr,
    ALIGN: tl.constexpr,
    LEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """One tile of one row; lanes are innermost, so that they read the same θ₀ together.

    Column 0 is coordinate LEAD of counter block block0. With SCALE "row", ``width`` neighbours have
    the same scale.
    """
    WORK: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    lane = tl.program_id(0) % lanes
    tile = tl.program_id(0) // lanes
    vector, sign = vector_of(tl.load(ids + lane), ANTITHETIC)
    c = tl.load(coefficient + lane).to(WORK) * sign
    first = tile.to(tl.int64) * (4 * BLOCKS) - LEAD
    index = tl.arange(0, 4 * BLOCKS)
    inside = (index < d - first) & (index >= -first)
    is_whole = (first >= 0) & (first + 4 * BLOCKS <= d)
    theta0 += first
    # Masks would be computed, and accesses split, for every number: only a last tile has them.
    if is_whole:
        start = tl.load(theta0 + index).to(WORK)
    else:
        start = tl.load(theta0 + index, mask=inside, other=0.0).to(WORK)
    if SCALE == "element":
        scale += first
        if is_whole:
            s = tl.load(scale + index).to(WORK)
        else:
            s = tl.load(scale + index, mask=inside, other=0.0).to(WORK)
        step = c * s
    elif SCALE == "row":
        # In 32 bits where the row is no longer: what a division costs goes with the square.
        own = tl.maximum(first, 0).to(d.dtype) // width
        scale += own
        # Of the tile, what belongs to the row that it begins in.
        left = ((own + 1) * width - first).to(tl.int32)
        if left >= 4 * BLOCKS:
            s = tl.load(scale).to(WORK) + tl.zeros([4 * BLOCKS], WORK)
        else:
            behind = tl.where(index < left, 0, 1 + (index - left) // width)
            s = tl.load(scale + behind, mask=inside, other=0.0).to(WORK)
        step = c * s
    else:
        step = c
    blocks = (block0 + tile * BLOCKS + tl.arange(0, BLOCKS)).to(tl.uint32)
    z0, z1, z2, z3 = normals_of_blocks(blocks, seed_low, seed_high, stream, vector, DOUBLE)
    value = (start + step * _flat(z0, z1, z2, z3, BLOCKS)).to(out.dtype.element_ty)
    row = out + (lane.to(tl.int64) * row_stride * ALIGN + first)
    if is_whole:
        tl.store(row + index, value)
    else:
        tl.store(row + index, value, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def normals_kernel(
    out: tl.tensor,
    scale: tl.tensor,
    project: tl.tensor,
    squares: tl.tensor,
    dots: tl.tensor,
    ids: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    stream: tl.tensor,
    d: tl.tensor,
    row_stride: tl.tensor,
    lanes: tl.tensor,
    parts: tl.tensor,
    block0: tl.tensor,
    ANTITHETIC: tl.constexpr,
    STORE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_PROJECT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    LEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Some tiles of one row, and what they add to ‖z‖² and ⟨z, project⟩, [lanes, parts].

    Column 0 is coordinate LEAD of counter block block0.
    """
    DOUBLE: tl.constexpr = DTYPE == "float64"
    WORK: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    lane = tl.program_id(0) % lanes
    part = tl.program_id(0) // lanes
    vector, sign = vector_of(tl.load(ids + lane), ANTITHETIC)
    row = out + lane.to(tl.int64) * row_stride * ALIGN
    square = tl.zeros([BLOCKS], tl.float64)
    dot = tl.zeros([BLOCKS], tl.float64)
    # Tiles beyond the row add nothing.
    for i in range(TILES):
        tile = part * TILES + i
        first = tile.to(tl.int64) * (4 * BLOCKS) - LEAD
        is_whole = (first >= 0) & (first + 4 * BLOCKS <= d)
        block = tl.arange(0, BLOCKS)
        blocks = (block0 + tile * BLOCKS + block).to(tl.uint32)
        z0, z1, z2, z3 = normals_of_blocks(blocks, seed_low, seed_high, stream, vector, DOUBLE)
        if DTYPE == "bfloat16":
            z0, z1 = to_bfloat16_and_back(z0), to_bfloat16_and_back(z1)
            z2, z3 = to_bfloat16_and_back(z2), to_bfloat16_and_back(z3)
        elif DTYPE == "float16":
            z0, z1 = z0.to(tl.float16).to(tl.float32), z1.to(tl.float16).to(tl.float32)
            z2, z3 = z2.to(tl.float16).to(tl.float32), z3.to(tl.float16).to(tl.float32)
        if not is_whole:
            # What a row has no room for counts for nothing.
            room = d - first - 4 * block
            z0 = tl.where(room > 0, z0, 0.0)
            z1 = tl.where(room > 1, z1, 0.0)
            z2 = tl.where(room > 2, z2, 0.0)
            z3 = tl.where(room > 3, z3, 0.0)
            # Nor what comes before it; z3 is always in it.
            place = first + 4 * block
            z0 = tl.where(place >= 0, z0, 0.0)
            z1 = tl.where(place >= -1, z1, 0.0)
            z2 = tl.where(place >= -2, z2, 0.0)
        # Four squares in the arithmetic of z: their rounding is without bias, and far below the
        # error that d of them average to.
        square += ((z0 * z0 + z1 * z1) + (z2 * z2 + z3 * z3)).to(tl.float64)
        index = tl.arange(0, 4 * BLOCKS)
        inside = (index < d - first) & (index >= -first)
        z = _flat(z0, z1, z2, z3, BLOCKS)
        if HAS_PROJECT:
            other = tl.load(project + first + index, mask=inside, other=0.0)
            products = z.to(tl.float64) * other
            dot += tl.sum(products.reshape(BLOCKS, 4), axis=1)
        if STORE:
            if ANTITHETIC:
                z = z * sign
            if HAS_SCALE:
                if is_whole:
                    s = tl.load(scale + first + index).to(WORK)
                else:
                    s = tl.load(scale + first + index, mask=inside, other=0.0).to(WORK)
                z = z * s
            value = z.to(out.dtype.element_ty)
            if is_whole:
                tl.store(row + first + index, value)
            else:
                tl.store(row + first + index, value, mask=inside)
    place = lane.to(tl.int64) * parts + part
    tl.store(squares + place, tl.sum(square, axis=0))
    if HAS_PROJECT:
        tl.store(dots + place, tl.sum(dot, axis=0) * sign)


def normals(
    out: Tensor,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    antithetic: bool = False,
    scale: Tensor | None = None,
    project: Tensor | None = None,
    threads: int = 1,
    first: int = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """See :func:`fastvol._reference.noise.normals`; waits for the numbers that it returns."""
    del threads
    norm, dot = write_normals(
        out, seed, stream, ids, antithetic=antithetic, scale=scale, project=project, first=first
    )
    return norm.cpu().numpy(), dot.cpu().numpy()


def write_normals(
    out: Tensor,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    antithetic: bool = False,
    scale: Tensor | None = None,
    project: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`normals` without waiting: ‖z‖ and ⟨z, project⟩ are float64 ``[k]`` on the device."""
    _check_rows(out)
    return _normals(
        out,
        out.shape[1],
        out.dtype,
        seed,
        stream,
        per_lane(ids, torch.int64, out.device),
        antithetic,
        scale,
        project,
        first,
    )


def direction_reductions(
    d: int,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    antithetic: bool = False,
    project: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
) -> tuple[Tensor, Tensor]:
    """See :func:`fastvol._reference.noise.direction_reductions`."""
    lanes = per_lane(ids, torch.int64, torch.device(device))
    return _normals(None, d, dtype, seed, stream, lanes, antithetic, None, project)


def _normals(
    out: Tensor | None,
    d: int,
    dtype: torch.dtype,
    seed: int,
    stream: int,
    ids: Tensor,
    antithetic: bool,
    scale: Tensor | None,
    project: Tensor | None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    lanes = len(ids)
    if out is not None and lanes != len(out):
        raise ValueError(f"ids must name one direction a row of out, {len(out)}, got {lanes}")
    _check_vector("scale", scale, d)
    _check_vector("project", project, d)
    if project is not None and project.dtype != torch.float64:
        raise ValueError(f"project must be float64, got {project.dtype}")
    blocks = 256
    align = 1 if out is None else _alignment(out)
    lead = first % 4
    tiles = triton.cdiv(d + lead, 4 * blocks)
    a_sum = min(_TILES_A_SUM, bucket(tiles))
    parts = triton.cdiv(tiles, a_sum)
    fixed = triton.Config({"BLOCKS": blocks, "TILES": a_sum}, num_warps=4, num_stages=1)
    squares = torch.empty((lanes, parts), dtype=torch.float64, device=ids.device)
    dots = squares if project is None else torch.empty_like(squares)
    launch(
        normals_kernel,
        lambda _: (lanes * parts,),
        {
            "out": squares if out is None else out,
            "scale": squares if scale is None else scale,
            "project": squares if project is None else project,
            "squares": squares,
            "dots": dots,
            "ids": ids,
            "seed_low": signed_word(seed),
            "seed_high": signed_word(seed >> 32),
            "stream": signed_word(stream),
            "d": d,
            "row_stride": 0 if out is None else out.stride(0) // align,
            "lanes": lanes,
            "parts": parts,
            "block0": signed_word(first // 4),
            "ANTITHETIC": antithetic,
            "STORE": out is not None,
            "HAS_SCALE": scale is not None,
            "HAS_PROJECT": project is not None,
            "DTYPE": str(dtype).removeprefix("torch."),
            "ALIGN": align,
            "LEAD": lead,
        },
        fixed=fixed,
    )
    norm = squares.sum(dim=1).sqrt()
    return norm, torch.zeros_like(norm) if project is None else dots.sum(dim=1)


def perturb(
    out: Tensor,
    theta0: Tensor,
    coefficient: npt.NDArray[np.float64] | Tensor,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    antithetic: bool = False,
    scale: Tensor | None = None,
    threads: int = 1,
    first: int = 0,
) -> None:
    """See :func:`fastvol._reference.noise.perturb`; ``coefficient`` and ``ids`` may be tensors.

    Rows whose stride is a multiple of four elements are written fastest.
    """
    del threads
    _check_rows(out)
    lanes, d = out.shape
    _check_vector("theta0", theta0, d)
    width = 1 if scale is None else reference.width_of(scale, d)
    double = out.dtype == torch.float64
    align, lead = _alignment(out), first % 4
    launch(
        perturb_kernel,
        lambda meta: (lanes * triton.cdiv(d + lead, 4 * meta["BLOCKS"]),),
        {
            "out": out,
            "theta0": theta0,
            "scale": theta0 if scale is None else scale,
            "coefficient": per_lane(coefficient, torch.float64, out.device),
            "ids": per_lane(ids, torch.int64, out.device),
            "seed_low": signed_word(seed),
            "seed_high": signed_word(seed >> 32),
            "stream": signed_word(stream),
            "d": d,
            "row_stride": out.stride(0) // align,
            "lanes": lanes,
            "block0": signed_word(first // 4),
            "width": width,
            "bucket": bucket(d),
            "ANTITHETIC": antithetic,
            "SCALE": None if scale is None else "element" if width == 1 else "row",
            "DOUBLE": double,
            "ALIGN": align,
            "LEAD": lead,
        },
        fixed=_PERTURB,
        candidates=_PERTURB_CANDIDATES,
        key=("bucket",),
    )


_PERTURB = triton.Config({"BLOCKS": 512}, num_warps=4, num_stages=1)
_PERTURB_CANDIDATES = tuple(
    triton.Config({"BLOCKS": blocks}, num_warps=warps, num_stages=1)
    for blocks, warps in ((256, 4), (512, 8), (1024, 4), (1024, 8))
)


def _alignment(out: Tensor) -> int:
    """How many neighbours of every row can be written at once."""
    return math.gcd(out.stride(0), 4)


def _check_rows(out: Tensor) -> None:
    if out.dim() != 2 or (out.stride(1) != 1 and out.shape[1] > 1):
        raise ValueError(
            f"out must be [k, d] with neighbours in a row side by side, got shape "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    if out.dtype not in _DTYPES:
        raise ValueError(f"out must be one of {_DTYPES}, got {out.dtype}")


def _check_vector(name: str, vector: Tensor | None, d: int) -> None:
    if vector is not None and (vector.shape != (d,) or not vector.is_contiguous()):
        raise ValueError(
            f"{name} must be contiguous with one number a coordinate, [{d}], got shape "
            f"{tuple(vector.shape)}"
        )
