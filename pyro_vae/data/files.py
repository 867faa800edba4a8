"""Files that are replaced in one step when complete, and read without running code."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = [
    "PathLike",
    "load_state",
    "new_file",
    "new_folder",
    "read_json",
    "read_tensors",
    "sha256",
    "sha256_of",
    "write_json",
    "write_tensors",
]

PathLike: TypeAlias = str | os.PathLike[str]

_HEADER, _DIGEST = "pyro_vae", "sha256"


def write_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Writes tensors and a header, readable as JSON, to one safetensors file.

    Arguments:
        path: The file; an old one is replaced in one step when the new one is complete.
        tensors: The tensors by name; each is copied to the CPU.
        header: Numbers, strings, lists and dicts of them.

    Raises:
        OSError: If the operating system cannot do it.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(header))
    metadata = {_HEADER: text, _DIGEST: sha256_of(own, text)}
    with new_file(path, overwrite=True) as beside:
        beside.write_bytes(save(own, metadata))


def read_tensors(
    path: PathLike, *, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of :func:`write_tensors`.

    Arguments:
        path: The file.
        device: The device of the tensors.

    Raises:
        ValueError: If the file was not written by :func:`write_tensors`, or was changed since.
        OSError: If the operating system cannot do it.
    """
    content = Path(path).read_bytes()  # once: a second opening could meet a file replaced since
    try:
        tensors = load_bytes(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
    except (SafetensorError, ValueError, RuntimeError, KeyError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a safetensors file; got {error}.") from error
    if not isinstance(metadata, dict) or not metadata.keys() >= {_HEADER, _DIGEST}:
        raise ValueError(f"Expected {path} to be a file of pyro_vae; got another's.")
    if metadata[_DIGEST] != sha256_of(tensors, metadata[_HEADER]):
        raise ValueError(f"Expected {path} as it was written; got an altered file.")
    return {name: t.to(device) for name, t in tensors.items()}, json.loads(metadata[_HEADER])


def load_state(program: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Loads weights into a program, all of them or, if any does not fit, none.

    Arguments:
        program: The program.
        state: The weights, by name.
        source: The file of the weights, for the message.

    Raises:
        ValueError: If names, shapes or dtypes differ from those of the program.
    """
    own = program.state_dict()
    differing = sorted(own.keys() ^ state.keys()) or [
        name
        for name, tensor in own.items()
        if not is_lazy(tensor)
        and (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"Expected the program that {source} holds, of the same weights, shapes and dtypes; "
            f"got another in {', '.join(differing[:3])}{more}."
        )
    program.load_state_dict(dict(state))


def write_json(path: PathLike, content: Mapping[str, Any]) -> None:
    """Writes a readable JSON file; an old one is replaced in one step.

    Arguments:
        path: The file.
        content: Numbers, strings, lists and dicts of them.
    """
    with new_file(path, overwrite=True) as beside:
        beside.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")


def read_json(path: PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Arguments:
        path: The file.

    Raises:
        ValueError: If the file holds anything else.
        OSError: If the operating system cannot do it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a JSON file; got {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to hold one JSON object; got {type(content).__name__}.")
    return content


def sha256(path: PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits.

    Arguments:
        path: The file.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Returns the SHA-256 of a text and of tensors, in hexadecimal digits.

    Arguments:
        tensors: The tensors by name; the name, dtype, shape and values of each one count.
        text: The text.
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for chunk in tensor.flatten().split(2**24):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def new_file(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary file to write, which is renamed to the path at the end.

    Arguments:
        path: The file to write.
        overwrite: Whether an existing file is replaced.

    Raises:
        ValueError: If the file exists and is not to be replaced.
        OSError: If the operating system cannot do it.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"The file {path} exists, and is not replaced: choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder to fill, which is renamed to the path at the end.

    An old folder is moved aside first, and removed when the new one is in its place.

    Arguments:
        path: The folder to write.
        overwrite: Whether an existing folder is replaced.

    Raises:
        ValueError: If the folder exists and is not to be replaced, or the path is a file.
        OSError: If the operating system cannot do it.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(
            f"The folder {path} exists: choose another path, or replace it by overwrite=True."
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a folder to replace; got the file {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        _swap(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _swap(beside: Path, path: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    old = aside / path.name
    try:
        if path.exists():
            os.rename(path, old)
        os.rename(beside, path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
