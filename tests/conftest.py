"""What several test files share: fixed generators, Hypothesis settings, two small problems."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

# Without a GPU the kernels run in Triton's interpreter; it is chosen when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "fastvol",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("fastvol")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The problems here are tiny: on busy cores the barriers between threads would cost all the time.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that a caller's loss may use
    random.seed(0)


@pytest.fixture
def by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend="triton"`` runs what its kernels are defined by, on a CPU.

    Triton's interpreter takes a tenth of a second for a round of the loop.
    """
    if not torch.cuda.is_available():
        from fastvol import _backend

        monkeypatch.setattr(
            _backend, "_triton_backend", lambda fallback: replace(fallback, name="triton")
        )


@pytest.fixture
def regression() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A float64 network of 17 parameters, and 10 examples that it fits exactly."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(10, 2, dtype=torch.float64)
    return model, (x, model(x).detach())


@pytest.fixture
def classification() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A float64 classifier of 15 parameters, and 11 examples with its own predictions as labels."""
    model = nn.Linear(4, 3).double()
    x = torch.randn(11, 4, dtype=torch.float64)
    return model, (x, model(x).argmax(dim=-1))
