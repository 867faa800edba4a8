"""Reads rows from any container, and lets the program check them."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from .cells import CellError, place_name
from .checks import warn_user
from .datasets import Dataset
from .frames import labels_of, numbers_of, numeric
from .rows import UNSIGNED, Rows, as_tensor
from .source import Row, Source

__all__ = ["READERS", "Field", "Reader", "check_rows", "on_copies", "read", "transformed"]

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


@runtime_checkable
class InPandas(Protocol):
    """A table of another library that turns itself into one of pandas: pyarrow, polars."""

    def to_pandas(self) -> pd.DataFrame:
        """Returns the table as a frame."""


@runtime_checkable
class Sparse(Protocol):
    """A sparse matrix or array of SciPy."""

    def toarray(self) -> np.ndarray:
        """Returns it as a dense array."""


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
            label = (
                None
                if field.name is None
                else labels_of(pd.Index([field.name], tupleize_cols=False))
            )
            fields[name] = Field(field.values[None], (label, *field.labels))
    rows = _rows(fields, is_dict=is_dict or bool(beside))
    rows = rows.ordered(getattr(program, "fitted_columns", {}))
    cast = rows.to_like(program, move=move)
    _check_cast(rows, cast)
    if check:
        check_rows(program, cast)
    return cast


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
    seen = read(on_copies(transform)(rows.x), program, check=False)
    if len(seen) != len(rows):
        raise ValueError(
            f"Expected a transform that keeps the {len(rows)} rows; got {len(seen)} from it."
        )
    old, new = rows.event_shapes(), seen.event_shapes()
    same = {name: rows.columns[name] for name in new if old.get(name) == new[name]}
    return Rows(seen.x, rows.labels, seen.columns | same)


def on_copies(transform: Transform) -> Transform:
    """Returns a transform that gets a copy of its row, so that it cannot change the data in place.

    Arguments:
        transform: A function of a row.

    Example:
        >>> x = torch.ones(2)
        >>> on_copies(lambda row: row.mul_(3.0))(x), x
        (tensor([3., 3.]), tensor([1., 1.]))
    """

    @wraps(transform)
    def apply(row: Row) -> Any:
        if isinstance(row, dict):
            return transform({name: tensor.clone() for name, tensor in row.items()})
        return transform(row.clone())

    apply.__qualname__ = getattr(transform, "__qualname__", type(transform).__name__)
    return apply


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
            return Field(_plain(x))
        case pd.DataFrame():
            return Field(numbers_of(x), (labels_of(x.index), labels_of(x.columns)))
        case pd.Series():
            labels = labels_of(x.index)
            return Field(numeric(x, "the series", labels), (labels,), x.name)
        case xr.DataArray():
            labels_of_dims = [
                labels_of(x.coords[dim].to_index()) if dim in x.coords else None for dim in x.dims
            ]
            scalars = [coord.to_numpy()[()] for coord in x.coords.values() if coord.ndim == 0]
            name = scalars[0] if len(scalars) == 1 else None
            return Field(_numbers(x.to_numpy()), tuple(labels_of_dims), name)
        case InPandas():
            return _read_container(x.to_pandas())
        case Sparse():
            return Field(_numbers(x.toarray()))
        case np.ma.MaskedArray() if x.mask.any():
            return Field(np.ma.filled(x.astype(np.float64), np.nan))
        case np.ndarray() if x.dtype.names:
            return _read_container(pd.DataFrame(x))
        case torch.utils.data.Dataset() | str() | bytes():
            raise _no_array(x)
    return Field(_numbers(np.asarray(x), x))


def _plain(x: Tensor) -> Tensor:
    """A tensor that shares its memory if it is a plain one of a common dtype."""
    x = x.detach()
    if x.is_nested or x.is_meta:
        kind = "nested tensor, whose rows differ in shape" if x.is_nested else "tensor on meta"
        raise ValueError(f"Expected a tensor with values, rows along its first dim; got a {kind}.")
    x = x if x.layout == torch.strided else x.to_dense()
    x = x.dequantize() if x.is_quantized else x
    if x.dtype in UNSIGNED:
        return as_tensor(x.cpu().numpy()).to(x.device)
    if x.is_complex():
        raise ValueError(
            f"Expected real numbers; got a tensor of {x.dtype}. Pass the real and the imaginary "
            "part as two columns."
        )
    return x.float() if x.is_floating_point() and x.itemsize == 1 else x


def _numbers(values: np.ndarray, container: object = None) -> np.ndarray:
    """An array of numbers; others are refused by column."""
    if values.ndim == 0 and values.dtype == object:
        raise _no_array(container)
    if values.dtype.kind in "fiub" or values.size == 0:
        return values
    table = pd.DataFrame(values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1))
    return numbers_of(table).reshape(values.shape)


def _no_array(container: object) -> ValueError:
    return ValueError(
        f"Expected an array of numbers; got a {type(container).__name__}. Pass its rows as "
        "one tensor, array or frame; minibatches are made of it."
    )


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
        values = field.values
        if not isinstance(values, Tensor):
            values = as_tensor(values)
    except (TypeError, ValueError) as error:
        text = str(error)
        if not text.startswith("Expected"):
            text = f"Expected an array of numbers; got {text}."
        named = text if name == "x" else text.replace("; got", f" (field {name!r}); got", 1)
        raise ValueError(named) from error
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
    columns = {}
    for name, field in fields.items():
        labels_of_dims = itertools.zip_longest(
            field.values.shape[1:], field.labels[1 : field.values.ndim]
        )
        columns[name] = tuple(
            np.arange(size) if label is None else label for size, label in labels_of_dims
        )
    labels = _common_labels(fields, min(lengths.values()))
    if "x" in tensors and "weight" in tensors:
        weight = tensors["weight"]
        weight = tensors["weight"] = weight if weight.is_floating_point() else weight.double()
        if weight.ndim != 1:
            raise ValueError(
                f"Expected one weight for each row; got weights of shape {tuple(weight.shape)}."
            )
        if (bad := ~((weight >= 0) & weight.isfinite())).any():
            wanted = "Expected weights that are finite and 0 or more"
            raise CellError(wanted, weight, bad).named(labels, ())
    return Rows(tensors if is_dict else tensors["x"], labels, columns)


def _check_cast(rows: Rows, cast: Rows) -> None:
    """Refuses values that are too large for the dtype of a program; warns of lost digits."""
    for name, tensor in rows.fields.items():
        if tensor.dtype == cast.field(name).dtype or tensor.dtype != torch.float64:
            continue
        dtype, held = cast.field(name).dtype, cast.field(name).to(tensor)
        bad = held.isinf() & tensor.isfinite()
        advice = " Call .double() on the program, or divide the column by a constant."
        columns = rows.columns[name]
        if bad.any():
            wanted = f"Expected values of {name} that {dtype} holds"
            raise CellError(wanted, tensor, bad, advice).named(rows.labels, columns)
        spread, size = tensor.std(0, correction=0), tensor.abs().amax(0)
        lost = ((held - tensor).abs().amax(0) > 0.1 * spread) & (spread > 1e-12 * size)
        if lost.any():
            place = place_name(lost.nonzero()[0].tolist(), lost.shape, columns)
            warn_user(
                f"The values of {name} in {place} differ by less than {dtype} can hold, and "
                "become equal. Call .double() on the program, or subtract a constant from it."
            )


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
        if not pd.Index(labels).equals(pd.Index(labelled[first])):
            raise ValueError(
                "Expected fields whose rows have the same labels in the same order; got others in "
                f"{name} than in {first}."
            )
    return labelled[first]
