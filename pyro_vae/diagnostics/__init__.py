"""How far a fit can be trusted, and what ArviZ needs to show it."""

from .comparison import compare as compare
from .latents import active_units as active_units
from .tree import to_arviz as to_arviz
