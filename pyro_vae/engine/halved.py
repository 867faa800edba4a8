"""Pyro programs whose networks run in bfloat16, and whose draws and densities do not."""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..data.rows import floating_like

__all__ = ["Halved"]


class Halved:
    """Creates a program that runs under autocast to bfloat16; sites and their draws stay as is.

    Matrix products of the networks have bfloat16 operands and float32 sums; draws, and the
    densities that are computed of its trace, have the dtype of the distributions' parameters.

    Arguments:
        program: A Pyro program: a bound method of a module, or a module.

    Raises:
        ValueError: When called, where a site has a parameter in bfloat16.
    """

    def __init__(self, program: Any) -> None:
        self.program = program
        owner = getattr(program, "__self__", program)
        if isinstance(owner, nn.Module):
            self.__self__ = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program.

        Arguments:
            args: Its arguments.
            kwargs: The same, by name.
        """
        like = floating_like(getattr(self, "__self__", None))
        device = like.device.type
        halved = torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False)
        with halved, _WholeSites(device):
            return self.program(*args, **kwargs)


class _WholeSites(Messenger):  # type: ignore[misc]
    """Draws at full precision, and refuses parameters that have lost it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        halved = [k for k, v in _parameters(msg["fn"]).items() if v.dtype == torch.bfloat16]
        if halved:
            raise ValueError(
                f"Expected the parameters of site {msg['name']!r} in float32, under "
                f"precision='bf16'; got {', '.join(halved)} in bfloat16: end the network that "
                "makes them with .float()."
            )
        if not msg["done"] and not msg["is_observed"]:
            with torch.autocast(self.device, enabled=False):
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["done"] = True


def _parameters(distribution: Any) -> dict[str, Tensor]:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return {k: v for k, v in vars(distribution).items() if isinstance(v, Tensor)}
