"""The base of the networks of this package."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..data.checks import is_size

__all__ = ["Network", "checked_sizes"]


class Network(nn.Module, ABC):
    """A network that says how it was made, and may be given the shape of x.

    To add one, subclass it and write `forward` and `arguments`; make layers that depend on the
    size of their input from lazy ones. A VAE takes any other `nn.Module` as well.
    """

    @abstractmethod
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the constructor, positional and by name."""

    def set_event_shape(self, event_shape: tuple[int, ...]) -> None:
        """Receives the shape of one row of x before the first call; by default it is not needed.

        Arguments:
            event_shape: The shape.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        r"""Maps rows (rows, \*shape) to features (rows, ...)."""


def checked_sizes(what: str, sizes: tuple[int, ...], *, at_least: int = 0) -> tuple[int, ...]:
    """Returns numbers of units or channels if they are positive integers.

    Arguments:
        what: What is counted, in the plural.
        sizes: The numbers.
        at_least: How many there must be.

    Raises:
        ValueError: If there are too few, or one is not a positive integer.
    """
    if len(sizes) < at_least or not all(map(is_size, sizes)):
        raise ValueError(f"Expected positive numbers of {what}; got {sizes}.")
    return sizes
