"""State that goes into a file comes back from it."""

import functools
import json
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from pyro_vae.training.checkpoint import (
    generator_states,
    joined_state,
    plain,
    set_generator_states,
    split_state,
    unplain,
)

OPTIMIZERS = {
    "Adam": functools.partial(optim.Adam, lr=0.1),
    "AdamW": functools.partial(optim.AdamW, lr=0.1, amsgrad=True),
    "SGD": functools.partial(optim.SGD, lr=0.1, momentum=0.9),
    "SGD without state": functools.partial(optim.SGD, lr=0.1),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.1),
    "NAdam": functools.partial(optim.NAdam, lr=0.1),
}
SCHEDULES = {
    "steps": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 3, 3]),
    "a function": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "cosine": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=5),
}


def stepped(optimizer: Any, network: nn.Module) -> None:
    optimizer.zero_grad()
    network(torch.ones(3, 2)).square().sum().backward()
    optimizer.step()


def read_again(optimizer: Any) -> dict[str, Any]:
    tensors, rest = split_state(optimizer.state_dict())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return joined_state(copies, json.loads(json.dumps(rest)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_were_never_written(name: str) -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = (OPTIMIZERS[name](n.parameters()) for n in (one, other))
    stepped(first, one)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(read_again(first))
    stepped(first, one)
    stepped(second, other)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_if_it_were_never_written(name: str) -> None:
    optimizers = [optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0) for _ in range(2)]
    first, second = (SCHEDULES[name](optimizer) for optimizer in optimizers)
    for optimizer in optimizers:
        optimizer.step()
    first.step()
    optimizers[1].load_state_dict(read_again(optimizers[0]))
    second.load_state_dict(unplain(json.loads(json.dumps(plain(first.state_dict())))))
    for _ in range(3):
        first.step()
        second.step()
        assert first.get_last_lr() == second.get_last_lr()


def test_generators_go_on() -> None:
    before = generator_states()
    one = torch.rand(3)
    set_generator_states(before)
    assert torch.equal(torch.rand(3), one)
