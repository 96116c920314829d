"""The operations on rays that cost losses: functions of the rays and some numbers alone.

So it does not matter which process evaluates them (see :mod:`fastvol.sampling.division`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._problem import Problem
from ..engines import Dense, Engine

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# An extrapolation along a ray goes no further, in log radius.
STRIDE = 0.7


@dataclass(frozen=True)
class Sheet:
    """What is asked, or answered, of some rays.

    Args:
        columns: numbers, one a ray, ``[k]`` each, by name.
        vectors: one a ray ``[k, d]``, where there are any.
        info: JSON-ready, of all rays together.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    vectors: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, rows: slice) -> Sheet:
        """Some of the rays."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Sheet(columns, None if self.vectors is None else self.vectors[rows], self.info)

    @classmethod
    def join(cls, answers: Sequence[Sheet]) -> Sheet:
        """The answers of all parts, in order; what they spent is added up."""
        if len(answers) == 1:
            return answers[0]
        first = answers[0]
        columns = {
            name: np.concatenate([answer.columns[name] for answer in answers])
            for name in first.columns
        }
        vectors = None
        if first.vectors is not None:
            device = first.vectors.device
            vectors = torch.cat([a.vectors.to(device) for a in answers if a.vectors is not None])
        spent = {name: sum(answer.info[name] for answer in answers) for name in first.info}
        return cls(columns, vectors, spent)

    def to_bytes(self) -> bytes:
        """For another process."""
        columns = {name: np.ascontiguousarray(column) for name, column in self.columns.items()}
        header: dict[str, Any] = {
            "info": dict(self.info),
            "columns": [[name, column.dtype.str, len(column)] for name, column in columns.items()],
            "vectors": None,
        }
        parts = [column.tobytes() for column in columns.values()]
        if self.vectors is not None:
            vectors = self.vectors.detach().cpu().contiguous()
            dtype = str(vectors.dtype).removeprefix("torch.")
            header["vectors"] = [dtype, *vectors.shape]
            # NumPy knows no bfloat16.
            parts.append(vectors.view(torch.uint8).numpy().tobytes())
        told = json.dumps(header).encode()
        return b"".join([len(told).to_bytes(8, "little"), told, *parts])

    @classmethod
    def from_bytes(cls, data: bytes) -> Sheet:
        """What :meth:`to_bytes` wrote."""
        position = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:position])
        columns: dict[str, npt.NDArray[Any]] = {}
        for name, dtype, count in header["columns"]:
            columns[name] = np.frombuffer(data, dtype, count, position).copy()
            position += columns[name].nbytes
        vectors = None
        if header["vectors"] is not None:
            dtype, *shape = header["vectors"]
            raw = torch.from_numpy(np.frombuffer(data, np.uint8, offset=position).copy())
            vectors = raw.view(getattr(torch, dtype)).reshape(shape)
        return cls(columns, vectors, header["info"])


class Evaluator:
    """Evaluates rays of given directions.

    Args:
        problem: of the run.
        lanes: the most rays evaluated together.
    """

    def __init__(self, problem: Problem, lanes: int) -> None:
        self.lanes = lanes
        self._problem = problem
        self._engine: Engine = problem.engine(lanes)
        self._rays: Tensor | None = None
        self._n_loss = 0
        self._kinds: set[str] = set()

    def answer(self, sheet: Sheet) -> Sheet:
        """What is asked of the rays t·v.

        Args:
            sheet: the rays ``[k, d]`` v; ``info["kind"]`` is the operation, which takes the other
                entries and the columns for its arguments:
                ``"search"``: the lane loop, from the log multiples of v ``start``, with
                ``options`` (but for the lanes); gives its log multiples, status, and whether a ray
                was found to cross before.
                ``"losses"``: at ``log_multiples``.
                ``"gradients"``: losses, and gradients with respect to metric coordinates, at
                ``log_multiples``, or where a search of so many ``steps`` leads from there; see
                :meth:`_refined`.

        Returns:
            The columns, and the losses and gradients spent. ``info["fresh"]`` is the number of
            kinds that this evaluator has been asked for the first time: that takes longer.
        """
        info = dict(sheet.info)
        kind = info.pop("kind")
        operations: dict[str, Callable[..., tuple[dict[str, npt.NDArray[Any]], Tensor | None]]] = {
            "search": self._search,
            "losses": self._losses,
            "gradients": self._gradients,
        }
        assert sheet.vectors is not None
        self._n_loss = 0
        fresh = kind not in self._kinds
        columns, vectors = operations[kind](sheet.vectors, **sheet.columns, **info)
        self._kinds.add(kind)
        n_grad = len(sheet) if kind == "gradients" else 0
        spent = {"n_loss": self._n_loss, "n_grad": n_grad, "fresh": int(fresh)}
        return Sheet(columns, vectors, spent)

    # What the lane loop calls.
    def load(self, lanes: Int, items: Int) -> None:
        """Puts directions on lanes, by their place among the rays that are searched."""
        assert self._rays is not None
        rows = self._rays[torch.from_numpy(items).to(self._rays.device)]
        self._engine.load(lanes, Dense(rows))

    def loss(self, lanes: Int, radii: Float) -> Float:
        """Losses at multiples of v."""
        self._problem.work.check()
        self._n_loss += len(lanes)
        return self._engine.loss(radii, lanes).values

    def _search(
        self, rays: Tensor, *, start: Float, options: Mapping[str, Any]
    ) -> tuple[dict[str, npt.NDArray[Any]], None]:
        self._rays = rays
        log_multiples, status, _, found = self._problem.backend.search(
            self, start, lanes=self.lanes, **options
        )
        self._rays = None
        return {"log_multiples": log_multiples, "status": status, "found": found}, None

    def _losses(self, rays: Tensor, *, log_multiples: Float) -> tuple[dict[str, Float], None]:
        losses = np.empty(len(log_multiples))
        for part in self._batches(len(losses)):
            lanes = np.arange(part.stop - part.start)
            self._engine.load(lanes, Dense(rays[part]))
            losses[part] = self.loss(lanes, np.exp(log_multiples[part]))
        return {"losses": losses}, None

    def _gradients(
        self, rays: Tensor, *, log_multiples: Float, caps: Float | None = None, **refined: Any
    ) -> tuple[dict[str, Float], Tensor]:
        x, losses, gradients = log_multiples.copy(), np.empty(len(log_multiples)), []
        for part in self._batches(len(losses)):
            lanes = np.arange(part.stop - part.start)
            self._engine.load(lanes, Dense(rays[part]))
            if caps is not None:
                x[part] = self._refined(lanes, x[part], caps[part], **refined)
            losses[part], rows = self._engine.loss_and_grad(np.exp(x[part]), lanes)
            gradients.append(rows)
        whole = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        return {"log_multiples": x, "losses": losses}, whole

    def _refined(
        self,
        lanes: Int,
        x: Float,
        caps: Float,
        *,
        steps: int,
        loss0: float,
        log_gap: float,
        slope: float,
    ) -> Float:
        """Log multiples of v nearer to the ends of the rays on some lanes than ``x``, ``[k]``.

        Secants of the log excess over ``loss0`` towards ``log_gap``, the first with ``slope``; not
        beyond the caps.
        """
        before: tuple[Float, Float] | None = None
        for _ in range(steps):
            x = np.minimum(x, caps)
            excess = self.loss(lanes, np.exp(x)) - loss0
            with np.errstate(divide="ignore", invalid="ignore"):
                height = np.log(excess) - log_gap
                slopes = np.full(len(x), slope)
                if before is not None:
                    secant = (height - before[1]) / (x - before[0])
                    slopes = np.where(np.isfinite(secant) & (secant > 0.5), secant, slopes)
                step = -height / slopes
            before = x, height
            # A loss that is not finite lies far outside, an excess that is not positive far inside.
            lost = np.where(excess <= 0, STRIDE, -STRIDE)
            x = x + np.clip(np.where(np.isfinite(step), step, lost), -STRIDE, STRIDE)
        return np.minimum(x, caps) if steps else x

    def _batches(self, count: int) -> list[slice]:
        """As many rays as there are lanes, one batch after the other."""
        return [
            slice(first, min(first + self.lanes, count)) for first in range(0, count, self.lanes)
        ]
