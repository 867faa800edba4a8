"""Checkpoints of a fit: its state between two epochs, written to one file and read again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..data.files import PathLike, load_state, read_tensors, write_tensors
from .history import Record

__all__ = [
    "Saved",
    "State",
    "call_of",
    "checkpoint_path",
    "generator_states",
    "joined_state",
    "plain",
    "read_checkpoint",
    "set_generator_states",
    "split_state",
    "unplain",
]

FORMAT = 2
_PAIRS = "(pairs)"

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
        }
        write_tensors(path, tensors, header)

    def restore(self, saved: "Saved", identity: Identity, device: torch.device) -> None:
        """Takes over the state of a checkpoint, with that of torch's generators.

        Arguments:
            saved: The content of the checkpoint.
            identity: What tells this fit from others.
            device: The device of the fit.

        Raises:
            ValueError: If the checkpoint belongs to another fit. Nothing is changed then.
        """
        saved.check(identity)
        header = saved.header
        load_state(self.program, saved.part("program", device), saved.path)
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


@dataclass(frozen=True, eq=False)
class Saved:
    """The content of a checkpoint.

    Arguments:
        path: The file.
        tensors: Its tensors, of any shape, by name.
        header: The rest.
    """

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def check(self, identity: Identity) -> None:
        """Refuses a fit that the checkpoint does not belong to.

        Arguments:
            identity: What tells that fit from others.

        Raises:
            ValueError: If the checkpoint belongs to another fit; the message names the settings.
        """
        now, then = json.loads(json.dumps(identity)), self.header["fit"]
        changes = [f"{k} was {then.get(k)}, now {now[k]}" for k in now if now[k] != then.get(k)]
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
    tensors, header = read_tensors(path)
    if header.get("kind") != "checkpoint":
        raise ValueError(f"Expected {path} to be a checkpoint; got {header.get('kind')}.")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint {path} has format {header.get('format', 0)}, and this version of "
            f"pyro_vae reads format {FORMAT} only. Resume with the version that wrote it, or "
            "start again with another file."
        )
    return Saved(path, tensors, header)


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
