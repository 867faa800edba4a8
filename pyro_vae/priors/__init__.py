"""Priors p(z): any Pyro distribution, fixed or learned, mixtures, and the VampPrior."""

from .family import Family as Family
from .from_distribution import from_distribution as from_distribution
from .mixture import Mixture as Mixture
from .standard_normal import StandardNormal as StandardNormal
from .vamp_prior import VampPrior as VampPrior
