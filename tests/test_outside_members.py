"""Members and programs written outside the package, as a user writes them, through every door."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401 - its style is compared before and after
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.elbos.multi_sample import MultiSample

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.DegenerateColumnsWarning")

ROWS, COLUMNS = 24, 4


class FlowPrior(nn.Module):
    """The flow prior of Pyro's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.MAF(features=2, transforms=2, hidden_features=(8,))

    def forward(self) -> ZukoToPyro:
        return ZukoToPyro(self.flow())


class Hurdle(pv.Likelihood):
    """x is 0 with a probability, else log-normal."""

    def build(self, event_shape: tuple[int, ...], features: Tensor | None = None) -> "Hurdle":
        self.gate = nn.Linear(features.shape[-1], *event_shape)
        self.loc = nn.Linear(features.shape[-1], *event_shape)
        return super().build(event_shape, features)

    def forward(self, features: Tensor | None = None) -> dist.Distribution:
        return HurdleLogNormal(self.gate(features), self.loc(features)).to_event(1)


class HurdleLogNormal(dist.TorchDistribution):
    arg_constraints = {"gate": dist.constraints.real, "loc": dist.constraints.real}
    support = dist.constraints.nonnegative

    def __init__(self, gate: Tensor, loc: Tensor) -> None:
        self.gate, self.loc = gate, loc
        super().__init__(gate.shape, validate_args=False)

    def expand(self, shape: Any, _instance: Any = None) -> "HurdleLogNormal":
        return HurdleLogNormal(self.gate.expand(shape), self.loc.expand(shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        zero = torch.bernoulli(self.gate.sigmoid().expand(shape))
        return torch.where(zero == 1, 0.0, (self.loc + torch.randn(shape)).exp())

    def log_prob(self, value: Tensor) -> Tensor:
        positive = dist.LogNormal(self.loc, 1.0).log_prob(torch.where(value > 0, value, 1.0))
        logits = nn.functional.logsigmoid
        return torch.where(value > 0, logits(-self.gate) + positive, logits(self.gate))


class TwoComponents(pv.Posterior):
    """A posterior with two modes."""

    def build(
        self, event_shape: tuple[int, ...], features: Tensor | None = None
    ) -> "TwoComponents":
        self.loc = nn.Linear(features.shape[-1], 2 * math.prod(event_shape))
        return super().build(event_shape, features)

    def forward(self, features: Tensor | None = None) -> dist.Distribution:
        loc = self.loc(features).unflatten(-1, (2, *self.event_shape))
        parts = dist.Normal(loc, 0.7).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc[..., 0])), parts)


class Levels(nn.Module):
    """Two levels of latents for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(COLUMNS, 4), nn.Linear(1, COLUMNS)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            low = pyro.sample("low", dist.Normal(top, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(low), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        top, top_scale, low, low_scale = self.encoder(x).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("top", dist.Normal(top, top_scale.exp()).to_event(1))
            pyro.sample("low", dist.Normal(low, low_scale.exp()).to_event(1))


class Covariate(nn.Module):
    """p(x | z, context), the covariate expanded to the particles."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(COLUMNS + 2, 2), nn.Linear(3, COLUMNS)

    def model(self, row: dict[str, Tensor]) -> None:
        x, context = row["x"], row["context"]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            context = context.expand(*z.shape[:-1], -1)
            loc = self.decoder(torch.cat([z, context], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, row: dict[str, Tensor]) -> None:
        loc, log_scale = self.encoder(torch.cat([row["x"], row["context"]], -1)).split(1, -1)
        with pyro.plate("data", len(loc)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae(**members: Any) -> pv.VAE:
    parts: dict[str, Any] = {"prior": 2, "likelihood": pv.likelihoods.Normal()} | members
    small = {"encoder": pv.networks.MLP(8), "decoder": pv.networks.MLP(8), "seed": 0}
    return pv.VAE(COLUMNS, **parts, **small)


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "a flow prior": lambda: vae(prior=FlowPrior()),
    "a hurdle likelihood": lambda: vae(likelihood=Hurdle()),
    "a posterior of two components": lambda: vae(posterior=TwoComponents()),
    "two levels of latents": Levels,
    "a covariate": Covariate,
}


def rows(program: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of x, and what goes beside them."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, COLUMNS).clamp_min(0.0)
    return x, {"context": torch.randn(ROWS, 2)} if isinstance(program, Covariate) else {}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_goes_through_every_door(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]()
    x, beside = rows(program)
    options: dict[str, Any] = {"seed": 0, **beside}
    history = pv.fit(program, x, max_epochs=3, progress=False, **options)
    assert math.isfinite(history.table["elbo"].iloc[-1])
    evidence = pv.log_evidence(program, x, 50, **options)
    assert evidence["log_evidence"].notnull().all()
    assert pv.compare({"a": program}, x, 50, **options).index.tolist() == ["a"]
    tree = pv.to_arviz(program, x, 20, **options)
    assert tree["posterior_predictive"]["x"].shape[-2:] == (ROWS, COLUMNS)
    embedded = pv.embed(program, x, **options)
    assert embedded["mean"].notnull().all()
    assert (embedded["sd"] > 0).all()
    replicates = pv.reconstruct(program, x, num_samples=20, **options)
    assert (replicates["lower"] <= replicates["upper"]).all()
    pv.plots.latents(program, x, **options)
    pv.plots.reconstructions(program, x, **options)
    path = pv.save(program, tmp_path / "program")
    other = PROGRAMS[name]()
    pv.load(path, into=other)
    again = pv.log_evidence(other, x, 50, **options)
    assert again.equals(evidence)
    with pytest.raises(ValueError, match=r"call pyro_vae.load\(path, into=program\)"):
        pv.load(path)


class Median(MultiSample):
    """The median of the log-weights, which bounds nothing."""

    direction = "no bound"
    unbiased_value = False

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.median(0).values


def test_an_estimator() -> None:
    program = vae()
    x, _ = rows(program)
    elbo = Median(num_particles=3)
    assert len(pv.fit(program, x, elbo=elbo, max_epochs=2, seed=0, progress=False)) == 2
    table = pv.compare_elbos(
        program, x, {"median": elbo, "ELBO": pv.elbos.Trace_ELBO()}, num_repeats=4, reference=64
    ).table
    assert table.loc["median", "direction"] == "no bound"
    assert elbo.per_row(program, x, num_repeats=4).value.shape == (ROWS,)


def test_a_flow_prior_is_a_density_that_trains() -> None:
    program = vae(prior=FlowPrior())
    before = [p.detach().clone() for p in program.prior.parameters()]
    x, _ = rows(program)
    pv.fit(program, x, max_epochs=2, seed=0, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, program.prior.parameters()))
    with torch.no_grad():
        line = torch.linspace(-8.0, 8.0, 161)
        plane = torch.cartesian_prod(line, line)
        mass = program.prior().log_prob(plane).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(float(mass) - 1.0) < 1e-2


def test_data_of_an_own_likelihood_are_checked() -> None:
    with pytest.raises(ValueError, match="in the support of Hurdle, values >= 0; got -1"):
        pv.log_evidence(vae(likelihood=Hurdle()), -torch.ones(3, COLUMNS))


@pytest.mark.parametrize("lacking", ["prior", "posterior", "likelihood"])
def test_a_module_that_returns_no_distribution_is_refused(lacking: str) -> None:
    with pytest.raises(ValueError, match="of Identity to return a distribution|fit each other"):
        vae(**{lacking: nn.Identity()})
