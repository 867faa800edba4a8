"""Pictures of fits, draws and diagnostics, on matplotlib.

Each returns its figure, to be saved by `figure.savefig(path)`. No state of pyplot and no style is
touched.
"""

from .figures import estimators as estimators
from .figures import latents as latents
from .figures import pareto_k as pareto_k
from .figures import prior_samples as prior_samples
from .figures import reconstructions as reconstructions
from .figures import training as training
