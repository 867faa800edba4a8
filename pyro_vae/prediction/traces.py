"""Traces of a program at draws from its guide, and the values of their sites by row."""

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..data.rows import PLATE
from ..data.source import Row
from ..elbos.log_densities import Program, Structure, programs_of

__all__ = [
    "guide_trace",
    "holds_rows",
    "observed_values",
    "predictive_trace",
    "trace_of",
    "values_by_row",
]

_DRAWS = "_draws"


def trace_of(function: Program, *args: object, **kwargs: object) -> Trace:
    """Runs a Pyro program and returns its trace, without the indices of its plates.

    Arguments:
        function: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    return prune_subsample_sites(poutine.trace(function).get_trace(*args, **kwargs))


def guide_trace(program: nn.Module, x: Row, num_samples: int, known: Structure) -> Trace:
    r"""Draws the latent sites of each row from the guide, q(z | x).

    Arguments:
        program: The program, in evaluation mode.
        x: A tensor of shape (rows, \*event), or a dict of them.
        num_samples: The number of draws of each row.
        known: The structure of the program.
    """
    _, guide = programs_of(program)
    return trace_of(_repeated(guide, num_samples, known), x)


def predictive_trace(program: nn.Module, x: Row, num_samples: int, known: Structure) -> Trace:
    r"""Draws from the guide, then the observed sites of the model at these draws, p(x' | z).

    Arguments:
        program: The program, in evaluation mode.
        x: A tensor of shape (rows, \*event), or a dict of them.
        num_samples: The number of draws of each row.
        known: The structure of the program.

    Returns:
        The trace of the model, in which the observed sites are drawn.
    """
    guided = guide_trace(program, x, num_samples, known)
    model, _ = programs_of(program)
    free = _repeated(poutine.uncondition(model), num_samples, known)
    return trace_of(poutine.replay(free, trace=guided), x)


def _repeated(function: Program, num_samples: int, known: Structure) -> Program:
    draws = pyro.plate(_DRAWS, num_samples, dim=-known.max_plate_nesting - 1)
    repeated: Program = draws(function)
    return repeated


def observed_values(program: nn.Module, x: Row, site: str) -> Tensor:
    r"""Returns the data that a site of the model observes, shape (rows, \*event).

    Arguments:
        program: The program, in evaluation mode.
        x: A tensor of shape (rows, \*event), or a dict of them.
        site: The name of the site.
    """
    model, _ = programs_of(program)
    return values_by_row(trace_of(model, x).nodes[site])


def holds_rows(site: Any) -> bool:
    """Returns whether a site of a trace is a random variable with a value for each row.

    Arguments:
        site: The site.
    """
    return (
        site["type"] == "sample"
        and any(frame.name == PLATE for frame in site["cond_indep_stack"])
        and math.prod(site["fn"].event_shape) > 0  # 0 for pyro.factor
        and not site["infer"].get("_deterministic", False)
    )


def values_by_row(site: Any, values: Tensor | None = None) -> Tensor:
    r"""Brings the value of a site to shape ([draws,] rows, \*plates, \*event).

    Arguments:
        site: A site of a trace, in the plate `"data"`.
        values: Values of the same shape to use instead of the site's own.
    """
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    leading = [dims.pop(name) for name in (_DRAWS, PLATE) if name in dims]
    value, shape = site["value"] if values is None else values, site["fn"].shape()
    value = value.expand(torch.broadcast_shapes(value.shape, shape))
    events = len(site["fn"].event_shape)
    plates = [dim - events for dim in (*leading, *sorted(dims.values()))]
    value = value.reshape((1,) * (-min(plates) - value.ndim) + value.shape)
    order = [*plates, *range(-events, 0)]
    unused = [dim for dim in range(-value.ndim, 0) if dim not in order]
    shape = [value.shape[dim] for dim in order]
    return value.permute(unused + order).reshape(shape)
