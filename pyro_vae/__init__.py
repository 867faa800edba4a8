"""Deep latent-variable models for statisticians, on Pyro and PyTorch."""

from . import elbos as elbos
from . import likelihoods as likelihoods
from . import networks as networks
from . import posteriors as posteriors
from . import priors as priors
from . import svi as svi
from .checkpoint import load as load
from .checkpoint import save as save
from .evidence import log_evidence as log_evidence
from .families import Family as Family
from .families import Predicted as Predicted
from .families import Shared as Shared
from .training import History as History
from .training import fit as fit
from .vae import VAE as VAE
