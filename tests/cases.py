"""The tables of members that the laws run over: a new member is one line here."""

import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import Predicted, Shared
from pyro_vae.likelihoods import Family as Likelihood
from pyro_vae.posteriors import Family as Posterior
from pyro_vae.priors import Family as Prior


class Case(NamedTuple):
    """A constructor, an event shape to build it for, data of a shape, the precision it allows.

    `beside` are the other members of a VAE that it needs.
    """

    make: Callable[[], Any]
    event_shape: tuple[int, ...] = (3,)
    data: Callable[[tuple[int, ...]], Tensor] = torch.randn
    dtype: torch.dtype = torch.float64
    beside: dict[str, Any] = {}


def counts(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 5, shape).float()


def bits(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 2, shape).float()


def shares(shape: tuple[int, ...]) -> Tensor:
    return 0.02 + 0.96 * torch.rand(shape)


def positives(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).exp()


LIKELIHOODS: dict[str, Case] = {
    "Family": Case(partial(Likelihood, dist.Gumbel, scale=Shared())),
    "Bernoulli": Case(pv.likelihoods.Bernoulli, data=bits),
    "Beta": Case(pv.likelihoods.Beta, data=shares),
    "BetaBinomial": Case(partial(pv.likelihoods.BetaBinomial, total_count=4), data=counts),
    "Binomial": Case(partial(pv.likelihoods.Binomial, total_count=4), data=counts),
    "Categorical": Case(partial(pv.likelihoods.Categorical, 5), data=counts),
    "ContinuousBernoulli": Case(pv.likelihoods.ContinuousBernoulli, data=shares),
    "Gamma": Case(pv.likelihoods.Gamma, data=positives),
    "Laplace": Case(pv.likelihoods.Laplace),
    "LogNormal": Case(pv.likelihoods.LogNormal, data=positives),
    "NegativeBinomial": Case(pv.likelihoods.NegativeBinomial, data=counts),
    "Normal": Case(pv.likelihoods.Normal),
    "Poisson": Case(pv.likelihoods.Poisson, data=counts),
    "StudentT": Case(pv.likelihoods.StudentT),
}

PRIORS: dict[str, Case] = {
    "Family": Case(partial(Prior, dist.StudentT, 2, df=6.0)),
    "StandardNormal": Case(partial(pv.priors.StandardNormal, 2)),
    "Mixture": Case(partial(pv.priors.Mixture, 3, 2)),
    "VampPrior": Case(partial(pv.priors.VampPrior, 4, 2)),
    "from_distribution": Case(
        lambda: pv.priors.from_distribution(dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    ),
}

HALVES = {"prior": dist.HalfNormal(torch.ones(2)).to_event(1)}

POSTERIORS: dict[str, Case] = {
    "Family": Case(partial(Posterior, dist.StudentT, df=6.0)),
    "Delta": Case(pv.posteriors.Delta),
    "Gamma": Case(pv.posteriors.Gamma, beside=HALVES),
    "LowRankMultivariateNormal": Case(partial(pv.posteriors.LowRankMultivariateNormal, 1)),
    "MultivariateNormal": Case(pv.posteriors.MultivariateNormal),
    "Normal": Case(pv.posteriors.Normal),
    "Weibull": Case(pv.posteriors.Weibull, beside=HALVES),
}

ENCODERS: dict[str, Case] = {
    "MLP": Case(partial(pv.networks.MLP, 8, 6, activation=nn.Tanh), (2, 4, 4)),
    "Convolution": Case(partial(pv.networks.Convolution, 4, 6), (2, 9, 6)),
}

DECODERS: dict[str, Case] = {
    "MLP": Case(partial(pv.networks.MLP, 8, 6, activation=nn.Tanh), (2, 4, 4)),
    "Deconvolution": Case(partial(pv.networks.Deconvolution, 6, 4), (2, 9, 6)),
}

CLASS_ALONE = """
    AffineBeta AsymmetricLaplace Bernoulli Beta Cauchy Chi2 ContinuousBernoulli Exponential
    FisherSnedecor Gamma GammaPoisson GeneralizedPareto Geometric Gumbel HalfCauchy HalfNormal
    InverseGamma Kumaraswamy Laplace LogNormal Logistic NanMaskedNormal NegativeBinomial Normal
    Pareto Poisson
    SkewLogistic SoftAsymmetricLaplace SoftLaplace Stable StudentT VonMises Weibull
    ZeroInflatedNegativeBinomial ZeroInflatedPoisson
    Dirichlet MultivariateNormal MultivariateStudentT NanMaskedMultivariateNormal OneHotCategorical
    OneHotCategoricalStraightThrough ProjectedNormal
""".split()

WITH_A_WORD: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "BetaBinomial": ((3,), {"total_count": 5}),
    "Binomial": ((3,), {"total_count": 5}),
    "Categorical": ((3,), {"logits": Predicted(shape=4)}),
    "DirichletMultinomial": ((3,), {"total_count": 5}),
    "ExtendedBetaBinomial": ((3,), {"total_count": 5}),
    "ExtendedBinomial": ((3,), {"total_count": 5}),
    "LKJ": ((3, 3), {"dim": 3}),
    "LKJCholesky": ((3, 3), {"dim": 3}),
    "LogisticNormal": ((3,), {"loc": Predicted(shape=2), "scale": Predicted(shape=2)}),
    "LowRankMultivariateNormal": ((3,), {"cov_factor": Predicted(shape=2)}),
    "MixtureOfDiagNormals": (
        (3,),
        {
            "locs": Predicted(shape=(2, 3)),
            "coord_scale": Predicted(shape=(2, 3)),
            "component_logits": Predicted(shape=2),
        },
    ),
    "MixtureOfDiagNormalsSharedCovariance": (
        (3,),
        {
            "locs": Predicted(shape=(2, 3)),
            "coord_scale": Predicted(shape=3),
            "component_logits": Predicted(shape=2),
        },
    ),
    "Multinomial": ((3,), {"total_count": 5}),
    "OrderedLogistic": ((3,), {"cutpoints": Predicted(shape=4)}),
    "RelaxedBernoulli": ((3,), {"temperature": 0.7}),
    "RelaxedBernoulliStraightThrough": ((3,), {"temperature": 0.7}),
    "RelaxedOneHotCategorical": ((3,), {"temperature": 0.7}),
    "RelaxedOneHotCategoricalStraightThrough": ((3,), {"temperature": 0.7}),
    "SineBivariateVonMises": ((2,), {"correlation": Shared(init=0.1, link="logit")}),
    "Uniform": ((3,), {"low": 0.0, "high": Predicted(link="softplus")}),
}

SINGLE = {"GeneralizedPareto": torch.float32}  # torch's own raises in double precision

DISTRIBUTIONS: dict[str, Case] = {
    name: Case(partial(Likelihood, getattr(dist, name)), dtype=SINGLE.get(name, torch.float64))
    for name in CLASS_ALONE
} | {
    name: Case(partial(Likelihood, getattr(dist, name), **words), event_shape)
    for name, (event_shape, words) in WITH_A_WORD.items()
}


def members(room: ModuleType) -> set[str]:
    """The public names of a room, but for its files."""
    names = getattr(room, "__all__", vars(room))
    kept = [n for n in names if not n.startswith("_") and not inspect.ismodule(getattr(room, n))]
    return {n for n in kept if not inspect.isabstract(getattr(room, n))}
