"""Densities in float32: right to 1e-3 nats at any parameters and data, with their derivatives."""

import copy
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import POSTERIORS, PRIORS, members
from density_cases import LAWS, continuous_bernoulli, errors_of
from scipy import stats
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions.densities import scored

LIMIT = 1e-3  # nats, or nats per 1000 nats
SCIPYS: dict[str, tuple[Callable[..., Any], dict[str, float], float]] = {
    "Bernoulli": (lambda x, eta: stats.bernoulli.logpmf(x, odds(eta)), {"logits": 0.7}, 1.0),
    "Beta": (
        stats.beta.logpdf,
        {"concentration1": 2.5, "concentration0": 0.7},
        0.3,
    ),
    "BetaBinomial": (
        stats.betabinom.logpmf,
        {"total_count": 9.0, "concentration1": 2.5, "concentration0": 0.7},
        4.0,
    ),
    "Binomial": (
        lambda x, n, eta: stats.binom.logpmf(x, n, odds(eta)),
        {"total_count": 9.0, "logits": 0.7},
        4.0,
    ),
    "Gamma": (
        lambda x, a, b: stats.gamma.logpdf(x, a, scale=1 / b),
        {"concentration": 2.5, "rate": 3.0},
        0.3,
    ),
    "Laplace": (stats.laplace.logpdf, {"loc": 0.5, "scale": 2.0}, -1.0),
    "LogNormal": (
        lambda x, m, s: stats.lognorm.logpdf(x, s, scale=np.exp(m)),
        {"loc": 0.5, "scale": 2.0},
        3.0,
    ),
    "NegativeBinomial": (
        lambda x, r, eta: stats.nbinom.logpmf(x, r, odds(-eta)),
        {"total_count": 2.5, "logits": 0.7},
        4.0,
    ),
    "Normal": (stats.norm.logpdf, {"loc": 0.5, "scale": 2.0}, -1.0),
    "Poisson": (stats.poisson.logpmf, {"rate": 2.5}, 4.0),
    "StudentT": (
        lambda x, df, m, s: stats.t.logpdf(x, df, m, s),
        {"df": 2.5, "loc": 0.5, "scale": 2.0},
        -1.0,
    ),
    "Weibull": (
        lambda x, s, k: stats.weibull_min.logpdf(x, k, scale=s),
        {"scale": 2.5, "concentration": 0.7},
        0.3,
    ),
}


def odds(logits: float) -> float:
    return float(1.0 / (1.0 + np.exp(-logits)))


@pytest.mark.parametrize("name", SCIPYS)
def test_the_reference_is_scipys(name: str) -> None:
    theirs, parameters, value = SCIPYS[name]
    ours = LAWS[name][1].reference(
        value=mp.mpf(value), **{k: mp.mpf(v) for k, v in parameters.items()}
    )
    assert float(ours) == pytest.approx(float(theirs(value, *parameters.values())), rel=1e-12)


def test_every_named_likelihood_and_what_is_mended_is_in_the_table() -> None:
    named = {pv.likelihoods: {"Family"}, pv.posteriors: {"Family", "Delta"}}
    for room, others in named.items():
        assert members(room) - others <= LAWS.keys()
    mended = {
        name for name in dist.__all__ if scored(getattr(dist, name)) is not getattr(dist, name)
    }
    assert mended <= LAWS.keys()


@pytest.mark.parametrize("name", LAWS)
def test_densities_and_their_derivatives_are_exact(name: str) -> None:
    errors = errors_of(name)
    assert errors.error.max() < LIMIT
    for slope in errors.slopes.values():
        assert slope.max() < LIMIT


@pytest.mark.parametrize(
    "name", [name for name, (kind, _) in LAWS.items() if scored(kind) is not kind]
)
def test_mended_densities_remain_pyros(name: str) -> None:
    kind, law = LAWS[name]
    point = {k: torch.tensor([v]) for k, v in next(law.points()).items()}
    parameters = {k: v for k, v in point.items() if not k.startswith("value")}
    density = law.make(scored(kind), **parameters)
    assert isinstance(density, kind)
    wide = density.expand((5, 1))
    assert type(wide) is type(density)
    assert (wide.batch_shape, wide.event_shape) == ((5, 1), density.event_shape)
    assert wide.sample().shape == law.make(kind, **parameters).expand((5, 1)).sample().shape


SIZES = torch.tensor(
    [0.0, 1e-6, 1e-3, 0.05, 0.2, 0.45, 0.55, 0.99, 1.01, 3.0, 15.0, 17.0, 40.0, 1e3]
)
EVERY_LOGIT = torch.cat([-SIZES.flip(0), SIZES[1:]])


def grey(logits: Tensor) -> Any:
    return scored(dist.ContinuousBernoulli)(logits=logits)


def test_continuous_bernoulli_has_mass_one() -> None:
    x = torch.cat([torch.zeros(1), torch.logspace(-9, 0, 20_001)])
    for sign in (1.0, -1.0):
        value = x if sign < 0 else 1.0 - x
        for size in SIZES:
            density = grey(sign * size).log_prob(value).double().exp()
            assert abs(float(torch.trapezoid(density, x.double())) - 1.0) < 1e-3


def test_the_moments_of_a_continuous_bernoulli_are_exact() -> None:
    law = grey(EVERY_LOGIT)
    for place, logits in enumerate(map(mp.mpf, EVERY_LOGIT.tolist())):

        def log_mass(t: Any, logits: Any = logits) -> Any:
            return -continuous_bernoulli(mp.mpf(0), logits + t)

        mean, variance = mp.diff(log_mass, 0, h=1e-15), mp.diff(log_mass, 0, 2, h=1e-12)
        assert float(law.mean[place]) == pytest.approx(float(mean), rel=1e-5)
        assert float(law.variance[place]) == pytest.approx(float(variance), rel=1e-4)
        entropy = -continuous_bernoulli(mean, logits)
        assert float(law.entropy()[place]) == pytest.approx(float(entropy), abs=1e-4)


def test_draws_of_a_continuous_bernoulli_follow_it() -> None:
    torch.manual_seed(0)
    logits = EVERY_LOGIT.clone().requires_grad_()
    law = grey(logits)
    u = torch.linspace(0.0, 1.0, 101)[:, None]
    x = law.icdf(u)
    torch.testing.assert_close(
        law.cdf(x), u.expand_as(x), atol=1e-4, rtol=0
    )  # x near 1 is rounded
    draws = law.rsample((20_000,))
    error = (law.variance / 20_000).sqrt()
    assert ((draws.mean(0) - law.mean).abs() < 5.0 * error).all()
    (slope,) = torch.autograd.grad(draws.mean(0).sum(), logits)
    torch.testing.assert_close(slope, law.variance.detach(), rtol=0.1, atol=1e-6)


def test_a_low_rank_normal_exists_for_factors_of_ordinary_size() -> None:
    torch.manual_seed(0)
    factor, scales = torch.randn(50, 6, 5), torch.full((50, 6), 1e-6)
    law = scored(dist.LowRankMultivariateNormal)(torch.zeros(50, 6), factor, scales)
    x = law.sample()
    wide = factor.double() @ factor.double().mT + scales.double().diag_embed()
    exact = dist.MultivariateNormal(law.loc.double(), covariance_matrix=wide).log_prob(x.double())
    assert_near(law.log_prob(x), exact)
    assert law.covariance_matrix.dtype == law.precision_matrix.dtype == torch.float32


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", PRIORS)
def test_named_priors_are_exact(name: str, spread: float) -> None:
    torch.manual_seed(0)
    vae = pv.VAE(3, PRIORS[name].make(), pv.likelihoods.Normal(), seed=0)
    z = spread * torch.randn(50, 2)
    with torch.no_grad():
        found, exact = (prior_of(program, z) for program in (vae, copy.deepcopy(vae).double()))
    assert_near(found, exact)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", sorted(set(POSTERIORS) - {"Delta"}))
def test_named_posteriors_are_exact(name: str, spread: float) -> None:
    torch.manual_seed(0)
    is_positive = name in ("Gamma", "Weibull")
    prior = dist.HalfNormal(1.0).expand([2]).to_event(1) if is_positive else 2
    vae = pv.VAE(3, prior, pv.likelihoods.Normal(), POSTERIORS[name].make(), seed=0)
    x, z = torch.randn(50, 3), spread * torch.randn(50, 2)
    z = z.abs() if is_positive else z
    exact = copy.deepcopy(vae).double()
    with torch.no_grad():
        assert_near(vae.encode(x).log_prob(z), exact.encode(x.double()).log_prob(z.double()))


def prior_of(vae: pv.VAE, z: Tensor) -> Tensor:
    prior = vae.prior()
    return prior.log_prob(z.to(next(vae.parameters()).dtype))


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert ((found - exact).abs() / (exact.abs() / 1e3).clamp_min(1.0)).max() < LIMIT


@pytest.mark.parametrize(
    "likelihood",
    [
        pv.likelihoods.Poisson(),
        pv.likelihoods.NegativeBinomial(),
        pv.likelihoods.Binomial(2**30),
        pv.likelihoods.BetaBinomial(2**30),
    ],
)
def test_counts_that_float32_skips_are_refused(likelihood: Any) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0**24 + 1.0]], dtype=torch.float64)
    vae = pv.VAE((2,), 2, likelihood, seed=0)
    with pytest.raises(ValueError, match="counts below 16777216.*row 1.*double"):
        vae.check(x)
    vae.check(x.clamp_max(2.0**24 - 1.0))
    vae.double().check(x)
