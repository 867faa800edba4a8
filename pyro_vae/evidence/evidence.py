"""The evidence of each row, and its estimate from importance weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr

from .. import plots
from ..data.table import Table
from .pareto_k import good_k, note_on, notes, pareto_k

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["ATTRIBUTES", "IMPOSSIBLE", "Evidence", "estimates", "labelled", "standard_error"]

MAX_WEIGHTS = 2**17  # the weights and intermediate results fit into a processor's cache

ATTRIBUTES = {
    "log_evidence": {
        "long_name": "importance-sampling estimate of log p(x)",
        "units": "nats",
        "direction": "lower bound in expectation",
    },
    "mcse": {
        "long_name": "Monte Carlo standard error of log_evidence (delta method)",
        "units": "nats",
        "direction": "too small by an unknown factor if pareto_k is over good_k",
    },
    "ess": {
        "long_name": "effective sample size of the importance weights",
        "units": "draws",
        "direction": "larger is better, at most num_samples",
    },
    "pareto_k": {
        "long_name": "shape of the generalised Pareto tail of the importance weights",
        "units": "1",
        "direction": "smaller is better, reliable up to good_k",
    },
    "pareto_k_guide": {
        "long_name": "pareto_k of the draws from the guide, before a row was refined",
        "units": "1",
        "direction": "smaller is better, reliable up to good_k",
    },
    "elbo": {
        "long_name": "evidence lower bound",
        "units": "nats",
        "direction": "lower bound in expectation",
    },
    "elbo_mcse": {
        "long_name": "Monte Carlo standard error of elbo",
        "units": "nats",
        "direction": "smaller is better",
    },
    "log_evidence_quarter": {
        "long_name": "log_evidence at num_samples / 4, mean over the four quarters of the draws",
        "units": "nats",
        "direction": "lower bound in expectation, below that of log_evidence",
    },
    "log_evidence_quarter_mcse": {
        "long_name": "Monte Carlo standard error of log_evidence_quarter (sd of the four / 2)",
        "units": "nats",
        "direction": "estimated from four values, so uncertain by about 40%",
    },
}


IMPOSSIBLE = dict.fromkeys(ATTRIBUTES, -math.inf) | {
    "mcse": 0.0,
    "ess": math.nan,
    "elbo_mcse": 0.0,
    "log_evidence_quarter_mcse": 0.0,
}  # of a row that the model cannot produce


class Evidence(xr.Dataset):
    """The evidence of each row, as :func:`log_evidence` returns it: a data set over `datum`.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = pv.log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> evidence.summary().index.to_list()[:2]
        ['log_evidence', 'elbo']
    """

    __slots__ = ()

    def summary(self) -> pd.DataFrame:
        """Averages the evidence over the rows.

        Returns:
            Indexed by quantity: `log_evidence`, `elbo`, `log_evidence_quarter` and `gap`
            (log_evidence - elbo), in nats per row; `pareto_k_over`, the share of rows whose
            Pareto k is over `good_k`, `pareto_k_missing`, the share of rows whose k is NaN, as
            with 20 draws or fewer, and `pareto_k_guide_over`, the share of rows whose k was over
            `good_k` under the guide, before they were refined. The columns are the `mean`, its
            standard error `se` over the rows (which includes the Monte Carlo error), the Monte
            Carlo error alone, `mcse` (NaN if it is not estimated), and a `note`: in how many rows
            the error of log p(x) is unknown, because k is over `good_k`, or k is not known. The
            note is empty if there are none.
        """
        error_of = {
            "log_evidence": "mcse",
            "elbo": "elbo_mcse",
            "log_evidence_quarter": "log_evidence_quarter_mcse",
        }
        means = {name: self[name].to_numpy() for name in error_of}
        squares = {name: np.square(self[error].to_numpy()) for name, error in error_of.items()}
        errors = {name: float(np.sqrt(s.sum()) / len(s)) for name, s in squares.items()}
        means["gap"] = means["log_evidence"] - means["elbo"]
        means["pareto_k_over"] = self.is_over().astype(np.float64)
        means["pareto_k_missing"] = np.isnan(self["pareto_k"].to_numpy()).astype(np.float64)
        before = self.get("pareto_k_guide", self["pareto_k"]).to_numpy()
        means["pareto_k_guide_over"] = (before > self.attrs["good_k"]).astype(np.float64)
        note = self.note()
        noted = dict.fromkeys(("log_evidence", "log_evidence_quarter", "gap"), note)
        columns = {
            "mean": {name: values.mean() for name, values in means.items()},
            "se": {name: standard_error(values) for name, values in means.items()},
            "mcse": {name: errors.get(name, math.nan) for name in means},
            "note": {name: noted.get(name, "") for name in means},
        }
        return Table(columns, index=list(means))

    def is_over(self) -> np.ndarray:
        """Returns for each row whether its Pareto k is over `good_k`. It is not if k is NaN."""
        is_over: np.ndarray = self["pareto_k"].to_numpy() > self.attrs["good_k"]
        return is_over

    def note(self) -> str:
        """Counts the rows whose error is unknown, and those whose Pareto k is not known."""
        return note_on(notes(self["pareto_k"].to_numpy(), self.attrs["good_k"]))

    def plot(self, *, ax: Axes | None = None) -> Canvas:  # type: ignore[override]
        """Draws the Pareto k of each row: :func:`pyro_vae.plots.pareto_k`.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        return plots.pareto_k(self, ax=ax)


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of a mean, NaN for fewer than two values.

    Arguments:
        values: The values, shape (n,).
    """
    if len(values) < 2:
        return math.nan
    with np.errstate(invalid="ignore"):
        return float(values.std(ddof=1) / math.sqrt(len(values)))


def estimates(
    log_weights: np.ndarray,
    elbo_terms: np.ndarray | None = None,
    is_prior: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Computes the evidence and its diagnostics for each row.

    Arguments:
        log_weights: The logarithm of p(x, z) over the density of the proposal, shape (S, rows).
        elbo_terms: log p(x, z) - log q(z | x) of the draws from the guide, shape (n, rows); by
            default the log-weights.
        is_prior: Whether each draw is from the prior, shape (S,), which is a stratum of its own;
            by default none is.

    Returns:
        By name, each of shape (rows,).
    """
    size, rows = log_weights.shape
    elbo_terms = log_weights if elbo_terms is None else elbo_terms
    is_prior = np.zeros(size, dtype=bool) if is_prior is None else is_prior
    at_once = max(1, MAX_WEIGHTS // max(size, 1))
    values = {name: np.empty(rows) for name in ATTRIBUTES}
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        part, terms = (p[:, piece].astype(np.float64) for p in (log_weights, elbo_terms))
        by_quarter = part[: size // 4 * 4].reshape(4, size // 4, part.shape[1]).swapaxes(0, 1)
        with np.errstate(all="ignore"):
            log_evidence, weights = _log_mean_exp(part)
            quarters, _ = _log_mean_exp(by_quarter)
            variance = weights.var(axis=0, ddof=1)
            if is_prior.sum() >= 2:  # within strata
                strata = [weights[is_prior == stratum] for stratum in (False, True)]
                variance = sum(len(w) * w.var(axis=0, ddof=1) for w in strata) / size
            found = {
                "log_evidence": log_evidence,
                "mcse": np.sqrt(variance) / (math.sqrt(size) * weights.mean(axis=0)),
                "ess": weights.sum(axis=0) ** 2 / np.square(weights).sum(axis=0),
                "pareto_k": (k := pareto_k(part)),
                "pareto_k_guide": k,
                "elbo": terms.mean(axis=0),
                "elbo_mcse": terms.std(axis=0, ddof=1) / math.sqrt(len(terms)),
                "log_evidence_quarter": quarters.mean(axis=0),
                "log_evidence_quarter_mcse": quarters.std(axis=0, ddof=1) / math.sqrt(4),
            }
        for name, numbers in found.items():
            values[name][piece] = numbers
    return values


def _log_mean_exp(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logarithm of the mean weight, and the weights divided by the largest one."""
    top = log_weights.max(axis=0)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(log_weights - top)
    return np.log(weights.mean(axis=0)) + top, weights


def labelled(
    values: dict[str, np.ndarray], names: np.ndarray, num_samples: int, seed: int | None
) -> xr.Dataset:
    """Labels the evidence of each row with the names of the rows.

    Arguments:
        values: The result of :func:`estimates`.
        names: The labels of the rows.
        num_samples: The number of draws of each row.
        seed: The seed of the draws, for the attributes.
    """
    variables = {name: ("datum", values[name], ATTRIBUTES[name]) for name in ATTRIBUTES}
    attributes = {
        "num_samples": num_samples,
        "seed": "none" if seed is None else seed,
        "good_k": good_k(num_samples),
    }
    return xr.Dataset(variables, coords={"datum": names}, attrs=attributes)
