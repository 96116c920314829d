"""A run that is killed, damaged, divided or resumed elsewhere is the run that nothing happened to.

Processes are forked, so that a killed one costs no more than its own work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from fastvol import _processes, _work
from fastvol.checkpoints import files
from fastvol.checkpoints.inspection import Contents

from . import bodies
from .runs import verdict

PLAN: dict[str, Any] = {
    "engine": "general",
    "chunk": 8,
    "lanes": 8,
    "keep_rows": True,
    "dtype": "float64",
    "threads": 1,
    "noise_threads": 1,
    "backend": "cpp",
    "block": 32,
    # One that has to be measured may be another for another n.
    "screening": "off",
}
_EXIT_SECONDS = 60.0
# Ranks that are killed are taken for dead after so long, before their first call after five times.
_RANK_PATIENCE = 4.0
# A process that takes longer hangs.
_LIMIT = 600.0
# Of a direction, in a run that resumes: 28 in the result, 8 in each of some vectors beside it.
_MOST_BYTES = 100.0


def run(short: bool) -> dict[str, Any]:
    """Kills, damage, processes."""
    return _judged(stages, short)


def run_cost(short: bool) -> dict[str, Any]:
    """What it costs to keep blocks, and to divide them; it wants quiet cores."""
    return _judged(_costs, short)


def run_soak(short: bool) -> dict[str, Any]:
    """Half an hour of interrupts."""
    return _judged(_soaked, short)


def _judged(parts: Callable[[bool], dict[str, Any]], short: bool) -> dict[str, Any]:
    # What is forked must find no threads of another's, which this process may have.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(parts, short).result()
    problems = [
        f"{name}: {problem}" for name, told in found.items() for problem in told.pop("problems")
    ]
    return verdict(found, problems)


def stages(short: bool) -> dict[str, Any]:
    """What each part found, with the seconds that it took."""
    chance = random.Random(0)
    sizes = [100_000, 300_000] if short else [1_000_000, 5_000_000, 10_000_000]
    return _each(
        {
            "kills_of_rays": lambda place: kills(rays, place, chance, 10 if short else 150),
            "kills_of_chains": lambda place: kills(chains, place, chance, 3 if short else 50),
            "damage": lambda place: damage(place, chance, 6 if short else 100),
            "world_sizes": world_sizes,
            "kills_of_a_rank": lambda place: rank_kills(
                place, chance, 2 if short else 50, 2500 if short else 6000
            ),
            "merge": merge,
            "memory": lambda place: memory(place, sizes),
        }
    )


def _costs(short: bool) -> dict[str, Any]:
    if short:
        # Beside other work, and judged loosely.
        return _each({"overhead": lambda place: overhead(place, 1, 0.05, 2.0)})
    return _each(
        {
            "overhead": lambda place: overhead(place, 9, 1.0, 1.02),
            "scaling": lambda place: scaling(place, 3, 1.0),
        }
    )


def _soaked(short: bool) -> dict[str, Any]:
    seconds = 2.0 if short else 1800.0
    return _each({"soak": lambda place: soak(place, random.Random(1), seconds)})


def _each(parts: Mapping[str, Callable[[Path], dict[str, Any]]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for name, part in parts.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                told = part(Path(folder))
            except Exception as error:
                # What the others found is worth an hour.
                traceback.print_exc()
                told = {"problems": [f"{type(error).__name__}: {error}"]}
        seconds = time.perf_counter() - began
        print(f"  {name}: {'; '.join(told['problems']) or 'fine'}, {seconds:.0f} s", flush=True)
        found[name] = {**told, "seconds_in_all": seconds}
    return found


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small network and the examples that it fits exactly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x = torch.randn(10, 2, dtype=torch.float64)
    return model, (x, model(x).detach())


def rays(folder: Path | None, **options: Any) -> fastvol.VolumeEstimate:
    """A run of independent rays, of some 60 pieces of work."""
    model, data = problem()
    settings = {"n": 1500, "increase": 1.0, "method": "radial", "plan": PLAN, **options}
    return fastvol.estimate(
        model, F.mse_loss, data=data, checkpoint=folder, progress=False, **settings
    )


def chains(folder: Path | None, **options: Any) -> fastvol.VolumeEstimate:
    """Three runs of chains."""
    # Every level, so that kills find some that are kept.
    _work._SNAPSHOT_PAUSE = 0.0
    body = bodies.ellipsoid(10, 1e3)
    settings = {"n": 300, "threshold": 1.0, "method": "annealed", "preconditioner": None, **options}
    return fastvol.estimate(
        body.model(), bodies.loss, checkpoint=folder, progress=False, plan=PLAN, **settings
    )


def told(result: fastvol.VolumeEstimate) -> dict[str, Any]:
    """What must not differ."""
    return {
        "log_radii": hashlib.sha256(result.log_radii.tobytes()).hexdigest(),
        "status": hashlib.sha256(result.status.tobytes()).hexdigest(),
        "log_volume": result.log_volume,
        "stderr": result.stderr,
        "n_loss": result.n_loss,
        "n_grad": result.n_grad,
    }


def kills(
    call: Callable[[Path], fastvol.VolumeEstimate], place: Path, chance: random.Random, count: int
) -> dict[str, Any]:
    """Kills a run ``count`` times: at any moment, within a write, and at once after the last."""
    expected, problems = told(call(place / "whole")), []
    if told(call(place / "whole")) != expected:
        problems.append("the finished run is another one when called again")
    began = time.perf_counter()
    with _counted_writes() as count_of_writes:
        call(place / "timed")
    seconds, most = time.perf_counter() - began, len(count_of_writes)
    done = finished = writes = unreadable = 0
    while done < count:
        folder = place / f"killed-{call.__name__}-{finished}"
        answer = place / "answer"
        while True:
            kind = chance.choice(["any", "any", "write", "at once"]) if done < count else "none"
            answer.unlink(missing_ok=True)
            write = chance.randint(1, most)
            child = os.fork()
            if child == 0:
                _child(lambda own=folder: call(own), answer, write, kind == "write")
            if kind in ("any", "at once"):
                time.sleep(chance.uniform(0.0, seconds if kind == "any" else 0.02 * seconds))
                os.kill(child, signal.SIGKILL)
            (code,) = _wait([child], _LIMIT)
            if answer.exists():
                break
            if code == -signal.SIGKILL:
                done += 1
                writes += kind == "write"
                unreadable += not _readable(folder)
            else:
                problems.append(f"a process ended with exit code {code}")
                break
        finished += 1
        if answer.exists() and json.loads(answer.read_text()) != expected:
            problems.append(f"resumed run {finished} is another one")
    if unreadable:
        problems.append(f"{unreadable} folders could not be read")
    return {
        "kills": done,
        "within_a_write": writes,
        "writes_of_a_run": most,
        "runs_finished": finished,
        "unreadable": unreadable,
        "seconds_of_a_run": seconds,
        "problems": problems,
    }


def _child(
    call: Callable[[], fastvol.VolumeEstimate], answer: Path, write: int, dies: bool
) -> None:
    """Makes a call, writes down what it gave, and ends the process."""
    code = 1
    try:
        if dies:
            _die_within_write(write)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        aside = answer.with_suffix(".aside")
        with warnings.catch_warnings():
            warnings.simplefilter("error", fastvol.FastvolWarning)
            aside.write_text(json.dumps(told(call())))
        aside.replace(answer)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


@contextlib.contextmanager
def _counted_writes() -> Iterator[list[int]]:
    """The files that are written meanwhile, an entry for each."""
    real, seen = os.fsync, []

    def fsync(descriptor: int) -> None:
        seen.append(descriptor)
        real(descriptor)

    files.os.fsync = fsync
    try:
        yield seen
    finally:
        files.os.fsync = real


def _die_within_write(number: int) -> None:
    """Has this process killed in the midst of a write, or between it and the renaming."""
    real, seen = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)
        if seen == number - 1 and number % 2:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.fsync = fsync


def _readable(folder: Path) -> bool:
    """Whether a folder is one, with nothing damaged; or holds nothing yet."""
    if not (folder / "manifest.json").exists():
        return not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir())
    try:
        return not Contents.of(folder).damaged
    except fastvol.FastvolError:
        return False


def damage(place: Path, chance: random.Random, count: int) -> dict[str, Any]:
    """Flips a bit of a file, or cuts it short: named, and made again."""
    folder = place / "damaged"
    expected, problems = told(rays(folder)), []
    # All but the decision, which may hold no arrays.
    pieces = sorted(folder.rglob("0*.safetensors"))
    for i in range(count):
        victim = chance.choice(pieces)
        data = bytearray(victim.read_bytes())
        if i % 2:
            del data[chance.randrange(len(data)) :]
        else:
            # Where the numbers are; the header has spaces that mean nothing.
            first = 8 + int.from_bytes(data[:8], "little")
            data[chance.randrange(first, len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mended = told(rays(folder))
        if not any(f"{victim.name} is damaged" in str(warning.message) for warning in caught):
            problems.append(f"damage {i} to {victim.name} was not named")
        if mended != expected or Contents.of(folder).damaged:
            problems.append(f"damage {i} to {victim.name} was not mended")
    return {"files_damaged": count, "problems": problems}


def _ranks(
    size: int,
    call: Callable[[], fastvol.VolumeEstimate],
    answers: Path,
    *,
    patience: float = 30.0,
) -> list[int]:
    """Forks the processes of a group, which all come at once or never."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost",
                MASTER_PORT=str(port),
            )  # fmt: skip
            _processes._BEAT, _processes._PATIENCE = patience / 10, patience
            # In a real run some may come minutes after the first.
            _processes._ROLL_CALL = 5 * patience
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            _child(call, answers / f"rank-{rank}", 0, False)
        children.append(child)
    return children


def _wait(children: Sequence[int], limit: float) -> list[int | None]:
    """Exit statuses; ``None``, and killed, where a process does not end in time."""
    deadline = time.monotonic() + limit
    codes: list[int | None] = []
    for child in children:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status) if ended else None)
    return codes


def world_sizes(place: Path) -> dict[str, Any]:
    """1, 2 and 4 processes; and 2 that go on with what 4 have begun."""
    problems = []
    for name, call in (("rays", rays), ("chains", chains)):
        expected = told(call(None))
        for size in (2, 4):
            answers = place / f"{name}-{size}"
            answers.mkdir()
            codes = _wait(_ranks(size, lambda call=call: call(None), answers), _LIMIT)
            found = [json.loads(path.read_text()) for path in sorted(answers.iterdir())]
            if codes != [0] * size or found != [expected] * size:
                problems.append(f"{name} by {size} processes are others (exit codes {codes})")
    folder = place / "sizes"
    for size, n in ((4, 700), (2, 1100)):
        answers = place / f"sizes-{size}"
        answers.mkdir()
        codes = _wait(_ranks(size, lambda n=n: rays(folder, n=n), answers), _LIMIT)
        if codes != [0] * size:
            problems.append(f"{size} processes ended with {codes}")
    if told(rays(folder)) != told(rays(None)):
        problems.append("4, then 2, then 1 process gave another run")
    return {"sizes": [1, 2, 4], "problems": problems}


def rank_kills(place: Path, chance: random.Random, count: int, n: int) -> dict[str, Any]:
    """Kills one of four ranks, any of them, at any moment; the next group goes on."""
    expected, problems, slowest = told(rays(None, n=n)), [], 0.0
    began = time.perf_counter()
    answers = place / "timed"
    answers.mkdir()
    codes = _wait(_ranks(4, lambda: rays(None, n=n), answers), _LIMIT)
    seconds = time.perf_counter() - began
    done = finished = 0
    while done < count:
        folder = place / f"ranks-{finished}"
        answers = place / f"ranks-answers-{finished}"
        answers.mkdir()
        size = 4
        while True:
            children = _ranks(
                size, lambda own=folder: rays(own, n=n), answers, patience=_RANK_PATIENCE
            )
            if done < count:
                time.sleep(chance.uniform(0.0, seconds))
                victim = chance.randrange(size)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(children[victim], signal.SIGKILL)
                killed = time.monotonic()
                codes = _wait(children, _EXIT_SECONDS)
                if codes[victim] != -signal.SIGKILL:
                    break
                done += 1
                slowest = max(slowest, time.monotonic() - killed)
                others = codes[:victim] + codes[victim + 1 :]
                # Those that had the whole result before the death may end well.
                if None in others or (0 in others and len(list(answers.iterdir())) == 0):
                    problems.append(f"kill {done} of rank {victim}: the others ended with {others}")
                if not _readable(folder):
                    problems.append(f"kill {done}: the folder cannot be read")
                size = chance.choice([2, 4])
            else:
                codes = _wait(children, _LIMIT)
                break
        finished += 1
        # Whoever gave an answer gave the right one.
        for path in answers.iterdir():
            if json.loads(path.read_text()) != expected:
                problems.append(f"group {finished}: another run")
        if told(rays(folder, n=n)) != expected:
            problems.append(f"group {finished}: another run is in its folder")
    return {
        "kills": done,
        "groups_finished": finished,
        "patience_seconds": _RANK_PATIENCE,
        "roll_call_seconds": 5 * _RANK_PATIENCE,
        "slowest_exit_seconds": slowest,
        "problems": problems,
    }


def soak(place: Path, chance: random.Random, seconds: float) -> dict[str, Any]:
    """Interrupts and resumes one run after the other: memory and file descriptors stay flat."""
    expected, problems = told(rays(None)), []
    began = time.perf_counter()
    interrupts = finished = 0
    settled: tuple[int, int] | None = None
    while time.perf_counter() - began < seconds:
        folder = place / f"soak-{finished}"
        while True:
            limit = chance.randrange(32, 2500)

            def stop(progress: fastvol.Progress, limit: int = limit) -> None:
                if progress.n_done >= limit:
                    raise KeyboardInterrupt

            try:
                result = rays(folder, callbacks=[stop])
                break
            except KeyboardInterrupt:
                interrupts += 1
        if told(result) != expected:
            problems.append(f"run {finished} is another one")
        shutil.rmtree(folder)
        finished += 1
        if settled is None and finished == 3:
            settled = _held()
    descriptors, memory = _held()
    first = settled or (descriptors, memory)
    if descriptors > first[0]:
        problems.append(f"file descriptors grew from {first[0]} to {descriptors}")
    if memory > first[1] + (64 << 20):
        problems.append(f"memory grew from {first[1] >> 20} to {memory >> 20} MiB")
    return {
        "seconds": seconds,
        "interrupts": interrupts,
        "runs_finished": finished,
        "file_descriptors": [first[0], descriptors],
        "resident_mib": [first[1] >> 20, memory >> 20],
        "problems": problems,
    }


def _held() -> tuple[int, int]:
    """Open file descriptors, and resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * resource.getpagesize()


def merge(place: Path, count: int = 1000, block: int = 1000) -> dict[str, Any]:
    """What it takes to make a result of a million directions in a thousand blocks."""
    plan = {**PLAN, "block": block}
    call: dict[str, Any] = {"plan": plan, "first_crossing": True}
    folder = place / "merged"
    rays(folder, n=block, **call)
    blocks = next(folder.glob("threshold-*/blocks"))
    first = files.read_piece(blocks / "00000000.safetensors")
    for i in range(1, count):
        info = {**first.info, "first": i * block}
        data = files.Piece(first.arrays, info).to_bytes()
        (blocks / f"{i:08d}.safetensors").write_bytes(data)

    def seconds(n: int) -> float:
        began = time.perf_counter()
        rays(folder, n=n, **call)
        return time.perf_counter() - began

    few, many = seconds(block), seconds(count * block)
    problems = [] if many - few < 2.0 else [f"{many - few:.2f} s"]
    return {
        "blocks": count,
        "directions": count * block,
        "seconds": many - few,
        "problems": problems,
    }


def memory(place: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """What a direction takes in runs that go on, each in a fresh process, with the one before."""
    runs = []
    for n in sizes:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.proofs.resumed", str(place / "large"), str(n)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * _LIMIT,
        )
        if done.returncode:
            return {"runs": runs, "problems": [f"of {n} directions: {done.stderr}"]}
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, last = runs[0], runs[-1]
    each = (last["bytes"] - first["bytes"]) / (last["n"] - first["n"])
    problems = [] if each <= _MOST_BYTES else [f"{each:.0f} bytes a direction"]
    return {"runs": runs, "bytes_a_direction": each, "problems": problems}


def overhead(place: Path, rounds: int, share: float, most: float) -> dict[str, Any]:
    """What keeping blocks costs, of the size that a run chooses: at 17 parameters, and at 2,410.

    Args:
        place: a folder. rounds: of runs with and without.
        share: of the directions. most: ratio of their times.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        x = torch.randn(300, 64)
    y = model(x).argmax(dim=1)
    tiny = {**PLAN, "lanes": 64, "chunk": 64}
    small = {**PLAN, "dtype": "float32", "lanes": 8, "chunk": 8}

    def larger(folder: Path | None, plan: dict[str, Any] | None) -> fastvol.VolumeEstimate:
        return fastvol.estimate(
            model, F.cross_entropy, data=(x, y), n=round(8192 * share), method="radial", rtol=1e-3,
            plan=plan, progress=False, checkpoint=folder,
        )  # fmt: skip

    def smaller(folder: Path | None, plan: dict[str, Any] | None) -> fastvol.VolumeEstimate:
        return rays(folder, n=round(81_920 * share), plan=plan)

    calls: dict[str, tuple[Callable[..., fastvol.VolumeEstimate], dict[str, Any]]] = {
        "tiny": (smaller, tiny),
        "small": (larger, small),
    }
    found: dict[str, Any] = {}
    for name, (call, plan) in calls.items():
        plan = {**plan, "block": call(None, None).plan["block"]}
        times: dict[bool, list[float]] = {False: [], True: []}
        busy: dict[bool, list[float]] = {False: [], True: []}
        for i in range(rounds):
            for kept in (False, True):
                began, worked = time.perf_counter(), time.process_time()
                call(place / f"overhead-{name}-{i}" if kept else None, plan)
                times[kept].append(time.perf_counter() - began)
                busy[kept].append(time.process_time() - worked)
        found[name] = {
            "block": plan["block"],
            "without": times[False],
            "kept": times[True],
            "ratio": min(times[True]) / min(times[False]),
            "ratio_of_processor_time": min(busy[True]) / min(busy[False]),
        }
    problems = [
        f"{name}: {told['ratio'] - 1:.1%}" for name, told in found.items() if told["ratio"] > most
    ]
    return {**found, "problems": problems}


def scaling(place: Path, rounds: int, least: float) -> dict[str, Any]:
    """Two processes of one thread against one process of two, on a network of MNIST's size.

    Args:
        place: a folder. rounds: of both. least: ratio of their times.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        x = torch.randn(600, 784)
    y = model(x).argmax(dim=1)
    plan = {**PLAN, "dtype": "float32", "chunk": 1, "block": 64}

    def call(threads: int) -> fastvol.VolumeEstimate:
        own = {**plan, "threads": threads, "noise_threads": threads}
        return fastvol.estimate(
            model,
            F.cross_entropy,
            data=(x, y),
            n=2048,
            metric="filter",
            method="radial",
            plan=own,
        )

    def seconds(size: int, threads: int) -> float:
        answers = place / f"scaling-{size}-{time.monotonic_ns()}"
        answers.mkdir()
        began = time.perf_counter()
        codes = _wait(_ranks(size, lambda: call(threads), answers), 2 * _LIMIT)
        if codes != [0] * size:
            raise RuntimeError(f"processes ended with {codes}")
        return time.perf_counter() - began

    two, one = [], []
    for _ in range(rounds):
        two.append(seconds(2, 1))
        one.append(seconds(1, 2))
    ratio = float(np.median(np.array(one) / np.array(two)))
    problems = [] if ratio >= least else [f"two processes take {1 / ratio:.2f} times as long"]
    return {"one_process": one, "two_processes": two, "ratio": ratio, "problems": problems}
