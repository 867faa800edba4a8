"""Likelihoods p(x | z): any Pyro distribution, its parameters computed by a decoder."""

from .bernoulli import Bernoulli as Bernoulli
from .beta import Beta as Beta
from .beta_binomial import BetaBinomial as BetaBinomial
from .binomial import Binomial as Binomial
from .categorical import Categorical as Categorical
from .continuous_bernoulli import ContinuousBernoulli as ContinuousBernoulli
from .family import Family as Family
from .gamma import Gamma as Gamma
from .laplace import Laplace as Laplace
from .log_normal import LogNormal as LogNormal
from .negative_binomial import NegativeBinomial as NegativeBinomial
from .normal import Normal as Normal
from .poisson import Poisson as Poisson
from .student_t import StudentT as StudentT
