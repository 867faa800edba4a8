"""Importance sampling under priors on a part of the real numbers, against quadrature."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from benchmarks import positive_priors
from quadrature import grid
from torch import Tensor, nn
from torch.distributions import Distribution

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.elbos.log_densities import log_densities, structure
from pyro_vae.engine.row_noise import row_keys
from pyro_vae.evidence.log_evidence import estimates
from pyro_vae.evidence.proposal import Proposal

ONE = torch.ones(())
PRIORS: dict[str, Distribution] = {
    "HalfNormal": dist.HalfNormal(ONE),
    "Exponential": dist.Exponential(ONE),
    "Gamma": dist.Gamma(0.5 * ONE, 1.0),
    "LogNormal": dist.LogNormal(0 * ONE, 1.0),
    "Weibull": dist.Weibull(ONE, 2.0 * ONE),
    "Beta": dist.Beta(0.7 * ONE, 1.5),
    "Uniform": dist.Uniform(0 * ONE, 3.0),
    "Pareto": dist.Pareto(0.5 * ONE, 2.0),
}


class Positive(nn.Module):
    """x ~ N(z, 0.5^2) with a prior on z, and a guide that misses a part of it."""

    def __init__(self, prior: Distribution, *, spread: float = 0.3) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.prior, self.spread = prior, spread

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        to_support = torch.distributions.biject_to(self.prior.support)
        with pyro.plate("data", len(x)):
            base = dist.Normal(self.shift + 0.0 * x, self.spread)
            pyro.sample("z", dist.TransformedDistribution(base, [to_support]))

    def exact(self, x: Tensor) -> np.ndarray:
        line = grid(self.prior.support, 4001)
        joint = self.prior.log_prob(line.points) + dist.Normal(line.points, 0.5).log_prob(
            x[:, None]
        )
        return torch.logsumexp((joint + line.weights.log()).nan_to_num(-torch.inf), 1).numpy()


@pytest.mark.parametrize("name", PRIORS)
def test_a_narrow_guide_does_not_bias_the_evidence(name: str) -> None:
    program = Positive(PRIORS[name])
    x = torch.linspace(-0.2, 1.5, 40, dtype=torch.float64)
    found = pv.log_evidence(program, x, 4000, seed=0)
    error = found["log_evidence"].to_numpy() - program.exact(x)
    inside = np.abs(error) < 2.0 * found["mcse"].to_numpy()
    assert inside[~found.is_over()].mean() >= 0.9
    assert abs(error.mean()) < 0.02


def test_weights_are_bounded_and_the_elbo_is_that_of_the_guide() -> None:
    program = Positive(PRIORS["HalfNormal"])
    x = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    proposal = Proposal(program, structure(program, x), 400)
    assert proposal.num_prior == proposal.is_prior.sum() == 20
    assert set(np.add.reduceat(proposal.is_prior, [0, 100, 200, 300])) == {5}
    bound = dist.Normal(x, 0.5).log_prob(x) + np.log(20)
    with torch.no_grad():
        keys = row_keys(read(x))
        for function, noise in proposal.strata(x[:2], 0):
            inputs = {"row": x, "table": noise.table, "shifts": noise.shifts(keys)}
            assert (function(inputs, len(noise.table))["log_weights"] <= bound + 1e-9).all()
    found = pv.log_evidence(program, x, 20_000, refine=False, seed=0)
    with torch.no_grad():
        terms = log_densities(program, x, 20_000).log_weights
    error = 5 * np.hypot(found["elbo_mcse"].to_numpy(), terms.std(0).numpy() / 20_000**0.5)
    assert (np.abs(found["elbo"].to_numpy() - terms.mean(0).numpy()) < error).all()


def test_the_error_is_that_of_repetition_within_strata() -> None:
    program = Positive(PRIORS["HalfNormal"], spread=1.0)
    x = torch.linspace(0.5, 1.0, 3, dtype=torch.float64)
    runs = [pv.log_evidence(program, x, 400, refine=False, seed=s) for s in range(60)]
    values = np.array([run["log_evidence"] for run in runs])
    errors = np.array([run["mcse"] for run in runs])
    ratio = values.std(0, ddof=1) / np.sqrt((errors**2).mean(0))
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_strata_of_one_draw_are_taken_together() -> None:
    weights = np.random.default_rng(0).normal(size=(9, 4))
    one = estimates(weights, is_prior=np.arange(9) == 4)
    np.testing.assert_array_equal(one["mcse"], estimates(weights)["mcse"])


class Auxiliary(Positive):
    """A guide with a draw of its own, for which the prior has no density."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.LogNormal(u + self.shift, 1.0))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (Positive(PRIORS["Gamma"]), ("z",)),
        (Positive(dist.Normal(0.0, 1.0)), ()),
        (Positive(dist.Laplace(0.0, 1.0)), ()),
        (Auxiliary(PRIORS["Gamma"]), ()),
    ],
    ids=["positive", "normal", "laplace", "auxiliary"],
)
def test_the_prior_is_used_where_it_is_constrained(
    program: Positive, expected: tuple[str, ...]
) -> None:
    assert structure(program, torch.ones(3, dtype=torch.float64)).constrained == expected


@pytest.mark.parametrize("prior", ["HalfNormal", "Beta"])
def test_traced_evaluation_gives_the_same_evidence(prior: str) -> None:
    vae = pv.VAE(
        3,
        PRIORS[prior].expand([2]).to_event(1),
        pv.likelihoods.Normal(),
        seed=0,
        encoder=pv.networks.MLP(8),
        decoder=pv.networks.MLP(8),
    )
    x = torch.randn(80, 3)
    whole = pv.log_evidence(vae, x, 1000, seed=0)
    pieces = pv.log_evidence(vae, x, 1000, seed=0, max_elements=8000)
    error = np.hypot(whole["mcse"], pieces["mcse"])
    assert (np.abs(whole["log_evidence"] - pieces["log_evidence"]) < 5 * error).all()


@pytest.mark.parametrize("posterior", positive_priors.POSTERIORS)
def test_a_fitted_vae_is_covered(posterior: str) -> None:
    found = positive_priors.coverage(
        "HalfNormal", "Normal", posterior, rows=60, epochs=8, size=1000
    )
    assert found["coverage"] >= positive_priors.COVERAGE
    assert found["unmarked"] > 0.05
