"""Trains a program under several estimators, and compares log p(x) of held-out rows."""

from __future__ import annotations

import copy
import datetime
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import pyro.infer
import torch
from torch import nn

from .. import plots
from ..data.checks import checked_count, checked_draws, warn_user
from ..data.read import check_rows, read, transformed
from ..data.rows import Rows
from ..data.split import split
from ..data.table import Table
from ..elbos import Objective
from ..elbos.chunks import MAX_ELEMENTS
from ..elbos.log_densities import programs_of, structure
from ..engine.progress import progress_bar
from ..engine.running import public, seeded
from ..evidence.log_evidence import Evidence, log_evidence
from ..evidence.pareto_k import good_k
from ..training.builds import Build, built, checked_build, checked_seeds
from ..training.fit import Transform, fit
from ..training.history import History, NonFiniteError
from .naming import checked_names, naming
from .observed import Observed, check_same_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Race", "race"]

Budget: TypeAlias = int | datetime.timedelta

UNLIMITED = 2**31
REMARK = "log_evidence is a lower bound of log p(x) in expectation; differences are from {first!r}"
OVER_ROWS = "the standard errors are over rows alone, without the variation of training seeds"
OVER_BOTH = "the standard errors are over training seeds and rows"
COLUMNS = [
    "log_evidence",
    "se",
    "difference",
    "difference_se",
    "elbo",
    "seconds",
    "epochs",
    "pareto_k_over",
    "pareto_k_missing",
]
RUN_COLUMNS = [*COLUMNS[:2], *COLUMNS[4:], "stopped"]


@dataclass(frozen=True, eq=False, repr=False)
class Race:
    """The result of :func:`race`.

    Arguments:
        table: A line an estimator, the best first; equal ones, and those without a result, in the
            order of the argument `elbos`. In nats per row: `log_evidence`, the mean over seeds and
            rows, and its standard error `se`; `difference` from the first of `elbos`, in pairs of
            seeds and rows, and its `difference_se`; `elbo`, the bound at one draw, of the held-out
            rows like log p(x). Means over seeds are the `seconds` of training, the number of
            `epochs`, `pareto_k_over`, the share of rows whose Pareto k is over `good_k`, so that
            their error is unknown, and `pareto_k_missing`, the share of rows whose k is NaN, as
            with 20 draws or fewer. Its `attrs` hold `num_samples`, `num_rows`, `seeds`, `budget`,
            `seed`, `good_k`, `first` (the estimator of the differences) and a `remark`.
        runs: The same for each training, indexed by `estimator` and `seed`, in the order of the
            trainings: `log_evidence`, its `se` over rows, `elbo`, `seconds`, `epochs`,
            `pareto_k_over`, `pareto_k_missing` and `stopped`, the reason why it ended: one of
            :class:`pyro_vae.History`, or `"not finite"`.
        stopped: `"finished"`; `"interrupted"` if Ctrl-C came before the last training was
            evaluated (the means are then over the seeds that each estimator has); `"running"`
            between two trainings.
    """

    table: pd.DataFrame
    runs: pd.DataFrame
    stopped: str

    def __repr__(self) -> str:
        return f"{self.table.to_string()}\n{self.table.attrs['remark']}."

    def summary(self) -> str:
        """Describes in sentences which estimator leads, by how much, and with which errors."""
        attrs, lines = self.table.attrs, []
        if self.stopped != "finished":
            total = len(self.table) * len(attrs["seeds"])
            lines.append(
                f"The race is {self.stopped}, after {len(self.runs)} of {total} trainings."
            )
        ranked = self.table[self.table["log_evidence"].notna()]
        for name, line in ranked.head(1).iterrows():
            count, budget = len(attrs["seeds"]), attrs["budget"]
            lines.append(
                f"{name!r} has the largest mean log p(x): {line['log_evidence']:.3f} (s.e. "
                f"{line['se']:.3f}) nats per row, over {attrs['num_rows']} held-out rows and "
                f"{count} training seed{'' if count == 1 else 's'}, with a budget of {budget}."
            )
        for name, line in ranked.drop(index=attrs["first"], errors="ignore").iterrows():
            difference, error = line["difference"], line["difference_se"]
            note = ", which is within two standard errors" if abs(difference) <= 2 * error else ""
            lines.append(
                f"{name!r} is {abs(difference):.3f} (s.e. {error:.3f}) nats per row "
                f"{'below' if difference < 0 else 'above'} {attrs['first']!r}{note}."
            )
        for name in self.table.index.difference(ranked.index, sort=False):
            lines.append(f"{name!r} has no result.")
        for column, meaning in (
            ("pareto_k_over", f"The error is unknown (Pareto k over {attrs['good_k']:.2f})"),
            ("pareto_k_missing", "Pareto k is not known, and so neither is the error,"),
        ):
            shares = [f"{v:.0%} of the rows of {n!r}" for n, v in ranked[column].items() if v > 0]
            if shares:
                lines.append(f"{meaning} in {', '.join(shares)}.")
        return " ".join([*lines, f"Remark: {attrs['remark']}."])

    def plot(self, *, ax: Axes | None = None) -> Canvas:
        """Plots the difference of each estimator from the first, with two standard errors.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        figure = plots.ranking(self.table, ax=ax)
        axes = figure.axes[0] if ax is None else ax
        label = f"difference from {self.table.attrs['first']} ± 2 s.e."
        axes.containers[-1].set_label(label)
        axes.set(xlabel=f"{label}, nats per row", title="Mean log p(x) of held-out rows")
        return figure


@public
def race(
    build: Build,
    x: object,
    elbos: Mapping[str, pyro.infer.ELBO],
    seeds: Iterable[int],
    budget: Budget,
    *,
    context: object = None,
    weights: object = None,
    held_out: object = 0.1,
    num_samples: int = 1000,
    transform: Transform | None = None,
    batch_size: int = 128,
    lr: float = 5e-3,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    after_each: Callable[[Race], object] | None = None,
) -> Race:
    r"""Trains the same program under each estimator, and compares log p(x) of held-out rows.

    For each seed, all estimators start from the same weights and use the same order of
    minibatches; estimators take turns within a seed. Log p(x) is estimated by
    :func:`log_evidence` with the trained guide and the same random numbers for all. It is a lower
    bound in expectation, and lower for a worse guide, so a part of a difference may come from the
    guides.

    With values :math:`v_{sn}` of S seeds and N rows, the standard error of their mean is

    .. math::
        \mathrm{se}^2 = \frac{1}{N} \mathrm{Var}_n\, \bar v_{\cdot n} + \max\Big(0,
            \frac{1}{S} \mathrm{Var}_s\, \bar v_{s \cdot} - \frac{1}{S N} \hat\sigma^2\Big),

    where :math:`\hat\sigma^2` is the mean square of the residuals from the effects of seeds and
    rows. Both variances contain it, and it is counted once. The error of a difference is the same
    formula for the differences :math:`d_{sn}` from the first estimator. If the maximum is 0, the
    error tends to be too large. An error from few seeds is itself uncertain, for three seeds by
    some 50%. With one seed it is over rows alone, and `remark` says so.

    Ctrl-C ends the race, and returns what was trained and evaluated until then. A training whose
    loss becomes NaN or infinite has no result (NaN), and a warning names it; the others go on.

    Arguments:
        build: A function of a seed that returns a new program at each call, with the same weights
            for the same seed. Torch's generators are seeded with it before the call.
        x: The rows to train on.
        elbos: The estimators by name; differences are from the first.
        seeds: The seeds of the weights and of the trainings.
        budget: The number of epochs, which gives all the same steps; or a `datetime.timedelta`,
            which gives all the same time of training, up to the end of the epoch.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        held_out: The share of x to hold out, or the number of rows, or the rows themselves.
        num_samples: The number of draws of each row for log p(x).
        transform: Applied to each minibatch, as in :func:`pyro_vae.fit`, and once to the held-out
            rows.
        batch_size: The number of rows of a minibatch.
        lr: The learning rate of Adam.
        device: The device; `"auto"` is CUDA if it is available.
        seed: The seed for the choice and the transform of the held-out rows, and for the draws of
            log p(x). With `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar, on a terminal or in a notebook.
        after_each: Called after each training with the race so far, for example to save it.

    Returns:
        A :class:`Race`.

    Raises:
        ValueError: If an argument is invalid, an estimator does not support the program, or the
            programs of different seeds do not score the same data, as for :func:`compare`. Then
            nothing is trained.

    Example:
        >>> import pyro_vae as pv
        >>> def build(seed):
        ...     return pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=seed)
        >>> elbos = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(5)}
        >>> options = {"seeds": [0, 1], "budget": 2, "num_samples": 10, "seed": 0}
        >>> result = race(build, torch.ones(64, 4), elbos, **options)
        >>> sorted(result.table.index), result.runs.shape
        (['ELBO', 'IWAE'], (4, 8))
    """
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    entrants = _Entrants(
        build=build,
        elbos=checked_names("estimators", elbos),
        seeds=checked_seeds(seeds),
        budget=_checked_budget(budget),
        num_samples=checked_draws("num_samples", num_samples, least=4),
        seed=checked_count("seed", seed, least=0),
        transform=transform,
        batch_size=batch_size,
        lr=lr,
        device=device,
    )
    program = checked_build(build, entrants.seeds[0])
    given = read(x, program, check=False, context=context, weights=weights)
    train, rows = entrants.checked_rows(program, given, held_out)
    results = _Results(entrants, len(rows))
    pairs = [(name, s) for s in entrants.seeds for name in entrants.elbos]
    stopped = "finished"
    with progress_bar(len(pairs), "race", " trainings", progress=progress) as bar:
        try:
            for name, s in pairs:
                bar.set_postfix_str(f"{name}, seed {s}")
                results.runs[name, s] = entrants.run(name, s, train, rows)
                bar.update()
                if after_each is not None:
                    after_each(results.race("running"))
        except KeyboardInterrupt:
            stopped = "interrupted"
    bad = [f"{n!r} at seed {s}" for (n, s), run in results.runs.items() if run.evidence is None]
    if bad:
        warn_user(
            f"The loss or its gradient became NaN or infinite under {', '.join(bad)}: no result "
            "(NaN). Try a smaller lr."
        )
    return results.race(stopped)


@dataclass(frozen=True, eq=False)
class _Run:
    """One training and its evidence, which is `None` if the loss became NaN or infinite."""

    history: History
    evidence: Evidence | None

    def values(self, name: str, rows: int) -> np.ndarray:
        return np.full(rows, math.nan) if self.evidence is None else self.evidence[name].to_numpy()

    def line(self, rows: int) -> dict[str, float | str]:
        log_evidence = self.values("log_evidence", rows)
        over = missing = math.nan
        if self.evidence is not None:
            over = self.evidence.is_over().mean()
            missing = np.isnan(self.values("pareto_k", rows)).mean()
        table = self.history.table
        return {
            "log_evidence": log_evidence.mean(),
            "se": crossed_error(log_evidence[None]),
            "elbo": self.values("elbo", rows).mean(),
            "seconds": table["seconds"].sum() if len(table) else 0.0,
            "epochs": len(table),
            "pareto_k_over": over,
            "pareto_k_missing": missing,
            "stopped": self.history.stopped,
        }


class _Limits(NamedTuple):
    """A budget as the limits of a training, and in words."""

    epochs: int
    seconds: float | None
    text: str


@dataclass(frozen=True, eq=False)
class _Entrants:
    """What the trainings of a race have in common."""

    build: Build
    elbos: dict[str, pyro.infer.ELBO]
    seeds: list[int]
    budget: _Limits
    num_samples: int
    seed: int
    transform: Transform | None
    batch_size: int
    lr: float
    device: str | torch.device

    def checked_rows(self, program: nn.Module, given: Rows, held_out: object) -> tuple[Rows, Rows]:
        """Checks data and estimators, and returns the rows to train on and those held out."""
        train, kept = split(given, held_out, program, seed=self.seed)
        change = (lambda data: data) if self.transform is None else self.transform
        with seeded(self.seed):
            rows = transformed(kept, change, program)
            check_rows(program, rows)
            few = change(train.head(2, program))
        known = structure(program, few)
        for name, elbo in self.elbos.items():
            with naming(f"estimator {name!r}"):
                Objective(*programs_of(program), elbo).check(known)
        log_evidence(program, rows[:2], 4, seed=self.seed, progress=False)
        if len(self.seeds) > 1:
            programs = {f"seed {s}": built(self.build, s) for s in self.seeds}
            found = {n: Observed.of(p, rows, MAX_ELEMENTS) for n, p in programs.items()}
            check_same_data(found, rows.labels)
        return train, rows

    def run(self, name: str, seed: int, train: Rows, rows: Rows) -> _Run:
        program = built(self.build, seed)
        try:
            history = fit(
                program,
                train,
                validation=None,
                elbo=copy.deepcopy(self.elbos[name]),
                seed=seed,
                max_steps=None,
                max_epochs=self.budget.epochs,
                until_converged=False,
                max_seconds=self.budget.seconds,
                batch_size=self.batch_size,
                lr=self.lr,
                transform=self.transform,
                device=self.device,
                progress=False,
            )
        except NonFiniteError as error:
            return _Run(error.history, None)
        if history.stopped == "interrupted":
            raise KeyboardInterrupt
        size, seed = self.num_samples, self.seed
        return _Run(history, log_evidence(program, rows, size, seed=seed, progress=False))


@dataclass
class _Results:
    """The finished trainings of a race."""

    entrants: _Entrants
    rows: int
    runs: dict[tuple[str, int], _Run] = field(default_factory=dict)

    def race(self, stopped: str) -> Race:
        lines = {key: run.line(self.rows) for key, run in self.runs.items()}
        levels = pd.MultiIndex.from_tuples(lines, names=["estimator", "seed"])
        runs = Table(list(lines.values()), index=levels, columns=RUN_COLUMNS)
        first = next(iter(self.entrants.elbos))
        values = {key: run.values("log_evidence", self.rows) for key, run in self.runs.items()}
        columns = {name: dict.fromkeys(COLUMNS, math.nan) for name in self.entrants.elbos}
        for name, column in columns.items():
            if seeds := [seed for other, seed in values if other == name]:
                own = np.array([values[name, seed] for seed in seeds])
                difference = own - np.array([values[first, seed] for seed in seeds])
                column |= {
                    "log_evidence": own.mean(),
                    "se": crossed_error(own),
                    "difference": difference.mean(),
                    "difference_se": crossed_error(difference),
                }
                for c in COLUMNS[4:]:
                    column[c] = float(np.mean([lines[name, seed][c] for seed in seeds]))
        table = Table(columns, index=COLUMNS).T.rename_axis("estimator")
        table = table.sort_values("log_evidence", ascending=False, kind="stable")
        table.attrs = {
            "num_samples": self.entrants.num_samples,
            "num_rows": self.rows,
            "seeds": self.entrants.seeds,
            "budget": self.entrants.budget.text,
            "seed": self.entrants.seed,
            "good_k": good_k(self.entrants.num_samples),
            "first": first,
            "remark": f"{REMARK.format(first=first)}; {self._remark_on_errors()}",
        }
        return Race(table, runs, stopped)

    def _remark_on_errors(self) -> str:
        counts = Counter(name for name, _ in self.runs)
        alone = [name for name, count in counts.items() if count == 1]
        if not alone:
            return OVER_BOTH
        if len(alone) == len(counts):
            return OVER_ROWS
        names = ", ".join(map(repr, alone))
        return f"{OVER_BOTH}, but over rows alone for {names}, which have one seed"


def crossed_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean over seeds and rows; NaN for one row of data.

    Arguments:
        values: A value for each of S seeds and N rows of data, shape (S, N). With one seed the
            result is the standard error over rows.
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


def _checked_budget(budget: Budget) -> _Limits:
    match budget:
        case datetime.timedelta():
            if budget <= datetime.timedelta():
                raise ValueError(f"Expected a positive time as budget; got {budget}.")
            return _Limits(UNLIMITED, budget.total_seconds(), str(budget))
        case float():
            raise ValueError(
                "Expected budget to be a number of epochs or a datetime.timedelta; "
                f"got {budget!r}."
            )
    epochs = checked_count("budget", budget)
    return _Limits(epochs, None, f"{epochs} epochs")
