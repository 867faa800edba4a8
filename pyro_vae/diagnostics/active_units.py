"""Latent dimensions that depend on the data."""

from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..data.checks import checked_draws, checked_finite
from ..data.read import read
from ..data.rows import Rows
from ..data.source import Row
from ..data.table import Table
from ..elbos.chunks import MAX_ELEMENTS, Plan
from ..elbos.drawing import Drawing
from ..elbos.log_densities import log_densities, programs_of
from ..engine.progress import progress_bar
from ..engine.running import Site, evaluating, public, seeded
from ..prediction.labels import unit_labels
from ..prediction.traces import trace_of, values_by_row

__all__ = ["active_units"]

PRIOR_DRAWS = 4096
CENTRAL = (0.158655, 0.841345)  # a standard normal's distribution function at -1 and 1
SURE = 3.0  # standard normal quantile of 99.9%


@public
def active_units(
    program: nn.Module,
    x: object,
    num_samples: int = 100,
    *,
    context: object = None,
    weights: object = None,
    threshold: float = 0.01,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Finds the latent dimensions whose posterior mean moves with the data.

    .. math:: A_u = \mathrm{Var}_x\, \mathrm{E}_{q(z \mid x)}[z_u] / \mathrm{Var}_p(z_u) > 0.01

    Each dimension is measured in units of its standard deviation under the prior, so that the
    same model with a rescaled z has the same active dimensions. If the prior has no variance in
    closed form, or an infinite one, the unit is half the width of the central 68.3% of its draws.

    The posterior mean is the mean of S draws, and the variance that this adds, `within` / S, is
    subtracted. A dimension is active if the variance is above the threshold by more than chance
    explains. With N rows, :math:`s^2` the variance over rows of the means of draws, and threshold
    t, the ratio :math:`s^2 / (t + \mathrm{within} / S)` has approximately an F distribution with
    N - 1 and N(S - 1) degrees of freedom if the true variance is t. Its transform to a standard
    normal variable (Paulson) must be above 3, a probability of 0.1%.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        An approximate normalization of the analysis of variance distribution (Paulson, 1942),
        doi 10.1214/aoms/1177731608.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, two rows or more.
        num_samples: The number of draws of each row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        threshold: The variance above which a unit is active, relative to that of the prior.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws. With `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        A line a latent dimension (`z[0]`, `z[1]`, ...): `variance`, its standard error `se` over
        rows and draws, and `within`, the mean variance of q(z | x), all relative to the variance
        of the prior; `prior_scale`, the unit of measurement, in the units of z; and whether it is
        `active`. Its `attrs` hold the `seed`.

    Raises:
        ValueError: If `program` is not a program, if there are fewer than two rows or draws, or
            if the data do not fit the program.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0)
        >>> active_units(vae, torch.randn(10, 3), seed=0).index.to_list()
        ['z[0]', 'z[1]']
    """
    num_samples = checked_draws("num_samples", num_samples, least=2)
    threshold = checked_finite("threshold", threshold, least=0.0)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    if len(rows) < 2:
        raise ValueError(f"Expected two rows or more; got {len(rows)}.")
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    pieces = []
    with (
        seeded(seed),
        evaluating(program),
        progress_bar(len(rows), "active units", " rows", progress=progress) as bar,
    ):
        plan = Plan.of(program, rows, num_samples, max_elements)
        scales = _prior_scales(program, rows, plan, max_elements)

        def values(x: Row, count: int) -> dict[str, Tensor]:
            return log_densities(program, x, count, known=plan.structure).values

        drawing = plan.drawing(program, values, num_samples)
        for piece in plan.pieces():
            selected = rows.select(piece, program)
            pieces.append(_moments(drawing, selected, plan.parts(num_samples)))
            bar.update(piece.stop - piece.start)
    tables = []
    for site in pieces[0]:
        means, within = (np.concatenate(parts) for parts in zip(*(p[site] for p in pieces)))
        tables.append(_table(site, means, within, scales[site], num_samples, threshold))
    table = pd.concat(tables)
    table.attrs = {"seed": seed}
    return table


def _prior_scales(
    program: nn.Module, rows: Rows, plan: Plan, max_elements: int
) -> dict[str, np.ndarray]:
    """The standard deviation of each latent site under the prior, with other latents drawn."""
    model, _ = programs_of(program)
    index = torch.arange(PRIOR_DRAWS, device=rows.device) * len(rows) // PRIOR_DRAWS
    draws: dict[str, list[Tensor]] = {name: [] for name in plan.structure.latents}
    moments: dict[str, list[Tensor]] = {name: [] for name in plan.structure.latents}
    for few in index.split(max(1, max_elements // plan.elements)):
        nodes = trace_of(model, rows.select(few, program)).nodes
        for name in draws:
            site: Site = nodes[name]
            draws[name].append(values_by_row(site).double())
            with suppress(NotImplementedError, AttributeError):  # no moments in closed form
                pair = (site["fn"].mean, site["fn"].variance)
                moments[name].append(torch.stack([values_by_row(site, m) for m in pair]).double())
    scales = {}
    for name, parts in draws.items():
        drawn = torch.cat(parts).cpu().numpy()
        below, above = np.quantile(drawn, CENTRAL, axis=0)
        scale = np.where(above > below, (above - below) / 2, drawn.std(axis=0))
        if moments[name]:
            mean, variance = torch.cat(moments[name], dim=1)
            total = (variance.mean(0) + mean.var(0)).cpu().numpy()
            scale = np.where(np.isfinite(total), np.sqrt(total), scale)
        scales[name] = scale
    return scales


def _moments(
    drawing: Drawing, x: Row, counts: list[int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The mean and the variance over draws of each latent site, by row."""
    parts = [drawing(x, count) for count in counts]
    draws = {site: torch.cat([part[site] for part in parts]).double() for site in parts[0]}
    return {s: (d.mean(0).cpu().numpy(), d.var(0).cpu().numpy()) for s, d in draws.items()}


def _table(
    site: str,
    means: np.ndarray,
    within: np.ndarray,
    scale: np.ndarray,
    num_samples: int,
    threshold: float,
) -> pd.DataFrame:
    labels, rows, scale = unit_labels(site, means.shape[1:]), len(means), scale.reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a prior that is a point has scale 0
        means, within = means.reshape(rows, -1) / scale, within.reshape(rows, -1) / scale**2
        squares = np.square(means - means.mean(0)) * rows / (rows - 1)
        by_row = squares - within / num_samples
        noise = threshold + within.mean(0) / num_samples
        columns = {
            "variance": by_row.mean(0),
            "se": by_row.std(axis=0, ddof=1) / np.sqrt(rows),
            "within": within.mean(0),
            "prior_scale": scale,
            "active": _is_larger(squares.mean(0), noise, rows - 1, rows * (num_samples - 1)),
        }
    return Table(columns, index=pd.Index(labels, name="unit"))


def _is_larger(one: np.ndarray, other: np.ndarray, df: int, other_df: int) -> np.ndarray:
    """Whether the ratio of two variances is above 1 by more than chance, by Paulson's formula."""
    share, other_share = 2 / (9 * df), 2 / (9 * other_df)
    root, other_root = np.cbrt(one), np.cbrt(other)
    distance = (1 - other_share) * root - (1 - share) * other_root
    is_larger: np.ndarray = distance > SURE * np.hypot(
        np.sqrt(other_share) * root, np.sqrt(share) * other_root
    )
    return is_larger
