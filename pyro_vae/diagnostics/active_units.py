"""Latent dimensions that depend on the data."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..data.checks import checked_count
from ..data.read import read
from ..data.source import Row
from ..elbos.chunks import MAX_ELEMENTS, Plan
from ..elbos.log_densities import log_densities, programs_of
from ..engine.progress import progress_bar
from ..engine.running import evaluating, seeded
from ..prediction.labels import unit_labels

__all__ = ["active_units"]


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

    .. math:: A_u = \mathrm{Var}_x \, \mathrm{E}_{q(z \mid x)}[z_u] > 0.01

    The posterior mean is the mean of draws. The variance that this adds is subtracted.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, two rows or more.
        num_samples: The number of draws of each row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        threshold: The variance above which a unit is active.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws. With `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        A line a latent dimension (`z[0]`, `z[1]`, ...): `variance`, its standard error `se` over
        rows, `within`, the mean variance of q(z | x), and whether it is `active`. Its `attrs` hold
        the `seed`.

    Raises:
        ValueError: If `program` is not a program, if there are fewer than two rows or draws, or
            if the data do not fit the program.

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
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    pieces = []
    with (
        seeded(seed),
        evaluating(program),
        progress_bar(len(rows), "active units", " rows", progress=progress) as bar,
    ):
        plan = Plan.of(program, rows, num_samples, max_elements)

        def values(x: Row, count: int) -> dict[str, Tensor]:
            return log_densities(program, x, count, known=plan.structure).values

        drawing = plan.drawing(program, values, num_samples)
        for piece in plan.pieces():
            selected = rows.select(piece, program)
            parts = [drawing(selected, count) for count in plan.parts(num_samples)]
            draws = {site: torch.cat([p[site] for p in parts]).double() for site in parts[0]}
            pieces.append(
                {s: (d.mean(0).cpu().numpy(), d.var(0).cpu().numpy()) for s, d in draws.items()}
            )
            bar.update(piece.stop - piece.start)
    tables = []
    for site in pieces[0]:
        means, within = (np.concatenate(parts) for parts in zip(*(p[site] for p in pieces)))
        index = pd.Index(unit_labels(site, means.shape[1:]), name="unit")
        means, within = means.reshape(len(means), -1), within.reshape(len(within), -1).mean(0)
        squares = np.square(means - means.mean(0))
        error = squares.std(axis=0, ddof=1) / np.sqrt(len(means))
        variance = squares.sum(0) / (len(means) - 1) - within / num_samples
        columns = {"variance": variance, "se": error, "within": within}
        tables.append(pd.DataFrame(columns, index=index))
    table = pd.concat(tables)
    table["active"] = table["variance"] > threshold
    table.attrs = {"seed": seed}
    return table
