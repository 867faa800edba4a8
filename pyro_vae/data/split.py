"""Splits rows into those to train on and those held out."""

import torch
from torch import nn

from .checks import is_number, part_size
from .read import read
from .rows import Rows

__all__ = ["split"]


def split(
    rows: Rows,
    held_out: object,
    program: nn.Module | None = None,
    *,
    seed: int,
    name: str = "held_out",
) -> tuple[Rows, Rows]:
    """Splits rows at random into those to train on and those held out, each in their order.

    Arguments:
        rows: The rows.
        held_out: The share of the rows to hold out, or their number; or other rows, which are
            held out beside all of `rows`.
        program: The program that the rows are for.
        seed: The seed of the split.
        name: The name of `held_out` in the signature of the caller, for messages.

    Raises:
        ValueError: If the share or the number is out of range, if there is only one row, or if
            the rows held out have other fields, event shapes or names of columns.

    Returns:
        The rows to train on, and the rows held out.

    Example:
        >>> train, test = split(read(torch.arange(5.0)), 0.4, seed=0)
        >>> train.labels.tolist(), test.labels.tolist()
        ([1, 2, 3], [0, 4])
    """
    if not is_number(held_out):
        other = read(held_out, program, check=False).ordered(rows.names())
        if other.event_shapes() != rows.event_shapes():
            raise ValueError(
                f"Expected {name} rows like those of x, event shapes {rows.event_shapes()}; got "
                f"{other.event_shapes()}."
            )
        return rows, other
    size = part_size(name, held_out, len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    order = order.to(rows.device)
    return rows[order[size:].sort().values], rows[order[:size].sort().values]
