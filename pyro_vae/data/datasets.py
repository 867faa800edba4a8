"""Named data sets, and files of numbers."""

import csv
import errno
import functools
import gzip
import itertools
import lzma
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.error import URLError

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .cells import CellError
from .checks import checked, checked_path, closest, part_size, perhaps
from .files import plain_file
from .frames import labels_of, numeric
from .rows import as_tensor
from .tables import Layout, read_table

__all__ = ["Dataset", "binarize", "load"]

Table: TypeAlias = Tensor | pd.DataFrame
Labels: TypeAlias = Tensor | np.ndarray
_Read: TypeAlias = tuple[Table, Labels | None, str]

_NAMED = ("digits", "wine", "mnist", "fashion-mnist")
_IDX = re.compile(r"[.-]idx\d-(ubyte|byte|short|int|float|double)$|\.idx$")
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_PIECE = 2**20  # bytes that are read at a time
_BROKEN = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pd.errors.ParserWarning,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: rows, and a class label for each row if there is one.

    Arguments:
        name: The name of the data set.
        x: The rows, shape (rows, *event): a tensor in the dtype of its source; or a pandas frame,
            if rows or columns have names, which become the coordinates of every result.
        y: The class label of each row, shape (rows,): a tensor, or an array of strings.
        note: The layout of the text table that it was read from.

    Example:
        >>> data = load("digits")
        >>> data
        Dataset('digits', x=(1797, 64) uint8, y=(1797,) int64)
        >>> train, test = data.split(test=0.2, seed=0)
        >>> len(train), len(test)
        (1438, 359)
    """

    name: str
    x: Table
    y: Labels | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.y is not None and len(self.y) != len(self.x):
            raise ValueError(
                f"Expected a label for each of the {len(self.x)} rows of {self.name}; "
                f"got {len(self.y)} labels."
            )

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        x, y = _described(self.x), None if self.y is None else _described(self.y)
        note = f", note={self.note!r}" if self.note else ""
        return f"Dataset({self.name!r}, x={x}, y={y}{note})"

    @checked
    def split(self, test: float = 0.2, *, seed: int | None = 0) -> tuple["Dataset", "Dataset"]:
        """Splits the rows at random into a training set and a test set.

        Both sets keep the order of the rows.

        Arguments:
            test: The share of the rows in the test set, or their number.
            seed: The seed of the split. With `None` the last rows are the test set, as in the
                published split of MNIST, `load("mnist").split(test=10_000, seed=None)`.

        Raises:
            ValueError: If the share or the number is out of range, or there is only one row.
        """
        rows = len(self)
        size = part_size("test", test, rows)
        order = np.arange(rows) if seed is None else np.random.default_rng(seed).permutation(rows)
        return self._rows(np.sort(order[:-size])), self._rows(np.sort(order[-size:]))

    def _rows(self, index: np.ndarray) -> "Dataset":
        x = self.x.iloc[index] if isinstance(self.x, pd.DataFrame) else self.x[index]
        return replace(self, x=x, y=None if self.y is None else self.y[index])


@checked
def load(
    name: str | PathLike[str],
    *,
    key: str | None = None,
    label: str | None = None,
    separator: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    index: str | None = None,
    columns: str | Sequence[str] | None = None,
    drop: str | Sequence[str] | None = None,
) -> Dataset:
    """Loads a named data set or a file of numbers.

    The names are `digits` and `wine`, which scikit-learn ships, and `mnist` and `fashion-mnist`,
    which it downloads from OpenML at their first use and caches.

    The files are

    - `.npz` and `.npy`, never with pickled objects in them;
    - `.csv`, `.tsv`, `.txt` and `.parquet`, numeric tables that keep the names of their columns
      and, if the file has them, of their rows;
    - idx, the format of MNIST, `train-images-idx3-ubyte`, with its labels if
      `train-labels-idx1-ubyte` is in the same folder.

    Text tables and idx may be compressed (`.gz`). Missing values are left as NaN. The layout of a
    text table is found, and shown by the data set: `Dataset.note`. The row names are a first
    column without a name, or one that alone holds words, all of them different.

    Arguments:
        name: The name, or the path of the file.
        key: The array of an `.npz` that holds the rows; by default `x`, or `images`, or the only
            array, or the only one with two dims or more.
        label: The array of an `.npz`, or the column of a table, that holds the labels; by default
            `y` or `labels` of an `.npz`, and no column.
        separator: The separator of a text table: `","`, `";"`, a tab, ...; `" "` for any number
            of spaces. `None` finds it, and so with the three arguments below.
        decimal: The decimal mark of a text table, `"."` or `","`.
        header: Whether the first line of a text table names its columns.
        index: The column of a text table that names its rows; `""` if there is none.
        columns: The columns of a table to keep, in their order: a list of names, or a text in
            which commas separate them. `None` keeps all.
        drop: The columns of a table to leave out, in the same form.

    Raises:
        ValueError: If no data set has this name, if the content of the file does not match its
            ending, or if it is not numbers in at least one row.
        OSError: If the file or the network cannot be read.

    Example:
        >>> load("wine").x.columns[:2].tolist()
        ['alcohol', 'malic_acid']
    """
    layout = Layout(separator, decimal, header, index)
    if isinstance(name, str) and name in _NAMED:
        _refuse("a file", key=key, label=label, **vars(layout))
        x, y, note = _named(name)
        if columns is not None or drop is not None:
            x = _chosen(pd.DataFrame(x), columns, drop, name)
        return Dataset(name, x, y, note)
    path = Path(checked_path("name", name)).expanduser()
    file = path.name.lower()
    readers = [reader for ending, reader in _FILES.items() if file.endswith(ending)]
    if _IDX.search(file.removesuffix(".gz")):
        readers.append(_idx)
    if not readers:
        near = [*closest(str(path), _NAMED), *closest(path.suffix, _FILES)]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(
            f"Expected one of {', '.join(_NAMED)}, or a file ending in {', '.join(_FILES)} or "
            f"-idx3-ubyte; got {str(path)!r}{hint}."
        )
    if readers[0] is not _csv:
        _refuse("a text table", **vars(layout))
    if decimal not in (None, ".", ","):
        raise ValueError(f"Expected decimal to be '.' or ','; got {decimal!r}.")
    return Dataset(
        path.name, *readers[0](plain_file(path), _Options(key, label, layout, columns, drop))
    )


def binarize(x: Tensor) -> Tensor:
    r"""Draws binary pixels with the grey levels as probabilities.

    .. math:: b_i \sim \mathrm{Bernoulli}(x_i)

    As the `transform` of a fit it draws new pixels for every minibatch (dynamic binarisation),
    from torch's generator of the device of x. On a GPU, levels outside [0, 1] become NaN instead
    of an error, so that no step waits for the device; the fit then reports the rows.

    References:
        On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008).
        https://doi.org/10.1145/1390156.1390266

    Arguments:
        x: Grey levels of any shape: uint8 from 0 to 255, or floats from 0 to 1.

    Raises:
        ValueError: If x has another dtype or, on the CPU, levels outside [0, 1].

    Example:
        >>> binarize(torch.tensor([[0, 255, 0, 255]], dtype=torch.uint8))
        tensor([[0., 1., 0., 1.]])
    """
    if x.dtype == torch.uint8:
        return (torch.rand(x.shape, device=x.device) < x / 255).to(torch.get_default_dtype())
    if not x.is_floating_point():
        raise ValueError(f"Expected grey levels as uint8 or floats in [0, 1]; got {x.dtype}.")
    if x.device.type == "cpu" and (bad := ~((x >= 0) & (x <= 1))).any():
        raise CellError("Expected grey levels in [0, 1]", *torch.atleast_1d(x, bad))
    draws = (torch.rand(x.shape, device=x.device) < x).to(x.dtype)
    return draws if x.device.type == "cpu" else draws.where((x >= 0) & (x <= 1), torch.nan)


def _described(values: Table | Labels) -> str:
    if isinstance(values, pd.DataFrame):
        return f"{values.shape} table"
    return f"{tuple(values.shape)} {values.dtype}".replace("torch.", "")


class _Options(NamedTuple):
    key: str | None
    label: str | None
    layout: Layout
    columns: str | Sequence[str] | None
    drop: str | Sequence[str] | None

    def refuse_columns(self) -> None:
        _refuse("a table", columns=self.columns, drop=self.drop)


def _refuse(what: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"Expected {name}= only with {what}; got {value!r}.")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns any error of parsing a file into a ValueError, but not an error of the system."""
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Expected {what} in {path}; got: {lines[0].rstrip('.')}.") from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _numbers(array: np.ndarray, where: str) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers in {where}; got dtype {array.dtype}.")
    return as_tensor(array)


def _rows_of(array: np.ndarray, where: str) -> Tensor:
    if array.ndim < 2 or array.size == 0:
        raise ValueError(
            f"Expected an array of shape (rows, *event), no dim of it empty, in {where}; "
            f"got shape {array.shape}."
        )
    return _numbers(array, where)


def _labels_of(array: np.ndarray, where: str) -> Labels:
    if array.ndim != 1:
        raise ValueError(f"Expected labels of shape (rows,) in {where}; got shape {array.shape}.")
    return array.astype(np.str_) if array.dtype.kind in "USO" else _numbers(array, where)


def _npy(path: Path, options: _Options) -> _Read:
    options.refuse_columns()
    _refuse("an .npz or a table", key=options.key, label=options.label)
    with path.open("rb"), _reading(path, "a NumPy array without pickled objects"):
        # mapped, so that a header that promises more than the file holds allocates nothing
        array = np.array(np.lib.format.open_memmap(path, mode="r"))
    return _rows_of(array, str(path)), None, ""


def _npz(path: Path, options: _Options) -> _Read:
    options.refuse_columns()
    what = "an archive of NumPy arrays without pickled objects"
    with path.open("rb") as file:
        with _reading(path, what):
            archive = np.lib.npyio.NpzFile(file, allow_pickle=False)
        names = archive.files
        for member in (options.key, options.label):
            if member is not None and member not in names:
                raise ValueError(f"Expected one of {names} of {path}; got {member!r}.")
        left = [name for name in names if name != options.key]
        y = options.label or next((name for name in ("y", "labels") if name in left), None)
        others = [name for name in names if name != y]
        x = options.key or next((name for name in ("x", "images") if name in others), None)
        if x is None and len(others) != 1:
            with _reading(path, "an archive of NumPy arrays"):
                others = [
                    name for name in others if len(_promised(archive, name)[0]) > 1
                ] or others
        if x is None and len(others) != 1:
            raise ValueError(f"Expected key= to name one of {others} of {path}; got None.")
        x = x or others[0]
        with _reading(path, what):
            arrays = {}
            for name in (x, y) if y is not None else (x,):
                _, size, held = _promised(archive, name)
                if size > held:
                    raise ValueError(f"fewer than the {size} bytes that its header promises")
                arrays[name] = np.asarray(archive[name])
    labels = None if y is None else _labels_of(arrays[y], f"{y} of {path}")
    return _rows_of(arrays[x], f"{x} of {path}"), labels, ""


def _promised(archive: np.lib.npyio.NpzFile, name: str) -> tuple[tuple[int, ...], int, int]:
    """Reads from its header the shape and the bytes of an array, and the bytes that are there."""
    if archive.zip is None or f"{name}.npy" not in archive.zip.namelist():
        return (), 0, 0
    with archive.zip.open(f"{name}.npy") as file:
        is_first = np.lib.format.read_magic(file) == (1, 0)
        read = (
            np.lib.format.read_array_header_1_0
            if is_first
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    size = math.prod(shape) * dtype.itemsize
    return shape, size, archive.zip.getinfo(f"{name}.npy").file_size


def _csv(path: Path, options: _Options) -> _Read:
    _refuse("an .npz", key=options.key)
    with _open(path) as file, _reading(path, "a table"):
        frame, layout = read_table(file, options.layout, options.label)
    return *_of_frame(frame, path, options), str(layout)


def _parquet(path: Path, options: _Options) -> _Read:
    _refuse("an .npz", key=options.key)
    with path.open("rb") as file, _reading(path, "a Parquet table"):
        frame = pd.read_parquet(file, engine="pyarrow")
    return *_of_frame(frame, path, options), ""


def _chosen(
    frame: pd.DataFrame,
    columns: str | Sequence[str] | None,
    drop: str | Sequence[str] | None,
    where: object,
) -> pd.DataFrame:
    """The columns of a table that were asked for, without those to drop."""
    known = {str(name): name for name in frame.columns}
    asked = {}
    for option, given in {"columns": columns, "drop": drop}.items():
        if not isinstance(given, Iterable | None):
            raise ValueError(f"Expected {option} to be names of columns; got {given!r}.")
        names = given.split(",") if isinstance(given, str) else given or ()
        names = [name.strip() if isinstance(name, str) else name for name in names]
        if unknown := [name for name in names if name not in known]:
            near = perhaps(str(unknown[0]), known)
            raise ValueError(
                f"Expected {option} to name columns of {where}{near}; got {unknown[0]!r}."
            )
        asked[option] = names
    wanted = known if columns is None else asked["columns"]
    kept = [name for name in wanted if name not in asked["drop"]]
    if not kept or len({*kept}) < len(kept):
        raise ValueError(f"Expected columns to keep of {where}, each once; got {kept}.")
    return frame[[known[name] for name in kept]]


def _of_frame(
    frame: pd.DataFrame, path: Path, options: _Options
) -> tuple[pd.DataFrame, Labels | None]:
    label, columns = options.label, {str(name): name for name in frame.columns}
    if len(columns) != len(frame.columns):
        raise ValueError(f"Expected columns of different names in {path}; got {[*columns]}.")
    if label is not None and label not in columns:
        raise ValueError(f"Expected one of {[*columns]} of {path}; got {label!r}.")
    labels = None
    if label is not None:
        column = frame.pop(columns[label])
        labels = _labels_of(column.to_numpy(copy=True), f"column {label!r} of {path}")
    frame = _chosen(frame, options.columns, options.drop, path)
    if frame.empty:
        raise ValueError(f"Expected rows and columns in {path}; got a table of {frame.shape}.")
    rows = labels_of(frame.index)
    numbers = {
        name: numeric(column, f"column {str(name)!r} of {path}", rows)
        for name, column in frame.items()
    }
    return pd.DataFrame(numbers, frame.index, frame.columns), labels


def _idx(path: Path, options: _Options) -> _Read:
    options.refuse_columns()
    _refuse("an .npz or a table", key=options.key, label=options.label)
    beside = path.with_name(re.sub(r"images([.-])idx3", r"labels\1idx1", path.name))
    has_labels = beside != path and beside.is_file()
    labels = _labels_of(_idx_array(beside), str(beside)) if has_labels else None
    return _rows_of(_idx_array(path), str(path)), labels, ""


def _idx_array(path: Path) -> np.ndarray:
    with _open(path) as file, _reading(path, "an idx array"):
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or not magic[3]:
            raise ValueError(f"the magic number 0x{magic.hex()}")
        shape = [int(size) for size in np.frombuffer(file.read(4 * magic[3]), ">u4")]
        dtype = np.dtype(_IDX_DTYPES[magic[2]])
        size, start = dtype.itemsize * math.prod(shape), 4 + 4 * magic[3]
        pieces = iter(functools.partial(file.read, _PIECE), b"")
        raw = b"".join(itertools.islice(pieces, size // _PIECE + 1))  # not all of a bomb
        if len(shape) < magic[3] or len(raw) != size:
            raise ValueError(f"{start + len(raw)} bytes where its header promises {start + size}")
        return np.frombuffer(raw, dtype).reshape(shape)


def _named(name: str) -> _Read:
    from sklearn import datasets

    if name == "digits":
        x, y = datasets.load_digits(return_X_y=True)
        return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y), ""
    if name == "wine":
        wine = datasets.load_wine(as_frame=True)
        return wine.data, torch.from_numpy(wine.target.to_numpy(copy=True)), ""
    title = "mnist_784" if name == "mnist" else "Fashion-MNIST"
    try:
        x, y = datasets.fetch_openml(
            title, version=1, return_X_y=True, as_frame=False, parser="pandas"
        )
    except URLError as error:
        raise ConnectionError(
            f"Expected {title} in scikit-learn's cache or OpenML within reach; got {error}."
        ) from error
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y.astype(np.uint8)), ""


_FILES: dict[str, Callable[[Path, _Options], _Read]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".tsv": _csv,
    ".tsv.gz": _csv,
    ".txt": _csv,
    ".parquet": _parquet,
}
