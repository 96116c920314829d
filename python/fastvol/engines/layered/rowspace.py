r"""Directions of which only the part is drawn that the data can see.

The first layer multiplies its weights W ``[out, in]`` with inputs that span a space of dimension
r < in, so that of its noise Z only Z Q counts, Q ``[in, r]`` an orthonormal basis of that space:
r·out standard normal numbers. What is left out is normal too and independent of them; its squared
length has a chi-square law with (in − r)·out degrees of freedom, and is drawn instead, by
inversion. The law of the radius is the same wherever a direction is isotropic and each row of the
layer has one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..._layout import Segment

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowSpace:
    """How the coordinates of such directions lie.

    Args:
        position: of the first layer's weights among the moved parameters.
        basis: Q ``[in, r]``.
        shape: of what stands for each parameter: that of Z Q for the first layer's.
        hidden: degrees of freedom that are not drawn.
    """

    position: int
    basis: Tensor
    shapes: tuple[torch.Size, ...]
    hidden: int

    @property
    def starts(self) -> list[int]:
        """Where each parameter begins in a compact direction."""
        sizes = [shape.numel() for shape in self.shapes]
        return [0, *np.cumsum(sizes).tolist()]

    @property
    def size(self) -> int:
        """Coordinates of a compact direction, and one more for what is hidden."""
        return self.starts[-1] + 1

    def hidden_square(self, normal: Float) -> Float:
        """The squared length that is left out, from standard normal numbers ``[k]``."""
        # Slow to import.
        from scipy.stats import chi2, norm

        # From the nearer tail, which keeps its digits.
        low = normal < 0
        square = np.empty(len(normal))
        square[low] = chi2.ppf(norm.cdf(normal[low]), self.hidden)
        square[~low] = chi2.isf(norm.sf(normal[~low]), self.hidden)
        return square


def row_space(
    segments: Sequence[Segment], scale: Tensor, position: int, inputs: Sequence[Tensor]
) -> RowSpace:
    """The row space of the first layer's inputs.

    Args:
        segments: the moved parameters.
        scale: s ``[size]``.
        position: of the first layer's weights ``[out, in]``.
        inputs: what it is multiplied with, ``[…, in]`` of each batch.

    Raises:
        ValueError: naming ``noise``: a row of the layer has more than one scale, or the inputs span
            all dimensions, so that nothing would be saved.
    """
    segment = segments[position]
    rows = scale[segment.start : segment.stop].view(segment.shape)
    if not bool((rows == rows[:, :1]).all()) or not bool((scale > 0).all()):
        raise ValueError(
            "noise='rowspace' needs one scale in each row of the first layer, and every coordinate "
            "to move; use noise='full'"
        )
    everything = torch.cat([x.reshape(-1, x.shape[-1]).to(torch.float64) for x in inputs])
    out, width = segment.shape
    if len(everything) >= width:
        # Its rank may be smaller still.
        everything = torch.linalg.qr(everything, mode="r").R
    _, values, right = torch.linalg.svd(everything, full_matrices=False)
    rank = int((values > 1e-12 * values[0] * max(everything.shape)).sum())
    if rank >= width:
        raise ValueError(
            f"noise='rowspace': the first layer's inputs span all its {width} dimensions, so that "
            "nothing would be saved; use noise='full'"
        )
    shapes = tuple(
        torch.Size((out, rank)) if i == position else s.shape for i, s in enumerate(segments)
    )
    return RowSpace(position, right[:rank].mT.contiguous(), shapes, out * (width - rank))
