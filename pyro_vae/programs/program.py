"""Program: one module from a model and a guide that are written as in Pyro's tutorials."""

import contextlib
import copy
import dis
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Self

import pyro
import pyro.primitives
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.params.param_store import module_from_param_with_module_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from ..data.read import read
from ..data.rows import PLATE
from ..engine.running import (
    kept_generators,
    kept_modes,
    owner_of,
    parameters_are_local,
    public,
    unvalidated,
)

__all__ = ["Program"]


class Program(nn.Module):
    r"""Creates a program from a model and a guide that are written as in Pyro's tutorials.

    Both may be functions, methods or modules (a `PyroModule`, an AutoGuide) with `pyro.param` and
    `pyro.module` statements. The program has the methods `model(x)` and `guide(x)`, so that
    :func:`pyro_vae.fit`, :func:`pyro_vae.log_evidence` and all other functions accept it.

    The parameters belong to the program, not to Pyro's global store, which does not change.
    They are collected in dry runs on a few rows, by :meth:`prepare` or at the first call:

    - each `pyro.param` becomes a parameter `params.<name>`, with a `/` for each dot of the name.
      The program stores the unconstrained value; the statement returns the constrained one;
    - a module becomes a submodule `parts.<name>` if the model or the guide is that module or
      one of its methods, passes it to `pyro.module`, or uses it as a variable from outside the
      function.

    Such a module is not copied: training the program trains it, and two programs of one module
    share it. `copy.deepcopy` of a prepared program copies its modules too.

    The model and the guide take one argument, the rows: a tensor, or a dict of tensors. If yours
    take several, wrap them: `pv.Program(lambda row: model(row["x"], row["y"]), ...)`.

    Arguments:
        model: The model.
        guide: The guide. An AutoGuide can be the guide of latents that all rows share. It cannot
            be the guide of latents per row, because it has no parameters for new rows.
        plate: The name of the plate of the rows in your model and guide. The program renames this
            plate to `"data"` when it runs.

    Raises:
        ValueError: If the model or the guide cannot be called, or `plate` is not a name. In the
            dry runs: if no site is in the plate of the rows, or if the shape of a parameter
            depends on the number of rows.

    Example:
        >>> import pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> from pyro.distributions import constraints
        >>> def model(x):
        ...     scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        ...     with pyro.plate("patients", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, scale), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.zeros(()))
        ...     with pyro.plate("patients", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.5))
        >>> program = pv.Program(model, guide, plate="patients")
        >>> history = pv.fit(program, torch.randn(64), max_epochs=2, seed=0, device="cpu")
        >>> sorted(program.state_dict())
        ['params.scale', 'params.slope']
        >>> list(pyro.get_param_store().keys())
        []
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *, plate: str = PLATE
    ) -> None:
        super().__init__()
        for name, pyro_program in (("model", model), ("guide", guide)):
            if not callable(pyro_program) or inspect.isclass(pyro_program):
                raise ValueError(
                    f"Expected the {name} to be a function, a method or a module; got "
                    f"{pyro_program!r}."
                )
        if not isinstance(plate, str) or not plate:
            raise ValueError(f"Expected plate to be the name of a plate; got {plate!r}.")
        self.plate = plate
        self.parts, self.params = nn.Module(), nn.Module()
        self._pair = (model, guide)
        self._constraints: dict[str, constraints.Constraint] = {}
        self._referenced: list[tuple[str, _Referenced]] = []
        self._is_prepared = False
        for name, pyro_program in (("model", model), ("guide", guide)):
            if (owner := owner_of(pyro_program)) is not None:
                self._add_part(name, owner)
        for pyro_program in self._pair:
            for name, module in _modules_used(pyro_program).items():
                self._refer_to(name, module)

    def model(self, *args: object, **kwargs: object) -> Any:
        """Runs the model.

        Arguments:
            args: The arguments of the model: the rows.
            kwargs: The keyword arguments of the model.

        Returns:
            The return value of the model.
        """
        return self._run(self._pair[0], args, kwargs)

    def guide(self, *args: object, **kwargs: object) -> Any:
        """Runs the guide.

        Arguments:
            args: The arguments of the guide: the rows.
            kwargs: The keyword arguments of the guide.

        Returns:
            The return value of the guide.
        """
        return self._run(self._pair[1], args, kwargs)

    @property
    def is_prepared(self) -> bool:
        """Whether the parameters were collected, by :meth:`prepare` or at the first call."""
        return self._is_prepared

    @public
    def prepare(self, *args: object, **kwargs: object) -> Self:
        """Collects the parameters in dry runs on a few rows. A second call does nothing.

        The first run of the program does this too. Call `prepare` yourself before anything that
        needs the parameters and does not run the program: `parameters()`, `state_dict()`,
        `pyro_vae.load(path, into=...)`.

        Arguments:
            args: The arguments of the model and the guide. If there is one, it is rows as for
                `fit`, and the dry runs use the first few.
            kwargs: Their keyword arguments.

        Raises:
            ValueError: If no site is in the plate of the rows, or if the shape of a parameter
                depends on the number of rows.

        Returns:
            The program itself.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
            >>> pv.Program(vae.model, vae.guide).prepare(torch.ones(3, 4)).is_prepared
            True
        """
        if self._is_prepared:
            return self
        other: tuple[Any, ...] = ()
        with self._in_place():
            if len(args) == 1 and not kwargs:
                rows = read(args[0], self, check=False, move=True)
                args, other = (
                    (rows.select(torch.arange(count, device=rows.device) % len(rows)),)
                    for count in (2, 3)
                )
            found = self._dry_run(args, kwargs)
            _check_guides(self.modules(), self.plate)
            three = self._dry_run(other, {}).params if other else {}
        for name, two in found.params.items():
            if name in three and two.shape != three[name].shape:
                raise ValueError(
                    f"The shape of pyro.param({name!r}) depends on the number of rows, "
                    f"{tuple(two.shape)} for 2 rows and {tuple(three[name].shape)} for 3, so the "
                    "program cannot run on minibatches or other rows: compute it from each row by "
                    "a network."
                )
        self._own(found)
        self._is_prepared = True
        return self

    def check(self, x: Any) -> None:
        """Prepares the program, and leaves the state of torch's generators as it is.

        `fit` and all functions that evaluate a program call this method first.

        Arguments:
            x: Rows.

        Raises:
            ValueError: If :meth:`prepare` raises one.
        """
        with kept_generators():
            self.prepare(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the parameters and buffers by name, as `nn.Module.state_dict` does.

        Arguments:
            args: The arguments of `nn.Module.state_dict`.
            kwargs: The keyword arguments of `nn.Module.state_dict`.

        Raises:
            ValueError: If the parameters are not collected yet; call :meth:`prepare` first.
        """
        self._check_prepared()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads parameters and buffers from a dict, as `nn.Module.load_state_dict` does.

        Arguments:
            args: The arguments of `nn.Module.load_state_dict`.
            kwargs: The keyword arguments of `nn.Module.load_state_dict`.

        Raises:
            ValueError: If the parameters are not collected yet; call :meth:`prepare` first.
        """
        self._check_prepared()
        return super().load_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The name of the plate of the rows."""
        return f"plate={self.plate!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies the program, and restores the model of an AutoGuide, which Pyro does not copy."""
        guides = [(part, part._model) for part in self.modules() if isinstance(part, AutoGuide)]
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for guide, model in guides:
            guide._model = model
            memo[id(guide)]._model = copy.deepcopy(model, memo)
        return copied

    def _check_prepared(self) -> None:
        if not self._is_prepared:
            raise ValueError(
                "This Program has no parameters yet: it creates them when it first runs on rows. "
                "Call program.prepare(x) first."
            )

    def _run(self, pyro_program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.prepare(*args, **kwargs)
        with self._in_place(), pyro.get_param_store().scope(), _Owned(self):
            if not parameters_are_local():
                for name, parameter in self.named_parameters():
                    _param_site(parameter, name=f"{type(self).__name__}-{id(self)}.{name}")
            return pyro_program(*args, **kwargs)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Makes the model and the guide use the modules of this program.

        A copy of a program has modules of its own, but its model and guide are functions that
        still refer to the modules of the original.
        """
        before = []
        for path, referenced in self._referenced:
            own, outside = self.get_submodule(path), referenced.module
            if own is not outside:
                before.append((outside, outside.__dict__))
                outside.__dict__ = own.__dict__
        try:
            yield
        finally:
            for outside, attributes in reversed(before):
                outside.__dict__ = attributes

    def _dry_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Found":
        """Runs guide and model in evaluation mode; records parameters, modules and plates."""
        model, guide = self._pair
        noted = _Noted()
        with (
            poutine.block(),
            kept_modes(self),
            torch.no_grad(),
            unvalidated(),
            pyro.get_param_store().scope() as state,
            noted,
            noted.kept_modes(),
        ):
            self.eval()
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
            poutine.replay(model, trace=trace)(*args, **kwargs)
        if self.plate not in noted.plates:
            raise ValueError(
                f"No site of the program is in a plate named {self.plate!r}: its plates are "
                f"{sorted(noted.plates)}. Name the plate of the rows: "
                "pv.Program(model, guide, plate=...)."
            )
        if PLATE in noted.plates - {self.plate}:
            raise ValueError(
                f"The plate of the rows is {self.plate!r}, and another plate is named {PLATE!r}, "
                "which is the name of the plate of the rows in this package: rename the latter "
                "plate."
            )
        return _Found(noted.modules, dict(state["params"]), dict(state["constraints"]))

    def _own(self, found: "_Found") -> None:
        """Registers the modules and the parameters of a dry run."""
        for name, module in found.modules.items():
            self._refer_to(name, module)
            module.train(self.training)
        own = {id(parameter) for parameter in self.parameters()}
        for name, tensor in found.params.items():
            if id(tensor) not in own:
                if not isinstance(tensor, nn.Parameter):
                    tensor = nn.Parameter(tensor.detach().clone())
                self._constraints[name] = found.constraints[name]
                self.params._parameters[_key(name)] = tensor

    def _refer_to(self, name: str, module: nn.Module) -> None:
        """Records a module that the pair refers to, and adds it unless a part contains it."""
        if any(referenced.module is module for _, referenced in self._referenced):
            return
        self._add_part(name, module)
        path = next(path for path, part in self.named_modules() if part is module)
        self._referenced.append((path, _Referenced(module)))

    def _add_part(self, name: str, module: nn.Module) -> None:
        if module in self.modules():
            return
        name = _key(name)
        while name in self.parts._modules:
            name += "_"
        self.parts._modules[name] = module


@dataclass(frozen=True, eq=False)
class _Referenced:
    """A module that the code of the pair refers to. A copy of the program refers to it too."""

    module: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Referenced":
        return self


@dataclass(frozen=True, eq=False)
class _Found:
    """The modules and the unconstrained parameters of a dry run, by name."""

    modules: dict[str, nn.Module]
    params: dict[str, Tensor]
    constraints: dict[str, constraints.Constraint]


class _Noted(Messenger):  # type: ignore[misc]
    """Records the plates and the `pyro.module` statements of a dry run."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: set[str] = set()
        self.modules: dict[str, nn.Module] = {}
        self.modes: dict[nn.Module, bool] = {}

    @contextlib.contextmanager
    def kept_modes(self) -> Iterator[None]:
        """Restores the training modes of the recorded modules at the end."""
        try:
            yield
        finally:
            for module, training in self.modes.items():
                module.training = training

    def _pyro_sample(self, msg: Any) -> None:
        self.plates |= {frame.name for frame in msg["cond_indep_stack"]}

    def _pyro_param(self, msg: Any) -> None:
        frame, module = inspect.currentframe(), None  # Pyro passes handlers only a module's name
        while frame is not None and module is None:
            if frame.f_code is pyro.primitives.module.__code__:
                module = frame.f_locals["nn_module"]
            frame = frame.f_back
        if module is not None and module not in self.modules.values():
            self.modules[module_from_param_with_module_name(msg["name"])] = module
            self.modes |= {part: part.training for part in module.modules()}
            module.eval()


class _Owned(Messenger):  # type: ignore[misc]
    """Supplies the values of `pyro.param` statements, and renames the plate of the rows."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    @functools.cached_property
    def owned(self) -> set[int]:
        """The identities of the program's parameters."""
        return {id(parameter) for parameter in self.program.parameters()}

    def _pyro_sample(self, msg: Any) -> None:
        plate = self.program.plate
        if plate != PLATE:
            msg["cond_indep_stack"] = tuple(
                frame._replace(name=PLATE) if frame.name == plate else frame
                for frame in msg["cond_indep_stack"]
            )

    def _pyro_param(self, msg: Any) -> None:
        store, name = pyro.get_param_store(), msg["name"]
        if msg["done"] or msg["fn"] != store.get_param:
            return
        stated = msg["args"][-1]
        if name in self.program._constraints:
            value: Any = self.program.params._parameters[_key(name)]
            constrain = transform_to(self.program._constraints[name])
            msg["value"], msg["done"] = _stated(value, constrain(value)), True
        elif id(stated) in self.owned:
            msg["value"], msg["done"] = _stated(stated, stated), True
        elif name in store:
            value = store[name]
            msg["value"], msg["done"] = _stated(value.unconstrained(), value), True
        else:
            raise ValueError(
                f"The statement pyro.param({name!r}) did not run when the Program collected its "
                "parameters on its first rows, so it is not trained: every call of the model "
                "or the guide must run the same pyro.param statements."
            )


def _stated(unconstrained: Tensor, value: Tensor) -> Tensor:
    """Marks a value as the value of a parameter, as Pyro's store does; returns the value."""
    value = value.view_as(value) if value is unconstrained else value
    value.unconstrained = weakref.ref(unconstrained)  # type: ignore[attr-defined]
    return value


_param_site: Any = effectful(lambda parameter: _stated(parameter, parameter), type="param")


def _modules_used(pyro_program: Any) -> dict[str, nn.Module]:
    """The modules that a function uses as variables from outside, or its object as attributes."""
    plain = inspect.unwrap(pyro_program)
    function, found = getattr(plain, "__func__", plain), dict[str, Any]()
    if owner_of(plain) is None:
        found |= getattr(getattr(plain, "__self__", None), "__dict__", {})
    if isinstance(function, FunctionType):
        for instruction in dis.get_instructions(function):
            if instruction.opname == "LOAD_GLOBAL":
                found[instruction.argval] = function.__globals__.get(instruction.argval)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        found |= {name: cell.cell_contents for name, cell in cells}
    return {name: value for name, value in found.items() if isinstance(value, nn.Module)}


def _key(name: str) -> str:
    """The name of a parameter or part as torch allows it, without dots."""
    return name.replace(".", "/")


def _check_guides(modules: Iterator[nn.Module], plate: str) -> None:
    """Refuses an AutoGuide with parameters for each row."""
    for guide in modules:
        match guide:
            case AutoGuideList():
                pass
            case AutoGuide(prototype_trace=trace) if trace is not None:
                per_row = [
                    name
                    for name, site in trace.iter_stochastic_nodes()
                    if any(frame.name == plate for frame in site["cond_indep_stack"])
                ]
                if per_row:
                    raise ValueError(
                        f"{type(guide).__name__} has parameters of its own for each row of "
                        f"{', '.join(per_row)}, so it cannot run on minibatches or other rows: "
                        "write a guide that computes them from each row."
                    )
