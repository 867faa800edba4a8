"""Programs whose evidence and posterior have a closed form, and annealing held against it."""

import pyro
import pyro.distributions as dist
import torch
from programs import LinearGaussian
from torch import Tensor, nn

from pyro_vae.data.read import read
from pyro_vae.engine.running import evaluating, seeded
from pyro_vae.evidence.annealed import annealed
from pyro_vae.evidence.log_evidence import estimates

GUIDES = {"exact": (1.0, 0.0), "half as wide": (0.5, 0.0), "shifted": (1.0, 0.5)}


class Shifted(LinearGaussian):
    """The guide's mean is `shift` standard deviations from that of the posterior."""

    def __init__(self, weight: Tensor, *, factor: float, shift: float) -> None:
        super().__init__(weight, factor=factor)
        self.shift = shift

    def guide(self, x: Tensor) -> None:
        mean, covariance = self.posterior(x)
        mean = mean + self.shift * covariance.diagonal().sqrt()
        scale_tril = torch.linalg.cholesky(covariance) * self.factor
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale_tril))


def shifted(size: int, guide: str, rows: int) -> tuple[Shifted, Tensor, Tensor]:
    """A program with `size` latents, rows simulated from it, and their latents."""
    factor, shift = GUIDES[guide]
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    z = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 2 * size, generator=generator, dtype=torch.float64)
    program = Shifted(weight, factor=factor, shift=shift)
    return program, z @ weight.T + program.noise * noise, z


class GammaPoisson(nn.Module):
    """z ~ Gamma(shape, 1), x ~ Poisson(z): x is negative binomial, z given x is a Gamma."""

    def __init__(self, shape: float = 1.5, *, point: bool = False) -> None:
        super().__init__()
        self.shape, self.point = nn.Parameter(torch.tensor(shape, dtype=torch.float64)), point

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(self.shape, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        mean = (x[:, 0] + self.shape) / 2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(mean) if self.point else dist.LogNormal(mean.log(), 0.5))

    def exact(self, x: Tensor) -> Tensor:
        half = torch.tensor(0.5, dtype=x.dtype)
        return dist.NegativeBinomial(self.shape, probs=half).log_prob(x[:, 0]).detach()


class TwoModes(nn.Module):
    """z ~ N(0, 1), x ~ N(z^2, 0.1): two modes at -sqrt(x), sqrt(x) if x is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), self.noise), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0].clamp_min(0.0).sqrt(), 0.2))


def against_exact(
    size: int, guide: str, rows: int, *, num_temperatures: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """The errors of annealing, forwards and backwards, and their reported errors, by row."""
    program, x, z = shifted(size, guide, rows)
    data = read(x, program)
    with evaluating(program), seeded(seed):
        found = annealed(program, data, num_temperatures=num_temperatures, simulated=z)
    assert found.log_reverse is not None
    forward = estimates(found.log_weights)
    backward = estimates(-found.log_reverse)
    exact = program.log_evidence(x)
    return {
        "error": torch.from_numpy(forward["log_evidence"] - exact),
        "mcse": torch.from_numpy(forward["mcse"]),
        "upper_error": torch.from_numpy(-backward["log_evidence"] - exact),
    }
