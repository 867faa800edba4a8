"""Programs as a user writes them: levels of latents, covariates, discrete and shared latents."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class TwoLevels(nn.Module):
    """w_n ~ N(0, 1), z_n ~ N(w_n, I), x_n ~ N(z_n, I / 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        with pyro.plate("data", size if x is None else len(x)):
            w = pyro.sample("w", dist.Normal(self.weight.new_zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(w[..., None].expand(*w.shape, 2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z, event_dim=1)
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        x = self.weight.new_zeros(size, 2) if x is None else x
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(self.weight * x.mean(-1), 0.3))
            pyro.sample("z", dist.Normal(x + w[..., None], 0.4).to_event(1))


class Covariate(nn.Module):
    """z_n ~ N(0, 1), y_n ~ N(z_n + slope * age_n, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(100.0))

    def model(self, row: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(row["age"])):
            z = pyro.sample("z", dist.Normal(self.slope.new_zeros(()), 1.0))
            loc = (z + self.slope * row["age"])[..., None].expand(*z.shape, 3)
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=row["y"])

    def guide(self, row: dict[str, Tensor]) -> None:
        residual = row["y"].mean(-1) - self.slope * row["age"]
        with pyro.plate("data", len(row["age"])):
            pyro.sample("z", dist.Normal(0.75 * residual, 0.5))


class Mixture(nn.Module):
    """k_n in {0, 1, 2} drawn by the guide with fixed probabilities; x_n ~ N(k_n, 1)."""

    probs = torch.tensor([0.2, 0.3, 0.5])

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(k.float(), self.scale), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(self.probs.expand(len(x), 3)))


class SharedLevel(nn.Module):
    """A level that all rows share: m ~ N(0, 1), z_n ~ N(m, 1), x_n ~ N(z_n, 1)."""

    has_rows = True

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(self.shift, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0)) if self.has_rows else m
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(self.shift + 2.0, 0.3))
        if self.has_rows:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x + m, 0.4))


class LevelAlone(SharedLevel):
    has_rows = False
