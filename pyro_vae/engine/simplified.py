"""Simplifies traced graphs: fewer operations, and the same numbers bit for bit."""

import operator
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

__all__ = ["simplified", "written_nodes"]

MOST_HELD = 2**16  # elements of a constant that is stored in the graph

aten = torch.ops.aten

_UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
_LIKE_ANOTHER = {"full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"}
_FROM_NOTHING = {"full", "zeros", "ones", "arange", "scalar_tensor", "eye"}
_INVOLUTIONS = {aten.t.default, aten.transpose.int, aten.neg.default}
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

    Results that depend on shapes alone (zeros, ones, and functions of these) are computed once and
    stored; operations without effect (a transpose of a transpose, a factor of 1) are removed;
    repeated operations are shared. Random draws, tensors that are changed in place, and tensors
    that share memory with those are not touched.

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
    removable = _removable(short.graph)
    _remove_repeated(short.graph, removable)
    _fold_constants(short, removable)
    short.graph.eliminate_dead_code()
    short.recompile()
    return short


def written_nodes(node: Node) -> list[Node]:
    """Returns the nodes whose tensors an operation changes in place.

    Arguments:
        node: The operation.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = {argument.name: argument for argument in node.target._schema.arguments}
    arguments = dict(zip(schema, node.args)) | node.kwargs
    changed = [
        value
        for name, value in arguments.items()
        if (alias := schema[name].alias_info) is not None and alias.is_write
    ]
    found: list[Node] = []
    map_arg(changed, found.append)
    return found


def _removable(graph: Graph) -> set[Node]:
    """The operations that may be removed or shared: pure, on tensors that are never changed."""
    roots: dict[Node, Node] = {}
    for node in graph.nodes:
        source = node.all_input_nodes[0] if _is_view(node) else node
        roots[node] = roots.get(source, source)
    changed = {roots[target] for node in graph.nodes for target in written_nodes(node)}
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


def _remove_repeated(graph: Graph, removable: set[Node]) -> None:
    """Replaces operations without effect by their operand, and repeated ones by the first."""
    outputs = set(graph.output_node().all_input_nodes)
    first: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node not in removable:
            continue
        same = _unchanged_operand(node)
        if same is not None and node in outputs and (same in outputs or same.op == "placeholder"):
            same = None
        if same is None and node not in outputs:
            same = first.setdefault(_hashable([node.target, node.args, node.kwargs]), node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            removable.discard(node)


def _hashable(value: object) -> Hashable:
    """A hashable form of an operation, in which 1 differs from 1.0 and True."""
    if isinstance(value, Node | torch._ops.OpOverload):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(value[key])) for key in sorted(value))
    return repr(value)


def _unchanged_operand(node: Node) -> Node | None:
    """The operand of an operation that returns it unchanged, in values and layout, else `None`."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in _INVOLUTIONS and source.target is node.target:
        inner = source.args[0]
        return inner if isinstance(inner, Node) and _are_alike(node, inner) else None
    is_neutral = node.target in _NEUTRAL and len(node.args) == 2 and not node.kwargs
    if is_neutral:
        other = node.args[1]
        is_neutral = isinstance(other, int | float) and other == _NEUTRAL[node.target]  # type: ignore[index]
    changes_nothing = node.target in _RESHAPING or is_neutral
    return source if changes_nothing and _are_alike(node, source) else None


def _are_alike(one: Node, other: Node) -> bool:
    """Whether two tensors have the same shape, layout and dtype."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _fold_constants(module: GraphModule, removable: set[Node]) -> None:
    """Computes the results that depend on shapes alone, and stores those that others read."""
    graph = module.graph
    outputs = set(graph.output_node().all_input_nodes)
    constants: dict[Node, Tensor] = {}
    for node in graph.nodes:
        if node in removable and node not in outputs:
            value = _constant(node, constants)
            if value is not None:
                constants[node] = value
    read = [node for node in constants if any(user not in constants for user in node.users)]
    for i, node in enumerate(read):
        module.register_buffer(f"constant_{i}", constants[node])
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(f"constant_{i}"))


@torch.no_grad()
def _constant(node: Node, constants: dict[Node, Tensor]) -> Tensor | None:
    """The value of an operation that depends on constants and shapes alone, else `None`."""
    inputs = node.all_input_nodes
    if _name(node) in _LIKE_ANOTHER:
        shapes = {source: _empty_like(source) for source in inputs if source not in constants}
    elif inputs or _name(node) in _FROM_NOTHING:
        shapes = {}
    else:
        return None
    tensors = constants | shapes
    if any(tensors.get(source) is None for source in inputs):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), tensors.__getitem__)
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(value, Tensor):
        return None
    return value if value.untyped_storage().nbytes() <= MOST_HELD * value.itemsize else None


def _empty_like(node: Node) -> Tensor | None:
    like = node.meta.get("val")
    if not isinstance(like, Tensor):
        return None
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
