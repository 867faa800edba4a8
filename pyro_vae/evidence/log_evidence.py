"""log p(x) by importance sampling from the guide."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from ..data.checks import checked_count
from ..data.read import read
from ..data.rows import floating_like
from ..data.source import Row
from ..elbos.chunks import MAX_ELEMENTS, Plan, give_memory_back, point_masses
from ..elbos.log_densities import log_densities, programs_of
from ..engine.running import evaluating, seeded
from .pareto_k import good_k, pareto_k

__all__ = ["estimates", "labelled", "log_evidence", "standard_error", "summary"]

IN_CACHE = 2**20  # larger blocks are given back to the system and zeroed anew at each call
PIECES_AT_ONCE = 32
MAX_WEIGHTS = 2**17  # of whose numbers a processor's cache holds all

ATTRIBUTES = {
    "log_evidence": {
        "long_name": "importance-sampling estimate of log p(x)",
        "units": "nats",
        "direction": "lower bound in expectation",
    },
    "mcse": {
        "long_name": "Monte Carlo standard error of log_evidence (delta method)",
        "units": "nats",
        "direction": "understates where pareto_k is high",
    },
    "ess": {
        "long_name": "effective sample size of the importance weights",
        "units": "draws",
        "direction": "larger is better, num_samples at most",
    },
    "pareto_k": {
        "long_name": "shape of the generalised Pareto tail of the importance weights",
        "units": "1",
        "direction": "smaller is better, reliable below good_k",
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
        "direction": "of four values, so itself uncertain by some 40%",
    },
}


def log_evidence(
    program: nn.Module,
    x: Any,
    num_samples: int = 1000,
    *,
    context: Any = None,
    weights: Any = None,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Estimates log p(x) of each row by importance sampling from the guide.

    .. math::
        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^S w_s, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x)

    In expectation it is a lower bound of log p(x) that rises with S, by more for a guide
    further from the posterior; its value at S / 4 beside it shows how much is still missing.
    Its standard error, sd(w) / (sqrt(S) mean(w)), is the delta method's: it knows
    the draws that came, not the rare large weights that did not, and understates the error,
    the more so the larger `pareto_k`. The weights are not Pareto-smoothed: smoothing takes away
    the largest of them, and makes the estimate more biased than the plain mean. Regions that
    the guide never visits are seen by neither `log_evidence` nor `pareto_k`.

    The program runs in evaluation mode, with a fixed amount of memory: rows and draws are cut
    into pieces.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        Yes, but did it work?: Evaluating variational inference (Yao et al., 2018),
        arXiv 1802.02538.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such.
        num_samples: The number of draws S a row, 4 or more.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        max_elements: About how many elements one tensor may have.
        seed: Starts the draws; with `None` torch's generators run on.
        progress: Whether to show a bar.

    Returns:
        Over `datum`, labelled by the names of the rows: `log_evidence`, its `mcse`, the effective
        sample size `ess`, `pareto_k` (compare attribute `good_k`), `elbo`, its `elbo_mcse`, and
        `log_evidence_quarter`: the mean of the estimates from the four quarters of the draws
        (S // 4 each), with `log_evidence_quarter_mcse`, their standard deviation / sqrt(4). In
        nats, but for `ess` and `pareto_k`.

    Raises:
        ValueError: Where `program` is none, has latent sites that rows share, or a guide of
            point masses (`Delta`), which has no importance weights; where data or sizes do not
            fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> dict(evidence.sizes), bool((evidence.elbo < evidence.log_evidence).all())
        ({'datum': 3}, True)
    """
    num_samples = checked_count("num_samples", num_samples, least=4)
    checked_count("max_elements", max_elements)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    with seeded(seed), evaluating(program):
        points = point_masses(program, rows)
        if points:
            raise ValueError(
                "Expected a guide with a density, for importance weights; got a point mass "
                f"(Delta) at {', '.join(points)}."
            )
        plan = Plan.of(program, rows, num_samples, _at_once(program, max_elements))
        drawing = plan.drawing(program, _log_weights(program, plan), num_samples)
        values = {name: np.empty(len(rows)) for name in ATTRIBUTES}
        waiting: list[np.ndarray] = []
        done = 0
        with _bar(len(rows) * num_samples, shown=progress) as bar:
            for piece in plan.pieces():
                row = rows.select(piece, program)
                parts = [drawing(row, n)["log_weights"] for n in plan.parts(num_samples)]
                waiting.append(torch.cat(parts).cpu().numpy())
                if len(waiting) == PIECES_AT_ONCE or piece.stop == len(rows):
                    for name, numbers in estimates(np.concatenate(waiting, axis=1)).items():
                        values[name][done : piece.stop] = numbers
                    done = piece.stop
                    waiting.clear()
                    give_memory_back()
                bar.update(num_samples * (piece.stop - piece.start))
    return labelled(values, rows.labels, num_samples, seed)


def summary(evidence: xr.Dataset) -> pd.DataFrame:
    """Averages the evidence over the rows.

    Arguments:
        evidence: What `log_evidence` returns.

    Returns:
        Indexed by quantity: `log_evidence`, `elbo`, `log_evidence_quarter` and `gap`
        (log_evidence - elbo), in nats per row, and `pareto_k_over`, the share of rows whose
        Pareto k is over `good_k` or not known; columns `mean`, its standard error `se` over the
        rows (Monte Carlo error included), and the Monte Carlo error alone, `mcse` (NaN where not
        estimated).

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> summary(evidence).index.to_list()[:2]
        ['log_evidence', 'elbo']
    """
    known = {
        "log_evidence": "mcse",
        "elbo": "elbo_mcse",
        "log_evidence_quarter": "log_evidence_quarter_mcse",
    }
    means = {name: evidence[name].to_numpy() for name in known}
    errors = {name: _combined(evidence[error].to_numpy()) for name, error in known.items()}
    means["gap"] = means["log_evidence"] - means["elbo"]
    means["pareto_k_over"] = _over(evidence).astype(np.float64)
    table = {
        name: (values.mean(), standard_error(values), errors.get(name, math.nan))
        for name, values in means.items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["mean", "se", "mcse"])


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of a mean, NaN for fewer than two values.

    Arguments:
        values: The values, shape (n,).
    """
    if len(values) < 2:
        return math.nan
    with np.errstate(invalid="ignore"):
        return float(values.std(ddof=1) / math.sqrt(len(values)))


def _combined(errors: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors).sum()) / len(errors))


def _over(evidence: xr.Dataset) -> np.ndarray:
    over: np.ndarray = ~(evidence["pareto_k"].to_numpy() <= evidence.attrs["good_k"])
    return over


def estimates(log_weights: np.ndarray) -> dict[str, np.ndarray]:
    """Computes every per-row number of the evidence.

    Arguments:
        log_weights: log p(x, z) - log q(z | x), shape (S, rows).

    Returns:
        By name, each of shape (rows,).
    """
    size, rows = log_weights.shape
    at_once = max(1, MAX_WEIGHTS // max(size, 1))
    values = {name: np.empty(rows) for name in ATTRIBUTES}
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        for name, numbers in _estimates(log_weights[:, piece].astype(np.float64)).items():
            values[name][piece] = numbers
    return values


def _estimates(log_weights: np.ndarray) -> dict[str, np.ndarray]:
    size = len(log_weights)
    with np.errstate(all="ignore"):
        log_evidence, weights = _log_mean_exp(log_weights)
        mean = weights.mean(axis=0)
        quarters, _ = _log_mean_exp(_quarters(log_weights))
        return {
            "log_evidence": log_evidence,
            "mcse": weights.std(axis=0, ddof=1) / (math.sqrt(size) * mean),
            "ess": weights.sum(axis=0) ** 2 / np.square(weights).sum(axis=0),
            "pareto_k": pareto_k(log_weights),
            "elbo": log_weights.mean(axis=0),
            "elbo_mcse": log_weights.std(axis=0, ddof=1) / math.sqrt(size),
            "log_evidence_quarter": quarters.mean(axis=0),
            "log_evidence_quarter_mcse": quarters.std(axis=0, ddof=1) / math.sqrt(4),
        }


def _quarters(log_weights: np.ndarray) -> np.ndarray:
    size, rows = log_weights.shape
    quarters = log_weights[: size // 4 * 4].reshape(4, size // 4, rows)
    return quarters.swapaxes(0, 1)


def _log_mean_exp(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logarithm of the mean weight, and the weights over the largest of them."""
    top = log_weights.max(axis=0)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(log_weights - top)
    return np.log(weights.mean(axis=0)) + top, weights


def labelled(
    values: dict[str, np.ndarray], names: np.ndarray, num_samples: int, seed: int | None
) -> xr.Dataset:
    """Labels the numbers of the evidence.

    Arguments:
        values: What `estimates` returns.
        names: The labels of the rows.
        num_samples: The number of draws behind them.
        seed: The seed of these, noted.
    """
    variables = {name: ("datum", values[name], ATTRIBUTES[name]) for name in ATTRIBUTES}
    attributes = {
        "num_samples": num_samples,
        "seed": "none" if seed is None else seed,
        "good_k": good_k(num_samples),
    }
    return xr.Dataset(variables, coords={"datum": names}, attrs=attributes)


def _bar(total: int, *, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="evidence", unit=" draws", unit_scale=True, disable=not shown)


def _log_weights(program: nn.Module, plan: Plan) -> Any:
    def log_weights(x: Row, count: int) -> dict[str, Tensor]:
        found = log_densities(program, x, count, known=plan.structure)
        return {"log_weights": found.log_weights}

    return log_weights


def _at_once(program: nn.Module, max_elements: int) -> int:
    """How many elements a tensor has best: on a CPU as many as its caches hold."""
    is_cpu = floating_like(program).device.type == "cpu"
    return min(max_elements, IN_CACHE) if is_cpu else max_elements
