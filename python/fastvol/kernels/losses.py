"""Sums of losses over the examples of many rays, on a GPU: what rounds of the search begin with.

One program sums one ray's losses, or a stretch of them where the rays alone would not fill the
card. The definition is :mod:`fastvol._reference.losses`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from .._reference.search_step import Phase
from .._reference.threshold_step import check_target
from .launch import launch

KINDS = {"given": 0, "cross_entropy": 1, "mse": 2, "bce_with_logits": 3}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Programs that fill any card.
_PROGRAMS = 512
# Elements of a tile, and tiles that are not worth more programs.
_TILE = 2048
_TILES = 8

_GIVEN = tl.constexpr(0)
_CROSS_ENTROPY = tl.constexpr(1)
_MSE = tl.constexpr(2)

_BRACKET = tl.constexpr(int(Phase.BRACKET))
_REFINE = tl.constexpr(int(Phase.REFINE))
_SCAN = tl.constexpr(int(Phase.SCAN))


def ray_losses(
    outputs: Tensor,
    target: Tensor,
    *,
    kind: str,
    limit: npt.NDArray[np.float64] | None = None,
    ignore_index: int = -100,
    threads: int = 1,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """See :func:`fastvol._reference.losses.ray_losses`; waits for the numbers that it returns."""
    del threads
    check_target(outputs, target, kind=kind, ignore_index=ignore_index)
    rays, device = outputs.shape[0], outputs.device
    sums = torch.zeros(rays, dtype=torch.float64, device=device)
    marks = torch.zeros(rays, dtype=torch.int32, device=device)
    limits = torch.full((rays,), float("inf"), dtype=torch.float64, device=device)
    if limit is not None:
        limits.copy_(torch.from_numpy(np.ascontiguousarray(limit, dtype=np.float64)))
    add_losses(
        outputs,
        target,
        sums,
        marks,
        limits,
        None,
        kind=kind,
        scale=1.0,
        ignore_index=ignore_index,
        first=True,
    )
    return sums.cpu().numpy(), marks.cpu().numpy().astype(np.bool_)


def add_losses(
    outputs: Tensor,
    target: Tensor | None,
    sums: Tensor,
    marks: Tensor,
    limits: Tensor,
    phases: Tensor | None,
    *,
    kind: str,
    scale: float,
    ignore_index: int,
    first: bool,
) -> None:
    """Adds a batch's losses to each ray's sum, up to a limit, without waiting for anything.

    Where a ray's examples are summed in several stretches, one that holds NaN is NaN, even where
    the stretches before it would have let it reach the limit first.

    Args:
        outputs, target, kind, scale, ignore_index, first: as for
            :func:`fastvol._reference.threshold_step.threshold_step`.
        sums: float64 ``[k]``, in place.
        marks: int32 ``[k]``, in place: 1 where a partial sum exceeded the limit.
        limits: float64 ``[k]``, or ``[1]`` for all.
        phases: int32 ``[k]`` of the rays' searches: one that waits for no loss is left out; or
            ``None``.

    Raises:
        ValueError: an unknown kind, or outputs of another dtype or number of rays.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if outputs.dtype not in DTYPES:
        raise ValueError(f"outputs must be floating-point up to float64, got {outputs.dtype}")
    outputs = outputs.contiguous()
    rays = outputs.shape[0]
    if sums.shape != (rays,):
        raise ValueError(f"outputs must hold {len(sums)} rays, one a lane, got {rays}")
    if not rays:
        return
    rows, classes = outputs.numel() // rays, 1
    if kind == "cross_entropy":
        _, rows, classes = outputs.shape
    block_c = min(triton.next_power_of_2(classes), _TILE)
    # Of logits fewer rows: exponentials take registers.
    most = 64 if kind == "cross_entropy" else 256
    block_n = max(1, min(triton.next_power_of_2(max(rows, 1)), _TILE // block_c, most))
    tiles = triton.cdiv(max(rows, 1), block_n)
    per_split = triton.cdiv(tiles, max(1, min(tiles // _TILES, _PROGRAMS // rays))) * block_n
    splits = triton.cdiv(max(rows, 1), per_split)
    own, own_marks = sums, marks
    if splits > 1:
        own = torch.empty((splits, rays), dtype=torch.float64, device=outputs.device)
        own_marks = torch.empty((splits, rays), dtype=torch.int32, device=outputs.device)
    spread = int(limits.numel() > 1)
    # A number of the host arrives in float32: two of them hold a double.
    coarse = float(np.float32(scale))
    launch(
        sum_kernel,
        lambda meta: (rays, splits),
        {
            "outputs": outputs,
            "target": outputs if target is None else target.contiguous(),
            "phases": marks if phases is None else phases,
            "base": sums,
            "base_marks": marks,
            "limits": limits,
            "sums": own,
            "stopped": own_marks,
            "rows": rows,
            "classes": classes,
            "per_split": per_split,
            "ignore_index": ignore_index,
            "scale_coarse": coarse,
            "scale_fine": scale - coarse,
            "KIND": KINDS[kind],
            "FIRST": first,
            "SEARCHING": phases is not None,
            "LIMITS": spread,
            "SPLIT": splits > 1,
            "DOUBLE": outputs.dtype == torch.float64,
            "BLOCK_N": block_n,
            "BLOCK_C": block_c,
        },
        fixed=_SUM,
    )
    if splits > 1:
        launch(
            combine_kernel,
            lambda meta: (triton.cdiv(rays, meta["BLOCK"]),),
            {
                "base": sums,
                "base_marks": marks,
                "limits": limits,
                "parts": own,
                "part_marks": own_marks,
                "rays": rays,
                "splits": splits,
                "FIRST": first,
                "BOUNDED": kind != "given",
                "LIMITS": spread,
            },
            fixed=_COMBINE,
        )


_SUM = triton.Config({}, num_warps=4, num_stages=1)
_COMBINE = triton.Config({"BLOCK": 128}, num_warps=4, num_stages=1)


@triton.jit
def _log1p(e: tl.tensor) -> tl.tensor:
    # Kahan's: the rounding of 1 + e cancels.
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def sum_kernel(
    outputs: tl.tensor,
    target: tl.tensor,
    phases: tl.tensor,
    base: tl.tensor,
    base_marks: tl.tensor,
    limits: tl.tensor,
    sums: tl.tensor,
    stopped: tl.tensor,
    rows: tl.tensor,
    classes: tl.tensor,
    per_split: tl.tensor,
    ignore_index: tl.tensor,
    scale_coarse: tl.tensor,
    scale_fine: tl.tensor,
    KIND: tl.constexpr,
    FIRST: tl.constexpr,
    SEARCHING: tl.constexpr,
    LIMITS: tl.constexpr,
    SPLIT: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One stretch of one ray's examples."""
    ray = tl.program_id(0)
    split = tl.program_id(1)
    dtype = tl.float64 if DOUBLE else tl.float32
    before = tl.full((), 0.0, tl.float64)
    own = tl.full((), 0.0, tl.float64)
    beyond = tl.full((), 0, tl.int32)
    if not FIRST:
        before += tl.load(base + ray)
        beyond += tl.load(base_marks + ray)
    scale = tl.full((), 0.0, tl.float64) + scale_coarse
    scale += scale_fine
    limit = tl.load(limits + ray * LIMITS)
    going = (beyond == 0).to(tl.int32)
    waits = going >= 0
    if SEARCHING:
        phase = tl.load(phases + ray)
        waits = (phase == _BRACKET) | (phase == _REFINE) | (phase == _SCAN)
        going = going * waits.to(tl.int32)
    row = split * per_split
    stop = tl.minimum(row + per_split, rows)
    start = outputs + ray.to(tl.int64) * rows * classes
    while (row < stop) & (going != 0):
        index = row + tl.arange(0, BLOCK_N)
        valid = index < stop
        if KIND == _CROSS_ENTROPY:
            label = tl.load(target + index, mask=valid, other=0)
            valid = valid & (label != ignore_index)
            place = start + index.to(tl.int64) * classes
            most = tl.full((BLOCK_N,), float("-inf"), dtype)
            mass = tl.zeros((BLOCK_N,), dtype)
            # Not every version of the interpreter can count to a bound that is no plain number.
            column = tl.full((), 0, tl.int32)
            while column < classes:
                columns = column + tl.arange(0, BLOCK_C)
                x = tl.load(
                    place[:, None] + columns[None, :],
                    mask=valid[:, None] & (columns < classes)[None, :],
                    other=float("-inf"),
                ).to(dtype)
                higher = tl.maximum(most, tl.max(x, axis=1))
                level = tl.where(higher == float("-inf"), 0.0, higher)
                mass = mass * tl.exp(most - level) + tl.sum(tl.exp(x - level[:, None]), axis=1)
                most = higher
                column += BLOCK_C
            wanted = tl.load(place + label, mask=valid, other=0.0).to(dtype)
            loss = (most - wanted) + tl.log(mass)
        else:
            x = tl.load(start + index, mask=valid, other=0.0).to(dtype)
            if KIND == _GIVEN:
                loss = x
            else:
                wanted = tl.load(target + index, mask=valid, other=0.0).to(dtype)
                if KIND == _MSE:
                    error = (x - wanted).to(tl.float64)
                    loss = error * error
                else:
                    loss = (1.0 - wanted) * x + (tl.maximum(-x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
                    loss = tl.where(x == x, loss, x)
        value = tl.where(valid, loss.to(tl.float64), 0.0) * scale
        after = own + tl.sum(value, axis=0)
        if KIND != _GIVEN:
            if before + after <= limit:
                own = after
            else:
                # The first example whose loss goes too far is the last that counts.
                partial = own + tl.cumsum(value, axis=0)
                above = before + partial > limit
                beyond = tl.max(above.to(tl.int32), axis=0)
                reached = tl.min(tl.where(above, partial, float("inf")), axis=0)
                own = tl.where(beyond != 0, reached, after)
                going = (beyond == 0).to(tl.int32)
        else:
            own = after
        row += BLOCK_N
    if SPLIT:
        place_out = split * tl.num_programs(0) + ray
        tl.store(sums + place_out, own)
        tl.store(stopped + place_out, beyond)
    elif waits:
        tl.store(sums + ray, before + own)
        tl.store(stopped + ray, beyond)


@triton.jit
def combine_kernel(
    base: tl.tensor,
    base_marks: tl.tensor,
    limits: tl.tensor,
    parts: tl.tensor,
    part_marks: tl.tensor,
    rays: tl.tensor,
    splits: tl.tensor,
    FIRST: tl.constexpr,
    BOUNDED: tl.constexpr,
    LIMITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds the stretches of each ray in their order, up to its limit."""
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = ray < rays
    limit = tl.load(limits + ray * LIMITS, mask=valid, other=0.0)
    total = tl.zeros((BLOCK,), tl.float64)
    beyond = tl.zeros((BLOCK,), tl.int32)
    if not FIRST:
        total += tl.load(base + ray, mask=valid, other=0.0)
        beyond += tl.load(base_marks + ray, mask=valid, other=0)
    split = tl.full((), 0, tl.int32)
    while split < splits:
        part = tl.load(parts + split * rays + ray, mask=valid, other=0.0)
        over = tl.load(part_marks + split * rays + ray, mask=valid, other=0)
        after = total + part
        total = tl.where(beyond != 0, total, after)
        if BOUNDED:
            # A NaN before hides what comes after it.
            stopped = ((over != 0) & (after == after)) | (after > limit)
            beyond = tl.where(beyond != 0, beyond, stopped.to(tl.int32))
        split += 1
    tl.store(base + ray, total, mask=valid)
    tl.store(base_marks + ray, beyond, mask=valid)
