"""Figures, axes and images that several pictures share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..data.checks import is_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    Canvas: TypeAlias = Figure | SubFigure

__all__ = [
    "column_ticks",
    "image_of",
    "image_shape_of",
    "legend",
    "longest_name",
    "new_axes",
    "new_figure",
    "on_one_scale",
]

SMALLEST_SQUARE = 8
MOST_TICKS = 30


def new_figure(figure: Canvas | None, size: tuple[float, float]) -> Canvas:
    """Returns a new figure, unless one is given.

    Arguments:
        figure: The given figure or subfigure.
        size: The width and the height of a new one, in inches.
    """
    if figure is not None:
        return figure
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def new_axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Canvas, Axes]:
    """Returns axes and their figure, new ones unless axes are given.

    Arguments:
        ax: The given axes.
        size: The width and the height of a new figure, in inches.
    """
    if ax is not None:
        return ax.figure, ax
    figure = new_figure(None, size)
    return figure, figure.subplots()


def legend(figure: Any, **options: Any) -> None:
    """Puts a legend to the right of all panels, if the layout leaves room, else into a corner.

    Arguments:
        figure: The figure.
        options: The handles, the title, and further arguments of `figure.legend`.
    """
    has_room = figure.get_layout_engine() is not None
    place = "outside right center" if has_room else "upper right"
    figure.legend(**options, loc=place, fontsize="small")


def longest_name(names: np.ndarray | None) -> int:
    """Returns the length of the longest column name; 0 if there are no names, or too many.

    Arguments:
        names: The labels of the columns, if there is one dim of columns.
    """
    if names is None or names.dtype.kind != "U" or len(names) > MOST_TICKS:
        return 0
    return max(map(len, names))


def column_ticks(axes: Axes, names: np.ndarray | None) -> None:
    """Writes the names of the columns along the horizontal axis, if there are not too many.

    Arguments:
        axes: The axes.
        names: The labels of the columns, if there is one dim of columns.
    """
    if names is not None and longest_name(names):
        axes.set_xticks(np.arange(len(names)), names.tolist(), rotation=90)
    else:
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("column")


def image_shape_of(
    event_shape: tuple[int, ...], names: np.ndarray | None, wanted: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Returns the shape of a row as an image; `None` if it is drawn as a line.

    Arguments:
        event_shape: The shape of a row.
        names: The labels of the columns, if there is one dim of columns.
        wanted: The shape that the caller chose; `()` for a line, `None` for the default.

    Raises:
        ValueError: If the wanted shape does not have as many elements as a row.
    """
    size = math.prod(event_shape)
    if wanted is not None:
        is_shape = isinstance(wanted, tuple) and all(map(is_size, wanted))
        if not is_shape or wanted and (math.prod(wanted) != size or len(wanted) not in (2, 3)):
            raise ValueError(f"Expected an image shape of {size} elements; got {wanted!r}.")
        return wanted or None
    if len(event_shape) == 1:
        side = math.isqrt(size)
        is_square = side**2 == size and side >= SMALLEST_SQUARE
        has_names = names is not None and names.dtype.kind == "U"
        return (side, side) if is_square and not has_names else None
    has_channels = len(event_shape) == 3 and (event_shape[0] in (1, 3) or event_shape[2] in (1, 3))
    return event_shape if len(event_shape) == 2 or has_channels else None


def image_of(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a row as an image (height, width) or (height, width, 3).

    Arguments:
        row: The row.
        shape: Its shape as an image, with the channels first or last.
    """
    image = row.reshape(shape).astype(np.float64)
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = np.moveaxis(image, 0, 2)
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def on_one_scale(images: Iterable[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Brings images to one scale: colours to [0, 1], grey levels by the limits of `imshow`.

    Arguments:
        images: The images, as :func:`image_of` returns them.

    Returns:
        The images, and the limits for `imshow`.
    """
    images = list(images)
    low = float(min(np.nanmin(image) for image in images))
    high = float(max(np.nanmax(image) for image in images))
    if images[0].ndim == 3:
        width = max(high - low, np.finfo(float).tiny)
        images = [np.clip((image - low) / width, 0, 1) for image in images]
    return images, {"vmin": low, "vmax": high}
