"""The calls that the tests of many processes make: ``python tests/calls.py OUT SCENARIO …``.

Each process writes what its scenarios gave to ``OUT/SCENARIO-RANK.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from benchmarks.proofs import bodies
from fastvol import _processes, _tasks, _work

# Seconds of a slow loss.
PAUSE = 0.0005
PLAN: dict[str, Any] = {
    "engine": "general",
    "chunk": 4,
    "lanes": 4,
    "keep_rows": True,
    "dtype": "float64",
    "threads": 1,
    "noise_threads": 1,
    "backend": "cpp",
    "block": 16,
    "screening": "off",
}


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x = torch.randn(10, 2, dtype=torch.float64)
    return model, (x, model(x).detach())


def rays(**options: Any) -> fastvol.VolumeEstimate:
    model, data = problem()
    settings = {
        "n": 200, "increase": 1.0, "method": "radial", "plan": PLAN, "progress": False, **options,
    }  # fmt: skip
    loss_fn = settings.pop("loss_fn", F.mse_loss)
    result: fastvol.VolumeEstimate = fastvol.estimate(model, loss_fn, data=data, **settings)
    return result


def chains(**options: Any) -> fastvol.VolumeEstimate:
    settings = {
        "n": 250, "threshold": 1.0, "method": "annealed", "progress": False, "replicates": 3,
        "plan": {**PLAN, "chunk": 16, "lanes": 16}, **options,
    }  # fmt: skip
    body = bodies.ellipsoid(10, 1e3)
    result: fastvol.VolumeEstimate = fastvol.estimate(body.model(), bodies.loss, **settings)
    return result


# Runs of chains that are divided for four processes, whoever they are.
DIVIDED: dict[str, dict[str, Any]] = {
    "annealed": {"replicates": 1},
    "replicated": {"replicates": 3},
    "splitting": {"method": "splitting", "measure": fastvol.Lebesgue(0.5), "replicates": 1},
    "slices": {"gradients": False, "n": 100, "replicates": 1},
    "learned": {"preconditioner": "auto", "n": 600, "replicates": 1},
    "given law": {"preconditioner": "hessian", "measure": fastvol.Gaussian(0.7, "origin")},
    "boundary": {"method": "preconditioned", "preconditioner": "boundary"},
}


class BodyLoss:
    """The loss of a body; slow enough for others to come in, where it is asked to be."""

    def __init__(self, *, gradients: bool = True, pause: float = 0.0) -> None:
        self._gradients, self._pause = gradients, pause
        self.__qualname__ = "value"

    def __call__(self, model: nn.Module) -> Any:
        if self._pause:
            time.sleep(self._pause)
        value = bodies.loss(model)
        return value if self._gradients else float(value)


def divided(name: str, *, pause: float = 0.0, **options: Any) -> fastvol.VolumeEstimate:
    """One of :data:`DIVIDED`."""
    settings = {**DIVIDED[name], **options}
    gradients = settings.pop("gradients", True)
    chunk = 4 if gradients else 1
    loss = settings.pop("loss_fn", BodyLoss(gradients=gradients, pause=pause))
    body = bodies.ellipsoid(10, 1e3)
    plan = {**PLAN, "chunk": chunk, "lanes": 16, "processes": 4}
    settings = {
        "n": 250, "threshold": 1.0, "method": "annealed", "progress": False, "preconditioner": None,
        "plan": plan, **settings,
    }  # fmt: skip
    result: fastvol.VolumeEstimate
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no gradient")
        result = fastvol.estimate(body.model(), loss, **settings)
    return result


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Dying:
    """A loss that kills its process after so many calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.__qualname__ = "mse_loss"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.mse_loss(output, target)


class DyingBody(BodyLoss):
    """The loss of a body that ends its process after so many calls, by a signal or an error."""

    def __init__(self, calls: int, how: str) -> None:
        super().__init__(pause=PAUSE)
        self.calls, self.how = calls, how

    def __call__(self, model: nn.Module) -> Any:
        self.calls -= 1
        if self.calls == 0:
            if self.how == "error":
                raise RuntimeError("the cat sat on it")
            os.kill(os.getpid(), getattr(signal, self.how))
        return super().__call__(model)


def scenario(name: str, folder: Path) -> fastvol.VolumeEstimate:
    """One call, by name."""
    if name == "alone":
        return rays()
    if name == "kept":
        return rays(checkpoint=folder)
    if name == "unseen":
        return rays(checkpoint=folder.with_name("led") if rank() == 0 else "/no/such/place/led")
    if name == "law":
        return rays(method="preconditioned", preconditioner="hessian")
    if name == "measured":
        return rays(plan=None, n=100)
    if name == "chains":
        return chains()
    if name == "other seeds":
        return rays(seed=rank())
    if name == "one fails":
        return rays(loss_fn=F.mse_loss if rank() == 0 else Failing())
    if name == "restarted":
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        dies = first and rank() == 1
        return rays(checkpoint=folder, n=2000, loss_fn=Dying(100) if dies else F.mse_loss)
    if name in DIVIDED:
        return divided(name, pause=PAUSE)
    if name == "planned":
        # A trace would leave the pause out.
        return divided("annealed", pause=3 * PAUSE, n=60, plan=None, engine="general")
    if name == "divided, kept":
        return divided("annealed", pause=PAUSE, n=250, checkpoint=folder)
    if name.startswith("helper "):
        _, victim, calls, how = name.split()
        dies = rank() == int(victim)
        own = {"loss_fn": DyingBody(int(calls), how)} if dies else {"pause": PAUSE}
        return divided("annealed", n=250, checkpoint=folder, **own)
    if name.startswith("rank "):
        _, victim, calls = name.split()
        loss = Dying(int(calls)) if rank() == int(victim) else F.mse_loss
        return rays(checkpoint=folder, n=50_000, loss_fn=loss)
    raise ValueError(name)


class Failing:
    """A loss that raises after some calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.__qualname__ = "mse_loss"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 30:
            raise RuntimeError("the cat sat on it")
        return F.mse_loss(output, target)


def told(result: fastvol.VolumeEstimate) -> dict[str, Any]:
    """What has to be the same everywhere."""
    return {
        "log_radii": hashlib.sha256(result.log_radii.tobytes()).hexdigest(),
        "log_volume": result.log_volume,
        "stderr": result.stderr,
        "n_loss": result.n_loss,
        "n_grad": result.n_grad,
        "config": result.config,
        "plan": result.plan,
    }


def main() -> None:
    # Where a process dies the others shall know at once.
    _processes._BEAT, _processes._PATIENCE = 0.2, 4.0
    # Small as the works are, they are divided, and what is done of them is kept.
    _tasks.Tasks.pays = lambda self, kind: True  # type: ignore[method-assign]
    _work._SNAPSHOT_PAUSE = 0.0
    torch.set_num_threads(1)
    warnings.simplefilter("error", fastvol.FastvolWarning)
    out = Path(sys.argv[1])
    if os.environ.get("FASTVOL_TEST_INIT"):
        torch.distributed.init_process_group(
            "gloo", init_method=os.environ["FASTVOL_TEST_INIT"], rank=rank(),
            world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
    for name in sys.argv[2:]:
        if name == "1 is killed" and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "1 ends" and rank() == 1:
            return
        if name in ("1 is killed", "1 ends"):
            continue
        try:
            result = scenario(name, out / "run")
            found = told(result)
            if "parts" in result.provenance:
                (out / f"{name}, parts-{rank()}.json").write_text(
                    json.dumps(result.provenance["parts"])
                )
        except fastvol.FastvolError as error:
            found = {"error": str(error)}
            if name.startswith(("rank ", "helper ")) or name == "restarted":
                raise
        text = json.dumps(found)
        (out / f"{name}-{rank()}.json").write_text(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
