"""Importance sampling and its Pareto k, against ArviZ and closed forms."""

import importlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from programs import Grid, LinearGaussian, linear_gaussian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.elbos.chunks import point_masses
from pyro_vae.engine.running import kept_generators
from pyro_vae.evidence import Evidence, good_k, log_evidence, pareto_k
from pyro_vae.evidence.log_evidence import estimates

MODERN = int(az.__version__.split(".")[0]) >= 1


def log_weights(scale: float, size: int, rows: int, seed: int = 0) -> np.ndarray:
    """log N(z; 0, 1) - log N(z; 0, scale) at draws of the latter."""
    z = scale * np.random.default_rng(seed).normal(size=(size, rows))
    return z**2 / (2 * scale**2) - z**2 / 2 + np.log(scale)


def arviz_k(weights: np.ndarray) -> np.ndarray:
    """ArviZ's k: 1.x takes minus the log weights, and rounds the tail's size down, not up."""
    if MODERN:
        from arviz_stats.base import array_stats

        return array_stats.psislw(-weights.T, axis=-1)[1]
    return az.psislw(weights.T.copy())[1]


@pytest.mark.parametrize("size", [100, 400, 900, 2500])  # 3 sqrt(size) is whole
@pytest.mark.parametrize("scale", [0.5, 0.7, 0.9, 1.3])
def test_pareto_k_is_that_of_arviz(size: int, scale: float) -> None:
    weights = log_weights(scale, size, rows=20)
    np.testing.assert_allclose(pareto_k(weights), arviz_k(weights), atol=1e-10)


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.9])
def test_pareto_k_is_near_theory(scale: float) -> None:
    k = pareto_k(log_weights(scale, 4000, rows=200))
    assert abs(k.mean() - (1 - scale**2)) < 0.1
    assert 0.05 < k.std() < 0.2


def test_pareto_k_takes_log_weights_not_their_negatives() -> None:
    narrow, wide = (log_weights(scale, 1000, rows=50) for scale in (0.5, 1.5))
    assert pareto_k(narrow).mean() > 0.5
    assert pareto_k(-narrow).mean() < 0
    assert pareto_k(wide).mean() < 0


@pytest.mark.parametrize("shift", [-900.0, 900.0, 1e5])
def test_pareto_k_ignores_a_constant(shift: float) -> None:
    weights = log_weights(0.7, 1000, rows=30)
    np.testing.assert_allclose(pareto_k(weights + shift), pareto_k(weights), atol=1e-8)


def test_pareto_k_takes_each_row_alone() -> None:
    weights = log_weights(0.7, 200, rows=3)
    ties = np.round(weights, 1)
    together = pareto_k(np.concatenate([weights, ties], axis=1))
    alone = [pareto_k(row[:, None])[0] for row in np.concatenate([weights, ties], axis=1).T]
    np.testing.assert_allclose(together, alone, rtol=1e-13)  # exp rounds by the vector's lane


NORMAL = log_weights(0.7, 1000, rows=2)
HOLED = np.where(np.arange(1000)[:, None] % 2 == 0, NORMAL, -np.inf)
DEGENERATE: dict[str, tuple[np.ndarray, float | None]] = {
    "constant": (np.full((1000, 2), -3.0), -np.inf),
    "constant at 900": (np.full((1000, 2), -900.0), -np.inf),
    "float32 noise": (-900 + 1e-4 * NORMAL, -np.inf),
    "two values": (np.where(NORMAL > 0, 0.0, -1.0), -np.inf),
    "half of them zero": (HOLED, None),
    "all zero": (np.full((1000, 2), -np.inf), np.nan),
    "nan": (np.where(np.arange(1000)[:, None] == 7, np.nan, NORMAL), np.nan),
    "infinite": (np.where(np.arange(1000)[:, None] == 7, np.inf, NORMAL), np.inf),
    "one dominates": (1e4 * NORMAL, np.inf),
    "short": (NORMAL[:20], np.nan),
    "short and constant": (np.zeros((4, 2)), -np.inf),
    "just long enough": (NORMAL[:21], None),
    "no draws": (np.empty((0, 2)), np.nan),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_pareto_k_of_degenerate_weights(case: str) -> None:
    weights, expected = DEGENERATE[case]
    before = weights.copy()
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        k = pareto_k(weights)
    np.testing.assert_array_equal(weights, before)
    if expected is None:
        assert np.isfinite(k).all()
    else:
        np.testing.assert_array_equal(k, [expected, expected])


def test_pareto_k_of_no_rows() -> None:
    assert pareto_k(np.empty((100, 0))).shape == (0,)


def test_good_k() -> None:
    assert good_k(1000) == pytest.approx(2 / 3)
    assert good_k(2_000_000) == 0.7
    assert good_k(1) == -np.inf


def test_exact_guide_gives_the_exact_evidence() -> None:
    program, x = linear_gaussian()
    evidence = log_evidence(program, x, 20, seed=0)
    exact = program.log_evidence(x)
    for name in ("log_evidence", "elbo", "log_evidence_quarter"):
        np.testing.assert_allclose(evidence[name], exact, atol=1e-10)
    np.testing.assert_allclose(evidence["ess"], 20)
    assert float(evidence["mcse"].max()) < 1e-10
    assert float(evidence["log_evidence_quarter_mcse"].max()) < 1e-10
    assert (evidence["pareto_k"] == -np.inf).all()


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_another_guide_is_off_by_its_error_alone(factor: float) -> None:
    program, x = linear_gaussian(factor=factor)
    table = log_evidence(program, x, 4000, seed=1).summary()
    exact = program.log_evidence(x).mean()
    evidence, elbo = table.loc["log_evidence"], table.loc["elbo"]
    assert abs(evidence["mean"] - exact) < 4 * evidence["mcse"]
    assert abs(elbo["mean"] - (exact - program.kl())) < 4 * elbo["mcse"]
    assert abs(table.loc["gap", "mean"] - program.kl()) < 0.02


def test_it_is_a_lower_bound_that_rises_with_the_draws() -> None:
    program, x = linear_gaussian(rows=2000, factor=0.6)
    exact = program.log_evidence(x)
    few, more = (log_evidence(program, x, size, refine=False, seed=2) for size in (16, 256))
    bounds = [few["elbo"], few["log_evidence_quarter"], few["log_evidence"], more["log_evidence"]]
    gaps = np.array([float((bound - exact).mean()) for bound in bounds])
    assert (np.diff(gaps) > 0.01).all()
    assert gaps[-1] < 0


def test_the_error_is_that_of_repetition() -> None:
    program, x = linear_gaussian(rows=5, factor=0.9)
    runs = xr.concat([log_evidence(program, x, 400, seed=seed) for seed in range(100)], "run")
    errors = {"log_evidence": "mcse"} | {
        name: f"{name}_mcse" for name in ("elbo", "log_evidence_quarter")
    }
    for name, error in errors.items():
        ratio = runs[name].std("run", ddof=1) / np.sqrt((runs[error] ** 2).mean("run"))
        assert ((ratio > 0.75) & (ratio < 1.35)).all()


def test_the_error_of_the_quarters_is_that_of_their_mean() -> None:
    weights = log_weights(1.0, 103, rows=6)
    quarters = [estimates(weights[25 * i : 25 * i + 25])["log_evidence"] for i in range(4)]
    found = estimates(weights)
    np.testing.assert_allclose(found["log_evidence_quarter"], np.mean(quarters, 0))
    error = np.std(quarters, axis=0, ddof=1) / 2
    np.testing.assert_allclose(found["log_evidence_quarter_mcse"], error)
    table = log_evidence(PROGRAM, X, 40, seed=0).summary()
    assert table.loc[["log_evidence", "elbo", "log_evidence_quarter"]].notna().all(axis=None)


def test_plates_beside_the_rows_are_summed() -> None:
    x = {"cells": torch.randn(7, 3).double(), "flag": torch.ones(7)}
    evidence = log_evidence(Grid(), x, 2000, seed=0)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + nn.functional.logsigmoid(z)
    joint = joint + dist.Normal(z, 1.0).log_prob(x["cells"][..., None]).sum(1)
    exact = torch.logsumexp(joint, 1) + torch.log(z[1] - z[0])
    assert (abs(evidence["log_evidence"] - exact.numpy()) < 5 * evidence["mcse"]).all()


@pytest.mark.parametrize("max_elements", [2**24, 50_000, 3_000, 200, 1])
def test_pieces_change_nothing(max_elements: int) -> None:
    program, x = linear_gaussian(rows=9)
    evidence = log_evidence(program, x, 101, seed=0, max_elements=max_elements)
    np.testing.assert_allclose(evidence["log_evidence"], program.log_evidence(x), atol=1e-10)
    narrow = LinearGaussian(program.weight.detach(), factor=0.8)
    table = log_evidence(narrow, x, 101, seed=0, max_elements=max_elements).summary()
    error = table.loc["log_evidence", "mean"] - program.log_evidence(x).mean()
    assert abs(error) < 5 * table.loc["log_evidence", "mcse"]


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, stored)
        return results


def wide_vae() -> nn.Module:
    hidden = pv.networks.MLP(300)
    return pv.VAE(4, 2, pv.likelihoods.Normal(), encoder=hidden, decoder=hidden, seed=0)


def vamp_vae() -> nn.Module:
    small = pv.networks.MLP(8)
    prior = pv.priors.VampPrior(100, 4)
    return pv.VAE(4, prior, pv.likelihoods.Normal(), encoder=small, decoder=small, seed=0)


@pytest.mark.parametrize("build", [wide_vae, vamp_vae])
def test_no_tensor_is_larger_than_asked(build: Callable[[], nn.Module]) -> None:
    program, x = build(), torch.randn(60, 4)
    for max_elements in (20_000, 100_000):
        with Largest() as seen:
            log_evidence(program, x, 200, max_elements=max_elements, refine=False, seed=0)
        assert 0.3 * max_elements < seen.elements <= max_elements


@pytest.mark.parametrize("build", [wide_vae, vamp_vae])
def test_refining_needs_little_more(build: Callable[[], nn.Module]) -> None:
    program, x = build(), torch.randn(20, 4)
    with Largest() as seen:
        log_evidence(program, x, 200, max_elements=50_000, refine=True, seed=0)
    assert seen.elements <= 2 * 50_000


def test_it_is_labelled() -> None:
    program, x = linear_gaussian(rows=4)
    frame = pd.DataFrame(x.numpy(), index=list("abcd"))
    evidence = log_evidence(program, frame, 1000, seed=3)
    assert evidence["datum"].to_numpy().tolist() == list("abcd")
    assert evidence.attrs["num_samples"] == 1000
    assert evidence.attrs["seed"] == 3
    assert evidence.attrs["good_k"] == pytest.approx(2 / 3)
    assert all(
        {"units", "direction", "long_name"} <= evidence[name].attrs.keys() for name in evidence
    )
    assert evidence["log_evidence"].attrs["direction"] == "lower bound in expectation"


def test_a_seed_fixes_the_draws_and_nothing_else() -> None:
    program, x = linear_gaussian(factor=0.8)
    program.train()
    before = torch.get_rng_state()
    one, two = (log_evidence(program, x, 50, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert program.training
    xr.testing.assert_equal(one, two)
    assert not one.equals(log_evidence(program, x, 50, seed=6))
    assert not log_evidence(program, x, 50).equals(log_evidence(program, x, 50))


def test_progress_is_shown_on_a_terminal_alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = linear_gaussian()
    log_evidence(program, x, 50)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("pyro_vae.engine.progress.is_watched", lambda: True)
    log_evidence(program, x, 50, progress=False)
    assert capfd.readouterr().err == ""
    log_evidence(program, x, 50)
    assert "evidence: 100%" in capfd.readouterr().err


def test_the_result_is_a_data_set_with_a_summary_and_a_picture() -> None:
    program, x = linear_gaussian(rows=5, factor=0.8)
    evidence = log_evidence(program, x, 50, seed=0)
    assert isinstance(evidence, xr.Dataset)
    assert repr(evidence).startswith("<xarray.Evidence>")
    assert isinstance(evidence.isel(datum=slice(2)), Evidence)
    table = evidence.summary()
    assert table.columns.to_list() == ["mean", "se", "mcse", "note"]
    assert table.loc["elbo", "mean"] == pytest.approx(float(evidence["elbo"].mean()))
    figure = evidence.plot()
    axes = figure.subplots()
    assert evidence.plot(ax=axes) is figure
    assert axes.get_xlabel() == "row"
    again = pickle.loads(pickle.dumps(evidence))
    xr.testing.assert_identical(again, evidence)


@pytest.mark.parametrize("shift", [-900.0, 900.0])
def test_estimates_far_from_zero(shift: float) -> None:
    weights = log_weights(0.7, 100, rows=5)
    near, far = estimates(weights), estimates(weights + shift)
    for name, value in near.items():
        moved = shift if name in {"log_evidence", "elbo", "log_evidence_quarter"} else 0
        np.testing.assert_allclose(far[name], value + moved, rtol=1e-8, atol=1e-9)


def test_estimates_of_zero_weights_warn_of_nothing() -> None:
    weights = np.full((100, 2), -np.inf)
    weights[:50, 1] = 0
    values = estimates(weights)
    assert values["log_evidence"].tolist() == [-np.inf, pytest.approx(np.log(0.5))]
    assert values["elbo"].tolist() == [-np.inf, -np.inf]
    assert values["ess"][1] == pytest.approx(50)


def test_rows_without_a_reliable_k_are_noted() -> None:
    values = estimates(log_weights(0.9, 1000, rows=4))
    values["pareto_k"] = np.array([0.1, 0.9, np.nan, -np.inf])
    evidence = Evidence(
        {name: ("datum", value) for name, value in values.items()}, attrs={"good_k": 0.67}
    )
    table = evidence.summary()
    assert table.loc["pareto_k_over", "mean"] == 0.25
    assert table.loc["pareto_k_missing", "mean"] == 0.25
    note = "error unknown in 1 of 4 rows, k not known in 1 of 4 rows"
    for name in ("log_evidence", "log_evidence_quarter", "gap"):
        assert table.loc[name, "note"] == note
    for name in ("elbo", "pareto_k_over", "pareto_k_missing"):
        assert table.loc[name, "note"] == ""


@pytest.mark.parametrize("num_samples", [4, 5, 16, 20, 21, 400])
@pytest.mark.parametrize("factor", [1.0, 0.9, 0.4])
def test_each_row_has_a_note(factor: float, num_samples: int) -> None:
    program, x = linear_gaussian(rows=30, factor=factor)
    evidence = log_evidence(program, x, num_samples, refine=False, seed=0)
    k, notes = evidence["pareto_k"].to_numpy(), evidence["note"].to_numpy()
    assert np.isnan(k).all() == (num_samples <= 20 and factor < 1)
    assert ((notes == "error unknown") == (k > evidence.attrs["good_k"])).all()
    assert ((notes == "k not known") == np.isnan(k)).all()
    assert ((notes == "ok") == (k <= evidence.attrs["good_k"])).all()
    assert evidence.to_dataframe()["note"].to_list() == notes.tolist()
    if num_samples <= 20:
        table = evidence.summary()
        assert table.loc["pareto_k_over", "mean"] == 0
        assert table.loc["pareto_k_missing", "mean"] == (factor < 1)
        assert table.loc["gap", "note"] == ("k not known in 30 of 30 rows" if factor < 1 else "")
    if (factor, num_samples) == (0.4, 400):
        assert "error unknown in" in evidence.summary().loc["log_evidence", "note"]


def delta_vae() -> nn.Module:
    return pv.VAE(6, 2, pv.likelihoods.Normal(), pv.posteriors.Delta(), seed=0)


class Shared(LinearGaussian):
    """A latent that all rows share."""

    def model(self, x: Tensor) -> None:
        import pyro

        pyro.sample("level", dist.Normal(0.0, 1.0))
        super().model(x)

    def guide(self, x: Tensor) -> None:
        import pyro

        pyro.sample("level", dist.Normal(0.0, 1.0))
        super().guide(x)


PROGRAM, X = linear_gaussian(rows=3)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a network": (lambda: log_evidence(nn.Linear(6, 2), X), "Expected a program"),
    "a function": (lambda: log_evidence(print, X), "Expected a program"),  # type: ignore[arg-type]
    "few draws": (lambda: log_evidence(PROGRAM, X, 3), "num_samples.*at least 4; got 3"),
    "half draws": (lambda: log_evidence(PROGRAM, X, 9.5), "num_samples"),  # type: ignore[arg-type]
    "a flag": (lambda: log_evidence(PROGRAM, X, True), "num_samples"),
    "no elements": (lambda: log_evidence(PROGRAM, X, max_elements=0), "max_elements"),
    "no rows": (lambda: log_evidence(PROGRAM, X[:0]), "at least one row"),
    "text": (lambda: log_evidence(PROGRAM, [["a"]]), "numbers"),
    "a point mass": (lambda: log_evidence(delta_vae(), X), "point masses .Delta. .* at z"),
    "a shared latent": (lambda: log_evidence(Shared(PROGRAM.weight), X), "level"),
    "another shape": (lambda: log_evidence(wide_vae(), X), "event shape"),
    "an unknown rule": (lambda: log_evidence(PROGRAM, X, on_invalid="nan"), "'raise' or 'inf'"),
    "all impossible": (
        lambda: log_evidence(counting(), -torch.ones(3, 4), on_invalid="inf"),
        "support of Poisson",
    ),
    "another shape beside": (
        lambda: log_evidence(counting(), torch.ones(3, 5), on_invalid="inf"),
        "event shape",
    ),
    "a NaN among others": (
        lambda: log_evidence(counting(), torch.ones(3, 4).fill_(torch.nan), on_invalid="inf"),
        "x without NaN",
    ),
    "a NaN": (lambda: log_evidence(wide_vae(), X[:, :4] * torch.nan), "Expected"),
}


def counting() -> nn.Module:
    small = pv.networks.MLP(8)
    return pv.VAE(4, 2, pv.likelihoods.Poisson(), encoder=small, decoder=small, seed=0)


MADE: dict[str, Callable[[], nn.Module]] = {
    "Poisson": counting,
    "Gamma": lambda: pv.VAE(4, 2, pv.likelihoods.Gamma(), seed=0),
    "Bernoulli": lambda: pv.VAE(4, 2, pv.likelihoods.Bernoulli(), seed=0),
    "Categorical": lambda: pv.VAE(4, 2, pv.likelihoods.Categorical(3), seed=0),
}


@pytest.mark.parametrize("name", MADE)
def test_an_impossible_value_is_scored_as_such(name: str) -> None:
    program, x = MADE[name](), torch.ones(9, 4)
    x[[1, 7, 8], 2] = torch.tensor([-1.0, -2.5, torch.inf])
    with pytest.raises(ValueError, match="Expected"):
        log_evidence(program, x, 40, seed=0)
    found = log_evidence(program, x, 40, seed=0, on_invalid="inf")
    is_bad = np.isin(np.arange(9), [1, 7, 8])
    for quantity in ("log_evidence", "elbo", "log_evidence_quarter"):
        np.testing.assert_array_equal(found[quantity] == -np.inf, is_bad)
    assert (found["mcse"][is_bad] == 0.0).all()
    assert not found.is_over()[is_bad].any()
    alone = log_evidence(program, x[~is_bad], 40, seed=0)
    np.testing.assert_allclose(found["elbo"][~is_bad], alone["elbo"], rtol=1e-5)
    assert found["datum"].to_numpy().tolist() == list(range(9))


def test_a_transform_is_applied_before_rows_are_checked() -> None:
    program = MADE["Bernoulli"]()
    grey = torch.rand(7, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="binarize"):
        log_evidence(program, grey, 40, seed=0)
    found = log_evidence(program, grey, 40, seed=0, transform=torch.round)
    xr.testing.assert_allclose(found, log_evidence(program, grey.round(), 40, seed=0))
    one, two, other = (
        log_evidence(program, grey, 40, seed=seed, transform=torch.bernoulli)["elbo"].to_numpy()
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).all()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_data_are_checked_in_pieces_and_moved_in_pieces(
    monkeypatch: pytest.MonkeyPatch, moved: list[int]
) -> None:
    monkeypatch.setattr("pyro_vae.data.rows.CHECKED_AT_ONCE", 4)
    vae, x = wide_vae(), torch.zeros(10, 4, dtype=torch.float64)
    sizes: list[int] = []
    monkeypatch.setattr(vae, "check", lambda rows: sizes.append(len(rows)))
    rows = read(x, vae)
    assert sizes == [4, 4, 2]
    assert rows.fields["x"].dtype == torch.float64  # the VAE standardises it first
    assert max(moved) == 4
    log_evidence(vae, x, 8, max_elements=300)
    assert max(moved) < 10


def test_a_refused_row_is_counted_from_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.data.rows.CHECKED_AT_ONCE", 4)
    x = torch.zeros(10, 4)
    x[9] = torch.nan
    with pytest.raises(ValueError, match="row 9, column 0 .1 of 10"):
        read(x, wide_vae())


class Noted(LinearGaussian):
    """A guide that observes a point."""

    def guide(self, x: Tensor) -> None:
        import pyro

        super().guide(x)
        pyro.sample("noted", dist.Delta(torch.tensor(0.0)), obs=torch.tensor(0.0))


def test_an_observed_point_is_no_point_mass() -> None:
    assert point_masses(Noted(PROGRAM.weight), read(X)) == []


def test_the_systems_of_the_speed_benchmark_estimate_one_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("benchmarks")))
    benchmark = importlib.import_module("evidence_speed")
    monkeypatch.setattr(benchmark, "SAMPLES", 1000)
    x = torch.empty(3, 784).bernoulli_(0.3, generator=torch.Generator().manual_seed(0))
    vae = benchmark.our_vae().state_dict()
    for name in ("posterior.heads.loc.linear.weight", "posterior.heads.scale.linear.weight"):
        vae[name] *= 0.3
    vae["posterior.heads.scale.linear.bias"].fill_(0.54)  # a guide near the prior, which is near
    vae["decoder.layers.1.weight"] *= 0.3  # the posterior: the estimates are precise
    with kept_generators():
        torch.manual_seed(0)
        found = benchmark.ours(vae)(x)
        for at_once in (250, 1000):
            assert benchmark.renyi(vae, at_once)(x) == pytest.approx(found, abs=0.2)
