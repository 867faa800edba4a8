"""Posteriors q(z | x): any Pyro distribution, its parameters computed by an encoder."""

from .named import Delta as Delta
from .named import LowRankMultivariateNormal as LowRankMultivariateNormal
from .named import MultivariateNormal as MultivariateNormal
from .named import Normal as Normal
from .posterior import Posterior as Posterior
