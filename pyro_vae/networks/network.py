"""The base of the networks of this package."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..data.checks import checked_number_of, is_size

__all__ = ["Network", "checked_sizes"]


class Network(nn.Module, ABC):
    """The base class of the networks of this package, which a VAE can size and save.

    To add one to the package, subclass it and write `forward` and `arguments`. Use torch's lazy
    layers if their size depends on that of the input. A VAE accepts any other `nn.Module` as well.

    Example:
        >>> class Double(Network):
        ...     def arguments(self):
        ...         return (), {}
        ...
        ...     def forward(self, x):
        ...         return 2.0 * x
        >>> Double()(torch.ones(2)).tolist()
        [2.0, 2.0]
    """

    @abstractmethod
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the constructor, positional and by name."""

    def set_event_shape(self, event_shape: tuple[int, ...]) -> None:
        """Receives the shape of one row of x before the first call. By default it is ignored.

        Arguments:
            event_shape: The shape of one row of x.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        r"""Maps rows (rows, \*shape) to features (rows, ...)."""


def checked_sizes(what: str, sizes: tuple[int, ...], *, at_least: int = 0) -> tuple[int, ...]:
    """Returns numbers of units or channels if they are positive integers.

    Arguments:
        what: The noun for the message, in the plural.
        sizes: The numbers.
        at_least: The least number of sizes.

    Raises:
        ValueError: If there are too few, or one is not a positive integer.
    """
    if len(sizes) < at_least or not all(map(is_size, sizes)):
        raise ValueError(f"Expected positive numbers of {what}; got {sizes}.")
    return tuple([checked_number_of(what, size) for size in sizes])
