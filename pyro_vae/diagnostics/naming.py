"""Checks of arguments that are given by name, and messages that contain the name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ..data.checks import short

__all__ = ["checked_names", "naming"]

Member = TypeVar("Member")


def checked_names(what: str, members: Mapping[str, Member]) -> dict[str, Member]:
    """Checks a dict of programs or estimators, and returns a copy.

    Arguments:
        what: What its values are, in the plural.
        members: The dict.

    Raises:
        ValueError: If it is not a dict, or is empty.
    """
    if not isinstance(members, Mapping) or not members:
        raise ValueError(f"Expected a dict of {what} by name; got {short(members)}.")
    return dict(members)


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Appends a label in parentheses to the message of a ValueError.

    Arguments:
        label: Which program or estimator the message is about.

    Example:
        >>> with naming("estimator 'IWAE'"):
        ...     raise ValueError("Expected a positive lr; got 0.")
        Traceback (most recent call last):
        ValueError: Expected a positive lr; got 0. (estimator 'IWAE')
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} ({label})") from error
