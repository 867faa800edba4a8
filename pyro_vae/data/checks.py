"""Argument validation with uniform error messages."""

import contextlib
import difflib
import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sized
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeGuard, TypeVar

import numpy as np
from torch import Tensor, nn

__all__ = [
    "checked",
    "checked_choice",
    "checked_count",
    "checked_draws",
    "checked_finite",
    "checked_flag",
    "checked_function",
    "checked_number_of",
    "checked_path",
    "checked_positive",
    "checked_seed",
    "checked_shape",
    "closest",
    "is_integer",
    "is_number",
    "is_size",
    "part_size",
    "perhaps",
    "short",
    "size_of",
    "warn_user",
]

P = ParamSpec("P")
T = TypeVar("T")

BYTES = 64  # that a draw of one number takes at least: its noise, value, weights and their copies
MEMORY = 2**40  # bytes that the machine has
if sys.platform != "win32":
    MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


LONGEST = 100  # characters of a value in a message
BENEATH = {"pyro_vae", "pyro", "torch", "contextlib"}


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's program that called this package.

    Arguments:
        message: What is said.
        category: The class of the warning.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in BENEATH:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of Python or NumPy, and not a boolean.

    Arguments:
        value: Any value.
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy, and not a boolean.

    Arguments:
        value: Any value.
    """
    return is_number(value) and isinstance(value, Integral)


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value is a positive `int`.

    Arguments:
        value: Any value.
    """
    return isinstance(value, int) and value is not True and value > 0


def checked_count(name: str, value: object, *, least: int = 1) -> int:
    """Checks an integer argument, which must fit into 64 bits, and returns it.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.
        least: The smallest value allowed.

    Raises:
        ValueError: If the value is not an integer, or is too small or too large.

    Example:
        >>> checked_count("patience", 3)
        3
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"Expected {name} to be an integer of at least {least}; got {value!r}.")
    if int(value) >= 2**63:
        raise ValueError(f"Expected {name} to be an integer below 2**63; got {value!r}.")
    return int(value)


def checked_seed(name: str, value: object) -> int | None:
    """Checks a seed, an integer from 0 to 2**63 - 1 or `None`, and returns it.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.

    Raises:
        ValueError: If the value is neither `None` nor such an integer.

    Example:
        >>> checked_seed("seed", np.int64(7))
        7
    """
    return None if value is None else checked_count(name, value, least=0)


def checked_path(name: str, value: object) -> str | os.PathLike[str]:
    """Checks an argument that must be a path, and returns it.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.

    Raises:
        ValueError: If the value is neither text nor a path.

    Example:
        >>> checked_path("path", "vae")
        'vae'
    """
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"Expected {name} to be a path; got {short(value)}.")
    return value


def checked_function(name: str, value: object) -> Callable[..., Any]:
    """Checks an argument that must be a function, and returns it.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.

    Raises:
        ValueError: If the value cannot be called.

    Example:
        >>> checked_function("transform", abs) is abs
        True
    """
    if not callable(value):
        raise ValueError(f"Expected {name} to be a function; got {short(value)}.")
    return value


def checked_flag(name: str, value: object) -> bool:
    """Checks an argument that must be `True` or `False`, and returns it.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.

    Raises:
        ValueError: If the value is not a boolean of Python or NumPy.

    Example:
        >>> checked_flag("progress", np.bool_(True))
        True
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"Expected {name} to be True or False; got {short(value)}.")
    return bool(value)


def checked_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Checks an argument that must be one of some words, and returns it.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.
        choices: The words.

    Raises:
        ValueError: If the value is none of the words.

    Example:
        >>> checked_choice("engine", "eager", ["auto", "eager"])
        'eager'
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        hint = perhaps(value, choices) if isinstance(value, str) else ""
        raise ValueError(
            f"Expected {name} to be one of {', '.join(choices)}{hint}; got {short(value)}."
        )
    return value


def checked_draws(name: str, value: object, *, least: int = 1) -> int:
    """Checks a number of draws or rows, and that they fit into the machine's memory.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.
        least: The smallest value allowed.

    Raises:
        ValueError: If the value is not an integer, is too small, or needs more memory than the
            machine has, at 64 bytes for each draw.

    Example:
        >>> checked_draws("num_samples", 1000)
        1000
    """
    count = checked_count(name, value, least=least)
    if BYTES * count > MEMORY:
        raise ValueError(
            f"Expected {name} to fit into memory; got {count}, which take about "
            f"{1e-9 * BYTES * count:.0f} GB of the {1e-9 * MEMORY:.0f} GB that there are."
        )
    return count


def checked(
    function: Callable[P, T],
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Callable[P, T]:
    """Decorator that checks plain arguments by what their names or annotations say.

    Arguments annotated `bool` must be `True` or `False`; `seed` must be a seed, `max_elements` a
    count, `path` and `checkpoint` a path, `transform` and `after_each` a function. An argument
    that is its default is not checked. Arguments that Python itself refuses raise its TypeError.

    Arguments:
        function: A public function.
        within: A function that makes the context in which it runs.

    Raises:
        ValueError: When the function is called, if such an argument is refused.

    Example:
        >>> @checked
        ... def draws(*, seed: int | None = None, progress: bool = True) -> None: ...
        >>> draws(seed=2.9)
        Traceback (most recent call last):
        ValueError: Expected seed to be an integer of at least 0; got 2.9.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    checks: dict[str, Callable[[str, object], object]] = {
        "seed": checked_seed,
        "max_elements": checked_count,
        "path": checked_path,
        "checkpoint": checked_path,
        "transform": checked_function,
        "after_each": checked_function,
    }
    checks |= {n: checked_flag for n, p in parameters.items() if p.annotation in (bool, "bool")}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs)
        for name in checks.keys() & given.arguments:
            if given.arguments[name] is not parameters[name].default:
                given.arguments[name] = checks[name](name, given.arguments[name])
        with within():
            return function(*given.args, **given.kwargs)

    return call


def checked_positive(name: str, value: object) -> float:
    """Checks an argument that must be a positive finite number, and returns it as a float.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.

    Raises:
        ValueError: If the value is not a number, not finite, or not positive.

    Example:
        >>> checked_positive("lr", 1)
        1.0
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"Expected {name} to be a positive number; got {value!r}.")
    return float(value)


def checked_number_of(what: str, value: object) -> int:
    """Checks a number of parts, which must be a positive integer, and returns it.

    Arguments:
        what: The name of the parts in the plural, for messages.
        value: The number.

    Raises:
        ValueError: If the number is not a positive integer.

    Example:
        >>> checked_number_of("components", 10)
        10
    """
    if not is_size(value):
        raise ValueError(f"Expected a positive number of {what}; got {value!r}.")
    return checked_draws(f"the number of {what}", value)


def checked_shape(event_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """Checks an event shape, and returns it as a tuple.

    Arguments:
        event_shape: An int or a tuple of ints.

    Raises:
        ValueError: If the shape is empty, or a size is not a positive integer.

    Example:
        >>> checked_shape(8)
        (8,)
    """
    shape = tuple(event_shape) if isinstance(event_shape, tuple | list) else (event_shape,)
    if not shape or not all(map(is_size, shape)):
        raise ValueError(f"Expected an event shape of positive sizes; got {short(event_shape)}.")
    checked_draws("the number of elements of the event shape", math.prod(shape))
    return shape


def size_of(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """Returns a shape as a user writes it: an int if there is one size, else a tuple.

    Arguments:
        shape: The shape.

    Example:
        >>> size_of((8,)), size_of((2, 3))
        (8, (2, 3))
    """
    return shape[0] if len(shape) == 1 else tuple(shape)


def part_size(name: str, part: object, rows: int) -> int:
    """Returns the number of rows of one part of a split, at least one row on either side.

    Arguments:
        name: The name of the argument.
        part: The share of the rows in this part, in (0, 1), or their number.
        rows: The number of rows to split.

    Raises:
        ValueError: If the share or the number is out of range, or there is only one row.

    Example:
        >>> part_size("test", 0.2, 12), part_size("test", 3, 12)
        (2, 3)
    """
    is_count = is_integer(part)
    if not is_number(part) or not (part > 0 if is_count else 0 < part < 1):
        raise ValueError(
            f"Expected {name} to be a share in (0, 1), or a number of rows; got {short(part)}."
        )
    if rows < 2:
        raise ValueError("Expected at least 2 rows to hold some out; got 1.")
    if is_count and part >= rows:
        raise ValueError(
            f"Expected {name} to be a share in (0, 1), or fewer than the {rows} rows that there "
            f"are; got {part!r}."
        )
    return int(part) if is_count else min(max(1, round(float(part) * rows)), rows - 1)


def closest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Returns the names that are most similar to a misspelt one, ignoring case.

    Arguments:
        name: The misspelt name.
        names: The correct names.
        n: The largest number of names to return.

    Example:
        >>> closest("binomail", ["Binomial", "Normal", "Gamma"])
        ['Binomial', 'Normal']
    """
    by_lower = {right.lower(): right for right in names}
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=n)]


def perhaps(name: str, names: Iterable[str]) -> str:
    """Returns the end of a message that suggests the name most similar to a misspelt one.

    Arguments:
        name: The misspelt name.
        names: The correct names.

    Example:
        >>> perhaps("scal", ["loc", "scale"])
        ", perhaps 'scale'"
    """
    near = closest(name, names, n=1)
    return f", perhaps {near[0]!r}" if near else ""


def short(value: object) -> str:
    """Returns the `repr` of a value if it is short, else what it is: a tensor of a shape, a class.

    Arguments:
        value: Any value.

    Example:
        >>> import torch
        >>> short(torch.zeros(2, 3)), short(0.5), short([torch.nn.Linear(2, 3)] * 9)
        ('tensor of shape (2, 3)', '0.5', 'a list of 9')
    """
    match value:
        case type():
            return value.__name__
        case Tensor():
            return f"tensor of shape {tuple(value.shape)}"
        case nn.Module():
            return type(value).__name__
    text = repr(value)
    if len(text) <= LONGEST and "\n" not in text:
        return text
    size = f" of {len(value)}" if isinstance(value, Sized) else ""
    return f"a {type(value).__name__}{size}"


def checked_finite(name: str, value: object, *, least: float = -math.inf) -> float:
    """Checks an argument that must be a finite number, and returns it as a float.

    Arguments:
        name: The name of the argument, for messages.
        value: The value of the argument.
        least: The smallest value allowed.

    Raises:
        ValueError: If the value is not a number, not finite, or too small.

    Example:
        >>> checked_finite("beta", 4, least=0.0)
        4.0
    """
    if not is_number(value) or not math.isfinite(value) or value < least:
        at_least = "" if math.isinf(least) else f" of at least {least:g}"
        raise ValueError(f"Expected {name} to be a finite number{at_least}; got {value!r}.")
    return float(value)
