"""Reconstructions: the posterior predictive distribution of each row."""

import math
from typing import Any

import torch
import xarray as xr
from pyro.distributions import MaskedDistribution
from torch import Tensor, nn
from torch.distributions import Categorical, Independent

from ..data.checks import checked_draws, is_number, short
from ..data.read import read
from ..data.rows import Rows
from ..data.source import Row
from ..elbos.chunks import MAX_ELEMENTS, Plan, data_sites
from ..elbos.log_densities import Structure, programs_of
from ..engine.progress import progress_bar
from ..engine.running import evaluating, public, seeded
from .traces import predictive_trace, values_by_row

__all__ = ["central_interval", "reconstruct"]

ATTRIBUTES = {
    "probability": "posterior predictive probability of each category of {site}",
    "probability_mcse": "Monte Carlo standard error of probability",
    "mode": "most probable category of {site}",
    "mean": "mean of the replicates of {site}",
    "mcse": "Monte Carlo standard error of mean",
    "lower": "lower bound of the central interval of the replicates of {site}",
    "lower_mcse": "Monte Carlo standard error of lower (from order statistics)",
    "upper": "upper bound of the central interval of the replicates of {site}",
    "upper_mcse": "Monte Carlo standard error of upper (from order statistics)",
}

MISSING = {
    "mean": "the likelihood has no finite mean there",
    "mcse": "the likelihood has no finite variance there",
}

ROUNDING = 1e-9


@public
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

    Codes of categories have no mean and no order. For a `Categorical` site the result is the
    probability of each category, averaged over the draws of z, and the mode.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: The data, shape (rows, \*event), or a dict of tensors.
        context: Covariates of the rows, shape (rows, \*context). The program reads them as
            `row["context"]`.
        weights: The weight of each row, shape (rows,). The program reads it as `row["weight"]`.
        site: The name of the observed site that is predicted. It is needed only if the model has
            several.
        num_samples: The number of draws S of x' for each row, 2 or more.
        prob: The probability of the central interval. It needs 2 / (1 - prob) - 1 draws, 19 for
            0.9, since the interval from the smallest of S draws to the largest covers a new draw
            with probability (S - 1) / (S + 1).
        max_elements: The approximate maximum number of elements of one tensor, to limit memory.
        seed: The seed of the draws; if `None`, torch's global generator is used.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `program` has no `model` and `guide`, the data do not fit it, an argument
            is out of range, there are too few draws for the interval, or the model has several
            observed sites and `site` is `None`.

    Returns:
        A dataset with the dims `datum` and those of the site, `{site}_dim_0`, ..., labelled by
        the rows and columns of x. Its variables, in the units of x, are the `mean` of x', the
        bounds `lower` and `upper` of the interval, and their Monte Carlo standard errors `mcse`,
        `lower_mcse`, `upper_mcse`. `mean` is NaN if the likelihood has no finite mean, such as a
        Cauchy distribution, and `mcse` if it has no finite variance; the attribute `missing` of
        the variable then says so. The interval covers a new draw with a probability of at least
        `prob`, averaged over the draws. The error of a bound is half the distance between the
        order statistics one binomial standard deviation, sqrt(S p (1 - p)), below and above its
        rank, where p is the probability outside the interval on one side. If fewer draws lie
        outside, the distance to the outermost draw is scaled up.

        For categories the variables are `probability` and `probability_mcse`, with the further
        dim `category`, and `mode`, the code of the most probable one.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> found = reconstruct(vae, torch.ones(3, 64), seed=0)
        >>> found["mean"].dims, bool((found["lower"] <= found["upper"]).all())
        (('datum', 'x_dim_0'), True)
    """
    num_samples = checked_draws("num_samples", num_samples, least=2)
    if not is_number(prob) or not 0.0 < prob < 1.0:
        raise ValueError(f"Expected prob with 0 < prob < 1; got {short(prob)}.")
    least = math.ceil(2.0 / (1.0 - prob) - 1.0 - ROUNDING)
    if num_samples < least:
        raise ValueError(
            f"Expected num_samples of at least {least} for an interval of probability {prob:g}; "
            f"got {num_samples}, whose widest interval has "
            f"{(num_samples - 1) / (num_samples + 1):.2f}. Draw more, or lower prob."
        )
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    with evaluating(program):
        with seeded(0):
            plan = Plan.of(program, rows, num_samples, max_elements, predictive_trace)
        site = _data_site(plan.structure, site)
        with (
            seeded(seed),
            progress_bar(len(rows), "reconstruct", " rows", progress=progress) as bar,
        ):
            pieces = []
            for piece in plan.pieces():
                part = rows.select(piece, program)
                found = _predicted(program, part, site, plan, num_samples, prob)
                pieces.append({name: value.cpu() for name, value in found.items()})
                bar.update(piece.stop - piece.start)
    arrays = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return _labelled(arrays, rows, {"site": site, "num_samples": num_samples, "prob": prob})


def _data_site(known: Structure, site: str | None) -> str:
    sites = data_sites(known)
    if site is None and len(sites) == 1:
        return sites[0]
    if site not in sites:
        raise ValueError(
            f"Expected site to be one of the observed sites of the model, {list(sites)}; got "
            f"{site!r}."
        )
    return site


def _predicted(
    program: nn.Module, x: Row, site: str, plan: Plan, num_samples: int, prob: float
) -> dict[str, Tensor]:
    """The summaries of the replicates of some rows."""
    draws, moments, probabilities = [], [], []
    for count in plan.parts(num_samples):
        drawn = predictive_trace(program, x, count, plan.structure).nodes[site]
        categories = _categories(drawn["fn"])
        if categories is None:
            draws.append(values_by_row(drawn).double())
            moments.append(_moments(drawn))
        else:
            table = [values_by_row(drawn, share) for share in categories.probs.unbind(-1)]
            shares = torch.stack(table, -1).double()
            probabilities.append(torch.stack([shares.sum(0), shares.square().sum(0)]))
    if probabilities:
        mean, square = torch.stack(probabilities).sum(0) / num_samples
        error = ((square - mean.square()).clamp(min=0.0) / (num_samples - 1)).sqrt()
        return {"probability": mean, "probability_mcse": error, "mode": mean.argmax(-1)}
    replicates = torch.cat(draws)
    has_mean, has_variance = torch.stack(moments).all(0)
    mean, error = replicates.mean(0), replicates.std(0) / num_samples**0.5
    return {
        "mean": mean.where(has_mean, math.nan),
        "mcse": error.where(has_variance, math.nan),
    } | central_interval(replicates, prob)


def _categories(law: Any) -> Categorical | None:
    """The distribution of the single elements of a site, if they are categories."""
    match law:
        case Categorical():
            return law
        case Independent() | MaskedDistribution():
            return _categories(law.base_dist)
        case _:
            return None


def _moments(site: Any) -> Tensor:
    """Whether the mean and the variance are finite at all draws, shape (2, rows, ...).

    A distribution without a formula for them is taken to have both.
    """
    law = site["fn"]
    try:
        moments = [law.mean, law.variance]
    except NotImplementedError:
        moments = [torch.zeros_like(site["value"])] * 2
    has_mean, has_variance = (values_by_row(site, m).isfinite().all(0) for m in moments)
    return torch.stack([has_mean, has_mean & has_variance])


def central_interval(draws: Tensor, prob: float) -> dict[str, Tensor]:
    """Returns the bounds of the central interval of draws, and their Monte Carlo errors.

    As many draws lie below the interval as above it: r - 1 with the integer
    r <= (S + 1) (1 - prob) / 2. Over all draws, the interval between the order statistics of ranks
    r and S + 1 - r covers a new one with probability 1 - 2 r / (S + 1), or more if values tie.

    Arguments:
        draws: The draws, shape (S, ...).
        prob: The probability of the interval.

    Returns:
        `lower`, `lower_mcse`, `upper` and `upper_mcse`, each of the shape of one draw.
    """
    size, share = len(draws), (1.0 - prob) / 2.0
    outside = min(max(int(share * (size + 1) + ROUNDING) - 1, 0), (size - 1) // 2)
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
    own = rows.coords(site, tuple(next(reversed(arrays.values())).shape[1:]))
    coords: dict[str, Any] = {"datum": rows.labels} | own
    variables = {}
    for name, array in arrays.items():
        is_probability = name.startswith("probability")
        units = "1" if is_probability else f"those of {site}"
        about = {"long_name": ATTRIBUTES[name].format(site=site), "units": units}
        if is_probability:
            coords["category"] = range(array.shape[-1])
        count = int(array.isnan().sum()) if name in MISSING else 0
        if count:
            about["missing"] = f"{count} of {array.numel()} cells: {MISSING[name]}"
        dims = ("datum", *own, *(["category"] if is_probability else []))
        variables[name] = (dims, array.numpy(), about)
    return xr.Dataset(variables, coords, attrs)
