"""Models ranked by log p(x) of the same rows."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import nn

from ..data.read import read
from ..elbos.chunks import MAX_ELEMENTS, data_sites
from ..elbos.log_densities import programs_of, structure
from ..engine.running import evaluating
from ..evidence.log_evidence import log_evidence, standard_error

__all__ = ["compare"]

REMARK = (
    "The standard errors are over rows and draws, for these weights: how much a model changes "
    "from one training seed to another is not in them."
)


def compare(
    programs: Mapping[str, nn.Module],
    x: Any,
    num_samples: int = 1000,
    *,
    context: Any = None,
    weights: Any = None,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Compares programs by the mean log p(x) of the same rows, held out from their training.

    Each estimate is biased downwards, by more for a worse guide, so a difference has a bias of
    its own. How it moves from S / 4 draws to S tells of it: where it moves by more than its
    standard error, a warning says so. All numbers are in nats per row.

    Arguments:
        programs: By name, modules with methods `model(x)` and `guide(x)`.
        x: The data, the same for all.
        num_samples: The number of draws S a row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of a program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of a program.
        max_elements: About how many elements one tensor may have.
        seed: Starts the draws of each program.
        progress: Whether to show bars.

    Returns:
        A row a program, the best first, equal ones in the order given: `log_evidence` and its
        standard error `se` over rows; `difference` from the best, row by row, and its
        `difference_se`; `trend` and its `trend_se`; `elbo` and its standard error over rows,
        `elbo_se`; `pareto_k_over`, the share of rows whose Pareto k is over its limit. Its
        `attrs` hold `num_samples`, `seed`, `num_rows`, `good_k` and a `remark`.

        `trend` is the difference at S draws less that at S / 4. In the first line, where there is
        no difference to move, it is the best program's own `log_evidence` at S less that at S / 4
        (the mean of its four quarters), which is 0 or more in expectation.

    Raises:
        ValueError: Where there is no program, one is none, or their likelihoods have different
            base measures: a mass function cannot be compared with a density.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> poisson = pv.VAE(64, 2, pv.likelihoods.Poisson(), seed=0)
        >>> x = torch.randint(0, 17, (50, 64))
        >>> compare({"binomial": vae, "poisson": poisson}, x, 100).index.to_list()
        ['binomial', 'poisson']
    """
    if not isinstance(programs, Mapping) or not programs:
        raise ValueError(f"Expected a dict of programs by name; got {programs!r}.")
    parts = {"context": context, "weights": weights}
    measures = {}
    for name, program in programs.items():
        with _naming(name):
            measures[name] = _measures(program, x, parts)
    _check_measures(measures)
    options: dict[str, Any] = {"max_elements": max_elements, "seed": seed, "progress": progress}
    evidence = {}
    for name, program in programs.items():
        with _naming(name):
            evidence[name] = log_evidence(program, x, num_samples, **parts, **options)
    table = _table(evidence)
    first = next(iter(evidence.values()))
    table.attrs = {**first.attrs, "num_rows": first.sizes["datum"], "remark": REMARK}
    _warn_of_trends(table)
    return table


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (program {name!r})") from error


def _measures(program: nn.Module, x: Any, parts: dict[str, Any]) -> dict[str, str]:
    programs_of(program)
    rows = read(x, program, **parts)
    with evaluating(program):
        found = structure(program, rows.head(2, program))
    return {site: "mass" if found.discrete[site] else "density" for site in data_sites(found)}


def _check_measures(measures: dict[str, dict[str, str]]) -> None:
    (first, expected), *others = measures.items()
    for name, found in others:
        if not _same_measures(expected, found):
            raise ValueError(
                f"Expected likelihoods with one base measure; got {expected} in {first!r} and "
                f"{found} in {name!r}: a mass and a density cannot be compared."
            )


def _same_measures(one: dict[str, str], other: dict[str, str]) -> bool:
    if one.keys() == other.keys():
        return one == other
    return sorted(one.values()) == sorted(other.values())


def _table(evidence: dict[str, xr.Dataset]) -> pd.DataFrame:
    means = {name: float(data["log_evidence"].mean()) for name, data in evidence.items()}
    order = sorted(means, key=lambda name: np.inf if np.isnan(means[name]) else -means[name])
    best = order[0]
    rows = {name: _line(evidence[name], evidence[best]) for name in order}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _line(evidence: xr.Dataset, best: xr.Dataset) -> dict[str, float]:
    full, quarter, elbo = (
        evidence[name].to_numpy() for name in ("log_evidence", "log_evidence_quarter", "elbo")
    )
    trend = full - quarter
    if evidence is not best:
        trend = trend - (best["log_evidence"] - best["log_evidence_quarter"]).to_numpy()
    difference = full - best["log_evidence"].to_numpy()
    over = ~(evidence["pareto_k"].to_numpy() <= evidence.attrs["good_k"])
    return {
        "log_evidence": full.mean(),
        "se": standard_error(full),
        "difference": difference.mean(),
        "difference_se": standard_error(difference),
        "trend": trend.mean(),
        "trend_se": standard_error(trend),
        "elbo": elbo.mean(),
        "elbo_se": standard_error(elbo),
        "pareto_k_over": over.mean(),
    }


def _warn_of_trends(table: pd.DataFrame) -> None:
    others = table.iloc[1:]
    moved = others["trend"].abs()
    doubtful = others[(moved > others["difference_se"]) & (moved > 2 * others["trend_se"])]
    if len(doubtful):
        names = ", ".join(map(repr, doubtful.index))
        warnings.warn(
            f"From S / 4 to S draws the difference from {table.index[0]!r} moves by more than its "
            f"standard error for {names}: part of it is a difference of guides, not of models. "
            "Take more samples, or better guides.",
            UserWarning,
            stacklevel=3,
        )
