"""Types of the C++ extension; the docstrings are in the bindings."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, final

import numpy as np
import numpy.typing as npt

_Float64: TypeAlias = npt.NDArray[np.float64]
_Int64: TypeAlias = npt.NDArray[np.int64]
_Real: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_Ids: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.uint64]
_Losses: TypeAlias = npt.NDArray[Any] | Sequence[float]
_State: TypeAlias = tuple[int, float, float, float]

class _Engine(Protocol):
    def load(self, lanes: _Int64, items: _Int64, /) -> object: ...
    def loss(
        self, lanes: _Int64, radii: _Float64, /
    ) -> _Losses | tuple[_Losses, npt.NDArray[np.bool_] | Sequence[bool]]: ...

class _LaneGroup(Protocol):
    def refill(self, first: int, /) -> int: ...
    def begin(self) -> object: ...
    def settled(self) -> int: ...

def philox(
    seed: int, stream: int, vector: int, first_block: int, n_blocks: int
) -> npt.NDArray[np.uint32]: ...
def normals(
    out: _Real,
    seed: int,
    stream: int,
    ids: _Ids,
    *,
    antithetic: bool = False,
    scale: _Real | None = None,
    project: _Float64 | None = None,
    threads: int = 1,
    first: int = 0,
) -> tuple[_Float64, _Float64]: ...
def perturb(
    out: _Real,
    theta0: _Real,
    coefficient: _Float64,
    seed: int,
    stream: int,
    ids: _Ids,
    *,
    antithetic: bool = False,
    scale: _Real | None = None,
    threads: int = 1,
    first: int = 0,
) -> None: ...
def ray_losses(
    outputs: _Real,
    target: _Int64 | _Real,
    *,
    kind: Literal["cross_entropy", "mse", "bce_with_logits"],
    limit: _Float64 | None = None,
    ignore_index: int = -100,
    threads: int = 1,
) -> tuple[_Float64, npt.NDArray[np.bool_]]: ...
def search(
    engine: _Engine,
    start: _Float64,
    *,
    lanes: int,
    mode: Literal["search", "scan"],
    loss0: float,
    threshold: float,
    xtol: float,
    log_cap: float,
    slope: float,
    max_evaluations: int = 200,
    scan_span: float = ...,
    scan_points: int = 32,
) -> tuple[_Float64, npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.uint8]]: ...
def run_rounds(groups: Sequence[_LaneGroup], *, items: int, refill_share: float) -> None: ...
def log_ball_volume(dim: int) -> float: ...
def log_radial_lebesgue(dim: int, radius: _Float64) -> _Float64: ...
def log_radial_gaussian(dim: int, radius: _Float64, shift: _Float64 | None = None) -> _Float64: ...

@final
class LogMeanExp:
    def __init__(self) -> None: ...
    def update(self, log_weights: _Float64) -> None: ...
    def merge(self, other: LogMeanExp) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def log_mean(self) -> float: ...
    @property
    def stderr(self) -> float: ...
    @property
    def ess(self) -> float: ...
    @property
    def max_share(self) -> float: ...
    def state(self) -> _State: ...
    @staticmethod
    def from_state(state: _State) -> LogMeanExp: ...
