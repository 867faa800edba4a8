"""The types of data: a row, and a source of rows."""

from collections.abc import Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

__all__ = ["Row", "Source"]

Row: TypeAlias = Tensor | dict[str, Tensor]
"""What `model(row)` and `guide(row)` get: a minibatch of rows.

It is a tensor of shape (rows, *event), or a dict of tensors that share their first dim: `x` with,
optionally, `context` of shape (rows, *context) and `weight` of shape (rows,), or any fields that
a user's own program reads.
"""


@runtime_checkable
class Source(Protocol):
    """Rows of data, wherever they are stored.

    :class:`pyro_vae.data.rows.Rows` is the source in memory. Write a class with these members to
    read rows from elsewhere.
    """

    @property
    def num_rows(self) -> int | None:
        """The number of rows; `None` if it is unknown."""

    @property
    def labels(self) -> np.ndarray:
        """The labels of the rows, shape (rows,), under which results are returned."""

    def coords(self, site: str = "x") -> dict[str, np.ndarray]:
        """Returns the labels along each event dim of a field, by the name of the dim.

        Arguments:
            site: The name of the field; `"x"` for a bare tensor.
        """

    def head(self, n: int) -> Row:
        """Returns the first rows.

        Arguments:
            n: The number of rows.
        """

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Row]:
        """Yields every row once, in minibatches.

        Arguments:
            size: The number of rows of a minibatch; the last one may have fewer.
            seed: The seed of a random order; `None` for the order in which the rows are stored.
        """

    def chunks(self, size: int) -> Iterator["Source"]:
        """Cuts the rows into consecutive pieces, for evaluation.

        Arguments:
            size: The largest number of rows of a piece.
        """

    def digest(self) -> str:
        """Returns a SHA-256 of the values, which differs between different data."""
