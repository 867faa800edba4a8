"""Saved programs: a folder with weights as safetensors and a specification as JSON."""

import hashlib
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode

from .. import likelihoods, networks, posteriors, priors
from ..data.files import (
    PathLike,
    load_state,
    new_folder,
    read_json,
    read_tensors,
    sha256,
    sha256_of,
    standing,
    write_json,
    write_tensors,
)
from ..data.rows import floating_like
from ..distributions import Family, Predicted, Shared
from ..distributions.units import Units
from ..engine.running import device_of, kept_generators, public
from .vae import VAE

__all__ = [
    "described",
    "differences",
    "load",
    "load_weights",
    "save",
    "units_part",
    "write_program",
]

_SPEC, _WEIGHTS = "spec.json", "weights.safetensors"
_FORMAT = "pyro_vae 3"
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_PARTS = {
    "members": 1,
    "units": 1,
    "columns": 1,
}  # the parts of a specification, and the version of each
_KINDS = ("member", "foreign", "parameter")
_LONGEST = 100  # characters of a value in a message
_LARGER = 2**22  # elements by which a tensor may exceed 16 times those of the file


@public
def save(program: nn.Module, path: PathLike, *, overwrite: bool = False) -> Path:
    """Writes a program to a folder: a readable specification, `spec.json`, and the weights.

    The specification names the members and their arguments, the dtype, the versions and the
    SHA-256 of every file. All files are written to a temporary folder first,
    which is renamed at the end. A second process that writes the same folder waits for the first.
    The digests of the rows of the fit, which :func:`pyro_vae.conformal` compares, are not written:
    with them a reader of the folder could test whether a person is in the data.

    Arguments:
        program: A :class:`pyro_vae.VAE`, or another module, of which only the weights are saved:
            load it with `into=`.
        path: The folder.
        overwrite: Whether to replace a program that was saved to the same folder before.

    Raises:
        ValueError: If the folder exists already, if the program is not a module, or if another
            process is still writing the folder after a minute.
        OSError: If the folder cannot be written.

    Returns:
        The folder.

    Example:
        >>> import tempfile, pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = load(save(vae, f"{folder}/vae"))
        >>> bool((loaded.sample(3, seed=0) == vae.sample(3, seed=0)).all())
        True
    """
    if not isinstance(program, nn.Module):
        raise ValueError(f"Expected a program, an nn.Module; got {program!r}.")
    if any(parameter.is_meta for parameter in program.parameters()):
        raise ValueError("The program is on the meta device, which holds no numbers to save.")
    if overwrite and Path(path).is_dir() and not (Path(path) / _SPEC).is_file():
        raise ValueError(f"Expected the folder of a saved program to replace; got {path}.")
    with new_folder(path, overwrite=overwrite) as folder:
        write_program(program, folder)
    return Path(path)


def write_program(program: nn.Module, folder: Path) -> None:
    """Writes the files of :func:`save` to a folder, and records the SHA-256 of the others.

    Arguments:
        program: The program.
        folder: An existing folder.
    """
    values: dict[str, Tensor] = {}
    spec = _encode(program, values)
    state = {f"program.{name}": tensor for name, tensor in program.state_dict().items()}
    write_tensors(folder / _WEIGHTS, state | values, {"kind": "program"})
    others = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SPEC)
    parts: dict[str, Any] = {"members": {"version": _PARTS["members"], "program": spec}}
    if (units := units_part(program)) is not None:
        parts["units"] = units
    if columns := getattr(program, "fitted_columns", {}):
        parts["columns"] = {"version": _PARTS["columns"], "names": columns}
    content: dict[str, Any] = {
        "format": _FORMAT,
        "parts": parts,
        "dtype": str(floating_like(program).dtype).removeprefix("torch."),
        "training": program.training,
        "versions": _versions(),
        "sha256": {other.relative_to(folder).as_posix(): sha256(other) for other in others},
    }
    content["sha256"][_SPEC] = _digest(content)
    write_json(folder / _SPEC, content)


@public
def load(
    path: PathLike, *, into: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Reads a program that :func:`save` wrote. No code from the files runs.

    Arguments:
        path: The folder.
        into: A program built like the saved one, whose weights are replaced. It is needed if
            the saved program contains modules or distributions of your own. It must have the same
            members with the same arguments, and modules of your own must have the same class,
            submodules and `extra_repr()`. Their code is not compared.
        device: The device of the program if `into` is `None`; `"auto"` is CUDA if there is one.

    Raises:
        ValueError: If the folder is not a saved program, a file was altered or is missing, the
            specification names something that is not a member of this package, or `into` is
            another program. `into` keeps its weights then.
        OSError: If a file cannot be read.

    Warns:
        UserWarning: If `into` differs from the saved program, but other versions of Python or of
            the packages wrote it, which may describe the same modules in other words.

    Returns:
        The program.

    Example:
        >>> import tempfile, pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(vae, f"{folder}/vae")
        ...     same = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=1)
        ...     loaded = load(path, into=same)
        >>> bool((loaded.sample(3, seed=0) == vae.sample(3, seed=0)).all())
        True
    """
    if not isinstance(into, nn.Module | None):
        raise ValueError(f"Expected a program to load into, an nn.Module; got {into!r}.")
    target = device_of(device)
    folder, spec, tensors = _read(Path(path))
    state = {k.removeprefix("program."): v for k, v in tensors.items() if k.startswith("program.")}
    changes: list[str] = []
    with kept_generators(), _of_few_levels(folder):
        members = spec["parts"].get("members", {}).get("program")
        if into is None:
            with _BoundedSizes(16 * sum(t.numel() for t in tensors.values()) + _LARGER):
                program = _decode(members, tensors)
        else:
            program = into
            changes = differences(_resolved(members, tensors), described(into), "program")
    if changes:
        message = (
            f"Expected the program that {folder} holds; got another: {'; '.join(changes[:3])}. "
            "Build it as it was saved."
        )
        if spec["versions"] == _versions():
            raise ValueError(message)
        advice = f"Other versions wrote the file, {spec['versions']}, perhaps in other words."
        warnings.warn(f"{message} {advice}", UserWarning, stacklevel=2)
    if not isinstance(program, nn.Module):
        raise ValueError(f"Expected {folder} to hold a program; got {members!r}.")
    if into is None:
        program.to(target, getattr(torch, spec["dtype"])).train(spec["training"])
    columns = _checked_columns(spec["parts"].get("columns", {}).get("names", {}), folder)
    load_weights(program, spec["parts"].get("units"), state, folder)
    vars(program)["fitted_columns"] = columns
    vars(program)["fitted_rows"] = None  # not known
    return program


def load_weights(
    program: nn.Module, units: dict[str, Any] | None, state: Mapping[str, Tensor], source: Path
) -> None:
    """Loads weights, and the units of a VAE, or changes nothing if anything does not fit.

    Arguments:
        program: The program.
        units: The result of :func:`units_part` for the program that was saved.
        state: Its weights and buffers, of any shape, by name.
        source: The file or folder, for the message.

    Raises:
        ValueError: If names, shapes or dtypes differ from those of the program.
    """
    if not isinstance(program, VAE):
        load_state(program, state, source)
        return
    before = program.units, program.is_initialized
    try:
        _allocate_units(program, units, state, source)
        load_state(program, state, source)
    except ValueError:
        program.units, program.is_initialized = before
        raise
    program.follow_units()


def units_part(program: nn.Module) -> dict[str, Any] | None:
    """Returns what a file says about the units of a VAE; `None` if it has learned none.

    Arguments:
        program: The program.
    """
    if not isinstance(program, VAE) or not program.is_initialized:
        return None
    return {"version": _PARTS["units"], "form": program.units.form}


def described(program: nn.Module) -> Any:
    """Returns a description of a program, without its weights, that can be written as JSON.

    It has the members of this package with their arguments, tensors by their SHA-256, and other
    modules with their class, their `extra_repr()` and their submodules. The code of classes and
    functions is not part of it.

    Arguments:
        program: The program.

    Example:
        >>> described(nn.Dropout(0.1))["options"]
        'p=0.1, inplace=False'
    """
    values: dict[str, Tensor] = {}
    return _resolved(_encode(program, values), values)


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Returns what differs between two descriptions, each difference as a text.

    Arguments:
        then: A result of :func:`described`, or a dict, list or value in it.
        now: Another one.
        name: The name of the whole.

    Example:
        >>> differences(described(nn.Dropout(0.1)), described(nn.Dropout(0.2)), "encoder")
        ['encoder was p=0.1, inplace=False, now p=0.2, inplace=False']
    """
    match then, now:
        case {"foreign": old, **others}, {"foreign": new} if old == new and not others:
            return []  # version 0.2.0 wrote the class only
        case dict(), dict():
            kinds = [[entry[kind] for kind in _KINDS if kind in entry] for entry in (then, now)]
            if kinds[0] == kinds[1]:
                inner = {
                    key: name if key in ("args", "kwargs", "options", "parts") else f"{name}.{key}"
                    for key in {**then, **now}
                }
                pairs = [(then.get(k), now.get(k), inner[k].lstrip(".")) for k in inner]
                return [text for pair in pairs for text in differences(*pair)]
            then, now = (", ".join(map(str, kind)) or "no member" for kind in kinds)
        case list(), list() if len(then) == len(now):
            pairs = [(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(then, now, strict=True))]
            return [text for pair in pairs for text in differences(*pair)]
    if then == now:
        return []
    old, new = (text[:_LONGEST] + "..." * (len(text) > _LONGEST) for text in (f"{then}", f"{now}"))
    return [f"{name} was {old}, now {new}"]


def _read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Reads the specification and the tensors; again if the folder was replaced meanwhile."""
    while True:
        folder = standing(path)
        found = os.stat(folder)
        try:
            return folder, _checked_spec(folder), read_tensors(folder / _WEIGHTS)[0]
        except (OSError, ValueError):
            now = standing(path)
            if now.exists() and os.path.samestat(found, os.stat(now)):
                raise


def _resolved(spec: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns a specification with the SHA-256 of each tensor in place of its name."""

    def resolve(entry: dict[str, Any]) -> dict[str, Any]:
        match entry:
            case {"tensor": str() as name} if name in tensors:
                return {"tensor": sha256_of({"": tensors[name]})[:16]}
        return entry

    return json.loads(json.dumps(spec), object_hook=resolve)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    packages = {"pyro_vae": "pyro-vae", "torch": "torch", "pyro": "pyro-ppl"}
    for name, package in packages.items():
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _checked_columns(names: Any, folder: Path) -> dict[str, list[list[str] | None]]:
    """Refuses names of columns of another form than that of `Rows.names`."""
    try:
        dims = [dim for field in names.values() for dim in field if dim is not None]
        is_right = all(isinstance(label, str) for dim in dims for label in dim)
    except (AttributeError, TypeError):
        is_right = False
    if not is_right:
        raise ValueError(f"Expected names of columns in {folder / _SPEC}; got others.")
    return dict(names)


def _allocate_units(
    vae: VAE, part: dict[str, Any] | None, state: Mapping[str, Tensor], source: Path
) -> None:
    """Makes the buffers of the units that a file holds, or removes them if it holds none."""
    vae.units = Units(tuple(vae.event_shape))
    vae.is_initialized = part is not None
    if part is None:
        return
    learned = {k.removeprefix("units."): v for k, v in state.items() if k.startswith("units.")}
    event, columns = tuple(vae.event_shape), vae.event_shape.numel()
    shapes = dict.fromkeys(("loc", "scale", "least", "input_loc", "input_scale"), event)
    shapes |= {"loadings": (columns, vae.latent_shape.numel()), "noise": (columns,)}
    shapes |= {f"constant_{k}": tuple(v.shape) for k, v in vae.likelihood.constants().items()}
    pairs = (("loc", "scale"), ("input_loc", "input_scale"), ("loadings", "noise"))
    if (
        part.keys() != {"version", "form"}
        or part["form"] not in (None, *Units.FORMS)
        or any((one in learned) is not (other in learned) for one, other in pairs)
        or any(
            not value.is_floating_point() or tuple(value.shape) != shapes.get(name)
            for name, value in learned.items()
        )
    ):
        raise ValueError(f"Expected units of {event} columns in {source}; got others.")
    vae.units.allocate(learned, part["form"])
    vae.units.to(floating_like(vae).device)


class _BoundedSizes(TorchDispatchMode):
    """Refuses to make tensors that are too large for the weights of the file."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for size in (arg for arg in args if isinstance(arg, list | tuple)):
            if all(isinstance(n, int) for n in size) and abs(math.prod(size)) > self.most:
                raise ValueError(
                    f"Expected members of the sizes of the weights; got a tensor of shape {size}."
                )
        return func(*args, **(kwargs or {}))


def _checked_spec(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        folder.stat()
        raise ValueError(f"Expected the folder of a saved program; got the file {folder}.")
    if not (folder / _SPEC).exists():
        raise ValueError(f"Expected a folder with {_SPEC}; got {folder}, which has none.")
    spec = read_json(folder / _SPEC)
    match spec:
        case {"format": str() as written} if written != _FORMAT:
            raise ValueError(
                f"{folder / _SPEC} has the format {written!r}; this version reads {_FORMAT!r}. "
                "Load it with the version of pyro_vae that wrote it."
            )
        case {
            "format": str(),
            "parts": dict() as parts,
            "dtype": str() as dtype,
            "training": bool(),
            "versions": dict(),
            "sha256": dict() as digests,
            **others,
        } if dtype in _DTYPES:
            unknown = sorted(others) + sorted(parts.keys() - _PARTS.keys())
        case _:
            raise ValueError(
                f"Expected {folder / _SPEC} to be a specification of pyro_vae; got another."
            )
    for name, version in _PARTS.items():
        match parts.get(name, {"version": version}):
            case {"version": found} if found == version:
                pass
            case _:
                unknown.append(f"another version of {name}")
    if unknown:
        raise ValueError(
            f"{folder / _SPEC} holds {', '.join(unknown)}, which this version does not know. Load "
            "it with a newer version of pyro_vae."
        )
    with _of_few_levels(folder):
        is_as_saved = digests.pop(_SPEC, None) == _digest(spec)
    if not is_as_saved:
        raise ValueError(f"Expected {folder / _SPEC} as it was saved; got an altered file.")
    if _WEIGHTS not in digests:
        raise ValueError(f"Expected {folder / _SPEC} to record {_WEIGHTS}; got no such record.")
    for name, digest in digests.items():
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise ValueError(f"Expected files inside {folder}; got a record of {name}.")
        if not file.is_file():
            raise ValueError(f"Expected {name} in {folder}; got no such file.")
        if sha256(file) != digest:
            raise ValueError(f"Expected {file} as it was saved; got an altered file.")
    return spec


@contextmanager
def _of_few_levels(folder: Path) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError(
            f"Expected {folder / _SPEC} to be a specification of a few levels; got {error}."
        ) from error


def _digest(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """An argument of a constructor as JSON; its tensors are added to `tensors`."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            name = f"value.{len(tensors)}"
            tensors[name] = value
            return {"tensor": name}
        case tuple() | list():
            return [_encode(item, tensors) for item in value]
        case type():
            kind: type = value
            for room, module in (("distribution", dist), ("activation", nn)):
                if vars(module).get(kind.__name__) is kind:
                    return {room: kind.__name__}
            return {"foreign": f"{kind.__module__}.{kind.__qualname__}"}
        case Predicted() | Shared():
            args: tuple[Any, ...] = ()
            named, kwargs = {"parameter": type(value).__name__}, vars(value)
        case _:
            names, kind = {member: name for name, member in _members().items()}, type(value)
            if kind is nn.Identity:
                return {"member": "Identity"}
            if kind not in names:  # it can be compared, but not built
                text, parts = repr(value), {}
                if isinstance(value, nn.Module):
                    text = (
                        value.extra_repr() if not isinstance(value, VAE) else ""
                    )  # has the units
                    parts = {name: _encode(m, tensors) for name, m in value.named_children()}
                foreign = f"{kind.__module__}.{kind.__qualname__}"
                options = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
                return {"foreign": foreign, "options": options, "parts": parts}
            named, (args, kwargs) = {"member": names[kind]}, value.arguments()
    return {
        **named,
        "args": [_encode(item, tensors) for item in args],
        "kwargs": {word: _encode(item, tensors) for word, item in kwargs.items()},
    }


def _members() -> dict[str, type[Any]]:
    """The classes that a specification may name, by room and name."""
    found: dict[str, type[Any]] = {"VAE": VAE, "Family": Family}
    for room in (likelihoods, networks, posteriors, priors):
        for name, value in vars(room).items():
            if isinstance(value, type) and issubclass(value, nn.Module):
                found[f"{room.__name__.rpartition('.')[2]}.{name}"] = value
    return found


def _decode(spec: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that :func:`_encode` wrote. It may name members and distributions only."""
    match spec:
        case list():
            return tuple(_decode(item, tensors) for item in spec)
        case {"tensor": str() as name} if len(spec) == 1:
            if name not in tensors:
                raise ValueError(
                    f"Expected the tensor {name!r} beside the specification; got none."
                )
            return tensors[name]
        case {"distribution": str() as name} | {"activation": str() as name} if len(spec) == 1:
            room, base = (dist, Distribution) if "distribution" in spec else (nn, nn.Module)
            found = vars(room).get(name)
            if name.startswith("_") or not (isinstance(found, type) and issubclass(found, base)):
                raise _unknown(f"{room.__name__}.{name}")
            return found
        case {"tensor": _} | {"distribution": _} | {"activation": _}:
            raise _unknown(spec)
        case {"parameter": _}:
            key, classes = "parameter", {"Predicted": Predicted, "Shared": Shared}
        case dict():
            key, classes = "member", {**_members(), "Identity": nn.Identity}
        case _:
            return spec
    name, args, kwargs = spec.get(key), spec.get("args", []), spec.get("kwargs", {})
    if not isinstance(name, str) or name not in classes or spec.keys() - {key, "args", "kwargs"}:
        raise _unknown(spec.get("foreign", name))
    if not (isinstance(args, list) and isinstance(kwargs, dict)):
        raise ValueError(f"Expected arguments of {name} in a specification; got {args}, {kwargs}.")
    given = [_decode(value, tensors) for value in args]
    named = {word: _decode(value, tensors) for word, value in kwargs.items()}
    try:
        return classes[name](*given, **named)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        line = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"Expected arguments of {name} in a specification; got {line}."
        ) from error


def _unknown(name: Any) -> ValueError:
    return ValueError(
        f"Expected a specification of members of pyro_vae and Pyro distributions; got {name!r}. "
        "Build the program yourself and call pyro_vae.load(path, into=program)."
    )
