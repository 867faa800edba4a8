"""log p(x) by importance sampling from the guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn

from .. import plots
from ..data.cells import CellError
from ..data.checks import checked_draws
from ..data.read import check_rows, read, transformed
from ..data.rows import Rows, floating_like
from ..data.source import Row
from ..data.table import Table
from ..elbos.chunks import MAX_ELEMENTS, Plan, give_memory_back, point_masses
from ..elbos.log_densities import programs_of
from ..engine.progress import progress_bar
from ..engine.row_noise import Noise, ReadFields, row_keys
from ..engine.running import evaluating, public, seeded
from .pareto_k import good_k, note_on, notes, pareto_k
from .proposal import Proposal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Evidence", "estimates", "labelled", "log_evidence", "standard_error"]

IN_CACHE = 2**20  # larger blocks are returned to the system, and zeroed again at each call
PIECES_AT_ONCE = 32
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
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> evidence.summary().index.to_list()[:2]
        ['log_evidence', 'elbo']
    """

    __slots__ = ()

    def summary(self) -> pd.DataFrame:
        """Averages the evidence over the rows.

        Returns:
            Indexed by quantity: `log_evidence`, `elbo`, `log_evidence_quarter` and `gap`
            (log_evidence - elbo), in nats per row; `pareto_k_over`, the share of rows whose
            Pareto k is over `good_k`, and `pareto_k_missing`, the share of rows whose k is NaN, as
            with 20 draws or fewer. The columns are the `mean`, its standard error `se` over the
            rows (which includes the Monte Carlo error), the Monte Carlo error alone, `mcse` (NaN
            if it is not estimated), and a `note`: in how many rows the error of log p(x) is
            unknown, because k is over `good_k`, or k is not known. The note is empty if there are
            none.
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


@public
def log_evidence(
    program: nn.Module,
    x: Any,
    num_samples: int = 1000,
    *,
    context: Any = None,
    weights: Any = None,
    transform: Callable[[Any], Any] | None = None,
    on_invalid: str = "raise",
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Estimates log p(x) of each row by importance sampling from the guide.

    .. math::
        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^S w_s, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x)

    The weights of the program are held fixed; only z is integrated out. In expectation the
    estimate is a lower bound of log p(x). The bound rises with S, and is further below log p(x)
    for a guide that is further from the posterior. If its value at S / 4 is lower, something is
    still missing; how much is not known, usually several times the change from S / 4 to S.

    The standard error, sd(w) / (sqrt(S) mean(w)), comes from the delta method. It depends on the
    draws that were made, not on rare large weights that were not drawn, so it is too small if
    `pareto_k` is over `good_k`: such rows have the note `"error unknown"`. Rows without a k, which
    needs more than 20 draws, have the note `"k not known"`. The weights are not
    Pareto-smoothed, because smoothing reduces the largest weights and so increases the bias.
    Neither `log_evidence` nor `pareto_k` can show regions that no draw reached.

    If the prior of a latent site lies on a part of the real numbers (`HalfNormal`, `Gamma`,
    `Beta`), 5 % of the draws come from the prior, and q becomes the mixture of the guide and the
    prior. A weight then is at most 20 times the likelihood, whatever the guide is. The two are
    strata in `mcse`. `elbo` is that of the guide alone.

    The program runs in evaluation mode. Rows and draws are processed in chunks, so the memory
    does not grow with their number. The draws of a row follow from the seed and from the values
    of the row that the program reads; rows of equal values have different draws, by their order.
    So a row's estimate does not change with the rows beside it or with the chunks, except for
    rounding. This holds if the guide is made of normal, uniform, exponential, gamma, Dirichlet,
    Bernoulli or categorical draws, or transforms of these. Other draws, such as those of a
    Poisson, come from torch's generator.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        Yes, but did it work?: Evaluating variational inference (Yao et al., 2018),
        arXiv 1802.02538.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such.
        num_samples: The number of draws S of each row, 4 or more.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        transform: A function of rows that returns them as the program takes them, as in
            :func:`pyro_vae.fit`. Its random numbers follow `seed`.
        on_invalid: What happens to rows that the program's `check` refuses, such as a negative
            count: `"raise"` refuses all rows; `"inf"` gives these rows a log p(x) of -inf, with an
            error of 0. NaN is always refused.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws; with `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar.

    Returns:
        Over `datum`, labelled by the rows: `log_evidence`, its `mcse`, the effective sample size
        `ess`, `pareto_k` (reliable up to the attribute `good_k`), `elbo`, its `elbo_mcse`, and
        `log_evidence_quarter`: the mean of the estimates from the four quarters of the draws
        (S // 4 each), with `log_evidence_quarter_mcse`, their standard deviation / sqrt(4). All
        are in nats, except `ess` and `pareto_k`. The coordinate `note` says in words whether the
        error of a row is unknown. It has the methods :meth:`Evidence.summary` and
        :meth:`Evidence.plot`.

    Raises:
        ValueError: If `program` is not a program, has latent sites that all rows share, or has a
            guide of point masses (`Delta`), which has no importance weights; if data or sizes do
            not fit; if every row is refused, or one has NaN.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> dict(evidence.sizes), bool((evidence.elbo < evidence.log_evidence).all())
        ({'datum': 3}, True)
    """
    num_samples = checked_draws("num_samples", num_samples, least=4)
    if on_invalid not in ("raise", "inf"):
        raise ValueError(f"Expected on_invalid to be 'raise' or 'inf'; got {on_invalid!r}.")
    programs_of(program)
    with seeded(seed):
        rows = read(x, program, context=context, weights=weights, check=False)
        rows = rows if transform is None else transformed(rows, transform, program)
    if on_invalid == "raise":
        check_rows(program, rows)
        index = np.arange(len(rows))
    else:
        index = _possible(program, rows)
    values = {name: np.full(len(rows), IMPOSSIBLE[name]) for name in ATTRIBUTES}
    scored = rows if len(index) == len(rows) else rows[torch.from_numpy(index).to(rows.device)]
    with seeded(seed), evaluating(program):
        scores = _scores(program, scored, num_samples, max_elements, seed, progress=progress)
        for name, numbers in scores:
            values[name][index] = numbers
    data = labelled(values, rows.labels, num_samples, seed)
    data.coords["note"] = ("datum", notes(values["pareto_k"], data.attrs["good_k"]))
    return Evidence(data.data_vars, data.coords, data.attrs)


def _possible(program: nn.Module, rows: Rows) -> np.ndarray:
    """Finds the rows that the program's own check accepts, by halves of what it refuses."""
    for name, tensor in rows.fields.items():
        if (bad := tensor.isnan()).any():
            wanted = f"Expected {name} without NaN, which has no density"
            raise CellError(wanted, tensor, bad).named(rows.labels, rows.columns[name])
    refusal: ValueError | None = None
    waiting, found = [slice(0, len(rows))], []
    while waiting:
        piece = waiting.pop()
        try:
            check_rows(program, rows[piece])
            found.append(np.arange(piece.start, piece.stop))
        except ValueError as error:
            refusal = error
            if piece.stop - piece.start > 1:
                middle = (piece.start + piece.stop) // 2
                waiting += [slice(piece.start, middle), slice(middle, piece.stop)]
    if not found and refusal is not None:
        raise refusal
    return np.sort(np.concatenate(found))


def _scores(
    program: nn.Module,
    rows: Rows,
    num_samples: int,
    max_elements: int,
    seed: int | None,
    *,
    progress: bool,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the evidence and its diagnostics by name, each of shape (rows,)."""
    points = point_masses(program, rows)
    if points:
        raise ValueError(
            "A guide of point masses (Delta) has no importance weights, so log p(x) cannot be "
            f"estimated; the guide has them at {', '.join(points)}."
        )
    if floating_like(program).device.type == "cpu":  # tensors should fit into the caches
        max_elements = min(max_elements, IN_CACHE)
    plan = Plan.of(program, rows, num_samples, max_elements)
    proposal = Proposal(program, plan.structure, num_samples)
    drawn = int(torch.randint(2**62, ())) if seed is None else seed
    few = rows.head(2, program)
    few = ReadFields(few) if isinstance(few, dict) else few
    noises = proposal.noises(few, drawn)
    keys = row_keys(rows, few.names if isinstance(few, ReadFields) else ())
    functions = (proposal.from_guide, proposal.from_prior)
    strata = [_Stratum(plan, program, *pair) for pair in zip(functions, noises, strict=True)]
    order = np.argsort(np.argsort(proposal.is_prior, kind="stable"))
    waiting: list[dict[str, np.ndarray]] = []
    found: list[dict[str, np.ndarray]] = []
    total = len(rows) * num_samples
    with progress_bar(total, "evidence", " draws", progress=progress) as bar:
        for piece in plan.pieces():
            row = rows.select(piece, program)
            parts = [part for s in strata for part in s.parts(row, keys[piece])]
            terms = [part["elbo_terms"] for part in parts if "elbo_terms" in part]
            both = {"log_weights": np.concatenate([p["log_weights"] for p in parts])[order]}
            waiting.append(both | ({"elbo_terms": np.concatenate(terms)} if terms else {}))
            if len(waiting) == PIECES_AT_ONCE or piece.stop == len(rows):
                joined = {k: np.concatenate([w[k] for w in waiting], axis=1) for k in waiting[0]}
                found.append(estimates(**joined, is_prior=proposal.is_prior))
                waiting.clear()
                give_memory_back()
            bar.update(num_samples * (piece.stop - piece.start))
    for name in ATTRIBUTES:
        yield name, np.concatenate([part[name] for part in found])


class _Stratum:
    """The draws of one part of the proposal, in parts that fit into memory."""

    def __init__(self, plan: Plan, program: nn.Module, function: Any, noise: Noise) -> None:
        self.plan, self.noise, self.num_draws = plan, noise, len(noise.table)
        self.table = noise.table.to(floating_like(program).device)
        self.drawing = plan.drawing(program, function, self.num_draws)

    def parts(self, row: Row, keys: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yields the log-weights of some rows, part by part."""
        shifts = self.noise.shifts(keys).to(self.table.device)
        start = 0
        for count in self.plan.parts(self.num_draws):
            inputs: Any = {
                "row": row,
                "table": self.table[start : start + count],
                "shifts": shifts,
            }
            found = self.drawing(inputs, count)
            yield {name: tensor.cpu().numpy() for name, tensor in found.items()}
            start += count


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
                "pareto_k": pareto_k(part),
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
