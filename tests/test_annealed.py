"""Annealed importance sampling and evidence in closed form."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from annealed_cases import GUIDES, GammaPoisson, TwoModes, against_exact
from own_programs import Mixture, SharedLevel, TwoLevels
from programs import Grid, LinearGaussian, linear_gaussian
from test_program_forms import labelled_rows, semi_supervised
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.engine.running import evaluating, seeded
from pyro_vae.evidence import bidirectional
from pyro_vae.evidence import linear_gaussian as of_a_vae
from pyro_vae.evidence.annealed import STARTS, annealed
from pyro_vae.evidence.exact import exact
from pyro_vae.evidence.log_evidence import estimates

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([[0.0], [1.0], [2.0], [5.0], [30.0]], dtype=torch.float64)


@pytest.mark.parametrize("guide", GUIDES)
def test_annealing_covers_and_brackets_the_exact_value(guide: str) -> None:
    found = against_exact(2, guide, rows=150, num_temperatures=40)
    assert (found["error"].abs() < 3 * found["mcse"]).double().mean() >= 0.97
    ratio = found["error"].square().mean().sqrt() / found["mcse"].square().mean().sqrt()
    assert 0.8 < ratio < 1.25
    for error, sign in ((found["error"], -1), (found["upper_error"], 1)):
        assert sign * error.mean() > -3 * error.std() / len(error) ** 0.5
        assert error.abs().mean() < 0.1


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("point", [False, True])
def test_annealing_of_positive_latents(start: str, point: bool) -> None:
    program = GammaPoisson(point=point)
    with evaluating(program), seeded(0):
        weights = annealed(program, read(COUNTS, program), start=start).log_weights
    found = estimates(weights)
    assert (abs(found["log_evidence"] - program.exact(COUNTS).numpy()) < 4 * found["mcse"]).all()
    assert np.median(found["mcse"]) < 0.1


def test_annealing_reaches_both_modes() -> None:
    """A guide of one mode gives half of p(x); the prior reaches both."""
    program, x = TwoModes(), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    z = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    density = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 0.1).log_prob(x)
    truth = (density.logsumexp(1) + np.log(1e-4)).numpy()
    with evaluating(program), seeded(0):
        found = estimates(annealed(program, read(x, program), start="prior").log_weights)
    assert (abs(found["log_evidence"] - truth) < 4 * found["mcse"]).all()
    assert found["mcse"].max() < 0.4


def test_weights_gradients_modes_and_generator_stay() -> None:
    vae = pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0).initialize(X)
    vae.train()
    for parameter in vae.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    generator = torch.get_rng_state()
    tables = [bidirectional(vae, 3, 4, num_temperatures=5, seed=3) for _ in range(2)]
    assert tables[0].equals(tables[1])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in before.items())
    assert all((p.grad == 1).all() and p.requires_grad for p in vae.parameters())
    assert all(module.training for module in vae.modules())


BRACKETED = {
    "a VAE": lambda: (pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0).initialize(X), None),
    "positive latents": lambda: (GammaPoisson(), COUNTS),
    "dict data, two sites, plates": lambda: (
        Grid(),
        {"cells": torch.zeros(5, 4).double(), "flag": torch.zeros(5).double()},
    ),
}


@pytest.mark.parametrize("name", BRACKETED)
def test_simulated_rows_are_bracketed(name: str) -> None:
    program, x = BRACKETED[name]()
    table = bidirectional(program, 40, 16, x=x, num_temperatures=20, seed=0)
    assert table.loc["gap", "mean"] > -3 * table.loc["gap", "se"]
    assert abs(table.loc["gap", "mean"]) < 0.1
    gap = table.loc["upper", "mean"] - table.loc["lower", "mean"]
    assert gap == pytest.approx(table.loc["gap", "mean"])


REFUSED = {
    "discrete latents": (Mixture, torch.zeros(4), "k of another kind: use method='guide'"),
    "shared latents": (SharedLevel, torch.zeros(4), "of another kind: use method='guide'"),
    "half of them discrete": (semi_supervised, labelled_rows, "of another kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_latents_without_gradients_are_refused(name: str) -> None:
    build, x, words = REFUSED[name]
    program = build()
    with pytest.raises(ValueError, match=words):
        bidirectional(program, 4, x=x() if callable(x) else x)


class Renamed(LinearGaussian):
    """Reads its rows from the field y, and observes them as the site x."""

    def model(self, x: dict[str, Tensor]) -> None:
        super().model(x["y"])

    def guide(self, x: dict[str, Tensor]) -> None:
        super().guide(x["y"])


def test_sites_that_are_no_fields_are_refused() -> None:
    plain, x = linear_gaussian(5)
    with pytest.raises(ValueError, match="The model observes x, but its data have the fields y"):
        bidirectional(Renamed(plain.weight.detach()), 4, x={"y": x})


def test_exact_is_the_closed_form() -> None:
    program, x = linear_gaussian(20, factor=0.5)
    found = exact(program, read(x, program))
    np.testing.assert_allclose(found, program.log_evidence(x), rtol=1e-12)
    vae = pv.VAE(3, 2, pv.likelihoods.Normal(scale=pv.Shared()), decoder=nn.Identity(), seed=0)
    vae.initialize(X)
    np.testing.assert_allclose(exact(vae, read(X, vae)), of_a_vae(vae, X), rtol=1e-10)


def test_exact_is_the_closed_form_of_a_hierarchy() -> None:
    program, x = TwoLevels(), torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    covariance = torch.tensor([[2.25, 1.0], [1.0, 2.25]])
    expected = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
    np.testing.assert_allclose(exact(program, read(x, program)), expected, rtol=1e-5)


class Holed(LinearGaussian):
    """The same model of the cells that are there; NaN marks the others."""

    def model(self, x: Tensor) -> None:
        is_there, filled = ~x.isnan(), x.nan_to_num(0.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            cells = dist.Normal(z @ self.weight.T, self.noise).mask(is_there)
            pyro.sample("x", cells.to_event(1), obs=filled)

    def guide(self, x: Tensor) -> None:
        super().guide(x.nan_to_num(0.0))


def test_exact_leaves_missing_cells_out() -> None:
    plain, x = linear_gaussian(4)
    program = Holed(plain.weight.detach())
    x[0, 1] = x[2, 0] = x[2, 3] = torch.nan
    expected = []
    for row in x:
        there = ~row.isnan()
        part = LinearGaussian(plain.weight.detach()[there])
        expected.append(part.log_evidence(row[there]))
    np.testing.assert_allclose(exact(program, read(x, program)), expected, rtol=1e-12)


CURVED = {
    "a decoder of ReLUs": lambda: pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0),
    "a mean that bends far away": lambda: pv.VAE(
        3,
        2,
        pv.likelihoods.Normal(scale=pv.Shared()),
        decoder=nn.Sequential(nn.Linear(2, 3), nn.Threshold(-30.0, -30.0)),
    ),
    "a scale that depends on z": lambda: pv.VAE(
        3, 2, pv.likelihoods.Normal(scale=pv.Predicted()), decoder=nn.Identity()
    ),
    "a prior of components": lambda: pv.VAE(
        3,
        pv.priors.Mixture(2, 2),
        pv.likelihoods.Normal(scale=pv.Shared()),
        decoder=nn.Identity(),
    ),
    "bits": lambda: pv.VAE(3, 2, pv.likelihoods.Bernoulli(), decoder=nn.Identity()),
}


@pytest.mark.parametrize("name", CURVED)
def test_exact_refuses_what_is_not_linear_gaussian(name: str) -> None:
    program = CURVED[name]()
    with torch.no_grad():
        for parameter in program.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    x = (X > 0).float() if name == "bits" else X
    with pytest.raises(ValueError, match=r"not quadratic in z \(row 0\)"):
        exact(program, read(x, program))
