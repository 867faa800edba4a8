"""Contexts that change global state, or that of a module, and restore it at the end."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeAlias, TypeVar

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from ..data.checks import checked

__all__ = [
    "LOCK",
    "Site",
    "device_of",
    "check_gradients",
    "evaluating",
    "kept_buffers",
    "kept_generators",
    "kept_modes",
    "local_parameters",
    "outer_handlers",
    "owner_of",
    "parameters_are_local",
    "public",
    "seeded",
    "unvalidated",
    "unmoved_statistics",
]

P = ParamSpec("P")
T = TypeVar("T")

LOCK = threading.RLock()

Site: TypeAlias = Any  # a message of Pyro's, a dict whose values have no types


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator of each public call that runs a program: one call at a time, checked arguments.

    A process has one stack of Pyro's effect handlers, one parameter store and one state of
    torch's generators. Calls from several threads wait for each other, so that their results are
    those of the same calls one after the other. A call may call others, in its own thread. A call
    that is refused leaves torch's generator as it was.

    Arguments:
        function: The public function; its plain arguments are checked before it waits.
    """
    return checked(function, _alone)


@contextmanager
def _alone() -> Iterator[None]:
    with LOCK:
        before = torch.get_rng_state()
        try:
            yield
        except ValueError:
            torch.set_rng_state(before)
            raise


def check_gradients(parameters: Iterable[Tensor]) -> None:
    """Refuses to train where torch computes no gradients.

    Arguments:
        parameters: The parameters to train.

    Raises:
        ValueError: If gradients are switched off, or the parameters were made under
            `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in parameters):
        raise ValueError(
            "The program is run, or was built, under torch.inference_mode(), where there are no "
            "gradients: do both outside of it."
        )
    if not torch.is_grad_enabled():
        raise ValueError(
            "Training needs gradients, which are switched off here: call it outside of "
            "torch.no_grad()."
        )


def owner_of(pyro_program: Callable[..., Any]) -> nn.Module | None:
    """Returns the module that a Pyro program is or is a method of, or `None`.

    Arguments:
        pyro_program: The program, with or without handlers of Pyro.
    """
    plain = inspect.unwrap(pyro_program)
    if isinstance(plain, functools.partial):  # a method that a handler of Pyro decorates
        return next((part for part in plain.args if isinstance(part, nn.Module)), None)
    owner = getattr(plain, "__self__", plain)
    return owner if isinstance(owner, nn.Module) else None


def device_of(device: str | torch.device) -> torch.device:
    """Returns an available device. `"auto"` is CUDA if it is available, else the CPU.

    Arguments:
        device: The name of the device.

    Raises:
        ValueError: If there is no such device, or it does not support float64.
    """
    if str(device) == "auto":
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
    """Seeds torch's generators, and restores their state at the end.

    Arguments:
        seed: The seed. `None` continues the generators from their state, and does not restore
            them.

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
    """Restores the state of torch's generators, on CPU and CUDA, at the end.

    This does not initialise CUDA. If CUDA was not initialised before, its generators are seeded
    with torch's seed, as they would be without the call.
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
    """Effect handler by which each `pyro.param` statement returns the module's own tensor."""

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
    """Whether parameters stay in their modules, so that no `pyro.module` statement is needed."""
    return len(outer_handlers()) < len(_PYRO_STACK)


def outer_handlers() -> tuple[Messenger, ...]:
    """Returns the active effect handlers of Pyro, without those of `local_parameters`."""
    return tuple(h for h in _PYRO_STACK if not isinstance(h, _OwnParameters))


@contextmanager
def local_parameters(program: nn.Module) -> Iterator[None]:
    """Keeps the parameters of `program` in its modules, and does not change the global store.

    `pyro.module` and `pyro.param` look up parameters by name in a global store, so that a
    second program of the same names would not be trained. Here each statement returns the
    module's own parameter. A `PyroModule` writes to an empty store instead, which
    is discarded.

    Arguments:
        program: The module that owns the parameters.

    Raises:
        ValueError: If a `pyro.param` statement names a parameter that none of the modules
            owns, or if two of its `PyroModule`s have parameters of the same name, which Pyro would
            treat as one.
    """
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
    with pyro.get_param_store().scope(), _OwnParameters(program):
        yield


def unvalidated() -> Any:
    """Switches off the validation of Pyro and of torch, and restores each setting at the end.

    `pyro.validation_enabled` would restore torch's flag to the value of Pyro's, but the two may
    differ: importing `zuko` changes torch's alone.
    """
    names = ("distributions_pyro", "distributions_torch", "poutine", "infer")
    return pyro.settings.context(**{f"validate_{name}": False for name in names})


@contextmanager
def evaluating(program: nn.Module) -> Iterator[None]:
    """Runs a program in evaluation mode, and restores its modes at the end.

    The program then runs without dropout, with running statistics, without gradients, without
    Pyro's validation, and without changes of the global parameter store.

    Arguments:
        program: The module to run.
    """
    with (
        kept_modes(program),
        torch.no_grad(),
        unvalidated(),
        local_parameters(program),
    ):
        program.eval()
        yield


@contextmanager
def kept_modes(program: nn.Module) -> Iterator[None]:
    """Restores the modes (training or evaluation) of a program's modules at the end.

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
    """Lets layers in training mode normalise by the batch, without updating running statistics.

    Arguments:
        modules: The modules that may contain such layers.
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
    """Restores the values of a program's buffers, such as running means, at the end.

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
