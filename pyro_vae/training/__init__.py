"""Training: the step, the loop, its history and its checkpoints."""

from .fit import History as History
from .fit import fit as fit
from .svi import SVI as SVI
