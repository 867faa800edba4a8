"""Progress bars, shown on a terminal or in a notebook only."""

import sys
from typing import Any

__all__ = ["is_watched", "progress_bar"]


def is_watched() -> bool:
    """Returns whether the process runs on a terminal or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_bar(total: int, title: str, unit: str, *, progress: bool) -> Any:
    """Creates a progress bar of `tqdm`, to be used in a `with` statement.

    Arguments:
        total: The number of units at the end.
        title: The text in front of the bar.
        unit: The name of one unit, with a space in front.
        progress: Whether to show the bar. It is never shown in a log file.

    Example:
        >>> with progress_bar(3, "evidence", " draws", progress=False) as bar:
        ...     bar.update(3)
    """
    from tqdm import tqdm

    is_hidden = not (progress and is_watched())
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=is_hidden)
