"""Draws of programs with latents that all rows share (global latents)."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from ..data.rows import Rows
from ..elbos.log_densities import Structure, programs_of
from ..engine.running import Site
from ..prediction.traces import trace_of, values_by_row

__all__ = ["shared_draws"]

Groups: TypeAlias = dict[str, dict[str, np.ndarray]]


def shared_draws(
    program: nn.Module, rows: Rows, known: Structure, num_samples: int, num_predictive: int
) -> Groups:
    r"""Draws all latents from the guide, and data from the model at the first of these draws.

    Each draw is one run of the program on all rows, so that all rows of a draw have the same
    values of the shared latents.

    Arguments:
        program: The program, in evaluation mode.
        rows: The data of the program.
        known: The sites and plates of the program.
        num_samples: The number of draws from the guide.
        num_predictive: The number of these draws at which data are drawn, and the number of draws
            from the prior.

    Returns:
        For `posterior`, `posterior_predictive`, `prior`, `prior_predictive` the values of each
        site, shape (draws, rows, \*event), without the rows for a shared latent; for
        `sample_stats` the log-densities `log_joint`, `log_q`, `log_weight` of all rows together,
        shape (draws,), in nats.
    """
    model, guide = programs_of(program)
    free = poutine.uncondition(model)
    row = rows.to_like(program).head(len(rows))
    latents = known.latents + known.global_latents
    observed = tuple(name for name in known.observed if known.event_shapes[name].numel())
    parts: dict[str, list[dict[str, Tensor]]] = {
        name: []
        for name in ("posterior", "sample_stats", "posterior_predictive", "prior")
        + ("prior_predictive",)
    }
    for draw in range(num_samples):
        guided = trace_of(guide, row)
        scored = trace_of(poutine.replay(model, trace=guided), row)
        joint, log_q = (torch.as_tensor(t.log_prob_sum()).double() for t in (scored, guided))
        stats = {"log_weight": joint - log_q, "log_q": log_q, "log_joint": joint}
        parts["posterior"].append(_values(scored.nodes, latents, known))
        parts["sample_stats"].append(stats)
        if draw < num_predictive:
            predicted = trace_of(poutine.replay(free, trace=guided), row).nodes
            simulated = trace_of(free, row).nodes
            parts["posterior_predictive"].append(_values(predicted, observed, known))
            parts["prior"].append(_values(simulated, latents, known))
            parts["prior_predictive"].append(_values(simulated, observed, known))
    return {
        group: {name: torch.stack([d[name] for d in draws]).cpu().numpy() for name in draws[0]}
        for group, draws in parts.items()
    }


def _values(
    nodes: Mapping[str, Site], sites: tuple[str, ...], known: Structure
) -> dict[str, Tensor]:
    return {
        name: nodes[name]["value"] if name in known.global_latents else values_by_row(nodes[name])
        for name in sites
    }
