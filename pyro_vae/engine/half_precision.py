"""Runs the networks of a Pyro program in bfloat16, its draws and densities in float32."""

from collections.abc import Callable

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..data.rows import floating_like
from .running import Site

__all__ = ["HalfPrecision"]


class HalfPrecision:
    """Creates a program that runs under autocast to bfloat16, except for draws at sites.

    Matrix products of the networks have bfloat16 operands and float32 sums. Draws, and the
    densities of the program's trace, have the dtype of the distributions' parameters.

    Arguments:
        program: A Pyro program: a bound method of a module, or a module.

    Raises:
        ValueError: When called, if a site has a parameter in bfloat16.
    """

    def __init__(self, program: Callable[..., object]) -> None:
        self.program = program
        owner = getattr(program, "__self__", program)
        self.owner = owner if isinstance(owner, nn.Module) else None
        if self.owner is not None:
            self.__self__ = self.owner

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Runs the program.

        Arguments:
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        device = floating_like(self.owner).device.type
        halved = torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False)
        with halved, _FullPrecisionSites(device):
            return self.program(*args, **kwargs)


class _FullPrecisionSites(Messenger):  # type: ignore[misc]
    """Effect handler that draws without autocast, and refuses parameters in bfloat16."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):
            return
        base = msg["fn"]
        while hasattr(base, "base_dist"):
            base = base.base_dist
        tensors = {k: v for k, v in vars(base).items() if isinstance(v, Tensor)}
        halved = [name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16]
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
