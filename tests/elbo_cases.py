"""The table of estimators that the laws run over, and programs whose parameters are per row."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae import elbos
from pyro_vae.elbos import Estimator

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "Trace_ELBO": elbos.Trace_ELBO,
    "Trace_ELBO, 2": partial(elbos.Trace_ELBO, 2),
    "TraceMeanField_ELBO": elbos.TraceMeanField_ELBO,
    "TraceMeanField_ELBO, 2": partial(elbos.TraceMeanField_ELBO, 2),
    "TraceGraph_ELBO": elbos.TraceGraph_ELBO,
    "TraceGraph_ELBO, 2": partial(elbos.TraceGraph_ELBO, 2),
    "TraceEnum_ELBO": partial(elbos.TraceEnum_ELBO, strict_enumeration_warning=False),
    "IWAE": partial(elbos.IWAE, 3),
    "Renyi": partial(elbos.Renyi, 3, alpha=0.5),
    "Renyi, 2": partial(elbos.Renyi, 3, alpha=2.0),
    "Renyi, -1": partial(elbos.Renyi, 3, alpha=-1.0),
    "MIWAE": partial(elbos.MIWAE, 2, 2),
    "CIWAE": partial(elbos.CIWAE, 3, beta=0.3),
    "PIWAE": partial(elbos.PIWAE, 2, 2),
    "STL": elbos.STL,
    "STL, 3": partial(elbos.STL, 3),
    "DReG": partial(elbos.DReG, 3),
    "VIMCO": partial(elbos.VIMCO, 3),
    "RWS": partial(elbos.RWS, 3),
    "TVO": partial(elbos.TVO, 3),
    "CUBO": partial(elbos.CUBO, 3),
    "BetaELBO": partial(elbos.BetaELBO, beta=2.0),
    "BetaELBO of DReG": lambda: elbos.BetaELBO(beta=0.5, elbo=elbos.DReG(3)),
    "FreeBits, 0": partial(elbos.FreeBits, 2, nats=0.0),
    "FreeBits": partial(elbos.FreeBits, nats=0.15),
    "TotalCorrelation": partial(elbos.TotalCorrelation, beta=3.0),
    "TotalCorrelation, 1": partial(elbos.TotalCorrelation, beta=1.0),
    "MMD": partial(elbos.MMD, 2, weight=2.0),
}
BASES = {
    "Estimate",
    "Estimator",
    "MonteCarlo",
    "MultiSample",
    "Objective",
    "PerRow",
    "Weighted",
    "Weights",
}
COUPLED = {"FreeBits", "TotalCorrelation", "TotalCorrelation, 1", "MMD"}  # rows with each other


def that(holds: Callable[[Estimator], bool]) -> list[str]:
    """The names of the estimators for which something holds."""
    return [name for name, make in ESTIMATORS.items() if holds(make())]


class Copies(nn.Module):
    """A program that has a copy of its parameters for each row: a gradient tells them apart."""

    groups: ClassVar[dict[str, set[str]]]

    def __init__(self, values: dict[str, Tensor], x: Tensor, repeats: int) -> None:
        super().__init__()
        self.x, self.distinct = x.repeat(repeats, 1), len(x)
        rows = len(self.x)
        self.copies = nn.ParameterDict(
            {name: value.expand(rows, *value.shape).clone() for name, value in values.items()}
        )

    def __getattr__(self, name: str) -> Any:
        copies = self.__dict__["_modules"].get("copies")
        if copies is not None and name in copies:
            return copies[name]
        return super().__getattr__(name)

    @classmethod
    def names(cls, *groups: str) -> set[str]:
        return set().union(*(cls.groups[group] for group in groups))


class Pair(nn.Module):
    """A program whose model and guide are functions of another program's, wrapped for instance."""

    def __init__(
        self, program: nn.Module, model: Callable[..., Any], guide: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.program, self.model, self.guide = program, model, guide


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector[..., None, :]).sum(-1)


def log_normal(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    scaled = (x - loc) * (-log_scale).exp()
    return -0.5 * scaled.square() - log_scale - 0.5 * math.log(2 * math.pi)


def tensors(**values: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


GAUSSIAN = tensors(
    loc=[0.2, -0.1],
    log_scale=[0.1, -0.2],
    weight=[[1.0, 0.3], [-0.4, 0.8], [0.5, 0.6]],
    log_noise=-0.1,
    slope=[[0.35, -0.15, 0.1], [0.05, 0.3, 0.25]],
    intercept=[0.5, -0.05],
    log_spread=[-0.25, -0.45],
)
X = torch.tensor([[0.7, -0.3, 1.1], [-0.9, 0.8, 0.2]], dtype=torch.float64)


class Gaussian(Copies):
    """z ~ N(m, t^2), x ~ N(W z, s^2); q(z | x) = N(A x + b, diag)."""

    groups = {
        "prior": {"loc", "log_scale"},
        "decoder": {"weight", "log_noise"},
        "encoder": {"slope", "intercept", "log_spread"},
    }

    def __init__(self, repeats: int = 1, **changed: Tensor) -> None:
        super().__init__(GAUSSIAN | changed, X, repeats)

    def rows(self, x: Tensor) -> Any:
        return pyro.plate("data", len(x))

    def model(self, x: Tensor) -> None:
        with self.rows(x):
            z = pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
            noise = self.log_noise.exp()[:, None]
            pyro.sample("x", dist.Normal(times(self.weight, z), noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.rows(x):
            loc = times(self.slope, x) + self.intercept
            pyro.sample("z", dist.Normal(loc, self.log_spread.exp()).to_event(1))

    def log_weights(self, num_particles: int, beta: float = 1.0) -> Tensor:
        """The log-weights in plain torch, (num_particles, rows)."""
        mean = times(self.slope, self.x) + self.intercept
        noise = torch.randn(num_particles, *mean.shape, dtype=mean.dtype)
        z = mean + self.log_spread.exp() * noise
        log_q = log_normal(z, mean, self.log_spread).sum(-1)
        log_p = log_normal(z, self.loc, self.log_scale).sum(-1)
        seen = log_normal(self.x, times(self.weight, z), self.log_noise[:, None]).sum(-1)
        return seen + beta * (log_p - log_q)

    def parts(self) -> tuple[Tensor, Tensor]:
        """The expected reconstruction (rows,), and the KL divergence (rows, dims)."""
        mean, variance = times(self.slope, self.x) + self.intercept, (2 * self.log_spread).exp()
        squares = (self.x - times(self.weight, mean)).square().sum(-1)
        squares = squares + (self.weight.square() * variance[:, None]).sum((-1, -2))
        seen = -0.5 * squares * (-2 * self.log_noise).exp()
        seen = seen - 3 * self.log_noise - 1.5 * math.log(2 * math.pi)
        ratio = (variance + (mean - self.loc).square()) * (-2 * self.log_scale).exp()
        return seen, 0.5 * (ratio - 1.0) + self.log_scale - self.log_spread

    def elbo(self, beta: float = 1.0) -> Tensor:
        seen, kl = self.parts()
        return seen - beta * kl.sum(-1)

    def log_evidence(self) -> Tensor:
        noise = (2 * self.log_noise).exp()[:, None, None] * torch.eye(3, dtype=self.x.dtype)
        spread = self.weight * self.log_scale.exp()[:, None]
        covariance = spread @ spread.mT + noise
        return dist.MultivariateNormal(times(self.weight, self.loc), covariance).log_prob(self.x)


HIERARCHY = tensors(
    top_loc=0.2,
    top_log_scale=0.1,
    middle_slope=0.7,
    middle_intercept=-0.2,
    middle_log_scale=-0.3,
    weight=[0.9, -0.6],
    log_noise=-0.2,
    top_slope=[0.2, -0.2],
    top_intercept=0.15,
    top_log_spread=-0.3,
    down_slope=[0.5, -0.3, 0.35],
    down_intercept=-0.1,
    down_log_spread=-0.4,
)


class Hierarchy(Copies):
    """z1 ~ N, z2 ~ N(a z1 + b), x ~ N(w z2, s^2); the guide draws z1, then z2 given z1."""

    groups = {
        "prior": {
            "top_loc",
            "top_log_scale",
            "middle_slope",
            "middle_intercept",
            "middle_log_scale",
        },
        "decoder": {"weight", "log_noise"},
        "encoder": {
            "top_slope",
            "top_intercept",
            "top_log_spread",
            "down_slope",
            "down_intercept",
            "down_log_spread",
        },
    }

    def __init__(self, repeats: int = 1) -> None:
        super().__init__(HIERARCHY, X[:, :2], repeats)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(self.top_loc, self.top_log_scale.exp()))
            loc = self.middle_slope * top + self.middle_intercept
            middle = pyro.sample("middle", dist.Normal(loc, self.middle_log_scale.exp()))
            seen = dist.Normal(middle[..., None] * self.weight, self.log_noise.exp()[:, None])
            pyro.sample("x", seen.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = (self.top_slope * x).sum(-1) + self.top_intercept
            top = pyro.sample("top", dist.Normal(loc, self.top_log_spread.exp()))
            loc = (self.down_slope[:, :2] * x).sum(-1) + self.down_intercept
            loc = loc + self.down_slope[:, 2] * top
            pyro.sample("middle", dist.Normal(loc, self.down_log_spread.exp()))

    def log_weights(self, num_particles: int, beta: float = 1.0) -> Tensor:
        noise = torch.randn(2, num_particles, len(self.x), dtype=self.x.dtype)
        top_loc = (self.top_slope * self.x).sum(-1) + self.top_intercept
        top = top_loc + self.top_log_spread.exp() * noise[0]
        down_loc = (self.down_slope[:, :2] * self.x).sum(-1) + self.down_intercept
        down_loc = down_loc + self.down_slope[:, 2] * top
        middle = down_loc + self.down_log_spread.exp() * noise[1]
        log_q = log_normal(top, top_loc, self.top_log_spread)
        log_q = log_q + log_normal(middle, down_loc, self.down_log_spread)
        loc = self.middle_slope * top + self.middle_intercept
        log_p = log_normal(top, self.top_loc, self.top_log_scale)
        log_p = log_p + log_normal(middle, loc, self.middle_log_scale)
        seen = log_normal(self.x, middle[..., None] * self.weight, self.log_noise[:, None])
        return seen.sum(-1) + beta * (log_p - log_q)


POSITIVE = tensors(log_rate=0.2, log_noise=-0.4, slope=0.3, intercept=-0.2, log_spread=-0.6)


class Positive(Copies):
    """z ~ Gamma(2, r), x ~ N(z, s^2); q(z | x) is a LogNormal, a transformed distribution."""

    groups = {
        "prior": {"log_rate"},
        "decoder": {"log_noise"},
        "encoder": {"slope", "intercept", "log_spread"},
    }

    def __init__(self, repeats: int = 1) -> None:
        super().__init__(POSITIVE, X[:, :1], repeats)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            two = torch.full_like(self.log_rate, 2.0)
            z = pyro.sample("z", dist.Gamma(two, self.log_rate.exp()))
            pyro.sample("x", dist.Normal(z, self.log_noise.exp()), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = self.slope * x[:, 0] + self.intercept
            pyro.sample("z", dist.LogNormal(loc, self.log_spread.exp()))

    def log_weights(self, num_particles: int, beta: float = 1.0) -> Tensor:
        loc = self.slope * self.x[:, 0] + self.intercept
        noise = torch.randn(num_particles, len(loc), dtype=loc.dtype)
        log_z = loc + self.log_spread.exp() * noise
        z = log_z.exp()
        log_q = log_normal(log_z, loc, self.log_spread) - log_z
        log_p = 2 * self.log_rate + log_z - self.log_rate.exp() * z
        return log_normal(self.x[:, 0], z, self.log_noise) + beta * (log_p - log_q)


DISCRETE = tensors(
    prior=[0.3, -0.2, 0.1],
    means=[[1.0, 0.2], [-0.5, 0.9], [0.1, -1.0]],
    slope=[[0.8, 0.1], [-0.3, 0.5], [0.0, -0.6]],
    logits=[0.1, 0.3, -0.2],
)


class Discrete(Copies):
    """z of three categories, x ~ N(m_z, 1); the guide's logits are linear in x."""

    groups = {"prior": {"prior"}, "decoder": {"means"}, "encoder": {"slope", "logits"}}

    def __init__(self, repeats: int = 1) -> None:
        super().__init__(DISCRETE, X[:, :2], repeats)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            loc = self.means[torch.arange(len(x)), z]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.guide_logits()))

    def guide_logits(self) -> Tensor:
        return times(self.slope, self.x) + self.logits

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """log q, log p(z) and log p(x | z) of each category, each (rows, 3)."""
        seen = log_normal(self.x[:, None], self.means, torch.zeros((), dtype=self.x.dtype)).sum(-1)
        return self.guide_logits().log_softmax(-1), self.prior.log_softmax(-1), seen


class Handed(Messenger):
    """Gives a site the draws that it is handed."""

    def __init__(self, **draws: Tensor) -> None:
        super().__init__()
        self.draws = draws

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.draws and not msg["done"] and not msg["is_observed"]:
            msg["value"], msg["done"] = self.draws[msg["name"]], True


class Mean(NamedTuple):
    """A mean over repeats, and its standard error."""

    value: Tensor
    se: Tensor

    def z(self, other: "Mean") -> float:
        """The largest distance to another, in standard errors."""
        close = 1e-9 * (1.0 + other.value.abs())
        error = (self.se.square() + other.se.square()).sqrt()
        return ((self.value - other.value).abs() / (error + close)).max().item()


class Moments:
    """Means over repeats of what has a value for each row, the same rows again and again."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, distinct: int, **found: Tensor) -> None:
        for name, values in found.items():
            repeats = values.detach().unflatten(0, (-1, distinct))
            sums = [repeats.sum(0), repeats.square().sum(0)]
            old = self.sums.get(name, [torch.zeros_like(part) for part in sums])
            self.sums[name] = [one + other for one, other in zip(old, sums)]
        self.count += len(repeats)

    def means(self) -> dict[str, Mean]:
        found = {}
        for name, (total, squares) in self.sums.items():
            mean = total / self.count
            variance = (squares / self.count - mean.square()).clamp_min(0.0)
            found[name] = Mean(mean, (variance / (self.count - 1)).sqrt())
        return found


def grads(program: Copies, total: Tensor, **options: Any) -> dict[str, Tensor]:
    """The gradient of each row's parameters."""
    parameters = dict(program.copies.items())
    found = torch.autograd.grad(
        total, list(parameters.values()), allow_unused=True, materialize_grads=True, **options
    )
    return dict(zip(parameters, found))


def exact(program: Copies, per_row: Tensor, **options: Any) -> dict[str, Mean]:
    """The gradient of what has no noise."""
    moments = {"value": per_row.detach()} | grads(program, per_row.sum(), **options)
    return {name: Mean(value, torch.zeros_like(value)) for name, value in moments.items()}


def estimates(
    make: Callable[[int], Copies], estimator: Estimator, repeats: int, chunk: int = 10_000
) -> dict[str, Mean]:
    """The means over repeats of an estimator's value and gradient, for each row."""
    moments = Moments()
    with pyro.validation_enabled(False):
        for size in chunks(repeats, chunk):
            program = make(size)
            found = estimator.estimate(program.model, program.guide, program.x)
            value = {} if found.per_row is None else {"value": found.per_row}
            moments.add(program.distinct, **value, **grads(program, -found.loss))
    return moments.means()


def chunks(total: int, chunk: int) -> Iterator[int]:
    yield from [chunk] * (total // chunk)
    if total % chunk:
        yield total % chunk


def worst(one: dict[str, Mean], other: dict[str, Mean], names: set[str]) -> float:
    """The largest distance over names, in standard errors."""
    return max(one[name].z(other[name]) for name in names)
