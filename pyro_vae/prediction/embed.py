"""Embeddings: the mean and the standard deviation of the latents of each row."""

from typing import Any, TypeAlias

import torch
import xarray as xr
from torch import Tensor, nn

from ..data.checks import checked_draws
from ..data.read import read
from ..data.rows import Rows
from ..data.source import Row
from ..elbos.chunks import MAX_ELEMENTS, Plan
from ..elbos.log_densities import latent_sites, programs_of, structure
from ..engine.progress import progress_bar
from ..engine.running import evaluating, public, seeded
from .labels import unit_labels
from .traces import guide_trace, values_by_row

__all__ = ["embed"]

Moments: TypeAlias = dict[str, dict[str, Tensor]]  # the mean, the sd and their errors of each site

ATTRIBUTES = {
    "mean": "mean of z under the guide q(z | x)",
    "mean_mcse": "Monte Carlo standard error of mean",
    "sd": "standard deviation of z under the guide q(z | x)",
    "sd_mcse": "Monte Carlo standard error of sd (delta method)",
}


@public
def embed(
    program: nn.Module,
    x: Any,
    *,
    num_samples: int = 200,
    max_elements: int = MAX_ELEMENTS,
    context: Any = None,
    weights: Any = None,
    seed: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Returns the mean and the standard deviation of z for each row.

    .. math:: \mathrm{E}_{q(z \mid x)}[z_u], \qquad \mathrm{sd}_{q(z \mid x)}(z_u)

    If the guide has one latent site, and its distribution has a mean and a standard deviation in
    closed form, these are returned, and their Monte Carlo errors are 0. Otherwise they are
    estimated from draws. The program runs in evaluation mode. Latent sites that all rows share
    are drawn with the others, and averaged over; they are not part of the result.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: The data, shape (rows, \*event), or a dict of tensors.
        context: Covariates of the rows, shape (rows, \*context). The program reads them as
            `row["context"]`.
        weights: The weight of each row, shape (rows,). The program reads it as `row["weight"]`.
        num_samples: The number of draws S for each row, 2 or more, if there is no closed form.
        max_elements: The approximate maximum number of elements of one tensor, to limit memory.
        seed: The seed of the draws; if `None`, torch's global generator is used.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `program` has no `model` and `guide`, the data do not fit it, or it has
            no latent site in the plate `"data"`.

    Returns:
        A dataset with dims `datum` and `latent`. The elements of all latent sites of a row are
        labelled `z[0]`, `z[1]`, ... Its variables are `mean` and `sd` of z, and their Monte Carlo
        standard errors, all in the units of z: `mean_mcse` is sd / sqrt(S), and `sd_mcse` is the
        standard error of the variance divided by 2 sd. The attribute `method` is
        `"closed form"` or `"draws"`.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> found = embed(vae, torch.ones(3, 64))
        >>> found["mean"].dims, found["latent"].values.tolist(), found.attrs["method"]
        (('datum', 'latent'), ['z[0]', 'z[1]'], 'closed form')
    """
    num_samples = checked_draws("num_samples", num_samples, least=2)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    with evaluating(program):
        known = structure(program, rows.head(2, program))
        if not known.latents:
            shared = ", ".join(known.global_latents) or "none"
            raise ValueError(
                "An embedding needs a latent site for each row, in the plate 'data'; the program "
                f"has only latent sites that all rows share: {shared}."
            )
        with seeded(0):
            plan = Plan.of(program, rows, num_samples, max_elements, guide_trace)
        is_closed = _in_closed_form(program, rows.head(2, program), plan) is not None
        bar = progress_bar(len(rows), "embed", " rows", progress=progress)
        with seeded(seed), bar:
            pieces = []
            for piece in plan.pieces():
                data = rows.select(piece, program)
                exact = _in_closed_form(program, data, plan) if is_closed else None
                pieces.append(exact or _by_draws(program, data, plan, num_samples))
                bar.update(piece.stop - piece.start)
    attrs = (
        {"method": "closed form"} if is_closed else {"method": "draws", "num_samples": num_samples}
    )
    return _labelled(pieces, rows, attrs)


def _in_closed_form(program: nn.Module, x: Row, plan: Plan) -> Moments | None:
    """Returns the moments of the only site of the guide, if its distribution has them."""
    with seeded(0):
        trace = guide_trace(program, x, 1, plan.structure)
    sites = latent_sites(trace)
    if len(sites) != 1:
        return None
    ((name, site),) = sites
    try:
        moments = {"mean": site["fn"].mean, "sd": site["fn"].stddev}
    except (NotImplementedError, AttributeError):
        return None
    found = {key: values_by_row(site, value)[0].double() for key, value in moments.items()}
    if found["mean"].isnan().any():  # torch's Categorical, whose mean is NaN
        return None
    zero = torch.zeros_like(found["mean"])
    return {name: found | {"mean_mcse": zero, "sd_mcse": zero}}


def _by_draws(program: nn.Module, x: Row, plan: Plan, num_samples: int) -> Moments:
    counts, moments = plan.parts(num_samples), {}
    parts = [guide_trace(program, x, count, plan.structure).nodes for count in counts]
    for name in plan.structure.latents:
        draws = torch.cat([values_by_row(part[name]) for part in parts]).double()
        root, mean, sd = num_samples**0.5, draws.mean(0), draws.std(0)
        error = ((draws - mean).square().std(0) / (2 * sd * root)).where(sd > 0, sd)
        moments[name] = {"mean": mean, "mean_mcse": sd / root, "sd": sd, "sd_mcse": error}
    return moments


def _labelled(pieces: list[Moments], rows: Rows, attrs: dict[str, Any]) -> xr.Dataset:
    shapes = {site: tuple(found["mean"].shape[1:]) for site, found in pieces[0].items()}
    labels = [label for site, shape in shapes.items() for label in unit_labels(site, shape)]
    variables = {}
    for name, meaning in ATTRIBUTES.items():
        columns = [
            torch.cat([piece[site][name] for piece in pieces]).reshape(len(rows), -1).cpu()
            for site in shapes
        ]
        about = {"long_name": meaning, "units": "those of z"}
        variables[name] = (("datum", "latent"), torch.cat(columns, 1).numpy(), about)
    return xr.Dataset(variables, {"datum": rows.labels, "latent": labels}, attrs)
