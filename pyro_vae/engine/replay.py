"""A module whose call is traced once to a graph of tensor operations, and then replayed."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten

from ..data.checks import perhaps
from .running import kept_generators, local_parameters, outer_handlers
from .simplified import simplified, written

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "Captured",
    "Graph",
    "Outputs",
    "Replayed",
    "UntraceableError",
    "at_precision",
    "checked_engine",
    "checked_precision",
    "saved_by_compiling",
]

ENGINES = ("auto", "eager", "traced", "compiled", "cudagraph")
PRECISIONS = ("highest", "high", "medium", "bf16")

MOST_GRAPHS = 32

Outputs: TypeAlias = tuple[Tensor | None, ...]
Run: TypeAlias = Callable[..., Sequence[Tensor]]


class UntraceableError(ValueError):
    """A program whose steps are no fixed sequence of tensor operations; it says why."""


def checked_engine(engine: Any) -> str:
    """Returns the name of an engine.

    Arguments:
        engine: The name.

    Raises:
        ValueError: Where there is none of that name.
    """
    return _checked_name("engine", engine, ENGINES)


def checked_precision(precision: Any) -> str | None:
    """Returns the name of a precision of matrix products, or `None`.

    Arguments:
        precision: The name.

    Raises:
        ValueError: Where there is none of that name.
    """
    return None if precision is None else _checked_name("precision", precision, PRECISIONS)


def _checked_name(what: str, name: Any, names: Sequence[str]) -> str:
    if name not in names:
        hint = perhaps(name, names) if isinstance(name, str) else ""
        raise ValueError(f"Expected {what} to be one of {', '.join(names)}{hint}; got {name!r}.")
    return str(name)


@contextlib.contextmanager
def at_precision(precision: str | None) -> Iterator[None]:
    """Multiplies float32 matrices at a precision, and puts torch's own back.

    Arguments:
        precision: `"highest"`, `"high"` or `"medium"`, as torch takes them; `"bf16"`, whose
            autocast is the caller's, leaves float32 products as they are, like `None`.
    """
    if precision in (None, "bf16"):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(str(precision))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Graph:
    """Creates a graph that can be run.

    Arguments:
        module: The graph as torch traced it.
        short: The same in fewer operations, to be run as it is.
        lifted: The tensors that it takes besides parameters, buffers and arguments.
        shape: Which of its outputs are there.

    Attributes:
        size: The number of its operations, run as it is.
        is_compiled: Whether it is compiled; `None` before that was thought about.
    """

    def __init__(
        self,
        module: GraphModule,
        short: GraphModule,
        lifted: list[Tensor],
        shape: tuple[bool, ...],
    ) -> None:
        self._module, self._lifted, self._shape = module, lifted, shape
        self._run: Run = short.forward
        self.size = len(short.graph.nodes)
        self.is_compiled: bool | None = None

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Has it compiled by Inductor; its random draws stay torch's own.

        Arguments:
            tensors: What it is called with, or tensors like it.

        Raises:
            UntraceableError: Where Inductor cannot.
        """
        inputs = [tensor.detach() for tensor in (*tensors, *self._lifted)]
        run = _inductor(_spread_out(self._module, inputs), inputs)
        ours, theirs = list(map(_copied, inputs)), list(map(_copied, inputs))
        with kept_generators(), torch.no_grad():
            found = run(*ours)
        with kept_generators(), torch.no_grad():
            expected = self._run(*theirs)
        if not _are_same([*found, *ours], [*expected, *theirs], rtol=1e-3):
            raise UntraceableError("Inductor's code computes something else")
        self._run, self.is_compiled = run, True

    def __call__(self, tensors: Sequence[Tensor]) -> Outputs:
        """Runs it.

        Arguments:
            tensors: Its inputs, as `Replayed.tensors` gives them.
        """
        with torch.no_grad():
            found = iter(self._run(*tensors, *self._lifted))
        return tuple([next(found) if is_there else None for is_there in self._shape])


class _Key(NamedTuple):
    """All that a graph was traced for, beside the values of tensors."""

    arguments: TreeSpec | None
    leaves: tuple[Hashable, ...]
    modes: tuple[bool, ...]
    trained: tuple[bool, ...]
    handlers: tuple[Any, ...]
    given: Hashable
    dtype: torch.dtype


class Replayed:
    """Creates the replayed form of a module: as it computes, without the Python it was written in.

    The forward pass, gradients that it takes inside it among the rest, is traced once for each
    shape of its arguments to a graph of aten operations, and that graph is run. Parameters,
    buffers and tensors that the module merely holds are read anew each time; Python numbers are
    read once. What it changes in place, or assigns to a buffer, is changed. A run of the graph is
    checked against the module itself, at the same draws: where they differ, or a branch depends on
    a tensor's value, the module is refused.

    Arguments:
        module: Its forward takes tensors, and returns a tuple of tensors and `None`.

    Example:
        >>> class Squared(nn.Module):
        ...     def forward(self, x: Tensor) -> tuple[Tensor]:
        ...         return (x * x,)
        >>> Replayed(Squared())(torch.full((2,), 3.0))
        (tensor([9., 9.]),)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._graphs: dict[_Key, Graph] = {}
        self._modules = list(module.modules())
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._trained: list[Any] = []
        self._find_tensors()

    def __call__(self, *args: Any, given: Hashable = None, **kwargs: Any) -> Outputs:
        """Returns what the module returns.

        Arguments:
            args: Its arguments: tensors, nested in lists and dicts or not, and plain values.
            given: A plain value that it depends on besides.
            kwargs: The same, by name.

        Raises:
            UntraceableError: Where the module cannot be replayed.
        """
        return self.graph(*args, given=given, **kwargs)(self.tensors(*args, **kwargs))

    def graph(self, *args: Any, given: Hashable = None, **kwargs: Any) -> Graph:
        """Returns the graph for arguments of these shapes, traced now if it was not yet.

        Arguments:
            args: As of a call.
            given: As of a call.
            kwargs: As of a call.

        Raises:
            UntraceableError: Where the module cannot be replayed.
        """
        is_plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        leaves, spec = (args, None) if is_plain else tree_flatten((args, kwargs))
        key = _Key(
            spec,
            tuple([_said(leaf) for leaf in leaves]),
            tuple([m.training for m in self._modules]),
            tuple([p.requires_grad for p in self._trained]),
            outer_handlers(),
            given,
            torch.get_default_dtype(),
        )
        found = self._graphs.get(key)
        if found is None:
            if len(self._graphs) >= MOST_GRAPHS:
                raise UntraceableError(
                    f"it is called in more than {MOST_GRAPHS} ways: other shapes, Python numbers "
                    "or handlers each time"
                )
            found = self._graphs[key] = self._traced(*tree_flatten((args, kwargs)))
        return found

    @property
    def size(self) -> int:
        """The number of graphs."""
        return len(self._graphs)

    @property
    def num_own(self) -> int:
        """The number of parameters and buffers, which come first among the inputs of a graph."""
        return len(self._places)

    def tensors(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Returns the inputs of a graph: parameters, buffers and arguments, as they are now.

        Arguments:
            args: As of a call.
            kwargs: As of a call.
        """
        now = [owner[name] for owner, name in self._places.values()]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [*now, args[0]]
        return now + [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]

    def _find_tensors(self) -> None:
        seen: set[int] = set()
        for prefix, module in self.module.named_modules():
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self._places[f"{prefix}.{name}".lstrip(".")] = (owner, name)
                        if isinstance(tensor, nn.Parameter):
                            self._trained.append(tensor)

    def _traced(self, leaves: list[Any], spec: TreeSpec) -> Graph:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [t.detach() for t in self._current()] + [t.detach() for t in tensors]
        shape: list[bool] = []

        def function(*flat: Tensor) -> list[Tensor]:
            given = iter(flat[len(self._places) :])
            arguments = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs = self._swapped(flat[: len(self._places)], spec.unflatten(arguments))
            shape[:] = [output is not None for output in outputs]
            return [output for output in outputs if output is not None]

        with kept_generators():
            expected = [*map(_copied, inputs)]
            expected = [*function(*expected), *expected]  # raises the module's own errors, if any
        with pyro.validation_enabled(False):
            graph = _graph_of(function, [*map(_copied, inputs)])
        lifted = _lift_constants(graph)
        short = simplified(graph)
        _forget(graph)
        _forget(short)
        _check_replay(short, inputs, lifted, expected)
        return Graph(graph, short, lifted, tuple(shape))

    def _current(self) -> list[Tensor]:
        return [owner[name] for owner, name in self._places.values()]

    def _swapped(self, tensors: Sequence[Tensor], call: Any) -> Outputs:
        """Calls the module with other tensors in the place of its own; those see its changes."""
        args, kwargs = call
        trained = {id(p) for p in self._trained if p.requires_grad}
        swapped: dict[str, Tensor] = {}
        for (name, (owner, key)), tensor in zip(self._places.items(), tensors, strict=True):
            is_trained = id(owner[key]) in trained
            swapped[name] = tensor.detach().requires_grad_() if is_trained else tensor
        named = {f"module.{name}": tensor for name, tensor in swapped.items()}
        outputs, after = functional_call(_Calls(self.module), named, (self._places, args, kwargs))
        for name, tensor in swapped.items():
            if after[name] is not tensor:
                with torch.no_grad():
                    tensor.copy_(after[name])
        return tuple(None if o is None else o.detach() for o in outputs)


class _Calls(nn.Module):
    """Calls a module, and tells what tensors it holds then, before they are swapped back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, places: Mapping[str, tuple[dict[str, Any], str]], args: Any, kwargs: Any
    ) -> tuple[Outputs, dict[str, Tensor]]:
        with local_parameters(self.module):
            outputs = self.module(*args, **kwargs)
        return outputs, {name: owner[key] for name, (owner, key) in places.items()}


def saved_by_compiling(size: int) -> float:
    """Seconds that compiling takes off each run of a graph, about: its Python, on a CPU.

    Arguments:
        size: The number of its operations, run as it is.
    """
    return 6e-6 * size


def _said(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if leaf.__hash__ is None:
        raise UntraceableError(f"it is called with {type(leaf).__name__}, which may change")
    return (type(leaf), leaf)


def _copied(tensor: Tensor) -> Tensor:
    """A copy, of the same strides, that may be changed."""
    return tensor.clone(memory_format=torch.preserve_format)


def _graph_of(function: Callable[..., Any], inputs: list[Tensor]) -> GraphModule:
    try:
        with kept_generators(), _Rewritten():
            graph = make_fx(function, decomposition_table=_TOLD)(*inputs)
    except ValueError:
        raise
    except Exception as error:
        raise UntraceableError(_reason(error)) from error
    _tidy(graph)
    return graph


class _Rewritten(TorchFunctionMode):
    """Does without looking at values what torch looks at values for: the classes of `one_hot`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.one_hot:
            return _one_hot(*args, **kwargs)
        return func(*args, **kwargs)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        return F.one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).long()


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *how: Any
) -> tuple[Tensor, ...]:
    """The same operation, under the name that says that it changes the running statistics."""
    aten, affine = torch.ops.aten, (x, weight, bias)
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(*affine, *how)
    return aten._native_batch_norm_legit.default(*affine, mean, variance, *how)


_TOLD = {torch.ops.aten.native_batch_norm.default: _batch_norm}


def _reason(error: Exception) -> str:
    said = str(error).strip().splitlines()
    first = said[0] if said else type(error).__name__
    if "trying to get a value out of symbolic" in first or "value out of a tracing" in first:
        return "a branch, or a number, of it depends on the value of a tensor"
    return f"{type(error).__name__}: {first}"


def _tidy(graph: GraphModule) -> None:
    """Leaves out what nothing comes of."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _forget(graph: GraphModule) -> None:
    """Drops what the tracer noted of each result: its shape, and where it came from."""
    for node in graph.graph.nodes:
        node.meta.clear()


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that the module merely held, so that they are read each time."""
    nodes: list[Node] = [node for node in graph.graph.nodes if node.op == "get_attr"]
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[str, tuple[Tensor, Node]] = {}
    for node in nodes:
        name = str(node.target)
        value = getattr(graph, name)
        if not isinstance(value, Tensor):
            raise UntraceableError(f"its graph holds {type(value).__name__}")
        if any(node in written(user) for user in node.users):
            raise UntraceableError("it changes a tensor in place that is no buffer")
        if name not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"lifted_{len(lifted)}")
                last.meta = dict(node.meta)
            lifted[name] = (value.detach(), last)
        node.replace_all_uses_with(lifted[name][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [value for value, _ in lifted.values()]


def _check_replay(
    graph: GraphModule, inputs: list[Tensor], lifted: list[Tensor], expected: list[Tensor]
) -> None:
    """Compares a run of the graph with what the module made of its inputs, at the same draws."""
    ours = list(map(_copied, inputs))
    with kept_generators(), torch.no_grad():
        found = graph.forward(*ours, *lifted)
    if not _are_same([*found, *ours], expected):
        raise UntraceableError("it computes something else from call to call, at the same draws")


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor], rtol: float | None = None) -> bool:
    """Whether tensors differ by rounding at most, of the largest of their numbers."""
    least = 0.0 if rtol is None else 1e-6 * max(map(_size, others), default=0.0)
    return all(_is_same(one, other, rtol, least) for one, other in zip(some, others, strict=True))


def _is_same(one: Tensor, other: Tensor, rtol: float | None, least: float) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    if rtol is None:
        rtol = 16 * torch.finfo(one.dtype).eps if one.device.type == "cpu" else 1e-3
    atol = rtol * _size(other) + least
    return torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True)


def _size(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _spread_out(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """The same graph, of operations that Inductor can fuse with what is around them."""
    with kept_generators(), torch.no_grad():
        run = make_fx(lambda *flat: graph.forward(*flat), decomposition_table=_FUSED)
        spread: GraphModule = run(*map(_copied, inputs))
    _tidy(spread)
    _forget(spread)
    return spread


def _foreach_norm(tensors: list[Tensor], *asked: Any) -> list[Tensor]:
    return [tensor.square().sum().sqrt() for tensor in tensors]


def _normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None
) -> Tensor:
    drawn = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.copy_(drawn if (mean, std) == (0.0, 1.0) else drawn * std + mean)


def _addmm(
    bias: Tensor, one: Tensor, other: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """A product whose bias is added by what comes next, not copied to where the product goes.

    A difference, since Inductor would put a sum back to where it was.
    """
    product = one @ other if alpha == 1.0 else alpha * (one @ other)
    return product - (-bias if beta == 1.0 else -beta * bias)


_FUSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten._foreach_norm.Scalar: _foreach_norm,
    torch.ops.aten.normal_.default: _normal_,
}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps to itself what torch warns of and logs about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _inductor(graph: GraphModule, inputs: Sequence[Any]) -> Run:
    """Compiles a graph, calls between its kernels too, where Inductor can."""
    is_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
    for wraps in (True, False) if is_cpu else (False,):
        options = {"fallback_random": True, "cpp_wrapper": wraps}
        try:
            with _silence(), torch.no_grad():
                from torch import _inductor as torch_inductor

                run: Run = torch_inductor.compile(graph, [*inputs], options=options)
                with kept_generators():
                    run(*map(_copied, inputs))  # what wraps the kernels is loaded here
                return run
        except Exception as error:
            if not wraps:
                raise UntraceableError(f"Inductor refuses its graph: {_reason(error)}") from error
    raise AssertionError


class Captured:
    """Creates the CUDA graph of a function without arguments: its kernels, launched as one.

    The function runs a few times, to warm up, and once to be captured; what it changes is put
    back as it was. It must read and change tensors in place, and ask the device for nothing.

    Arguments:
        function: What to capture; its tensors are those of every replay.
        state: The tensors that it changes.
        warm_up: How often it runs before.
    """

    def __init__(self, function: Callable[[], Any], state: list[Tensor], warm_up: int = 3) -> None:
        before = [(tensor, tensor.clone()) for tensor in state]
        with kept_generators():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warm_up):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = function()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)

    @staticmethod
    def is_possible(device: torch.device) -> bool:
        """Whether a device has such graphs.

        Arguments:
            device: The device.
        """
        return device.type == "cuda"

    def replay(self) -> Any:
        """Runs the kernels again, and returns the tensors that hold what comes out."""
        self._graph.replay()
        return self.outputs
