"""Evaluates a program on chunks of data, traced or compiled if there are enough chunks."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.source import Row
from ..engine.replay import Graph, Outputs, Replayed, UntraceableError
from .log_densities import Densities

__all__ = ["Drawing", "densities_of", "parts_of"]

Function: TypeAlias = Callable[[Row, int], dict[str, Tensor]]

WORTH_TRACING = 32
WORTH_COMPILING = 2**33


class Drawing:
    """Creates a function of rows and a number of draws that evaluates a program many times.

    If there are many calls, the function is traced for each shape of rows and number of draws
    that occurs again; if the calls together are large enough, its graph is compiled. With the
    same seed the draws are the same, and numbers differ by rounding at most. A program that cannot
    be traced runs eagerly.

    Arguments:
        program: The program, already in the mode (training or evaluation) in which it is to run.
        function: The function of rows and a number of draws that runs the program.
        calls: The approximate number of calls.
        elements: The approximate sum, over all calls, of the largest tensor's number of elements.

    Attributes:
        engine: The engine that runs most of the calls: `"eager"`, `"traced"` or `"compiled"`.
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
        self._seen: set[Hashable] = set()

    def __call__(self, x: Row, count: int) -> dict[str, Tensor]:
        """Returns the result of the function.

        Arguments:
            x: Rows: a tensor, or a dict of tensors.
            count: The number of draws.
        """
        shape = (count, *[leaf.shape for leaf in tree_leaves(x)])
        if self.engine == "eager" or shape not in self._seen:  # this shape may not occur again
            self._seen.add(shape)
            return self._function(x, count)
        try:
            self._module.count = count
            graph = self._replayed.graph(x, static=count)
        except UntraceableError:
            self.engine = "eager"
            return self._function(x, count)
        tensors = self._replayed.tensors(x)
        self._names.setdefault(graph, self._module.names)
        self._uses[graph] += 1
        is_worth_it = len(self._names) == 1 or self._uses[graph] >= self._many
        if self._is_compiled and is_worth_it and not graph.is_compiled:
            try:
                graph.compile(tensors)
                self.engine = "compiled"
            except UntraceableError:  # there may be no compiler
                self._is_compiled = False
        outputs = graph(tensors)
        return dict(zip(self._names[graph], outputs, strict=True))  # type: ignore[arg-type]


class _Named(nn.Module):
    """A function that runs a program, as a module that returns a tuple and stores its names."""

    def __init__(self, program: nn.Module, function: Function) -> None:
        super().__init__()
        self.program, self.function = program, function
        self.training = program.training
        self.count = 0
        self.names: tuple[str, ...] = ()

    def forward(self, x: Row) -> Outputs:
        found = self.function(x, self.count)
        self.names = tuple(found)
        return tuple(found.values())


def parts_of(densities: Densities) -> dict[str, Tensor]:
    """Returns the tensors of densities as one flat dict.

    Arguments:
        densities: The densities.
    """
    groups = {"model": densities.model, "guide": densities.guide, "values": densities.values}
    return {f"{group}.{site}": t for group, found in groups.items() for site, t in found.items()}


def densities_of(parts: dict[str, Tensor]) -> Densities:
    """Inverts :func:`parts_of`.

    Arguments:
        parts: The flat dict of tensors.
    """
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "guide": {}, "values": {}}
    for name, tensor in parts.items():
        group, site = name.split(".", 1)
        groups[group][site] = tensor
    return Densities(**groups)
