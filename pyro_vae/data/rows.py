"""What a row is: counting, naming, indexing, chunks and device of a tensor or a dict of them."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

__all__ = ["Data", "PLATE", "Rows", "floating_like"]

Data: TypeAlias = Tensor | dict[str, Tensor]

PLATE = "data"

ASKED_AT_ONCE = 2**14


def floating_like(module: nn.Module | None) -> Tensor:
    """Returns an empty tensor of the floating dtype and the device of a module's weights.

    Arguments:
        module: The module; one without weights, like `None`, gives torch's defaults.
    """
    if module is not None:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return torch.empty(0)


@dataclass(frozen=True, eq=False)
class Rows:
    """A table of rows: tensors that share their first dim, and what its dims are called.

    Arguments:
        x: A tensor of shape (rows, *event), or a dict of tensors of as many rows.
        names: The labels of the rows.
        columns: For each field (`"x"` for a bare tensor) the labels along each event dim.

    Example:
        >>> import numpy as np
        >>> rows = Rows.of(np.eye(3))
        >>> len(rows), rows.x.dtype, [len(chunk) for chunk in rows.chunks(2)]
        (3, torch.float32, [2, 1])
    """

    x: Data
    names: np.ndarray
    columns: dict[str, tuple[np.ndarray, ...]]

    @classmethod
    def of(cls, x: Any, *, like: nn.Module | None = None, move: bool = True) -> "Rows":
        """Reads rows from a tensor, an array, a pandas frame, an xarray array or a dict of them.

        Floating values take the dtype of the weights of `like`, integers and booleans stay; all
        move to its device, if they are to move.

        Arguments:
            x: The data, shape (rows, *event), or a dict of such.
            like: The module that will read them.
            move: Whether they go to its device now, all at once.

        Raises:
            ValueError: Where there are no rows, no numbers, or fields of different lengths.
        """
        if isinstance(x, Rows):
            return x.to_like(like, move=move)
        fields = x if isinstance(x, Mapping) else {"x": x}
        if not fields:
            raise ValueError("Expected at least one field of data; got an empty dict.")
        tensors = {name: _tensor(name, value) for name, value in fields.items()}
        count = _common_length(tensors)
        names = _common_names(fields, count)
        columns = {name: _columns(value, tensors[name]) for name, value in fields.items()}
        data = tensors if isinstance(x, Mapping) else tensors["x"]
        return cls(data, names, columns).to_like(like, move=move)

    @property
    def fields(self) -> dict[str, Tensor]:
        """The tensors by name; a bare tensor is called `"x"`."""
        return self.x if isinstance(self.x, dict) else {"x": self.x}

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return next(iter(self.fields.values())).device

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: slice | Tensor) -> "Rows":
        names = self.names[index if isinstance(index, slice) else index.cpu().numpy()]
        return Rows(self.select(index), names, self.columns)

    def select(self, index: slice | Tensor) -> Data:
        """Returns the data alone of some rows, on their device.

        Arguments:
            index: A slice, or row numbers of shape (n,).
        """
        if isinstance(self.x, dict):
            return {name: value[index] for name, value in self.x.items()}
        return self.x[index]

    def chunks(self, size: int) -> Iterator["Rows"]:
        """Cuts the rows into consecutive pieces.

        Arguments:
            size: The most rows of a piece.
        """
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def ask(self, check: Callable[["Rows"], Any], like: nn.Module | None) -> None:
        """Lets a function refuse rows, which it is shown piece by piece, as a module reads them.

        Arguments:
            check: A function of rows that raises ValueError where it refuses them.
            like: The module to whose device and dtype each piece goes.

        Raises:
            ValueError: What the function raises, and from which row on it counts.
        """
        for start in range(0, len(self), ASKED_AT_ONCE):
            piece = self[start : start + ASKED_AT_ONCE].to_like(like)
            with _counted_from(start):
                check(piece)

    def to(self, device: torch.device | str) -> "Rows":
        """Moves the rows to a device.

        Arguments:
            device: Where to.
        """
        return self._map(lambda tensor: tensor.to(device))

    def to_like(self, module: nn.Module | None, *, move: bool = True) -> "Rows":
        """Moves the rows to a module's device, and floating values to the dtype of its weights.

        Arguments:
            module: The module; `None` gives torch's default dtype, and moves nothing.
            move: Whether to move at all, or only cast.
        """
        like = floating_like(module)
        is_moved = move and module is not None

        def cast(tensor: Tensor) -> Tensor:
            dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(like.device if is_moved else tensor.device, dtype)

        return self._map(cast)

    def digest(self) -> str:
        """A SHA-256 of the values, by which data can be told from other data."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.fields.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for chunk in tensor.split(65536):
                digest.update(chunk.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def labelled(
        self,
        arrays: dict[str, Tensor],
        about: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
        **attrs: Any,
    ) -> xr.Dataset:
        """Puts the names of rows and columns on arrays that have the shape of these rows' field.

        Arguments:
            arrays: For each variable a tensor of shape (rows, *event).
            about: For a variable what it says of itself: `long_name`, `units`.
            attrs: What else the data set says of itself.
        """
        dims = self.dims("x")
        coords = {"datum": self.names} | dict(zip(dims, self.columns["x"], strict=True))
        variables = {
            name: (("datum", *dims), array.cpu().numpy(), dict(about.get(name, {})))
            for name, array in arrays.items()
        }
        return xr.Dataset(variables, coords, attrs)

    def dims(self, field: str) -> tuple[str, ...]:
        """The names of a field's event dims, as ArviZ writes them.

        Arguments:
            field: The name of the field, `"x"` for a bare tensor.
        """
        return tuple(f"{field}_dim_{i}" for i in range(len(self.columns[field])))

    def _map(self, function: Any) -> "Rows":
        fields = {name: function(tensor) for name, tensor in self.fields.items()}
        return Rows(fields if isinstance(self.x, dict) else fields["x"], self.names, self.columns)


@contextmanager
def _counted_from(start: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if start == 0:
            raise
        raise ValueError(f"{error} Rows are counted from row {start} here.") from error


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {name} to be an array of numbers; got {error}.") from error
    if array.dtype == object:
        array = _numbers_of_objects(name, array)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"Expected {name} to hold numbers; got dtype {array.dtype}.")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(_torch_readable(array))


def _numbers_of_objects(name: str, array: np.ndarray) -> np.ndarray:
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {name} to hold numbers; got {error}.") from error


def _torch_readable(array: np.ndarray) -> np.ndarray:
    unsigned = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}
    if array.dtype in unsigned or array.dtype == np.uint64:
        return array.astype(unsigned.get(array.dtype, np.int64))
    if array.dtype == np.longdouble:
        return array.astype(np.float64)
    return np.array(array, order="C", copy=None if array.flags.writeable else True)


def _common_length(tensors: dict[str, Tensor]) -> int:
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            raise ValueError(f"Expected {name} to have rows along its first dim; got a scalar.")
        if tensor.numel() == 0:
            raise ValueError(
                f"Expected at least one row of data; got {name} of shape {tuple(tensor.shape)}."
            )
        if tensor.is_complex():
            raise ValueError(f"Expected {name} to hold real numbers; got dtype {tensor.dtype}.")
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Expected fields of equally many rows; got {lengths}.")
    return next(iter(lengths.values()))


def _common_names(fields: Mapping[str, Any], count: int) -> np.ndarray:
    """The labels of the rows, which every field that has some must agree on."""
    labelled = {k: n for k, v in fields.items() if (n := _row_names(v)) is not None}
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


def _row_names(value: Any) -> np.ndarray | None:
    if isinstance(value, pd.DataFrame | pd.Series):
        return _labels(value.index)
    if isinstance(value, xr.DataArray) and value.dims[0] in value.coords:
        return _labels(value.coords[value.dims[0]].to_index())
    return None


def _columns(value: Any, tensor: Tensor) -> tuple[np.ndarray, ...]:
    if isinstance(value, pd.DataFrame):
        return (_labels(value.columns),)
    if isinstance(value, xr.DataArray):
        return tuple(
            _labels(value.coords[dim].to_index()) if dim in value.coords else np.arange(size)
            for dim, size in zip(value.dims[1:], value.shape[1:], strict=True)
        )
    return tuple(np.arange(size) for size in tensor.shape[1:])


def _labels(index: pd.Index) -> np.ndarray:
    if isinstance(index, pd.MultiIndex) or index.dtype.kind not in "iufM":
        return np.asarray([str(label) for label in index], dtype=np.str_)
    return index.to_numpy()
