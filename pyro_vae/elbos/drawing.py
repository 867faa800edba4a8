"""Draws and their densities, piece after piece of one shape, by the engine that repays itself."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..engine.replay import Graph, Outputs, Replayed, UntraceableError
from .log_densities import Densities

__all__ = ["Drawing", "densities_of", "parts_of"]

Function: TypeAlias = Callable[[Any, int], dict[str, Tensor]]

WORTH_TRACING = 32
WORTH_COMPILING = 2**33


class Drawing:
    """Creates a function of rows and a number of draws that runs a program again and again.

    Calls of one shape are traced once there are many of them, and compiled where they add up: the
    same draws under one seed, and numbers that differ by rounding at most. What cannot be traced
    runs as it is.

    Arguments:
        program: The program, in the mode in which it is to run.
        function: A function of rows and a number of draws, that runs the program.
        calls: How many calls there will be, about.
        elements: How many elements the largest tensors of all calls have, about.

    Attributes:
        engine: What runs most of it: `"eager"`, `"traced"` or `"compiled"`.
    """

    def __init__(self, program: nn.Module, function: Function, calls: int, elements: int) -> None:
        self._function = function
        self._module = _Named(program, function)
        self._replayed = Replayed(self._module)
        self.engine = "eager" if calls < WORTH_TRACING else "traced"
        self._is_compiled = elements >= WORTH_COMPILING
        self._names: dict[Graph, tuple[str, ...]] = {}
        self._uses: Counter[Graph] = Counter()
        self._many = max(16, calls // 8)
        self._asked: set[Hashable] = set()

    def __call__(self, x: Any, count: int) -> dict[str, Tensor]:
        """Returns what the function returns.

        Arguments:
            x: Rows: a tensor, or a dict of them.
            count: The number of draws.
        """
        shape = (count, *[leaf.shape for leaf in tree_leaves(x)])
        if self.engine == "eager" or shape not in self._asked:  # a shape may come but once
            self._asked.add(shape)
            return self._function(x, count)
        try:
            return self._replay(x, count)
        except UntraceableError:
            self.engine = "eager"
            return self._function(x, count)

    def _replay(self, x: Any, count: int) -> dict[str, Tensor]:
        self._module.count = count
        graph = self._replayed.graph(x, given=count)
        tensors = self._replayed.tensors(x)
        self._names.setdefault(graph, self._module.names)
        self._uses[graph] += 1
        is_worth_it = len(self._names) == 1 or self._uses[graph] >= self._many
        if self._is_compiled and is_worth_it and not graph.is_compiled:
            self._compile(graph, tensors)
        outputs: Any = graph(tensors)
        return dict(zip(self._names[graph], outputs, strict=True))

    def _compile(self, graph: Graph, tensors: list[Tensor]) -> None:
        """Has a graph compiled; without a compiler, say, it runs as it was traced."""
        try:
            graph.compile(tensors)
        except UntraceableError:
            self._is_compiled = False
        else:
            self.engine = "compiled"


class _Named(nn.Module):
    """A function that runs a program, as a module that returns a tuple and notes its names."""

    def __init__(self, program: nn.Module, function: Function) -> None:
        super().__init__()
        self.program, self.function = program, function
        self.training = program.training
        self.count = 0
        self.names: tuple[str, ...] = ()

    def forward(self, x: Any) -> Outputs:
        found = self.function(x, self.count)
        self.names = tuple(found)
        return tuple(found.values())


def parts_of(densities: Densities) -> dict[str, Tensor]:
    """Returns the tensors of densities by their names.

    Arguments:
        densities: The densities.
    """
    groups = {"model": densities.model, "guide": densities.guide, "values": densities.values}
    return {f"{group}.{site}": t for group, found in groups.items() for site, t in found.items()}


def densities_of(parts: dict[str, Tensor]) -> Densities:
    """Puts together what :func:`parts_of` took apart.

    Arguments:
        parts: The tensors by their names.
    """
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "guide": {}, "values": {}}
    for name, tensor in parts.items():
        group, site = name.split(".", 1)
        groups[group][site] = tensor
    return Densities(**groups)
