"""fastvol: how large is the minimum that training found?

``fastvol.estimate(model, loss_fn, n=1e6)`` measures the volume of the basin around a trained
network's parameters, and says how far the number can be trusted.
"""

from __future__ import annotations

from . import losses, preconditioners
from ._comparison import Comparison, compare
from ._estimate import estimate
from ._path_estimate import PathEstimate
from ._prior import prior_mass
from ._prior_result import PriorMass, PriorPoint, PriorProfile
from ._problem import Progress
from ._profile import Profile
from ._symmetry import SymmetryLogCount, symmetry_log_count
from ._version import __version__
from .errors import FastvolError, FastvolWarning, Interrupted, NotAvailableError
from .measures import Gaussian, Lebesgue
from .metrics import FilterMetric
from .result import VolumeEstimate

load = VolumeEstimate.load

__all__ = [
    "Comparison",
    "FastvolError",
    "FastvolWarning",
    "FilterMetric",
    "Gaussian",
    "Interrupted",
    "Lebesgue",
    "NotAvailableError",
    "PathEstimate",
    "PriorMass",
    "PriorPoint",
    "PriorProfile",
    "Profile",
    "Progress",
    "SymmetryLogCount",
    "VolumeEstimate",
    "__version__",
    "compare",
    "estimate",
    "load",
    "losses",
    "preconditioners",
    "prior_mass",
    "symmetry_log_count",
]
