"""Embeddings, reconstructions and new rows of any program, against closed forms and by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from cases import LIKELIHOODS, POSTERIORS, PRIORS
from own_programs import Covariate, LevelAlone, Mixture, SharedLevel, TwoLevels
from programs import Grid, LinearGaussian, linear_gaussian
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.prediction.reconstruct import central_interval

ROWS = 6


def vae(event_shape: tuple[int, ...] = (3,), **members: Any) -> pv.VAE:
    small = pv.networks.MLP(8)
    parts = {"prior": 2, "likelihood": pv.likelihoods.Normal()} | members
    return pv.VAE(event_shape, **parts, encoder=small, decoder=small, seed=0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """A program and its data, its latent units, its data sites and their shapes in a row."""

    make: Callable[[], nn.Module]
    x: Callable[[], Any]
    units: list[str]
    sites: dict[str, tuple[int, ...]]


Z = ["z[0]", "z[1]"]
PROGRAMS: dict[str, Case] = {
    f"VAE of {name}": Case(
        lambda case=case: vae(case.event_shape, likelihood=case.make()),
        lambda case=case: case.data((ROWS, *case.event_shape)),
        Z,
        {"x": case.event_shape},
    )
    for name, case in LIKELIHOODS.items()
} | {
    "two levels": Case(TwoLevels, lambda: numbers(ROWS, 2), ["w", *Z], {"x": (2,)}),
    "a covariate": Case(
        Covariate, lambda: {"age": numbers(ROWS), "y": numbers(ROWS, 3)}, ["z"], {"y": (3,)}
    ),
    "a discrete latent": Case(Mixture, lambda: numbers(ROWS), ["k"], {"x": ()}),
    "a shared level": Case(SharedLevel, lambda: numbers(ROWS), ["z"], {"x": ()}),
    "two sites and a plate": Case(
        Grid,
        lambda: {"cells": numbers(ROWS, 4).double(), "flag": torch.ones(ROWS).double()},
        ["z"],
        {"flag": (), "cells": (4,)},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_embeds(name: str) -> None:
    case = PROGRAMS[name]
    program, x = case.make(), case.x()
    found = pv.embed(program, x, num_samples=20, seed=0)
    assert found["mean"].dims == ("datum", "latent")
    assert found["latent"].values.tolist() == case.units
    assert found.sizes == {"datum": ROWS, "latent": len(case.units)}
    assert all(np.isfinite(value).all() for value in found.values())
    assert all({"long_name", "units"} <= value.attrs.keys() for value in found.values())
    units = pv.diagnostics.active_units(program, x, 5) if name != "a shared level" else None
    assert units is None or units.index.to_list() == case.units
    xr.testing.assert_identical(found, pv.embed(program, x, num_samples=20, seed=0))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_reconstructs(name: str) -> None:
    case = PROGRAMS[name]
    program, x = case.make(), case.x()
    for site, shape in case.sites.items():
        found = pv.reconstruct(program, x, site=site, num_samples=9, prob=0.8, seed=0)
        centre = found["mode" if "mode" in found else "mean"]
        assert centre.shape == (ROWS, *shape)
        assert centre.dims[1:] == tuple(f"{site}_dim_{i}" for i in range(len(shape)))
        assert "mode" in found or (found["lower"] <= found["upper"]).all()
        assert found.attrs == {"site": site, "num_samples": 9, "prob": 0.8}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_samples(name: str) -> None:
    case = PROGRAMS[name]
    program = case.make()
    is_conditional = not (name.startswith("VAE") or name == "two levels")
    x = case.x() if is_conditional else None
    drawn = pv.sample(program, ROWS + 2, x=x, seed=0)
    parts = drawn if isinstance(drawn, dict) else {next(iter(case.sites)): drawn}
    assert {site: tuple(v.shape) for site, v in parts.items()} == {
        site: (ROWS + 2, *shape) for site, shape in case.sites.items()
    }
    if is_conditional:
        with pytest.raises(ValueError, match=r"cannot run without data .* Pass rows as x="):
            pv.sample(program, 3)


def by_hand(program: pv.VAE, x: Tensor, num_samples: int) -> Tensor:
    """Replicates through `encode` and `decode`, in one go."""
    program.eval()
    with torch.no_grad(), pyro.validation_enabled(False):
        z = program.encode(x).expand((num_samples, len(x))).sample()
        return program.decode(z).sample().double()


def members() -> list[Any]:
    tables = {"likelihood": LIKELIHOODS, "prior": PRIORS, "posterior": POSTERIORS}
    return [pytest.param(kind, name, id=name) for kind in tables for name in tables[kind]]


@pytest.mark.parametrize(("kind", "name"), members())
def test_a_vae_is_reconstructed_and_sampled_as_by_hand(kind: str, name: str) -> None:
    case = {"likelihood": LIKELIHOODS, "prior": PRIORS, "posterior": POSTERIORS}[kind][name]
    event_shape = case.event_shape if kind == "likelihood" else (3,)
    program = vae(event_shape, **case.beside, **{kind: case.make()})
    x = case.data((ROWS, *event_shape)) if kind == "likelihood" else numbers(ROWS, 3)
    torch.manual_seed(3)
    draws = by_hand(program, x, 30)
    found = pv.reconstruct(program, x, num_samples=30, seed=3)
    if "mode" in found:
        assert found["probability"].dims == (*found["mode"].dims, "category")
    else:
        has_mean, has_variance = found["mean"].notnull(), found["mcse"].notnull()
        np.testing.assert_array_equal(found["mean"], np.where(has_mean, draws.mean(0), np.nan))
        error = draws.std(0) / 30**0.5
        np.testing.assert_array_equal(found["mcse"], np.where(has_variance, error, np.nan))
        for bound, value in central_interval(draws, 0.9).items():
            np.testing.assert_array_equal(found[bound], value)
    torch.manual_seed(4)
    with torch.no_grad(), pyro.validation_enabled(False):
        expected = program.model(size=5)
    assert torch.equal(pv.sample(program, 5, seed=4), expected)


def test_chunks_of_a_vae_are_drawn_one_after_the_other() -> None:
    program, x = vae(), numbers(10, 3)
    torch.manual_seed(0)
    draws = torch.cat([by_hand(program, part, 5) for part in x.split(2)], 1)
    found = pv.reconstruct(program, x, num_samples=5, prob=0.5, max_elements=8 * 5 * 2, seed=0)
    np.testing.assert_array_equal(found["mean"], draws.mean(0))


class Widest(nn.Linear):
    """A network that notes how many rows it sees at once."""

    most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        return super().forward(x)


def test_chunks_are_cut_by_the_largest_layer() -> None:
    program = pv.VAE(4, 2, pv.likelihoods.Normal(), decoder=Widest(2, 50), seed=0)
    program.decoder.most = 0
    pv.reconstruct(program, numbers(10, 4), num_samples=9, prob=0.5, max_elements=50 * 9 * 2)
    assert program.decoder.most == 9 * 2
    network = pv.VAE(4, 2, pv.likelihoods.Normal(), encoder=Widest(4, 50), seed=0)
    network.encoder.most = 0
    pv.embed(network, numbers(300, 4), max_elements=50 * 200)
    assert 1 < network.encoder.most < 20


def test_an_embedding_in_closed_form_is_the_posterior() -> None:
    program, x = linear_gaussian(rows=5)
    found = pv.embed(program, x, max_elements=100)
    mean, covariance = program.posterior(x)
    np.testing.assert_allclose(found["mean"], mean.detach())
    sd = covariance.diagonal().sqrt().expand(5, 2).detach()
    np.testing.assert_allclose(found["sd"], sd)
    assert (found[["mean_mcse", "sd_mcse"]] == 0).all()
    assert found.attrs == {"method": "closed form"}


@pytest.mark.parametrize("num_samples", [50, 4000])
def test_an_embedding_by_draws_is_right_within_its_errors(num_samples: int) -> None:
    program, x = TwoLevels(), numbers(200, 2)
    found = pv.embed(program, x, num_samples=num_samples, seed=0)
    assert found.attrs == {"method": "draws", "num_samples": num_samples}
    w = 0.5 * x.mean(-1)
    mean = torch.stack([w, *(x + w[:, None]).T], 1)
    for name, exact in {"mean": mean, "sd": torch.tensor([0.3, 0.5, 0.5])}.items():
        scores = (found[name] - exact.numpy()) / found[f"{name}_mcse"]
        assert np.abs(scores).max() < 6
        assert scores.std() == pytest.approx(1, abs=0.15)


def test_a_discrete_latent_is_embedded_by_draws() -> None:
    found = pv.embed(Mixture(), numbers(50), num_samples=2000, seed=0)
    mean, square = (Mixture.probs @ torch.tensor([0.0, 1.0, 2.0]) ** power for power in (1, 2))
    assert float(found["mean"].mean()) == pytest.approx(float(mean), abs=0.02)
    assert float(found["sd"].mean()) == pytest.approx(float((square - mean**2).sqrt()), abs=0.02)


def test_a_shared_level_is_averaged_over() -> None:
    x = numbers(40)
    found = pv.embed(SharedLevel(), x, num_samples=4000, seed=0)
    assert (abs(found["mean"][:, 0] - (x + 2).numpy()) < 6 * found["mean_mcse"][:, 0]).all()
    np.testing.assert_allclose(found["sd"], 0.5, rtol=0.07)
    predicted = pv.reconstruct(SharedLevel(), x, num_samples=4000, seed=0)
    np.testing.assert_allclose(predicted["mcse"], (1.25 / 4000) ** 0.5, rtol=0.07)
    assert (abs(predicted["mean"] - (x + 2).numpy()) < 6 * predicted["mcse"]).all()


def test_shared_latents_alone_predict_rows() -> None:
    found = pv.reconstruct(LevelAlone(), numbers(40), num_samples=4000, seed=0)
    np.testing.assert_allclose(found["mcse"], (1.09 / 4000) ** 0.5, rtol=0.07)
    assert (abs(found["mean"] - 2) < 6 * found["mcse"]).all()


def test_reconstructions_are_the_posterior_predictive() -> None:
    program, x = linear_gaussian(rows=3)
    found = pv.reconstruct(program, x, num_samples=4000, prob=0.8, seed=0)
    mean, covariance = program.posterior(x)
    weight = program.weight.detach()
    expected = (mean @ weight.T).detach().numpy()
    sd = ((weight @ covariance @ weight.T).diagonal() + 0.25).sqrt().detach().numpy()
    np.testing.assert_allclose(found["mcse"], sd / 4000**0.5 + 0 * expected, rtol=0.06)
    assert (abs(found["mean"] - expected) < 5 * found["mcse"]).all()
    half, error = 1.2815515655446004 * sd, 5 * sd * (0.1 * 0.9 / 4000) ** 0.5 / 0.1755
    assert (abs(found["lower"] - (expected - half)) < error).all()
    assert (abs(found["upper"] - (expected + half)) < error).all()
    for name in ("lower_mcse", "upper_mcse"):
        np.testing.assert_allclose(found[name].mean(), (error / 5).mean(), rtol=0.15)


def test_new_rows_are_drawn_under_the_covariates_given() -> None:
    x = {"age": torch.tensor([-1.0, 0.0, 2.0]), "y": torch.zeros(3, 3)}
    drawn = pv.sample(Covariate(), 600, x=x, seed=0)
    assert isinstance(drawn, Tensor)
    means = drawn.reshape(200, 3, 3).mean((0, 2))
    torch.testing.assert_close(means, torch.tensor([-100.0, 0.0, 200.0]), atol=0.5, rtol=0)
    assert drawn.reshape(200, 3, 3).std(0).mean() == pytest.approx(2**0.5, rel=0.05)
    assert pv.sample(Covariate(), 2, x=x).shape == (2, 3)
    one, two = (pv.sample(Covariate(), 9, x=x, seed=1) for _ in range(2))
    assert torch.equal(one, two)


def test_rows_and_columns_keep_their_names() -> None:
    values = numbers(3, 6)
    frame = pd.DataFrame(values.numpy(), index=list("uvw"), columns=list("abcdef"))
    program = linear_gaussian()[0]
    found = pv.reconstruct(program, frame, num_samples=19, seed=0)
    assert found["datum"].values.tolist() == list("uvw")
    assert found["x_dim_0"].values.tolist() == list("abcdef")
    assert pv.embed(program, frame)["datum"].values.tolist() == list("uvw")
    other = LinearGaussian(program.weight.detach(), site="genes")
    named = pv.reconstruct(other, frame, num_samples=19, seed=0)
    assert named["genes_dim_0"].values.tolist() == list("abcdef")
    assert named["mean"].attrs["units"] == "those of genes"
    np.testing.assert_array_equal(named["mean"], found["mean"])
    columns = pd.DataFrame(values[:, :3].numpy(), index=list("uvw"), columns=list("pqr"))
    conditional = pv.reconstruct(Covariate(), {"age": frame["a"], "y": columns}, num_samples=19)
    assert conditional["y_dim_0"].values.tolist() == list("pqr")


def test_programs_are_left_as_they_are() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    program = pv.VAE(3, 2, pv.likelihoods.Normal(), encoder=network, seed=0)
    program.encoder[2].eval()
    modes = {name: module.training for name, module in program.named_modules()}
    state = {name: value.clone() for name, value in program.state_dict().items()}
    generator, x = torch.get_rng_state(), numbers(ROWS, 3)
    one, two = (pv.reconstruct(program, x, num_samples=19, seed=1) for _ in range(2))
    xr.testing.assert_identical(one, two)
    pv.embed(program, x)
    pv.sample(program, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: module.training for name, module in program.named_modules()} == modes
    assert all(torch.equal(program.state_dict()[name], value) for name, value in state.items())
    assert not pv.sample(program, 3).equal(pv.sample(program, 3))


def test_progress_is_shown_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = vae(), numbers(ROWS, 3)
    monkeypatch.setattr("pyro_vae.engine.progress.is_watched", lambda: True)
    pv.embed(program, x)
    pv.reconstruct(program, x, num_samples=19)
    shown = capfd.readouterr().err
    assert "embed: 100%" in shown
    assert "reconstruct: 100%" in shown
    pv.embed(program, x, progress=False)
    assert capfd.readouterr().err == ""


class Alone(nn.Module):
    """x_n from one distribution, whatever z_n ~ Bernoulli(1 / 2) is."""

    def __init__(self, law: Any) -> None:
        super().__init__()
        self.law, self.unused = law, nn.Parameter(torch.zeros(()))

    def law_at(self, z: Tensor) -> Any:
        return self.law

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", self.law_at(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))


class Coded(Alone):
    """x_n from categories whose probabilities depend on z_n, in `law` columns."""

    def law_at(self, z: Tensor) -> Any:
        share = z.reshape(*z.shape, *(1 for _ in self.law), 1)
        probs = (share * FLAT + (1 - share) * RARE).expand(*z.shape, *self.law, 16)
        return dist.Categorical(probs).to_event(len(self.law))


RARE = torch.tensor([0.6, 0.3, *[0.0] * 13, 0.1])  # the codes 0, 1 and 15
FLAT = torch.full((16,), 1 / 16)


@pytest.mark.parametrize("columns", [(), (2,), (2, 3)])
def test_categories_have_probabilities_and_a_mode(columns: tuple[int, ...]) -> None:
    program, x = Coded(columns), torch.zeros(4, *columns)
    found = pv.reconstruct(program, x, num_samples=1000, max_elements=20000, seed=0)
    assert set(found) == {"probability", "probability_mcse", "mode"}
    dims = tuple(f"x_dim_{i}" for i in range(len(columns)))
    assert found["probability"].dims == ("datum", *dims, "category")
    error = np.broadcast_to((RARE - FLAT).abs() / 2 / 1000**0.5, (4, *columns, 16))
    np.testing.assert_allclose(found["probability"].sum("category"), 1, atol=1e-6)
    np.testing.assert_allclose(found["probability_mcse"], error, rtol=0.1)
    expected = ((RARE + FLAT) / 2).numpy()
    assert (abs(found["probability"].to_numpy() - expected) < 5 * error).all()
    assert (found["mode"] == 0).all()


def test_ordered_categories_have_probabilities_too() -> None:
    law = dist.OrderedLogistic(torch.zeros(()), torch.tensor([-1.0, 1.0]))
    found = pv.reconstruct(Alone(law), torch.zeros(2), seed=0)
    np.testing.assert_allclose(found["probability"], law.probs.expand(2, 3), atol=1e-6)


TAILS: dict[str, tuple[Any, bool, bool]] = {
    "Normal": (dist.Normal(0.0, 1.0), True, True),
    "Poisson": (dist.Poisson(3.0), True, True),
    "Bernoulli": (dist.Bernoulli(0.3), True, True),
    "StudentT(3)": (dist.StudentT(3.0), True, True),
    "StudentT(1.5)": (dist.StudentT(1.5), True, False),
    "StudentT(1)": (dist.StudentT(1.0), False, False),
    "StudentT(0.5)": (dist.StudentT(0.5), False, False),
    "Cauchy": (dist.Cauchy(0.0, 1.0), False, False),
    "HalfCauchy": (dist.HalfCauchy(1.0), False, False),
    "Pareto(1.5)": (dist.Pareto(1.0, 1.5), True, False),
    "Pareto(1)": (dist.Pareto(1.0, 1.0), False, False),
    "InverseGamma(1.5)": (dist.InverseGamma(1.5, 1.0), True, False),
    "InverseGamma(0.5)": (dist.InverseGamma(0.5, 1.0), False, False),
    "a mixture of Cauchy": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Cauchy(torch.zeros(2), torch.ones(2))
        ),
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", TAILS)
def test_there_is_no_mean_where_the_likelihood_has_none(name: str) -> None:
    law, has_mean, has_variance = TAILS[name]
    found = pv.reconstruct(Alone(law), torch.ones(3) * 2.0 ** (name[0] in "HPI"), seed=0)
    assert (found["mean"].notnull() == has_mean).all()
    assert (found["mcse"].notnull() == has_variance).all()
    assert ("no finite mean" in found["mean"].attrs.get("missing", "")) != has_mean
    assert ("no finite variance" in found["mcse"].attrs.get("missing", "")) != has_variance
    assert found[["lower", "lower_mcse", "upper", "upper_mcse"]].notnull().all()


@pytest.mark.parametrize("prob", [0.5, 0.8, 0.9, 0.95])
def test_intervals_cover_what_they_say_or_are_refused(prob: float) -> None:
    program = linear_gaussian(rows=3)[0]
    law, least = dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)), round(2 / (1 - prob) - 1)
    torch.manual_seed(0)
    for num_samples in range(2, 3 * least, max(1, least // 4)):
        if num_samples < least:
            with pytest.raises(ValueError, match=f"num_samples of at least {least} for an"):
                pv.reconstruct(program, numbers(3, 6), num_samples=num_samples, prob=prob)
            continue
        found = central_interval(law.sample((num_samples, 10000)).double(), prob)
        mass = law.cdf(found["upper"].float()) - law.cdf(found["lower"].float())
        error = float(mass.std()) / 100
        assert float(mass.mean()) > prob - 4 * error
        assert float(mass.mean()) < prob + 2 / num_samples + 4 * error


@pytest.mark.parametrize(("num_samples", "prob"), [(20, 0.98), (200, 0.9), (201, 0.5), (50, 0.01)])
def test_the_errors_of_an_interval_are_those_of_other_draws(num_samples: int, prob: float) -> None:
    found = central_interval(torch.randn(num_samples, 4000, dtype=torch.float64), prob)
    for name in ("lower", "upper"):
        assert found[f"{name}_mcse"].mean() == pytest.approx(found[name].std().item(), rel=0.3)


def test_the_error_of_a_bound_is_half_the_distance_of_the_draws_around_it() -> None:
    found = central_interval(torch.arange(200.0).square()[torch.randperm(200), None], 0.9)
    assert found["lower"].item() == 9**2
    assert found["lower_mcse"].item() == (12**2 - 6**2) / 2
    assert found["upper"].item() == 190**2
    assert found["upper_mcse"].item() == (193**2 - 187**2) / 2
    few = central_interval(torch.tensor([3.0, 1.0])[:, None], 0.9)
    assert {name: value.item() for name, value in few.items()} == {
        "lower": 1.0,
        "lower_mcse": 2.0,
        "upper": 3.0,
        "upper_mcse": 2.0,
    }


@pytest.mark.parametrize("num_samples", [2, 3, 10, 199, 200])
@pytest.mark.parametrize("prob", [0.01, 0.5, 0.9, 0.999])
def test_intervals_leave_out_as_many_below_as_above(num_samples: int, prob: float) -> None:
    found = central_interval(torch.randperm(num_samples).double()[:, None], prob)
    lower, upper = found["lower"], found["upper"]
    assert lower.item() + upper.item() == num_samples - 1
    assert lower <= upper
    between = (upper - lower).item() / (num_samples + 1)
    assert abs(between - prob) < 2 / num_samples or lower == 0


GRID = {"cells": torch.zeros(2, 3).double(), "flag": torch.ones(2).double()}
X = numbers(ROWS, 3)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "embed no program": (lambda: pv.embed(nn.Linear(3, 2), X), "Expected a program"),
    "reconstruct no program": (lambda: pv.reconstruct(nn.Linear(3, 2), X), "Expected a program"),
    "sample no program": (lambda: pv.sample(nn.Linear(3, 2), 3), "Expected a program"),
    "embed bad data": (lambda: pv.embed(vae(), X[:, :2]), "event shape"),
    "reconstruct bad data": (lambda: pv.reconstruct(vae(), X * torch.nan), "Expected"),
    "one draw": (lambda: pv.embed(vae(), X, num_samples=1), "num_samples .* at least 2; got 1"),
    "no elements": (lambda: pv.embed(vae(), X, max_elements=0), "max_elements"),
    "one replicate": (
        lambda: pv.reconstruct(vae(), X, num_samples=1),
        "num_samples .* least 2; got 1",
    ),
    "half a draw": (lambda: pv.reconstruct(vae(), X, num_samples=2.5), "num_samples .* least 2"),
    "no probability": (lambda: pv.reconstruct(vae(), X, prob=1.0), "0 < prob < 1"),
    "no rows": (lambda: pv.sample(vae(), 0), "num_rows .* at least 1; got 0"),
    "half a row": (lambda: pv.sample(vae(), 2.5), "num_rows"),
    "a shared latent alone": (
        lambda: pv.embed(LevelAlone(), X[:, 0]),
        "needs a latent site for each row.* share: m",
    ),
    "which site": (
        lambda: pv.reconstruct(Grid(), GRID),
        r"site to be one of .*'flag', 'cells'.; got None",
    ),
    "another site": (lambda: pv.reconstruct(vae(), X, site="y"), r"'x'.; got 'y'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
