"""Which latent dimensions a posterior uses."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..data.checks import checked_count
from ..data.read import read
from ..data.source import Row
from ..elbos.chunks import MAX_ELEMENTS, Plan
from ..elbos.log_densities import log_densities, programs_of
from ..engine.running import evaluating, seeded
from ..prediction.labels import unit_labels

__all__ = ["active_units"]


def active_units(
    program: nn.Module,
    x: Any,
    num_samples: int = 100,
    *,
    context: Any = None,
    weights: Any = None,
    threshold: float = 0.01,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
) -> pd.DataFrame:
    r"""Finds the latent dimensions whose posterior mean moves with the data.

    .. math:: A_u = \mathrm{Var}_x \, \mathrm{E}_{q(z \mid x)}[z_u] > 0.01

    The posterior mean is that of draws; the variance that their number adds is taken off.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, two rows or more.
        num_samples: The number of draws a row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        threshold: The variance over which a unit is active.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws; with `None` torch's generator continues.

    Returns:
        A row a latent dimension (`z[0]`, `z[1]`, ...): `variance`, its standard error over rows
        `se`, `within`, the mean variance of q(z | x) itself, and whether it is `active`.

    Raises:
        ValueError: If `program` is not a program, there are fewer than two rows or draws, or the
            data do not fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0)
        >>> active_units(vae, torch.randn(10, 3), seed=0).index.to_list()
        ['z[0]', 'z[1]']
    """
    num_samples = checked_count("num_samples", num_samples, least=2)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    if len(rows) < 2:
        raise ValueError(f"Expected two rows or more; got {len(rows)}.")
    with seeded(seed), evaluating(program):
        plan = Plan.of(program, rows, num_samples, max_elements)
        drawing = plan.drawing(program, _values(program, plan), num_samples)
        pieces = [
            _moments(drawing, rows.select(piece, program), plan, num_samples)
            for piece in plan.pieces()
        ]
    tables = []
    for site in pieces[0]:
        means, within = (np.concatenate(parts) for parts in zip(*(p[site] for p in pieces)))
        tables.append(_table(site, means, within, num_samples))
    table = pd.concat(tables)
    table["active"] = table["variance"] > threshold
    return table


def _values(program: nn.Module, plan: Plan) -> Any:
    def values(x: Row, count: int) -> dict[str, Tensor]:
        return log_densities(program, x, count, known=plan.structure).values

    return values


def _moments(
    drawing: Any, x: Row, plan: Plan, num_samples: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    parts = [drawing(x, count) for count in plan.parts(num_samples)]
    return {
        site: _mean_and_variance(torch.cat([part[site] for part in parts])) for site in parts[0]
    }


def _mean_and_variance(draws: Tensor) -> tuple[np.ndarray, np.ndarray]:
    draws = draws.double()
    return draws.mean(0).cpu().numpy(), draws.var(0).cpu().numpy()


def _table(site: str, means: np.ndarray, within: np.ndarray, num_samples: int) -> pd.DataFrame:
    labels = unit_labels(site, means.shape[1:])
    means, within = means.reshape(len(means), -1), within.reshape(len(within), -1).mean(0)
    squares = np.square(means - means.mean(0))
    error = squares.std(axis=0, ddof=1) / np.sqrt(len(means))
    variance = squares.sum(0) / (len(means) - 1) - within / num_samples
    columns = {"variance": variance, "se": error, "within": within}
    return pd.DataFrame(columns, index=pd.Index(labels, name="unit"))
