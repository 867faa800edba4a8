"""Training: the step, the loop, its history, its callbacks and its checkpoints."""

from .callbacks import Callback as Callback
from .ensemble import Ensemble as Ensemble
from .ensemble import ensemble as ensemble
from .fit import fit as fit
from .history import History as History
from .settings import Settings as Settings
from .svi import SVI as SVI
