"""Numbers and labels of pandas tables; columns without numbers are refused by name."""

from decimal import Decimal
from numbers import Integral, Real

import numpy as np
import pandas as pd

from .cells import shown

__all__ = ["EXACT", "labels_of", "numbers_of", "numeric"]

EXACT = 2**53  # the largest integer up to which float64 holds all integers
PLAIN = [np.dtype(name) for name in ("bool", *np.typecodes["AllInteger"], *"efdg")]
_ADVICE = {
    "M": "Turn dates into numbers, such as days since a date.",
    "m": "Turn durations into numbers: column / pd.Timedelta(days=1).",
    "c": "Pass the real and the imaginary part as two columns.",
    "O": "Leave the column out (drop=, --drop), or code it as numbers (pd.get_dummies).",
}


def labels_of(index: pd.Index) -> np.ndarray:
    """Returns the labels of an index in a form that every file format can hold.

    Numbers and dates without a time zone are kept, and all other labels become text.

    Arguments:
        index: The index.

    Example:
        >>> labels_of(pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])).tolist()
        ["('a', 1)", "('b', 2)"]
    """
    values = index.to_numpy()
    if values.dtype.kind in "iufM":
        return values
    texts = [str(label).encode("utf-8", "backslashreplace").decode() for label in index]
    return np.asarray([text.replace("\0", "\\0") for text in texts], dtype=np.str_)


def numeric(column: pd.Series, where: str, labels: np.ndarray) -> np.ndarray:
    """Returns a column as an array of numbers, in which missing values are NaN.

    Arguments:
        column: The column, of any dtype.
        where: The name of the column, for messages.
        labels: The labels of the rows, for messages.

    Raises:
        ValueError: If a value is not a real number, or is an integer that changes in float64.

    Example:
        >>> numeric(pd.Series([1, None, 3], dtype="Int64"), "column 'a'", np.arange(3)).tolist()
        [1.0, nan, 3.0]
    """
    has_gaps = pd.api.types.is_integer_dtype(column.dtype) and column.hasnans
    raw = column.to_numpy(dtype=object) if has_gaps else column.to_numpy()
    if raw.dtype.kind in "fiub":
        return raw
    is_missing = pd.isna(raw)
    kinds = (Real, Decimal, np.bool_)
    kind = raw.dtype.kind if raw.dtype.kind in _ADVICE else "O"
    is_number = [kind == "O" and isinstance(value, kinds) for value in raw]
    bad = ~(np.array(is_number, dtype=bool) | is_missing)
    if bad.any():
        numbers = pd.to_numeric(pd.Series([str(value) for value in raw]), errors="coerce")
        words = bad & numbers.isna().to_numpy()
        bad = words if words.any() else bad
        first, rows = int(bad.argmax()), f"{int(bad.sum())} of {len(bad)} rows"
        value = raw[first]
        if kind == "O":
            found = pd.Series([value]).dtype.kind
            kind = found if found in _ADVICE else kind
        raise ValueError(
            f"Expected numbers in {where}; got {str(value) if kind in 'Mm' else repr(value)} in "
            f"row {shown(labels, first)} ({rows}). {_ADVICE[kind]}"
        )
    values = np.asarray(raw[~is_missing].tolist())
    try:
        values = values if values.dtype.kind in "fiub" else values.astype(np.float64)
    except OverflowError as error:
        raise ValueError(f"Expected numbers below 1.8e308 in {where}; got larger ones.") from error
    if is_missing.any():
        present, values = values, np.full(len(raw), np.nan)
        values[~is_missing] = present
    for i, value in enumerate(raw):
        if isinstance(value, Integral) and int(values[i]) != value:
            raise _inexact(where, value, labels, i)
    return values


def numbers_of(frame: pd.DataFrame, where: str = "") -> np.ndarray:
    """Returns a table as an array of numbers (rows, columns), in which missing values are NaN.

    Arguments:
        frame: The table.
        where: Where the table is, for messages, such as `" of t.csv"`.

    Raises:
        ValueError: If a value is not a real number, or is an integer that changes in float64. The
            message names the column and the row.

    Example:
        >>> numbers_of(pd.DataFrame({"a": [1, 2], "b": [0.5, None]})).tolist()
        [[1.0, 0.5], [2.0, nan]]
    """
    if len(set(frame.dtypes)) == 1 and frame.dtypes.iloc[0] in PLAIN:
        return frame.to_numpy()
    labels, names = labels_of(frame.index), labels_of(frame.columns)
    called = [f"column {shown(names, i)}{where}" for i in range(len(names))]
    columns = [
        numeric(column, name, labels)
        for name, (_, column) in zip(called, frame.items(), strict=True)
    ]
    dtype = np.result_type(*columns) if columns else np.dtype(np.float64)
    for name, column in zip(called, columns, strict=True):
        if dtype.kind == "f" and column.dtype.kind in "iu" and column.dtype.itemsize == 8:
            large = (column > EXACT) | (column < -EXACT)
            if large.any():
                first = int(large.argmax())
                raise _inexact(name, column[first], labels, first)
    return np.stack(columns, 1, dtype=dtype) if columns else np.empty(frame.shape)


def _inexact(where: str, value: object, labels: np.ndarray, row: int) -> ValueError:
    return ValueError(
        f"Expected integers up to 2**53 in {where}, since float64 does not hold all above; got "
        f"{value} in row {shown(labels, row)}. Subtract an offset, or leave the column out."
    )
