"""A row's evidence is its own: it does not move with other rows, chunks or engines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import POSTERIORS
from programs import Grid, linear_gaussian
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.engine.row_noise import Noise, ReadFields, RowNoise, row_keys

ROWS = 12


class Discrete(nn.Module):
    """A class and a bit of each row, drawn by the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1.0, 1.0, 3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=torch.zeros(3)))
            bit = pyro.sample("bit", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(kind + bit, 1.0), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(logits=self.logits + x[:, :1]))
            pyro.sample("bit", dist.Bernoulli(0.4))


class Simplex(nn.Module):
    """Shares of each row with a Dirichlet guide, a scale with a uniform and one with a t."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
            width = pyro.sample("width", dist.Uniform(0.5, 2.0))
            level = pyro.sample("level", dist.StudentT(4.0, 0.0, 1.0))
            loc = level + shares[..., 0] - shares[..., 1]
            pyro.sample("x", dist.Normal(loc, width), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("shares", dist.Dirichlet(self.shape))
            pyro.sample("width", dist.Uniform(0.5, 2.0))
            pyro.sample("level", dist.StudentT(5.0, 0.5 * x[:, 0], 1.0))


def of_member(name: str) -> Callable[[], nn.Module]:
    case = POSTERIORS[name]
    small = {"encoder": pv.networks.MLP(8), "decoder": pv.networks.MLP(8), "seed": 0}
    asked: dict[str, Any] = {"prior": 2, "likelihood": pv.likelihoods.Normal()} | case.beside
    return lambda: pv.VAE(6, **asked, posterior=case.make(), **small)


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    name: of_member(name) for name in POSTERIORS if name != "Delta"
} | {
    "half-normal prior": lambda: pv.VAE(
        6, dist.HalfNormal(torch.ones(2)).to_event(1), pv.likelihoods.Normal(), seed=0
    ),
    "linear": lambda: linear_gaussian(factor=0.8)[0],
    "plates": Grid,
    "discrete": Discrete,
    "simplex": Simplex,
}


def rows_of(name: str, rows: int = ROWS) -> Any:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    if name == "plates":
        return {"cells": x[:, :3].double(), "flag": (x[:, 4] > 0).double()}
    return x.double() if name == "linear" else x


def taken(x: Any, index: Any) -> Any:
    return {k: v[index] for k, v in x.items()} if isinstance(x, dict) else x[index]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_row_is_scored_alike_wherever_it_stands(name: str) -> None:
    program, x = PROGRAMS[name](), rows_of(name)
    whole = pv.log_evidence(program, x, 60, seed=3)
    mixed = [5, 2, 11, 2, 0]
    others = {
        "a part": (pv.log_evidence(program, taken(x, slice(3, 7)), 60, seed=3), slice(3, 7)),
        "another order": (pv.log_evidence(program, taken(x, mixed[:3]), 60, seed=3), mixed[:3]),
        "small pieces": (
            pv.log_evidence(program, x, 60, seed=3, max_elements=300),
            slice(None),
        ),
    }
    for what, (found, index) in others.items():
        for quantity in ("log_evidence", "elbo", "mcse", "log_evidence_quarter"):
            np.testing.assert_allclose(
                found[quantity], whole[quantity][index], rtol=1e-4, atol=1e-4, err_msg=what
            )
    assert np.ptp(whole["mcse"].to_numpy()) > 0
    again = pv.log_evidence(program, taken(x, mixed), 60, seed=3)["log_evidence"].to_numpy()
    assert again[1] != again[3]  # equal rows have draws of their own


def test_errors_of_rows_are_independent() -> None:
    program, _ = linear_gaussian(factor=0.8)
    x = torch.randn(1, 6, dtype=torch.float64).expand(40, 6)
    runs = [pv.log_evidence(program, x, 50, seed=seed) for seed in range(80)]
    means = np.array([float(run["log_evidence"].mean()) for run in runs])
    each = np.array([run["log_evidence"].to_numpy() for run in runs])
    ratio = means.std(ddof=1) / np.sqrt(each.var(0, ddof=1).mean() / 40)
    assert 0.75 < ratio < 1.3


LAWS: dict[str, Distribution] = {
    "Normal": dist.Normal(1.0, 2.0),
    "LogNormal": dist.LogNormal(0.0, 1.0),
    "Uniform": dist.Uniform(-1.0, 2.0),
    "Exponential": dist.Exponential(3.0),
    "Weibull": dist.Weibull(2.0, 0.7),
    "Laplace": dist.Laplace(0.0, 1.0),
    "Gumbel": dist.Gumbel(0.0, 1.0),
    "HalfNormal": dist.HalfNormal(1.0),
    "Gamma of 0.1": dist.Gamma(0.1, 2.0),
    "Gamma of 1": dist.Gamma(1.0, 1.0),
    "Gamma of 30": dist.Gamma(30.0, 1.0),
    "Beta": dist.Beta(0.7, 1.5),
    "StudentT": dist.StudentT(4.0, 0.0, 1.0),
    "Bernoulli": dist.Bernoulli(0.3),
    "Categorical": dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
}


def drawn(law: Distribution, keys: np.ndarray, size: int, *, is_stratified: bool) -> Tensor:
    """Draws (size, rows) of a law by the numbers of the rows."""

    def program() -> Tensor:
        with pyro.plate("draws", size, dim=-2), pyro.plate("data", len(keys), dim=-1):
            return pyro.sample("z", law)

    with RowNoise(-1) as recorder:
        program()
    noise = Noise(recorder.sizes, size, 0, is_stratified=is_stratified)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with RowNoise(-1, noise.table, noise.shifts(keys)):
        draws: Tensor = program()
    assert torch.equal(torch.get_rng_state(), before)
    return draws


@pytest.mark.parametrize("is_stratified", [False, True])
@pytest.mark.parametrize("name", LAWS)
def test_numbers_follow_their_law(name: str, is_stratified: bool) -> None:
    law, keys = LAWS[name], row_keys(read(torch.arange(20.0)[:, None]))
    draws = drawn(law, keys, 400, is_stratified=is_stratified).double()
    assert len(draws.flatten().unique()) > (1 if name in ("Bernoulli", "Categorical") else 7800)
    torch.manual_seed(1)
    expected = law.sample((8000,)).double()
    assert stats.ks_2samp(draws.flatten().numpy(), expected.numpy()).pvalue > 1e-3
    error = draws.mean(0).std() / (draws.std() / 400**0.5)  # of the mean of one row
    assert error < 1.4 if is_stratified else 0.6 < error < 1.5


@pytest.mark.parametrize("name", LAWS)
def test_rows_are_independent_at_each_draw(name: str) -> None:
    keys = row_keys(read(torch.arange(400.0)[:, None]))
    draws = drawn(LAWS[name], keys, 30, is_stratified=False).double()
    error = draws.mean(1).std() / (draws.std() / 400**0.5)
    assert 0.6 < error < 1.5


def test_keys_are_those_of_values() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-0.0, 1.0]])
    keys = row_keys(read(x))
    assert len(set(keys.tolist())) == 4
    np.testing.assert_array_equal(row_keys(read(x.double())), keys)
    np.testing.assert_array_equal(row_keys(read(x.long())), keys)
    np.testing.assert_array_equal(row_keys(read(x[:2])), keys[:2])
    assert row_keys(read(x[1:]))[0] == keys[1]


def test_fields_that_a_program_reads_are_recorded() -> None:
    def read_of(use: Callable[[dict[str, Tensor]], Any]) -> set[str]:
        row = ReadFields({"x": torch.ones(2), "context": torch.ones(2)})
        use(row)
        return row.names

    assert read_of(lambda row: row["x"]) == {"x"}
    assert read_of(lambda row: row.get("context")) == {"context"}
    assert read_of(lambda row: row.get("weight", 1.0)) == set()
    assert read_of(lambda row: list(row.values())) == {"x", "context"}
    assert read_of(lambda row: list(row.items())) == {"x", "context"}


class Counted(nn.Module):
    """A latent count, which the guide draws from a Poisson."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(self.log_rate.exp() + 0.0 * x))


def test_a_draw_that_torch_alone_can_make_is_left_to_it() -> None:
    one, two = (pv.log_evidence(Counted(), torch.ones(4), 50, seed=0) for _ in range(2))
    np.testing.assert_array_equal(one["elbo"], two["elbo"])
