"""What arguments must be: each kind is asked for in one place, and refused in the same words."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = [
    "checked_count",
    "checked_finite",
    "checked_number_of",
    "checked_positive",
    "checked_shape",
    "closest",
    "is_size",
    "perhaps",
    "short",
    "size_of",
]


def is_size(value: Any) -> bool:
    """Whether a value is a positive integer.

    Arguments:
        value: Any value.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def checked_count(name: str, value: Any, *, least: int = 1) -> int:
    """Returns an integer argument if it is large enough, and fits into 64 bits.

    Arguments:
        name: What the argument is called.
        value: Its value.
        least: The smallest allowed.

    Raises:
        ValueError: Where it is no integer, too small or too large.

    Example:
        >>> checked_count("patience", 3)
        3
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"Expected {name} to be an integer of at least {least}; got {value!r}.")
    if int(value) >= 2**63:
        raise ValueError(f"Expected {name} to be an integer below 2**63; got {value!r}.")
    return int(value)


def checked_positive(name: str, value: Any) -> float:
    """Returns an argument that is a positive finite number.

    Arguments:
        name: What the argument is called.
        value: Its value.

    Raises:
        ValueError: Where it is no number, not finite, or 0 or less.

    Example:
        >>> checked_positive("lr", 1)
        1.0
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"Expected {name} to be a positive number; got {value!r}.")
    return float(value)


def checked_number_of(what: str, value: Any) -> int:
    """Returns how many there shall be of something.

    Arguments:
        what: Of what, in the plural.
        value: How many.

    Raises:
        ValueError: Where it is not a positive integer.

    Example:
        >>> checked_number_of("components", 10)
        10
    """
    if not is_size(value):
        raise ValueError(f"Expected a positive number of {what}; got {value!r}.")
    return int(value)


def checked_shape(event_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns an event shape as a tuple.

    Arguments:
        event_shape: An int or a tuple of ints.

    Raises:
        ValueError: Where it is empty, or a size is not a positive integer.

    Example:
        >>> checked_shape(8)
        (8,)
    """
    shape = tuple(event_shape) if isinstance(event_shape, tuple | list) else (event_shape,)
    if not shape or not all(map(is_size, shape)):
        raise ValueError(f"Expected an event shape of positive sizes; got {event_shape!r}.")
    return shape


def size_of(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """Returns a shape as a user writes it: one size as an int.

    Arguments:
        shape: The shape.

    Example:
        >>> size_of((8,)), size_of((2, 3))
        (8, (2, 3))
    """
    return shape[0] if len(shape) == 1 else tuple(shape)


def closest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Returns the names that a wrong one is near to, the nearest first; capitals do not count.

    Arguments:
        name: The wrong name.
        names: The right ones.
        n: How many at most.

    Example:
        >>> closest("binomail", ["Binomial", "Normal", "Gamma"])
        ['Binomial', 'Normal']
    """
    by_lower = {right.lower(): right for right in names}
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=n)]


def perhaps(name: str, names: Iterable[str]) -> str:
    """Says, at the end of a list of names, which one a wrong name is near to, if any.

    Arguments:
        name: The wrong name.
        names: The right ones.

    Example:
        >>> perhaps("scal", ["loc", "scale"])
        ", perhaps 'scale'"
    """
    near = closest(name, names, n=1)
    return f", perhaps {near[0]!r}" if near else ""


def short(value: Any) -> str:
    """Returns how a value is written: a tensor by its shape, a class by its name.

    Arguments:
        value: Any value.

    Example:
        >>> import torch
        >>> short(torch.zeros(2, 3)), short(0.5)
        ('tensor of shape (2, 3)', '0.5')
    """
    if isinstance(value, type):
        return value.__name__
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def checked_finite(name: str, value: Any, *, least: float = -math.inf) -> float:
    """Returns an argument that is a finite number, if it is large enough.

    Arguments:
        name: What the argument is called.
        value: Its value.
        least: The smallest allowed.

    Raises:
        ValueError: Where it is no number, not finite, or too small.

    Example:
        >>> checked_finite("beta", 4, least=0.0)
        4.0
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least:
        at_least = "" if math.isinf(least) else f" of at least {least:g}"
        raise ValueError(f"Expected {name} to be a finite number{at_least}; got {value!r}.")
    return float(value)
