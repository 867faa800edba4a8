"""conformal: exact coverage for any guide, refused calibration rows, and hidden cells."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from benchmarks import conformal as benchmark
from programs import Grid, linear_gaussian
from torch import Tensor, nn

import pyro_vae as pv

QUIET: dict[str, Any] = {"seed": 0, "progress": False}
FIT: dict[str, Any] = QUIET | {"max_epochs": 1, "warmup": 0, "device": "cpu"}
X = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
TRAIN, REST = X[:40], X[40:]


def vae(**options: Any) -> pv.VAE:
    return pv.VAE(3, 2, pv.likelihoods.Normal(), None, pv.networks.MLP(4), seed=0, **options)


def calibrate(program: nn.Module, rows: Any, **options: Any) -> pv.diagnostics.Conformal:
    return pv.conformal(program, rows, **{"num_samples": 100} | QUIET | options)


# Coverage


@pytest.mark.parametrize("cells", [None, 0.3], ids=["rows", "cells"])
@pytest.mark.parametrize("name", [name for name in benchmark.PROGRAMS if "fitted VAE" not in name])
def test_mean_coverage_is_exact_for_good_and_bad_guides(name: str, cells: float | None) -> None:
    found = benchmark.coverage(name, 30 if cells is None else 120, cells=cells, new=100)
    assert found["errors"] > -3.0
    assert found["errors"] < 3.0 or name in benchmark.TIED  # ties make intervals too wide
    assert found["se"] < 0.015


@pytest.mark.parametrize("prob", [0.5, 0.8, 0.9, 0.95])
def test_the_quantile_is_the_finite_sample_one(prob: float) -> None:
    least = {0.5: 1, 0.8: 4, 0.9: 9, 0.95: 19}[prob]
    program, x = linear_gaussian(least + 20)
    for size in (least, least + 1, least + 10, least + 11):
        table = pv.conformal(program, x[:size], prob=prob, **QUIET).table
        rank = -(-(size + 1) * round(100 * prob) // 100)  # in integers
        assert np.allclose(table["coverage"], rank / (size + 1))
        assert (table["num_rows"] == size).all()
        assert np.isfinite(table["factor"]).all()
    if least > 1:
        with pytest.raises(ValueError, match=f"at least {least} calibration rows .* got"):
            pv.conformal(program, x[: least - 1], prob=prob, **QUIET)


def test_scores_are_those_of_the_calibration_rows() -> None:
    program, x = linear_gaussian(50)
    calibrated = pv.conformal(program, x, seed=3, prob=0.8, num_samples=1000, progress=False)
    table, found = calibrated.table, calibrated.intervals(x, **QUIET)
    inside = ((x.numpy() >= found["lower"]) & (x.numpy() <= found["upper"])).sum("datum")
    assert (abs(inside - 41) <= 4).all()  # the 41st of 50 scores, up to the noise of the draws
    assert (found["lower"] < found["reconstruction"]).all()
    assert (found["reconstruction"] < found["upper"]).all()
    up = (found["upper"] - found["reconstruction"]) / (
        found["model_upper"] - found["reconstruction"]
    )
    assert np.allclose(up, table["factor"].to_numpy())


# Results


def test_intervals_are_labelled_and_keep_the_units_of_x() -> None:
    frame = pd.DataFrame(X.numpy(), columns=["age", "dose", "pulse"]).set_axis(
        [f"p{i}" for i in range(80)]
    )
    program = vae()
    pv.fit(program, frame[:40], **FIT)
    found = calibrate(program, frame[40:60]).intervals(frame[60:], **QUIET)
    assert found["x_dim_0"].values.tolist() == ["age", "dose", "pulse"]
    assert found["datum"].values.tolist() == list(frame.index[60:])
    assert {*found} == {"lower", "upper", "model_lower", "model_upper", "reconstruction"}
    assert all(found[name].attrs["units"] == "those of x" for name in found)
    other = calibrate(program, frame[40:60][["dose", "pulse", "age"]])
    assert other.intervals(frame[60:], **QUIET).equals(found)


def test_the_same_seeds_give_the_same_intervals_and_no_others() -> None:
    program = vae()
    one, same, other = (calibrate(program, REST, seed=s) for s in (0, 0, 1))
    assert one.table.equals(same.table)
    assert not one.table.equals(other.table)
    assert one.intervals(X, **QUIET).equals(same.intervals(X, **QUIET))


def test_it_prints_and_draws() -> None:
    calibrated = calibrate(vae(), REST)
    text = repr(calibrated)
    assert text.startswith("Conformal intervals of reconstructions of 'x', prob=0.9, from 40")
    assert "Remark: it is not known whether rows of the fit" in text
    axes = calibrated.plot().axes[0]
    assert axes.lines[1].get_ydata().tolist() == calibrated.table["factor"].values.tolist()
    with pytest.raises(ValueError, match="Expected a table with the variable 'factor'"):
        pv.plots.conformal(calibrated.intervals(X, **QUIET))


def test_a_model_without_spread_gets_infinite_intervals() -> None:
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Bernoulli(torch.tensor([0.0, 0.5])).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    x = torch.bernoulli(torch.full((40, 2), 0.5))
    found = calibrate(Certain(), x).intervals(x, **QUIET)
    assert np.isinf(found["upper"][:, 0]).all()
    assert np.isfinite(found["upper"][:, 1]).all()
    exact = calibrate(Certain(), x * torch.tensor([0.0, 1.0])).intervals(x, **QUIET)
    assert (exact["upper"][:, 0] == 0.0).all()


def test_values_that_the_program_masks_are_not_used() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def model(self, x: dict[str, Tensor]) -> None:
            with pyro.plate("data", len(x["x"])):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                law = dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).mask(x["seen"].bool())
                pyro.sample("x", law.to_event(1), obs=x["x"])

        def guide(self, x: dict[str, Tensor]) -> None:
            with pyro.plate("data", len(x["x"])):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    seen = torch.ones(40, 2)
    seen[:15, 1] = 0.0
    x = {"x": torch.randn(40, 2), "seen": seen}
    assert calibrate(Masked(), x).table["num_rows"].values.tolist() == [40, 25]
    with pytest.raises(ValueError, match="at least 39 calibration values .* column 1 has 25"):
        calibrate(Masked(), x, prob=0.975)


def test_sites_of_other_kinds() -> None:
    x = {"cells": torch.randn(30, 4).double(), "flag": torch.ones(30).double()}
    with pytest.raises(ValueError, match="site to be one of the observed sites"):
        calibrate(Grid(), x)
    assert calibrate(Grid(), x, site="cells").table["factor"].shape == (4,)
    with pytest.raises(ValueError, match="field 'x'"):
        calibrate(Grid(), x, site="cells", cells=0.5)
    codes = torch.randint(0, 3, (30, 3), generator=torch.Generator().manual_seed(0))
    program = pv.VAE(3, 2, pv.likelihoods.Categorical(num_categories=3), seed=0)
    with pytest.raises(ValueError, match="'x' has categories, which have no order"):
        calibrate(program, codes)


# Rows of the fit


def with_context() -> pv.Program:
    loc = nn.Parameter(torch.zeros(3))

    def model(x: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["x"])):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", loc), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + x["context"], 1.0).to_event(1), obs=x["x"])

    def guide(x: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["x"])):
            pyro.sample("z", dist.Normal(pyro.param("loc", loc), 1.0).to_event(1))

    return pv.Program(model, guide)


def refitted(program: nn.Module) -> nn.Module:
    pv.fit(program, REST + 5.0, **FIT)
    return program


NAMED = pd.DataFrame(TRAIN.numpy(), columns=["a", "b", "c"])
BESIDE = {"context": torch.ones(40, 1)}

REFUSED: dict[str, tuple[dict[str, Any], Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "the same": ({}, lambda p: p, {}),
    "in float64": ({}, lambda p: p, {"calibration_rows": TRAIN.double().numpy()}),
    "in another order": ({}, lambda p: p, {"calibration_rows": TRAIN.flip(0)}),
    "one among others": ({}, lambda p: p, {"calibration_rows": torch.cat([REST, TRAIN[7:8]])}),
    "named columns": ({"x": NAMED}, lambda p: p, {"calibration_rows": NAMED[["c", "a", "b"]]}),
    "with context": ({"program": with_context, **BESIDE}, lambda p: p, BESIDE),
    "other weights": (
        {"program": with_context, "weights": torch.ones(40), **BESIDE},
        lambda p: p,
        BESIDE | {"weights": torch.arange(40.0)},
    ),
    "held out": ({"validation": 0.5}, lambda p: p, {}),
    "of the validation": ({"validation": REST}, lambda p: p, {"calibration_rows": REST}),
    "of the first fit": ({}, refitted, {}),
    "of a refit": ({"validation": 0.5, "refit": True}, lambda p: p, {}),
    "of a copy": ({}, copy.deepcopy, {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_of_the_fit_are_refused(case: str) -> None:
    fit, change, given = REFUSED[case]
    program = fit.get("program", vae)()
    pv.fit(program, **{"x": TRAIN} | {k: v for k, v in fit.items() if k != "program"} | FIT)
    given = {"calibration_rows": TRAIN} | given
    with pytest.raises(ValueError, match=r"calibration rows are rows of the fit, the first is"):
        pv.conformal(change(program), **given, **QUIET)
    fresh = {"calibration_rows": X[:40] - 9.0, **{k: given[k] for k in given.keys() & {"context"}}}
    assert "no rows of the fit" in pv.conformal(program, **fresh, **QUIET).table.attrs["remark"]


def test_a_program_whose_fit_is_not_known_says_so(tmp_path: Path) -> None:
    fitted = vae()
    pv.fit(fitted, TRAIN, **FIT)
    loaded = pv.load(pv.save(fitted, tmp_path / "vae"))
    into = pv.load(tmp_path / "vae", into=vae())
    again = refitted(copy.deepcopy(loaded))
    changed = vae()
    pv.fit(changed, TRAIN, transform=lambda x: x + 1.0, **FIT)
    assert TRAIN.numpy().tobytes() not in b"".join(
        file.read_bytes() for file in (tmp_path / "vae").iterdir()
    )
    for program in (vae(), loaded, into, again, changed):
        remark = calibrate(program, REST).table.attrs["remark"]
        assert remark.startswith("it is not known whether rows of the fit")


def test_discrete_rows_may_equal_rows_of_the_fit_by_chance() -> None:
    x = torch.bernoulli(torch.full((300, 8), 0.5), generator=torch.Generator().manual_seed(0))
    program = pv.VAE(8, 2, pv.likelihoods.Bernoulli(), seed=0)
    pv.fit(program, x[:200], **FIT)
    remark = calibrate(program, x[200:]).table.attrs["remark"]
    assert "calibration rows equal rows of the fit, no more than by chance" in remark
    with pytest.raises(ValueError, match="100 of the 100 calibration rows are rows of the fit"):
        calibrate(program, x[:100])


# Cells


def test_only_missing_cells_get_intervals() -> None:
    calibrated = calibrate(vae(), REST, cells=0.5)
    x = X[:20].clone()
    x[::2, 0] = math.nan
    found = calibrated.intervals(x, **QUIET)
    assert np.array_equal(np.isnan(found["lower"]), ~np.isnan(x.numpy()))
    other = x.clone()
    other[:, 1] = X[20:40, 1]
    assert not found.equals(calibrated.intervals(other, **QUIET))
    with pytest.raises(ValueError, match="Expected NaN in the cells of x"):
        calibrated.intervals(X, **QUIET)
    assert repr(calibrated).startswith("Conformal intervals of hidden cells of 'x'")
    with pytest.raises(ValueError, match=r"column 0 has \d\. Hold out more rows, lower prob, or"):
        calibrate(vae(), REST, cells=0.05)


@pytest.mark.parametrize("likelihood", ["Bernoulli", "Poisson", "Gamma"])
def test_the_fill_is_a_value_that_the_likelihood_takes(likelihood: str) -> None:
    x = {"Bernoulli": (X > 0).float(), "Poisson": X.abs().round(), "Gamma": X.exp()}[likelihood]
    program = pv.VAE(3, 2, getattr(pv.likelihoods, likelihood)(), seed=0)
    calibrated = calibrate(program, x, cells=0.5)
    missing = x.where(torch.rand(x.shape) < 0.5, math.nan)
    found = calibrated.intervals(missing, **QUIET)
    assert np.isfinite(found["upper"].to_numpy()[missing.isnan().numpy()]).all()


def test_a_site_of_changed_values_has_no_cells() -> None:
    class Squared(type(linear_gaussian()[0])):  # type: ignore[misc]
        def model(self, x: Tensor) -> None:
            super().model(x**2)

    program = Squared(torch.ones(6, 2))
    with pytest.raises(ValueError, match="observes x as it is, for intervals of cells"):
        calibrate(program, linear_gaussian()[1], cells=0.5)
