"""Graphs in fewer operations: the same numbers, the same changes, the same draws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.engine.simplified import simplified

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

Function = Callable[[Tensor], Any]


def transposed_twice(x: Tensor) -> Tensor:
    return x.t().t().exp()


def reshaped_to_itself(x: Tensor) -> Tensor:
    return x.view(3, 4).expand(3, 4).exp()


def spread_out(x: Tensor) -> Tensor:
    return x[:1].expand(3, 4) + x


def of_other_strides(x: Tensor) -> Tensor:
    return x.t().contiguous().t().exp()


def neutral(x: Tensor) -> Tensor:
    return ((x * 1.0) / 1 - 0.0).pow(1.0).exp()


def doubly_negated(x: Tensor) -> Tensor:
    return x.neg().neg().exp()


def another_dtype(x: Tensor) -> Tensor:
    return x.long() * 1.0 + x.long() * 1 + x.long() / 1


def one_and_true(x: Tensor) -> Tensor:
    n = x.long()
    return (n * 2).double() + n * 2.0


def twice(x: Tensor) -> Tensor:
    return x.exp() * x.exp() + (x + 1).tanh() + (x + 1).tanh()


def of_the_shape(x: Tensor) -> Tensor:
    scale = torch.ones_like(x).expand(2, 3, 4)
    return (x / scale - scale.log()) * x.new_full((), 3.0).square()


def from_nothing(x: Tensor) -> Tensor:
    return x + torch.arange(4).float().sqrt() + torch.full((3, 1), 2.0)


def drawn_twice(x: Tensor) -> Tensor:
    return torch.randn(3, 4) * x - torch.randn(3, 4) * x + torch.rand_like(x).bernoulli()


def filled(x: Tensor) -> Tensor:
    return torch.empty(3, 4).normal_() + torch.empty(3, 4).normal_() + x


def changed_between(x: Tensor) -> Tensor:
    before = x * 2
    x.add_(1.0)
    return before + x * 2


def changed_behind_a_view(x: Tensor) -> Tensor:
    copy = x * 1.0
    flat, other = copy.view(12), x.t().t()
    copy.add_(1.0)
    other.mul_(3.0)
    return flat + copy.view(12) + x.view(12)


def changed_zeros(x: Tensor) -> Tensor:
    one, other = torch.zeros_like(x), torch.zeros_like(x)
    one.add_(x)
    return one + other


def in_parts(x: Tensor) -> Tensor:
    one, other = x.split(2, 1)
    again, _ = x.split(2, 1)
    return one * other + again


def returned_twice(x: Tensor) -> tuple[Tensor, ...]:
    return x.exp(), x.exp(), x * 1.0, torch.ones_like(x)


LENGTHS = {
    transposed_twice: 1,
    reshaped_to_itself: 1,
    spread_out: 3,
    of_other_strides: 4,
    neutral: 1,
    doubly_negated: 1,
    another_dtype: 5,
    one_and_true: 5,
    twice: 6,
    of_the_shape: 3,
    from_nothing: 2,
    drawn_twice: 8,
    filled: 6,
    changed_between: 4,
    changed_behind_a_view: 10,
    changed_zeros: 3,
    in_parts: 5,
    returned_twice: 4,
}


def run(graph: GraphModule) -> tuple[Any, Tensor]:
    x = X.clone()
    torch.manual_seed(0)
    return graph(x), x


def length(graph: GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


@pytest.mark.parametrize("function", LENGTHS, ids=lambda function: function.__name__)
def test_a_short_graph_computes_the_same(function: Function) -> None:
    graph = make_fx(function)(X.clone())
    short = simplified(graph)
    for _ in range(2):  # what is held is held well
        torch.testing.assert_close(run(short), run(graph), rtol=0.0, atol=0.0)
    assert length(short) == LENGTHS[function] <= length(graph)


def test_what_is_returned_is_nobody_elses() -> None:
    short = simplified(make_fx(returned_twice)(X.clone()))
    outputs, x = run(short)
    places = {tensor.data_ptr() for tensor in (*outputs, x)}
    assert len(places) == len(outputs) + 1
    outputs[3].zero_()
    assert bool((run(short)[0][3] == 1.0).all())


def test_large_tensors_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = make_fx(of_the_shape)(X.clone())
    assert len(dict(simplified(graph).named_buffers())) == 3
    monkeypatch.setattr("pyro_vae.engine.simplified.MOST_HELD", 0)
    assert not dict(simplified(graph).named_buffers())
