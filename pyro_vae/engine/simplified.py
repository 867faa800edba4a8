"""Simplifies traced graphs: fewer operations, and the same numbers bit for bit."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
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
_NEUTRAL: dict[object, int] = {
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
    if not isinstance(node.target, OpOverload):
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
    pure: list[Node] = []
    for node in graph.nodes:
        is_pure, may_share_memory = False, False
        match node.target:
            case operator.getitem:
                is_pure, may_share_memory = True, True
            case OpOverload(namespace=namespace, tags=tags, _schema=schema):
                is_pure = (
                    namespace == "aten"
                    and not schema.is_mutable
                    and torch.Tag.nondeterministic_seeded not in tags
                    and _name(node) not in _UNINITIALISED
                )
                is_view = any(returned.alias_info is not None for returned in schema.returns)
                may_share_memory = is_view or node.target is aten._unsafe_view.default
        has_source = may_share_memory and node.all_input_nodes
        source = node.all_input_nodes[0] if has_source else node
        roots[node] = roots.get(source, source)
        if is_pure:
            pure.append(node)
    changed = {roots[target] for node in graph.nodes for target in written_nodes(node)}
    return {
        node
        for node in pure
        if changed.isdisjoint(roots[other] for other in (node, *node.all_input_nodes))
    }


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _remove_repeated(graph: Graph, removable: set[Node]) -> None:
    """Shares repeated operations, and removes those that return an operand unchanged."""
    outputs = set(graph.output_node().all_input_nodes)
    first: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node not in removable:
            continue
        same = _unchanged_operand(node)
        if same is not None and node in outputs and (same in outputs or same.op == "placeholder"):
            same = None
        if same is None and node not in outputs:
            operation = repr((node.target, node.args, sorted(node.kwargs.items())))
            same = first.setdefault(operation, node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            removable.discard(node)


def _unchanged_operand(node: Node) -> Node | None:
    """The operand of an operation that returns it unchanged, in values and layout, else `None`."""
    match node.args:
        case (Node(target=node.target, args=(Node() as same, *_)), *_) if (
            node.target in _INVOLUTIONS
        ):
            pass
        case (Node() as same, int() | float() as other) if (
            not node.kwargs and other == _NEUTRAL.get(node.target)
        ):
            pass
        case (Node() as same, *_) if node.target in _RESHAPING:
            pass
        case _:
            return None
    layout = _layout(node)
    return same if layout is not None and layout == _layout(same) else None


def _layout(node: Node) -> tuple[Sequence[int], Sequence[int], torch.dtype, torch.device] | None:
    """Shape, strides, dtype and device of the result of an operation, if it is one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return value.shape, value.stride(), value.dtype, value.device


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
    tensors = {source: constants[source] for source in inputs if source in constants}
    if _name(node) in _LIKE_ANOTHER:
        for source in inputs:
            if source not in tensors and (layout := _layout(source)) is not None:
                shape, strides, dtype, device = layout
                tensors[source] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    elif not inputs and _name(node) not in _FROM_NOTHING:
        return None
    if not tensors.keys() >= set(inputs):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), tensors.__getitem__)
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(value, Tensor):
        return None
    return value if value.untyped_storage().nbytes() <= MOST_HELD * value.itemsize else None
