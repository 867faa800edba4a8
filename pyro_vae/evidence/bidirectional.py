"""Lower and upper bounds of log p(x) on rows that were simulated from the model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor, nn

from ..data.checks import checked_choice, checked_draws
from ..data.read import read
from ..data.rows import Rows
from ..data.table import Table
from ..elbos.log_densities import programs_of
from ..engine.running import evaluating, public, seeded
from ..prediction.sample import sample_sites
from ..prediction.traces import values_by_row
from .annealed import STARTS, annealed
from .hmc import space_of
from .log_evidence import estimates, standard_error

__all__ = ["bidirectional"]


@public
def bidirectional(
    program: nn.Module,
    num_rows: int = 100,
    num_samples: int = 64,
    *,
    x: Any = None,
    context: Any = None,
    weights: Any = None,
    num_temperatures: int = 100,
    start: str = "pilot",
    seed: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Brackets log p(x) of rows simulated from the model, by annealing in both directions.

    A simulated row comes with a draw from its posterior: the latents that it was simulated with.
    Chains of annealed importance sampling that start there and move backwards give an upper bound
    of log p(x) in expectation; those that move forwards give a lower bound, as for any row. If
    the gap is small, annealed importance sampling with the same numbers of chains and temperatures
    can be trusted on rows such as the model's own. On real rows, which the model may fit worse,
    the gap may be larger, and cannot be computed.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse et al., 2015),
        arXiv 1511.02543.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`, trained or not.
        num_rows: The number of rows to simulate, two or more.
        num_samples: The number of chains of each row and direction, 4 or more.
        x: Rows whose covariates the simulated rows have, as in :func:`pyro_vae.sample`; needed by
            programs that cannot run without data.
        context: Covariates of the rows x, shape (rows, \*context).
        weights: The weight of each row of x, shape (rows,).
        num_temperatures: The number of temperatures between the start and the posterior.
        start: Where the forward chains start: `"pilot"`, at a normal distribution that a short run
            of Hamiltonian Monte Carlo finds; `"guide"`, at the one with the moments of the guide's
            draws; or `"prior"`.
        seed: The seed of rows and chains; with `None` torch's generator goes on from its state.
        progress: Whether to show a progress bar.

    Returns:
        Lines `lower`, `upper` and `gap` (upper - lower), in nats per row: the `mean` over the
        rows, its standard error `se` over the rows, and the largest and smallest row, `max` and
        `min`. The error of the gap is that of paired rows.

    Raises:
        ValueError: If `program` is not a program, or has latents that are not continuous or that
            rows share; if it cannot run without data and `x` is `None`; if its observed sites are
            not fields of its data; if a number is too small.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
        >>> bidirectional(vae, 4, 8, num_temperatures=10, seed=0).index.to_list()
        ['lower', 'upper', 'gap']
    """
    num_rows = checked_draws("num_rows", num_rows, least=2)
    num_samples = checked_draws("num_samples", num_samples, least=4)
    num_temperatures = checked_draws("num_temperatures", num_temperatures, least=2)
    start = checked_choice("start", start, STARTS)
    programs_of(program)
    if x is None:
        sites = sample_sites(program, num_rows, x=None, context=context, weights=weights, seed=0)
        x = next(iter(sites.values())) if len(sites) == 1 else sites
    given = read(x, program, context=context, weights=weights)
    with seeded(seed), evaluating(program):
        rows, latents = _simulated(program, given, num_rows)
        found = annealed(
            program,
            rows,
            num_samples,
            num_temperatures=num_temperatures,
            start=start,
            simulated=latents,
            progress=progress,
        )
    assert found.log_reverse is not None
    lower = estimates(found.log_weights)["log_evidence"]
    upper = -estimates(-found.log_reverse)["log_evidence"]
    lines = {"lower": lower, "upper": upper, "gap": upper - lower}
    columns = {
        "mean": [values.mean() for values in lines.values()],
        "se": [standard_error(values) for values in lines.values()],
        "min": [values.min() for values in lines.values()],
        "max": [values.max() for values in lines.values()],
    }
    return Table(columns, index=pd.Index(list(lines), name="bound"))


def _simulated(program: nn.Module, given: Rows, num_rows: int) -> tuple[Rows, Tensor]:
    """Returns rows simulated from the model, and their latents u, shape (rows, D)."""
    space, known = space_of(program, given)
    index = torch.arange(num_rows, device=given.device) % len(given)
    row = given.select(index, program)
    with poutine.trace() as drawn, poutine.uncondition():
        u = space.from_prior(row, 1)[0]
    nodes = drawn.trace.nodes
    fields = given[index].to_like(program).fields
    sites = [name for name in known.observed if known.event_shapes[name].numel()]
    names = sites if isinstance(given.x, dict) else ["x"] * len(sites)
    if len(set(names)) != len(sites) or not fields.keys() >= set(names):
        raise ValueError(
            f"The model observes {', '.join(sites)}, but its data have the fields "
            f"{', '.join(fields)}: simulated rows can be given to it if the names are the same."
        )
    for name, site in zip(names, sites, strict=True):
        value = values_by_row(nodes[site])
        fields[name] = value.reshape(fields[name].shape).to(fields[name])
    x = fields if isinstance(given.x, dict) else fields["x"]
    return replace(given, x=x, labels=np.arange(num_rows)), u
