"""Reads rows from any container: one list of readers, one check by the program."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from .datasets import Dataset
from .rows import Rows
from .source import Source

__all__ = ["READERS", "Field", "Reader", "check_rows", "read", "transformed"]

Transform = Callable[[Any], Any]


class Field(NamedTuple):
    """One array of data with its labels.

    Arguments:
        values: A tensor or an array of numbers, shape (rows, *event).
        labels: The labels along each dim, rows first; `None` for a dim without labels. Dims at
            the end may be left out.
        name: The label of the only row, if the array is one row, shape (*event).
    """

    values: Any
    labels: tuple[np.ndarray | None, ...] = ()
    name: Any = None


class Reader(NamedTuple):
    """How one kind of container is read.

    Arguments:
        kind: The type of the container.
        field: A function of a container of this type that returns its :class:`Field`.
    """

    kind: type
    field: Callable[[Any], Field]


def read(
    x: Any,
    program: nn.Module | None = None,
    *,
    context: Any = None,
    weights: Any = None,
    check: bool = True,
    move: bool = False,
) -> Rows:
    """Reads rows from whatever holds them, as a program takes them.

    Floating values take the dtype of the program's weights; integers and booleans keep theirs. If
    the program has a method `check(row)`, it is called with all rows, piece by piece. If the
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
    x = _in_memory(x) if isinstance(x, Source) else x
    beside = {"context": context, "weight": weights}
    beside = {name: value for name, value in beside.items() if value is not None}
    is_dict = bool(beside) or isinstance(x.x if isinstance(x, Rows) else x, Mapping)
    given = _containers(x)
    if twice := sorted(given.keys() & beside.keys()):
        raise ValueError(
            f"x already has a field {twice[0]!r}: take it out of x, or do not pass it beside x."
        )
    fields = {name: _field(name, value) for name, value in (given | beside).items()}
    shape = getattr(program, "event_shape", None)
    if "x" in fields and isinstance(shape, tuple) and fields["x"].values.shape == shape:
        fields = {name: _as_one_row(field) for name, field in fields.items()}
    rows = _rows(fields, is_dict=is_dict).to_like(program, move=move)
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
    """Applies a transform to rows, and keeps their labels.

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
    kept = {name: rows.columns[name] for name in new if old.get(name) == new[name]}
    return Rows(seen.x, rows.labels, seen.columns | kept)


def _of_dataset(data: Dataset) -> Field:
    return _reader_of(data.x).field(data.x)


def _of_source(source: Source) -> Field:
    rows = _in_memory(source)
    return Field(rows.field("x"), (rows.labels, *rows.columns["x"]))


def _of_tensor(tensor: Tensor) -> Field:
    return Field(tensor.detach())


def _of_frame(frame: pd.DataFrame) -> Field:
    return Field(frame.to_numpy(), (_labels(frame.index), _labels(frame.columns)))


def _of_series(series: pd.Series) -> Field:
    return Field(series.to_numpy(), (_labels(series.index),), series.name)


def _of_xarray(array: xr.DataArray) -> Field:
    labels = [
        _labels(array.coords[dim].to_index()) if dim in array.coords else None
        for dim in array.dims
    ]
    scalars = [coord.to_numpy()[()] for coord in array.coords.values() if coord.ndim == 0]
    return Field(array.to_numpy(), tuple(labels), scalars[0] if len(scalars) == 1 else None)


def _of_array(array: Any) -> Field:
    return Field(np.asarray(array))


READERS = [
    Reader(Dataset, _of_dataset),
    Reader(Source, _of_source),
    Reader(Tensor, _of_tensor),
    Reader(pd.DataFrame, _of_frame),
    Reader(pd.Series, _of_series),
    Reader(xr.DataArray, _of_xarray),
    Reader(object, _of_array),
]
"""The readers; the first one whose kind fits a container reads it.

To read another container, insert a :class:`Reader` for its type before the last entry, which
takes everything that NumPy takes.
"""


def _containers(x: Any) -> dict[str, Any]:
    """The containers of the fields, by name."""
    if isinstance(x, Rows):
        return {
            name: Rows(tensor, x.labels, {"x": x.columns[name]})
            for name, tensor in x.fields.items()
        }
    if not isinstance(x, Mapping):
        return {"x": x}
    if not x:
        raise ValueError("Expected at least one field of data; got an empty dict.")
    return dict(x)


def _in_memory(source: Source) -> Rows:
    if isinstance(source, Rows):
        return source
    if source.num_rows is None:
        raise ValueError(
            f"This {type(source).__name__} does not say how many rows it has, and they are read "
            "into memory all at once: pass a part of known length."
        )
    x = source.head(source.num_rows)
    names = x if isinstance(x, dict) else ["x"]
    columns = {name: tuple(source.coords(name).values()) for name in names}
    return Rows(x, source.labels, columns)


def _reader_of(value: Any) -> Reader:
    return next(reader for reader in READERS if isinstance(value, reader.kind))


def _field(name: str, value: Any) -> Field:
    """Reads one container, its values as a tensor."""
    try:
        field = _reader_of(value).field(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {name} to be an array of numbers; got {error}.") from error
    tensor = field.values if isinstance(field.values, Tensor) else _tensor(name, field.values)
    if tensor.is_complex():
        raise ValueError(f"Expected {name} to hold real numbers; got dtype {tensor.dtype}.")
    return field._replace(values=tensor)


def _tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected {name} to hold numbers; got {error}.") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"Expected {name} to hold numbers; got dtype {array.dtype}.")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(_torch_readable(array))


def _torch_readable(array: np.ndarray) -> np.ndarray:
    unsigned = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}
    if array.dtype in unsigned or array.dtype == np.uint64:
        return array.astype(unsigned.get(array.dtype, np.int64))
    if array.dtype == np.longdouble:
        return array.astype(np.float64)
    return np.array(array, order="C", copy=None if array.flags.writeable else True)


def _as_one_row(field: Field) -> Field:
    label = None if field.name is None else _labels(pd.Index([field.name]))
    return Field(field.values[None], (label, *field.labels))


def _rows(fields: dict[str, Field], *, is_dict: bool) -> Rows:
    tensors = {name: field.values for name, field in fields.items()}
    count = _common_length(tensors)
    if "x" in tensors and "weight" in tensors:
        tensors["weight"] = _checked_weight(tensors["weight"])
    columns = {name: _columns(field) for name, field in fields.items()}
    return Rows(tensors if is_dict else tensors["x"], _common_labels(fields, count), columns)


def _common_length(tensors: dict[str, Tensor]) -> int:
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
    return next(iter(lengths.values()))


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


def _common_labels(fields: Mapping[str, Field], count: int) -> np.ndarray:
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


def _columns(field: Field) -> tuple[np.ndarray, ...]:
    labels = itertools.chain(field.labels[1:], itertools.repeat(None))
    return tuple(
        np.arange(size) if label is None else label
        for size, label in zip(field.values.shape[1:], labels, strict=False)
    )


def _labels(index: pd.Index) -> np.ndarray:
    if isinstance(index, pd.MultiIndex) or index.dtype.kind not in "iufM":
        return np.asarray([str(label) for label in index], dtype=np.str_)
    return index.to_numpy()
