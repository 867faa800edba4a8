"""Comparisons of models and of estimators, active units, calibration, and the export to ArviZ."""

from .active_units import active_units as active_units
from .calibrate import Calibration as Calibration
from .calibrate import calibrate as calibrate
from .compare import compare as compare
from .compare_elbos import Comparison as Comparison
from .compare_elbos import compare_elbos as compare_elbos
from .conformal import Conformal as Conformal
from .conformal import conformal as conformal
from .gaps import Gaps as Gaps
from .gaps import gaps as gaps
from .posterior import posterior as posterior
from .race import Race as Race
from .race import race as race
from .to_arviz import to_arviz as to_arviz
