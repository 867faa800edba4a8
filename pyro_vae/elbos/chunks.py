"""Evaluates a program on chunks of data, under a bound on memory."""

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.rows import PLATE, Rows
from ..data.source import Row
from .drawing import Drawing, Function
from .log_densities import (
    Densities,
    Structure,
    check_particles,
    is_point_mass,
    log_densities,
    programs_of,
    refuse_shared,
    structure,
)

__all__ = [
    "MAX_ELEMENTS",
    "Plan",
    "data_sites",
    "give_memory_back",
    "point_masses",
]

MAX_ELEMENTS = 2**24


def point_masses(program: nn.Module, rows: Rows) -> list[str]:
    """Names the latent sites of the rows that are point masses in the guide.

    Arguments:
        program: The program.
        rows: Its data, of which two rows are read.
    """
    trace = poutine.trace(programs_of(program)[1]).get_trace(rows.head(2, program))
    sites = [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample"]
    return [
        name
        for name, site in sites
        if not site["is_observed"]
        and any(frame.name == PLATE for frame in site["cond_indep_stack"])
        and is_point_mass(site)
    ]


def data_sites(found: Structure) -> tuple[str, ...]:
    """Names the observed sites that hold data, unlike the sites of `pyro.factor`.

    Arguments:
        found: The sites of the program.
    """
    return tuple(name for name in found.observed if found.event_shapes[name].numel())


Run: TypeAlias = Callable[[nn.Module, Row, int, Structure], Any]


def _densities(program: nn.Module, x: Row, num_samples: int, known: Structure) -> Densities:
    return log_densities(program, x, num_samples, known=known)


@dataclass(frozen=True)
class Plan:
    """How rows and draws are divided into chunks that fit a bound on memory.

    Arguments:
        structure: The sites and plates of the program.
        rows: The number of rows.
        rows_at_once: The largest number of rows of a chunk.
        draws_at_once: The largest number of draws of each row in one part of a chunk.
        elements: The number of elements of the largest tensor for each draw of each row.
    """

    structure: Structure
    rows: int
    rows_at_once: int
    draws_at_once: int
    elements: int

    @classmethod
    def of(
        cls,
        program: nn.Module,
        rows: Rows,
        num_samples: int,
        max_elements: int,
        run: Run = _densities,
    ) -> "Plan":
        """Plans draws for each row, with tensors of about `max_elements` elements at most.

        Arguments:
            program: The program.
            rows: Its data.
            num_samples: The number of draws of each row.
            max_elements: The largest number of elements of a tensor, approximately.
            run: The function whose tensors are measured. It is called with the program, rows, a
                number of draws and the structure. By default the densities of the program.
        """
        found = structure(program, rows.head(2, program))
        if run is _densities:
            refuse_shared(found.global_latents + found.global_observed)
        check_particles(program, rows.head(3, program), found)
        elements = _elements_per_draw(program, rows, found, run)
        at_once = min(len(rows), max(1, max_elements // (num_samples * elements)))
        most = min(num_samples, max(1, max_elements // (at_once * elements)))
        draws = math.ceil(num_samples / math.ceil(num_samples / most))  # equal parts
        return cls(found, len(rows), at_once, draws, elements)

    def pieces(self) -> list[slice]:
        """Returns the chunks of the rows."""
        starts = range(0, self.rows, self.rows_at_once)
        return [slice(start, min(start + self.rows_at_once, self.rows)) for start in starts]

    def drawing(self, program: nn.Module, function: Function, num_samples: int) -> Drawing:
        """Returns the function of rows and a number of draws that evaluates each chunk.

        Arguments:
            program: The program.
            function: The function of :class:`Drawing`.
            num_samples: The number of draws of each row, of all parts together.
        """
        calls = len(self.pieces()) * len(self.parts(num_samples))
        return Drawing(program, function, calls, self.rows * num_samples * self.elements)

    def parts(self, num_samples: int) -> list[int]:
        """Returns the number of draws of each part of a chunk.

        Arguments:
            num_samples: The number of draws of all parts together.
        """
        starts = range(0, num_samples, self.draws_at_once)
        return [min(self.draws_at_once, num_samples - start) for start in starts]


def give_memory_back() -> None:
    """Returns freed memory to the system if the C library is glibc.

    glibc keeps free blocks that lie below blocks in use. After thousands of chunks these can
    amount to several times the bound on memory.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class _TensorSizes(TorchDispatchMode):
    """Records the largest number of elements stored for the results of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        stored = (t.untyped_storage().nbytes() // t.element_size() for t in tensors)
        self.sizes.append(max(stored, default=0))
        return results


def _elements_per_draw(program: nn.Module, rows: Rows, shape: Structure, run: Run) -> int:
    """Returns the number of elements of the largest tensor for each draw of each row.

    It is measured by two small runs, and so includes hidden layers. If the two runs differ in
    their operations (rejection sampling), it is an upper bound.
    """
    sizes: list[list[int]] = []
    for side in (2, 4):
        few = rows.select(torch.arange(side, device=rows.device) % len(rows), program)
        with _TensorSizes() as recorded:
            run(program, few, side, shape)
        sizes.append(recorded.sizes)
    small, large = sizes
    events = max((math.prod(size) for size in shape.event_shapes.values()), default=1)
    if len(small) == len(large):
        growth = max((b - a for a, b in zip(small, large, strict=True)), default=0)
        return max(1, events, math.ceil(growth / (4 * 4 - 2 * 2)))
    return max(1, events, math.ceil(max(large) / 16))
