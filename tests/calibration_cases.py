"""A linear Gaussian VAE with its exact posterior as guide, and the same guide made wrong."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from test_linear import linear_vae, set_exact_posterior
from torch import Tensor, nn

import pyro_vae as pv

COLUMNS = 6


def exact_vae(latents: int) -> pv.VAE:
    """A VAE of six columns whose posterior is exact, with loadings of about 1 and noise of 0.5."""
    vae = linear_vae(COLUMNS, latents).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = vae.likelihood.heads["loc"].linear.weight
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        free = vae.likelihood.links["scale"].inv(torch.tensor(0.5, dtype=weight.dtype))
        vae.likelihood.shared["scale"].fill_(free)
    set_exact_posterior(vae)
    vae.is_initialized = True
    return vae


class Guide(nn.Module):
    """The VAE, with a guide whose scale is multiplied, and whose mean is shifted.

    Arguments:
        vae: The VAE.
        factor: By what the standard deviations are multiplied.
        shift: By how many standard deviations the mean of each latent is shifted.
        beyond: The guide is wrong only in rows whose first posterior mean is above this.
    """

    def __init__(
        self, vae: pv.VAE, factor: float = 1.0, shift: float = 0.0, beyond: float | None = None
    ) -> None:
        super().__init__()
        self.vae, self.factor, self.shift, self.beyond = vae, factor, shift, beyond

    def model(self, x: Tensor | None = None, *, size: int | None = None) -> Any:
        return self.vae.model(x, size=size)

    def guide(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        if x is None:
            return self.vae.guide(size=size)
        q = self.vae.encode(x)
        is_wrong = torch.ones_like(x[..., :1])
        if self.beyond is not None:
            is_wrong = (q.loc[..., :1] > self.beyond).to(x)
        sd = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        loc = q.loc + is_wrong * self.shift * sd
        tril = q.scale_tril * (1 + is_wrong * (self.factor - 1))[..., None]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))
        return None


GUIDES: dict[str, dict[str, float]] = {
    "exact": {},
    "0.7": {"factor": 0.7},
    "1.4": {"factor": 1.4},
    "shift 0.3": {"shift": 0.3},
}


def flagged(program: nn.Module, x: Tensor | None = None, *, seed: int) -> set[str]:
    """The checks with a flagged line, at 1000 simulations."""
    table = pv.calibrate(program, x, seed=seed, progress=False).table
    return {*table[table["flagged"]]["check"]}


def near_data(vae: pv.VAE, rows: int = 100) -> Tensor:
    """Rows from a corner of the prior, where the first latent is about 2."""
    generator = torch.Generator().manual_seed(2)
    z = 0.3 * torch.randn(rows, *vae.latent_shape, dtype=torch.float64, generator=generator)
    z[:, 0] += 2.0
    noise = torch.randn(rows, COLUMNS, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return vae.decode(z).mean + 0.5 * noise
