"""The error about cells of the data, which names the column and the row by their labels."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from torch import Tensor

__all__ = ["CellError", "few", "place_name", "shown"]


def shown(labels: np.ndarray, index: int) -> str:
    """Returns a label as messages show it: text in quotes, numbers and dates as they are.

    Arguments:
        labels: The labels, shape (n,).
        index: The position of the label.

    Example:
        >>> shown(np.array(["p1", "p2"]), 1), shown(np.arange(3), 2)
        ("'p2'", '2')
    """
    return repr(str(labels[index])) if labels.dtype.kind == "U" else str(labels[index])


def few(names: Sequence[str]) -> str:
    """Returns at most five names in quotes; `"none"` if there are no names.

    Arguments:
        names: The names.

    Example:
        >>> few(["age", "dose"]), few([])
        ("'age', 'dose'", 'none')
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more or "none"


def place_name(place: Sequence[int], shape: Sequence[int], columns: Sequence[np.ndarray]) -> str:
    """Returns the name of an element of a row: the labels of its column, else the numbers.

    Arguments:
        place: The position along each event dim.
        shape: The event shape.
        columns: The labels along each event dim; they are ignored if they have another shape.

    Example:
        >>> place_name([1], [2], [np.array(["age", "dose"])]), place_name([0, 4], [2, 9], [])
        ("column 'dose'", 'column [0, 4]')
    """
    names = [str(i) for i in place]
    if tuple(map(len, columns)) == tuple(shape) and len(place) == len(columns):
        names = [shown(labels, i) for labels, i in zip(columns, place, strict=True)]
    return f"column {names[0]}" if len(names) == 1 else f"column [{', '.join(names)}]"


class CellError(ValueError):
    """Creates the error about cells that are refused: it names the first, and counts the rows.

    Arguments:
        wanted: What was expected, the start of the message.
        x: The rows (rows, *event).
        bad: Which cells are refused, of the shape of x, or of its first dims.
        advice: A sentence at the end of the message.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
        >>> error = CellError("Expected no NaN", x, x.isnan())
        >>> print(error.named(np.array(["p1", "p2"]), [np.array(["age", "dose"])]))
        Expected no NaN; got NaN in row 'p2', column 'dose' (1 of 2 rows).
    """

    def __init__(self, wanted: str, x: Tensor, bad: Tensor, advice: str = "") -> None:
        row, *self.place = bad.nonzero()[0].tolist()
        value = x[(row, *self.place)]
        if value.ndim:
            first = value.flatten()[:8].tolist()
            self.value = f"{first} ({value.numel()} values with sum {value.sum().item():g})"
        else:
            self.value = str(value.item()).replace("nan", "NaN")
        self.wanted, self.advice, self.shape = wanted, advice, tuple(x.shape[1:])
        self.row = int(row)
        self.count, self.total = int(bad.reshape(len(bad), -1).any(-1).sum()), len(bad)
        self.named(np.arange(self.total), ())

    def named(self, labels: np.ndarray, columns: Sequence[np.ndarray]) -> Self:
        """Writes the message with the labels of rows and columns, and returns the error.

        Arguments:
            labels: The labels of all rows, shape (rows,).
            columns: The labels along each event dim.
        """
        where = f"row {shown(labels, self.row)}"
        if self.place:
            where += f", {place_name(self.place, self.shape, columns)}"
        rows = f"{self.count} of {self.total} rows"
        self.args = (f"{self.wanted}; got {self.value} in {where} ({rows}).{self.advice}",)
        return self
