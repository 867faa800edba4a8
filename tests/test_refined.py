"""Proposals of the rows' own: right within their errors, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from benchmarks import refined as benchmark
from own_programs import Mixture, TwoLevels
from programs import Grid, LinearGaussian, linear_gaussian
from pyro.distributions import constraints
from quadrature import grid
from small_vae import small
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evidence import refined

QUIET: dict[str, Any] = {"seed": 0, "progress": False}
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def assert_within(found: xr.Dataset, exact: np.ndarray) -> None:
    """Almost all rows are unmarked, and within 3 errors, of 40 rows or fewer all but one."""
    good = (found["note"] == "ok").to_numpy()
    error = found["log_evidence"].to_numpy() - exact
    errors = (np.abs(error) - 1e-6) / found["mcse"].to_numpy()
    assert good.mean() >= 0.95
    assert (errors[good] > 3.0).sum() <= 1
    assert errors[good].max() < 5.0
    assert abs(error[good].mean()) < 0.03


@pytest.mark.parametrize("guide", benchmark.GUIDES)
@pytest.mark.parametrize("latents", [2, 8])
def test_linear_programs_are_right_within_their_errors(latents: int, guide: str) -> None:
    program, x = benchmark.linear(latents, guide, 60)
    line = benchmark.judged(benchmark.errors(program, x, program.log_evidence(x), seed=1))
    assert line["within 3"] >= 0.98  # at most one row of 60
    if guide == "exact":
        assert line["largest error"] < 1e-6
        assert line["refined"] == 0
    else:
        assert line["refined"] > 0.9
        assert line["marked"] < 0.02


def test_a_fitted_model_is_right_within_its_errors() -> None:
    lines = benchmark.one_integral(("Gamma, 1", 1), max_steps=100)
    line = benchmark.judged(lines)
    assert line["within 3"] >= 0.99
    assert line["marked"] < 0.02
    assert line["largest error"] < 0.2


def test_choosing_rows_for_their_own_proposals_does_not_bias() -> None:
    """Rows kept because of the small weights that they happened to draw would be too low."""
    program, x = linear_gaussian(rows=60, factor=0.8)
    exact = program.log_evidence(x)
    found = [pv.log_evidence(program, x, 200, seed=seed) for seed in range(4)]
    z = np.stack([(f["log_evidence"] - exact) / f["mcse"] for f in found])
    assert abs(z.mean()) < 4 * z.std() / np.sqrt(z.size)
    assert 0.8 < z.std() < 1.25


def test_rows_that_need_no_proposal_have_the_numbers_of_the_guide() -> None:
    program, x = linear_gaussian(rows=12, factor=1.4)
    guided = pv.log_evidence(program, x, 400, refine=False, **QUIET)
    found = pv.log_evidence(program, x, 400, **QUIET)
    assert not found["refined"].any()
    xr.testing.assert_equal(found, guided)
    assert found.attrs["left_to_the_guide"] == ""


class HalfBad(LinearGaussian):
    """The guide is too narrow in rows whose first column is positive."""

    def guide(self, x: Tensor) -> None:
        mean, covariance = self.posterior(x)
        factor = torch.where(x[:, :1, None] > 0, 0.4, 1.4)
        with pyro.plate("data", len(x)):
            tril = torch.linalg.cholesky(covariance) * factor
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))


def half_bad(rows: int = 16) -> tuple[HalfBad, Tensor]:
    program, x = linear_gaussian(rows=rows)
    return HalfBad(program.weight.detach()), x


def test_refined_rows_are_named_with_their_k_before() -> None:
    program, x = half_bad(40)
    found = pv.log_evidence(program, x, 400, **QUIET)
    guided = pv.log_evidence(program, x, 400, refine=False, **QUIET)
    is_bad = (x[:, 0] > 0).numpy()
    np.testing.assert_array_equal(found["refined"], is_bad)
    assert (found["pareto_k_guide"][is_bad] > 0).all()
    assert (found["pareto_k"][is_bad] < found["pareto_k_guide"][is_bad]).mean() > 0.95
    assert (found["mcse"][is_bad] < guided["mcse"][is_bad]).mean() > 0.9
    np.testing.assert_array_equal(guided["pareto_k"], guided["pareto_k_guide"])
    assert not guided["refined"].any()
    for name in found:
        np.testing.assert_array_equal(found[name][~is_bad], guided[name][~is_bad])
    # the ELBO stays that of the guide
    kl = 2 * (0.4**2 / 2 - 0.5 - np.log(0.4))
    error = (found["elbo"] - (program.log_evidence(x) - kl)) / found["elbo_mcse"]
    assert abs(error[is_bad]).max() < 4.5
    assert found.attrs["refine_seconds"] > 0
    assert guided.attrs["refine_seconds"] == 0
    every = pv.log_evidence(program, x, 400, refine=True, **QUIET)
    assert every["refined"].all()
    assert_within(every, program.log_evidence(x))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    program, x = half_bad()
    found = pv.log_evidence(program, x, 200, **QUIET)
    order = torch.tensor([13, 2, 7, 0, 11, 5])
    for one in (
        pv.log_evidence(program, x[order], 200, **QUIET),
        pv.log_evidence(program, x[order], 200, max_elements=2000, **QUIET),
    ):
        for name in found:
            np.testing.assert_allclose(one[name], found[name][order], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(one["refined"], found["refined"][order])


@pytest.mark.parametrize("block", [1, 2**24])
def test_blocks_of_rows_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = half_bad(6)
    found = pv.log_evidence(program, x, 200, **QUIET)
    monkeypatch.setattr("pyro_vae.evidence.scorer.BLOCK", block)
    other = pv.log_evidence(program, x, 200, **QUIET)
    for name in found:
        np.testing.assert_allclose(other[name], found[name], rtol=1e-5, atol=1e-7)


def test_nothing_else_changes() -> None:
    program, x = half_bad()
    program.train()
    program.weight.grad = torch.ones_like(program.weight)
    fixed = nn.Parameter(torch.ones(()), requires_grad=False)
    program.register_parameter("fixed", fixed)
    before, state = program.weight.detach().clone(), torch.get_rng_state()
    one, two = (pv.log_evidence(program, x, 100, **QUIET) for _ in range(2))
    assert one["refined"].any()
    xr.testing.assert_equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(program.weight.detach(), before)
    assert torch.equal(program.weight.grad, torch.ones_like(program.weight))
    assert program.weight.requires_grad
    assert not program.fixed.requires_grad
    assert fixed.grad is None
    assert program.training
    assert list(pyro.get_param_store().keys()) == []
    assert not one.equals(pv.log_evidence(program, x, 100, seed=1))
    assert not pv.log_evidence(program, x, 100).equals(pv.log_evidence(program, x, 100))


def test_gradients_may_be_switched_off_but_not_by_inference_mode() -> None:
    program, x = half_bad(4)
    calls: list[Callable[[], Any]] = [
        lambda: pv.log_evidence(program, x, 100, **QUIET),
        lambda: pv.gaps(program, x, 100, **QUIET),
        lambda: pv.posterior(program, x, "importance", 20, **QUIET),
    ]
    with torch.inference_mode():
        for call in calls:
            with pytest.raises(ValueError, match=r"under torch.inference_mode\(\)"):
                call()
        guided = pv.log_evidence(program, x, 100, refine=False, **QUIET)
        made_there = x.clone()
    assert not guided["refined"].any()
    found = calls[0]()
    with torch.no_grad():
        for call in calls:
            call()
        xr.testing.assert_equal(calls[0](), found)
        assert not torch.is_grad_enabled()
    xr.testing.assert_equal(pv.log_evidence(program, made_there, 100, **QUIET), found)


def test_impossible_rows_are_left_out() -> None:
    vae, x = small(likelihood=pv.likelihoods.Poisson()), torch.ones(5, 6)
    x[3, 2] = -1.0
    options: dict[str, Any] = {"refine": True, **QUIET}
    found = pv.log_evidence(vae, x, 100, on_invalid="inf", **options)
    np.testing.assert_array_equal(found["refined"], [True, True, True, False, True])
    assert float(found["log_evidence"][3]) == -np.inf
    good = [0, 1, 2, 4]
    alone = pv.log_evidence(vae, x[good], 100, **options)
    np.testing.assert_allclose(found["log_evidence"][good], alone["log_evidence"], rtol=1e-5)


class Mixed(nn.Module):
    """k ~ Categorical, z given k ~ N(2 k, 1), x given z ~ N(z, 0.5)."""

    probs = torch.tensor([0.2, 0.3, 0.5], **DOUBLE)

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), **DOUBLE))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(self.probs))
            z = pyro.sample("z", dist.Normal(2.0 * k.double() + self.shift, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3, **DOUBLE) / 3))
            pyro.sample("z", dist.Normal(x[:, 0] + 0.0 * k.double(), 0.1))

    def exact(self, x: Tensor) -> np.ndarray:
        parts = dist.Normal(2.0 * torch.arange(3).double(), 1.25**0.5).log_prob(x)
        return torch.logsumexp(parts + self.probs.log(), 1).numpy()


class Later(Mixed):
    """The guide draws k given z."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0], 0.1))
            logits = -((z[..., None] - 2.0 * torch.arange(3)) ** 2) / 3.0
            pyro.sample("k", dist.Categorical(logits=logits))


@pytest.mark.parametrize("program", [Mixed(), Later()], ids=["k first", "k given z"])
def test_discrete_latents_are_left_to_the_guide(program: Mixed) -> None:
    x = torch.linspace(-1.0, 5.0, 40, **DOUBLE)[:, None]
    found = pv.log_evidence(program, x, 2000, **QUIET)
    assert found.attrs["left_to_the_guide"] == "k"
    assert found["refined"].all()
    assert_within(found, program.exact(x))


class MixedBounded(nn.Module):
    """A discrete latent beside one whose bounds are those of the row."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.ones((), **DOUBLE))

    def both(self, x: Tensor) -> Tensor:
        k = pyro.sample("k", dist.Categorical(torch.ones(2, **DOUBLE) / 2))
        z = pyro.sample("z", dist.Uniform(0.0 * x[:, 0], self.top + x[:, 1]))
        w = pyro.sample("w", dist.LogNormal(0.0 * self.top, 1.0))
        return z + k + w

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.both(x), 0.5), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self.both(x)


def test_bounds_of_the_rows_are_left_to_the_guide_if_others_are() -> None:
    program, x = MixedBounded(), torch.rand(10, 2, **DOUBLE) + 0.5
    found = pv.log_evidence(program, x, 4000, refine=True, **QUIET)
    guided = pv.log_evidence(program, x, 100_000, refine=False, **QUIET)
    assert found.attrs["left_to_the_guide"] == "k, z"
    assert found["refined"].all()
    error = np.hypot(found["mcse"], guided["mcse"])
    assert (np.abs(found["log_evidence"] - guided["log_evidence"]) < 4 * error).all()
    assert "k, z" in str(pytest.raises(ValueError, pv.gaps, program, x, 100, **QUIET).value)


def test_a_program_of_discrete_latents_alone_is_not_refined() -> None:
    x = torch.linspace(-1.0, 3.0, 9)
    for refine in (True, "auto"):
        found = pv.log_evidence(Mixture(), x, 500, refine=refine, **QUIET)
        assert not found["refined"].any()
        assert found.attrs["left_to_the_guide"] == "k"
    xr.testing.assert_equal(found, pv.log_evidence(Mixture(), x, 500, refine=False, **QUIET))


class Angle(nn.Module):
    """An angle beside a length: x ~ N(r (cos a, sin a), 0.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros((), **DOUBLE))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.VonMises(self.zero, self.zero + 1.0))
            r = pyro.sample("r", dist.LogNormal(self.zero, 0.3))
            mean = r[..., None] * torch.stack([a.cos(), a.sin()], -1)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.VonMises(torch.atan2(x[:, 1], x[:, 0]) + self.zero, 1.0))
            pyro.sample("r", dist.LogNormal(self.zero, 0.05))

    def exact(self, x: Tensor) -> np.ndarray:
        a = torch.linspace(-torch.pi, torch.pi, 400, **DOUBLE)[:-1, None]
        log_r = torch.linspace(-1.8, 1.8, 401, **DOUBLE)
        mean = log_r.exp()[..., None] * torch.stack([a.cos(), a.sin()], -1)
        joint = dist.VonMises(0.0, 1.0).log_prob(a) + dist.Normal(0.0, 0.3).log_prob(log_r)
        joint = joint + dist.Normal(mean, 0.5).log_prob(x[:, None, None]).sum(-1)
        step = (2 * torch.pi / 399) * (log_r[1] - log_r[0])
        return (torch.logsumexp(joint.flatten(1), 1) + step.log()).numpy()


def test_angles_are_left_to_the_guide() -> None:
    program = Angle()
    x = torch.randn(20, 2, **DOUBLE)
    found = pv.log_evidence(program, x, 2000, refine=True, **QUIET)
    assert found.attrs["left_to_the_guide"] == "a"
    assert found["refined"].all()
    assert_within(found, program.exact(x))


class Simplex(nn.Module):
    """z ~ Dirichlet(0.8, 2), x ~ N(z_1, 0.2); the guide is too narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.tensor([0.8, 2.0], **DOUBLE))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(self.prior))
            pyro.sample("x", dist.Normal(z[..., 0], 0.2), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        mean = x[:, 0].clamp(0.05, 0.95)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(60.0 * torch.stack([mean, 1 - mean], -1)))

    def exact(self, x: Tensor) -> np.ndarray:
        line = grid(constraints.unit_interval, 4001)
        z = torch.stack([line.points, 1 - line.points], -1)
        with torch.no_grad():
            joint = dist.Dirichlet(self.prior, validate_args=False).log_prob(z)
            joint = joint + dist.Normal(line.points, 0.2).log_prob(x)
        return torch.logsumexp((joint + line.weights.log()).nan_to_num(-torch.inf), 1).numpy()


class Cells(nn.Module):
    """A latent of each cell, in a plate inside the rows: z_nj ~ N(0, 1), x_nj ~ N(z_nj, 0.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros((), **DOUBLE))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.8 * x + self.zero, 0.2))

    def exact(self, x: Tensor) -> np.ndarray:
        return dist.Normal(0.0, 1.25**0.5).log_prob(x).sum(1).numpy()


class Levels(TwoLevels):
    def exact(self, x: Tensor) -> np.ndarray:
        covariance = torch.tensor([[2.25, 1.0], [1.0, 2.25]])
        return dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x).numpy()


class Columns(Grid):
    """The guide of z is shifted and narrow."""

    def guide(self, x: dict[str, Tensor]) -> None:
        mean = x["cells"].mean(1, keepdim=True)
        with pyro.plate("data", len(mean), dim=-2):
            pyro.sample("z", dist.Normal(mean + self.shift, 0.15))

    def exact(self, x: dict[str, Tensor]) -> np.ndarray:
        z = torch.linspace(-9, 9, 4001, **DOUBLE)
        joint = dist.Normal(0.0, 1.0).log_prob(z) + nn.functional.logsigmoid(z)
        joint = joint + dist.Normal(z, 1.0).log_prob(x["cells"][..., None]).sum(1)
        return (torch.logsumexp(joint, 1) + (z[1] - z[0]).log()).numpy()


class Bounded(nn.Module):
    """The support of z depends on w, and that of w on the row."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.ones((), **DOUBLE))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Uniform(0.0 * x[:, 0], self.top + x[:, 1]))
            z = pyro.sample("z", dist.Uniform(-w, w))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Uniform(0.0 * x[:, 0], self.top + x[:, 1]))
            pyro.sample("z", dist.Uniform(-w, 0.9 * w))

    def exact(self, x: Tensor) -> np.ndarray:
        unit = (torch.arange(2000, **DOUBLE) + 0.5) / 2000
        w = unit * (1.0 + x[:, 1:])
        normal = dist.Normal(x[:, :1], 0.5)
        return ((normal.cdf(w) - normal.cdf(-w)) / (2 * w)).mean(1).log().numpy()


PROGRAMS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "levels": (Levels(), lambda: torch.randn(40, 2) * 1.5),
    "a plate of cells": (Cells(), lambda: torch.randn(40, 3, **DOUBLE)),
    "a plate of columns": (
        Columns(),
        lambda: {"cells": torch.randn(40, 4, **DOUBLE), "flag": torch.ones(40, **DOUBLE)},
    ),
    "simplex": (Simplex(), lambda: torch.rand(40, 1, **DOUBLE)),
    "bounds of other sites": (Bounded(), lambda: torch.rand(40, 2, **DOUBLE)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_the_users_own(name: str) -> None:
    program, data = PROGRAMS[name]
    x = data()
    found = pv.log_evidence(program, x, 2000, **QUIET)
    assert found["refined"].mean() > 0.5
    assert found.attrs["left_to_the_guide"] == ""
    assert_within(found, program.exact(x))
    few = pv.posterior(program, x, "importance", 50, **QUIET)
    assert (few["vi_stats"].pareto_k < 0.7).mean() > 0.9


def test_many_latents_have_a_covariance_of_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    made = refined.LowRankNormal.distribution
    monkeypatch.setattr(refined, "MOST_FULL", 1)
    monkeypatch.setattr(refined, "RANK", 2)
    monkeypatch.setattr(
        refined.LowRankNormal,
        "distribution",
        lambda self: seen.append(self.factor.shape[-1]) or made(self),
    )
    program, x = benchmark.linear(8, "half as wide", 40)
    found = pv.log_evidence(program, x, 2000, **QUIET)
    assert set(seen) == {2}
    assert found["refined"].all()
    assert_within(found, program.log_evidence(x))


def test_annealing_and_the_closed_form_are_methods() -> None:
    program, x = benchmark.linear(2, "shifted", 12)
    exact = program.log_evidence(x)
    closed = pv.log_evidence(program, x, method="exact", **QUIET)
    np.testing.assert_allclose(closed["log_evidence"], exact, rtol=1e-9)
    assert (closed["mcse"] == 0).all()
    assert (closed["note"] == "ok").all()
    annealed = pv.log_evidence(program, x, method="ais", **QUIET)
    error = np.abs(annealed["log_evidence"] - exact)
    assert (error < 4 * annealed["mcse"] + 1e-6).all()
    assert annealed.attrs["num_samples"] == 256
    assert not annealed.is_over().any()  # by so few draws that k is noise, a fifth was
    assert closed["log_evidence"].attrs["direction"] == "exact"
    assert annealed["log_evidence"].attrs["direction"] == "lower bound in expectation"
    names = set(pv.log_evidence(program, x[:2], 50, refine=False, **QUIET))
    for method, found in (("exact", closed), ("ais", annealed)):
        assert found.attrs["method"] == method
        assert set(found) == names
        assert found["elbo"].isnull().all()
        assert found["pareto_k_guide"].isnull().all()
        assert not found["refined"].any()
        assert found.summary().loc["log_evidence", "mean"] == pytest.approx(
            float(found["log_evidence"].mean())
        )
    vae = small()
    with pytest.raises(ValueError, match="no closed form here.*row 0.*method='ais'"):
        pv.log_evidence(vae, torch.ones(2, 6), method="exact", **QUIET)
    for method in ("importance", "ais", "exact"):
        with pytest.raises(ValueError, match="method"):
            pv.log_evidence(program, x, method=method.upper(), **QUIET)
