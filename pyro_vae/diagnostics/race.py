"""The same program trained under several estimators, compared by log p(x) of rows held out."""

import copy
import datetime
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyro.infer
import torch
import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from ..data.checks import checked_count
from ..data.read import check_rows, read, transformed
from ..data.rows import Rows
from ..data.split import split
from ..elbos import Objective
from ..elbos.log_densities import programs_of, structure
from ..engine.running import seeded
from ..evidence.log_evidence import log_evidence
from ..evidence.pareto_k import good_k
from ..training.fit import Transform, fit
from ..training.history import History, NonFiniteError

__all__ = ["Race", "race"]

Build: TypeAlias = Callable[[int], nn.Module]
Budget: TypeAlias = int | datetime.timedelta

UNLIMITED = 2**31
REMARK = "log_evidence is a lower bound of log p(x) in expectation; differences are from {first!r}"
OVER_ROWS = "the standard errors are over rows alone: one training seed tells nothing of others"
OVER_BOTH = "the standard errors are over training seeds and rows"


@dataclass(frozen=True, eq=False, repr=False)
class Race:
    """What a race came to.

    Arguments:
        table: A row an estimator, the best first; equal ones, and those without a result, in the
            order given. In nats per row: `log_evidence`, the mean over seeds and rows, and its
            standard error `se`; `difference` from the first estimator given, in pairs of seeds
            and rows, and its `difference_se`; `elbo`, the bound at one draw, of the rows held out
            like log p(x). Then, means over seeds, the `seconds` of training, the `epochs` done and
            `pareto_k_over`, the share of rows whose Pareto k is over its limit `good_k`. Its
            `attrs` hold `num_samples`, `num_rows`, `seeds`, `budget`, `seed`, `good_k` and a
            `remark`.
        runs: The same for each training by itself, indexed by `estimator` and `seed`, in the
            order run: `log_evidence`, its `se` over rows, `elbo`, `seconds`, `epochs`,
            `pareto_k_over` and `stopped`, why it ended: as :class:`pyro_vae.History` says, or
            `"not finite"`.
        stopped: `"finished"`; `"interrupted"` if Ctrl-C came before the last training was
            evaluated (the means are then over the seeds that each estimator has); `"running"`
            between two trainings.
    """

    table: pd.DataFrame
    runs: pd.DataFrame
    stopped: str

    def __repr__(self) -> str:
        return f"{self.table.to_string()}\n{self.table.attrs['remark']}."


def race(
    build: Build,
    x: Any,
    elbos: Mapping[str, pyro.infer.ELBO],
    seeds: Iterable[int],
    budget: Budget,
    *,
    context: Any = None,
    weights: Any = None,
    held_out: float | Any = 0.1,
    num_samples: int = 1000,
    transform: Transform | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = False,
    after_each: Callable[[Race], Any] | None = None,
) -> Race:
    r"""Trains the same program under each estimator, and compares log p(x) of rows held out.

    Each seed gives each estimator the same weights to start from and the same order of
    minibatches; estimators take turns within a seed. Log p(x) is estimated by :func:`log_evidence`
    from the guide that the estimator trained, the same draws for all: a lower bound in
    expectation, lower for a worse guide, so a part of a difference may be one of guides.

    With values :math:`v_{sn}` of S seeds and N rows the standard error of their mean counts both,

    .. math::
        \mathrm{se}^2 = \frac{1}{N} \mathrm{Var}_n\, \bar v_{\cdot n} + \max\Big(0,
            \frac{1}{S} \mathrm{Var}_s\, \bar v_{s \cdot} - \frac{1}{S N} \hat\sigma^2\Big),

    :math:`\hat\sigma^2` being the mean square of what seeds and rows do not explain, which both
    variances have in them and which is counted once; that of a difference is the same of the
    differences :math:`d_{sn}` from the first estimator. If the maximum is 0, the error is too
    large rather than too small. It rests on few seeds, so it is itself
    rough: of three, by some 50%. With one seed it is over rows alone, and `remark` says so.

    Ctrl-C ends the race, and what had been trained and evaluated till then is returned. A training
    whose loss is no longer finite has no result (NaN), and a warning names it; the others go on.

    Arguments:
        build: A function of a seed that makes the program, anew at each call and with the same
            weights for the same seed. It is called with torch's generators started from the seed.
        x: The rows to train on.
        elbos: By name the estimators; differences are from the first.
        seeds: The seeds of the weights and of the trainings.
        budget: The number of epochs, the same steps for all; or a `datetime.timedelta`, the same
            time of training for all, which ends with the epoch in which it runs out.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        held_out: The share of x to hold out, or the number of rows, or the rows themselves.
        num_samples: The number of draws a row that log p(x) is estimated by.
        transform: Applied to each minibatch, as in :func:`pyro_vae.fit`, and once to the rows
            held out.
        batch_size: The rows of a minibatch.
        lr: The learning rate of Adam.
        device: The device; `"auto"` is CUDA if there is one.
        seed: Starts the choice and the transform of the rows held out, and the draws of log p(x).
        progress: Whether to show a bar, on a terminal.
        after_each: Called after each training with the race so far, to write it down, say.

    Raises:
        ValueError: If an argument is refused, or an estimator cannot take the program. Nothing is
            trained then.

    Example:
        >>> import pyro_vae as pv
        >>> def build(seed):
        ...     return pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=seed)
        >>> elbos = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(5)}
        >>> found = race(build, torch.ones(64, 4), elbos, seeds=[0, 1], budget=2, num_samples=10)
        >>> sorted(found.table.index), found.runs.shape
        (['ELBO', 'IWAE'], (4, 7))
    """
    entrants = _Entrants(
        build=build,
        elbos=_checked_elbos(elbos),
        seeds=_checked_seeds(seeds),
        limits=_limits_of(budget),
        num_samples=checked_count("num_samples", num_samples, least=4),
        seed=checked_count("seed", seed, least=0),
        options={"batch_size": batch_size, "lr": lr, "transform": transform, "device": device},
    )
    parts = {"context": context, "weights": weights}
    train, rows = entrants.checked(x, parts, held_out)
    found = _Found(entrants, budget, len(rows))
    pairs = [(name, s) for s in entrants.seeds for name in entrants.elbos]
    stopped = "finished"
    on_terminals = None if progress else True
    with tqdm(total=len(pairs), unit="training", disable=on_terminals) as bar:
        try:
            for name, s in pairs:
                bar.set_postfix_str(f"{name}, seed {s}")
                found.runs[name, s] = entrants.run(name, s, train, rows)
                bar.update()
                if after_each is not None:
                    after_each(found.race("running"))
        except KeyboardInterrupt:
            stopped = "interrupted"
    found.warn_of_bad()
    return found.race(stopped)


@dataclass(frozen=True, eq=False)
class _Run:
    """One training and its evidence, or `None` if the loss was not finite."""

    history: History
    evidence: xr.Dataset | None

    def values(self, name: str, rows: int) -> np.ndarray:
        return np.full(rows, math.nan) if self.evidence is None else self.evidence[name].to_numpy()

    def line(self, rows: int) -> dict[str, Any]:
        log_evidence = self.values("log_evidence", rows)
        over = math.nan
        if self.evidence is not None:
            over = (~(self.values("pareto_k", rows) <= self.evidence.attrs["good_k"])).mean()
        table = self.history.table
        return {
            "log_evidence": log_evidence.mean(),
            "se": crossed_error(log_evidence[None]),
            "elbo": self.values("elbo", rows).mean(),
            "seconds": table["seconds"].sum() if len(table) else 0.0,
            "epochs": len(table),
            "pareto_k_over": over,
            "stopped": self.history.stopped,
        }


@dataclass(frozen=True, eq=False)
class _Entrants:
    """All that the trainings of a race have in common."""

    build: Build
    elbos: dict[str, pyro.infer.ELBO]
    seeds: list[int]
    limits: dict[str, Any]
    num_samples: int
    seed: int
    options: dict[str, Any]

    def program(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self.build(seed)

    def checked(self, x: Any, parts: dict[str, Any], held_out: Any) -> tuple[Rows, Rows]:
        """Checks all arguments; returns the rows to train on and the rows held out."""
        if not callable(self.build) or isinstance(self.build, nn.Module):
            raise ValueError(f"Expected a function of a seed as build; got {self.build!r}.")
        program, again = (self.program(self.seeds[0]) for _ in range(2))
        pair = programs_of(program)
        _check_same(program, again)
        given = read(x, program, check=False, **parts)
        train, kept = split(given, held_out, program, seed=self.seed)
        change = self.options["transform"] or (lambda data: data)
        if not callable(change):
            raise ValueError(f"Expected a function of rows as transform; got {change!r}.")
        with seeded(self.seed):
            rows = transformed(kept, change, program)
            check_rows(program, rows)
            few = change(train.head(2, program))
        known = structure(program, few)
        for name, elbo in self.elbos.items():
            try:
                Objective(*pair, elbo).check(known)
            except ValueError as error:
                raise ValueError(f"{error} (estimator {name!r})") from error
        log_evidence(program, rows[:2], 4, seed=self.seed, progress=False)
        return train, rows

    def run(self, name: str, seed: int, train: Rows, rows: Rows) -> _Run:
        program = self.program(seed)
        elbo = copy.deepcopy(self.elbos[name])
        options = self.options | self.limits
        try:
            history = fit(program, train, elbo=elbo, seed=seed, progress=False, **options)
        except NonFiniteError as error:
            return _Run(error.history, None)
        if history.stopped == "interrupted":
            raise KeyboardInterrupt
        size, seed = self.num_samples, self.seed
        return _Run(history, log_evidence(program, rows, size, seed=seed, progress=False))


@dataclass
class _Found:
    """The trainings of a race that are finished."""

    entrants: _Entrants
    budget: Budget
    rows: int
    runs: dict[tuple[str, int], _Run] = field(default_factory=dict)

    def race(self, stopped: str) -> Race:
        lines = {key: run.line(self.rows) for key, run in self.runs.items()}
        levels = pd.MultiIndex.from_tuples(lines, names=["estimator", "seed"])
        runs = pd.DataFrame(list(lines.values()), index=levels, columns=RUN_COLUMNS)
        table = pd.DataFrame(
            {name: self._line(name) for name in self.entrants.elbos}, index=COLUMNS
        ).T.rename_axis("estimator")
        table = table.sort_values("log_evidence", ascending=False, kind="stable")
        table.attrs = self._attributes()
        return Race(table, runs, stopped)

    def _line(self, name: str) -> dict[str, float]:
        first = next(iter(self.entrants.elbos))
        mine = {seed: run for (n, seed), run in self.runs.items() if n == name}
        if not mine:
            return dict.fromkeys(COLUMNS, math.nan)
        values = self._matrix(name, list(mine))
        difference = values - self._matrix(first, list(mine))
        lines = [run.line(self.rows) for run in mine.values()]
        means = {c: np.mean([line[c] for line in lines]) for c in COLUMNS[4:]}
        return {
            "log_evidence": values.mean(),
            "se": crossed_error(values),
            "difference": difference.mean(),
            "difference_se": crossed_error(difference),
            **means,
        }

    def _matrix(self, name: str, seeds: list[int]) -> np.ndarray:
        return np.array([self.runs[name, s].values("log_evidence", self.rows) for s in seeds])

    def _attributes(self) -> dict[Hashable | None, Any]:
        remark = REMARK.format(first=next(iter(self.entrants.elbos)))
        return {
            "num_samples": self.entrants.num_samples,
            "num_rows": self.rows,
            "seeds": self.entrants.seeds,
            "budget": f"{self.budget} epochs"
            if isinstance(self.budget, int)
            else str(self.budget),
            "seed": self.entrants.seed,
            "good_k": good_k(self.entrants.num_samples),
            "remark": f"{remark}; {self._remark_on_errors()}",
        }

    def _remark_on_errors(self) -> str:
        counts = Counter(name for name, _ in self.runs)
        alone = [name for name, count in counts.items() if count == 1]
        if not alone:
            return OVER_BOTH
        if len(alone) == len(counts):
            return OVER_ROWS
        return f"{OVER_BOTH}, but of {', '.join(map(repr, alone))}, of one seed, over rows alone"

    def warn_of_bad(self) -> None:
        bad = [f"{name!r} at seed {s}" for (name, s), r in self.runs.items() if r.evidence is None]
        if bad:
            warnings.warn(
                f"A loss or gradient was not finite under {', '.join(bad)}: no result (NaN). "
                "Perhaps a smaller lr.",
                UserWarning,
                stacklevel=3,
            )


COLUMNS = [
    "log_evidence",
    "se",
    "difference",
    "difference_se",
    "elbo",
    "seconds",
    "epochs",
    "pareto_k_over",
]
RUN_COLUMNS = ["log_evidence", "se", "elbo", "seconds", "epochs", "pareto_k_over", "stopped"]


def crossed_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean of a table, over its rows and its columns.

    Arguments:
        values: A value for each of S seeds and N rows of data, shape (S, N). Of one seed it is
            the standard error over rows; NaN for one row of data.
    """
    seeds, rows = values.shape
    if rows < 2:
        return math.nan
    with np.errstate(invalid="ignore"):
        by_seed, by_row = values.mean(1), values.mean(0)
        variance = by_row.var(ddof=1) / rows
        if seeds > 1:
            rest = values - by_seed[:, None] - by_row + values.mean()
            unexplained = np.square(rest).sum() / ((seeds - 1) * (rows - 1))
            variance += max(0.0, by_seed.var(ddof=1) / seeds - unexplained / (seeds * rows))
    return math.sqrt(variance)


def _checked_elbos(elbos: Any) -> dict[str, pyro.infer.ELBO]:
    if not isinstance(elbos, Mapping) or not elbos:
        raise ValueError(f"Expected a dict of estimators by name; got {elbos!r}.")
    return dict(elbos)


def _checked_seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, Iterable):
        raise ValueError(f"Expected seeds to be a list of integers; got {seeds!r}.")
    checked = [checked_count("each seed", s, least=0) for s in seeds]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"Expected one seed or more, each of them once; got {checked}.")
    return checked


def _limits_of(budget: Any) -> dict[str, Any]:
    if isinstance(budget, datetime.timedelta):
        if budget <= datetime.timedelta():
            raise ValueError(f"Expected a positive time as budget; got {budget}.")
        return {"max_epochs": UNLIMITED, "max_seconds": budget.total_seconds()}
    if isinstance(budget, float):
        raise ValueError(
            f"Expected budget to be a number of epochs or a datetime.timedelta; got {budget!r}."
        )
    return {"max_epochs": checked_count("budget", budget)}


def _check_same(program: nn.Module, again: nn.Module) -> None:
    if program is again:
        raise ValueError("Expected build to make a new program at each call; got the same one.")
    one, other = program.state_dict(), again.state_dict()
    same = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    if not same:
        raise ValueError("Expected build to make the same weights for the same seed; got others.")
