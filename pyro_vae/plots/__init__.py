"""Pictures of fits, draws and diagnostics, on matplotlib.

Each function returns its figure, which a notebook shows and `figure.savefig(path)` saves. A
picture of one panel and `prior_samples` take `ax=`, the axes to draw into; other pictures of
several panels take `figure=`, a figure or subfigure. Neither the state nor the style of pyplot is
changed.
"""

from .conformal import conformal as conformal
from .ensemble import ensemble as ensemble
from .estimators import estimators as estimators
from .history import history as history
from .latents import latents as latents
from .pareto_k import pareto_k as pareto_k
from .prior_samples import prior_samples as prior_samples
from .ranking import ranking as ranking
from .reconstructions import reconstructions as reconstructions
