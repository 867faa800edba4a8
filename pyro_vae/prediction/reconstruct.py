"""Reconstructions: the posterior predictive distribution of each row."""

import math
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from ..data.read import read
from ..data.rows import Rows
from ..elbos.chunks import MAX_ELEMENTS, Plan, data_sites
from ..engine.progress import progress_bar
from ..engine.running import evaluating, seeded
from .traces import predictive_trace, values_by_row

__all__ = ["central_interval", "reconstruct"]

ATTRIBUTES = {
    "mean": "mean of the replicates of {site}",
    "mcse": "Monte Carlo standard error of mean",
    "lower": "lower bound of the central interval of the replicates of {site}",
    "lower_mcse": "Monte Carlo standard error of lower (from order statistics)",
    "upper": "upper bound of the central interval of the replicates of {site}",
    "upper_mcse": "Monte Carlo standard error of upper (from order statistics)",
}


def reconstruct(
    program: nn.Module,
    x: Any,
    *,
    site: str | None = None,
    num_samples: int = 200,
    prob: float = 0.9,
    max_elements: int = MAX_ELEMENTS,
    context: Any = None,
    weights: Any = None,
    seed: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Predicts replicates x' of rows from their posterior: the posterior predictive distribution.

    .. math:: p(x' \mid x) = \int p(x' \mid z)\, q(z \mid x)\, dz

    z is drawn from the guide and x' from the model at that z, with the program in evaluation mode.
    Latent sites that all rows share are drawn as well. If the model has several observed sites,
    all of them are drawn anew, so that one may depend on another.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: The data, shape (rows, \*event), or a dict of tensors.
        context: Covariates of the rows, shape (rows, \*context). The program reads them as
            `row["context"]`.
        weights: The weight of each row, shape (rows,). The program reads it as `row["weight"]`.
        site: The name of the observed site that is predicted. It is needed only if the model has
            several.
        num_samples: The number of draws S of x' for each row, 2 or more.
        prob: The probability of the central interval.
        max_elements: The approximate maximum number of elements of one tensor, to limit memory.
        seed: The seed of the draws; if `None`, torch's global generator is used.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `program` has no `model` and `guide`, the data do not fit it, an argument
            is out of range, or the model has several observed sites and `site` is `None`.

    Returns:
        A dataset with the dims `datum` and those of the site, `{site}_dim_0`, ..., labelled by
        the rows and columns of x. Its variables, in the units of x, are the `mean` of x', the
        bounds `lower` and `upper` of the interval, and their Monte Carlo standard errors `mcse`,
        `lower_mcse`, `upper_mcse`. The
        error of a bound is half the distance between the order statistics one binomial standard
        deviation, sqrt(S p (1 - p)), below and above its rank, where p is the probability outside
        the interval on one side. If fewer draws lie outside, the distance to the outermost draw
        is scaled up.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> found = reconstruct(vae, torch.ones(3, 64), seed=0)
        >>> found["mean"].dims, bool((found["lower"] <= found["upper"]).all())
        (('datum', 'x_dim_0'), True)
    """
    if not (isinstance(num_samples, int) and num_samples > 1 and 0.0 < prob < 1.0):
        raise ValueError(
            f"Expected num_samples > 1 and 0 < prob < 1; got {num_samples} and {prob}."
        )
    rows = read(x, program, context=context, weights=weights)
    with evaluating(program):
        with seeded(0):
            plan = Plan.of(program, rows, num_samples, max_elements, predictive_trace)
        sites = data_sites(plan.structure)
        if site is None and len(sites) == 1:
            site = sites[0]
        if site not in sites:
            raise ValueError(
                f"Expected site to be one of the observed sites of the model, {list(sites)}; got "
                f"{site!r}."
            )
        with (
            seeded(seed),
            progress_bar(len(rows), "reconstruct", " rows", progress=progress) as bar,
        ):
            pieces = []
            for piece in plan.pieces():
                row, counts = rows.select(piece, program), plan.parts(num_samples)
                traces = (predictive_trace(program, row, n, plan.structure) for n in counts)
                draws = torch.cat([values_by_row(t.nodes[site]).double() for t in traces])
                moments = {"mean": draws.mean(0), "mcse": draws.std(0) / num_samples**0.5}
                found = moments | central_interval(draws, prob)
                pieces.append({name: value.cpu() for name, value in found.items()})
                bar.update(piece.stop - piece.start)
    arrays = {name: torch.cat([piece[name] for piece in pieces]) for name in ATTRIBUTES}
    return _labelled(arrays, rows, {"site": site, "num_samples": num_samples, "prob": prob})


def central_interval(draws: Tensor, prob: float) -> dict[str, Tensor]:
    """Returns the bounds of the central interval of draws, and their Monte Carlo errors.

    As many draws lie below the interval as above it.

    Arguments:
        draws: The draws, shape (S, ...).
        prob: The probability of the interval.

    Returns:
        `lower`, `lower_mcse`, `upper` and `upper_mcse`, each of the shape of one draw.
    """
    size, share = len(draws), (1.0 - prob) / 2.0
    outside = min(max(round(share * (size + 1)) - 1, 0), (size - 1) // 2)
    step = max(1, round(math.sqrt(size * share * (1.0 - share))))
    inner, outer = min(outside + step, size - 1), max(outside - step, 0)
    scale = step / (inner - outer)
    from_below = draws.sort(0).values
    from_above = from_below.flip(0)
    return {
        "lower": from_below[outside],
        "lower_mcse": (from_below[inner] - from_below[outer]) * scale,
        "upper": from_above[outside],
        "upper_mcse": (from_above[outer] - from_above[inner]) * scale,
    }


def _labelled(arrays: dict[str, Tensor], rows: Rows, attrs: dict[str, Any]) -> xr.Dataset:
    site = attrs["site"]
    own = rows.coords(site, tuple(arrays["mean"].shape[1:]))
    variables = {
        name: (
            ("datum", *own),
            array.numpy(),
            {"long_name": ATTRIBUTES[name].format(site=site), "units": f"those of {site}"},
        )
        for name, array in arrays.items()
    }
    return xr.Dataset(variables, {"datum": rows.labels} | own, attrs)
