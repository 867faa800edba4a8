"""The linear VAE is probabilistic PCA: likelihood, posterior and evidence in closed form."""

import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_vae as pv
from pyro_vae.elbos.log_densities import log_densities


def digits() -> np.ndarray:
    return load_digits().data / 16


def wine() -> np.ndarray:
    x = load_wine().data
    return (x - x.mean(0)) / x.std(0)


def linear_vae(columns: int, latents: int, *, scalar: bool = True) -> pv.VAE:
    return pv.VAE(
        data=(columns,),
        prior=latents,
        likelihood=pv.likelihoods.Normal(scale=pv.Shared(scalar=scalar)),
        posterior=pv.posteriors.MultivariateNormal(scale_tril=pv.Shared()),
        encoder=nn.Identity(),
        decoder=nn.Identity(),
        seed=0,
    )


def loadings(vae: pv.VAE) -> tuple[Tensor, Tensor, Tensor]:
    """W, the mean and the noise variances of x = W z + mean + noise."""
    linear = vae.likelihood.heads["loc"].linear
    noise = vae.likelihood.links["scale"](vae.likelihood.shared["scale"]).expand(vae.event_shape)
    if vae.units.loc is None:
        return linear.weight, linear.bias, noise.square()
    loc, scale = vae.units.loc, vae.units.scale
    noise = scale * (noise + vae.likelihood.least)
    return scale[:, None] * linear.weight, loc + scale * linear.bias, noise.square()


def marginal(vae: pv.VAE) -> MultivariateNormal:
    weight, mean, noise = (value.double() for value in loadings(vae))
    return MultivariateNormal(mean, weight @ weight.T + noise.diag_embed())


@torch.no_grad()
def set_exact_posterior(vae: pv.VAE) -> None:
    weight, mean, noise = loadings(vae)
    scaled = weight.T / noise
    covariance = torch.linalg.inv(torch.eye(len(scaled), dtype=weight.dtype) + scaled @ weight)
    head = vae.posterior.heads["loc"].linear
    head.weight.copy_(covariance @ scaled)
    head.bias.copy_(-covariance @ scaled @ mean)
    tril = torch.linalg.cholesky(covariance)
    free = vae.posterior.links["scale_tril"].inv(tril)
    vae.posterior.shared["scale_tril"].copy_(free)


def fitted(
    x: np.ndarray, latents: int, *, scalar: bool, max_epochs: int, batch_size: int
) -> pv.VAE:
    vae = linear_vae(x.shape[1], latents, scalar=scalar)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=max_epochs)
    pv.fit(
        vae,
        x,
        max_steps=None,
        max_epochs=max_epochs,
        batch_size=batch_size,
        validation=None,
        weight_prior=None,
        warmup=100,
        until_converged=False,
        lr=2e-2,
        schedule=cosine,
        seed=0,
        device="cpu",
    )
    return vae


@pytest.mark.filterwarnings("ignore::pyro_vae.DegenerateColumnsWarning")
@pytest.mark.parametrize(
    ("load", "latents", "max_epochs", "batch_size"),
    [(digits, 2, 300, 128), (digits, 8, 300, 128), (wine, 2, 1200, 178)],
    ids=["digits-2", "digits-8", "wine-2"],
)
def test_fit_reaches_the_optimum_of_probabilistic_pca(
    load: object, latents: int, max_epochs: int, batch_size: int
) -> None:
    x = load()
    vae = fitted(x, latents, scalar=True, max_epochs=max_epochs, batch_size=batch_size)
    reached = marginal(vae).log_prob(torch.as_tensor(x)).mean().item()
    best = PCA(latents, svd_solver="full").fit(x).score(x)
    assert reached == pytest.approx(best, abs=0.02)

    evidence = pv.log_evidence(vae, x, num_samples=100, seed=0)
    assert float(evidence.log_evidence.mean()) == pytest.approx(reached, abs=0.02)


def test_fit_reaches_the_optimum_of_factor_analysis() -> None:
    x = wine()
    vae = fitted(x, 2, scalar=False, max_epochs=2000, batch_size=178)
    reached = marginal(vae).log_prob(torch.as_tensor(x)).mean().item()
    best = FactorAnalysis(2, tol=1e-8, max_iter=10_000).fit(x).score(x)
    assert reached == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scalar", [True, False])
def test_weights_are_constant_at_the_exact_posterior(dtype: torch.dtype, scalar: bool) -> None:
    x = torch.as_tensor(wine(), dtype=dtype)
    vae = linear_vae(13, 2, scalar=scalar).to(dtype)
    set_exact_posterior(vae)
    with torch.no_grad():
        log_weights = log_densities(vae, x, 200).log_weights
    exact = marginal(vae).log_prob(x.double())
    assert (log_weights - exact).abs().max() < 1e-4

    evidence = pv.log_evidence(vae, x, num_samples=200, seed=0)
    np.testing.assert_allclose(evidence.log_evidence, exact.detach(), atol=1e-4)
    np.testing.assert_allclose(evidence.elbo, exact.detach(), atol=1e-4)
    np.testing.assert_allclose(evidence.ess, 200, rtol=1e-4)
    assert evidence.mcse.max() < 1e-4


def exact_elbo(vae: pv.VAE, x: Tensor) -> Tensor:
    """E_q[log p(x | z)] - KL(q || p), closed form, summed over rows."""
    weight, mean, noise = loadings(vae)
    q = vae.encode(x)
    residual = x - q.loc @ weight.T - mean
    spread = (weight @ q.covariance_matrix @ weight.T).diagonal(dim1=-2, dim2=-1)
    log_likelihood = -0.5 * ((residual.square() + spread) / noise + (2 * torch.pi * noise).log())
    prior = MultivariateNormal(torch.zeros_like(q.loc), torch.eye(q.loc.shape[-1]).to(q.loc))
    return log_likelihood.sum() - kl_divergence(q, prior).sum()


def gradient(vae: pv.VAE, objective: Tensor) -> Tensor:
    parameters = list(vae.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)])


def test_gradient_of_trace_elbo_is_unbiased() -> None:
    x = torch.as_tensor(wine())[:20]
    vae = linear_vae(13, 2, scalar=False).double()
    elbo = pv.elbos.Trace_ELBO(num_particles=1000)
    draws = torch.stack(
        [gradient(vae, -elbo.differentiable_loss(vae.model, vae.guide, x)) for _ in range(100)]
    )
    error = draws.mean(0) - gradient(vae, exact_elbo(vae, x))
    z = error / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4.5


def test_elbo_lies_below_the_evidence_by_the_divergence() -> None:
    x = torch.as_tensor(wine())
    vae = linear_vae(13, 2, scalar=False).double()
    evidence = pv.log_evidence(vae, x, num_samples=4000, seed=0)
    exact = marginal(vae).log_prob(x).detach()
    closed = exact_elbo(vae, x).item() / len(x)
    se = float(np.sqrt((evidence.elbo_mcse**2).sum()) / len(x))
    assert float(evidence.elbo.mean()) == pytest.approx(closed, abs=4.5 * se)
    assert closed < exact.mean().item()
    assert float(evidence.log_evidence.mean()) < exact.mean().item() + 0.05
