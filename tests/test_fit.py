"""fit: what it leaves alone, what it reports, what it optimises, and how it ends."""

import functools
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from programs import Grid, linear_gaussian
from pyro.nn import PyroModule, PyroParam
from small_vae import GREY, PLAIN, X, assert_same, small, weights
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

import pyro_vae as pv
from pyro_vae.data.files import read_tensors
from pyro_vae.elbos.log_densities import log_densities
from pyro_vae.engine.running import evaluating, seeded
from pyro_vae.training.loop import DRAWS

QUICK: dict[str, Any] = PLAIN | {
    "batch_size": 16,
    "max_epochs": 2,
    "seed": 0,
    "device": "cpu",
}
STILL: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 1e-30}


def fit(program: nn.Module, x: Any, **options: Any) -> pv.History:
    return pv.fit(program, x, **QUICK | {"progress": False} | options)


class SharedAlone(nn.Module):
    """A program whose only latent is shared by all rows: w ~ N(0, 1), x_n ~ N(w, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(6)) for _ in range(2))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


class SharedByScalars(SharedAlone):
    def model(self, x: Tensor) -> None:
        w = [pyro.sample(f"w{i}", dist.Normal(0.0, 1.0)) for i in range(6)]
        with pyro.plate("data", len(x)):
            for i, loc in enumerate(w):
                pyro.sample(f"x{i}", dist.Normal(loc, 1.0), obs=x[:, i])

    def guide(self, x: Tensor) -> None:
        for i in range(6):
            pyro.sample(f"w{i}", dist.Normal(self.loc[i], self.log_scale[i].exp()))


class SharedWithFactor(SharedAlone):
    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("all", dist.Normal(w, 1.0).to_event(1), obs=x.new_zeros(6))
        with pyro.plate("data", len(x)):
            pyro.factor("x", dist.Normal(w, 1.0).to_event(1).log_prob(x))


SHARED = {
    f"{make.__name__}, {elbo}": (make, elbo)
    for make in (SharedAlone, SharedByScalars, SharedWithFactor)
    for elbo in (
        pv.elbos.Trace_ELBO(),
        pv.elbos.Trace_ELBO(3),
        pv.elbos.Trace_ELBO(3, vectorize_particles=False),
        pv.elbos.TraceMeanField_ELBO(),
        pv.elbos.TraceGraph_ELBO(),
        pv.elbos.TraceEnum_ELBO(),
    )
}


@pytest.mark.parametrize("name", SHARED)
def test_a_program_with_shared_latents_alone_is_fitted(name: str) -> None:
    make, elbo = SHARED[name]
    for options in ({}, {"validation": 0.2, "averaged": True}):
        program = make()
        record = fit(program, GREY, elbo=elbo, lr=0.1, **options).table.iloc[-1]
        assert np.isfinite(record.drop("seconds").astype(float)).all()
        assert float(program.loc.detach().abs().max()) > 0.1


def validation_elbo(program: nn.Module, rows: Tensor, seed: int = 0) -> float:
    with evaluating(program), seeded(seed):
        draws = [log_densities(program, rows, 1).log_weights.mean() for _ in range(DRAWS)]
    return float(torch.stack(draws).mean())


class Recording(torch.optim.SGD):
    """Keeps the gradients and the learning rate of each step."""

    def __init__(self, params: Any, lr: float = 1e-30) -> None:
        super().__init__(params, lr)
        self.gradients: list[list[Tensor]] = []
        self.lrs: list[float] = []

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append([p.grad.clone() for p in parameters])
        self.lrs.append(self.param_groups[0]["lr"])
        super().step()


def recorded(program: nn.Module, x: Any, **options: Any) -> Recording:
    made: list[Recording] = []

    def make(parameters: Any, lr: float) -> Recording:
        made.append(Recording(parameters, lr))
        return made[0]

    fit(program, x, **{"lr": 1e-30} | options | {"optimizer": make})
    return made[0]


# What it leaves alone


def test_two_vaes_of_the_same_members_both_train() -> None:
    members = {
        "prior": pv.priors.Mixture(3, 2),
        "likelihood": pv.likelihoods.Normal(scale=pv.Shared()),
        "posterior": pv.posteriors.MultivariateNormal(),
        "encoder": pv.networks.MLP(8),
        "decoder": pv.networks.MLP(8),
    }
    vaes = [pv.VAE((6,), **members) for _ in range(2)]
    before = [weights(vae) for vae in vaes]
    fit(vaes[0], GREY, lr=0.01)
    after = weights(vaes[0])
    assert_same(weights(vaes[1]), before[1])
    fit(vaes[1], GREY, lr=0.01)
    assert_same(weights(vaes[0]), after)
    for vae, start in zip(vaes, before, strict=True):
        unchanged = [n for n, p in vae.named_parameters() if torch.equal(p, start[n])]
        assert unchanged == []


def test_plain_svi_trains_two_vaes_at_once() -> None:
    vaes = [small(seed) for seed in (0, 1)]
    before = [weights(vae) for vae in vaes]
    svis = [
        pyro.infer.SVI(
            vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()
        )
        for vae in vaes
    ]
    for _ in range(2):
        for svi in svis:
            svi.step(X)
    for vae, start in zip(vaes, before, strict=True):
        assert [n for n, p in vae.named_parameters() if torch.equal(p, start[n])] == []
    assert list(pyro.get_param_store().keys()) == []


class BrokenError(Exception):
    pass


def raise_in_training(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    def transform(x: Tensor) -> Tensor:
        if len(x) == 16:
            raise BrokenError
        return x

    return transform


def nan_in_training(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: x / 0.0 * 0.0 if len(x) == 16 else x


ENDS = {
    "well": ({}, None),
    "with validation": ({"validation": 0.2}, None),
    "by an exception": ({"transform": raise_in_training}, BrokenError),
    "by NaN": ({"transform": nan_in_training}, FloatingPointError),
    "refused": ({"optimizer": torch.optim.LBFGS}, ValueError),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_world_is_as_it_was(end: str) -> None:
    options, error = ENDS[end]
    vae = small()
    vae.decoder.eval()
    if "transform" in options:
        options = {"transform": options["transform"](vae)}
    with pyro.get_param_store().scope(), pyro.validation_enabled(True):
        pyro.param("theirs", torch.ones(2))
        before = world(vae)
        if error is None:
            fit(vae, X, **options)
        else:
            with HALVED if end == "by NaN" else nullcontext(), pytest.raises(error):
                fit(vae, X, **options)
        assert world(vae) == before


def world(vae: nn.Module) -> dict[str, Any]:
    store = pyro.get_param_store().get_state()
    return {
        "store": {name: (id(value), value.tolist()) for name, value in store["params"].items()},
        "checks": (Distribution._validate_args, pyro.settings.get()),
        "dtype": torch.get_default_dtype(),
        "generator": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "modes": [module.training for module in vae.modules()],
        "stack": list(pyro.poutine.runtime._PYRO_STACK),
        "gradients": torch.is_grad_enabled(),
    }


def test_one_seed_gives_one_fit_whatever_ran_before() -> None:
    one, other = small(), small()
    fit(one, GREY, transform=pv.datasets.binarize, validation=0.2)
    torch.randn(7)
    fit(other, GREY, transform=pv.datasets.binarize, validation=0.2)
    assert_same(weights(one), weights(other))


def test_without_a_seed_the_generator_runs_on() -> None:
    one, other = small(), small()
    fit(one, X, seed=None)
    fit(other, X, seed=None)
    assert not torch.equal(one.encoder.layers[1].weight, other.encoder.layers[1].weight)


def test_stale_gradients_do_not_enter() -> None:
    one, other = small(), small()
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    fit(one, X)
    fit(other, X)
    assert_same(weights(one), weights(other))


@pytest.mark.parametrize("mode", [True, False])
def test_it_trains_in_training_mode(mode: bool) -> None:
    vae = small(encoder=nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    vae.train(mode)
    before = vae.encoder[1].running_mean.clone()
    fit(vae, X)
    assert not torch.equal(vae.encoder[1].running_mean, before)
    assert all(module.training is mode for module in vae.modules())


def test_float64_and_another_default_dtype() -> None:
    one, other = small().double(), small().double()
    fit(one, GREY.numpy() > 0.5)
    torch.set_default_dtype(torch.float64)
    try:
        fit(other, GREY.numpy() > 0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(weights(one), weights(other))


# What it reports


def test_history_columns() -> None:
    terms = ["elbo", "elbo_se", "reconstruction", "reconstruction_se", "kl", "kl_se"]
    history = fit(small(), X, max_epochs=3)
    assert history.table.columns.tolist() == [*terms, "seconds"]
    assert (history.table.index.name, history.table.index.tolist()) == ("epoch", [1, 2, 3])
    history = fit(small(), X, validation=0.2, warmup=1)
    held_out = [f"validation_{name}" for name in terms]
    assert history.table.columns.tolist() == [*terms, *held_out, "kl_weight", "seconds"]
    assert len(history) == 2
    assert history.seed == 0
    assert (history.table.seconds > 0).all()


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_the_elbo_is_in_nats_per_row(batch_size: int) -> None:
    program, x = linear_gaussian()
    evidence = program.log_evidence(x)
    table = fit(program, x, batch_size=batch_size, validation=x[:15], **STILL).table
    for rows, prefix in ((evidence, ""), (evidence[:15], "validation_")):
        np.testing.assert_allclose(table[f"{prefix}elbo"], rows.mean(), rtol=1e-10)
        se = rows.std(ddof=1) / len(rows) ** 0.5
        np.testing.assert_allclose(table[f"{prefix}elbo_se"], se, rtol=1e-9)
        parts = table[f"{prefix}reconstruction"] - table[f"{prefix}kl"]
        np.testing.assert_allclose(parts, table[f"{prefix}elbo"], rtol=1e-10)


def test_the_terms_are_those_of_log_densities() -> None:
    vae, held_out = small(), X[:20]
    record = fit(vae, X[20:], validation=held_out, max_epochs=1).table.loc[1]
    with evaluating(vae), seeded(0):
        draws = [log_densities(vae, held_out, 1) for _ in range(DRAWS)]
    assert record.validation_elbo == pytest.approx(validation_elbo(vae, held_out), rel=1e-6)
    for name in ("reconstruction", "kl"):
        terms = torch.stack([getattr(draw, name)[0] for draw in draws]).mean(0)
        assert record[f"validation_{name}"] == pytest.approx(float(terms.mean()), rel=1e-5)
        error = float(terms.std()) / 20**0.5
        assert record[f"validation_{name}_se"] == pytest.approx(error, rel=1e-5)


def test_rows_are_checked_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, moved: list[int]
) -> None:
    monkeypatch.setattr("pyro_vae.data.rows.CHECKED_AT_ONCE", 4)
    fit(small(), X, validation=X[:9], max_epochs=1)
    assert max(moved) == 4
    bad = X.clone()
    bad[17, 2] = torch.nan
    with pytest.raises(ValueError, match="row 17, column 2 .1 of"):
        fit(small(), bad)


def test_one_row_has_no_errors() -> None:
    record = fit(small(), X, validation=X[:1], max_epochs=1).table.loc[1]
    names = [f"validation_{name}_se" for name in ("elbo", "reconstruction", "kl")]
    assert record[names].isna().all()
    assert record[["elbo_se", "reconstruction_se", "kl_se"]].notna().all()


def test_more_particles_report_the_mean_over_them() -> None:
    vae = small()
    elbo = pv.elbos.Trace_ELBO(num_particles=400)
    table = fit(vae, X, elbo=elbo, max_epochs=1, **STILL).table
    with evaluating(vae), seeded(1):
        wanted = float(log_densities(vae, X, 400).log_weights.mean())
    assert table.elbo[1] == pytest.approx(wanted, abs=0.05)


# Validation


def test_without_validation_nothing_is_held_out_and_the_last_weights_are_kept() -> None:
    seen: list[int] = []
    vae = small()

    def count(x: Tensor) -> Tensor:
        seen.append(len(x))
        last.update(weights(vae))
        return x

    last: dict[str, Tensor] = {}
    history = fit(vae, X, max_epochs=4, lr=3.0, transform=count)
    assert seen[-5:] == [16, 16, 16, 2, 50]
    assert history.best_epoch == len(history) == 4
    assert history.stopped == "max_epochs"
    assert torch.equal(last["decoder.layers.1.weight"], vae.decoder.layers[1].weight)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_best_weights_are_kept_and_overfitting_stops(averaged: bool) -> None:
    vae, train, held_out = small(), X[:40], X[40:]
    options = {"validation": held_out, "lr": 0.1, "max_epochs": 3000, "averaged": averaged}
    history = fit(vae, train, **options, until_converged=True)
    elbos = history.table.validation_elbo
    assert (history.stopped, history.converged) == ("converged", True)
    assert history.reason.startswith("held-out rows")
    assert elbos.idxmax() == history.best_epoch <= len(history) < 3000
    assert validation_elbo(vae, held_out) == pytest.approx(elbos.max(), rel=1e-6)
    assert len(fit(small(), train, **options | {"max_epochs": 30})) == 30


def test_a_share_is_held_out_and_seeded() -> None:
    x = torch.arange(50.0)[:, None].expand(50, 6)
    seen: list[set[float]] = []

    def look(rows: Tensor) -> Tensor:
        seen.append(set(rows[:, 0].tolist()))
        return rows

    fit(small(likelihood=pv.likelihoods.Normal()), x, validation=0.2, transform=look, lr=1e-9)
    trained = set().union(*(rows for rows in seen if len(rows) == 16))
    held_out = seen[-1]
    assert (len(held_out), trained & held_out) == (10, set())


def test_validation_noise_is_fixed_and_the_transforms_too() -> None:
    vae = small()
    table = fit(
        vae, GREY, transform=pv.datasets.binarize, validation=0.4, max_epochs=3, **STILL
    ).table
    assert table.validation_elbo.nunique() == 1
    assert table.elbo.nunique() == 3


def test_a_validation_elbo_of_nan_is_never_the_best() -> None:
    vae, calls = small(), []

    def spoil(x: Tensor) -> Tensor:
        if not vae.training and len(x) == 10:
            calls.append(x)
            return x * torch.nan if len(calls) == 1 else x
        return x

    history = fit(vae, X, validation=0.2, transform=spoil, max_epochs=3)
    assert np.isnan(history.table.validation_elbo[1])
    assert history.best_epoch > 1


def test_a_second_fit_goes_on() -> None:
    vae = small()
    first = fit(vae, X, max_epochs=30, lr=0.01)
    before = weights(vae)
    second = fit(vae, X, max_epochs=1, **STILL)
    assert_same(weights(vae), before)
    assert second.table.elbo[1] > first.table.elbo[1] + 0.3
    assert second.table.elbo[1] == pytest.approx(first.table.elbo[30], abs=0.3)


# Inputs


def as_frame(x: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(x, index=[f"row {i}" for i in range(len(x))], columns=list("abcdef"))


INPUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.asarray,
    "float64": lambda x: x.astype(np.float64),
    "integers": lambda x: x.astype(np.int16),
    "booleans": lambda x: x.astype(bool),
    "list": lambda x: x.tolist(),
    "pandas": as_frame,
    "xarray": lambda x: xr.DataArray(x, dims=("row", "column")),
    "fortran": np.asfortranarray,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_the_kind_of_table_does_not_matter(kind: str) -> None:
    one, other = small(), small()
    fit(one, X, validation=0.2)
    fit(other, INPUTS[kind](X.numpy()), validation=0.2)
    assert_same(weights(one), weights(other))


def test_a_dict_of_fields() -> None:
    one, other = Grid(), Grid()
    x = {"cells": torch.randn(30, 3), "flag": torch.ones(30)}
    fit(one, x, validation=0.2, lr=0.1)
    fit(other, {"cells": pd.DataFrame(x["cells"].numpy()), "flag": [1.0] * 30}, lr=0.1)
    assert one.shift != 0
    assert other.shift != 0


def test_the_last_batch_may_be_smaller_and_the_first_larger_than_the_data() -> None:
    program, x = linear_gaussian(rows=34)
    assert len(recorded(program, x, batch_size=16, max_epochs=1).gradients) == 3
    assert len(recorded(program, x, batch_size=10**9, max_epochs=1).gradients) == 1


def test_a_transform_may_change_the_shape_of_a_row() -> None:
    vae = small()
    fit(vae, X.repeat(1, 2), transform=lambda x: x[:, :6], validation=0.2)


def test_numpy_numbers_are_numbers() -> None:
    options = {"batch_size": np.int64(16), "max_epochs": np.int32(1), "lr": np.float32(0.01)}
    assert len(fit(small(), X, **options, validation=np.float64(0.2))) == 1


# What it optimises


def by_hand(vae: pv.VAE, x: Tensor, weight: float, *, analytic: bool = False) -> list[Tensor]:
    with seeded(0):
        x = x[torch.randperm(len(x))]
        posterior, prior = vae.encode(x), vae.prior()
        z = posterior.rsample()
        kl = posterior.log_prob(z) - prior.log_prob(z)
        kl = kl_divergence(posterior, prior.expand(posterior.batch_shape)) if analytic else kl
        loss = -(vae.decode(z).log_prob(x) - weight * kl).sum()
    return list(torch.autograd.grad(loss, list(vae.parameters())))


ELBOS = {
    "ours": (pv.elbos.Trace_ELBO, False),
    "Pyro's": (pyro.infer.Trace_ELBO, False),
    "Pyro's, mean field": (pyro.infer.TraceMeanField_ELBO, True),
}


@pytest.mark.parametrize("name", ELBOS)
def test_warmup_weighs_the_kl_terms(name: str) -> None:
    elbo, analytic = ELBOS[name]
    vae = small()
    options = {"elbo": elbo(), "batch_size": 50}
    for warmup, weight in ((0, 1.0), (2, 0.5), (4, 0.25)):
        step = recorded(vae, X, warmup=warmup, max_epochs=max(warmup, 1), **options)
        wanted = by_hand(vae, X, weight, analytic=analytic)
        for have, want in zip(step.gradients[0], wanted, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_the_reported_elbo_is_never_annealed() -> None:
    program, x = linear_gaussian()
    history = fit(program, x, warmup=2, max_epochs=3, validation=0.2, **STILL)
    table = history.table
    assert table.kl_weight.tolist() == [0.5, 1.0, 1.0]
    assert table.elbo.nunique() <= 3
    assert np.ptp(table.elbo) < 1e-10
    assert table.validation_elbo.notna().tolist() == [False, False, True]
    assert history.best_epoch == 3


def test_a_warmup_as_long_as_the_run_keeps_the_last_weights() -> None:
    vae = small()
    history = fit(vae, X[:40], validation=X[40:], warmup=3, max_epochs=3, lr=0.1)
    assert history.best_epoch == 3
    assert validation_elbo(vae, X[40:]) == pytest.approx(history.table.validation_elbo[3])
    with pytest.raises(ValueError, match=r"^The warm-up of 4 epochs is longer than max_epochs=3"):
        fit(vae, X, warmup=4, max_epochs=3)


def test_a_schedule_is_stepped_once_an_epoch() -> None:
    steps = functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3])
    recording = recorded(small(), X, schedule=steps, batch_size=25, max_epochs=4, lr=1e-20)
    lrs = np.log10(recording.lrs).round().astype(int).tolist()
    assert lrs == [-20, -20, -21, -21, -21, -21, -22, -22]


def test_max_grad_norm_clips_the_gradient_of_the_mean_over_rows() -> None:
    program, x = linear_gaussian(rows=40)
    program.weight.data += 1.0
    free = recorded(program, x, batch_size=40, max_epochs=1).gradients[0][0] / 40
    for limit in (0.1, 1e6):
        clipped = recorded(program, x, batch_size=40, max_epochs=1, max_grad_norm=limit)
        wanted = free * min(1.0, limit / float(free.norm()))
        torch.testing.assert_close(clipped.gradients[0][0] / 40, wanted, rtol=1e-5, atol=0.0)


class Counts(nn.Module):
    """A guide without rsample over a count z, beside one with it, in two plates."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3))
        self.loc = nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("columns", 4, dim=-1), pyro.plate("data", len(x), dim=-2):
            count = pyro.sample("count", dist.Poisson(2.0))
            level = pyro.sample("level", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(level + 0.1 * count, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("columns", 4, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("count", dist.Poisson(self.rate.exp()))
            pyro.sample("level", dist.Normal(self.loc + 0.5 * x, self.rate.exp()))


class Shared(nn.Module):
    """A latent that all rows share, above one for each row; without spread, no noise."""

    def __init__(self, spread: float = 0.5) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.spread = spread

    def model(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        mean = pyro.sample("mean", self.about(self.loc))
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.about(mean + self.slope * x))

    def about(self, loc: Tensor) -> Any:
        return dist.Normal(loc, self.spread) if self.spread else dist.Delta(loc)


PROGRAMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "a VAE": lambda: (small(), X),
    "a mixture prior": lambda: (small(prior=pv.priors.Mixture(3, 2)), X),
    "by hand": lambda: linear_gaussian(factor=1.3),
    "without rsample": lambda: (Counts(), torch.randn(9, 4)),
    "a shared latent": lambda: (Shared(), torch.randn(9, dtype=torch.float64)),
}
PARTICLES = {
    "one": {},
    "three": {"num_particles": 3, "vectorize_particles": True},
    "three in turn": {"num_particles": 3, "vectorize_particles": False},
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("particles", PARTICLES)
def test_trace_elbo_is_that_of_pyro(name: str, particles: str) -> None:
    program, x = PROGRAMS[name]()
    losses, gradients = [], []
    for family in (pv.elbos.Trace_ELBO, pyro.infer.Trace_ELBO):
        program.zero_grad()
        elbo = family(**PARTICLES[particles])
        elbo.loss(program.model, program.guide, x)
        with seeded(3):
            loss = elbo.differentiable_loss(program.model, program.guide, x)
        loss.backward()
        with seeded(3):
            torch.testing.assert_close(
                torch.as_tensor(elbo.loss(program.model, program.guide, x), dtype=loss.dtype),
                loss.detach(),
            )
        losses.append(loss.detach())
        gradients.append([p.grad for p in program.parameters()])
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_fit_with_pyros_own_elbo_gives_the_same_weights(name: str) -> None:
    program, x = PROGRAMS[name]()
    other, x = PROGRAMS[name]()
    other.load_state_dict(program.state_dict())
    histories = [
        fit(each, x, elbo=elbo, batch_size=4, lr=0.01, validation=0.3)
        for each, elbo in ((program, pv.elbos.Trace_ELBO()), (other, pyro.infer.Trace_ELBO()))
    ]
    for ours, theirs in zip(program.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    tables = [history.table.drop(columns="seconds") for history in histories]
    np.testing.assert_allclose(*tables, rtol=1e-4)


def test_pyros_elbo_does_not_run_batch_norm_twice() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    one, other = small(encoder=network), small(encoder=network)
    fit(one, X)
    fit(other, X, elbo=pyro.infer.Trace_ELBO())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(one.encoder[1], name), getattr(other.encoder[1], name))


def test_the_elbo_is_a_module_with_parameters() -> None:
    vae = small()
    loss = pv.elbos.Trace_ELBO(num_particles=2)(vae.model, vae.guide)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in vae.parameters()}
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    before = weights(vae)
    loss(X).backward()
    optimizer.step()
    assert [n for n, p in vae.named_parameters() if torch.equal(p, before[n])] == []
    assert pv.elbos.Trace_ELBO().per_row(vae, X).value.shape == (50,)


# Programs


def test_a_program_by_hand_trains() -> None:
    program, x = linear_gaussian(rows=200)
    best = program.log_evidence(x).mean()
    program.weight.data = torch.rand_like(program.weight)
    history = fit(program, x, lr=0.03, max_epochs=60, batch_size=50)
    assert history.table.elbo[1] < best - 1.0
    assert history.table.elbo[60] > best - 0.1


def test_a_shared_latent_weighs_rows_by_their_number() -> None:
    x = torch.randn(40, dtype=torch.float64)
    program = Shared(spread=0.0)
    whole = recorded(program, x, batch_size=40, max_epochs=1).gradients[0]
    parts = recorded(program, x, batch_size=5, max_epochs=1).gradients
    assert len(parts) == 8
    for each, full in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.stack(each).mean(), full)
        assert torch.stack(each).std() > 0.01 * full.abs()


def test_the_elbo_of_a_shared_latent_is_spread_over_the_training_rows() -> None:
    x = torch.randn(40, dtype=torch.float64)
    program = Shared(spread=0.0)
    table = fit(program, x[:30], validation=x[30:], batch_size=7, **STILL).table
    mean, z = program.loc.detach(), (program.loc + program.slope * x).detach()
    reconstruction = dist.Normal(z, 0.5).log_prob(x)
    kl = -dist.Normal(mean, 1.0).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(mean) / 30
    for rows, prefix in ((slice(0, 30), ""), (slice(30, 40), "validation_")):
        terms = {"reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl}
        for name, term in terms.items():
            wanted = term[rows].mean().item()
            np.testing.assert_allclose(table[f"{prefix}{name}"], wanted, rtol=1e-10)
            error = (term[rows].std() / len(term[rows]) ** 0.5).item()
            np.testing.assert_allclose(table[f"{prefix}{name}_se"], error, rtol=1e-8)


def test_a_shared_latent_is_clipped_by_the_mean_over_rows() -> None:
    x = torch.randn(40, dtype=torch.float64) + 3.0
    program = Shared(spread=0.0)
    clipped = recorded(program, x, batch_size=5, max_epochs=1, max_grad_norm=0.01)
    for step in clipped.gradients:
        norm = torch.stack([g.norm() for g in step]).norm() / 40
        assert norm == pytest.approx(0.01, rel=1e-4)


class Named(nn.Module):
    """A decoder stated by `pyro.module`, a guide by `pyro.param` of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 6)
        self.encoder = nn.Linear(6, 2)
        self.log_scale = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        scale = pyro.param("log_scale", self.log_scale).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))


class Half(PyroModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 6) if name == "model" else nn.Linear(6, 2)
        setattr(self, f"scale_{name}", PyroParam(torch.ones(()), dist.constraints.positive))
        self.shift = nn.Parameter(torch.zeros(()))
        self.name = name

    def forward(self, x: Tensor) -> None:
        scale = getattr(self, f"scale_{self.name}")
        with pyro.plate("data", len(x)):
            if self.name == "guide":
                pyro.sample("z", dist.Normal(self.linear(x) + self.shift, scale).to_event(1))
                return
            z = pyro.sample("z", dist.Normal(self.shift.expand(2), scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.linear(z)).to_event(1), obs=x)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.guide = Half("model"), Half("guide")


class Whole(PyroModule):
    """A PyroModule whose programs are plain methods, called from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = Halves()
        self.spread = PyroParam(torch.ones(()), dist.constraints.positive)

    def model(self, x: Tensor) -> None:
        self.halves.model(x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), self.spread).to_event(1))


@pytest.mark.parametrize("make", [Named, Halves, Whole])
def test_programs_with_parameter_statements_train(make: type[nn.Module]) -> None:
    programs = [make(), make()]
    for program in programs:
        untrained = {"halves.guide." * (make is Whole)} - {""}
        before = weights(program)
        fit(program, X, lr=0.01, validation=0.2)
        unchanged = {n for n, v in program.state_dict().items() if torch.equal(v, before[n])}
        assert {n for n in unchanged if not any(n.startswith(u) for u in untrained)} == set()
        assert list(pyro.get_param_store().keys()) == []


class Stated(nn.Module):
    """Its guide states a parameter in one of the ways that no module can own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.scale, self.way = nn.Parameter(torch.ones(2)), way

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), self.scale.exp()).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True).expand(-1, 6), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        positive = dist.constraints.positive
        if self.way == "free":
            scale = pyro.param("scale", torch.ones(2), constraint=positive)
        elif self.way == "lazy":
            scale = pyro.param("scale", lambda: torch.ones(2))
        else:
            scale = pyro.param("scale", self.scale, constraint=positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))


@pytest.mark.parametrize("way", ["free", "lazy", "constrained"])
def test_a_parameter_that_no_module_owns_is_refused(way: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected every parameter to belong .*'scale'"):
        fit(Stated(way), X)


def test_two_pyro_params_of_one_name_are_refused() -> None:
    program = nn.Module()
    program.model, program.guide = Half("model"), Half("guide")
    program.guide.scale_model = PyroParam(torch.ones(()))
    with pytest.raises(ValueError, match=r"^Expected the PyroParams .* two called 'scale_model'"):
        fit(program, X)


# How it ends


@contextmanager
def handler(of: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, of)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupting(at: int, times: int = 1) -> Callable[[Tensor], Tensor]:
    """Presses Ctrl-C at a minibatch."""
    count = [0]

    def transform(x: Tensor) -> Tensor:
        if len(x) == 16:
            count[0] += 1
            for _ in range(times if count[0] == at else 0):
                os.kill(os.getpid(), signal.SIGINT)
        return x

    return transform


def test_ctrl_c_returns_the_best_weights() -> None:
    vae, train, held_out = small(), X[:40], X[40:]
    with handler(signal.default_int_handler):
        history = fit(
            vae, train, validation=held_out, max_epochs=50, transform=interrupting(8), lr=0.3
        )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert history.stopped == "interrupted"
    assert len(history) == 3
    elbos = history.table.validation_elbo
    assert elbos.idxmax() == history.best_epoch
    assert validation_elbo(vae, held_out) == pytest.approx(elbos.max(), rel=1e-6)


def test_ctrl_c_in_the_first_epoch_returns_an_empty_history() -> None:
    vae = small()
    before = weights(vae)
    history = fit(vae, X, transform=interrupting(2), lr=0.01)
    assert (len(history), history.stopped, history.best_epoch) == (0, "interrupted", 0)
    assert not torch.equal(
        weights(vae)["decoder.layers.1.weight"], before["decoder.layers.1.weight"]
    )


def test_a_second_ctrl_c_interrupts() -> None:
    vae = small()
    with handler(signal.default_int_handler):
        before = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            fit(vae, X, transform=interrupting(2, times=2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store().keys()) == []


def test_max_seconds_stops_after_the_epoch_it_runs_out_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock on which each epoch takes a second; a resume goes on counting."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    vae, whole = small(), small()
    options: dict[str, Any] = {"max_epochs": 7, "checkpoint": tmp_path / "checkpoint"}
    history = fit(vae, X, max_seconds=1.5, **options)
    assert (len(history), history.stopped, history.best_epoch) == (2, "max_seconds", 2)
    again = fit(vae, X, max_seconds=2.0, resume=True, **options)
    assert (len(again), again.stopped) == (2, "max_seconds")
    longer = fit(vae, X, max_seconds=5, resume=True, **options)
    assert (len(longer), longer.stopped) == (5, "max_seconds")
    last = fit(vae, X, resume=True, **options)
    assert (len(last), last.stopped) == (7, "max_epochs")
    fit(whole, X, max_epochs=7)
    assert_same(weights(vae), weights(whole))


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, True, "1"])
def test_max_seconds_is_a_positive_number(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_seconds"):
        fit(small(), X, max_seconds=limit)


def test_an_ignored_signal_stays_ignored() -> None:
    with handler(signal.SIG_IGN):
        assert fit(small(), X, transform=interrupting(2)).stopped == "max_epochs"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_it_runs_outside_the_main_thread() -> None:
    ended: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: ended.append(fit(small(), X).stopped))
    thread.start()
    thread.join()
    assert ended == ["max_epochs"]
    assert signal.getsignal(signal.SIGINT) is before


HALVED = pytest.warns(UserWarning, match="The learning rate was halved, and the fit goes on")


class Spoiling:
    """Turns one minibatch to NaN, and remembers weights and optimiser as they were before."""

    def __init__(self, program: nn.Module, at: int) -> None:
        self.program, self.at, self.count = program, at, 0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.before: dict[str, Tensor] = {}
        self.state: dict[Any, Tensor] = {}

    def making(self, make: Any) -> Any:
        def making(parameters: Any) -> torch.optim.Optimizer:
            self.optimizers.append(make(parameters))
            return self.optimizers[-1]

        return making

    def optimizer_state(self) -> dict[str, Tensor]:
        entries = self.optimizers[-1].state_dict()["state"]
        return {
            f"{i}.{name}": value.clone()
            for i, entry in entries.items()
            for name, value in entry.items()
            if isinstance(value, Tensor)
        }

    def __call__(self, x: Tensor) -> Tensor:
        self.count += len(x) == 16
        if len(x) == 16 and self.count >= self.at:
            if self.count == self.at:
                self.before, self.state = weights(self.program), self.optimizer_state()
            return x * torch.nan
        return x


OPTIMIZERS: dict[str, Any] = {
    "Adam, fused": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "Adam": functools.partial(torch.optim.Adam, lr=0.01, foreach=False),
    "AdamW, fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True, weight_decay=0.1),
    "SGD, fused": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=False),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, fused=True),
    "NAdam": functools.partial(torch.optim.NAdam, lr=0.01),
    "ClippedAdam": functools.partial(
        pyro.optim.ClippedAdam({}).pt_optim_constructor, lr=0.01, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_batch_changes_nothing(name: str) -> None:
    vae = small(encoder=nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    spoiling = Spoiling(vae, at=5)
    make = spoiling.making(OPTIMIZERS[name])
    with (
        pytest.warns(UserWarning, match=r"epoch 2, batch 2 of 4 \(rows .* rate was halved"),
        pytest.raises(FloatingPointError, match="NaN or infinite in epoch 2, batch 1") as caught,
    ):
        fit(vae, as_frame(X.numpy()), transform=spoiling, optimizer=make, lr=None)
    assert "row 1" in str(caught.value)
    assert len(caught.value.history) == 1
    assert caught.value.history.stopped == "not finite"
    assert_same(weights(vae), spoiling.before)
    assert_same(spoiling.optimizer_state(), spoiling.state)
    assert spoiling.state or name == "SGD"


def test_a_bad_first_batch_changes_nothing() -> None:
    vae = small()
    before = weights(vae)
    with HALVED, pytest.raises(FloatingPointError, match="epoch 1, batch 1 of 4") as caught:
        fit(vae, X, transform=Spoiling_first)
    assert_same(weights(vae), before)
    assert len(caught.value.history) == 0


def Spoiling_first(x: Tensor) -> Tensor:  # noqa: N802
    return x * torch.nan if len(x) == 16 else x


class Root(nn.Module):
    """Its loss is finite where its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x + self.level.sqrt(), 1.0))


def test_a_gradient_that_is_not_finite_is_found() -> None:
    program = Root()
    with HALVED, pytest.raises(FloatingPointError, match="epoch 1, batch 1 of 4"):
        fit(program, torch.randn(50), max_grad_norm=1.0)
    assert program.level == 0


def test_a_cell_that_has_no_density_is_named_by_row_and_column() -> None:
    frame = pd.DataFrame(
        np.random.default_rng(0).normal(size=(40, 2)),
        index=[f"p{i}" for i in range(40)],
        columns=["age", "dose"],
    )
    cell = "in row p17, column 'dose', at the value nan"

    def spoil(rows: Tensor) -> Tensor:
        is_cell = (rows - frame.loc["p17", "dose"]).abs() < 1e-6
        return rows.where(~is_cell, torch.nan) if len(rows) == 16 else rows

    vae = pv.VAE(2, 1, pv.likelihoods.Normal(), encoder=Blind(), seed=0).initialize(frame)
    with (
        pyro.validation_enabled(),
        HALVED,
        pytest.raises(FloatingPointError, match=f"log-density of 'x' is nan {cell}") as caught,
    ):
        fit(vae, frame, transform=spoil, validation=None)
    assert "standardise" not in str(caught.value)


class Blind(nn.Module):
    """An encoder that sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.features.expand(len(x), 3)


def test_nan_in_a_programs_own_data_is_found() -> None:
    x = torch.randn(50)
    x[33] = torch.nan
    program = Root()
    program.level.data += 1.0
    row = r"The log-density of 'z' is nan in row 33, at the value nan\."
    with HALVED, pytest.raises(FloatingPointError, match=f"epoch 1, batch .*{row}"):
        fit(program, x)


class Level(nn.Module):
    """Rows about one level."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.level, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def test_a_fit_goes_on_at_half_the_learning_rate_after_one_bad_step() -> None:
    program, x = Level(), torch.randn(48) + 3.0
    calls: list[int] = []

    def spoil(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows * torch.nan if len(calls) == 9 else rows

    with pytest.warns(UserWarning, match="The learning rate was halved, and the fit goes on"):
        history = fit(program, x, transform=spoil, max_epochs=40, lr=0.1)
    assert (history.stopped, len(history)) == ("max_epochs", 40)
    assert history.table.elbo.notna().all()
    assert program.level.item() == pytest.approx(float(x.mean()), abs=0.5)


FORMS: dict[str, dict[str, Any]] = {
    "a class": {"optimizer": torch.optim.Adam, "lr": 0.02},
    "a partial": {"optimizer": functools.partial(torch.optim.Adam, lr=0.02)},
    "a partial, lr beside": {
        "optimizer": functools.partial(torch.optim.Adam, eps=1e-8),
        "lr": 0.02,
    },
    "Pyro's": {"optimizer": pyro.optim.Adam({"lr": 0.02})},
    "a function": {"optimizer": lambda p: torch.optim.Adam(p, 0.02, fused=True), "lr": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_optimizer_does_not_matter(form: str) -> None:
    one, other = small(), small()
    fit(one, X, **FORMS["a class"])
    fit(other, X, **FORMS[form])
    assert_same(weights(one), weights(other))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name: str) -> None:
    vae = small()
    history = fit(vae, X, optimizer=OPTIMIZERS[name], max_epochs=15)
    assert history.table.elbo[15] > history.table.elbo[1]


def test_frozen_parameters_stay() -> None:
    vae = small()
    vae.encoder.requires_grad_(False)
    before = weights(vae)
    fit(vae, X)
    after = weights(vae)
    assert torch.equal(after["encoder.layers.1.weight"], before["encoder.layers.1.weight"])
    assert not torch.equal(after["decoder.layers.1.weight"], before["decoder.layers.1.weight"])


class Tempered(Shared):
    def model(self, x: Tensor) -> Any:
        with pyro.poutine.scale(scale=0.999):
            return super().model(x)


def test_a_scale_beside_shared_latents_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^The program scales its rows .* \(mean\), beside which fit"
    ):
        fit(Tempered(), torch.randn(20))


def test_the_users_elbo_is_left_alone() -> None:
    elbo = pv.elbos.Trace_ELBO(num_particles=3)
    before = dict(vars(elbo))
    fit(small(), X, elbo=elbo)
    assert vars(elbo) == before
    cells = {"cells": torch.randn(20, 3).double(), "flag": torch.ones(20).double()}
    fit(Grid(), cells, elbo=elbo)


def test_a_row_alone_joins_the_batch_before_it() -> None:
    lone = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    program = small(encoder=lone)
    assert len(recorded(program, X[:33], batch_size=16, max_epochs=1).gradients) == 2


class Averaging(nn.Module):
    """Assigns a buffer anew, where batch normalisation changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("view", torch.zeros(1).expand(6))
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.linear(x)


def test_a_bad_step_takes_back_a_buffer_assigned_anew() -> None:
    vae = small(encoder=Averaging())
    svi = pv.svi.SVI(vae.model, vae.guide, torch.optim.Adam, pv.elbos.Trace_ELBO())
    svi.update(X)
    before = weights(vae)
    with pyro.validation_enabled(False):
        svi.update(X / 0.0)
    assert svi.is_bad == 1.0
    assert_same(weights(vae), before)


# Context, weights, and rows to validate on


class Covariates(nn.Module):
    """A decoder of z and a covariate; `expanded` says whether it allows for several draws."""

    def __init__(self, *, expanded: bool = True) -> None:
        super().__init__()
        self.decoder = nn.Linear(2 + 3, 6)
        self.encoder = nn.Linear(6 + 3, 2)
        self.expanded = expanded
        self.seen: set[tuple[str, ...]] = set()

    def model(self, x: dict[str, Tensor]) -> None:
        self.seen.add(tuple(x))
        context = x["context"]
        with pyro.plate("data", len(context)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if self.expanded:
                context = context.expand(*z.shape[:-1], -1)
            logits = self.decoder(torch.cat([z, context], -1))
            weights = x.get("weight", 1.0)
            with pyro.poutine.scale(scale=weights):
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x["x"])

    def guide(self, x: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["x"])):
            loc = self.encoder(torch.cat([x["x"], x["context"]], -1))
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


CONTEXT = torch.randn(50, 3, generator=torch.Generator().manual_seed(4))
LINE = r"for example x\['context'\]\.expand\(\*z\.shape\[:-1\], -1\)\."


@pytest.mark.parametrize("weights_of_rows", [None, torch.linspace(0.5, 2.0, 50)])
def test_context_and_weights_stand_beside_x(weights_of_rows: Tensor | None) -> None:
    one, other = Covariates(), Covariates()
    other.load_state_dict(one.state_dict())
    row = {"x": X, "context": CONTEXT}
    row |= {} if weights_of_rows is None else {"weight": weights_of_rows}
    held_out = {name: value[:9] for name, value in row.items()}
    fit(one, row, validation=held_out)
    fit(
        other,
        X.numpy(),
        context=pd.DataFrame(CONTEXT.numpy()),
        weights=weights_of_rows,
        validation=held_out,
    )
    assert_same(weights(one), weights(other))
    assert one.seen == other.seen == {tuple(row)}


def test_context_is_given_once_and_for_all_rows() -> None:
    with pytest.raises(ValueError, match="x already has a field 'context'"):
        fit(Covariates(), {"x": X, "context": CONTEXT}, context=CONTEXT)
    with pytest.raises(ValueError, match="equally many rows"):
        fit(Covariates(), X, context=CONTEXT[:9])
    with pytest.raises(ValueError, match="Expected validation rows like those of x"):
        fit(Covariates(), X, context=CONTEXT, validation=X[:9])


def test_a_number_of_rows_is_held_out_as_a_share_is() -> None:
    one, other, single = small(), small(), small()
    fit(one, X, validation=0.2)
    fit(other, X, validation=10)
    assert_same(weights(one), weights(other))
    assert fit(single, X, validation=np.int64(1)).table.validation_elbo_se.isna().all()


# Programs that fail with several draws of each row


def several_draws(**options: Any) -> None:
    fit(Covariates(expanded=False), X, context=CONTEXT, **options)


@pytest.mark.parametrize(
    "elbo",
    [
        pv.elbos.Trace_ELBO(2),
        pv.elbos.IWAE(3),
        pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True),
    ],
)
def test_a_covariate_without_draws_is_refused_before_the_first_step(elbo: Any) -> None:
    seen: list[Any] = []
    with pytest.raises(ValueError, match=f"^The program fails with several draws .*{LINE}"):
        several_draws(elbo=elbo, callbacks=[seen.append])
    assert seen == []
    fit(Covariates(), X, context=CONTEXT, elbo=elbo)


@pytest.mark.parametrize(
    "elbo",
    [
        None,
        pyro.infer.Trace_ELBO(),
        pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=False),
    ],
)
def test_a_fit_of_one_draw_warns_of_it(elbo: Any) -> None:
    with pytest.warns(UserWarning, match=f"{LINE} This fit .* log_evidence and to_arviz") as said:
        several_draws(elbo=elbo)
    assert said[0].filename == __file__


def test_a_fit_that_warns_is_the_same_fit() -> None:
    one, other = Covariates(), Covariates(expanded=False)
    other.load_state_dict(one.state_dict())
    fit(one, X, context=CONTEXT)
    with pytest.warns(UserWarning, match="several draws"):
        fit(other, X, context=CONTEXT)
    assert_same(weights(one), weights(other))


def test_evidence_explains_it_too() -> None:
    row = {"x": X, "context": CONTEXT}
    with pytest.raises(ValueError, match=f"^The program fails with several draws .*{LINE}"):
        pv.log_evidence(Covariates(expanded=False), row, 10)
    assert pv.log_evidence(Covariates(), row, 10, seed=0).sizes == {"datum": 50}


# Callbacks


class Noting(pv.Callback):
    """Notes what it is called with, draws, and stops at an epoch."""

    def __init__(self, stop: int = 0, path: Path | None = None) -> None:
        self.calls: list[Any] = []
        self.stop, self.path = stop, path

    def on_start(self, program: nn.Module, settings: Any) -> None:
        torch.randn(3)
        self.calls.append(("start", program, settings))

    def on_epoch(self, record: dict[str, float]) -> bool:
        torch.randn(3)
        if self.path is not None:
            assert len(read_tensors(self.path)[1]["records"]) == record["epoch"]
        self.calls.append(("epoch", dict(record)))
        record.clear()
        return record == {} and self.calls[-1][1]["epoch"] == self.stop

    def on_end(self, history: pv.History) -> None:
        torch.randn(3)
        self.calls.append(("end", history))


def test_callbacks_see_the_start_each_epoch_and_the_end() -> None:
    noting, records = Noting(), []
    one, other = small(), small()
    history = fit(one, X, validation=0.2, warmup=1, callbacks=[noting, records.append])
    assert [call[0] for call in noting.calls] == ["start", "epoch", "epoch", "end"]
    _, program, settings = noting.calls[0]
    assert program is one
    assert (settings.batch_size, settings.max_epochs, settings.lr) == (16, 2, 1e-3)
    with pytest.raises(AttributeError):
        settings.lr = 1.0
    table = history.table.reset_index().to_dict("records")
    np.testing.assert_equal([call[1] for call in noting.calls[1:-1]], table)
    np.testing.assert_equal(records, table)
    assert noting.calls[-1][1] is history
    fit(other, X, validation=0.2, warmup=1)
    assert_same(weights(one), weights(other))


def test_a_callback_that_only_overrides_one_method() -> None:
    class Ending(pv.Callback):
        def on_end(self, history: pv.History) -> None:
            ended.append(history.stopped)

    ended: list[str] = []
    fit(small(), X, callbacks=[Ending()])
    assert ended == ["max_epochs"]


@pytest.mark.parametrize("answer", [True, np.True_])
def test_true_stops_the_fit_after_all_callbacks_were_called(answer: Any) -> None:
    seen: list[float] = []
    callbacks = [lambda record: answer, lambda record: seen.append(record["epoch"])]
    history = fit(small(), X, max_epochs=9, callbacks=callbacks)
    assert (history.stopped, len(history), history.best_epoch, seen) == ("callback", 1, 1, [1])


@pytest.mark.parametrize("answer", [None, 1, "go on", np.float64(2.0), np.False_])
def test_another_answer_does_not_stop_it(answer: Any) -> None:
    assert fit(small(), X, callbacks=[lambda record: answer]).stopped == "max_epochs"


def test_a_fit_stopped_by_a_callback_keeps_the_best_weights() -> None:
    vae = small()
    history = fit(
        vae,
        X[:40],
        validation=X[40:],
        lr=0.5,
        max_epochs=20,
        callbacks=[Noting(12)],
    )
    elbos = history.table.validation_elbo
    assert (history.stopped, len(history)) == ("callback", 12)
    assert history.best_epoch == elbos.idxmax() <= 12
    assert validation_elbo(vae, X[40:]) == pytest.approx(elbos.max(), rel=1e-6)


def test_a_resumed_fit_starts_its_callbacks_again(tmp_path: Path) -> None:
    whole, vae = small(), small()
    path = tmp_path / "run"
    options: dict[str, Any] = {"max_epochs": 5, "checkpoint": path}
    first, second = Noting(stop=2, path=path), Noting(path=path)
    assert fit(vae, X, callbacks=[first], **options).stopped == "callback"
    fit(vae, X, callbacks=[second], resume=True, **options)
    assert [call[0] for call in second.calls] == ["start", *["epoch"] * 3, "end"]
    assert [call[1]["epoch"] for call in second.calls[1:-1]] == [3, 4, 5]
    fit(whole, X, max_epochs=5)
    assert_same(weights(vae), weights(whole))


@pytest.mark.parametrize("method", ["on_start", "on_epoch", "on_end"])
def test_an_error_in_a_callback_leaves_the_world_as_it_was(method: str) -> None:
    def fail(self: Any, *args: Any) -> None:
        vae.eval()
        torch.manual_seed(7)
        raise BrokenError

    failing = type("Failing", (pv.Callback,), {method: fail})()
    vae = small()
    vae.decoder.eval()
    before = world(vae)
    with pytest.raises(BrokenError):
        fit(vae, X, callbacks=[failing])
    assert world(vae) == before


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        ([3], "an instance of a subclass of pyro_vae.Callback, or a function .*; got 3"),
        ([Noting], "an instance of a subclass of pyro_vae.Callback.* got <class"),
        (print, "callbacks to be a list; got <built-in function print>"),
        (Noting(), "callbacks to be a list; got <"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(small(), X, callbacks=callbacks)


def test_history_in_one_line() -> None:
    assert repr(fit(small(), X)).startswith("History(2 epochs, stopped='max_epochs', converged=")
