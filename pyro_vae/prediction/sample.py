"""New rows from the model of a program."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ..data.checks import checked_draws
from ..data.read import read
from ..elbos.log_densities import Program, latent_sites, programs_of
from ..engine.running import evaluating, public, seeded
from .traces import holds_rows, trace_of, values_by_row

__all__ = ["sample", "sample_sites"]


@public
def sample(
    program: nn.Module,
    num_rows: int,
    *,
    x: Any = None,
    context: Any = None,
    weights: Any = None,
    seed: int | None = None,
) -> Tensor | dict[str, Tensor]:
    r"""Draws new rows from the model: the prior predictive distribution p(x).

    z is drawn from the prior and x from the likelihood at that z, with the program in evaluation
    mode. A model that can run without data takes the number of rows as `size=`, as the model of a
    `VAE` does. Any other model, one with covariates for example, runs on the rows `x`: it reads
    its covariates from them, and its observed sites are drawn anew. Latent sites that all rows
    share are drawn once, for all new rows.

    Arguments:
        program: A module with the Pyro programs `model` and `guide`.
        num_rows: The number of rows n.
        x: Rows to run the model on. New row i is drawn given the covariates of row i of x. If x
            has fewer than n rows, they are repeated in order.
        context: Covariates of the rows, shape (rows, \*context). The program reads them as
            `row["context"]`.
        weights: The weight of each row, shape (rows,). The program reads it as `row["weight"]`.
        seed: The seed of the draws; if `None`, torch's global generator is used.

    Raises:
        ValueError: If `program` has no `model` and `guide`, `num_rows` is not a positive integer,
            the model needs rows and `x` is `None`, or it has no observed site.

    Returns:
        The new rows, shape (n, \*event), if the model has one observed site; otherwise a dict of
        them by site.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> sample(vae, 3, seed=0).shape
        torch.Size([3, 64])
    """
    beside = {"context": context, "weights": weights}
    drawn = sample_sites(program, num_rows, x=x, seed=seed, **beside)
    return next(iter(drawn.values())) if len(drawn) == 1 else drawn


def sample_sites(
    program: nn.Module,
    num_rows: int,
    *,
    x: Any,
    seed: int | None,
    context: Any = None,
    weights: Any = None,
) -> dict[str, Tensor]:
    """Does the work of :func:`sample`, and returns the new rows by observed site.

    Arguments:
        program: A module with the Pyro programs `model` and `guide`.
        num_rows: The number of rows n.
        x: Rows to run the model on, or `None`.
        seed: The seed of the draws; if `None`, torch's global generator is used.
        context: Covariates of the rows x.
        weights: The weight of each row of x.
    """
    num_rows = checked_draws("num_rows", num_rows)
    model, guide = programs_of(program)
    model = poutine.uncondition(model)
    with evaluating(program):
        if x is None:
            if context is not None or weights is not None:
                raise ValueError("Covariates and weights belong to rows: pass the rows as x.")
            latents = _latents(guide, size=2)
            with seeded(seed):
                trace = trace_of(model, size=num_rows)
        else:
            rows = read(x, program, context=context, weights=weights)
            latents = _latents(guide, rows.head(2, program))
            repeated = rows.select(torch.arange(num_rows, device=rows.device) % len(rows), program)
            with seeded(seed):
                trace = trace_of(model, repeated)
    drawn = {
        name: values_by_row(site)
        for name, site in trace.nodes.items()
        if name not in latents and holds_rows(site)
    }
    if not drawn:
        raise ValueError(
            "The model has no observed site in the plate 'data', so there are no rows to draw."
        )
    return drawn


def _latents(guide: Program, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
    """Returns the sites that the guide draws, from a run on two rows."""
    try:
        with seeded(0):
            return dict(latent_sites(trace_of(guide, *args, **kwargs)))
    except TypeError as error:
        if not kwargs:
            raise
        raise ValueError(
            f"The program cannot run without data ({error}). Pass rows as x=: new "
            "rows are drawn given their covariates, and the observed sites are drawn anew."
        ) from error
