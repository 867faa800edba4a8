"""Likelihoods p(x | z): any Pyro distribution, its parameters computed by a decoder."""

from .likelihood import Likelihood as Likelihood
from .named import Bernoulli as Bernoulli
from .named import Beta as Beta
from .named import BetaBinomial as BetaBinomial
from .named import Binomial as Binomial
from .named import Categorical as Categorical
from .named import ContinuousBernoulli as ContinuousBernoulli
from .named import Gamma as Gamma
from .named import Laplace as Laplace
from .named import LogNormal as LogNormal
from .named import NegativeBinomial as NegativeBinomial
from .named import Normal as Normal
from .named import Poisson as Poisson
from .named import StudentT as StudentT
