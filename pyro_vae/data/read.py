"""Reads rows from any container, and lets the program check them."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from .datasets import Dataset
from .rows import Rows, as_tensor
from .source import Source

__all__ = ["READERS", "Field", "Reader", "check_rows", "read", "transformed"]

Transform: TypeAlias = Callable[[Any], Any]


class Field(NamedTuple):
    """One array of data with its labels.

    Arguments:
        values: A tensor or an array of numbers, shape (rows, *event).
        labels: The labels along each dim, rows first; `None` for a dim without labels. Dims at
            the end may be left out.
        name: The label of the only row, if the array is one row, shape (*event).
    """

    values: Tensor | np.ndarray
    labels: tuple[np.ndarray | None, ...] = ()
    name: object = None


class Reader(NamedTuple):
    """How one kind of container is read.

    Arguments:
        kind: The type of the container.
        field: A function of a container of this type that returns its :class:`Field`.
    """

    kind: type
    field: Callable[[Any], Field]


def read(
    x: object,
    program: nn.Module | None = None,
    *,
    context: object = None,
    weights: object = None,
    check: bool = True,
    move: bool = False,
) -> Rows:
    """Reads rows from any container, in the form that a program takes.

    Floating values take the dtype of the program's weights; integers and booleans do not change.
    If the program has a method `check(row)`, it is called with all rows, piece by piece. If the
    program has an `event_shape` and x has exactly that shape, x is read as one row, and so are
    its context and weight.

    Arguments:
        x: The data, shape (rows, *event): a tensor, an array, a pandas frame or series, an xarray
            array or data set, a :class:`~pyro_vae.data.datasets.Dataset`, a
            :class:`~pyro_vae.data.source.Source`, or a dict of such.
        program: The program that the rows are for.
        context: Covariates of the rows, shape (rows, *context), read like x. The program gets
            them as `row["context"]`, beside `row["x"]`.
        weights: The weight of each row, shape (rows,), 0 or more. The program gets them as
            `row["weight"]`, beside `row["x"]`.
        check: Whether the program's `check` is called.
        move: Whether the rows move to the program's device now, all at once.

    Raises:
        ValueError: If there are no rows, or no numbers; if fields have different numbers of
            rows, or different labels; if x already has the field `context` or `weight` that is
            passed beside it; if a weight is negative, NaN or infinite; if the program's `check`
            refuses the rows.

    Example:
        >>> rows = read(pd.DataFrame({"height": [1.7, 1.6]}, index=["Ann", "Bob"]))
        >>> rows.labels.tolist(), rows.column_names()
        (['Ann', 'Bob'], ['height'])
        >>> sorted(read(torch.ones(2, 3), context=torch.zeros(2, 1), weights=[1, 2]).head(1))
        ['context', 'weight', 'x']
    """
    given: dict[str, object]
    match x:
        case Source():
            rows = _in_memory(x)
            is_dict = isinstance(rows.x, dict)
            given = {
                name: Rows(tensor, rows.labels, {"x": rows.columns[name]})
                for name, tensor in rows.fields.items()
            }
        case Mapping():
            if not x:
                raise ValueError("Expected at least one field of data; got an empty dict.")
            given, is_dict = dict(x), True
        case _:
            given, is_dict = {"x": x}, False
    beside = {"context": context, "weight": weights}
    beside = {name: value for name, value in beside.items() if value is not None}
    if twice := sorted(given.keys() & beside.keys()):
        raise ValueError(
            f"x already has a field {twice[0]!r}: take it out of x, or do not pass it beside x."
        )
    fields = {name: _field(name, value) for name, value in (given | beside).items()}
    shape = getattr(program, "event_shape", None)
    if "x" in fields and isinstance(shape, tuple) and fields["x"].values.shape == shape:
        for name, field in list(fields.items()):
            label = None if field.name is None else _labels(pd.Index([field.name]))
            fields[name] = Field(field.values[None], (label, *field.labels))
    rows = _rows(fields, is_dict=is_dict or bool(beside)).to_like(program, move=move)
    if check:
        check_rows(program, rows)
    return rows


def check_rows(program: nn.Module | None, rows: Rows, transform: Transform | None = None) -> None:
    """Calls the program's own `check`, if it has one, with all rows.

    Arguments:
        program: The program.
        rows: The rows.
        transform: A function of rows that returns them as the program takes them.

    Raises:
        ValueError: If the program refuses the rows, or the transform changes their number.
    """
    check = getattr(program, "check", None)

    def check_piece(piece: Rows) -> None:
        seen = piece.x if transform is None else transformed(piece, transform, program).x
        if callable(check):
            check(seen)

    if callable(check) or transform is not None:
        rows.ask(check_piece, program)


def transformed(rows: Rows, transform: Transform, program: nn.Module | None = None) -> Rows:
    """Applies a transform to rows; the result has the same labels.

    Arguments:
        rows: The rows.
        transform: A function of a row; it may change values and event shapes.
        program: The program to whose dtype floating values are cast.

    Raises:
        ValueError: If the transform changes the number of rows.
    """
    seen = read(transform(rows.x), program, check=False)
    if len(seen) != len(rows):
        raise ValueError(
            f"Expected a transform that keeps the {len(rows)} rows; got {len(seen)} from it."
        )
    old, new = rows.event_shapes(), seen.event_shapes()
    same = {name: rows.columns[name] for name in new if old.get(name) == new[name]}
    return Rows(seen.x, rows.labels, seen.columns | same)


def _read_container(container: object) -> Field:
    readers = (reader for reader in READERS if isinstance(container, reader.kind))
    return next(readers).field(container)


def _read_known(x: object) -> Field:
    """Reads a container that the package knows, or anything that NumPy takes."""
    match x:
        case Dataset():
            return _read_container(x.x)
        case Source():
            rows = _in_memory(x)
            return Field(rows.field("x"), (rows.labels, *rows.columns["x"]))
        case Tensor():
            return Field(x.detach())
        case pd.DataFrame():
            return Field(x.to_numpy(), (_labels(x.index), _labels(x.columns)))
        case pd.Series():
            return Field(x.to_numpy(), (_labels(x.index),), x.name)
        case xr.DataArray():
            labels = [
                _labels(x.coords[dim].to_index()) if dim in x.coords else None for dim in x.dims
            ]
            scalars = [coord.to_numpy()[()] for coord in x.coords.values() if coord.ndim == 0]
            name = scalars[0] if len(scalars) == 1 else None
            return Field(x.to_numpy(), tuple(labels), name)
    return Field(np.asarray(x))


READERS = [Reader(object, _read_known)]
"""The readers; the first one whose kind fits a container reads it.

To read another container, insert a :class:`Reader` for its type before the last entry, which
reads the containers that :func:`read` lists and everything that NumPy takes.
"""


def _in_memory(source: Source) -> Rows:
    if isinstance(source, Rows):
        return source
    if source.num_rows is None:
        raise ValueError(
            f"This {type(source).__name__} does not say how many rows it has, and they are read "
            "into memory all at once: pass a part of known length."
        )
    rows = Rows(source.head(source.num_rows), source.labels, {})
    columns = {name: tuple(source.coords(name).values()) for name in rows.fields}
    return replace(rows, columns=columns)


def _field(name: str, container: object) -> Field:
    """Reads one container, its values as a tensor."""
    try:
        field = _read_container(container)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {name} to be an array of numbers; got {error}.") from error
    values = field.values
    if not isinstance(values, Tensor):
        if values.dtype == object:
            try:
                values = values.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Expected {name} to hold numbers; got {error}.") from error
        if values.dtype.kind not in "fiub":
            raise ValueError(f"Expected {name} to hold numbers; got dtype {values.dtype}.")
        values = as_tensor(values)
    if values.is_meta:
        raise ValueError(f"Expected {name} to hold numbers; got a tensor on the meta device.")
    if values.is_complex():
        raise ValueError(f"Expected {name} to hold real numbers; got dtype {values.dtype}.")
    return field._replace(values=values)


def _rows(fields: dict[str, Field], *, is_dict: bool) -> Rows:
    tensors = {name: torch.as_tensor(field.values) for name, field in fields.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            raise ValueError(f"Expected {name} to have rows along its first dim; got a scalar.")
        if tensor.numel() == 0:
            raise ValueError(
                f"Expected at least one row of data; got {name} of shape {tuple(tensor.shape)}."
            )
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Expected fields of equally many rows; got {lengths}.")
    if "x" in tensors and "weight" in tensors:
        tensors["weight"] = _checked_weight(tensors["weight"])
    columns = {}
    for name, field in fields.items():
        labels_of_dims = itertools.zip_longest(
            field.values.shape[1:], field.labels[1 : field.values.ndim]
        )
        columns[name] = tuple(
            np.arange(size) if label is None else label for size, label in labels_of_dims
        )
    labels = _common_labels(fields, min(lengths.values()))
    return Rows(tensors if is_dict else tensors["x"], labels, columns)


def _checked_weight(weight: Tensor) -> Tensor:
    weight = weight if weight.is_floating_point() else weight.double()
    if weight.ndim != 1:
        raise ValueError(
            f"Expected one weight for each row; got weights of shape {tuple(weight.shape)}."
        )
    bad = ~((weight >= 0) & weight.isfinite())
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected weights that are finite and 0 or more; got {float(weight[first])} at row "
            f"{first}, {int(bad.sum())} such in all."
        )
    return weight


def _common_labels(fields: dict[str, Field], count: int) -> np.ndarray:
    """The labels of the rows, on which all fields that have labels must agree."""
    labelled = {
        name: field.labels[0]
        for name, field in fields.items()
        if field.labels and field.labels[0] is not None
    }
    if not labelled:
        return np.arange(count)
    first = next(iter(labelled))
    for name, labels in labelled.items():
        if not np.array_equal(labels, labelled[first]):
            raise ValueError(
                "Expected fields whose rows have the same labels in the same order; got others in "
                f"{name} than in {first}."
            )
    return labelled[first]


def _labels(index: pd.Index) -> np.ndarray:
    if index.dtype.kind in "iufM":
        return index.to_numpy()
    return np.asarray([str(label) for label in index], dtype=np.str_)
