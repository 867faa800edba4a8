"""Rows in memory: a tensor or a dict of tensors, with labels."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from .cells import CellError, few, shown
from .files import sha256_of
from .source import Row

__all__ = ["PLATE", "Rows", "as_tensor", "floating_like"]


PLATE = "data"

CHECKED_AT_ONCE = 2**14
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
TORCH_DTYPES = {
    "uint16": "int32",
    "uint32": "int64",
    "uint64": "int64",
    np.dtype(np.longdouble).name: "float64",
}


def floating_like(module: nn.Module | None) -> Tensor:
    """Returns an empty tensor of the floating dtype and the device of a module's weights.

    Arguments:
        module: The module; `None` and modules without weights give torch's defaults.
    """
    if module is not None:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return torch.empty(0)


def as_tensor(array: np.ndarray) -> Tensor:
    """Returns an array of numbers as a tensor, which shares its memory if torch can read it.

    Unsigned integers of 16 bits or more become int32 or int64, and long doubles become float64.

    Arguments:
        array: The array, of any shape.

    Raises:
        ValueError: If a number is too large for int64 or float64.

    Example:
        >>> as_tensor(np.array([1, 2], np.uint16)).dtype
        torch.int32
    """
    dtype = TORCH_DTYPES.get(array.dtype.name, array.dtype.newbyteorder("="))
    copy = None if array.flags.writeable else True
    with np.errstate(over="ignore"):
        plain = np.array(array, dtype, order="C", copy=copy)
    if plain.dtype != array.dtype and plain.size:
        wrong = (plain < 0) if array.dtype.kind == "u" else np.isinf(plain) != np.isinf(array)
        if wrong.any():
            most = "2**63" if array.dtype.kind == "u" else "1.8e308"
            raise ValueError(f"Expected numbers below {most}; got {array[wrong][0]}.")
    return torch.from_numpy(plain)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in memory: tensors that share their first dim, with labels of rows and columns.

    It is a :class:`~pyro_vae.data.source.Source`. Use :func:`~pyro_vae.data.read.read` to make
    one from an array, a frame or a dict.

    Arguments:
        x: A tensor of shape (rows, *event), or a dict of tensors of as many rows.
        labels: The labels of the rows, shape (rows,).
        columns: For each field (`"x"` for a bare tensor) the labels along each event dim.

    Example:
        >>> from pyro_vae.data.read import read
        >>> rows = read(np.eye(3))
        >>> len(rows), rows.field("x").dtype, [len(chunk) for chunk in rows.chunks(2)]
        (3, torch.float64, [2, 1])
    """

    x: Row
    labels: np.ndarray
    columns: dict[str, tuple[np.ndarray, ...]]

    @property
    def fields(self) -> dict[str, Tensor]:
        """The tensors by name; a bare tensor is called `"x"`."""
        return self.x if isinstance(self.x, dict) else {"x": self.x}

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return next(iter(self.fields.values())).device

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: slice | Tensor) -> "Rows":
        labels = self.labels[index if isinstance(index, slice) else index.cpu().numpy()]
        return Rows(self.select(index), labels, self.columns)

    def field(self, name: str = "x") -> Tensor:
        """Returns one field.

        Arguments:
            name: The name of the field; `"x"` for a bare tensor.

        Raises:
            ValueError: If there is no such field.
        """
        if name not in self.fields:
            raise ValueError(f"Expected rows with a field {name!r}; got {sorted(self.fields)}.")
        return self.fields[name]

    def event_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of one row of each field, by the name of the field."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.fields.items()}

    def select(self, index: slice | Tensor, program: nn.Module | None = None) -> Row:
        """Returns some rows as a program takes them, without labels.

        Arguments:
            index: A slice, or row numbers of shape (n,).
            program: The program to whose device and dtype the rows go; `None` leaves them as
                they are.
        """
        if program is not None:
            return self[index].to_like(program).x
        return self._map(lambda _, tensor: tensor[index])

    def head(self, n: int, program: nn.Module | None = None) -> Row:
        """Returns the first rows as a program takes them, without labels.

        Arguments:
            n: The number of rows.
            program: As in :meth:`select`.
        """
        return self.select(slice(n), program)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Row]:
        """Yields every row once, in minibatches.

        Arguments:
            size: The number of rows of a minibatch; the last one may have fewer.
            seed: The seed of a random order; `None` for the order in which the rows are stored.
        """
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for index in order.to(self.device).split(size):
            yield self.select(index)

    def chunks(self, size: int) -> Iterator["Rows"]:
        """Cuts the rows into consecutive pieces.

        Arguments:
            size: The largest number of rows of a piece.
        """
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def ask(self, check: Callable[["Rows"], object], like: nn.Module | None) -> None:
        """Calls a check with all rows, piece by piece, on the device of a module.

        Arguments:
            check: A function of rows that raises a ValueError if it refuses them.
            like: The module to whose device and dtype each piece goes.

        Raises:
            ValueError: If the check raises it. A :class:`~pyro_vae.data.cells.CellError` gets
                the labels of the row and the column, and counts the rows of all pieces. If the
                check counts rows from the start of a later piece, the message says where that is.
        """
        refused: CellError | None = None
        for start in range(0, len(self), CHECKED_AT_ONCE):
            piece = self[start : start + CHECKED_AT_ONCE].to_like(like)
            try:
                check(piece)
            except CellError as error:
                error.row += start
                if refused is not None:
                    refused.count += error.count
                refused = refused or error
            except ValueError as error:
                if start == 0:
                    raise
                where = f"row {shown(self.labels, start)}"
                raise ValueError(f"{error} Rows are counted from {where} here.") from error
        if refused is not None:
            refused.total = len(self)
            raise refused.named(self.labels, self.columns.get("x", ()))

    def to(self, device: torch.device | str) -> "Rows":
        """Moves the rows to a device.

        Arguments:
            device: The device.
        """
        return replace(self, x=self._map(lambda _, tensor: tensor.to(device)))

    def to_like(self, module: nn.Module | None, *, move: bool = True) -> "Rows":
        """Casts floating values to the dtype of a module's weights, and moves to its device.

        A module with the attribute `standardizes = True` gets float64 values of x as they are.

        Arguments:
            module: The module; `None` changes nothing.
            move: Whether to move the rows; otherwise they are only cast.
        """
        if module is None:
            return self
        like = floating_like(module)
        keeps_x = getattr(module, "standardizes", False)

        def cast(name: str, tensor: Tensor) -> Tensor:
            is_kept = keeps_x and name == "x" and tensor.dtype == torch.float64
            dtype = like.dtype if tensor.is_floating_point() and not is_kept else tensor.dtype
            return tensor.to(like.device if move else tensor.device, dtype)

        return replace(self, x=self._map(cast))

    def digest(self) -> str:
        """Returns a SHA-256 of the values, which differs between different data."""
        return sha256_of(self.fields)

    def names(self) -> dict[str, list[list[str] | None]]:
        """Returns the labels along each event dim as text, by field; `None` for numbers.

        Fields without any named dim are left out.
        """
        found = {
            name: [None if _is_numbered(dim) else [*map(str, pd.Index(dim))] for dim in dims]
            for name, dims in self.columns.items()
        }
        return {name: dims for name, dims in found.items() if any(dims)}

    def ordered(self, known: Mapping[str, Sequence[Sequence[str] | None]]) -> "Rows":
        """Puts the columns in the order of those that a program was fitted to, by their names.

        Columns without names, of rows or of the fit, are taken as they stand.

        Arguments:
            known: The result of :meth:`names` of the rows of the fit.

        Raises:
            ValueError: If columns are missing, unknown, or of one name.

        Example:
            >>> from pyro_vae.data.read import read
            >>> rows = read(pd.DataFrame([[1.0, 2.0]], columns=["b", "a"]))
            >>> rows.ordered({"x": [["a", "b"]]}).x.tolist()
            [[2.0, 1.0]]
        """
        fields, columns = dict(self.fields), dict(self.columns)
        for name, own in self.names().items():
            dims = known.get(name, [None] * len(own))
            if len(dims) != len(own):
                continue
            for dim, (old, fitted) in enumerate(zip(own, dims, strict=True)):
                size = len(columns[name][dim])
                new = [str(i) for i in range(size)] if fitted is None else [*fitted]
                if old is None or old == new or (fitted is None and {*old} != {*new}):
                    continue
                if sorted(old) != sorted(new) or len({*new}) < len(new):
                    missing = few([label for label in new if label not in old])
                    unknown = few([label for label in old if label not in new])
                    twice = few(sorted({label for label in old if old.count(label) > 1}))
                    raise ValueError(
                        f"Expected {name} with the columns of the training rows; got missing "
                        f"columns: {missing}; columns that are not among them: {unknown}; of one "
                        f"name: {twice}. Rename or select columns; their order does not matter."
                    )
                index = torch.tensor([old.index(label) for label in new])
                fields[name] = fields[name].index_select(dim + 1, index.to(self.device))
                labels = columns[name][dim][index.numpy()]
                columns[name] = (*columns[name][:dim], labels, *columns[name][dim + 1 :])
        x = fields if isinstance(self.x, dict) else fields["x"]
        return Rows(x, self.labels, columns)

    def column_names(self) -> list[str] | None:
        """Returns the names of the columns of x; `None` if x is no table with named columns."""
        labels = self.columns.get("x", ())
        return labels[0].tolist() if len(labels) == 1 and labels[0].dtype.kind == "U" else None

    def listed(self, columns: list[int]) -> str:
        """Returns the names of columns of x, the first five of them, as words.

        Arguments:
            columns: The numbers of the columns, in the order of the elements of a row.
        """
        names = self.column_names()
        called = [str(column if names is None else names[column]) for column in columns]
        more = f" and {len(called) - 5} more" if len(called) > 5 else ""
        return ", ".join(called[:5]) + more

    def coords(
        self, site: str = "x", shape: tuple[int, ...] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the labels along each event dim of a site, by the name of the dim.

        The dims are called `{site}_dim_{i}`, as in ArviZ. The labels are those of the field of
        the same name, else those of `x`, if the shapes agree; otherwise the dims are numbered.

        Arguments:
            site: The name of a field or of a site of a program.
            shape: The event shape of the site; by default that of the field.
        """
        labels = self.columns.get(site, self.columns.get("x", ()))
        if shape is not None and tuple(map(len, labels)) != shape:
            labels = tuple(map(np.arange, shape))
        return {f"{site}_dim_{i}": label for i, label in enumerate(labels)}

    def labelled(
        self,
        arrays: dict[str, Tensor],
        about: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
        **attrs: Any,
    ) -> xr.Dataset:
        """Labels arrays that have the shape of x with the labels of its rows and columns.

        Arguments:
            arrays: For each variable a tensor of shape (rows, *event).
            about: The attributes of each variable: `long_name`, `units`.
            attrs: The attributes of the data set.
        """
        own = self.coords("x")
        variables = {
            name: (("datum", *own), array.cpu().numpy(), dict(about.get(name, {})))
            for name, array in arrays.items()
        }
        return xr.Dataset(variables, {"datum": self.labels} | own, attrs)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Row:
        if isinstance(self.x, dict):
            return {name: function(name, tensor) for name, tensor in self.x.items()}
        return function("x", self.x)


def _is_numbered(labels: np.ndarray) -> bool:
    return labels.dtype.kind in "iu" and np.array_equal(labels, np.arange(len(labels)))
