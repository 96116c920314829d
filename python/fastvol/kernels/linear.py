"""Layers whose weights lie on rays, the noise made in the tile that the matrix unit multiplies.

The weights of a lane are W + c·s⊙Z: they exist in shared memory only, one tile at a time, and each
tile serves all rows of a program. The filters of a convolution meet so many positions that theirs
are made once and kept for the call. One Philox call makes the weights of four neighbouring inputs.
Where a row of W begins inside a block of four coordinates, all rows that begin at the same place in
theirs are taken together, and the inputs are shifted instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .._reference import perturbed as reference
from .activations import ACTIVATIONS, activate
from .launch import bucket, interpreted, launch, on_host, per_lane, signed_word
from .philox import normals_of_blocks, to_bfloat16_and_back, vector_of

# What the matrix unit does with float32 operands.
_INPUT_PRECISION = {
    "bf16": "ieee",
    "bf16x3": "bf16x3",
    "tf32": "tf32",
    "tf32x3": "tf32x3",
    "ieee": "ieee",
}

_UNSPECIALISED = [
    "seed_low",
    "seed_high",
    "stream",
    "offset",
    "bias_offset",
    "rows",
    "lanes",
    "bucket_rows",
    "bucket_outputs",
    "bucket_inputs",
    "positions",
    "width",
    "stride_height",
    "stride_width",
    "dilation_height",
    "dilation_width",
]


@triton.jit(do_not_specialize=[*_UNSPECIALISED, "count", "inputs", "first_block", "phase"])
def stage_kernel(
    out: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    coefficient: tl.tensor,
    ids: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    stream: tl.tensor,
    first_block: tl.tensor,
    phase: tl.tensor,
    count: tl.tensor,
    inputs: tl.tensor,
    lanes: tl.tensor,
    ANTITHETIC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """W + c·s⊙Z of one lane, one tile of it; W begins ``phase`` after its first block does."""
    lane = tl.program_id(0) % lanes
    tile = tl.program_id(0) // lanes
    vector, sign = vector_of(tl.load(ids + lane), ANTITHETIC)
    if HAS_COEFFICIENT:
        c = tl.load(coefficient + lane).to(tl.float32) * sign
    else:
        c = sign
    in_tile = (tile * BLOCKS + tl.arange(0, BLOCKS)).to(tl.uint32)
    blocks = first_block.to(tl.uint32, bitcast=True) + in_tile
    z0, z1, z2, z3 = normals_of_blocks(blocks, seed_low, seed_high, stream, vector, False)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * BLOCKS)
    index = tile * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS) - phase
    inside = (index >= 0) & (index < count)
    if SCALE == "row":
        z = z * tl.load(scale + index // inputs, mask=inside, other=0.0).to(tl.float32)
    elif SCALE == "element":
        z = z * tl.load(scale + index, mask=inside, other=0.0).to(tl.float32)
    w = c * z
    if HAS_WEIGHT:
        w += tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + lane.to(tl.int64) * count + index, w, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def linear_kernel(
    out: tl.tensor,
    x: tl.tensor,
    base: tl.tensor,
    x_places: tl.tensor,
    out_places: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    bias_scale: tl.tensor,
    coefficient: tl.tensor,
    ids: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    stream: tl.tensor,
    offset: tl.tensor,
    bias_offset: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    lanes: tl.tensor,
    x_lane: tl.tensor,
    x_row: tl.tensor,
    x_channel: tl.tensor,
    x_height: tl.tensor,
    x_width: tl.tensor,
    positions: tl.tensor,
    width: tl.tensor,
    stride_height: tl.tensor,
    stride_width: tl.tensor,
    dilation_height: tl.tensor,
    dilation_width: tl.tensor,
    bucket_rows: tl.tensor,
    bucket_outputs: tl.tensor,
    bucket_inputs: tl.tensor,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CONVOLUTION: tl.constexpr,
    STAGED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BASE_ACTIVATION: tl.constexpr,
    HAS_X_PLACES: tl.constexpr,
    HAS_OUT_PLACES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OWN_BIAS: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS_SCALE: tl.constexpr,
    PHASES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BF16: tl.constexpr,
    EMULATED: tl.constexpr,
    EMULATED_END: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """PARTS tiles of ROWS rows of one lane, by one tile of outputs.

    With STAGED, ``weight`` holds the weights of every lane as they are. With HAS_BASE the layer
    sees act(base + coefficient·x), made as it is read. EMULATED means in the interpreter, where
    matrices of bfloat16 cannot be multiplied: their entries are rounded only.
    """
    output_tiles = PHASES * tl.cdiv(tl.cdiv(outputs, PHASES), OUTPUTS)
    row_tiles = tl.cdiv(rows, ROWS * PARTS)
    program = tl.program_id(0)
    output_tile = program % output_tiles
    row_tile = (program // output_tiles) % row_tiles
    lane = program // (output_tiles * row_tiles)
    vector, sign = vector_of(tl.load(ids + lane), ANTITHETIC)
    if HAS_COEFFICIENT:
        c = tl.load(coefficient + lane).to(tl.float32) * sign
    else:
        c = sign

    # Every PHASES-th output begins at the same place in its block of four coordinates.
    residue = output_tile % PHASES
    o = residue + PHASES * ((output_tile // PHASES) * OUTPUTS + tl.arange(0, OUTPUTS))
    coordinate = offset.to(tl.int64) + o.to(tl.int64) * inputs
    if ALIGNED:
        phase = 0
    else:
        phase = ((offset.to(tl.int64) + residue.to(tl.int64) * inputs) & 3).to(tl.int32)
    block = ((coordinate - phase) >> 2).to(tl.uint32)
    if SCALE == "row":
        step = c * tl.load(scale + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
    else:
        step = c

    if HAS_X_PLACES:
        x += tl.load(x_places + lane) * x_lane
    else:
        x += lane.to(tl.int64) * x_lane
    if HAS_BASE:
        # What x changes by has the sign of its direction already.
        x_step = tl.load(coefficient + lane).to(tl.float32)
    if STAGED:
        weight += lane.to(tl.int64) * outputs * inputs
    m = row_tile * (ROWS * PARTS) + tl.arange(0, ROWS)
    # Triton knows no unpacking of tuples.
    totals: tl.tuple = ()
    begins: tl.tuple = ()
    for part in tl.static_range(PARTS):
        totals = totals + (tl.zeros([ROWS, OUTPUTS], tl.float32),)  # noqa: RUF005
        row = m + part * ROWS
        if CONVOLUTION:
            at = row % positions
            begin = (
                (row // positions) * x_row
                + (at // width) * stride_height * x_height
                + (at % width) * stride_width * x_width
            )
        else:
            begin = row * x_row
        begins = begins + (begin,)  # noqa: RUF005
    # A plain number as a bound is all that some versions of the interpreter can count to.
    for start in range(0, EMULATED_END if EMULATED else inputs + phase, INPUTS):
        i = start + tl.arange(0, INPUTS) - phase
        real = (i >= 0) & (i < inputs)
        place = (o * inputs)[:, None] + i[None, :]
        exists = (o < outputs)[:, None] & real[None, :]
        if STAGED:
            w = tl.load(weight + place, mask=exists, other=0.0)
        else:
            in_row = (start // 4 + tl.arange(0, INPUTS // 4)).to(tl.uint32)
            z0, z1, z2, z3 = normals_of_blocks(
                block[:, None] + in_row[None, :], seed_low, seed_high, stream, vector, False
            )
            z = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(OUTPUTS, INPUTS)
            if SCALE == "element":
                z = z * tl.load(scale + place, mask=exists, other=0.0).to(tl.float32)
            w = step * z
            if HAS_WEIGHT:
                w += tl.load(weight + place, mask=exists, other=0.0).to(tl.float32)
        if CONVOLUTION:
            tap = i % (KERNEL_HEIGHT * KERNEL_WIDTH)
            column = (
                (i // (KERNEL_HEIGHT * KERNEL_WIDTH)) * x_channel
                + (tap // KERNEL_WIDTH) * dilation_height * x_height
                + (tap % KERNEL_WIDTH) * dilation_width * x_width
            )
        else:
            column = i
        if BF16:
            w = to_bfloat16_and_back(w) if EMULATED else w.to(tl.bfloat16)
        w = tl.trans(w)
        sums: tl.tuple = ()
        for part in tl.static_range(PARTS):
            read = begins[part][:, None] + column[None, :]
            is_there = (m + part * ROWS < rows)[:, None] & real[None, :]
            given = tl.load(x + read, mask=is_there, other=0.0)
            if HAS_BASE:
                start_of_x = tl.load(base + read, mask=is_there, other=0.0).to(tl.float32)
                given = activate(start_of_x + x_step * given.to(tl.float32), BASE_ACTIVATION)
                # Not every activation leaves 0 as it is, and there is noise beyond the weights.
                given = tl.where(is_there, given, 0.0)
            if BF16:
                given = given.to(tl.float32) if EMULATED else given.to(tl.bfloat16)
                if EMULATED:
                    given = to_bfloat16_and_back(given)
            else:
                given = given.to(tl.float32)
            sums = sums + (tl.dot(given, w, totals[part], input_precision=PRECISION),)  # noqa: RUF005
        totals = sums

    if HAS_BIAS:
        place_of_bias = bias_offset.to(tl.int64) + o.to(tl.int64)
        z0, z1, z2, z3 = normals_of_blocks(
            (place_of_bias >> 2).to(tl.uint32), seed_low, seed_high, stream, vector, False
        )
        at_block = place_of_bias & 3
        shift = c * tl.where(
            at_block < 2, tl.where(at_block == 0, z0, z1), tl.where(at_block == 2, z2, z3)
        )
        if HAS_BIAS_SCALE:
            shift *= tl.load(bias_scale + o, mask=o < outputs, other=0.0).to(tl.float32)
        if HAS_OWN_BIAS:
            shift += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)
    if HAS_OUT_PLACES:
        out += tl.load(out_places + lane) * rows * outputs
    else:
        out += lane.to(tl.int64) * rows * outputs
    for part in tl.static_range(PARTS):
        row = m + part * ROWS
        value: tl.tensor = totals[part]
        if HAS_BIAS:
            value += shift[None, :]
        value = activate(value, ACTIVATION)
        # Images are [n, outputs, positions]; without positions, that is [n, outputs].
        if CONVOLUTION:
            begin = (row // positions) * (positions * outputs) + row % positions
            places = begin[:, None] + (o * positions)[None, :]
        else:
            places = (row * outputs)[:, None] + o[None, :]
        tl.store(
            out + places,
            value.to(out.dtype.element_ty),
            mask=(row < rows)[:, None] & (o < outputs)[None, :],
        )


@dataclass(frozen=True)
class _Images:
    """How a convolution reads: already padded images, kernel and steps as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    """Of what comes out."""


@dataclass(frozen=True)
class _Directions:
    """Which numbers multiply the weights and the bias, and where they lie in a direction."""

    seed: int
    stream: int
    ids: npt.NDArray[np.int64] | Tensor
    antithetic: bool
    offset: int
    bias_offset: int
    scale: Tensor | None
    bias_scale: Tensor | None


@dataclass(frozen=True)
class _Ends:
    """Where a layer reads, and where it writes."""

    base: Tensor | None = None
    base_activation: str | None = None
    x_places: Tensor | None = None
    out: Tensor | None = None
    out_places: Tensor | None = None
    dtype: torch.dtype | None = None


_PLAIN = _Ends()


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: npt.NDArray[np.float64] | Tensor,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    activation: str | None = None,
    precision: str = "tf32",
    base: Tensor | None = None,
    base_activation: str | None = None,
    places: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvol._reference.perturbed.perturbed_linear`."""
    after = offset + weight.numel() if bias_offset is None else bias_offset
    directions = _Directions(seed, stream, ids, antithetic, offset, after, scale, bias_scale)
    return _layer(
        x,
        weight.shape,
        weight,
        bias,
        bias is not None,
        coefficient,
        directions,
        activation,
        precision,
        None,
        _Ends(base, base_activation, places, dtype=dtype),
    )


def direction_linear(
    x: Tensor,
    outputs: int,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    bias: bool = False,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    precision: str = "tf32",
    out: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvol._reference.perturbed.direction_linear`."""
    shape = torch.Size((outputs, x.shape[-1]))
    after = offset + shape.numel() if bias_offset is None else bias_offset
    directions = _Directions(seed, stream, ids, antithetic, offset, after, scale, bias_scale)
    ends = _Ends(out=out, out_places=places)
    return _layer(x, shape, None, None, bias, None, directions, None, precision, None, ends)


def perturbed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: npt.NDArray[np.float64] | Tensor,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    activation: str | None = None,
    precision: str = "tf32",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """See :func:`fastvol._reference.perturbed.perturbed_conv2d`.

    The patches of the images are gathered as they are multiplied; only the padding is copied.
    With ``groups`` above 1 a tile of the matrix unit would be mostly empty: the reference runs.
    """
    if groups != 1:
        return reference.perturbed_conv2d(
            x,
            weight,
            bias,
            on_host(coefficient),
            seed,
            stream,
            on_host(ids),
            offset=offset,
            bias_offset=bias_offset,
            scale=scale,
            bias_scale=bias_scale,
            antithetic=antithetic,
            activation=activation,
            precision=precision,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    x, images = _images(x, weight.shape, stride, padding, dilation)
    after = offset + weight.numel() if bias_offset is None else bias_offset
    directions = _Directions(seed, stream, ids, antithetic, offset, after, scale, bias_scale)
    return _layer(
        x,
        weight.shape,
        weight,
        bias,
        bias is not None,
        coefficient,
        directions,
        activation,
        precision,
        images,
    )


def direction_conv2d(
    x: Tensor,
    shape: Sequence[int],
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64] | Tensor,
    *,
    bias: bool = False,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    precision: str = "tf32",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    out: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvol._reference.perturbed.direction_conv2d`."""
    if groups != 1:
        return reference.direction_conv2d(
            x,
            shape,
            seed,
            stream,
            on_host(ids),
            bias=bias,
            offset=offset,
            bias_offset=bias_offset,
            scale=scale,
            bias_scale=bias_scale,
            antithetic=antithetic,
            precision=precision,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            out=out,
            places=places,
        )
    size = torch.Size(shape)
    x, images = _images(x, size, stride, padding, dilation)
    after = offset + size.numel() if bias_offset is None else bias_offset
    directions = _Directions(seed, stream, ids, antithetic, offset, after, scale, bias_scale)
    ends = _Ends(out=out, out_places=places)
    return _layer(x, size, None, None, bias, None, directions, None, precision, images, ends)


def _layer(
    x: Tensor,
    shape: torch.Size,
    weight: Tensor | None,
    bias: Tensor | None,
    has_bias: bool,
    coefficient: npt.NDArray[np.float64] | Tensor | None,
    directions: _Directions,
    activation: str | None,
    precision: str,
    images: _Images | None,
    ends: _Ends = _PLAIN,
) -> Tensor:
    outputs, inputs = shape[0], shape[1:].numel()
    ids = per_lane(directions.ids, torch.int64, x.device)
    lanes = len(ids)
    picked = ends.x_places is not None
    x, of_lane = _with_lanes(x, len(x) if picked else lanes, 3 if images is None else 5)
    _check(x, shape, weight, bias, directions, activation, precision, images)
    _check_base(x, ends)
    if images is None:
        size: tuple[int, ...] = ()
    else:
        size = images.size
    rows = x.shape[1] * math.prod(size)
    result = (x.shape[1], outputs, *size)
    out = ends.out
    if out is None:
        out = torch.empty((lanes, *result), dtype=ends.dtype or x.dtype, device=x.device)
    elif out.shape[1:] != result or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous of shape [lanes, {', '.join(map(str, result))}], got "
            f"{tuple(out.shape)}"
        )
    if rows * outputs >= 2**31:
        raise ValueError(f"x must make fewer than 2³¹ outputs a lane, got {tuple(out.shape[1:])}")
    scale = directions.scale
    kind = None if scale is None else "row" if scale.dim() == 1 else "element"
    alone = images is None
    if not alone:
        weight = _staged(weight, shape, coefficient, ids, directions, kind)
    emulated = interpreted(linear_kernel)
    unused = x
    launch(
        linear_kernel,
        lambda meta: (lanes * _programs(rows, outputs, _phases(inputs) if alone else 1, meta),),
        {
            "out": out,
            "x": x,
            "base": unused if ends.base is None else ends.base,
            "x_places": ids if ends.x_places is None else ends.x_places,
            "out_places": ids if ends.out_places is None else ends.out_places,
            "weight": unused if weight is None else weight,
            "bias": unused if bias is None else bias,
            "scale": unused if scale is None else scale,
            "bias_scale": unused if directions.bias_scale is None else directions.bias_scale,
            "coefficient": (
                ids if coefficient is None else per_lane(coefficient, torch.float64, x.device)
            ),
            "ids": ids,
            "seed_low": signed_word(directions.seed),
            "seed_high": signed_word(directions.seed >> 32),
            "stream": signed_word(directions.stream),
            "offset": directions.offset,
            "bias_offset": directions.bias_offset,
            "rows": rows,
            "outputs": outputs,
            "inputs": inputs,
            "lanes": lanes,
            "x_lane": x.stride(0) if of_lane else 0,
            "x_row": x.stride(1),
            "x_channel": 0 if alone else x.stride(2),
            "x_height": 0 if alone else x.stride(3),
            "x_width": 0 if alone else x.stride(4),
            "positions": 1 if images is None else math.prod(images.size),
            "width": 1 if images is None else images.size[1],
            "stride_height": 1 if images is None else images.stride[0],
            "stride_width": 1 if images is None else images.stride[1],
            "dilation_height": 1 if images is None else images.dilation[0],
            "dilation_width": 1 if images is None else images.dilation[1],
            "bucket_rows": bucket(rows),
            "bucket_outputs": bucket(outputs),
            "bucket_inputs": bucket(inputs),
            "KERNEL_HEIGHT": 1 if images is None else images.kernel[0],
            "KERNEL_WIDTH": 1 if images is None else images.kernel[1],
            "CONVOLUTION": not alone,
            "STAGED": not alone,
            "ANTITHETIC": directions.antithetic,
            "HAS_BASE": ends.base is not None,
            "BASE_ACTIVATION": ends.base_activation,
            "HAS_X_PLACES": ends.x_places is not None,
            "HAS_OUT_PLACES": ends.out_places is not None,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": has_bias,
            "HAS_OWN_BIAS": bias is not None,
            "HAS_COEFFICIENT": coefficient is not None,
            "SCALE": kind if alone else None,
            "HAS_BIAS_SCALE": directions.bias_scale is not None,
            "PHASES": _phases(inputs) if alone else 1,
            "ALIGNED": not alone or (directions.offset % 4 == 0 and inputs % 4 == 0),
            "ACTIVATION": activation,
            # All are float32 in the interpreter, which does not know every name.
            "PRECISION": "ieee" if emulated else _INPUT_PRECISION[_spelled(precision, x.device)],
            "BF16": precision == "bf16",
            "EMULATED": emulated,
            "EMULATED_END": inputs + 3 if emulated else None,
        },
        fixed=_fixed(
            rows,
            precision,
            alone and inputs % 8 == 0,
            # What is made of x as it is read goes through registers, as operands do below 90, and
            # so does what is written to places of its own.
            80 if ends.base is not None or ends.out_places is not None else _capability(x.device),
            emulated,
            # Such tiles of both x and base are more than the shared memory of an older card.
            small=ends.base is not None and _capability(x.device) < 90,
        ),
        candidates=_CANDIDATES,
        key=("bucket_rows", "bucket_outputs", "bucket_inputs"),
    )
    return out


def _phases(inputs: int) -> int:
    """How many rows of a weight follow each other until one begins like the first in a block."""
    return 4 // math.gcd(inputs, 4)


def _spelled(precision: str, device: torch.device) -> str:
    """The precision by Triton's name; without tf32, all but bfloat16 is float32."""
    if precision == "bf16":
        return precision
    if device.type == "cuda" and torch.version.hip is not None:
        return "ieee"
    # Three products of tf32 are float32-grade, and several times as fast where they exist.
    return "tf32x3" if precision == "fp32" else precision


def _programs(rows: int, outputs: int, phases: int, meta: Mapping[str, Any]) -> int:
    output_tiles = phases * triton.cdiv(triton.cdiv(outputs, phases), meta["OUTPUTS"])
    return int(output_tiles * triton.cdiv(rows, meta["ROWS"] * meta["PARTS"]))


def _staged(
    weight: Tensor | None,
    shape: torch.Size,
    coefficient: npt.NDArray[np.float64] | Tensor | None,
    ids: Tensor,
    directions: _Directions,
    scale: str | None,
) -> Tensor:
    """W + c·s⊙Z of every lane, ``[k, *shape]``, float32."""
    out = torch.empty((len(ids), *shape), dtype=torch.float32, device=ids.device)
    count, phase = shape.numel(), directions.offset % 4
    launch(
        stage_kernel,
        lambda meta: (len(ids) * triton.cdiv(count + phase, 4 * meta["BLOCKS"]),),
        {
            "out": out,
            "weight": out if weight is None else weight,
            "scale": out if directions.scale is None else directions.scale,
            "coefficient": (
                ids if coefficient is None else per_lane(coefficient, torch.float64, ids.device)
            ),
            "ids": ids,
            "seed_low": signed_word(directions.seed),
            "seed_high": signed_word(directions.seed >> 32),
            "stream": signed_word(directions.stream),
            "first_block": signed_word(directions.offset // 4),
            "phase": phase,
            "count": count,
            "inputs": shape[1:].numel(),
            "lanes": len(ids),
            "ANTITHETIC": directions.antithetic,
            "HAS_WEIGHT": weight is not None,
            "HAS_COEFFICIENT": coefficient is not None,
            "SCALE": scale,
        },
        fixed=_STAGE,
    )
    return out


_STAGE = triton.Config({"BLOCKS": 256}, num_warps=4, num_stages=1)


def _config(rows: int, parts: int, outputs: int, inputs: int, warps: int) -> triton.Config:
    sizes = {"ROWS": rows, "PARTS": parts, "OUTPUTS": outputs, "INPUTS": inputs}
    return triton.Config(sizes, num_warps=warps, num_stages=2)


def _capability(device: torch.device) -> int:
    """10 times that of an NVIDIA GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    # 12 is newer, but has the matrix unit and the shared memory of 8.9.
    return 89 if major == 12 else 10 * major + minor


def _fixed(
    rows: int,
    precision: str,
    vectors: bool,
    capability: int,
    emulated: bool,
    *,
    small: bool = False,
) -> triton.Config:
    """What neither spills registers nor makes the noise of a tile more often than it must.

    Args:
        rows: of a lane.
        precision: of the product.
        vectors: whether neighbouring inputs are read together.
        capability: below 90, operands of a matrix unit are held in registers too.
        emulated: in the interpreter, where tiles are so small that awkward sizes meet every edge.
        small: no more rows at once than any card has the shared memory for.
    """
    if emulated:
        return _config(32, 2, 16, 64, 4)
    if small or not vectors or precision not in ("bf16", "tf32"):
        return _config(64, 1 if rows <= 64 else 2, 32, 32, 8)
    if rows <= 64:
        return _config(64, 1, 32, 32, 4)
    # As many rows as the accumulators have registers for, and no tile nearly empty.
    parts = triton.cdiv(triton.cdiv(rows, 128), triton.cdiv(rows, 5 * 128))
    return _config(128, parts, 32, 32, 4 if precision == "bf16" and capability >= 90 else 8)


_CANDIDATES = tuple(
    _config(*sizes)
    for sizes in (
        (64, 2, 32, 32, 4),
        (128, 1, 64, 32, 4),
        (128, 1, 64, 64, 8),
        (128, 2, 64, 32, 8),
        (128, 3, 32, 32, 4),
        (128, 3, 64, 64, 8),
        (128, 4, 64, 64, 8),
        (128, 5, 32, 64, 8),
    )
)


def _with_lanes(x: Tensor, lanes: int, dim: int) -> tuple[Tensor, bool]:
    """x with an axis of lanes, and whether the lanes differ."""
    if x.dim() == dim - 1:
        return x[None], False
    if x.dim() != dim or len(x) != lanes:
        raise ValueError(
            f"x must have {dim - 1} axes, or {dim} of which the first counts the {lanes} lanes, "
            f"got shape {tuple(x.shape)}"
        )
    return x, True


def _images(
    x: Tensor,
    shape: torch.Size,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
) -> tuple[Tensor, _Images]:
    """The padded images, and how they are read."""
    (up, left), steps, spread = _pair(padding), _pair(stride), _pair(dilation)
    kernel = (shape[2], shape[3])
    if up or left:
        x = F.pad(x, (left, left, up, up))
    size = tuple(
        (x.shape[axis] - spread[axis] * (kernel[axis] - 1) - 1) // steps[axis] + 1
        for axis in (-2, -1)
    )
    if min(size) < 1:
        raise ValueError(f"x is smaller than the kernel {kernel}, got shape {tuple(x.shape)}")
    return x, _Images(kernel, steps, spread, (size[0], size[1]))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_base(x: Tensor, ends: _Ends) -> None:
    base = ends.base
    if base is None:
        return
    if base.shape != x.shape[1:] or base.stride() != x.stride()[1:]:
        raise ValueError(
            f"base must be like one lane of x, {tuple(x.shape[1:])}, got {tuple(base.shape)} with "
            f"strides {base.stride()}"
        )
    known = (None, *ACTIVATIONS)
    if ends.base_activation not in known:
        raise ValueError(f"base_activation must be one of {known}, got {ends.base_activation!r}")


def _check(
    x: Tensor,
    shape: torch.Size,
    weight: Tensor | None,
    bias: Tensor | None,
    directions: _Directions,
    activation: str | None,
    precision: str,
    images: _Images | None,
) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    wanted = shape[1]
    axis = 2
    if x.shape[axis] != wanted:
        raise ValueError(f"x must have {wanted} inputs, got shape {tuple(x.shape)}")
    if images is None and x.stride(2) != 1 and wanted > 1:
        raise ValueError(
            f"the inputs of a row of x must lie side by side, got strides {x.stride()}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")
    if precision not in (*_INPUT_PRECISION, "fp32"):
        known = (*_INPUT_PRECISION, "fp32")
        raise ValueError(f"precision must be one of {known}, got {precision!r}")
    if max(x[0].numel(), shape.numel()) >= 2**31:
        raise ValueError(
            f"x and weight must have fewer than 2³¹ numbers a lane, got {tuple(x.shape[1:])} and "
            f"{tuple(shape)}; give fewer rows"
        )
    named = {"weight": weight, "bias": bias, "bias_scale": directions.bias_scale}
    shapes = {"weight": tuple(shape), "bias": (shape[0],), "bias_scale": (shape[0],)}
    for name, tensor in named.items():
        if tensor is not None and (
            tuple(tensor.shape) != shapes[name] or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous of shape {shapes[name]}, got {tuple(tensor.shape)}"
            )
    scale = directions.scale
    if scale is not None and (
        tuple(scale.shape) not in (tuple(shape), (shape[0],)) or not scale.is_contiguous()
    ):
        raise ValueError(
            f"scale must be contiguous of shape {tuple(shape)} or {(shape[0],)}, got "
            f"{tuple(scale.shape)}"
        )
