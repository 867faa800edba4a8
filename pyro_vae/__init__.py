"""Deep latent-variable models for statisticians, on Pyro and PyTorch.

A model is three named things, a prior p(z), a likelihood p(x | z) and a posterior q(z | x). Each
is a module that returns a distribution of Pyro, given features. See :class:`VAE`, :func:`fit`,
:func:`log_evidence`, :func:`compare`.
"""

import warnings as _warnings

with _warnings.catch_warnings():  # Pyro imports tqdm, which asks for widgets in a notebook
    _warnings.filterwarnings("ignore", message="IProgress not found")
    import pyro as _pyro  # noqa: F401

from . import diagnostics as diagnostics
from . import elbos as elbos
from . import evidence as evidence
from . import likelihoods as likelihoods
from . import networks as networks
from . import plots as plots
from . import posteriors as posteriors
from . import priors as priors
from .data import datasets as datasets
from .data.degenerate import DegenerateColumnsWarning as DegenerateColumnsWarning
from .diagnostics import calibrate as calibrate
from .diagnostics import compare as compare
from .diagnostics import compare_elbos as compare_elbos
from .diagnostics import conformal as conformal
from .diagnostics import gaps as gaps
from .diagnostics import posterior as posterior
from .diagnostics import race as race
from .diagnostics import to_arviz as to_arviz
from .distributions import ConditionalDistribution as ConditionalDistribution
from .distributions import Family as Family
from .distributions import Likelihood as Likelihood
from .distributions import Posterior as Posterior
from .distributions import Predicted as Predicted
from .distributions import Prior as Prior
from .distributions import Shared as Shared
from .evidence import log_evidence as log_evidence
from .prediction import embed as embed
from .prediction import reconstruct as reconstruct
from .prediction import sample as sample
from .programs import VAE as VAE
from .programs import Program as Program
from .programs import load as load
from .programs import save as save
from .training import Callback as Callback
from .training import Ensemble as Ensemble
from .training import History as History
from .training import ensemble as ensemble
from .training import fit as fit
from .training import svi as svi

__version__ = "0.2.0"

__all__ = [
    # models
    "VAE",
    "Program",
    "save",
    "load",
    # their members
    "ConditionalDistribution",
    "Prior",
    "Likelihood",
    "Posterior",
    "Family",
    "Predicted",
    "Shared",
    "priors",
    "likelihoods",
    "posteriors",
    "networks",
    # fitting
    "fit",
    "ensemble",
    "History",
    "Ensemble",
    "Callback",
    "elbos",
    "svi",
    # prediction
    "embed",
    "reconstruct",
    "sample",
    # judgement
    "log_evidence",
    "calibrate",
    "compare",
    "compare_elbos",
    "posterior",
    "race",
    "gaps",
    "conformal",
    "to_arviz",
    "diagnostics",
    "evidence",
    "plots",
    # data
    "DegenerateColumnsWarning",
    "datasets",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
