"""The layout of a text table: separator, decimal mark, header and row names, found or given."""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from gzip import GzipFile
from io import BufferedReader
from itertools import pairwise

import pandas as pd

__all__ = ["Layout", "has_header", "read_table", "separator_of"]

SEPARATORS = ("\t", ";", "|", ",")
SPACES = r"\s+"
NAMELESS = "Unnamed: 0"  # what pandas calls a first column without a name
HEAD = 2**16  # bytes, in which the separator and the header are looked for
NUMBER_LIKE = r"[-+.,\d' ]*[.,\d][\d.,' ]*%?|<NA>"
BLANK = {"", "na", "n/a", "nan", "null", "none"}


@dataclass(frozen=True)
class Layout:
    """How a text table is written; `None` for what is to be found.

    Arguments:
        separator: The text between columns; spaces stand for any number of spaces.
        decimal: The decimal mark, `"."` or `","`.
        header: Whether the first line names the columns.
        index: The column that names the rows; `""` if there is none.

    Example:
        >>> print(Layout(";", ",", True, ""))
        separator ';', decimal mark ',', column names in the first line, no row names
    """

    separator: str | None = None
    decimal: str | None = None
    header: bool | None = None
    index: str | None = None

    def __str__(self) -> str:
        columns = "column names in the first line" if self.header else "no column names"
        column = "the first column" if self.index == NAMELESS else f"column {self.index!r}"
        rows = f"row names in {column}" if self.index else "no row names"
        separator = "spaces" if self.separator == SPACES else repr(self.separator)
        return f"separator {separator}, decimal mark {self.decimal!r}, {columns}, {rows}"


def separator_of(lines: Sequence[str]) -> str:
    r"""Finds the separator: the one that cuts all lines into as many cells, two or more.

    Arguments:
        lines: The first lines of the table.

    Example:
        >>> separator_of(["a;b", "1,5;2,5"]), separator_of(["a b", "1  2"])
        (';', '\\s+')
    """
    for separator in SEPARATORS:
        if len(counts := set(map(len, _cells(lines, separator)))) == 1 and counts != {1}:
            return separator
    if len(counts := {len(line.split()) for line in lines}) == 1 and counts != {1}:
        return SPACES
    return next((separator for separator in SEPARATORS if separator in "".join(lines[:1])), ",")


def has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Finds whether the first row names the columns.

    Arguments:
        rows: The cells of the first lines.

    Raises:
        ValueError: If it could be either.

    Example:
        >>> has_header([["age", "dose"], ["31", "2.5"]]), has_header([["31", "2.5"]])
        (True, False)
    """
    first = {i: cell for i, cell in enumerate(rows[0]) if cell.strip().lower() not in BLANK}
    words = [i for i, cell in first.items() if not _is_number(cell)]
    if words:
        for i in words:
            below = [row[i] for row in rows[1:] if i < len(row) and row[i].strip()]
            if len(words) == len(first) or (below and all(map(_is_number, below))):
                return True
    elif not all(cell.strip().isdecimal() for cell in first.values()):
        return False
    else:
        numbers = [int(cell) for cell in first.values()]
        if numbers == [*range(len(numbers))]:
            return True
        steps = {b - a for a, b in pairwise(numbers)}
        is_range = len(steps) == 1 and (len(numbers) > 2 or steps == {1})
        if 0 in first and not (is_range and steps != {0}):
            return False
    raise ValueError(
        f"a first line that may be names or values, {', '.join(list(rows[0])[:3])} (pass "
        "header=True or header=False)"
    )


def read_table(
    file: GzipFile | BufferedReader, layout: Layout, label: str | None = None
) -> tuple[pd.DataFrame, Layout]:
    """Reads a text table, and finds what its layout leaves open.

    Arguments:
        file: The file.
        layout: What is known of the layout.
        label: The column of the labels, which may hold words.

    Raises:
        ValueError: If the table cannot be read, has two columns of one name, or has no column
            that the layout names.

    Returns:
        The table and its layout. The columns are strings, nullable numbers or booleans.
    """
    text = file.read(HEAD)
    is_whole = len(text) < HEAD
    file.seek(0)
    lines = text.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").split("\n")
    lines = [line for line in (lines if is_whole else lines[:-1]) if line.strip()]
    separator = layout.separator or separator_of(lines)
    separator = SPACES if separator.isspace() and separator != "\t" else separator
    cells = _cells(lines, separator)
    for i, row in enumerate(cells if is_whole else cells[:-1]):
        if len(row) != len(cells[0]) and separator != SPACES:
            raise ValueError(
                f"{len(row)} cells in line {i + 1} and {len(cells[0])} in the first, with the "
                f"separator {separator!r}"
            )
    header = layout.header
    if header is None:
        header = not cells or has_header(cells)
    if header and cells:
        twice = sorted({cell for cell in cells[0] if cell and cells[0].count(cell) > 1})
        if twice:
            raise ValueError(f"two columns named {twice[0]!r}")
    marks = (layout.decimal,) if layout.decimal else (".", ",") if separator != "," else (".",)
    frames = {}
    for mark in marks:
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frames[mark] = pd.read_csv(
                file,
                sep=separator,
                decimal=mark,
                header=0 if header else None,
                index_col=False,
                skipinitialspace=True,
                low_memory=False,
                dtype_backend="numpy_nullable",
            )
        if len(_numeric(frames[mark])) == frames[mark].shape[1]:
            break
    decimal = max(frames, key=lambda mark: len(_numeric(frames[mark])))
    frame = frames[decimal].rename(columns=str)
    index = _index_of(frame, label) if layout.index is None else layout.index
    if index and index not in frame.columns:
        raise ValueError(f"no column {index!r}, but {', '.join(frame.columns[:5])}")
    if index:
        frame = frame.set_index(index).rename_axis(None)
    return frame, Layout(separator, decimal, header, index)


def _cells(lines: Sequence[str], separator: str) -> list[list[str]]:
    if separator == SPACES:
        return [line.split() for line in lines]
    return [*csv.reader(lines, delimiter=separator, skipinitialspace=True)]


def _is_number(text: str) -> bool:
    try:
        float(text.strip().replace(",", "."))
    except ValueError:
        return False
    return True


def _numeric(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame if pd.api.types.is_numeric_dtype(frame[name])]


def _index_of(frame: pd.DataFrame, label: str | None) -> str:
    """The first column, if it has no name, or alone holds words that are all different."""
    first = str(frame.columns[0])
    if first == NAMELESS:
        return first
    others = {str(name) for name in frame.columns[1:]} - {label}
    if first == label or not others or not others <= {*_numeric(frame)} - {first}:
        return ""
    texts = frame[first].astype(str)
    return first if texts.is_unique and not texts.str.fullmatch(NUMBER_LIKE).any() else ""
