"""Files that are replaced in one step when complete, and read without running code."""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = [
    "PathLike",
    "is_temporary",
    "load_state",
    "locked",
    "new_file",
    "new_folder",
    "plain_file",
    "read_json",
    "read_tensors",
    "sha256",
    "sha256_of",
    "standing",
    "write_json",
    "write_tensors",
]

PathLike: TypeAlias = str | os.PathLike[str]

_HEADER, _DIGEST = "pyro_vae", "sha256"
WAIT = 60.0  # seconds for another writer of the same name


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
    content = plain_file(path).read_bytes()  # once: it could be replaced between two openings
    try:
        tensors = load_bytes(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
        text = metadata.get(_HEADER) if isinstance(metadata, dict) else None
        header = {} if text is None else json.loads(text)
    except (SafetensorError, ValueError, RuntimeError, KeyError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a safetensors file; got {error}.") from error
    if text is None or _DIGEST not in metadata or not isinstance(header, dict):
        raise ValueError(f"Expected {path} to be a file of pyro_vae; got another's.")
    if metadata[_DIGEST] != sha256_of(tensors, text):
        raise ValueError(f"Expected {path} as it was written; got an altered file.")
    return {name: t.to(device) for name, t in tensors.items()}, header


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
    path = plain_file(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a JSON file; got {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to hold one JSON object; got {type(content).__name__}.")
    return content


def sha256(path: PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits.

    Arguments:
        path: The file.
    """
    with plain_file(path).open("rb") as file:
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


def plain_file(path: PathLike) -> Path:
    """Returns the path of a file, unless reading it could block or never end.

    Arguments:
        path: The file.

    Raises:
        ValueError: If it is a device, a pipe or a socket.
        OSError: If the operating system cannot find it.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"Expected {path} to be a file; got a device, a pipe or a socket.")
    return Path(path)


@contextmanager
def locked(path: PathLike, *, wait: float = WAIT) -> Iterator[None]:
    """Keeps other writers away from a name: other threads, and other processes.

    A thread can lock a name several times, if it is ready to wait. The lock of a process that was
    killed is free.

    Arguments:
        path: The file or folder to write. Its folder must exist.
        wait: The time to wait for another writer, in seconds.

    Raises:
        ValueError: If another process or thread is still writing.
        OSError: If the operating system cannot do it.
    """
    path = Path(path).absolute()
    lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
    try:
        if wait == 0.0 and lock.is_locked:
            raise Timeout(lock.lock_file)
        lock.acquire(timeout=wait)
    except Timeout:
        raise ValueError(
            f"Another process or thread is writing {path}. Wait until it has ended, or choose "
            "another path."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def new_file(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary file to write, which is renamed to the path at the end.

    Arguments:
        path: The file to write.
        overwrite: Whether an existing file is replaced.

    Raises:
        ValueError: If the file exists and is not to be replaced, or another process writes it.
        OSError: If the operating system cannot do it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if path.exists() and not overwrite:
            raise ValueError(f"The file {path} exists, and is not replaced: choose another path.")
        with _beside(path, path.suffix) as beside:
            yield beside
            _sync(beside)
            os.replace(beside, path)
            _sync(path.parent)


@contextmanager
def new_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder to fill, which is renamed to the path at the end.

    An old folder is moved aside first, and removed when the new one is in its place. If the
    process is killed between the two, :func:`standing` finds the old one.

    Arguments:
        path: The folder to write.
        overwrite: Whether an existing folder is replaced.

    Raises:
        ValueError: If the folder exists and is not to be replaced, if the path is a file, or if
            another process writes it.
        OSError: If the operating system cannot do it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        aside = _aside(path)
        if standing(path) == aside:
            os.rename(aside, path)
        if path.exists() and not overwrite:
            raise ValueError(
                f"The folder {path} exists: choose another path, or replace it by overwrite=True."
            )
        if path.exists() and not path.is_dir():
            raise ValueError(f"Expected a folder to replace; got the file {path}.")
        with _beside(path) as beside:
            beside.mkdir()
            yield beside
            for written in (*beside.rglob("*"), beside):
                _sync(written)
            try:
                if path.exists():
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(path, aside)
                os.rename(beside, path)
                _sync(path.parent)
            finally:
                if standing(path) == aside:
                    os.rename(aside, path)
        shutil.rmtree(aside, ignore_errors=True)


def standing(path: PathLike) -> Path:
    """Returns the folder that holds what was last written to a path by :func:`new_folder`.

    It is the path itself, unless a process was killed while it replaced the folder.

    Arguments:
        path: The folder.
    """
    path = Path(path)
    aside = _aside(path)
    return aside if aside.is_dir() and not path.exists() else path


def is_temporary(path: Path, names: Container[str]) -> bool:
    """Whether a file is a temporary file or a lock, as a killed writer leaves them.

    Arguments:
        path: The file.
        names: The names of the files that were to be written.
    """
    found = re.fullmatch(r"\.(.+)\.(?:lock|[0-9a-f]{8}\.partial(?:\.\w+)?)", path.name)
    return found is not None and found[1] in names


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


@contextmanager
def _beside(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yields a temporary name of its own, and removes what is left there and what was left before.

    The name of the path must be locked: then all other temporary files of it were left by killed
    writers.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial{suffix}")
    pattern = f".{glob.escape(path.name)}.????????.partial{glob.escape(suffix)}"
    for left in path.parent.glob(pattern):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        yield beside
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
