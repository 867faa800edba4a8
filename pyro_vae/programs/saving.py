"""Programs on disk: a folder of safetensors beside a readable specification."""

import hashlib
import inspect
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import likelihoods, networks, posteriors, priors
from ..data.files import (
    PathLike,
    load_state,
    new_folder,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)
from ..data.rows import floating_like
from ..distributions import family as families
from ..distributions.family import Predicted, Shared
from ..engine.running import device_of, kept_generators
from .vae import VAE

__all__ = ["load", "save", "write_program"]

_SPEC, _WEIGHTS = "spec.json", "weights.safetensors"
_FORMAT = "pyro_vae 1"
_ROOMS: dict[str, ModuleType] = {
    "families": families,
    "likelihoods": likelihoods,
    "networks": networks,
    "posteriors": posteriors,
    "priors": priors,
}
_WORDS = {"Predicted": Predicted, "Shared": Shared}


def save(program: nn.Module, path: PathLike, *, overwrite: bool = False) -> Path:
    """Writes a program to a folder: `spec.json`, which a person can read, and its weights.

    The specification names the members and their arguments, the dtype, the versions and the
    SHA-256 of every file. The folder takes its name once all is written.

    Arguments:
        program: A :class:`pyro_vae.VAE`, or another module: its weights alone can be loaded back.
        path: The folder.
        overwrite: Whether a program saved under that name may be replaced.

    Raises:
        ValueError: Where the folder is there already, or the program is not a module.
        OSError: Where the system refuses.

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
    if overwrite and Path(path).is_dir() and not (Path(path) / _SPEC).is_file():
        raise ValueError(f"Expected the folder of a saved program to replace; got {path}.")
    with new_folder(path, overwrite=overwrite) as folder:
        write_program(program, folder)
    return Path(path)


def write_program(program: nn.Module, folder: Path) -> None:
    """Writes the files of :func:`save` to a folder, and records what else lies in it.

    Arguments:
        program: The program.
        folder: A folder that is there.
    """
    values: dict[str, Tensor] = {}
    spec = _encode(program, values)
    state = {f"program.{name}": tensor for name, tensor in program.state_dict().items()}
    write_tensors(folder / _WEIGHTS, state | values, {"kind": "program"})
    others = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SPEC)
    content: dict[str, Any] = {
        "format": _FORMAT,
        "program": spec,
        "dtype": str(floating_like(program).dtype).removeprefix("torch."),
        "training": program.training,
        "versions": _versions(),
        "sha256": {other.relative_to(folder).as_posix(): sha256(other) for other in others},
    }
    content["sha256"][_SPEC] = _digest(content)
    write_json(folder / _SPEC, content)


def load(
    path: PathLike, *, into: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Reads a program that :func:`save` wrote. No code is run, and nothing imported, for a file.

    Arguments:
        path: The folder.
        into: A program built as the saved one was, whose weights are replaced; needed where the
            saved one is not made of members of this package alone.
        device: Where to put a program that is built anew; `"auto"` is CUDA where there is one.

    Raises:
        ValueError: Where the folder is not one of ours, a file is altered or missing, the
            specification names what is not a member of this package, or `into` is another program.
        OSError: Where the system refuses.

    Returns:
        The program.
    """
    if into is not None and not isinstance(into, nn.Module):
        raise ValueError(f"Expected a program to load into, an nn.Module; got {into!r}.")
    folder, target = Path(path), device_of(device)
    spec = _checked_spec(folder)
    tensors, _ = read_tensors(folder / _WEIGHTS)
    state = {k.removeprefix("program."): v for k, v in tensors.items() if k.startswith("program.")}
    if into is None:
        with kept_generators(), _of_few_levels(folder):
            program = _decode(spec["program"], tensors)
        if not isinstance(program, nn.Module):
            raise ValueError(f"Expected {folder} to hold a program; got {spec['program']!r}.")
        program.to(target, getattr(torch, spec["dtype"])).train(spec["training"])
    else:
        program = into
    load_state(program, state, folder)
    return program


def _checked_spec(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        folder.stat()
        raise ValueError(f"Expected the folder of a saved program; got the file {folder}.")
    if not (folder / _SPEC).exists():
        raise ValueError(f"Expected a folder with {_SPEC}; got {folder}, which has none.")
    spec = read_json(folder / _SPEC)
    expected = {"format": str, "program": dict, "dtype": str, "training": bool, "sha256": dict}
    if any(not isinstance(spec.get(k), t) for k, t in expected.items()) or (
        spec["format"] != _FORMAT or spec["dtype"] not in _DTYPES
    ):
        raise ValueError(
            f"Expected {folder / _SPEC} to be a specification of pyro_vae; got another."
        )
    with _of_few_levels(folder):
        is_as_saved = spec["sha256"].pop(_SPEC, None) == _digest(spec)
    if not is_as_saved:
        raise ValueError(f"Expected {folder / _SPEC} as it was saved; got an altered file.")
    if _WEIGHTS not in spec["sha256"]:
        raise ValueError(f"Expected {folder / _SPEC} to record {_WEIGHTS}; got no such record.")
    for name, digest in spec["sha256"].items():
        _check_file(folder, name, digest)
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


_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _check_file(folder: Path, name: str, digest: str) -> None:
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"Expected files inside {folder}; got a record of {name}.")
    if not file.is_file():
        raise ValueError(f"Expected {name} in {folder}; got no such file.")
    if sha256(file) != digest:
        raise ValueError(f"Expected {file} as it was saved; got an altered file.")


def _versions() -> dict[str, str]:
    packages = {"pyro_vae": "pyro-vae", "torch": "torch", "pyro": "pyro-ppl"}
    versions = {"python": platform.python_version()}
    for name, package in packages.items():
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"value.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, tuple | list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, Predicted | Shared):
        return {"word": type(value).__name__, **_encode_all(vars(value), tensors)}
    name = getattr(value, "__name__", "")
    if inspect.isclass(value) and getattr(dist, name, None) is value:
        return {"distribution": name}
    if inspect.isclass(value) and getattr(nn, name, None) is value:
        return {"activation": name}
    return _encode_member(value, tensors)


def _encode_member(value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(value) is nn.Identity:
        return {"member": "Identity"}
    if type(value) is VAE:
        return {"member": "VAE", **_encode_all(value.arguments(), tensors)}
    for room, module in _ROOMS.items():
        if getattr(module, type(value).__name__, None) is type(value):
            name = f"{room}.{type(value).__name__}"
            return {"member": name, **_encode_all(_arguments(value), tensors)}
    return {"foreign": f"{type(value).__module__}.{type(value).__qualname__}"}


def _encode_all(arguments: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"arguments": {k: _encode(v, tensors) for k, v in arguments.items()}}


def _arguments(member: nn.Module) -> dict[str, Any]:
    """What a member was built with: it says so itself, or keeps each argument under its name."""
    said = getattr(member, "arguments", None)
    if callable(said):
        return dict(said())
    return {name: getattr(member, name) for name in _parameters(type(member))}


def _parameters(member: type) -> dict[str, inspect.Parameter]:
    return {k: v for k, v in inspect.signature(member).parameters.items()}


def _decode(spec: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(spec, dict):
        return tuple(_decode(s, tensors) for s in spec) if isinstance(spec, list) else spec
    if "foreign" in spec:
        raise _unknown(spec["foreign"])
    if "tensor" in spec:
        return _found(spec["tensor"], tensors)
    if "distribution" in spec:
        return _public_class(dist, spec["distribution"], Distribution)
    if "activation" in spec:
        return _public_class(nn, spec["activation"], nn.Module)
    return _decode_call(spec, tensors)


def _decode_call(spec: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    build = _named(spec)
    arguments = spec.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"Expected arguments by name in a specification; got {arguments!r}.")
    return _called(build, {name: _decode(value, tensors) for name, value in arguments.items()})


def _named(spec: dict[str, Any]) -> type:
    name = str(spec.get("word", spec.get("member")))
    if "word" in spec and name in _WORDS:
        return _WORDS[name]
    if name == "VAE":
        return VAE
    if name == "Identity":
        return nn.Identity
    room, _, member = name.partition(".")
    if room not in _ROOMS or member.startswith("_"):
        raise _unknown(name)
    return _public_class(_ROOMS[room], member, nn.Module)


def _public_class(room: ModuleType, name: Any, kind: type) -> type:
    found = vars(room).get(name) if isinstance(name, str) and not name.startswith("_") else None
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise _unknown(f"{room.__name__}.{name}")
    return found


def _called(build: type, arguments: dict[str, Any]) -> Any:
    positional: list[Any] = []
    try:
        for name, parameter in _parameters(build).items():
            if parameter.kind is parameter.POSITIONAL_ONLY and name in arguments:
                positional.append(arguments.pop(name))
            elif parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(arguments.pop(name, ()))
        return build(*positional, **arguments)
    except (TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"Expected arguments of {build.__name__} in a specification; got {error}."
        ) from error


def _found(name: Any, tensors: dict[str, Tensor]) -> Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise ValueError(f"Expected the tensor {name!r} beside the specification; got none.")
    return tensors[name]


def _unknown(name: Any) -> ValueError:
    return ValueError(
        f"Expected a specification of members of pyro_vae and Pyro distributions; got {name!r}: "
        "build the program yourself and call pyro_vae.load(path, into=program)."
    )
