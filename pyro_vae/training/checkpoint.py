"""Checkpoints of a fit: its state between two epochs, written to one file and read again."""

import copy
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..data.files import PathLike, locked, read_tensors, write_tensors
from ..programs.saving import differences, load_weights, units_part
from ..programs.vae import VAE
from .history import Record

__all__ = [
    "Saved",
    "State",
    "call_of",
    "callable_of",
    "forms_of",
    "checkpoint_path",
    "generator_states",
    "joined_state",
    "only_writer",
    "plain",
    "read_checkpoint",
    "set_generator_states",
    "split_state",
    "unplain",
]

FORMAT = 3
LARGEST = 1e300  # number that a checkpoint may hold in place of another one
_PAIRS = "(pairs)"
_CODE = "code of the transform"

Identity: TypeAlias = dict[str, Any]


@dataclass
class State:
    """What the next epoch of a fit depends on, beside its settings and its rows.

    Arguments:
        program: The program that is trained.
        optimizer: Its optimiser.
        schedule: The schedule of the learning rate, if there is one.
        split_seed: The seed of the rows held out and of the draws on them.
        records: The numbers of each epoch.
        best: The best weights by validation, if there are any yet.
        best_epoch: Their epoch.
        average: The averages of the trained weights; empty before the first step.
        has_recovered: Whether the learning rate was halved after a step that was not finite.
    """

    program: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | None
    split_seed: int
    records: list[Record] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_epoch: int = 0
    average: list[Tensor] = field(default_factory=list)
    has_recovered: bool = False

    def write(
        self, path: Path, identity: Identity, checks: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Writes the state, with that of torch's generators, to a checkpoint.

        Arguments:
            path: The file, replaced in one instant.
            identity: What tells this fit from others.
            checks: The scores of the rows of each check, shape (rows,), by its name.
        """
        state, options = split_state(self.optimizer.state_dict())
        tensors = {f"program.{k}": v for k, v in self.program.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in (self.best or {}).items()}
        tensors |= {f"optimizer.{k}": v for k, v in state.items()}
        tensors |= {f"generator.{k}": v for k, v in generator_states().items()}
        tensors |= {f"average.{k}": v for k, v in enumerate(self.average)}
        tensors |= {f"check.{k}": v for k, v in checks.items()}
        header = {
            "kind": "checkpoint",
            "format": FORMAT,
            "fit": identity,
            "records": self.records,
            "best_epoch": self.best_epoch,
            "optimizer": options,
            "schedule": None if self.schedule is None else plain(self.schedule.state_dict()),
            "split_seed": self.split_seed,
            "has_recovered": self.has_recovered,
            "units": units_part(self.program),
            "degenerate": self.program.degenerate if isinstance(self.program, VAE) else {},
        }
        write_tensors(path, tensors, header)

    def restore(
        self, saved: "Saved", identity: Identity, device: torch.device, num_checked: int
    ) -> None:
        """Takes over the state of a checkpoint, with that of torch's generators.

        Arguments:
            saved: The content of the checkpoint.
            identity: What tells this fit from others.
            device: The device of the fit.
            num_checked: The number of rows in a check.

        Raises:
            ValueError: If the checkpoint belongs to another fit. Nothing is changed then.
        """
        saved.check(identity)
        header = saved.header
        self._check(saved, num_checked)
        load_weights(self.program, header["units"], saved.part("program", device), saved.path)
        if isinstance(self.program, VAE):
            self.program.degenerate = header["degenerate"]
        self.program.to(device)
        self.best = saved.part("best", device) or None
        self.best_epoch, self.records = header["best_epoch"], header["records"]
        averages = saved.part("average", device)
        self.average = [averages[str(index)] for index in range(len(averages))]
        self.has_recovered = header["has_recovered"]
        state = saved.part("optimizer", device)
        self.optimizer.load_state_dict(joined_state(state, header["optimizer"]))
        if self.schedule is not None:
            self.schedule.load_state_dict(unplain(header["schedule"]))
        set_generator_states(saved.part("generator", "cpu"))

    def _check(self, saved: "Saved", num_checked: int) -> None:
        """Refuses a checkpoint that a step of this fit could not go on from."""
        header, trained = saved.header, [p for p in self.program.parameters() if p.requires_grad]
        probe = copy.deepcopy(self.optimizer)  # after one step it has a state of the right form
        for group in probe.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        probe.step()
        state, options = split_state(probe.state_dict())
        schedule = None if self.schedule is None else plain(self.schedule.state_dict())
        program, average, generator, optimizer = (
            forms_of(saved.part(name, "cpu"))
            for name in ("program", "average", "generator", "optimizer")
        )
        stepped = {key.split(".")[0] for key in [*optimizer, *header["optimizer"]["plain"]]}
        expected = [
            {key: value for key, value in part.items() if key.split(".")[0] in stepped}
            for part in (forms_of(state), options["plain"])
        ]
        fits = {
            "best weights": forms_of(saved.part("best", "cpu")) in ({}, program),
            "averages": average in ({}, forms_of({str(i): p for i, p in enumerate(trained)})),
            "generator": generator.get("cpu") == forms_of(generator_states())["cpu"],
            "optimiser": optimizer == expected[0]
            and header["optimizer"]["plain"].keys() == expected[1].keys()
            and _is_alike(header["optimizer"]["plain"], expected[1])
            and _is_alike(header["optimizer"]["param_groups"], options["param_groups"])
            and all(
                then["params"] == now["params"]
                for then, now in zip(
                    header["optimizer"]["param_groups"], options["param_groups"], strict=True
                )
            ),
            "schedule": _is_alike(header["schedule"], schedule),
            "checks": all(
                re.fullmatch(r"[1-9]\d*\.\d+\.(nan|inf|-?\d[\d.e+-]*)", name)
                and form == (torch.Size([num_checked]), torch.float64)
                for name, form in forms_of(saved.part("check", "cpu")).items()
            ),
        }
        if wrong := [name for name, is_right in fits.items() if not is_right]:
            raise ValueError(
                f"Expected {saved.path} to be a checkpoint of this fit; got one with another form "
                f"of its {', '.join(wrong)}."
            )
        try:
            torch.Generator().set_state(saved.part("generator", "cpu")["cpu"])
        except RuntimeError as error:
            raise ValueError(f"Expected a generator in {saved.path}; got {error}.") from error


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Returns the shape and dtype of each tensor.

    Arguments:
        tensors: The tensors, of any shape, by name.
    """
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _is_alike(then: Any, now: Any) -> bool:
    """Whether a value of JSON differs from another one in numbers only."""
    match then, now:
        case dict(), dict():
            return then.keys() >= now.keys() and all(_is_alike(then[k], now[k]) for k in now)
        case list(), list():
            return len(then) == len(now) and all(map(_is_alike, then, now))
        case int() | float(), int() | float() if not {bool} & {type(then), type(now)}:
            return then == now or abs(then) < LARGEST
    return type(then) is type(now) and bool(then == now)


@dataclass(frozen=True, eq=False)
class Saved:
    """The content of a checkpoint.

    Arguments:
        path: The file.
        tensors: Its tensors, of any shape, by name.
        header: The rest.
        stamp: What tells this version of the file from others.
    """

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any]
    stamp: tuple[int, int] | None

    def check(self, identity: Identity) -> None:
        """Refuses a fit that the checkpoint does not belong to.

        Arguments:
            identity: What tells that fit from others.

        Raises:
            ValueError: If the checkpoint belongs to another fit; the message names the settings.
        """
        now, then = json.loads(json.dumps(identity)), self.header["fit"]
        codes = [key for key in now if key.startswith(_CODE) and key not in then]
        changes = differences(then, {k: v for k, v in now.items() if k not in codes})
        if changes:
            raise ValueError(
                f"This checkpoint belongs to another fit: {'; '.join(changes)}. Use the old "
                "settings and data, or another checkpoint file."
            )

    def part(self, name: str, device: torch.device | str) -> dict[str, Tensor]:
        """Returns the tensors of one part, by their names within it.

        Arguments:
            name: The part: `"program"`, `"best"`, `"average"`, `"check"`,
                `"optimizer"` or `"generator"`.
            device: The device that they are moved to.
        """
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor.to(device)
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }


def checkpoint_path(checkpoint: PathLike | None, *, resume: bool) -> Path | None:
    """Checks where the checkpoint of a fit is to be.

    Arguments:
        checkpoint: The file, or `None`.
        resume: Whether the fit goes on from it.

    Raises:
        ValueError: If it is a folder, if it exists and the fit does not resume, or if the fit
            resumes from nothing.
    """
    if checkpoint is None:
        if resume:
            raise ValueError("To resume a fit, give the file to go on from: checkpoint=path.")
        return None
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(f"Expected checkpoint to be a file; got the folder {path}.")
    if path.exists() and not resume:
        raise ValueError(
            f"The checkpoint {path} exists already. Go on from it with resume=True, or give "
            "another file."
        )
    return path


def read_checkpoint(path: Path | None) -> Saved | None:
    """Reads a checkpoint, if the file exists.

    Arguments:
        path: The file, or `None`.

    Raises:
        ValueError: If the file is no checkpoint, or one of a format that is not known.
    """
    if path is None or not path.exists():
        return None
    stamp = _stamp(path)
    tensors, header = read_tensors(path)
    if header.get("kind") != "checkpoint":
        raise ValueError(f"Expected {path} to be a checkpoint; got {header.get('kind')}.")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint {path} has format {header.get('format', 0)}, and this version of "
            f"pyro_vae reads format {FORMAT} only. Resume with the version that wrote it, or "
            "start again with another file."
        )
    names = {"elbo", "reconstruction", "kl", "seconds"}
    match header:
        case {
            "fit": {"warmup": int(warmup)},
            "records": list(records),
            "best_epoch": int(best_epoch),
            "optimizer": {"plain": dict(), "param_groups": list()},
            "schedule": dict() | None,
            "split_seed": int(split_seed),
            "has_recovered": bool(),
            "units": dict() | None,
            "degenerate": dict(),
        } if (
            warmup >= 0
            and 0 <= best_epoch <= len(records)
            and 0 <= split_seed < 2**63
            and all(
                isinstance(record, dict)
                and names <= record.keys() == records[0].keys()
                and all(type(value) in (int, float) for value in record.values())
                for record in records
            )
        ):
            return Saved(path, tensors, header, stamp)
    raise ValueError(f"Expected {path} to be a checkpoint; got one with other entries.")


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes if a file is replaced; `None` if there is none."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@contextmanager
def only_writer(path: Path | None, saved: Saved | None) -> Iterator[None]:
    """Keeps other fits away from a checkpoint.

    Arguments:
        path: The file, or `None`.
        saved: What was read from it, if it existed.

    Raises:
        ValueError: If another fit writes it, or has written it since it was read.
        OSError: If the operating system cannot do it.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=0.0):
        if _stamp(path) != (None if saved is None else saved.stamp):
            raise ValueError(
                f"Another fit has written the checkpoint {path} meanwhile. Go on from it with "
                "resume=True, or choose another file."
            )
        yield


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits the state of an optimiser into tensors, and a rest that can be written as JSON.

    Arguments:
        state: The result of its `state_dict()`.

    Returns:
        The tensors, of any shape, by `"{parameter}.{name}"`, and the rest.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> tensors, rest = split_state(optimizer.state_dict())
        >>> sorted(tensors), rest["param_groups"][0]["lr"]
        (['0.exp_avg', '0.exp_avg_sq', '0.step'], 0.001)
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                rest[f"{index}.{name}"] = value
    return tensors, {"plain": plain(rest), "param_groups": plain(state["param_groups"])}


def joined_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes :func:`split_state`; the result is for `load_state_dict`.

    Arguments:
        tensors: The tensors, of any shape.
        rest: The rest.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**unplain(rest["plain"]), **tensors}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": unplain(rest["param_groups"])}


def plain(value: Any) -> Any:
    """Returns a value in a form that can be written as JSON.

    Tensors and tuples become lists, a dict with keys that are not strings becomes a list of pairs,
    and functions in dicts are left out.

    Arguments:
        value: Numbers, strings, tensors, and lists and dicts of them.

    Example:
        >>> plain({"lr": torch.tensor(0.5), "milestones": {3: 1}, "lr_lambda": len})
        {'lr': 0.5, 'milestones': {'(pairs)': [[3, 1]]}}
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        items = [(k, plain(v)) for k, v in value.items() if not callable(v)]
        if all(isinstance(k, str) for k, _ in items):
            return dict(items)
        return {_PAIRS: [list(item) for item in items]}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def unplain(value: Any) -> Any:
    """Undoes :func:`plain`, but tensors and tuples come back as numbers and lists.

    Arguments:
        value: The result of :func:`plain`.

    Example:
        >>> unplain({"milestones": {"(pairs)": [[3, 1]]}})
        {'milestones': {3: 1}}
    """
    if isinstance(value, dict):
        items = value[_PAIRS] if _PAIRS in value else value.items()
        return {k: unplain(v) for k, v in items}
    return [unplain(v) for v in value] if isinstance(value, list) else value


def call_of(made: object, options: Mapping[str, Any]) -> str:
    """Returns a call by which an object could have been made, as text.

    Arguments:
        made: The object, whose class is named.
        options: Its options, by name.

    Example:
        >>> call_of(torch.nn.Identity(), {"lr": 0.5})
        'Identity(lr=0.5)'
    """
    named = ", ".join(f"{name}={value}" for name, value in plain(dict(options)).items())
    return f"{type(made).__name__}({named})"


def callable_of(function: Callable[..., Any]) -> Identity:
    """Returns what tells a function from others: its name, arguments and code, by name.

    The entry of the code names the version of Python, since other versions compile it to another
    code. What the code refers to, such as global variables, is not compared.

    Arguments:
        function: A function, a `functools.partial` of one, or an object that can be called.

    Example:
        >>> list(callable_of(lambda x: x).values())[0]
        '<lambda>'
    """

    def digest(code: CodeType) -> str:
        constants = [digest(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        text = f"{code.co_code.hex()} {code.co_names} {constants}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    options: dict[str, Any] = {}
    name, function = "", inspect.unwrap(function)
    while isinstance(function, functools.partial):
        options |= {"args": function.args, **function.keywords}
        name, function = f"{name}partial of ", function.func
    name += getattr(function, "__qualname__", type(function).__name__)
    if options:
        name += f", {', '.join(f'{k}={v}' for k, v in plain(options).items())}"
    code = getattr(function, "__code__", None)
    version = f"{_CODE} under Python {sys.version_info.major}.{sys.version_info.minor}"
    return {"transform": name} | ({} if code is None else {version: digest(code)})


def generator_states() -> dict[str, Tensor]:
    """Returns the states of torch's generators, bytes of shape (n,), by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Restores the states of torch's generators; devices that are not available are left out.

    Arguments:
        states: The result of :func:`generator_states`, on the CPU, bytes of shape (n,).
    """
    torch.set_rng_state(states["cpu"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(devices):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)
