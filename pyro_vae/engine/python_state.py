"""The Python values that modules and the functions they call keep from one call to the next."""

import hashlib
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, GeneratorType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

__all__ = ["PythonState"]

OURS = frozenset({"torch", "pyro", "pyro_vae"})  # their objects keep no state of a program
NOT_READ = sys.stdlib_module_names | OURS | {"numpy"}  # their functions are not followed
OF_TORCH = {"_parameters", "_buffers", "_modules", "training"}
MOST_BYTES = 2**24


class _Kept(NamedTuple):
    digest: bytes
    tensors: list[Tensor]


class PythonState:
    """Creates a record of the Python values that modules keep between calls.

    It holds the attributes of the modules, the objects to which they refer, the variables of
    enclosing functions, the globals that their functions name, the attributes of their classes,
    and the states of the generators of `random` and `numpy.random`. Parameters and buffers are
    left out, and so are the values of tensors, and objects that cannot be pickled or have more
    than 16 MB.

    Arguments:
        modules: The modules.

    Example:
        >>> class Counting(nn.Module):
        ...     calls = 0
        ...
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         self.calls += 1
        ...         return x / self.calls
        >>> counting = Counting()
        >>> before = PythonState([counting])
        >>> _ = counting(torch.ones(()))
        >>> PythonState([counting]).changed_since(before)
        ['Counting.calls']
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._known = {id(module): module for module in modules}
        self._kept: dict[tuple[int, str], _Kept] = {}
        for cls in {cls: None for module in self._known.values() for cls in type(module).__mro__}:
            for name, value in _attributes(cls).items():
                self._keep(id(cls), f"{cls.__qualname__}.{name}", value)
        for module in self._known.values():
            for name in vars(module).keys() - OF_TORCH:
                self._keep(id(module), f"{type(module).__qualname__}.{name}", vars(module)[name])
        self._keep(0, "random", random.getstate())
        self._keep(0, "numpy.random", np.random.get_state(legacy=False))  # noqa: NPY002

    def _keep(self, owner: int, name: str, value: object) -> None:
        digest = _Digest()
        walk = _Walk(digest, self._known)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                walk.dump(value)
        except Exception:  # too large, or a pickle that fails
            return
        self._kept[owner, name] = _Kept(digest.value.digest(), walk.tensors)

    def changed_since(self, before: "PythonState") -> list[str]:
        """Names the values that differ from an earlier record of the same modules.

        Arguments:
            before: The earlier record.
        """
        names = sorted(self._kept.keys() | before._kept.keys(), key=lambda key: key[1])
        none = _Kept(b"", [])
        return [
            key[1]
            for key in names
            if self._kept.get(key, none).digest != before._kept.get(key, none).digest
        ]

    def replaced_since(self, before: "PythonState") -> list[tuple[str, Tensor]]:
        """Returns the tensors in whose places others are now, with the names of the places.

        Arguments:
            before: The earlier record, from which no value has changed.
        """
        return [
            (key[1], old)
            for key, now in self._kept.items()
            for old, new in zip(before._kept[key].tensors, now.tensors, strict=True)
            if old is not new
        ]


class _Digest:
    """A file that keeps the digest of what is written to it."""

    def __init__(self) -> None:
        self.value, self.size = hashlib.blake2b(), 0

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        if self.size > MOST_BYTES:
            raise ValueError("too large")
        self.value.update(data)
        return len(data)


class _Walk(pickle.Pickler):
    """Pickles a value, and the variables that the functions and classes in it can reach."""

    def __init__(self, file: _Digest, known: dict[int, nn.Module]) -> None:
        super().__init__(file)
        self.known, self.seen = known, set[int]()
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> object:
        """Returns what is pickled in place of an object, or `None` to pickle the object."""
        kind = type(obj)
        if issubclass(kind, Tensor):
            self.tensors.append(obj)
        if id(obj) in self.known or _root(kind) in OURS:
            return (kind.__qualname__,)
        content: Callable[[Any], object]
        match obj:
            case FunctionType():
                content = _variables
            case type():
                content = _attributes
            case GeneratorType():
                content = _progress
            case property():
                return ("property", obj.fget)
            case staticmethod() | classmethod():
                return (kind.__qualname__, obj.__func__)
            case _:
                return None
        is_new = id(obj) not in self.seen
        self.seen.add(id(obj))
        return (obj.__qualname__, content(obj) if is_new else None)

    def reducer_override(self, obj: Any) -> Any:
        """Returns the name of the type of an object that has no pickle."""
        try:
            obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        except Exception:
            return str, (type(obj).__qualname__,)
        return NotImplemented


def _root(obj: Any) -> str:
    """The package that defines a class or function."""
    return str(obj.__module__).partition(".")[0]


def _attributes(cls: type) -> dict[str, object]:
    """The attributes of a class of the user, except for those that every class has."""
    if _root(cls) in NOT_READ:
        return {}
    return {k: v for k, v in vars(cls).items() if not k.startswith(("__", "_abc_"))}


def _variables(function: FunctionType) -> object:
    """The variables that a function of the user reads besides its arguments."""
    if _root(function) in NOT_READ:
        return None
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    read = {name: function.__globals__[name] for name in sorted(names & set(function.__globals__))}
    enclosing = [_content(cell) for cell in function.__closure__ or ()]
    return read, enclosing, vars(function), function.__defaults__, function.__kwdefaults__


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _progress(generator: "GeneratorType[Any, Any, Any]") -> object:
    frame: Any = generator.gi_frame
    return None if frame is None else (frame.f_lasti, frame.f_locals)
