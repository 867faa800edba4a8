"""States of the outside world that a call changes and puts back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn

__all__ = [
    "device_of",
    "evaluating",
    "kept_buffers",
    "kept_generators",
    "kept_modes",
    "local_parameters",
    "outer_handlers",
    "parameters_are_local",
    "seeded",
    "unmoved_statistics",
]


def device_of(device: str | torch.device) -> torch.device:
    """Returns a device that is there; `"auto"` is CUDA where there is one, else the CPU.

    Arguments:
        device: Its name.

    Raises:
        ValueError: Where there is no such device, or it has no float64.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros((), dtype=torch.float64, device=device)
        probe.item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(f"Expected a device out of {there}; got {device!r}.") from error
    return probe.device


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
    """Puts torch's generators, of CPU and CUDA, back to where they are now.

    CUDA is not started for it: where it was not running, its generators are told to start, as
    without the call, from torch's seed.
    """
    was_running = torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if was_running else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        if not was_running:
            torch.cuda.manual_seed_all(torch.initial_seed())


class _OwnParameters(Messenger):  # type: ignore[misc]
    """Answers every parameter statement with the module's own tensor."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.owned = {id(p) for p in program.parameters()}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if msg["done"]:
            return
        stated = msg["args"][-1] if msg["args"] else None
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if id(stated) in self.owned and constraint is constraints.real:
            msg["value"], msg["done"] = stated, True
        elif msg["name"] not in pyro.get_param_store():
            raise ValueError(
                "Expected every parameter to belong to the program's modules, as an nn.Parameter "
                f"or a PyroParam; got pyro.param({msg['name']!r}), which would live in the global "
                "store: pyro_vae.Program(model, guide) makes a program of such a pair."
            )


def parameters_are_local() -> bool:
    """Whether parameters are kept in their modules, so that none needs to be stated."""
    return any(isinstance(handler, _OwnParameters) for handler in _PYRO_STACK)


def outer_handlers() -> tuple[Any, ...]:
    """The handlers of Pyro's that a program runs under, but for those of `local_parameters`."""
    return tuple(h for h in _PYRO_STACK if not isinstance(h, _OwnParameters))


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
        ValueError: If the program states a parameter that none of its modules owns, or if two of
            its `PyroModule`s have one of the same name, which Pyro would make one.
    """
    _check_names(program)
    with pyro.get_param_store().scope(), _OwnParameters(program):
        yield


def _check_names(program: nn.Module) -> None:
    owners: dict[str, PyroModule] = {}
    for module in program.modules():
        if isinstance(module, PyroModule):
            for name in module._pyro_params:
                full = ".".join(filter(None, (module._pyro_name, name)))
                if owners.setdefault(full, module) is not module:
                    raise ValueError(
                        "Expected the PyroParams of a program to have different names; got two "
                        f"called {full!r}: Pyro would make them one."
                    )


@contextmanager
def evaluating(program: nn.Module) -> Iterator[None]:
    """Runs a program without training it, and puts its modes back as they were.

    In evaluation mode (dropout off, running statistics used), without gradients, without Pyro's
    checks, and with the global parameter store left alone.

    Arguments:
        program: The module to run.
    """
    with (
        kept_modes(program),
        torch.no_grad(),
        pyro.validation_enabled(False),
        local_parameters(program),
    ):
        program.eval()
        yield


@contextmanager
def kept_modes(program: nn.Module) -> Iterator[None]:
    """Puts the modes of a program's modules, training or evaluation, back as they are now.

    Arguments:
        program: The module.
    """
    modes = {module: module.training for module in program.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def unmoved_statistics(*modules: nn.Module) -> Iterator[None]:
    """Lets layers that train normalise by their batch, without noting it in running statistics.

    Arguments:
        modules: The modules that such layers may be in.
    """
    tracking: list[Any] = [
        layer
        for module in modules
        for layer in module.modules()
        if layer.training and getattr(layer, "track_running_stats", False)
    ]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@contextmanager
def kept_buffers(program: nn.Module) -> Iterator[None]:
    """Puts the values of a program's buffers, running means, say, back as they are now.

    Arguments:
        program: The module.
    """
    values = [(buffer, buffer.clone()) for buffer in program.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
