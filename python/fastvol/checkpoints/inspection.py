"""What a folder holds, told without the model: ``fastvol info``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FastvolError
from .files import SUFFIX, DamagedError, Piece, is_aside, read_piece
from .folder import MANIFEST, folder_path, read_manifest


@dataclass(frozen=True)
class Chains:
    """Runs of chains with the budget of one n.

    Attributes:
        n: of the call. finished: runs. levels: of each unfinished run that something is kept of.
    """

    n: int
    finished: int
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Threshold:
    """What is kept of one threshold.

    Attributes:
        threshold: τ.
        method: that was decided on, or ``None``.
        blocks: of directions. directions: in them. first_missing: where the next one is missing.
        n_loss: evaluations in them. audited: the n for which earlier crossings were looked for.
        chains: runs of chains.
    """

    threshold: float
    method: str | None
    blocks: int
    directions: int
    first_missing: int
    n_loss: int
    audited: tuple[int, ...]
    chains: tuple[Chains, ...]


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        path: of the folder.
        manifest: what the run is, and how it is carried out.
        thresholds: that have been worked on.
        damaged: files that are not what was written; the next call makes them again.
        unfinished: files that were being written when a run ended.
        size: of everything, bytes.
    """

    path: str
    manifest: dict[str, Any]
    thresholds: tuple[Threshold, ...]
    damaged: tuple[str, ...]
    unfinished: int
    size: int

    @classmethod
    def of(cls, path: Any) -> Contents:
        """Reads a folder, every file of it.

        Raises:
            FastvolError, OSError: it is not a checkpoint.
        """
        folder = folder_path(path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise FastvolError(f"checkpoint: {folder} has no {MANIFEST}: it is not a checkpoint")
        damaged: list[str] = []
        sections = sorted(
            (float(place.name.removeprefix("threshold-")), place)
            for place in folder.glob("threshold-*")
        )
        thresholds = tuple(
            _threshold(value, place, manifest["plan"]["block"], damaged)
            for value, place in sections
        )
        files = [file for file in folder.rglob("*") if file.is_file()]
        return cls(
            str(folder),
            manifest,
            thresholds,
            tuple(damaged),
            sum(is_aside(file) for file in files),
            sum(file.stat().st_size for file in files),
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def summary(self) -> str:
        """In words."""
        identity, made = self.manifest["identity"], self.manifest["made_with"]
        plan = self.manifest["plan"]
        size = sum(math.prod(shape) for _, shape in identity["parameters"])
        lines = [
            f"{self.path}: checkpoint of fastvol {made.get('fastvol')}, "
            f"{self.size / 2**20:.1f} MiB",
            f"  model: {size:,} parameters that move, sha256 {identity['parameters_sha256'][:12]}",
            f"  loss: {identity['loss_fn']}, {identity['losses'][0]:.6g} at the minimum",
            f"  data: {'none' if identity['data_sha256'] is None else 'sha256 '}"
            f"{(identity['data_sha256'] or '')[:12]}",
            f"  metric {_brief(identity['metric'])}, measure {_brief(identity['measure'])}, "
            f"method {identity['method']}, seed {identity['seed']}",
            f"  plan: engine {plan['engine']}, {plan['lanes']} lanes, {plan['threads']} threads, "
            f"blocks of {plan['block']} directions",
        ]
        for kept in self.thresholds:
            lines.append(
                f"  threshold {kept.threshold:.6g}: {kept.method or 'nothing decided yet'}"
            )
            if kept.blocks:
                gaps = (
                    ""
                    if kept.first_missing >= kept.directions
                    else (f", without gaps up to {kept.first_missing:,}")
                )
                lines.append(
                    f"    {kept.directions:,} directions in {kept.blocks:,} blocks{gaps}, "
                    f"{kept.n_loss:,} losses"
                )
            if kept.audited:
                lines.append(
                    "    looked for earlier crossings at n = "
                    + ", ".join(f"{n:,}" for n in kept.audited)
                )
            for chains in kept.chains:
                levels = ", ".join(map(str, chains.levels))
                lines.append(
                    f"    chains at n = {chains.n:,}: {chains.finished} runs finished"
                    + (f", others at level {levels}" if levels else "")
                )
        if not self.thresholds:
            lines.append("  nothing is done yet")
        if self.unfinished:
            lines.append(f"  {self.unfinished} files were being written when a run ended")
        lines += [f"  damaged, will be made again: {name}" for name in self.damaged]
        return "\n".join(lines)


def _threshold(value: float, place: Path, block: int, damaged: list[str]) -> Threshold:
    def pieces(below: Path) -> dict[str, Piece]:
        found = {}
        for file in sorted(below.glob("*" + SUFFIX)):
            try:
                found[file.name.removesuffix(SUFFIX)] = read_piece(file)
            except DamagedError:
                damaged.append(str(file.relative_to(place.parent)))
        return found

    decision = pieces(place).get("rays")
    method = None if decision is None else decision.info["method"]
    blocks = n_loss = directions = first_missing = 0
    whole = True
    for name, piece in pieces(place / "blocks").items():
        count = len(piece.arrays["log_radii"])
        whole = whole and int(name) * block == first_missing
        blocks, directions, n_loss = blocks + 1, directions + count, n_loss + piece.info["n_loss"]
        if whole:
            first_missing += count
    audited = []
    for folder in place.glob("audit-*"):
        for each in sorted(folder.iterdir()):
            pieces(each)
        audited.append(int(folder.name.removeprefix("audit-")))
    chains = []
    for folder in place.glob("chains-*"):
        finished = sum(len(pieces(each)) for each in sorted(folder.iterdir()) if each.is_dir())
        own = pieces(folder)
        if "start" in own:
            method = own["start"].info["method"]
        levels = tuple(
            len(piece.info["run"]["levels"])
            for name, piece in own.items()
            if name.startswith("level-")
        )
        chains.append(Chains(int(folder.name.removeprefix("chains-")), finished, levels))
    return Threshold(
        value,
        method,
        blocks,
        directions,
        first_missing,
        n_loss,
        tuple(sorted(audited)),
        tuple(sorted(chains, key=lambda kept: kept.n)),
    )


def _brief(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    others = [f"{name} {entry}" for name, entry in value.items() if name != "kind"]
    return " ".join([str(value.get("kind", "")), *others]).strip()
