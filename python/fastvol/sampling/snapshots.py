"""Runs of chains as pieces of work: finished ones, and where a level of one begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoints.files import Piece
from .field import Level, Population, RayField
from .moves import Move
from .tempering import Ancestors, Run

# Everything random: kept apart from a move's own numbers.
_RANDOM = ("generator", "rng")


def run_to_piece(run: Run, **info: Any) -> Piece:
    """A finished run, with what else is to be said of it; without its final states."""
    return Piece(run.columns(), {**info, "run": run.describe()})


def run_from_piece(piece: Piece) -> Run:
    """The run that :func:`run_to_piece` wrote."""
    return Run.rebuilt(piece.info["run"], piece.arrays)


def level_to_piece(
    ancestors: Ancestors, move: Move, generator: torch.Generator, rng: np.random.Generator
) -> Piece:
    """The beginning of a level, the move and the generators that it goes on with."""
    run, state = ancestors.run, ancestors.state
    arrays = {f"run.{name}": column for name, column in run.columns().items()}
    arrays |= {
        "units": state.units.cpu().numpy(),
        "log_radii": state.log_radii,
        "status": state.status,
        "shift": state.shift,
        "log_norm": state.log_norm,
        "log_offset": state.log_offset,
        "generator": generator.get_state().numpy(),
    }
    level = ancestors.level
    info = {
        "run": run.describe(),
        "level": [level.beta, level.log_scale],
        "move": _state_of(move),
        "rng": rng.bit_generator.state,
    }
    return Piece(arrays, info)


def level_from_piece(
    piece: Piece,
    rays: RayField,
    move: Move,
    generator: torch.Generator,
    rng: np.random.Generator,
) -> Ancestors:
    """The beginning that :func:`level_to_piece` wrote; move and generators are set to that time."""
    arrays, info = piece.arrays, piece.info
    start = "run."
    columns = {name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)}
    device = rays.problem.layout.device
    names = ("log_radii", "status", "shift", "log_norm", "log_offset")
    state = Population(
        torch.from_numpy(arrays["units"].copy()).to(device),
        *(arrays[name].copy() for name in names),
    )
    generator.set_state(torch.from_numpy(arrays["generator"].copy()))
    rng.bit_generator.state = info["rng"]
    _set_state(move, info["move"])
    return Ancestors(Run.rebuilt(info["run"], columns), state, Level(*info["level"]))


def _state_of(move: Any) -> dict[str, Any]:
    """JSON-ready: the numbers by which a move has adapted itself."""
    state: dict[str, Any] = {}
    for entry in fields(move):
        value = getattr(move, entry.name)
        if entry.name in _RANDOM:
            continue
        if isinstance(value, Level):
            value = [value.beta, value.log_scale]
        elif is_dataclass(value):
            value = _state_of(value)
        state[entry.name] = value
    return state


def _set_state(move: Any, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        before = getattr(move, name)
        if isinstance(before, Level):
            setattr(move, name, Level(*value))
        elif is_dataclass(before):
            _set_state(before, value)
        else:
            setattr(move, name, value)
