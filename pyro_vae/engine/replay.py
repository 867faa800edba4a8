"""Traces the call of a module to a graph of tensor operations, which is then replayed."""

import contextlib
import linecache
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph_module import _loader
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from ..data.checks import checked_choice
from .python_state import PythonState
from .running import kept_generators, local_parameters, outer_handlers, unvalidated
from .simplified import simplified, written_nodes

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "Captured",
    "Graph",
    "Outputs",
    "Replayed",
    "UntraceableError",
    "at_precision",
    "fast_precision",
    "checked_engine",
    "checked_precision",
    "saved_by_compiling",
]

ENGINES = ("auto", "eager", "traced", "compiled", "cudagraph")
PRECISIONS = ("highest", "high", "medium", "bf16")

MOST_GRAPHS = 32

Outputs: TypeAlias = tuple[Tensor | None, ...]
Owner: TypeAlias = dict[str, Tensor | None]
Run: TypeAlias = Callable[..., Sequence[Tensor]]


class UntraceableError(ValueError):
    """A program whose steps are not a fixed sequence of tensor operations, and the reason."""


def checked_engine(engine: object) -> str:
    """Returns the name of an engine.

    Arguments:
        engine: The name.

    Raises:
        ValueError: If there is no engine of that name.
    """
    return checked_choice("engine", engine, ENGINES)


def checked_precision(precision: object) -> str | None:
    """Returns the name of a precision of matrix products, or `None`.

    Arguments:
        precision: The name.

    Raises:
        ValueError: If there is no precision of that name.
    """
    return None if precision is None else checked_choice("precision", precision, PRECISIONS)


@contextlib.contextmanager
def at_precision(precision: str | None) -> Iterator[None]:
    """Sets the precision of float32 matrix products, and restores torch's setting at the end.

    Arguments:
        precision: `"highest"`, `"high"` or `"medium"`, as in
            `torch.set_float32_matmul_precision`. `"bf16"`, for which the caller uses autocast,
            changes no float32 products, and neither does `None`.
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


def fast_precision(device: torch.device) -> str | None:
    """Returns the precision whose float32 products are the fastest without coarser rounding.

    On processors of AMD, MKL takes twice as long as oneDNN, which torch uses at `"medium"`. At
    this setting oneDNN rounds the factors to bfloat16 only where the processor has AMX.

    Arguments:
        device: The device of the products.

    Returns:
        `"medium"`, or `None` where torch's setting remains.
    """
    if device.type != "cpu":
        return None
    features = torch.cpu.get_capabilities()
    is_amd = str(features.get("cpu_name", "")).startswith("AMD")
    return "medium" if is_amd and features.get("amx_tile") is False else None


@contextlib.contextmanager
def _without_sources() -> Iterator[None]:
    """Forgets the source code of the graphs made inside, which torch holds for all time."""
    before = set(_loader.eval_cache)
    try:
        yield
    finally:
        for name in _loader.eval_cache.keys() - before:
            del _loader.eval_cache[name]
            linecache.cache.pop(name, None)


class Graph:
    """A traced graph of tensor operations that can be run, and compiled.

    Arguments:
        module: The graph as torch traced it.
        short: The same computation in fewer operations, which runs until the graph is compiled.
        constants: The inputs of the graph besides parameters, buffers and arguments.
        is_present: For each output, whether it is a tensor; the others are `None`.

    Attributes:
        size: The number of operations of `short`.
        is_compiled: Whether it is compiled; `None` before the decision.
    """

    def __init__(
        self,
        module: GraphModule,
        short: GraphModule,
        constants: list[Tensor],
        is_present: tuple[bool, ...],
    ) -> None:
        self._module, self._constants, self._is_present = module, constants, is_present
        self._run: Run = short.forward
        self.size = len(short.graph.nodes)
        self.is_compiled: bool | None = None

    @_without_sources()
    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Compiles the graph by Inductor. Random draws still come from torch's generators.

        Arguments:
            tensors: Inputs of the graph, or tensors of the same shapes.

        Raises:
            UntraceableError: If Inductor cannot compile the graph, or the compiled code gives
                other numbers.
        """
        inputs = [tensor.detach() for tensor in (*tensors, *self._constants)]
        run = _inductor(self._module, inputs)
        ours, theirs = list(map(_copied, inputs)), list(map(_copied, inputs))
        with kept_generators(), torch.no_grad():
            found = run(*ours)
        with kept_generators(), torch.no_grad():
            expected = self._run(*theirs)
        if not _are_same([*found, *ours], [*expected, *theirs], rtol=1e-3):
            raise UntraceableError("Inductor's code gives other numbers")
        self._run, self.is_compiled = run, True

    def __call__(self, tensors: Sequence[Tensor]) -> Outputs:
        """Runs the graph.

        Arguments:
            tensors: Its inputs, from `Replayed.tensors`.
        """
        with torch.no_grad():
            found = iter(self._run(*tensors, *self._constants))
        return tuple([next(found) if is_present else None for is_present in self._is_present])


class _Key(NamedTuple):
    """Everything that a graph depends on, except for the values of tensors."""

    arguments: TreeSpec | None
    leaves: tuple[Hashable, ...]
    modes: tuple[bool, ...]
    trained: tuple[bool, ...]
    handlers: tuple[object, ...]
    static: Hashable
    dtype: torch.dtype


class Replayed:
    """Creates the replayed form of a module: the same tensor operations without the Python code.

    The forward pass, with any gradients computed in it, is traced once for each shape of its
    arguments to a graph of aten operations, and the graph runs instead. Each run reads the current
    parameters, buffers and other tensors of the module, but a Python number is read only when the
    graph is traced. Changes in place, and assignments to buffers, take effect. A first run of the
    graph is compared with the module, at the same random draws. If they differ, a branch depends
    on the value of a tensor, or a call changes a Python value that the module keeps, such as a
    count of its calls, `UntraceableError` is raised.

    Arguments:
        module: A module whose `forward` takes tensors, and returns a tuple of tensors and `None`s.

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
        self._places: dict[str, tuple[Owner, str]] = {}
        self._trained = list(module.parameters())
        seen: set[int] = set()
        for prefix, part in module.named_modules():
            for owner in cast(tuple[Owner, Owner], (part._parameters, part._buffers)):
                for name, tensor in owner.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self._places[f"{prefix}.{name}".lstrip(".")] = (owner, name)

    def __call__(self, *args: object, static: Hashable = None, **kwargs: object) -> Outputs:
        """Returns the result of the module.

        Arguments:
            args: Its arguments: tensors, in lists and dicts or not, and hashable values.
            static: A further hashable value on which the graph depends.
            kwargs: Its keyword arguments.

        Raises:
            UntraceableError: If the module cannot be replayed.
        """
        return self.graph(*args, static=static, **kwargs)(self.tensors(*args, **kwargs))

    def graph(self, *args: object, static: Hashable = None, **kwargs: object) -> Graph:
        """Returns the graph for arguments of these shapes, and traces it the first time.

        Arguments:
            args: The arguments of a call.
            static: A further hashable value on which the graph depends.
            kwargs: The keyword arguments of a call.

        Raises:
            UntraceableError: If the module cannot be replayed.
        """
        leaves, spec = _flattened(args, kwargs)
        kinds: list[Hashable] = []
        for leaf in leaves:
            match leaf:
                case Tensor():
                    kinds.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
                case Hashable():
                    kinds.append((type(leaf), leaf))
                case _:
                    name = type(leaf).__name__
                    raise UntraceableError(f"an argument is a {name}, which may change")
        key = _Key(
            spec,
            tuple(kinds),
            tuple([m.training for m in self._modules]),
            tuple([p.requires_grad for p in self._trained]),
            outer_handlers(),
            static,
            torch.get_default_dtype(),
        )
        found = self._graphs.get(key)
        if found is None:
            if len(self._graphs) >= MOST_GRAPHS:
                raise UntraceableError(
                    f"it is called in more than {MOST_GRAPHS} ways, with other shapes, Python "
                    "numbers or handlers each time"
                )
            found = self._graphs[key] = self._traced(args, kwargs)
        return found

    @property
    def size(self) -> int:
        """The number of graphs that were traced."""
        return len(self._graphs)

    @property
    def num_own(self) -> int:
        """The number of parameters and buffers, the first inputs of a graph."""
        return len(self._places)

    def tensors(self, *args: object, **kwargs: object) -> list[Tensor]:
        """Returns the inputs of a graph: the current parameters and buffers, and the arguments.

        Arguments:
            args: The arguments of a call.
            kwargs: The keyword arguments of a call.
        """
        now = [cast(Tensor, owner[name]) for owner, name in self._places.values()]
        return now + [leaf for leaf in _flattened(args, kwargs)[0] if isinstance(leaf, Tensor)]

    @_without_sources()
    def _traced(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Graph:
        inputs = [tensor.detach() for tensor in self.tensors(*args, **kwargs)]
        trained = {id(p) for p in self._trained if p.requires_grad}
        is_present: list[bool] = []

        def function(*flat: Tensor) -> list[Tensor]:
            """Calls the module with tensors as its parameters and buffers, and updates them."""
            arguments = iter(flat[len(self._places) :])
            called = tree_map_only(Tensor, lambda _: next(arguments), (args, kwargs))
            swapped: dict[str, Tensor] = {}
            for (name, (owner, key)), tensor in zip(self._places.items(), flat, strict=False):
                is_trained = id(owner[key]) in trained
                swapped[name] = tensor.detach().requires_grad_() if is_trained else tensor
            named = {f"module.{name}": tensor for name, tensor in swapped.items()}
            outputs, after = functional_call(_Call(self.module), named, (self._places, *called))
            for name, tensor in swapped.items():
                if after[name] is not tensor:
                    with torch.no_grad():
                        tensor.copy_(after[name])
            is_present[:] = [output is not None for output in outputs]
            return [output.detach() for output in outputs if output is not None]

        with kept_generators():
            expected = [*map(_copied, inputs)]
            expected = [*function(*expected), *expected]  # raises errors of the module itself
        before = PythonState(self._modules)
        try:
            with unvalidated(), kept_generators(), _OneHot():
                traced = make_fx(function, decomposition_table=_BATCH_NORM)
                graph: GraphModule = traced(*map(_copied, inputs))
        except ValueError:
            raise
        except Exception as error:
            raise UntraceableError(_reason(error)) from error
        _remove_dead_code(graph)
        self._check_state(before, graph)
        constants = _constants_as_inputs(graph)
        short = simplified(graph)
        for node in (*graph.graph.nodes, *short.graph.nodes):
            node.meta.clear()
        ours = list(map(_copied, inputs))
        with kept_generators(), torch.no_grad():
            found = short.forward(*ours, *constants)
        if not _are_same([*found, *ours], expected):
            raise UntraceableError("its results differ from call to call, at the same draws")
        return Graph(graph, short, constants, tuple(is_present))

    def _check_state(self, before: PythonState, graph: GraphModule) -> None:
        """Refuses a module whose call changed Python values, which a graph would not change."""
        after = PythonState(self._modules)
        changed = after.changed_since(before)
        if not changed:
            nodes = graph.graph.find_nodes(op="get_attr")
            used = {id(getattr(graph, str(node.target))) for node in nodes}
            changed = [name for name, old in after.replaced_since(before) if id(old) in used]
        if changed:
            raise UntraceableError(
                "a call changes Python values that a graph would not change, such as a count of "
                f"calls: {', '.join(changed[:3])}"
            )


class _Call(nn.Module):
    """Calls a module, and returns its parameters and buffers after the call too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        places: Mapping[str, tuple[Owner, str]],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[Outputs, Owner]:
        with local_parameters(self.module):
            outputs = self.module(*args, **kwargs)
        return outputs, {name: owner[key] for name, (owner, key) in places.items()}


def saved_by_compiling(size: int) -> float:
    """Returns the approximate seconds that compiling saves for each run of a graph, on a CPU.

    Arguments:
        size: The number of its operations.
    """
    return 6e-6 * size


def _flattened(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Sequence[object], TreeSpec | None]:
    """The leaves of arguments and their structure, which is `None` for one tensor alone."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args, None
    return tree_flatten((args, kwargs))


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    return tensor.clone(memory_format=torch.preserve_format)


class _OneHot(TorchFunctionMode):
    """Replaces `one_hot` by a version that does not read the classes off the device."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        function = _one_hot if func is F.one_hot else func
        return function(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        return F.one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).long()


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *options: bool | float,
) -> tuple[Tensor, ...]:
    """The same operation, by the name whose schema declares that running statistics change."""
    aten, affine = torch.ops.aten, (x, weight, bias)
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(*affine, *options)
    return aten._native_batch_norm_legit.default(*affine, mean, variance, *options)


_BATCH_NORM = {torch.ops.aten.native_batch_norm.default: _batch_norm}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if "trying to get a value out of symbolic" in first or "value out of a tracing" in first:
        return "a branch or a Python number in it depends on the value of a tensor"
    return f"{type(error).__name__}: {first}"


def _remove_dead_code(graph: GraphModule) -> None:
    """Removes `detach`, and operations whose results are not used."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _constants_as_inputs(graph: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors in attributes of the module, so that each run reads them."""
    nodes: list[Node] = [node for node in graph.graph.nodes if node.op == "get_attr"]
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    constants: dict[str, tuple[Tensor, Node]] = {}
    for node in nodes:
        name = str(node.target)
        value = getattr(graph, name)
        if not isinstance(value, Tensor):
            raise UntraceableError(f"its graph has a constant of type {type(value).__name__}")
        if any(node in written_nodes(user) for user in node.users):
            raise UntraceableError("it changes a tensor in place that is no buffer")
        if name not in constants:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(constants)}")
                last.meta = dict(node.meta)
            constants[name] = (value.detach(), last)
        node.replace_all_uses_with(constants[name][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [value for value, _ in constants.values()]


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor], rtol: float | None = None) -> bool:
    """Whether tensors differ by rounding at most, relative to their largest element."""
    least = 0.0 if rtol is None else 1e-6 * max(map(_largest, others), default=0.0)
    for one, other in zip(some, others, strict=True):
        if not one.is_floating_point():
            is_same = torch.equal(one, other)
        else:
            rounding = 16 * torch.finfo(one.dtype).eps if one.device.type == "cpu" else 1e-3
            relative = rounding if rtol is None else rtol
            atol = relative * _largest(other) + least
            is_same = torch.allclose(one, other, rtol=relative, atol=atol, equal_nan=True)
        if not is_same:
            return False
    return True


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _foreach_norm(tensors: list[Tensor], *order: float) -> list[Tensor]:
    return [tensor.square().sum().sqrt() for tensor in tensors]


def _normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    drawn = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.copy_(drawn if (mean, std) == (0.0, 1.0) else drawn * std + mean)


def _addmm(
    bias: Tensor, one: Tensor, other: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """A product to which the next kernel adds the bias, instead of a copy of the bias before.

    It is written as a difference, since Inductor turns the sum into `addmm` again.
    """
    product = one @ other if alpha == 1.0 else alpha * (one @ other)
    return product - (-bias if beta == 1.0 else -beta * bias)


def _erfinv(x: Tensor) -> Tensor:
    """erfinv in single precision, within 3e-7 of its value, by polynomials (Giles, 2010).

    Inductor vectorises them. Its own erfinv is a call for each element, 30 times as slow.
    """
    if x.dtype is not torch.float32:
        return NotImplemented
    w = -((1.0 - x) * (1.0 + x)).log()
    roots = torch.zeros_like(x), torch.zeros_like(x)
    for near, far in zip(*_ERFINV, strict=True):
        roots = roots[0] * (w - 2.5) + near, roots[1] * (w.sqrt() - 3.0) + far
    return x * torch.where(w < 5.0, roots[0], torch.where(w.isinf(), w, roots[1]))


_ERFINV = (
    (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087)
    + (-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
    (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773)
    + (-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)  # by powers of w - 2.5 and sqrt(w) - 3, the highest first

_FUSIBLE: dict[OpOverload, Callable[..., Tensor | list[Tensor]]] = {
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.erfinv.default: _erfinv,
    torch.ops.aten._foreach_norm.Scalar: _foreach_norm,
    torch.ops.aten.normal_.default: _normal_,
}


def _inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Run:
    """Compiles a graph; on a CPU also the calls between its kernels, if Inductor can."""
    with kept_generators(), torch.no_grad():  # Inductor can fuse the operations of _FUSIBLE
        run = make_fx(lambda *flat: graph.forward(*flat), decomposition_table=_FUSIBLE)
        decomposed: GraphModule = run(*map(_copied, inputs))
    _remove_dead_code(decomposed)
    for node in decomposed.graph.nodes:
        node.meta.clear()
    is_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
    level = logging.root.manager.disable
    for wraps in (True, False) if is_cpu else (False,):
        options = {"fallback_random": True, "cpp_wrapper": wraps}
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(), kept_generators(), torch.no_grad():
                warnings.simplefilter("ignore")
                from torch import _inductor as torch_inductor

                compiled: Run = torch_inductor.compile(decomposed, [*inputs], options=options)
                compiled(*map(_copied, inputs))  # loads the compiled code
                return compiled
        except Exception as error:
            if not wraps:
                raise UntraceableError(f"Inductor cannot compile it: {_reason(error)}") from error
        finally:
            logging.disable(level)
    raise AssertionError


class Captured:
    """Creates the CUDA graph of a function without arguments: all its kernels in one launch.

    The function runs a few times to warm up, and once to be captured. The tensors that it changes
    are then restored. The function must read the same tensors each time, change them in place, and
    never wait for the device.

    Arguments:
        function: The function to capture. Every replay uses the same tensors.
        state: The tensors that it changes.
        warm_up: The number of runs before the capture.
    """

    def __init__(
        self, function: Callable[[], Outputs], state: list[Tensor], warm_up: int = 3
    ) -> None:
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
        """Whether a device has CUDA graphs.

        Arguments:
            device: The device.
        """
        return device.type == "cuda"

    def replay(self) -> Outputs:
        """Runs the kernels again, and returns the tensors that hold the outputs."""
        self._graph.replay()
        return self.outputs
