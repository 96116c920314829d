"""Counter-based direction noise: Philox4x32-10 (Salmon et al. 2011) and Box–Muller.

Coordinates 4b … 4b+3 of vector i come from the four words of Philox with key = seed and counter =
(b, stream, i mod 2³², i div 2³²). Words become uniforms u = ((word >> 9) + ½)·2⁻²³, exact in
float32, and each pair (u₀, u₁) becomes √(−2 ln u₀)·(cos 2πu₁, sin 2πu₁), in this order. So any
slice of any vector can be made anywhere, in any order.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Rows times blocks made at once: bounds the memory of the int64 words.
_BLOCKS_AT_ONCE = 1 << 20


def philox(seed: int, stream: int, vector: int, first_block: int, n_blocks: int) -> Tensor:
    """The random words of some coordinate blocks of one vector: int64 ``[n_blocks, 4]``."""
    blocks = torch.arange(first_block, first_block + n_blocks, dtype=torch.int64, device="cpu")
    return _words(seed, stream, torch.tensor([vector], device="cpu"), blocks)[0]


def _words(seed: int, stream: int, vectors: Tensor, blocks: Tensor) -> Tensor:
    """int64 ``[vectors, blocks, 4]``, each entry below 2³²."""
    shape = (vectors.numel(), blocks.numel())
    c0 = blocks.view(1, -1).expand(shape)
    c1 = torch.full(shape, stream & _MASK, dtype=torch.int64, device=blocks.device)
    c2 = (vectors & _MASK).view(-1, 1).expand(shape)
    c3 = ((vectors >> 32) & _MASK).view(-1, 1).expand(shape)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32 bit product, in int64 that would overflow at once."""
    low_part = (a & 0xFFFF) * constant
    middle = (a >> 16) * constant + (low_part >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def _standard_normals(seed: int, stream: int, vectors: Tensor, start: int, stop: int) -> Tensor:
    """float64 ``[vectors, stop - start]``: these coordinates of the vectors."""
    blocks = torch.arange(start // 4, -(-stop // 4), dtype=torch.int64, device=vectors.device)
    words = _words(seed, stream, vectors, blocks)
    uniform = ((words >> 9).to(torch.float64) + 0.5) * 2.0**-23
    length = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    pairs = torch.stack((length * torch.cos(angle), length * torch.sin(angle)), dim=-1)
    lead = start % 4
    return pairs.reshape(vectors.numel(), -1)[:, lead : lead + stop - start]


def _vectors_and_signs(
    ids: npt.NDArray[np.int64], antithetic: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    directions = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=device)
    if not antithetic:
        return directions, torch.ones_like(directions, dtype=torch.float64)
    return directions >> 1, 1.0 - 2.0 * (directions & 1).to(torch.float64)


def coordinates(
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    start: int,
    stop: int,
    antithetic: bool,
    device: torch.device,
) -> Tensor:
    """Some coordinates of some directions: float64 ``[k, stop - start]``."""
    vectors, signs = _vectors_and_signs(ids, antithetic, device)
    return _standard_normals(seed, stream, vectors, start, stop) * signs[:, None]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What noise for parameters of a dtype is computed in: never less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normals(
    out: Tensor,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    antithetic: bool = False,
    scale: Tensor | None = None,
    project: Tensor | None = None,
    threads: int = 1,
    first: int = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Writes scale · z for each direction into ``out``.

    Args:
        out: ``[k, d]``, a floating dtype, any device; overwritten.
        seed: 64-bit key.
        stream: which of the independent families of directions.
        ids: direction indices ``[k]``.
        antithetic: directions 2i and 2i+1 are ± vector i.
        scale: ``[d]`` in the dtype of ``out``, or ``None`` for ones.
        project: float64 ``[d]``, or ``None``.
        threads: unused here.
        first: the coordinate that column 0 is: any span of the whole vectors can be made alone.

    Returns:
        norm ``[k]``: ‖z‖ of z rounded to the dtype of ``out``, before the scale; dot ``[k]``:
        ⟨z, project⟩, zeros without ``project``. Both float64, on the CPU.
    """
    del threads
    norm, dot = _made(
        out,
        out.shape[1],
        out.dtype,
        out.device,
        seed,
        stream,
        ids,
        antithetic,
        scale,
        project,
        first,
    )
    return norm.cpu().numpy(), dot.cpu().numpy()


def direction_reductions(
    d: int,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    antithetic: bool = False,
    project: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """What :func:`normals` returns, without the directions: float64 ``[k]`` on ``device``.

    Args:
        d: the number of coordinates.
        seed, stream, ids, antithetic, project: as for :func:`normals`.
        dtype: what z is rounded to.
        device: where to compute.
    """
    return _made(None, d, dtype, torch.device(device), seed, stream, ids, antithetic, None, project)


def _made(
    out: Tensor | None,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    antithetic: bool,
    scale: Tensor | None,
    project: Tensor | None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    vectors, signs = _vectors_and_signs(ids, antithetic, device)
    k = len(vectors)
    squared = torch.zeros(k, dtype=torch.float64, device=device)
    dot = torch.zeros(k, dtype=torch.float64, device=device)
    step = 4 * max(1, _BLOCKS_AT_ONCE // max(k, 1))
    for start in range(0, d, step):
        stop = min(start + step, d)
        z = _standard_normals(seed, stream, vectors, first + start, first + stop) * signs[:, None]
        z = z.to(dtype)
        exact = z.to(torch.float64)
        squared += exact.square().sum(dim=1)
        if project is not None:
            dot += exact @ project[start:stop]
        if out is not None:
            out[:, start:stop] = z if scale is None else z * scale[start:stop]
    return squared.sqrt(), dot


def perturb(
    out: Tensor,
    theta0: Tensor,
    coefficient: npt.NDArray[np.float64],
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    antithetic: bool = False,
    scale: Tensor | None = None,
    threads: int = 1,
    first: int = 0,
) -> None:
    """Writes θ₀ + coefficient · scale · z for each direction into ``out``.

    Args:
        out: ``[k, d]``, a floating dtype; overwritten. The sum is made in it, or in float32 where
            it has less.
        theta0: ``[d]`` in the dtype of ``out``.
        coefficient: float64 ``[k]``.
        scale: one number a coordinate ``[d]``, or one for every d/rows neighbours ``[rows]``, or
            ``None`` for ones.
        seed, stream, ids, antithetic, threads, first: as for :func:`normals`.
    """
    working = working_dtype(out.dtype)
    rows = out if out.dtype == working else torch.empty_like(out, dtype=working)
    step = scale
    if scale is not None:
        step = scale.to(working).repeat_interleave(width_of(scale, out.shape[1]))
    normals(
        rows, seed, stream, ids, antithetic=antithetic, scale=step, threads=threads, first=first
    )
    rows *= torch.as_tensor(coefficient, dtype=working, device=out.device)[:, None]
    rows += theta0
    if rows is not out:
        out.copy_(rows)


def width_of(scale: Tensor, d: int) -> int:
    """How many neighbours of d coordinates have one entry of a scale.

    Raises:
        ValueError: it has not the same number for each entry.
    """
    rows = scale.numel()
    if scale.dim() != 1 or not scale.is_contiguous() or not rows or d % rows:
        raise ValueError(
            f"scale must be contiguous with one number a coordinate, [{d}], or for as many "
            f"neighbours each, got shape {tuple(scale.shape)}"
        )
    return d // rows
