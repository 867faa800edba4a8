"""States of the outside world that a call changes and puts back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn

__all__ = ["evaluating", "kept_generators", "local_parameters", "parameters_are_local", "seeded"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws with torch's generators started from `seed`, and puts them back as they were.

    Arguments:
        seed: The seed; with `None` the generators run on as they are.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(0):
        ...     draw = torch.randn(())
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    if seed is None:
        yield
        return
    with kept_generators():
        torch.manual_seed(seed)
        yield


@contextmanager
def kept_generators() -> Iterator[None]:
    """Puts torch's generators, of CPU and CUDA, back to where they are now."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        yield


class _OwnParameters(Messenger):  # type: ignore[misc]
    """Answers every parameter statement with the module's own tensor."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.owned = {id(p) for p in program.parameters()}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        stated = msg["args"][-1] if msg["args"] else None
        if id(stated) in self.owned:
            msg["value"], msg["done"] = stated, True
        elif msg["name"] not in pyro.get_param_store():
            raise ValueError(
                "Expected every parameter to belong to the program's modules (an nn.Parameter, a "
                f"PyroParam, a submodule); got pyro.param({msg['name']!r}), which would live in "
                "the global store."
            )


def parameters_are_local() -> bool:
    """Whether parameters are kept in their modules, so that none needs to be stated."""
    return any(isinstance(handler, _OwnParameters) for handler in _PYRO_STACK)


@contextmanager
def local_parameters(program: nn.Module) -> Iterator[None]:
    """Keeps the parameters of `program` in its modules, and the global store as it was.

    `pyro.module` and `pyro.param` look parameters up by name in a global store, so that of two
    programs that share a name the second one trains nothing. Here every statement of a
    parameter is answered with the module's own; what a `PyroModule` writes to the store goes to
    an empty one, which is thrown away.

    Arguments:
        program: The module that owns the parameters.

    Raises:
        ValueError: Where the program states a parameter that none of its modules owns.
    """
    with pyro.get_param_store().scope(), _OwnParameters(program):
        yield


@contextmanager
def evaluating(program: nn.Module) -> Iterator[None]:
    """Runs a program without training it, and puts its modes back as they were.

    In evaluation mode (dropout off, running statistics used), without gradients, without Pyro's
    checks, and with the global parameter store left alone.

    Arguments:
        program: The module to run.
    """
    modes = {module: module.training for module in program.modules()}
    program.eval()
    try:
        with torch.no_grad(), pyro.validation_enabled(False), local_parameters(program):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
