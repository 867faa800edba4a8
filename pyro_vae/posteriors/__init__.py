"""Posteriors q(z | x): any Pyro distribution, its parameters computed by an encoder."""

from .delta import Delta as Delta
from .family import Family as Family
from .gamma import Gamma as Gamma
from .low_rank_multivariate_normal import LowRankMultivariateNormal as LowRankMultivariateNormal
from .multivariate_normal import MultivariateNormal as MultivariateNormal
from .normal import Normal as Normal
from .weibull import Weibull as Weibull
