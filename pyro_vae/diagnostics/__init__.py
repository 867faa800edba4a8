"""How far a fit can be trusted, and what ArviZ needs to show it."""

from .comparison import compare as compare
from .estimators import Comparison as Comparison
from .estimators import compare_elbos as compare_elbos
from .latents import active_units as active_units
from .race import Race as Race
from .race import race as race
from .tree import to_arviz as to_arviz
