"""Evaluates a program on chunks of data, under a bound on memory."""

import ctypes
import math
import sys
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.rows import Rows
from .drawing import Drawing
from .log_densities import Structure, check_particles, log_densities, structure

__all__ = [
    "MAX_ELEMENTS",
    "Plan",
    "data_sites",
    "give_memory_back",
    "point_masses",
]

MAX_ELEMENTS = 2**24


def point_masses(program: Any, rows: Rows) -> list[str]:
    """Names the latent sites of the guide that are point masses.

    Arguments:
        program: The program.
        rows: Its data, of which two rows are read.
    """
    trace = poutine.trace(program.guide).get_trace(rows.head(2, program))
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and isinstance(_innermost(site["fn"]), dist.Delta)
    ]


def data_sites(found: Structure) -> tuple[str, ...]:
    """Names the observed sites that hold data, which those of `pyro.factor` do not.

    Arguments:
        found: What the program is made of.
    """
    return tuple(name for name in found.observed if found.event_shapes[name].numel())


def _innermost(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


@dataclass(frozen=True)
class Plan:
    """How a run of a program is cut into pieces that fit a bound on memory.

    Arguments:
        structure: What the program is made of.
        rows: The number of rows.
        rows_at_once: The most rows of a piece.
        draws_at_once: The most draws of each row in one part of a piece.
        elements: How many elements the largest tensor has for each draw of each row.
    """

    structure: Structure
    rows: int
    rows_at_once: int
    draws_at_once: int
    elements: int

    @classmethod
    def of(cls, program: nn.Module, rows: Rows, num_samples: int, max_elements: int) -> "Plan":
        """Plans to draw for each row, with tensors of about `max_elements` elements at most.

        Arguments:
            program: The program.
            rows: Its data.
            num_samples: The number of draws of each row.
            max_elements: The bound.
        """
        found = structure(program, rows.head(2, program))
        check_particles(program, rows.head(3, program), found)
        elements = _elements_per_draw(program, rows, found)
        at_once = min(len(rows), max(1, max_elements // (num_samples * elements)))
        most = min(num_samples, max(1, max_elements // (at_once * elements)))
        draws = math.ceil(num_samples / math.ceil(num_samples / most))  # parts of one size
        return cls(found, len(rows), at_once, draws, elements)

    def pieces(self) -> list[slice]:
        """The pieces of the rows."""
        starts = range(0, self.rows, self.rows_at_once)
        return [slice(start, min(start + self.rows_at_once, self.rows)) for start in starts]

    def drawing(self, program: nn.Module, function: Any, num_samples: int) -> Drawing:
        """Returns a function of rows and draws that runs piece after piece.

        Arguments:
            program: The program.
            function: What it runs, as of :class:`Drawing`.
            num_samples: The number of draws of each row, of all parts.
        """
        calls = len(self.pieces()) * len(self.parts(num_samples))
        return Drawing(program, function, calls, self.rows * num_samples * self.elements)

    def parts(self, num_samples: int) -> list[int]:
        """How many draws each part of a piece has.

        Arguments:
            num_samples: Their sum.
        """
        starts = range(0, num_samples, self.draws_at_once)
        return [min(self.draws_at_once, num_samples - start) for start in starts]


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library would keep it.

    glibc holds on to blocks that lie below live ones: over thousands of pieces that came to
    several times the bound.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _TensorSizes(TorchDispatchMode):
    """Notes how many elements the storage behind each operation's results has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.sizes.append(max(map(_stored_elements, tensors), default=0))
        return results


def _stored_elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _tensor_sizes(program: nn.Module, rows: Rows, shape: Structure, side: int) -> list[int]:
    few = rows.select(torch.arange(side, device=rows.device) % len(rows), program)
    noted = _TensorSizes()
    with noted:
        log_densities(program, few, side, known=shape)
    return noted.sizes


def _elements_per_draw(program: nn.Module, rows: Rows, shape: Structure) -> int:
    """Returns how many elements the largest tensor of a run has for each draw of each row.

    Two small runs tell it, hidden layers included; runs of unlike operations (rejection
    sampling) give an upper bound.
    """
    small, large = (_tensor_sizes(program, rows, shape, side) for side in (2, 4))
    events = max((math.prod(size) for size in shape.event_shapes.values()), default=1)
    if len(small) == len(large):
        growth = max((b - a for a, b in zip(small, large, strict=True)), default=0)
        return max(1, events, math.ceil(growth / (4 * 4 - 2 * 2)))
    return max(1, events, math.ceil(max(large) / 16))
