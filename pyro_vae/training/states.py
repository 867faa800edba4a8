"""State between two epochs as tensors and JSON, and back: optimisers, schedules, generators."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "call_of",
    "generator_states",
    "joined_state",
    "plain",
    "set_generator_states",
    "split_state",
    "under",
    "unplain",
]

_PAIRS = "(pairs)"


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits the state of an optimiser into tensors, and a rest that JSON can hold.

    Arguments:
        state: What its `state_dict()` returns.

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
    """Joins what :func:`split_state` split, for `load_state_dict`.

    Arguments:
        tensors: The tensors.
        rest: The rest.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**unplain(rest["plain"]), **tensors}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": unplain(rest["param_groups"])}


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it; tensors become lists, functions in dicts are left out.

    A dict whose keys are not strings becomes a list of pairs, a tuple a list.

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
    """Undoes :func:`plain`, but for tensors and tuples, which come back as numbers and lists.

    Arguments:
        value: What it returned.

    Example:
        >>> unplain({"milestones": {"(pairs)": [[3, 1]]}})
        {'milestones': {3: 1}}
    """
    if isinstance(value, dict):
        items = value[_PAIRS] if _PAIRS in value else value.items()
        return {k: unplain(v) for k, v in items}
    return [unplain(v) for v in value] if isinstance(value, list) else value


def call_of(made: Any, options: Mapping[str, Any]) -> str:
    """Says by which call an object could have been made.

    Arguments:
        made: The object, of which the class is named.
        options: Its options, by name.

    Example:
        >>> call_of(torch.nn.Identity(), {"lr": 0.5})
        'Identity(lr=0.5)'
    """
    said = ", ".join(f"{name}={value}" for name, value in plain(dict(options)).items())
    return f"{type(made).__name__}({said})"


def generator_states() -> dict[str, Tensor]:
    """Returns the states of torch's generators, bytes of shape (n,), by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Puts torch's generators back to where they were; devices that are not there are left out.

    Arguments:
        states: What :func:`generator_states` returned, on the CPU.
    """
    torch.set_rng_state(states["cpu"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(devices):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)


def under(
    prefix: str, tensors: Mapping[str, Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix, without it, on a device.

    Arguments:
        prefix: The prefix.
        tensors: Tensors of any shape, by name.
        device: Where they go.

    Example:
        >>> under("best.", {"best.loc": torch.ones(1), "program.loc": torch.zeros(1)}, "cpu")
        {'loc': tensor([1.])}
    """
    return {
        name.removeprefix(prefix): tensor.to(device)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
