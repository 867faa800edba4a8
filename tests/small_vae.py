"""A small VAE of bits, rows for it, and how its weights are compared."""

from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv

X = (torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) < 0.3).float()
PLAIN: dict[str, Any] = {
    "validation": None,
    "lr": 1e-3,
    "warmup": 0,
    "weight_prior": None,
    "averaged": False,
    "until_converged": False,
    "max_grad_norm": None,
}  # a fit that is a plain loop over epochs
GREY = torch.rand(50, 6, generator=torch.Generator().manual_seed(2))


def small(seed: int = 0, **members: Any) -> pv.VAE:
    asked = {
        "prior": 2,
        "likelihood": pv.likelihoods.Bernoulli(),
        "encoder": pv.networks.MLP(8),
        "decoder": pv.networks.MLP(8),
    }
    vae = pv.VAE((6,), **asked | members, seed=seed)
    vae.is_initialized = True  # fit then keeps the initial weights
    return vae


def weights(program: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
