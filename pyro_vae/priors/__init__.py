"""Priors p(z): any Pyro distribution, fixed or learned, and what is more than one."""

from .mixture import Mixture as Mixture
from .prior import Prior as Prior
from .prior import StandardNormal as StandardNormal
from .prior import from_distribution as from_distribution
from .vamp import VampPrior as VampPrior
