"""Traced graphs with fewer operations, that compute the same numbers bit for bit."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

__all__ = ["simplified", "written"]

MOST_HELD = 2**16  # elements of a tensor that is held from call to call

aten = torch.ops.aten

_UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
_OF_A_SHAPE = {"full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"}
_FROM_NOTHING = {"full", "zeros", "ones", "arange", "scalar_tensor", "eye"}
_UNDOING_THEMSELVES = {aten.t.default, aten.transpose.int, aten.neg.default}
_RESHAPING = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
_NEUTRAL = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
    aten.sub.Tensor: 0,
}


def simplified(module: GraphModule) -> GraphModule:
    """Returns the same computation in fewer operations.

    What follows from shapes alone (zeros, ones, and what is made of these) is computed now, and
    held; what changes nothing (a transpose of a transpose, a factor of 1) is left out; what is
    computed twice is computed once. Random draws, tensors that are changed in place and all that
    shares memory with them stay as they are.

    Arguments:
        module: A graph of aten operations without attributes, as `make_fx` traced it.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> def doubled(x: Tensor) -> Tensor:
        ...     return x.t().t() * 1.0 + torch.ones_like(x) * x
        >>> graph = make_fx(doubled)(torch.zeros(2, 3))
        >>> [
        ...     sum(n.op == "call_function" for n in g.graph.nodes)
        ...     for g in (graph, simplified(graph))
        ... ]
        [6, 2]
    """
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    short = GraphModule(module, graph)
    movable = _movable(short.graph)
    _leave_out(short.graph, movable)
    _hold(short, movable)
    short.graph.eliminate_dead_code()
    short.recompile()
    return short


def written(node: Node) -> list[Node]:
    """Returns the nodes into whose tensors an operation writes.

    Arguments:
        node: The operation.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    said = {argument.name: argument for argument in node.target._schema.arguments}
    given = dict(zip(said, node.args)) | node.kwargs
    changed = [
        value
        for name, value in given.items()
        if (alias := said[name].alias_info) is not None and alias.is_write
    ]
    found: list[Node] = []
    map_arg(changed, found.append)
    return found


def _movable(graph: Graph) -> set[Node]:
    """The operations that may be left out or shared: pure, and no change is seen through them."""
    roots: dict[Node, Node] = {}
    for node in graph.nodes:
        source = node.all_input_nodes[0] if _is_view(node) else node
        roots[node] = roots.get(source, source)
    changed = {roots[target] for node in graph.nodes for target in written(node)}
    return {
        node
        for node in graph.nodes
        if _is_pure(node)
        and changed.isdisjoint(roots[other] for other in (node, *node.all_input_nodes))
    }


def _is_pure(node: Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and _name(node) not in _UNINITIALISED
    )


def _is_view(node: Node) -> bool:
    """Whether its result may share the memory of its first tensor."""
    target = node.target
    if target is operator.getitem or target is aten._unsafe_view.default:
        return True
    if not isinstance(target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    return any(returned.alias_info is not None for returned in target._schema.returns)


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _leave_out(graph: Graph, movable: set[Node]) -> None:
    outputs = set(graph.output_node().all_input_nodes)
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node not in movable:
            continue
        same = _same(node)
        if same is not None and node in outputs and (same in outputs or same.op == "placeholder"):
            same = None
        if same is None and node not in outputs:
            same = first.setdefault(_spelled([node.target, node.args, node.kwargs]), node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            movable.discard(node)


def _spelled(value: Any) -> Any:
    """An operation in hashable words, in which 1 is neither 1.0 nor True."""
    if isinstance(value, Node | torch._ops.OpOverload):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_spelled, value))
    if isinstance(value, dict):
        return tuple((key, _spelled(value[key])) for key in sorted(value))
    return repr(value)


def _same(node: Node) -> Node | None:
    """The operand, where the operation gives back the same numbers in the same places."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in _UNDOING_THEMSELVES and source.target is node.target:
        inner = source.args[0]
        return inner if isinstance(inner, Node) and _are_alike(node, inner) else None
    changes_nothing = node.target in _RESHAPING or _is_neutral(node)
    return source if changes_nothing and _are_alike(node, source) else None


def _is_neutral(node: Node) -> bool:
    if len(node.args) != 2 or node.kwargs or node.target not in _NEUTRAL:
        return False
    other = node.args[1]
    return isinstance(other, int | float) and other == _NEUTRAL[node.target]


def _are_alike(one: Node, other: Node) -> bool:
    """Whether two tensors have one shape, layout and dtype."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _hold(module: GraphModule, movable: set[Node]) -> None:
    """Computes what follows from shapes alone, and holds what the rest reads of it."""
    graph = module.graph
    outputs = set(graph.output_node().all_input_nodes)
    known: dict[Node, Tensor] = {}
    for node in graph.nodes:
        if node in movable and node not in outputs:
            value = _known(node, known)
            if value is not None:
                known[node] = value
    read = [node for node in known if any(user not in known for user in node.users)]
    for i, node in enumerate(read):
        module.register_buffer(f"held_{i}", known[node])
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(f"held_{i}"))


@torch.no_grad()
def _known(node: Node, known: dict[Node, Tensor]) -> Tensor | None:
    """The value of an operation that depends on no input but by its shape."""
    inputs = node.all_input_nodes
    if _name(node) in _OF_A_SHAPE:
        shapes = {source: _blank(source) for source in inputs if source not in known}
    elif inputs or _name(node) in _FROM_NOTHING:
        shapes = {}
    else:
        return None
    tensors = known | shapes
    if any(tensors.get(source) is None for source in inputs):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), tensors.__getitem__)
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(value, Tensor):
        return None
    return value if value.untyped_storage().nbytes() <= MOST_HELD * value.itemsize else None


def _blank(node: Node) -> Tensor | None:
    like = node.meta.get("val")
    if not isinstance(like, Tensor):
        return None
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
