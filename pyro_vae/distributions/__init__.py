"""The one idea: modules that return a distribution given features, and the families of Pyro."""

from .family import ALTERNATIVES as ALTERNATIVES
from .family import Family as Family
from .family import Predicted as Predicted
from .family import Shared as Shared
from .family import Word as Word
