"""Calibration of guides: exact ones pass, whatever the program, and wrong ones are flagged."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from calibration_cases import GUIDES, Guide, exact_vae, flagged, near_data
from own_programs import Covariate, SharedLevel, TwoLevels
from scipy.stats import kstest
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics.uniformity import (
    band,
    counts_below,
    pit_of,
    symmetry_p_value,
    uniformity_p_value,
)

QUIET: dict[str, Any] = {"seed": 0, "progress": False}
ROWS = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
SURE = 1e-3

RNG = np.random.default_rng(0)
ALIKE: dict[str, np.ndarray] = {
    "continuous": RNG.normal(size=(6, 4000)),
    "discrete": RNG.integers(3, size=(6, 4000)).astype(float),
    "constant": np.ones((6, 4000)),
    "infinite": RNG.choice([-np.inf, 0.0, 1.0, np.inf], size=(6, 4000)),
    "discrete, rounded": RNG.integers(2, size=(6, 4000)) + 1e-9 * RNG.normal(size=(6, 4000)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_the_pit_of_exchangeable_values_is_uniform(kind: str) -> None:
    pit = pit_of(ALIKE[kind], np.random.default_rng(1), 1e-6)
    assert ((pit > 0) & (pit < 1)).all()
    assert kstest(pit, "uniform").pvalue > SURE


def test_rounding_does_not_order_ties() -> None:
    """Ones that are larger than all others by rounding alone are not the largest."""
    values = np.ones((6, 4000))
    values[0] += 1e-9
    assert pit_of(values, np.random.default_rng(0)).min() > 0.8
    assert kstest(pit_of(values, np.random.default_rng(0), 1e-6), "uniform").pvalue > SURE


@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize("test", [uniformity_p_value, symmetry_p_value])
def test_p_values_are_uniform(test: Callable[[np.ndarray], float], n: int) -> None:
    rng = np.random.default_rng(0)
    p_values = np.array([test(rng.uniform(size=n)) for _ in range(500)])
    assert (p_values <= 0.1).mean() < 0.14
    assert kstest(p_values, "uniform").statistic < 0.1


def test_a_p_value_is_below_alpha_if_the_function_leaves_the_band() -> None:
    rng, n = np.random.default_rng(0), 300
    low, high = band(n, 0.05)
    for power in np.linspace(0.8, 1.25, 300):
        values = rng.uniform(size=n) ** power
        counts = counts_below(values)
        leaves = bool(((counts < low) | (counts > high)).any())
        assert leaves == (uniformity_p_value(values) <= 0.05)


def hierarchy(wide: float) -> pv.Program:
    """w ~ N(0, 1), z ~ N(w, 1), x ~ N(z, 1/2)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(x / 1.25 / 1.8, 1.8**-0.5))
            pyro.sample("z", dist.Normal((w + 4 * x) / 5, wide * 5**-0.5))

    return pv.Program(model, guide)


def discrete(wide: float) -> pv.Program:
    """k in {0, 1, 2}, x ~ N(k, I) in 5 columns, with a product of matrices that rounds."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) / 2

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(k @ weight, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        logits = dist.Normal(weight, 1.0).log_prob(x[:, None]).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.OneHotCategorical(logits=logits / wide))

    return pv.Program(model, guide)


def counts(wide: float) -> pv.Program:
    """z ~ Gamma(2, 1), x ~ Poisson(z) in 3 columns of integers."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
            rates = z[..., None].expand(*z.shape, 3)
            pyro.sample("x", dist.Poisson(rates).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma((2.0 + x.sum(-1)) / wide**2, 4.0 / wide**2))

    return pv.Program(model, guide)


def beside(wide: float) -> pv.Program:
    """A latent for each of 2 columns, in a plate to the right of the rows."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, wide * 0.5**0.5))

    return pv.Program(model, guide)


def steps(wide: float) -> pv.Program:
    """Two observed sites that are columns of x, each with a latent, and a covariate."""

    def model(row: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            for t in range(2):
                z = pyro.sample(f"z_{t}", dist.Normal(torch.zeros(()), 1.0))
                loc = z + 10 * row["context"][:, 0]
                pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=row["x"][:, t])

    def guide(row: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            for t in range(2):
                rest = row["x"][:, t] - 10 * row["context"][:, 0]
                pyro.sample(f"z_{t}", dist.Normal(rest / 2, wide * row["weight"] * 0.5**0.5))

    return pv.Program(model, guide)


BESIDE = {"context": ROWS[:, :1], "weights": torch.ones(40)}
CASES: dict[str, tuple[Callable[[float], pv.Program], Any, dict[str, Any]]] = {
    "hierarchy": (hierarchy, ROWS[:, 0], {}),
    "discrete": (discrete, torch.randn(40, 5), {}),
    "counts": (counts, torch.arange(120).reshape(40, 3) % 7, {}),
    "a plate beside the rows": (beside, ROWS, {}),
    "columns, context, weights": (steps, ROWS, BESIDE),
}


@pytest.mark.parametrize("options", [{"near": False}, {}, {"max_elements": 20_000}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_exact_guides_of_any_program_pass_and_wide_ones_do_not(
    name: str, options: dict[str, Any]
) -> None:
    build, x, beside_x = CASES[name]
    small = {"num_simulations": 500, "num_samples": 30, "num_candidates": 2000}
    found, wide = (
        pv.calibrate(build(factor), x, **beside_x, **small, **options, **QUIET)
        for factor in (1.0, 2.5)
    )
    assert found.table["p_holm"].min() > SURE
    assert not found.pit.isna().any(axis=None)
    assert wide.table["p_holm"].min() < SURE


def test_draws_in_several_parts_are_compared_with_the_same_values() -> None:
    """With a guide of another place all draws of all parts are on one side of the true values."""
    few: dict[str, Any] = {"num_simulations": 20, "num_samples": 19, "near": False, **QUIET}
    for max_elements in (2**24, 40, 4):
        pit = pv.calibrate(TwoLevels(), max_elements=max_elements, **few).pit
        assert pit.shape == (20, 7)
        far = pv.calibrate(Far(), max_elements=max_elements, **few).pit
        assert (far[["w", "z[0]", "z[1]"]] < 1 / 20).all(axis=None)


class Far(TwoLevels):
    def guide(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        x = self.weight.new_zeros(size, 2) if x is None else x
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(100.0 + 0.0 * x[:, 0], 1.0))
            pyro.sample("z", dist.Normal(1000.0 + 0.0 * (x + w[..., None]), 1.0).to_event(1))


@pytest.fixture(scope="module")
def vae() -> pv.VAE:
    return exact_vae(2)


@pytest.mark.parametrize("name", [name for name in GUIDES if name != "exact"])
def test_the_checks_flag_what_they_can_see(vae: pv.VAE, name: str) -> None:
    found = [flagged(Guide(vae, **GUIDES[name]), seed=seed) for seed in range(5)]
    seen = {"SBC", "VSBC"} if name == "shift 0.3" else {"SBC", "TARP"}
    assert all(seen <= flags for flags in found)


def test_p_values_of_the_exact_guide_are_uniform_near_the_data_too(vae: pv.VAE) -> None:
    x = near_data(vae)
    small = {"num_simulations": 200, "num_samples": 20, "num_candidates": 1000}
    for given in (None, x):
        tables = [
            pv.calibrate(Guide(vae), given, **small, **QUIET | {"seed": seed}).table
            for seed in range(25)
        ]
        p_values = np.array([table["p_value"] for table in tables])
        smallest = min(kstest(column, "uniform").pvalue for column in p_values.T)
        assert smallest > SURE / p_values.shape[1]
        assert sum(table["flagged"].any() for table in tables) <= 5


def test_a_guide_that_is_wrong_near_the_data_alone_is_flagged_there(vae: pv.VAE) -> None:
    program = Guide(vae, factor=0.7, beyond=1.3)
    found = pv.calibrate(program, near_data(vae), **QUIET)
    assert {"SBC", "TARP"} <= {*found.table[found.table["flagged"]]["check"]}
    assert found.table.attrs["median_distance"] < 0.5
    everywhere = pv.calibrate(program, near_data(vae), near=False, **QUIET)
    assert found.table["p_holm"].min() < 1e-6 * everywhere.table["p_holm"].min()


def test_log_likelihood_alone_sees_that_a_guide_ignores_the_data(vae: pv.VAE) -> None:
    class Prior(Guide):
        def guide(self, x: Tensor | None = None, *, size: int | None = None) -> None:
            self.vae.guide(size=size if x is None else len(x))

    table = pv.calibrate(Prior(vae), **QUIET).table
    assert {*table[table["flagged"]]["quantity"]} == {"log p(x | z)", "log p(x, z)"}


def test_moments_say_in_which_way_a_guide_is_wrong(vae: pv.VAE) -> None:
    for options, shift, coverage in (
        ({}, 0.0, 0.9),
        ({"factor": 0.7}, 0.0, 0.75),
        ({"shift": 0.3}, -0.3, 0.88),
    ):
        found = pv.calibrate(Guide(vae, **options), seed=1, progress=False)
        line = found.table.set_index(["check", "quantity"]).loc["SBC", "z[0]"]
        assert line["shift"] == pytest.approx(shift, abs=0.1)
        assert line["coverage"] == pytest.approx(coverage, abs=0.04)
        is_exact = not options
        assert ("No check is flagged" in found.summary()) == is_exact
        assert ("SBC flags" in repr(found)) != is_exact
        assert "the model's own data" in found.summary()


def test_the_draws_follow_from_the_seed_and_nothing_is_changed(vae: pv.VAE) -> None:
    before, generator = vae.state_dict(), torch.get_rng_state()
    one, other, third = (
        pv.calibrate(vae.train(), num_simulations=50, num_samples=5, seed=seed).pit
        for seed in (1, 1, 2)
    )
    assert one.equals(other)
    assert not one.equals(third)
    assert vae.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    torch.manual_seed(3)
    unseeded = [pv.calibrate(vae, num_simulations=50, num_samples=5).pit for _ in range(2)]
    assert not unseeded[0].equals(unseeded[1])


class Faulty(TwoLevels):
    """A program that cannot be tested by simulation, for the reason that its fault names."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def model(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        if self.fault not in ("transformed", "autoregressive", "infinite", "factor"):
            super().model(x, size=size)
            return
        with pyro.plate("data", size if x is None else len(x)):
            w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if self.fault == "factor":
                pyro.factor("penalty", -w.square())
            if self.fault == "transformed":
                x = None if x is None else 2 * x
            loc = z if self.fault != "autoregressive" or x is None else z + 3 * x.flip(-1)
            scale = float("inf") if self.fault == "infinite" else 0.5
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        if x is not None and self.fault == "nan":
            x = x * float("nan")
        super().guide(x, size=size)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "latents that all rows share": (SharedLevel, {"x": ROWS[:, 0]}, "m outside it"),
    "a model that needs rows": (Covariate, {}, "cannot run without data"),
    "a context without rows": (TwoLevels, {"context": ROWS}, "pass the rows as x"),
    "fewer candidates": (TwoLevels, {"x": ROWS, "num_candidates": 10}, "num_candidates"),
    "transformed data": (lambda: Faulty("transformed"), {"x": ROWS}, "'x' are not columns"),
    "an autoregressive model": (lambda: Faulty("autoregressive"), {"x": ROWS}, "another log p"),
    "the same without rows": (lambda: Faulty("autoregressive"), {}, "another log p"),
    "transformed without rows": (lambda: Faulty("transformed"), {}, "another log p"),
    "infinite data": (lambda: Faulty("infinite"), {}, "infinite or NaN values of 'x' in"),
    "draws that are NaN": (lambda: Faulty("nan"), {}, "The guide draws infinite or NaN"),
    "draws near rows that are NaN": (
        lambda: Faulty("nan"),
        {"x": ROWS},
        "The guide draws infinite or NaN",
    ),
    "a factor": (lambda: Faulty("factor"), {"x": ROWS}, "pyro.factor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tested_is_refused_in_one_sentence(name: str) -> None:
    build, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        pv.calibrate(build(), num_simulations=50, num_samples=5, **options, **QUIET)
