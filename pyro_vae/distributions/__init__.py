"""Modules that map features to a distribution, and families made of any Pyro distribution."""

from .conditional import Arguments as Arguments
from .conditional import ConditionalDistribution as ConditionalDistribution
from .conditional import Encode as Encode
from .conditional import Likelihood as Likelihood
from .conditional import Posterior as Posterior
from .conditional import Prior as Prior
from .family import ALTERNATIVES as ALTERNATIVES
from .family import Family as Family
from .family import ParameterSpec as ParameterSpec
from .family import Predicted as Predicted
from .family import Shared as Shared
