"""Many processes or devices are one run: the same numbers, and nobody waits for the dead."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest
import torch
import torch.distributed as dist

import fastvol
from fastvol import FastvolError, _processes, _tasks
from fastvol._processes import Members, Team
from fastvol._tasks import Tasks
from fastvol.checkpoints.inspection import Contents

ROOT = Path(__file__).parents[1]
CALLS = str(Path(__file__).with_name("calls.py"))

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without distributed")


def started(
    size: int, out: Path, names: Sequence[str], **environment: str
) -> list[subprocess.Popen[str]]:
    """Processes as a scheduler starts them, with the environment that torchrun prepares."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *sys.path])
    processes = []
    for rank in range(size):
        own = {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, CALLS, str(out), *names],
                cwd=ROOT,
                env={**os.environ, **own},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return processes


def finished(processes: list[subprocess.Popen[str]], timeout: float = 120.0) -> list[str]:
    """Their output, once all have ended."""
    deadline = time.monotonic() + timeout
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=deadline - time.monotonic())[0])
    finally:
        for process in processes:
            process.kill()
    return outputs


def found(out: Path, name: str, size: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(size)]


def plain(result: fastvol.VolumeEstimate) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(json.dumps(calls.told(result)))
    return told


def test_four_processes_give_what_one_does(tmp_path: Path) -> None:
    names = [
        "alone", "kept", "unseen", "law", "chains", "measured", "other seeds", "one fails", "alone",
    ]  # fmt: skip
    processes = started(4, tmp_path, names)
    outputs = finished(processes)
    assert [process.returncode for process in processes] == [0] * 4, outputs
    expected = {
        "alone": calls.rays(),
        "kept": calls.rays(),
        "unseen": calls.rays(),
        "law": calls.rays(method="preconditioned", preconditioner="hessian"),
        "chains": calls.chains(),
    }
    for name, result in expected.items():
        assert found(tmp_path, name, 4) == [plain(result)] * 4, name
    measured = found(tmp_path, "measured", 4)
    assert measured == [measured[0]] * 4
    for name, words in (("other seeds", "seed is "), ("one fails", "the cat sat on it")):
        for told in found(tmp_path, name, 4):
            assert words in told["error"]
    # Another number of processes goes on with what four have done.
    kept = Contents.of(tmp_path / "run")
    assert kept.thresholds[0].directions == 200
    assert not kept.damaged
    # Rank 0 has written what those made that do not see its folder.
    assert Contents.of(tmp_path / "led").thresholds[0].directions == 200
    more = calls.rays(checkpoint=tmp_path / "run", n=260)
    assert plain(more) == plain(calls.rays(n=260))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_all_and_costs_nothing(victim: int, tmp_path: Path) -> None:
    processes = started(3, tmp_path, [f"rank {victim} 700"])
    processes[victim].wait(120)
    died = time.monotonic()
    outputs = finished(processes)
    assert time.monotonic() - died < 55
    codes = [process.returncode for process in processes]
    assert codes[victim] == -signal.SIGKILL
    assert all(code != 0 for code in codes), outputs
    others = "".join(text for rank, text in enumerate(outputs) if rank != victim)
    assert "the same call continues" in others
    kept = Contents.of(tmp_path / "run").thresholds[0]
    assert kept.blocks > 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("0*.safetensors")}
    n = 16 * (kept.blocks + 5)
    resumed = calls.rays(checkpoint=tmp_path / "run", n=n)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    if victim:
        assert plain(resumed) == plain(calls.rays(n=n))


@functools.cache
def divided_alone(name: str) -> fastvol.VolumeEstimate:
    """One of the divided runs, in this process."""
    return calls.divided(name)


@pytest.mark.parametrize("size", [2, 4])
def test_the_chains_of_one_run_are_divided(size: int, tmp_path: Path) -> None:
    # Four of them have three kinds: there may be no more than two cores.
    names = list(calls.DIVIDED) if size == 2 else ["annealed", "replicated", "learned"]
    processes = started(size, tmp_path, names)
    outputs = finished(processes)
    assert [process.returncode for process in processes] == [0] * size, outputs
    for name in names:
        alone = divided_alone(name)
        assert alone.plan["processes"] == 4
        assert found(tmp_path, name, size) == [plain(alone)] * size, name
        if isinstance(alone, fastvol.PathEstimate):
            parts = found(tmp_path, f"{name}, parts", size)
            given, taken = (sum(own[kind] for own in parts) for kind in ("given", "taken"))
            assert given == taken
            assert taken > 20, name
    # In several parts it is another run than in one, as good as that.
    whole = calls.divided("annealed", plan={**calls.PLAN, "chunk": 4, "lanes": 16})
    several = divided_alone("annealed")
    assert whole.plan["processes"] == 1
    np.testing.assert_allclose(several.log_volume, whole.log_volume, atol=3 * whole.stderr)


def test_a_plan_is_made_for_as_many_processes_as_there_are(tmp_path: Path) -> None:
    processes = started(3, tmp_path, ["planned"])
    outputs = finished(processes)
    assert [process.returncode for process in processes] == [0] * 3, outputs
    told = found(tmp_path, "planned", 3)
    assert told[0]["plan"]["processes"] == 3
    alone = calls.divided("annealed", n=60, plan=told[0]["plan"])
    assert told == [plain(alone)] * 3


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "error"])
def test_who_ends_while_it_helps_ends_all(how: str, tmp_path: Path) -> None:
    processes = started(3, tmp_path, [f"helper 1 150 {how}"])
    outputs = finished(processes)
    codes = [process.returncode for process in processes]
    assert all(code != 0 for code in codes), outputs
    words = {"SIGKILL": "rank 1 has not been heard of", "SIGTERM": "rank 1: _Terminated"}
    for other in (outputs[0], outputs[2]):
        assert words.get(how, "the cat sat on it") in other
    kept = Contents.of(tmp_path / "run").thresholds[0].chains[0]
    assert kept.levels or kept.finished
    # Another number of processes goes on, and then one alone finds it done.
    again = finished(processes := started(2, tmp_path, ["divided, kept"]))
    assert [process.returncode for process in processes] == [0, 0], again
    whole = plain(calls.divided("annealed", n=250))
    assert found(tmp_path, "divided, kept", 2) == [whole] * 2
    assert plain(calls.divided("annealed", n=250, checkpoint=tmp_path / "run")) == whole


@pytest.mark.parametrize(("how", "words"), [("is killed", "not been heard of"), ("ends", "ended")])
def test_a_death_between_two_calls(how: str, words: str, tmp_path: Path) -> None:
    began = time.monotonic()
    processes = started(3, tmp_path, ["alone", f"1 {how}", "kept"])
    outputs = finished(processes)
    assert time.monotonic() - began < 55
    codes = [process.returncode for process in processes]
    assert codes == [0, -signal.SIGKILL if how == "is killed" else 0, 0], outputs
    errors = [json.loads((tmp_path / f"kept-{rank}.json").read_text())["error"] for rank in (0, 2)]
    # The other one may see rank 0 end before.
    assert "rank 1 " in errors[0]
    assert words in errors[0]


def torchrun(out: Path, names: Sequence[str], *options: str, **environment: str) -> str:
    """Two processes that the launcher starts; what they said."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options,
         CALLS, str(out), *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torchrun_and_an_open_group(tmp_path: Path) -> None:
    torchrun(tmp_path, ["kept"], "--standalone", FASTVOL_TEST_INIT="env://")
    assert found(tmp_path, "kept", 2) == [plain(calls.rays())] * 2


# PyTorch's own groups find the addresses of the dead in the store that the launcher keeps.
@pytest.mark.parametrize(
    "environment",
    [{}, {"FASTVOL_TEST_INIT": "env://", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}],
    ids=["launcher", "group"],
)
def test_a_launcher_that_starts_anew_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    said = torchrun(
        tmp_path, ["alone", "restarted"], "--standalone", "--max-restarts=2", **environment
    )
    assert "exitcode: -9" in said
    assert found(tmp_path, "restarted", 2) == [plain(calls.rays(n=2000))] * 2
    written = [path.stat().st_mtime for path in (tmp_path / "run").rglob("blocks/*.safetensors")]
    # Those of the first attempt, and of the second, which begins with a call of its own.
    second = (tmp_path / "alone-0.json").stat().st_mtime
    assert min(written) < second < max(written)


def test_one_of_several_processes_may_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plain(calls.rays())
    # Nobody answers there.
    prepared = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in prepared.items():
        monkeypatch.setenv(name, value)
    assert plain(calls.rays(distributed=False)) == whole


@pytest.mark.parametrize("options", [{}, {"antithetic": True}])
def test_several_devices_of_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    whole = calls.rays(**options)
    both = calls.rays(device=["cpu", "cpu", "cpu"], checkpoint=tmp_path, **options)
    assert plain(both) == plain(whole)
    assert both.provenance["devices"] == ["cpu", "cpu", "cpu"]
    assert plain(calls.rays(device="all", checkpoint=tmp_path, **options)) == plain(whole)


def test_a_device_that_fails_ends_the_others() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.copies = 0
            self.seen = 0

        def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
            self.copies += 1
            copy = Loss()
            copy.copies = -1
            return copy

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            if self.copies < 0 and self.seen > 40:
                raise RuntimeError("a device fell off the bus")
            return (output - target).square().mean()

    threads = threading.active_count()
    with pytest.raises(FastvolError, match="fell off the bus"):
        calls.rays(device=["cpu", "cpu"], loss_fn=Loss())
    assert threading.active_count() == threads


@pytest.mark.parametrize("device", [["cpu", "meta"], ["meta"], [], ["cpu", "nowhere"], [None]])
def test_devices_that_do_not_do(device: Any) -> None:
    with pytest.raises(ValueError, match="device"):
        calls.rays(device=device)


class Crew:
    """Some members of a team, each on a thread, over a store of this process."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_processes, "_BEAT", 0.05)
        monkeypatch.setattr(_processes, "_PATIENCE", 0.5)
        store = dist.HashStore()
        store.set_timeout(datetime.timedelta(seconds=5))
        self.results: dict[int, Any] = {}
        self._size, self.store = size, store

    def each(self, work: Any) -> dict[int, Any]:
        def run(rank: int) -> None:
            members = None
            try:
                members = Members(self.store, rank, self._size)
                self.results[rank] = work(Team(members))
            except BaseException as error:
                self.results[rank] = error
            finally:
                if members is not None:
                    members.leave()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return self.results


def claims(team: Team, job: str) -> Iterator[int]:
    while True:
        yield team.claim(job)


def test_messages_of_any_length_and_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processes, "_CHUNK", 1000)
    messages = [b"", b"x", bytes(999), bytes(range(250)) * 4, np.arange(5000.0).tobytes()]

    def work(team: Team) -> Any:
        heard = []
        for message in messages:
            if team.leads:
                team.publish(message)
            else:
                heard.append(team.receive())
        job = team.job()
        claimed = list(itertools.takewhile(lambda number: number < 50, claims(team, job)))
        if team.leads:
            sent = []
            while len(sent) < team.size - 1:
                for rank in range(1, team.size):
                    data = team.collect(job, 1000 + rank)
                    if data is not None:
                        sent.append((rank, data))
            assert team.collect(job, 1001) is None
            heard = sorted(sent)
        else:
            team.send(job, 1000 + team.rank, bytes([team.rank]) * 3000)
        team.close(None)
        return heard, claimed

    results = Crew(3, monkeypatch).each(work)
    assert results[1][0] == results[2][0] == messages
    assert results[0][0] == [(1, b"\1" * 3000), (2, b"\2" * 3000)]
    assert sorted(number for _, claimed in results.values() for number in claimed) == list(
        range(50)
    )


@pytest.mark.parametrize("near", [True, False])
def test_parts_are_evaluated_once_and_leave_nothing(
    near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not near:
        machines = (f"machine-{i}" for i in itertools.count())
        monkeypatch.setattr(_tasks, "_machine", lambda: next(machines))
    monkeypatch.setattr(_processes, "_CHUNK", 100)
    crew, rounds = Crew(4, monkeypatch), 20
    # Nobody falls silent here.
    monkeypatch.setattr(_processes, "_PATIENCE", 30.0)
    evaluated: list[bytes] = []
    sizes: list[int] = []

    def answer(data: bytes) -> bytes:
        time.sleep(0.001)
        evaluated.append(data)
        return data[::-1] * 30

    def work(team: Team) -> Any:
        tasks = Tasks(team, answer)
        team.meanwhile = tasks.help
        # Two have work, at the same time; the others wait for a message, or for the end.
        if team.rank in (0, 2):
            for i in range(rounds):
                parts = [bytes([team.rank, i, number]) for number in range(6)]
                posting = tasks.post(parts[1:])
                own = [0]
                time.sleep(0.001)
                while (part := posting.claim()) is not None:
                    own.append(part)
                answers = posting.answers()
                assert sorted([*own, *answers]) == list(range(6))
                for number, data in answers.items():
                    assert data == parts[number][::-1] * 30
                if team.rank == 0:
                    sizes.append(crew.store.num_keys())
        if team.leads:
            team.publish(b"over")
        else:
            team.receive()
        if team.rank in (0, 2):
            assert tasks._near is near
        team.meanwhile = None
        tasks.close()
        team.close(None)
        return tasks.given, tasks.taken

    results = crew.each(work)
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [name for name in files if "fastvol" in name]
    assert all(isinstance(told, tuple) for told in results.values()), results
    assert len(set(evaluated)) == len(evaluated)
    given, taken = (sum(counts) for counts in zip(*results.values(), strict=True))
    assert given == taken == len(evaluated)
    assert taken > rounds
    # Two postings may be open, of five parts and their answers in two chunks each.
    assert max(sizes[3:]) < sizes[2] + 60


def test_a_posting_that_is_over_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(2, monkeypatch)

    def work(team: Team) -> Any:
        tasks = Tasks(team, bytes)
        if team.leads:
            posting = tasks.post([b"x", b"y"])
            assert [posting.claim(), posting.claim(), posting.claim()] == [1, 2, None]
            assert posting.answers() == {}
            team.publish(b"now")
            team._wait("looked")
            with team.line():
                return [
                    name for name in ("1", "2", "next") if team.store.check([f"task/0.1/{name}"])
                ]
        team.receive()
        waits = [tasks.help(), tasks.help()]
        with team.line():
            team.store.set("looked", "")
        return waits, tasks.taken

    results = crew.each(work)
    waits, taken = results[1]
    assert min(waits) > 0
    assert taken == 0
    assert results[0] == []


def test_the_faster_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(_tasks.time, "monotonic", lambda: clock[0])

    def run(tasks: Tasks, alone: float, divided: float, count: int) -> float:
        """Share of the operations that are divided."""
        ways = []
        for _ in range(count):
            ways.append(tasks.pays("search 2 0"))
            seconds = divided if ways[-1] else alone
            clock[0] += seconds
            tasks.note("search 2 0", ways[-1], seconds, 32)
        return float(np.mean(ways))

    # Of a team of one, which the clock does not hurry.
    members = Members(dist.HashStore(), 0, 1)
    tasks = Tasks(Team(members), bytes)
    assert [run(tasks, 0.01, 0.02, 1), run(tasks, 0.01, 0.02, 1)] == [0.0, 1.0]
    # A per cent of the time goes into trying the other way.
    assert 0.0 < run(tasks, 0.01, 0.02, 5000) < 0.012
    assert tasks.pays("losses 2 0") is False
    # Now the others have time.
    assert run(tasks, 0.01, 0.006, 5000) > 0.95
    assert run(tasks, 0.01, 0.006, 5000) < 1.0
    tasks.possible = False
    assert not tasks.pays("search 2 0")
    tasks.close()
    members.leave()


def test_a_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(1, monkeypatch)

    def work(team: Team) -> str:
        monkeypatch.setattr(_processes, "_SLOWEST_POLL", 0.0)
        team.pause(100_000)
        return "over"

    assert crew.each(work) == {0: "over"}


def test_who_falls_silent_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(team: Team) -> None:
        if team.rank == 1:
            # Its thread ends, and it says nothing more.
            team._members._ending.set()
            return
        team.close(None) if team.leads else team.receive()

    results = Crew(3, monkeypatch).each(work)
    for rank in (0, 2):
        assert isinstance(results[rank], FastvolError)
        assert "rank 1 has not been heard of" in str(results[rank])


def test_who_comes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a dead one; the others are heard meanwhile."""
    crew = Crew(3, monkeypatch)
    named = Members._named

    def late(self: Members, store: Any, deadline: float) -> str:
        if self.rank == 2:
            time.sleep(1.5)
        return named(self, store, deadline)

    monkeypatch.setattr(Members, "_named", late)

    def work(team: Team) -> str:
        team.close(None)
        return "done"

    assert crew.each(work) == dict.fromkeys(range(3), "done")


def test_what_earlier_processes_left_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(2, monkeypatch)

    def ends(team: Team) -> None:
        job = team.job()
        team.claim(job)
        if team.leads:
            team.publish(b"stale")
        team.close(RuntimeError("the first attempt"))

    def works(team: Team) -> Any:
        first = team.claim(team.job()) if team.leads else 0
        if team.leads:
            team.publish(b"fresh")
        heard = b"" if team.leads else team.receive()
        team.close(None)
        return first, heard

    assert crew.each(ends) == {0: None, 1: None}
    assert crew.each(works) == {0: (0, b""), 1: (0, b"fresh")}


def test_who_never_calls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processes, "_ROLL_CALL", 0.2)
    with pytest.raises(FastvolError, match="rank 1 of 2 has not made the same call"):
        Members(dist.HashStore(), 0, 2)


def test_without_others_there_is_no_team() -> None:
    with _processes.team() as alone:
        assert alone is None
