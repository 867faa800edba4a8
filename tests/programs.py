"""Programs with a closed form, written by hand in plain Pyro."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x ~ N(W z, noise^2 I); the guide is the posterior, its scale times `factor`."""

    def __init__(
        self, weight: Tensor, *, noise: float = 0.5, factor: float = 1.0, site: str = "x"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.double())
        self.noise, self.factor, self.site = noise, factor, site

    @property
    def latent_dim(self) -> int:
        return self.weight.shape[1]

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample(self.site, dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean, covariance = self.posterior(x)
        scale_tril = torch.linalg.cholesky(covariance) * self.factor
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale_tril))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit = torch.eye(self.latent_dim, dtype=x.dtype)
        covariance = torch.linalg.inv(unit + self.weight.T @ self.weight / self.noise**2)
        return x @ self.weight @ covariance / self.noise**2, covariance

    def marginal(self) -> dist.MultivariateNormal:
        unit = torch.eye(len(self.weight), dtype=self.weight.dtype)
        covariance = self.weight @ self.weight.T + self.noise**2 * unit
        return dist.MultivariateNormal(self.weight.new_zeros(len(self.weight)), covariance)

    def log_evidence(self, x: Tensor) -> np.ndarray:
        return self.marginal().log_prob(x).detach().numpy()

    def kl(self) -> float:
        """KL(guide, posterior), the same for every row."""
        return self.latent_dim * (self.factor**2 / 2 - 0.5 - math.log(self.factor))


class Grid(nn.Module):
    """Rows left of a plate of columns: z_n ~ N(0, 1), x_nj ~ N(z_n, 1); dict data, two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x: dict[str, Tensor]) -> None:
        count, columns = x["cells"].shape
        with pyro.plate("data", count, dim=-2):
            z = pyro.sample("z", dist.Normal(self.shift, 1.0))
            pyro.sample("flag", dist.Bernoulli(logits=z), obs=x["flag"][:, None])
            with pyro.plate("columns", columns, dim=-1):
                pyro.sample("cells", dist.Normal(z, 1.0), obs=x["cells"])

    def guide(self, x: dict[str, Tensor]) -> None:
        columns = x["cells"].shape[1]
        mean = x["cells"].sum(1, keepdim=True) / (columns + 1)
        with pyro.plate("data", len(mean), dim=-2):
            pyro.sample("z", dist.Normal(mean + self.shift, (columns + 1) ** -0.5))


def linear_gaussian(rows: int = 40, **options: float) -> tuple[LinearGaussian, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    program = LinearGaussian(weight, **options)
    z = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return program, z @ weight.T + program.noise * noise
