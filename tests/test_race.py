"""race: the same start for all, paired differences, standard errors, and how it ends."""

import copy
import datetime
import importlib
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import linear_gaussian
from small_vae import GREY, X, small
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics.race import crossed_error
from pyro_vae.elbos import IWAE, Trace_ELBO, TraceMeanField_ELBO
from pyro_vae.engine.running import seeded
from pyro_vae.evidence.log_evidence import standard_error

TRAIN, TEST = X[:40], X[40:]
QUICK: dict[str, Any] = {
    "held_out": TEST,
    "num_samples": 20,
    "batch_size": 16,
    "lr": 0.01,
    "device": "cpu",
}
ELBOS = {"one": Trace_ELBO(), "analytic": TraceMeanField_ELBO(), "three": IWAE(3)}


def race(
    build: Any = small, x: Any = TRAIN, elbos: Any = None, **options: Any
) -> pv.diagnostics.Race:
    asked = {"seeds": [3, 5], "budget": 2, "seed": 0} | QUICK | options
    return pv.race(build, x, ELBOS if elbos is None else elbos, **asked)


# Results


def by_hand(name: str, seed: int) -> np.ndarray:
    vae = small(seed)
    options: dict[str, Any] = {"max_epochs": 2, "seed": seed, "progress": False}
    options |= {name: QUICK[name] for name in ("batch_size", "lr", "device")}
    pv.fit(vae, TRAIN, elbo=ELBOS[name], **options)
    return pv.log_evidence(vae, TEST, 20, seed=0)["log_evidence"].to_numpy()


def test_it_calls_fit_and_log_evidence_in_turns() -> None:
    found = race()
    values = {name: np.array([by_hand(name, s) for s in (3, 5)]) for name in ELBOS}
    order = [("one", 3), ("analytic", 3), ("three", 3), ("one", 5), ("analytic", 5), ("three", 5)]
    assert found.runs.index.to_list() == order
    for name, value in values.items():
        line = found.table.loc[name]
        assert line.log_evidence == value.mean()
        assert line.se == crossed_error(value)
        assert line.difference == (value - values["one"]).mean()
        assert line.difference_se == crossed_error(value - values["one"])
        for seed, each in zip((3, 5), value):
            assert found.runs.loc[(name, seed)].log_evidence == each.mean()
            assert found.runs.loc[(name, seed)].se == pytest.approx(standard_error(each))
    assert found.table.log_evidence.is_monotonic_decreasing
    seconds = found.runs.groupby("estimator").seconds.mean()
    assert found.table.seconds.to_dict() == pytest.approx(seconds.to_dict())
    assert (found.table.epochs == 2).all()
    assert set(found.runs.stopped) == {"max_epochs"}
    assert found.stopped == "finished"


def test_one_estimator_twice_ties_in_the_order_given() -> None:
    found = race(elbos={name: Trace_ELBO() for name in "cab"})
    assert found.table.index.to_list() == ["c", "a", "b"]
    assert (found.table[["difference", "difference_se"]] == 0).all(axis=None)


def test_a_build_that_takes_its_weights_from_torchs_generator_starts_alike() -> None:
    def build(seed: int) -> pv.VAE:
        vae = small(0)
        for parameter in vae.parameters():
            nn.init.normal_(parameter, std=0.1)
        return vae

    found = race(build, elbos={name: Trace_ELBO() for name in "ab"})
    assert (found.table.difference == 0).all()
    assert found.runs.log_evidence.nunique() == 2


def test_attributes_and_remark() -> None:
    found = race(seeds=[4], seed=7)
    attrs = found.table.attrs
    assert (attrs["num_samples"], attrs["num_rows"], attrs["seeds"]) == (20, len(TEST), [4])
    assert (attrs["seed"], attrs["budget"]) == (7, "2 epochs")
    assert "lower bound" in attrs["remark"]
    assert "'one'" in attrs["remark"]
    assert "rows alone" in attrs["remark"]
    assert "training seeds and rows" in race().table.attrs["remark"]
    assert all(name in repr(found) for name in (*ELBOS, "difference_se", attrs["remark"]))


def test_a_summary_and_a_plot() -> None:
    found = race()
    table, text = found.table, found.summary()
    best = table.iloc[0]
    assert text.startswith(f"{best.name!r} has the largest mean log p(x): {best.log_evidence:.3f}")
    assert "over 10 held-out rows and 2 training seeds, with a budget of 2 epochs." in text
    assert text.endswith(f"{table.attrs['remark']}.")
    for name in ("analytic", "three"):
        line = table.loc[name]
        side = "below" if line.difference < 0 else "above"
        error = f"(s.e. {line.difference_se:.3f}) nats per row {side} 'one'"
        assert f"{name!r} is {abs(line.difference):.3f} {error}" in text
    figure = found.plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == table.index.to_list()
    assert axes.get_xlabel() == "difference from one ± 2 s.e., nats per row"
    assert found.plot(ax=axes) is figure


def test_the_rows_of_unknown_error_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.evidence.scorer.CERTAIN_K", np.inf)  # no row is refined
    few = race(seeds=[3])
    assert (few.table["pareto_k_over"] == 0).all()
    assert (few.runs["pareto_k_missing"] == 1).all()
    assert "Pareto k is not known, and so neither is the error, in 100% of the rows of" in (
        few.summary()
    )
    program, x = linear_gaussian(rows=30, factor=0.4)
    options: dict[str, Any] = {"seeds": [3], "num_samples": 200, "budget": 1, "held_out": x[:20]}
    many = race(lambda seed: copy.deepcopy(program), x, {"one": Trace_ELBO()}, **options)
    over = many.table.loc["one", "pareto_k_over"]
    assert 0 < over < 1
    expected = f"The error is unknown (Pareto k over 0.57) in {over:.0%} of the rows of 'one'."
    assert expected in many.summary()


def test_a_seed_is_drawn_and_recorded() -> None:
    one, two = (race(seeds=[3], seed=None) for _ in range(2))
    assert one.table.attrs["seed"] != two.table.attrs["seed"]
    again = race(seeds=[3], seed=one.table.attrs["seed"])
    assert again.table.log_evidence.equals(one.table.log_evidence)


def test_the_held_out_rows_are_the_same_for_all() -> None:
    seen: list[Tensor] = []

    def look(rows: Tensor) -> Tensor:
        seen.append(rows)
        return torch.bernoulli(rows)

    marked = GREY.clone()
    marked[:, 0] = torch.linspace(0, 1, 50)
    found = race(x=marked, held_out=0.2, transform=look, seeds=[0])
    held_out = {float(v) for v in seen[0][:, 0]}
    trained = {float(v) for rows in seen[1:] for v in rows[:, 0]}
    assert (len(held_out), len(trained)) == (10, 40)
    assert not held_out & trained
    assert found.table.attrs["num_rows"] == 10
    other = race(x=marked, held_out=0.2, transform=torch.bernoulli, seeds=[0], seed=1)
    assert not np.array_equal(other.table.log_evidence, found.table.log_evidence)


def test_the_rows_held_out_are_transformed_once() -> None:
    grey = GREY[40:]
    with seeded(0):
        x = torch.bernoulli(grey)
    one, other = (
        race(x=GREY[:40], held_out=rows, transform=torch.bernoulli, seeds=[0]).table
        for rows in (grey, x)
    )
    assert one.log_evidence.to_dict() == other.log_evidence.to_dict()


def test_after_each_sees_the_race_so_far() -> None:
    seen: list[pv.diagnostics.Race] = []
    found = race(after_each=seen.append)
    assert [len(each.runs) for each in seen] == [1, 2, 3, 4, 5, 6]
    assert {each.stopped for each in seen} == {"running"}
    assert seen[0].table.log_evidence.notna().to_list() == [True, False, False]
    assert (
        "for 'analytic', 'three', which have one seed"
        in seen[3].table.attrs["remark"].replace("'one', ", "")
        or len(seen[3].runs) == 4
    )
    assert seen[-1].table.equals(found.table)


# Standard errors


@pytest.mark.parametrize("spreads", [(1.0, 2.0, 0.5), (2.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_the_standard_error_of_crossed_effects(spreads: tuple[float, float, float]) -> None:
    """Its square is unbiased for the variance of the mean; 4000 repeats, within 4.5 errors."""
    squares, exact = squared_errors(*spreads)
    error = squares.std(ddof=1) / math.sqrt(len(squares))
    assert abs(squares.mean() - exact) < 4.5 * error


def test_the_standard_error_is_too_large_if_seeds_do_not_differ() -> None:
    """The part of the seeds cannot be negative: the square is too large, here by a fifth."""
    squares, exact = squared_errors(0.0, 1.0, 2.0)
    assert exact < squares.mean() < 1.5 * exact


def squared_errors(of_seeds: float, of_rows: float, of_rest: float) -> tuple[np.ndarray, float]:
    """The squared errors of means over 3 seeds and 20 rows, and the variance of these means."""
    normal = np.random.default_rng(0).standard_normal
    seeds, rows = 3, 20
    errors = [
        crossed_error(
            of_seeds * normal((seeds, 1))
            + of_rows * normal(rows)
            + of_rest * normal((seeds, rows))
        )
        for _ in range(4000)
    ]
    exact = of_seeds**2 / seeds + of_rows**2 / rows + of_rest**2 / (seeds * rows)
    return np.square(errors), exact


def test_the_standard_error_of_one_seed_is_that_over_rows() -> None:
    values = np.random.default_rng(1).standard_normal((1, 30))
    assert crossed_error(values) == pytest.approx(standard_error(values[0]), rel=1e-12)
    same = np.repeat(values, 3, axis=0)
    assert crossed_error(same) == pytest.approx(standard_error(values[0]), rel=1e-12)
    assert math.isnan(crossed_error(values[:, :1]))


# The end of a race


def test_equal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(importlib.import_module("pyro_vae.training.loop"), "time", clock)
    found = race(budget=datetime.timedelta(seconds=3), seeds=[0])
    assert (found.table.epochs == 3).all()
    assert (found.table.seconds == 3).all()
    assert set(found.runs.stopped) == {"max_seconds"}
    assert found.table.attrs["budget"] == "0:00:03"


@contextmanager
def ctrl_c_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def pressing_in_training(at: int) -> Callable[[Tensor], Tensor]:
    count = itertools.count(1)

    def transform(x: Tensor) -> Tensor:
        if len(x) == 16 and next(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return x

    return transform


@pytest.mark.parametrize(("at", "finished"), [(1, 0), (6, 1), (17, 4)])
def test_ctrl_c_returns_the_finished_trainings(at: int, finished: int) -> None:
    """A training takes two epochs of two minibatches of 16."""
    with ctrl_c_interrupts():
        found = race(transform=pressing_in_training(at))
    assert found.stopped == "interrupted"
    assert len(found.runs) == finished
    assert found.runs.index.to_list() == race().runs.index.to_list()[:finished]
    assert found.table.log_evidence.notna().sum() == min(finished, 3)
    assert isinstance(repr(found), str)
    if finished == 4:
        whole = race().runs
        assert found.runs.log_evidence.equals(whole.log_evidence[:4])
        assert found.table.loc["one"].difference == 0
        assert "'analytic'" in found.table.attrs["remark"]


def test_ctrl_c_while_evaluating() -> None:
    def press(found: pv.diagnostics.Race) -> None:
        if len(found.runs) == 2:
            raise KeyboardInterrupt

    found = race(after_each=press)
    assert (found.stopped, len(found.runs)) == ("interrupted", 2)
    assert found.summary().startswith("The race is interrupted, after 2 of 6 trainings.")


class Bad(Trace_ELBO):
    def estimate(self, *args: Any, **kwargs: Any) -> Any:
        estimate = super().estimate(*args, **kwargs)
        return estimate._replace(loss=estimate.loss * math.nan)


def test_a_loss_that_is_not_finite_does_not_stop_the_others() -> None:
    with (
        pytest.warns(UserWarning, match="rate was halved"),
        pytest.warns(UserWarning, match="'bad' at seed 3, 'bad' at seed 5"),
    ):
        found = race(elbos={"one": ELBOS["one"], "bad": Bad(), "three": ELBOS["three"]})
    assert found.table.index[-1] == "bad"
    assert found.table.loc["bad"][["log_evidence", "difference_se", "elbo"]].isna().all()
    assert found.runs.loc[("bad", 3)].stopped == "not finite"
    assert found.table.loc["three"].log_evidence == race().table.loc["three"].log_evidence
    assert "'bad' has no result." in found.summary()


# Bad input


class Discrete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((), 0.5)))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logit))


ONCE = small()
SEEDS = itertools.count()
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no estimators": ({"elbos": {}}, "dict of estimators"),
    "a list of estimators": ({"elbos": [Trace_ELBO()]}, "dict of estimators"),
    "no estimator": ({"elbos": {"a": Trace_ELBO(), "b": 3}}, r"differentiable.*'b'"),
    "no epochs": ({"budget": 0}, "budget"),
    "half an epoch": ({"budget": 0.5}, "timedelta"),
    "no time": ({"budget": datetime.timedelta()}, "positive time"),
    "time run backwards": ({"budget": datetime.timedelta(seconds=-1)}, "positive time"),
    "a seed twice": ({"seeds": [1, 1]}, "once"),
    "no seeds": ({"seeds": []}, "one seed or more"),
    "a number of seeds": ({"seeds": 3}, "list of integers"),
    "a negative seed": ({"seeds": [-1]}, "each seed"),
    "no build": ({"build": ONCE}, "function of a seed"),
    "one program for all": ({"build": lambda seed: ONCE}, "the same program twice"),
    "other weights": (
        {"build": lambda seed: small(next(SEEDS))},
        "other weights for the same seed",
    ),
    "nothing of a program": ({"build": lambda seed: nn.Linear(2, 2)}, "program"),
    "all held out": ({"held_out": 1.0}, "share"),
    "rows of another width": ({"held_out": X[:, :3]}, "6"),
    "rows that are no bits": ({"held_out": 3 * X}, "Bernoulli|0 or 1|0, 1"),
    "too few draws": ({"num_samples": 3}, "num_samples"),
    "no transform": ({"transform": 3}, "transform"),
    "a discrete latent": (
        {"build": lambda seed: Discrete(), "elbos": {"a": Trace_ELBO(), "b": IWAE(3)}},
        r"rsample.*\(estimator 'b'\)",
    ),
    "no learning rate": ({"lr": -1.0}, "lr"),
    "no batch": ({"batch_size": 0}, "batch_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(pv.svi.SVI, "update", train)
    wrong, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        race(**wrong)


def test_there_is_a_bar_on_a_terminal_only(capfd: pytest.CaptureFixture[str]) -> None:
    race(seeds=[0], progress=True)
    assert capfd.readouterr().err == ""
    assert not sys.stderr.isatty()
