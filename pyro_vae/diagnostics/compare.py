"""Ranks models by log p(x) of the same rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn

from .. import plots
from ..data.checks import checked_draws, warn_user
from ..data.read import read
from ..data.table import Table
from ..elbos.chunks import MAX_ELEMENTS
from ..elbos.log_densities import programs_of
from ..engine.running import public
from ..evidence.evidence import Evidence, standard_error
from ..evidence.log_evidence import log_evidence
from ..programs.vae import VAE
from ..training.ensemble import Ensemble
from .naming import checked_names, naming
from .observed import Observed, check_same_data
from .stacking import stacking_weights
from .to_arviz import elpd_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Ranking", "compare"]

REMARK = (
    "The standard errors are over rows and draws, at these weights of the programs. How much a "
    "model changes from one training seed to another is in those of an ensemble alone."
)


SHOWN = ("difference", "difference_se", "log_evidence", "se", "pareto_k_over")


class Ranking(Table):
    """Models ranked by log p(x), as :func:`compare` returns them: one line a model, best first.

    Its text shows the columns that rank the models, at any width; the others are in the table.
    `evidence` holds log p(x) of each row by each model: a data set over `model` and `datum`, with
    `log_evidence`, `log_evidence_quarter`, `elbo` and `pareto_k`.
    """

    _metadata = ["evidence"]
    evidence: xr.Dataset

    def __repr__(self) -> str:
        shown = [column for column in SHOWN if column in self]
        width = max(shutil.get_terminal_size().columns, 40)
        text = self[shown].to_string(float_format="{:.3f}".format, line_width=width)
        others = ", ".join(column for column in map(str, self) if column not in shown)
        equal = ", ".join(map(str, self.index[self["within_error"]]))
        return (
            f"{text}\n\nequal to the best within error: {equal}\n"
            f"in nats per row; columns not shown: {others}"
        )

    def summary(self) -> str:
        """Describes in sentences which model leads, by how much, and with which errors."""
        best = self.iloc[0]
        lines = [
            f"{best.name!r} has the largest mean log p(x): {best['log_evidence']:.3f} "
            f"(s.e. {best['se']:.3f}) nats per row, over {self.attrs['num_rows']} rows."
        ]
        for name, line in self.iloc[1:].iterrows():
            below, error = abs(line["difference"]), line["difference_se"]
            note = ", which is within error" if line["within_error"] else ""
            lines.append(
                f"{name!r} is {below:.3f} (s.e. {error:.3f}) nats per row below it{note}."
            )
        if len(self) > 1:
            weights = ", ".join(f"{name!r} {w:.2f}" for name, w in self["weight"].items())
            lines.append(f"Stacking weights: {weights}.")
        for name, spread in self["training_sd"].dropna().items():
            lines.append(
                f"From one fit of {name!r} to another the mean has a standard deviation of "
                f"{spread:.3f}."
            )
        lines.append(_trend_sentence(self))
        for name, (mean, error) in self.attrs.get("baselines", {}).items():
            lines.append(f"For comparison, {name}: {mean:.3f} (s.e. {error:.3f}) nats per row.")
        for name, line in self.iterrows():
            if line["below"]:
                lines.append(f"{name!r} is below {line['below']}: {line['advice']}.")
        if noted := [f"{n!r}: {note}" for n, note in self["note"].items() if note]:
            lines.append(
                f"Notes on log p(x): {'; '.join(noted)}. The error is unknown if Pareto k is over "
                f"{self.attrs['good_k']:.2f}; log p(x) is then too low, by more than the change "
                "with the draws, and a difference from it has an unknown error too. Without a k, "
                "which needs more than 20 draws, nothing is known of the error."
            )
        return " ".join([*lines, self.attrs["remark"]])

    def plot(self, *, ax: Axes | None = None) -> Canvas:  # type: ignore[override]
        """Plots the differences from the best model, by :func:`pyro_vae.plots.ranking`.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        return plots.ranking(self, ax=ax)

    def to_arviz_elpd(self) -> dict[str, Any]:
        """Returns log p(x) of the held-out rows in the form that ArviZ compares and plots.

        `arviz.compare`, `arviz.plot_compare` and `arviz.plot_khat` take them. ArviZ sums over
        rows where this package takes the mean. It has a number of parameters `p`, which is NaN:
        nothing is corrected for, because the rows were held out. If |log p(x)| of a row is over
        some 700, ArviZ's own stacking weights underflow and are all equal; `weight` of this table
        is right. Under ArviZ 0.23 they are of the kind `"loo"`, the only one that it compares: do
        not mix them with results of `arviz.loo`, which are another quantity. Later versions
        refuse the mixture.

        Returns:
            An `ELPDData` for each model, by name, the best first.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
            >>> poisson = pv.VAE(64, 2, pv.likelihoods.Poisson(), seed=0)
            >>> x = torch.randint(0, 17, (50, 64), generator=torch.Generator().manual_seed(0))
            >>> table = compare({"binomial": vae, "poisson": poisson}, x, 100, seed=0)
            >>> {name: own["n_data_points"] for name, own in table.to_arviz_elpd().items()}
            {'binomial': 50, 'poisson': 50}
        """
        options = {name: self.attrs[name] for name in ("num_samples", "good_k")}
        return {
            str(name): elpd_data(self.evidence.isel(model=place), **options)
            for place, name in enumerate(self.index)
        }


@public
def compare(
    programs: Mapping[str, nn.Module | Ensemble],
    x: object,
    num_samples: int = 1000,
    *,
    context: object = None,
    weights: object = None,
    refine: bool | str = "auto",
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Ranking:
    r"""Compares programs by the mean log p(x) of the same rows, held out from their training.

    The programs must score the same data: their observed values must be equal, cell by cell and
    in the same units, under sites of any names and in any order. A program of log(x), of
    standardised values, or of some of the columns is refused beside a program of x.

    Each estimate of log p(x) is biased downwards, more so for a worse guide, so a difference is
    biased too. The change of a difference from S / 4 draws to S shows that a bias is left, but not
    how large it is: usually several times the change. If the change is larger than the standard
    error of the difference, a warning says so. All numbers are in nats per row.

    Several models are often equal within error, and the best line alone is a poor choice of a
    model: choose the simplest of those `within_error`. Their difference from the best is at most
    two standard errors plus its change from S / 4 to S draws, which is the work of the guides.
    The squared `difference_se` is

    .. math:: \frac{\mathrm{var}_i(d_i)}{N} + \frac{t_a^2}{M_a} + \frac{t_b^2}{M_b},

    where d are the differences of N rows, and t the `training_sd` of an ensemble of M members; a
    single program has no such term.

    Arguments:
        programs: By name, modules with methods `model(x)` and `guide(x)`, or ensembles
            (:func:`pyro_vae.ensemble`): log p(x) of a row is then the mean over the members, and
            Pareto k the largest.
        x: The data, the same for all programs.
        num_samples: The number of draws S of each row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of a program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of a program.
        refine: Which rows get a proposal of their own, as in :func:`pyro_vae.log_evidence`. With
            `False` the guides are compared as much as the models.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws, the same for each program. With `None` one is drawn from
            torch's generator.
        progress: Whether to show progress bars, on a terminal or in a notebook.

    Returns:
        A table with one line a program, the best first, and equal ones in the order given:
        `difference` from the best, row by row, and its `difference_se`; `within_error`, whether
        the difference is at most two of these plus the size of `trend`; `weight`, the share of
        the model in the mixture that predicts these rows best (stacking); `log_evidence` and its
        standard error `se` over rows; `training_sd`, the standard deviation of `log_evidence`
        over the members of an ensemble, NaN for a single program; `trend` and its `trend_se`;
        `elbo` and its standard
        error `elbo_se` over rows; `pareto_k_over`, the share of rows whose Pareto k is over
        `good_k`; `pareto_k_missing`, the share of rows whose k is NaN, as with 20 draws or fewer;
        and a `note`: in how many rows the error of log p(x) is unknown, or k is not known;
        `below`: which baselines of the VAE (:meth:`pyro_vae.VAE.baselines`) have a larger mean
        log p(x), and the `advice` then. Its `attrs` hold `num_samples`, `seed`, `num_rows`,
        `good_k`, a `remark` and the `baselines`, their means and standard errors by name. Its
        attribute `evidence` holds log p(x) of each row. It has the methods
        :meth:`Ranking.summary`, :meth:`Ranking.plot` and :meth:`Ranking.to_arviz_elpd`.

        `trend` is the change from S / 4 to S draws: of log p(x) itself for the best program, of
        the difference from it for the others. A trend larger than its error means: draw more
        samples.

    Raises:
        ValueError: If there is no program, one of them is not a program, or they do not score the
            same data: other values, other units, other columns, another mask or `pyro.factor`, or
            a mass function beside a density.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> poisson = pv.VAE(64, 2, pv.likelihoods.Poisson(), seed=0)
        >>> x = torch.randint(0, 17, (50, 64), generator=torch.Generator().manual_seed(0))
        >>> table = compare({"binomial": vae, "poisson": poisson}, x, 100, seed=0)
        >>> table["within_error"].to_dict()
        {'binomial': True, 'poisson': False}
        >>> print(table.summary()[:41])
        'binomial' has the largest mean log p(x):
    """
    num_samples = checked_draws("num_samples", num_samples, least=4)
    members = {
        name: given.programs if isinstance(given, Ensemble) else [given]
        for name, given in checked_names("programs", programs).items()
    }
    found = {}
    for name, fitted in members.items():
        with naming(f"program {name!r}"):
            if not fitted:
                raise ValueError("Expected an ensemble of one fit or more; got none.")
            for program in fitted:
                programs_of(program)
            rows = read(x, fitted[0], context=context, weights=weights)
            if len(members) > 1:
                found[name] = Observed.of(fitted[0], rows, max_elements)
    if found:
        check_same_data(found, rows.labels)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    options: dict[str, Any] = {"context": context, "weights": weights, "refine": refine}
    options |= {"max_elements": max_elements, "seed": seed, "progress": progress}
    evidence = {}
    for name, fitted in members.items():
        with naming(f"program {name!r}"):
            evidence[name] = [log_evidence(own, x, num_samples, **options) for own in fitted]
    with np.errstate(invalid="ignore"):  # differences of infinite values
        table = _table(evidence)
    baselines = _baselines(members, x, table)
    table.attrs = {
        **table.evidence.attrs,
        "num_rows": table.evidence.sizes["datum"],
        "remark": REMARK,
        "baselines": baselines,
    }
    if _doubtful(table):
        warn_user(_trend_sentence(table))
    return table


def _averaged(members: list[Evidence]) -> Evidence:
    """Means over the members of an ensemble, and the largest Pareto k of each row."""
    values = {
        name: np.mean([member[name].to_numpy() for member in members], axis=0)
        for name in ("log_evidence", "log_evidence_quarter", "elbo")
    }
    values["pareto_k"] = np.fmax.reduce([member["pareto_k"].to_numpy() for member in members])
    first = members[0]
    columns = {name: ("datum", own, first[name].attrs) for name, own in values.items()}
    attrs = {name: first.attrs[name] for name in ("num_samples", "seed", "good_k")}
    return Evidence(columns, {"datum": first["datum"].to_numpy()}, attrs)


def _table(found: dict[str, list[Evidence]]) -> Ranking:
    averaged = {name: _averaged(members) for name, members in found.items()}
    means = {name: float(data["log_evidence"].mean()) for name, data in averaged.items()}
    order = sorted(means, key=lambda name: np.inf if np.isnan(means[name]) else -means[name])
    best, lines = averaged[order[0]], {}
    training = {name: _training_errors(members) for name, members in found.items()}
    for name in order:
        data, (training_sd, training_se) = averaged[name], training[name]
        full, elbo = data["log_evidence"].to_numpy(), data["elbo"].to_numpy()
        difference = full - best["log_evidence"].to_numpy()
        trend = full - data["log_evidence_quarter"].to_numpy()
        error = allowed = 0.0
        if name != order[0]:
            trend = trend - (best["log_evidence"] - best["log_evidence_quarter"]).to_numpy()
            from_training = np.hypot(training_se, training[order[0]][1])
            error = float(np.hypot(standard_error(difference), from_training))
            allowed = float(np.nan_to_num(2 * error + abs(trend.mean())))
        lines[name] = {
            "difference": difference.mean(),
            "difference_se": error,
            "within_error": name == order[0] or bool(abs(difference.mean()) <= allowed),
            "weight": np.nan,
            "log_evidence": full.mean(),
            "se": standard_error(full),
            "training_sd": training_sd,
            "trend": trend.mean(),
            "trend_se": standard_error(trend),
            "elbo": elbo.mean(),
            "elbo_se": standard_error(elbo),
            "pareto_k_over": data.is_over().mean(),
            "pareto_k_missing": data["pareto_k"].isnull().to_numpy().mean(),
            "note": data.note(),
        }
    table = Ranking(pd.DataFrame.from_dict(lines, orient="index").rename_axis("model"))
    names = xr.Variable("model", list(map(str, order)))
    joined = xr.concat([averaged[name] for name in order], names)
    table.evidence = xr.Dataset(joined.data_vars, joined.coords, joined.attrs)
    table["weight"] = stacking_weights(table.evidence["log_evidence"].to_numpy().T)
    return table


def _training_errors(members: list[Evidence]) -> tuple[float, float]:
    """The s.d. of the mean log p(x) over the members of an ensemble, and the error of their mean.

    For one program they are NaN, because nothing is known, and 0.
    """
    if len(members) == 1:
        return np.nan, 0.0
    means = np.array([float(member["log_evidence"].mean()) for member in members])
    return float(means.std(ddof=1)), standard_error(means)


def _baselines(
    members: Mapping[str, list[nn.Module]], x: object, table: Ranking
) -> dict[str, tuple[float, float]]:
    """Scores the rows by the baselines of each VAE, and marks the VAEs that are below them."""
    found: dict[str, tuple[float, float]] = {}
    below, advice = {}, {}
    means = dict(zip(table.index, table["log_evidence"].to_numpy(), strict=True))
    for name, (program, *_) in members.items():
        if not isinstance(program, VAE) or not program.is_initialized:
            continue
        better = []
        for baseline, scores in program.baselines(x).items():
            label = str(baseline).replace("_", " ")
            label += f" of {name!r}" if baseline == "independent_columns" else ""
            found[label] = float(scores.mean()), standard_error(scores.to_numpy())
            if found[label][0] > means[name]:
                better.append(label)
        if better:
            below[name], advice[name] = " and ".join(better), program.advice()
    table["below"] = [below.get(str(name), "") for name in table.index]
    table["advice"] = [advice.get(str(name), "") for name in table.index]
    return found


def _doubtful(table: pd.DataFrame) -> str:
    """Returns the names of the programs whose difference changes by more than its error."""
    others = table.iloc[1:]
    change = others["trend"].abs()
    is_doubtful = (change > others["difference_se"]) & (change > 2 * others["trend_se"])
    return ", ".join(map(repr, others.index[is_doubtful]))


def _trend_sentence(table: pd.DataFrame) -> str:
    size = table.attrs["num_samples"]
    if names := _doubtful(table):
        return (
            f"The difference from {table.index[0]!r} changes by more than its standard error from "
            f"{size // 4} to {size} draws of each row, for {names}. Part of it comes from the "
            "guides, not from the models: draw more samples, or use better guides."
        )
    best = table.iloc[0]
    return (
        f"From {size // 4} to {size} draws of each row log p(x) of {best.name!r} rises by "
        f"{best['trend']:.3f} (s.e. {best['trend_se']:.3f}), and no difference changes by more "
        "than its standard error."
    )
