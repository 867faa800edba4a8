"""The ArviZ tree, the comparison of models, and active units."""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from programs import Grid, LinearGaussian, linear_gaussian
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics import active_units, compare, to_arviz
from pyro_vae.diagnostics.stacking import stacking_weights
from pyro_vae.evidence import Evidence
from pyro_vae.training.ensemble import Ensemble

comparing = sys.modules[compare.__module__]
MODERN = int(az.__version__.split(".")[0]) >= 1
GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "sample_stats",
    "vi_stats",
}


def groups_of(tree: Any) -> set[str]:
    return set(tree.children) if MODERN else set(tree.groups())


def dataset(tree: Any, group: str) -> xr.Dataset:
    return tree[group].to_dataset() if MODERN else tree[group]


@pytest.fixture(scope="module")
def tree() -> Any:
    program, x = linear_gaussian(rows=12)
    return to_arviz(program, frame(x), 200, num_predictive=50, seed=0)


def frame(x: Tensor) -> pd.DataFrame:
    names = [f"wine {i}" for i in range(len(x))]
    return pd.DataFrame(x.numpy(), index=names, columns=list("abcdef"))


def test_the_container_is_that_of_the_installed_arviz(tree: Any) -> None:
    assert isinstance(tree, xr.DataTree if MODERN else az.InferenceData)
    assert groups_of(tree) == GROUPS


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_dim_has_coordinates(tree: Any, group: str) -> None:
    values = dataset(tree, group)
    assert set(values.coords) - {"note"} == set(values.dims)
    assert values["datum"].to_numpy().tolist() == [f"wine {i}" for i in range(12)]
    if "x_dim_0" in values.dims:
        assert values["x_dim_0"].to_numpy().tolist() == list("abcdef")


def test_dims(tree: Any) -> None:
    sizes = {group: dict(dataset(tree, group).sizes) for group in GROUPS}
    z = {"chain": 1, "draw": 200, "datum": 12, "z_dim_0": 2}
    x = {"chain": 1, "draw": 50, "datum": 12, "x_dim_0": 6}
    assert sizes["posterior"] == z
    assert sizes["prior"] == {**z, "draw": 50}
    assert sizes["posterior_predictive"] == sizes["prior_predictive"] == x
    assert sizes["sample_stats"] == {"chain": 1, "draw": 200, "datum": 12}
    assert sizes["observed_data"] == {"datum": 12, "x_dim_0": 6}
    assert sizes["vi_stats"] == {"datum": 12}
    assert {"log_evidence", "mcse", "ess", "pareto_k", "elbo"} <= set(dataset(tree, "vi_stats"))


def test_draws_are_of_the_program(tree: Any) -> None:
    program, x = linear_gaussian(rows=12)
    mean, covariance = program.posterior(x)
    weight = program.weight.detach().numpy()
    z = dataset(tree, "posterior")["z"].to_numpy()[0]
    np.testing.assert_allclose(z.mean(0), mean.detach(), atol=0.15)
    np.testing.assert_allclose(np.cov(z[:, 0].T), covariance.detach(), atol=0.05)
    prior = dataset(tree, "prior")["z"].to_numpy()[0]
    assert abs(prior.std() - 1) < 0.1
    for group, latents in (("posterior_predictive", z), ("prior_predictive", prior)):
        noise = dataset(tree, group)["x"].to_numpy()[0] - latents[:50] @ weight.T
        assert abs(noise.std() - program.noise) < 0.05
    np.testing.assert_array_equal(dataset(tree, "observed_data")["x"], x)


def test_weights_are_of_the_program(tree: Any) -> None:
    program, x = linear_gaussian(rows=12)
    stats, z = dataset(tree, "sample_stats"), dataset(tree, "posterior")["z"].to_numpy()[0]
    exact = program.log_evidence(x)
    np.testing.assert_allclose(stats["log_weight"][0], np.tile(exact, (200, 1)), atol=1e-9)
    np.testing.assert_array_equal(stats["log_weight"], stats["log_joint"] - stats["log_q"])
    mean, covariance = program.posterior(x)
    guide = dist.MultivariateNormal(mean, covariance).log_prob(torch.from_numpy(z))
    np.testing.assert_allclose(stats["log_q"][0], guide.detach(), atol=1e-9)
    np.testing.assert_allclose(dataset(tree, "vi_stats")["log_evidence"], exact, atol=1e-9)


@pytest.mark.parametrize("max_elements", [2**24, 3_000, 500])
def test_pieces_are_put_together(max_elements: int) -> None:
    program, x = linear_gaussian(rows=7)
    tree = to_arviz(program, x, 60, num_predictive=21, seed=0, max_elements=max_elements)
    weight = program.weight.detach().numpy()
    assert dict(dataset(tree, "posterior").sizes) == {
        "chain": 1,
        "draw": 60,
        "datum": 7,
        "z_dim_0": 2,
    }
    z = dataset(tree, "posterior")["z"].to_numpy()[0]
    noise = dataset(tree, "posterior_predictive")["x"].to_numpy()[0] - z[:21] @ weight.T
    assert abs(noise.std() - program.noise) < 0.06
    np.testing.assert_allclose(z.mean(0), program.posterior(x)[0].detach(), atol=0.3)
    np.testing.assert_array_equal(dataset(tree, "observed_data")["x"], x)


def test_predictive_draws_are_bounded() -> None:
    program, x = linear_gaussian(rows=10)
    draws = {
        bound: dataset(to_arviz(program, x, 150, max_elements=bound), "posterior_predictive").sizes
        for bound in (2**24, 600)
    }
    assert (draws[2**24]["draw"], draws[600]["draw"]) == (100, 10)
    tree = to_arviz(program, x, 10, num_predictive=99)
    assert dataset(tree, "prior_predictive").sizes["draw"] == 10


def test_data_under_another_name() -> None:
    program, x = linear_gaussian(rows=5, site="counts")
    tree = to_arviz(program, frame(x), 10)
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        assert dataset(tree, group)["counts_dim_0"].to_numpy().tolist() == list("abcdef")


def test_a_dict_of_data_and_plates_beside_the_rows() -> None:
    cells = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), columns=["u", "v", "w"])
    tree = to_arviz(Grid(), {"cells": cells, "flag": torch.ones(5)}, 20, num_predictive=4)
    observed = dataset(tree, "observed_data")
    np.testing.assert_array_equal(observed["cells"], cells)
    assert observed["cells_dim_0"].to_numpy().tolist() == ["u", "v", "w"]
    assert observed["flag"].dims == ("datum",)
    assert dataset(tree, "posterior")["z"].shape == (1, 20, 5)
    assert dataset(tree, "posterior_predictive")["cells"].shape == (1, 4, 5, 3)
    assert dataset(tree, "prior_predictive")["flag"].shape == (1, 4, 5)


class TwoKinds(nn.Module):
    """A discrete and a continuous latent, and an image; parameters as Pyro's own statements."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 12)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=x.new_zeros(3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(z) + kind[..., None]
            image = dist.Bernoulli(logits=logits.reshape(*logits.shape[:-1], 3, 4)).to_event(2)
            pyro.sample("image", image, obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(logits=x.new_zeros(len(x), 3)))
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))


def test_discrete_latents_and_images() -> None:
    tree = to_arviz(TwoKinds(), torch.ones(5, 3, 4), 10, seed=0)
    assert dataset(tree, "posterior")["kind"].dims == ("chain", "draw", "datum")
    predictive = dataset(tree, "posterior_predictive")["image"]
    assert predictive.dims == ("chain", "draw", "datum", "image_dim_0", "image_dim_1")
    assert set(np.unique(predictive)) == {0.0, 1.0}


class Annotated(LinearGaussian):
    """The same model with a factor, which adds nothing, and a named intermediate value."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            mean = pyro.deterministic("mean", z @ self.weight.T, event_dim=1)
            pyro.factor("penalty", x.new_zeros(len(x)))
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=x)


def test_factors_and_named_values_are_not_data() -> None:
    program, x = linear_gaussian(rows=5)
    annotated = Annotated(program.weight.detach())
    tree = to_arviz(annotated, x, 10, seed=0)
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        assert list(dataset(tree, group)) == ["x"]
    table = compare({"plain": program, "annotated": annotated}, x, 10)
    np.testing.assert_allclose(table["difference"], 0, atol=1e-12)


def vae(posterior: nn.Module | None = None, prior: Any = 2) -> nn.Module:
    network = pv.networks.MLP(8)
    likelihood = pv.likelihoods.Poisson()
    return pv.VAE(5, prior, likelihood, posterior, encoder=network, decoder=network, seed=0)


COUNTS = torch.arange(20.0).reshape(4, 5)


@pytest.mark.parametrize("prior", [2, pv.priors.VampPrior(3, 2), pv.priors.Mixture(3, 2)])
def test_an_unfitted_vae(prior: Any) -> None:
    program = vae(prior=prior)
    program.train()
    before = torch.get_rng_state()
    tree = to_arviz(program, COUNTS, 10, seed=0)
    assert program.training
    assert torch.equal(before, torch.get_rng_state())
    assert groups_of(tree) == GROUPS
    assert dataset(tree, "prior_predictive")["x"].shape == (1, 10, 4, 5)


def test_a_guide_of_point_masses_has_no_importance_weights() -> None:
    tree = to_arviz(vae(pv.posteriors.Delta()), COUNTS, 10, seed=0)
    stats = dataset(tree, "vi_stats")
    assert np.isfinite(stats["elbo"]).all()
    assert all(np.isnan(stats[name]).all() for name in ("log_evidence", "pareto_k", "ess"))


def test_a_round_trip_through_netcdf(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "tree.nc"
    tree.to_netcdf(path)
    back = az.from_netcdf(path)
    assert groups_of(back) == GROUPS
    for group in GROUPS:
        xr.testing.assert_identical(dataset(back, group).load(), dataset(tree, group))
    back.close()


def test_arviz_reads_it(tree: Any, quiet: None) -> None:
    table = az.summary(tree, var_names=["z"], kind="stats")
    assert len(table) == 24
    wine = {"datum": "wine 0"}
    if MODERN:
        az.plot_forest(tree, var_names=["z"], coords=wine, backend="matplotlib")
        az.plot_ppc_dist(tree, num_samples=5, backend="matplotlib")
        az.plot_dist(tree, var_names=["z"], coords=wine, backend="matplotlib")
    else:
        az.plot_forest(tree, var_names=["z"], coords=wine)
        az.plot_ppc(tree, num_pp_samples=5)
        az.plot_posterior(tree, var_names=["z"], coords=wine)
        az.plot_pair(tree, var_names=["z"], coords=wine)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"arviz[._].*")
        yield


def true_and_wrong() -> tuple[dict[str, nn.Module], Tensor]:
    program, x = linear_gaussian(rows=60)
    wrong = LinearGaussian(program.weight.detach()[:, :1])
    return {"wrong": wrong, "true": program}, x


def test_compare_puts_the_best_first() -> None:
    programs, x = true_and_wrong()
    table = compare(programs, x, 50)
    assert table.index.to_list() == ["true", "wrong"]
    exact = {name: program.log_evidence(x) for name, program in programs.items()}
    difference = exact["wrong"] - exact["true"]
    np.testing.assert_allclose(table["difference"], [0, difference.mean()], atol=1e-9)
    error = difference.std(ddof=1) / np.sqrt(len(x))
    np.testing.assert_allclose(table["difference_se"], [0, error], atol=1e-9)
    np.testing.assert_allclose(
        table["log_evidence"], [exact["true"].mean(), exact["wrong"].mean()]
    )
    assert table.loc["wrong", "difference_se"] < table.loc["wrong", "se"]
    np.testing.assert_allclose(table["elbo_se"], table["se"])
    last = ["elbo", "elbo_se", "pareto_k_over", "pareto_k_missing", "note", "below", "advice"]
    assert table.columns.to_list()[-7:] == last
    assert "training seed" in table.attrs["remark"]
    assert table.attrs["num_samples"] == 50
    assert table.attrs["num_rows"] == 60


def test_a_ranking_has_a_summary_and_a_plot() -> None:
    programs, x = true_and_wrong()
    table = compare(programs, x, 50, seed=0)
    text = table.summary()
    assert text.startswith("'true' has the largest mean log p(x): ")
    distance, error = (table.loc["wrong", name] for name in ("difference", "difference_se"))
    assert f"'wrong' is {-distance:.3f} (s.e. {error:.3f}) nats per row below it." in text
    assert "From 12 to 50 draws" in text
    assert text.endswith(table.attrs["remark"])
    twins = compare({"a": programs["true"], "b": programs["true"]}, x, 50)
    assert "'b' is 0.000 (s.e. 0.000) nats per row below it, which is within" in twins.summary()
    figure = table.plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["true", "wrong"]
    assert table.plot(ax=axes) is figure


def test_a_ranking_says_where_the_error_is_unknown() -> None:
    programs, x = true_and_wrong()
    bad = LinearGaussian(programs["true"].weight.detach(), factor=0.4)
    given = {"exact": programs["true"], "bad": bad}
    with pytest.warns(UserWarning, match="for 'bad'"):
        table = compare(given, x, 400, refine=False, seed=0, progress=False)
    over = int(pv.log_evidence(bad, x, 400, refine=False, seed=0, progress=False).is_over().sum())
    assert over > 30
    note = f"error unknown in {over} of 60 rows"
    assert table["note"].to_dict() == {"exact": "", "bad": note}
    assert f"Notes on log p(x): 'bad': {note}. The error is unknown if" in table.summary()
    assert "Notes" not in compare({"exact": programs["true"]}, x, 400, seed=0).summary()
    few = compare({"exact": programs["true"], "again": programs["true"]}, x, 20, seed=0)
    assert (few["pareto_k_over"] == 0).all()  # the weights of the posterior itself are constant
    narrow = LinearGaussian(programs["true"].weight.detach(), factor=0.9)
    few = compare({"narrow": narrow}, x, 20, refine=False, seed=0)
    assert (few.loc["narrow", "pareto_k_over"], few.loc["narrow", "pareto_k_missing"]) == (0, 1)
    assert "Notes on log p(x): 'narrow': k not known in 60 of 60 rows." in few.summary()


def test_compare_draws_a_seed_of_its_own() -> None:
    programs, x = true_and_wrong()
    narrow = {"narrow": LinearGaussian(programs["true"].weight.detach(), factor=0.8)}
    one, two = (compare(narrow, x, 16) for _ in range(2))
    assert one.attrs["seed"] != two.attrs["seed"]
    again = compare(narrow, x, 16, seed=one.attrs["seed"])
    pd.testing.assert_frame_equal(again, one)


def scored(scores: dict[str, Any], k: float = 0.1) -> dict[str, Evidence]:
    """What `log_evidence` returns of given log p(x), by the name of the program."""
    names = ("log_evidence", "log_evidence_quarter", "elbo")
    attrs = {"num_samples": 1000, "good_k": 0.67, "seed": 0}
    return {
        name: Evidence(
            {n: ("datum", np.asarray(own, dtype=float)) for n in names}
            | {"pareto_k": ("datum", np.full(len(own), k))},
            {"datum": np.arange(len(own)), "note": ("datum", ["ok"] * len(own))},
            attrs,
        )
        for name, own in scores.items()
    }


def ranked(monkeypatch: pytest.MonkeyPatch, scores: dict[str, Any]) -> Any:
    """The ranking of programs whose log p(x) of each row is given."""
    program, x = linear_gaussian(rows=len(next(iter(scores.values()))))
    programs = {name: LinearGaussian(program.weight.detach()) for name in scores}
    found = iter(scored(scores).values())
    monkeypatch.setattr(comparing, "log_evidence", lambda *_, **__: next(found))
    return compare(programs, x, 1000, seed=0)


NOISE = np.random.default_rng(0).normal(size=(3, 400))
NOISE -= NOISE.mean(1, keepdims=True)
ENOUGH = 2 * NOISE[1].std(ddof=1) / 20  # two standard errors of the mean of NOISE[1]
WITHIN: dict[str, tuple[Any, Any, bool]] = {
    "equal": (NOISE[0], NOISE[0], True),
    "just within": (NOISE[0], NOISE[0] + NOISE[1] - 0.99 * ENOUGH, True),
    "just without": (NOISE[0], NOISE[0] + NOISE[1] - 1.01 * ENOUGH, False),
    "always a little less": (NOISE[0], NOISE[0] - 1e-6, False),
    "impossible": (NOISE[0], np.full(400, -np.inf), False),
    "not a number": (NOISE[0], np.full(400, np.nan), False),
    "one row": (NOISE[0, :1], NOISE[0, :1] - 1, False),
    "one row, equal": (NOISE[0, :1], NOISE[0, :1], True),
}


@pytest.mark.parametrize("case", WITHIN)
def test_models_that_equal_the_best_within_error_are_marked(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, other, is_within = WITHIN[case]
    table = ranked(monkeypatch, {"other": other, "best": best})
    assert table["within_error"].to_dict() == {"best": True, "other": is_within}
    sentence = "below it, which is within error."
    assert (sentence in table.summary()) == is_within
    marked = repr(table).split("the best within error: ")[1].splitlines()[0]
    assert set(marked.split(", ")) == ({"best", "other"} if is_within else {"best"})


@pytest.mark.parametrize(("size", "is_within"), [(0.5, False), (1.1, True)])
def test_a_difference_that_the_guides_make_is_within_error(
    size: float, is_within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scored({"best": NOISE[0], "other": NOISE[0] - 1})
    found["other"]["log_evidence_quarter"] = found["other"]["log_evidence"] - size
    values = iter(found.values())
    monkeypatch.setattr(comparing, "log_evidence", lambda *_, **__: next(values))
    program, x = linear_gaussian(rows=400)
    with pytest.warns(UserWarning, match="for 'other'"):
        table = compare({"best": program, "other": program}, x, 1000, seed=0)
    assert table["within_error"].to_list() == [True, is_within]


@pytest.mark.parametrize("level", [0.0, -900.0, 900.0, -1e5])
def test_stacking_weights_do_not_depend_on_the_level(
    level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tops = np.where(np.arange(400) < 300, 2.0, -2.0)
    scores = {"a": tops, "b": -tops, "c": np.full(400, -50.0)}
    table = ranked(monkeypatch, {name: own + level for name, own in scores.items()})
    found = minimize(
        lambda w: -np.log(w * np.exp(tops) + (1 - w) * np.exp(-tops)).sum(), 0.5, bounds=[(0, 1)]
    )
    np.testing.assert_allclose(table["weight"], [found.x[0], 1 - found.x[0], 0.0], atol=2e-3)
    assert f"Stacking weights: 'a' {found.x[0]:.2f}, 'b'" in table.summary()


WEIGHTS: dict[str, tuple[list[list[float]], list[float]]] = {
    "twins": ([[-1.0, -1.0], [-2.0, -2.0]], [0.5, 0.5]),
    "one model": ([[-1.0], [-2.0]], [1.0]),
    "a row that no model can produce": ([[-np.inf, -np.inf], [-1.0, -99.0]], [1.0, 0.0]),
    "a row that one model cannot produce": ([[-np.inf, -1.0], [-1.0, -np.inf]], [0.5, 0.5]),
    "not a number": ([[np.nan, -1.0], [np.nan, -3.0]], [0.0, 1.0]),
    "nothing possible": ([[-np.inf, np.nan]], [np.nan, np.nan]),
    "far apart": ([[-900.0, -1e6], [900.0, -1e6]], [1.0, 0.0]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_stacking_weights_of_hard_cases(case: str) -> None:
    log_evidence, expected = WEIGHTS[case]
    np.testing.assert_allclose(stacking_weights(np.array(log_evidence)), expected, atol=1e-4)


def test_stacking_weights_come_near_the_largest_log_score() -> None:
    log_evidence = np.random.default_rng(0).normal(size=(300, 4)) * 0.5 - [0.0, 0.1, 0.2, 1.0]
    densities = np.exp(log_evidence)
    found = minimize(lambda v: -np.log(densities @ np.exp(v - logsumexp(v))).mean(), np.zeros(4))
    weights = stacking_weights(log_evidence - 900)
    assert np.log(densities @ weights).mean() > -found.fun - 2e-5


def test_the_error_of_an_ensemble_covers_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"a1": NOISE[0] + 0.2, "a2": NOISE[0] - 0.2, "b": NOISE[0] + NOISE[1] - 0.1}
    found = iter((scored(scores) | scored({"a1": scores["a1"]}, 0.9)).values())
    monkeypatch.setattr(comparing, "log_evidence", lambda *_, **__: next(found))
    program, x = linear_gaussian(rows=400)
    table = compare({"a": Ensemble([program, program]), "b": program}, x, 1000, seed=0)
    sd = np.std([0.2, -0.2], ddof=1)
    np.testing.assert_allclose(table["training_sd"], [sd, np.nan])
    rows = NOISE[1].std(ddof=1) / 20
    np.testing.assert_allclose(table["difference_se"], [0, np.hypot(rows, sd / np.sqrt(2))])
    np.testing.assert_allclose(table.evidence["log_evidence"][0], NOISE[0], atol=1e-12)
    assert table["pareto_k_over"].to_list() == [1, 0]  # if it is over the limit in one member
    assert f"From one fit of 'a' to another the mean has a standard deviation of {sd:.3f}." in (
        table.summary()
    )


def test_refined_rows_have_the_evidence_of_the_model() -> None:
    program, x = linear_gaussian(rows=60)
    programs = {"exact": program, "bad": LinearGaussian(program.weight.detach(), factor=0.5)}
    with pytest.warns(UserWarning, match="for 'bad'"):
        guides = compare(programs, x, 1000, refine=False, seed=0)
    refined = compare(programs, x, 1000, seed=0)
    assert guides.loc["bad", "pareto_k_over"] > 0.3
    assert refined["within_error"].all()
    assert (refined["pareto_k_over"] == 0).all()
    assert refined["difference"].abs().max() < 0.01


def test_an_ensemble_of_one_fit_is_that_fit() -> None:
    programs, x = true_and_wrong()
    one = compare(programs, x, 50, seed=0)
    other = compare({name: Ensemble([own]) for name, own in programs.items()}, x, 50, seed=0)
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("num_samples", [20, 400])
def test_arviz_compares_and_plots_a_ranking(num_samples: int, quiet: None) -> None:
    programs, x = true_and_wrong()
    programs["narrow"] = LinearGaussian(programs["true"].weight.detach(), factor=0.9)
    table = compare(programs, x, num_samples, refine=False, seed=0)
    elpd = table.to_arviz_elpd()
    assert list(elpd) == table.index.to_list()
    found = az.compare(elpd, **({"round_to": "none"} if MODERN else {}))
    assert found.index.to_list() == list(elpd)
    name = "elpd" if MODERN else "elpd_loo"
    np.testing.assert_allclose(found[name], 60 * table["log_evidence"])
    np.testing.assert_allclose(found["elpd_diff"].abs(), -60 * table["difference"], atol=1e-9)
    np.testing.assert_allclose(found["dse"], np.sqrt(60 * 59) * table["difference_se"], atol=1e-9)
    if num_samples == 400:  # twins may share their weight in any way
        np.testing.assert_allclose(found["weight"]["wrong"], table["weight"]["wrong"], atol=0.01)
    for own in elpd.values():
        assert "60" in str(own)
        az.plot_khat(own)
    az.plot_compare(found)
    assert elpd["true"].good_k == table.attrs["good_k"]


def test_arviz_draws_the_ecdf_of_a_tree(tree: Any, quiet: None) -> None:
    pit = dataset(tree, "prior")["z"].copy(data=norm.cdf(dataset(tree, "prior")["z"]))
    pit = pit.isel(datum=0, drop=True)
    if MODERN:
        az.plot_ecdf_pit(xr.DataTree.from_dict({"prior_sbc": pit.to_dataset(name="z")}))
    else:
        uniform = {"cdf": lambda u: u, "difference": True, "confidence_bands": "simulated"}
        az.plot_ecdf(pit.sel(z_dim_0=0).to_numpy().ravel(), **uniform)


def test_compare_of_one() -> None:
    programs, x = true_and_wrong()
    table = compare({"true": programs["true"]}, x, 50)
    assert table.loc["true", "difference"] == 0


def test_compare_warns_of_a_difference_that_moves() -> None:
    program, x = linear_gaussian(rows=300)
    narrow = LinearGaussian(program.weight.detach(), factor=0.5)
    with pytest.warns(UserWarning, match="more than its standard error .* for 'narrow'"):
        table = compare({"exact": program, "narrow": narrow}, x, 16)
    assert table.loc["narrow", "trend"] > 2 * table.loc["narrow", "trend_se"]
    clear = LinearGaussian(program.weight.detach() * 3, factor=0.8)
    table = compare({"exact": program, "clear": clear}, x, 64)
    assert abs(table.loc["clear", "trend"]) < table.loc["clear", "difference_se"]


def test_compare_of_twins() -> None:
    program, x = linear_gaussian(factor=0.8)
    table = compare({"a": program, "b": program}, x, 50)
    assert (table["difference"] == 0).all()
    assert (table["difference_se"] == 0).all()
    assert table.index.to_list() == ["a", "b"]
    assert compare({"b": program, "a": program}, x, 50).index.to_list() == ["b", "a"]


def test_compare_keeps_the_order_of_ties() -> None:
    same = vae()
    assert compare({"a": same, "b": same}, COUNTS, 20).index.to_list() == ["a", "b"]
    assert compare({"b": same, "a": same}, COUNTS, 20).index.to_list() == ["b", "a"]


def other(likelihood: nn.Module) -> nn.Module:
    network = pv.networks.MLP(8)
    return pv.VAE(5, 2, likelihood, encoder=network, decoder=network, seed=0)


def delta() -> nn.Module:
    return vae(pv.posteriors.Delta())


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "mass beside density": (
        lambda: compare({"a": vae(), "b": other(pv.likelihoods.Normal())}, COUNTS),
        "'a' and 'b' have different base measures: a mass function and a density for x.0.",
    ),
    "nothing": (lambda: compare({}, COUNTS), "dict of programs"),
    "a list": (lambda: compare([vae()], COUNTS), "dict of programs"),  # type: ignore[arg-type]
    "no program": (lambda: compare({"net": nn.Linear(5, 2)}, COUNTS), "program.*'net'"),
    "an empty ensemble": (lambda: compare({"a": Ensemble()}, COUNTS), "one fit or more.*'a'"),
    "no program in an ensemble": (
        lambda: compare({"nets": Ensemble([vae(), nn.Linear(5, 2)])}, COUNTS),
        "program.*'nets'",
    ),
    "few draws": (lambda: compare({"a": vae()}, COUNTS, 2), "num_samples"),
    "a point mass": (lambda: compare({"a": vae(), "ae": delta()}, COUNTS), "Delta.*'ae'"),
    "bad data": (lambda: compare({"a": vae()}, COUNTS - 9), "'a'"),
    "tree of no program": (lambda: to_arviz(nn.Linear(5, 2), COUNTS), "Expected a program"),
    "tree of few draws": (lambda: to_arviz(vae(), COUNTS, 3), "num_samples"),
    "tree of no predictive draws": (
        lambda: to_arviz(vae(), COUNTS, num_predictive=0),
        "num_predictive",
    ),
    "tree of no rows": (lambda: to_arviz(vae(), COUNTS[:0]), "at least one row"),
    "units of one row": (lambda: active_units(vae(), COUNTS[:1]), "two rows or more; got 1"),
    "units of one draw": (lambda: active_units(vae(), COUNTS, 1), "num_samples"),
    "units of no program": (lambda: active_units(nn.Linear(5, 2), COUNTS), "Expected a program"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("max_elements", [2**24, 500])
def test_active_units(max_elements: int) -> None:
    program, x = linear_gaussian(rows=2000)
    weight = program.weight.detach()
    idle = LinearGaussian(torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1))
    table = active_units(idle, x, 50, seed=0, max_elements=max_elements)
    mean, covariance = idle.posterior(x)
    exact = mean.detach().var(0).numpy()
    assert table.index.to_list() == ["z[0]", "z[1]", "z[2]"]
    assert table["active"].to_list() == [True, True, False]
    np.testing.assert_allclose(table["variance"], exact, atol=0.02)
    assert abs(table.loc["z[2]", "variance"]) < 4 * table.loc["z[2]", "se"]
    np.testing.assert_allclose(table["within"], covariance.detach().diagonal(), rtol=0.05)


def test_active_units_draw_a_seed_and_record_it() -> None:
    program, x = linear_gaussian(rows=20)
    one, two = (active_units(program, x, 5) for _ in range(2))
    assert one.attrs["seed"] != two.attrs["seed"]
    again = active_units(program, x, 5, seed=one.attrs["seed"])
    pd.testing.assert_frame_equal(again, one)


class Units(nn.Module):
    """One latent that follows x and one that is drawn from the prior; both in units of `unit`."""

    def __init__(self, prior: Callable[[Tensor], Any], unit: float, *, level: bool) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.tensor(unit, dtype=torch.float64))
        self.prior, self.level = prior, level

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            level = torch.zeros_like(x)
            if self.level:
                level = pyro.sample("level", dist.Normal(0 * self.unit, self.unit))
            u = pyro.sample("u", self.prior(self.unit))
            pyro.sample("idle", self.prior(self.unit))
            z = pyro.sample("z", dist.Normal(level, self.unit)) if self.level else u
            pyro.sample("x", dist.Normal((u + z) / self.unit, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.level:
                pyro.sample("level", dist.Normal(x * self.unit, self.unit))
                pyro.sample("z", dist.Normal(0 * self.unit, self.unit))
            low = self.unit * (0.2 + 2 * torch.sigmoid(3 * x))
            pyro.sample("u", dist.Uniform(low, low + self.unit))
            pyro.sample("idle", self.prior(self.unit))


def shifted(unit: Tensor) -> Any:
    normal = dist.Normal(torch.zeros_like(unit), torch.ones_like(unit))
    return dist.TransformedDistribution(normal, [dist.transforms.AffineTransform(0.0, unit)])


PRIORS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda unit: dist.Normal(0 * unit, unit),
    "uniform": lambda unit: dist.Uniform(0 * unit, 4 * unit),
    "gamma": lambda unit: dist.Gamma(2.0, 1 / unit),
    "student t, of infinite variance": lambda unit: dist.StudentT(2.0, 0 * unit, unit),
    "cauchy, without a mean": lambda unit: dist.Cauchy(0 * unit, unit),
    "without moments in closed form": shifted,
}


@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_units_are_active_on_the_scale_of_the_prior(prior: str, level: bool) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, *others = (
        active_units(Units(PRIORS[prior], unit, level=level), x, 60, seed=0, progress=False)
        for unit in (1.0, 1e-6, 1e4)
    )
    expected = {"u": True, "idle": False} | ({"level": True, "z": False} if level else {})
    assert one["active"].to_dict() == expected
    if prior in ("normal", "without moments in closed form"):
        assert one.loc["idle", "within"] == pytest.approx(1.0, rel=0.1)
    for other, unit in zip(others, (1e-6, 1e4)):
        np.testing.assert_allclose(other["prior_scale"], unit * one["prior_scale"])
        pd.testing.assert_frame_equal(
            other.drop(columns="prior_scale"), one.drop(columns="prior_scale")
        )
    if level:  # var(z) = var(level) + 1
        assert one.loc["z", "prior_scale"] == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize("rows", [10, 50, 300])
@pytest.mark.parametrize("num_samples", [2, 3, 10])
def test_units_without_data_are_not_active_by_chance(rows: int, num_samples: int) -> None:
    dead = LinearGaussian(torch.zeros(2, 300))
    x = torch.zeros(rows, 2, dtype=torch.float64)
    table = active_units(dead, x, num_samples, seed=0, progress=False)
    assert (table["variance"] > 0.01).mean() > 0.1 or num_samples == 10
    assert table["active"].mean() <= 0.01
    assert table["variance"].std() == pytest.approx(table["se"].mean(), rel=0.25)


@pytest.mark.parametrize(("rows", "num_samples"), [(10, 10), (100, 2), (100, 10)])
def test_units_that_move_are_active_with_few_draws_or_rows(rows: int, num_samples: int) -> None:
    program, x = linear_gaussian(rows=rows)
    assert active_units(program, x, num_samples, seed=0, progress=False)["active"].all()


class Schools(nn.Module):
    """Eight schools: effects of schools around a mean and a spread that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.effects = nn.Linear(1, 1).double()

    def model(self, row: dict[str, Tensor]) -> None:
        mu = pyro.sample("mu", dist.Normal(self.loc.new_zeros(()), 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5 * self.loc.new_ones(())))
        with pyro.plate("data", len(row["y"])):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, row["sigma"]), obs=row["y"])

    def guide(self, row: dict[str, Tensor]) -> None:
        pyro.sample("mu", dist.Normal(self.loc[0], 3.0))
        pyro.sample("tau", dist.LogNormal(self.loc[1], 0.5))
        with pyro.plate("data", len(row["y"])):
            loc = self.effects(row["y"][:, None])[:, 0]
            pyro.sample("theta", dist.Normal(loc, 5.0))


SCHOOLS = pd.DataFrame(
    {
        "y": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
        "sigma": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
    },
    index=list("ABCDEFGH"),
)


def test_latents_that_all_rows_share_are_in_the_tree() -> None:
    program, rows = Schools(), dict(SCHOOLS)
    pv.fit(program, rows, max_epochs=5, seed=0, progress=False)
    tree = pv.to_arviz(program, rows, 60, num_predictive=20, seed=0)
    posterior = tree["posterior"]
    assert posterior["mu"].dims == ("chain", "draw")
    assert posterior["theta"].dims == ("chain", "draw", "datum")
    assert posterior["datum"].values.tolist() == list("ABCDEFGH")
    assert tree["prior"]["tau"].shape == (1, 20)
    assert tree["posterior_predictive"]["y"].shape == (1, 20, 8)
    assert tree["observed_data"]["y"].values.tolist() == SCHOOLS["y"].tolist()
    assert "vi_stats" not in tree
    assert "mu, tau" in posterior.attrs["note"]
    stats = tree["sample_stats"]
    mu, tau, theta = (torch.tensor(posterior[name].values[0]) for name in ("mu", "tau", "theta"))
    y, sigma = (torch.tensor(SCHOOLS[name].to_numpy()) for name in ("y", "sigma"))
    log_joint = (
        dist.Normal(0.0, 10.0).log_prob(mu)
        + dist.HalfCauchy(5.0).log_prob(tau)
        + dist.Normal(mu[:, None], tau[:, None]).log_prob(theta).sum(1)
        + dist.Normal(theta, sigma).log_prob(y).sum(1)
    )
    np.testing.assert_allclose(stats["log_joint"].values[0], log_joint, rtol=1e-7)
    with pytest.raises(ValueError, match="mu, tau"):
        pv.log_evidence(program, rows, 10)
