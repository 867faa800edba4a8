"""Deep latent-variable models for statisticians, on Pyro and PyTorch.

A model is three named things, a prior p(z), a likelihood p(x | z) and a posterior q(z | x), each
any distribution of Pyro. See :class:`VAE`, :func:`fit`, :func:`log_evidence`, :func:`compare`.
"""

from . import datasets as datasets
from . import diagnostics as diagnostics
from . import elbos as elbos
from . import evidence as evidence
from . import importance as importance
from . import likelihoods as likelihoods
from . import networks as networks
from . import plots as plots
from . import posteriors as posteriors
from . import priors as priors
from . import svi as svi
from .checkpoint import load as load
from .checkpoint import save as save
from .diagnostics import compare as compare
from .diagnostics import compare_elbos as compare_elbos
from .diagnostics import race as race
from .diagnostics import to_arviz as to_arviz
from .evidence import log_evidence as log_evidence
from .families import Family as Family
from .families import Predicted as Predicted
from .families import Shared as Shared
from .training import History as History
from .training import fit as fit
from .vae import VAE as VAE
