"""Draws from the posterior by Hamiltonian Monte Carlo, against closed forms."""

from typing import Any

import numpy as np
import pytest
import torch
from annealed_cases import GUIDES, GammaPoisson, TwoModes, shifted
from own_programs import Mixture, SharedLevel
from programs import Grid

import pyro_vae as pv
from pyro_vae.evidence import hmc

COUNTS = torch.tensor([[0.0], [1.0], [2.0], [5.0], [30.0]], dtype=torch.float64)
FEW: dict[str, Any] = {"seed": 0, "progress": False}


def assert_moments(
    draws: np.ndarray, ess: np.ndarray, mean: np.ndarray, sd: np.ndarray, limit: float = 4.0
) -> None:
    """Means and standard deviations of draws (chain, draw, ...), within Monte Carlo error."""
    flat = draws.reshape(-1, *draws.shape[2:])
    ess = ess.reshape(ess.shape + (1,) * (mean.ndim - 1))
    assert (abs(flat.mean(0) - mean) < limit * sd / np.sqrt(ess)).all()
    assert (abs(flat.std(0) / sd - 1) < limit * 1.5 / np.sqrt(ess)).all()


@pytest.mark.parametrize("guide", GUIDES)
def test_hmc_of_a_normal_posterior(guide: str) -> None:
    program, x, _ = shifted(4, guide, rows=30)
    tree = pv.posterior(program, x, "hmc", 500, **FEW)
    stats = tree["vi_stats"]
    assert float(stats.r_hat.max()) < 1.03
    assert float(stats.ess_bulk.min()) > 500
    mean, covariance = (part.detach().numpy() for part in program.posterior(x))
    sd = np.broadcast_to(np.sqrt(covariance.diagonal()), mean.shape)
    assert_moments(tree["posterior"].z.to_numpy(), stats.ess_bulk.to_numpy(), mean, sd)


@pytest.mark.parametrize("point", [False, True])
def test_hmc_of_positive_latents(point: bool) -> None:
    program = GammaPoisson(point=point)
    tree = pv.posterior(program, COUNTS, "hmc", 1000, **FEW)
    shape = (COUNTS[:, 0] + 1.5).numpy()
    stats = tree["vi_stats"]
    ess = np.minimum(stats.ess_bulk, stats.ess_tail).to_numpy()
    draws = tree["posterior"].z.to_numpy()
    assert_moments(draws, ess, shape / 2, np.sqrt(shape) / 2)
    joint = tree["sample_stats"].log_joint.to_numpy()
    shapes, z = torch.tensor(1.5, dtype=torch.float64), torch.from_numpy(draws)
    expected = torch.distributions.Gamma(shapes, 1.0).log_prob(z)
    expected += torch.distributions.Poisson(z).log_prob(COUNTS[:, 0])
    np.testing.assert_allclose(joint, expected, rtol=1e-9)


def test_an_exact_guide_has_equal_weights_at_the_draws() -> None:
    """log p(x, z) - log q(z | x) is log p(x) at each draw: its z stand in model and guide."""
    program, x, _ = shifted(3, "exact", rows=5)
    for max_elements in (2**24, 200):
        tree = pv.posterior(program, x, "hmc", 20, max_elements=max_elements, **FEW)
        weights = tree["sample_stats"].log_weight.to_numpy()
        expected = np.broadcast_to(program.log_evidence(x), weights.shape)
        np.testing.assert_allclose(weights, expected, rtol=1e-9)


def test_hmc_of_plates_and_two_sites() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    program, x = Grid(), {"cells": cells, "flag": torch.ones(6).double()}
    tree = pv.to_arviz(program, x, 400, method="hmc", chains=2, num_predictive=7, **FEW)
    assert tree["posterior"].z.shape == (2, 400, 6)
    assert tree["posterior_predictive"].cells.shape[:3] == (2, 3, 6)
    assert float(tree["vi_stats"].r_hat.max()) < 1.05
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z) + torch.nn.functional.logsigmoid(z)
    log_p = log_p + torch.distributions.Normal(z, 1.0).log_prob(cells[..., None]).sum(1)
    weights = log_p.softmax(1)
    mean = (weights * z).sum(1)
    sd = ((weights * z**2).sum(1) - mean**2).sqrt()
    ess = tree["vi_stats"].ess_bulk.to_numpy()
    assert_moments(tree["posterior"].z.to_numpy(), ess, mean.numpy(), sd.numpy())


def test_rows_of_two_modes_are_reported() -> None:
    x = torch.tensor([[2.0], [-1.0], [3.0]], dtype=torch.float64)
    stats = pv.posterior(TwoModes(), x, "hmc", 300, chains=8, **FEW)["vi_stats"]
    has_two = np.array([True, False, True])
    np.testing.assert_array_equal(stats.r_hat.to_numpy() > 1.1, has_two)
    assert [note.startswith("chains disagree") for note in stats.note.to_numpy()] == [*has_two]


def test_rows_in_pieces_are_drawn_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmc, "MAX_ELEMENTS", 200)
    program, x, _ = shifted(2, "shifted", rows=9)
    tree = pv.posterior(program, x, "hmc", 300, **FEW)
    mean, covariance = (part.detach().numpy() for part in program.posterior(x))
    sd = np.broadcast_to(np.sqrt(covariance.diagonal()), mean.shape)
    ess = tree["vi_stats"].ess_bulk.to_numpy()
    assert_moments(tree["posterior"].z.to_numpy(), ess, mean, sd)


@pytest.mark.parametrize("guide", GUIDES)
def test_resampled_draws_of_a_normal_posterior(guide: str) -> None:
    program, x, _ = shifted(3, guide, rows=20)
    tree = pv.posterior(program, x, "importance", 1000, **FEW)
    stats = tree["vi_stats"]
    assert (stats.pareto_k <= stats.attrs["good_k"]).all()
    assert (stats.note == "ok").all()
    assert stats.attrs["num_samples"] == 4000
    exact = program.log_evidence(x)
    assert (abs(stats.log_evidence - exact) < 4 * stats.mcse + 1e-6).all()
    mean, covariance = (part.detach().numpy() for part in program.posterior(x))
    sd = np.broadcast_to(np.sqrt(covariance.diagonal()), mean.shape)
    draws = tree["posterior"].z.to_numpy()
    assert draws.shape == (1, 1000, 20, 3)
    # systematic resampling of 4000 weighted draws: at worst the error of 1000 of them
    assert_moments(draws, stats.ess.to_numpy().clip(max=1000) / 2, mean, sd)
    found = np.stack([np.cov(draws[0, :, row].T) for row in range(20)]).mean(0)
    np.testing.assert_allclose(found, covariance, atol=0.03 * covariance.max())


def test_resampled_draws_of_positive_latents() -> None:
    tree = pv.posterior(GammaPoisson(), COUNTS, "importance", 2000, **FEW)
    shape = (COUNTS[:, 0] + 1.5).numpy()
    stats = tree["vi_stats"]
    draws = tree["posterior"].z.to_numpy()
    assert (draws > 0).all()
    ess = stats.ess.to_numpy().clip(max=2000) / 2
    assert_moments(draws, ess, shape / 2, np.sqrt(shape) / 2)
    assert (abs(stats.log_evidence - GammaPoisson().exact(COUNTS).numpy()) < 4 * stats.mcse).all()


def test_resampled_draws_agree_with_those_of_hmc() -> None:
    vae = pv.VAE(6, 2, pv.likelihoods.Bernoulli(), seed=0)
    bits = (torch.rand(300, 6, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    pv.fit(vae, bits, max_epochs=5, seed=0, device="cpu", progress=False)
    found, chains = (pv.posterior(vae, bits[:8], m, 1000, **FEW) for m in ("importance", "hmc"))
    one, other = (tree["posterior"].z.stack(s=("chain", "draw")) for tree in (found, chains))
    sd = other.std("s")
    assert (abs(one.mean("s") - other.mean("s")) < 0.25 * sd).all()
    assert (abs(one.std("s") / sd - 1) < 0.2).all()


@pytest.mark.parametrize("name", ["k", "m"])
def test_what_has_no_proposals_is_refused(name: str) -> None:
    program = Mixture() if name == "k" else SharedLevel()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        pv.posterior(program, torch.zeros(3), "importance", 20, **FEW)


def test_draws_of_the_guide_are_those_of_to_arviz() -> None:
    program, x, _ = shifted(2, "shifted", rows=4)
    one, other = (f(program, x, num_samples=20, seed=0) for f in (pv.posterior, pv.to_arviz))
    for group in ("posterior", "posterior_predictive", "prior", "vi_stats"):
        assert one[group].equals(other[group])


@pytest.mark.parametrize("method", ["importance", "hmc"])
def test_a_seed_gives_the_same_draws_and_nothing_else_changes(method: str) -> None:
    vae = pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0).initialize(torch.eye(3))
    vae.train()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    generator = torch.get_rng_state()
    options = {"chains": 1, **FEW}
    one, other = (pv.posterior(vae, torch.eye(3), method, 10, **options) for _ in range(2))
    assert one["posterior"].equals(other["posterior"])
    assert one["posterior"].sizes["chain"] == 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert vae.training
