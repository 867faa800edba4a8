"""Figures, axes and images that several pictures share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..data.checks import is_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    Canvas: TypeAlias = Figure | SubFigure

__all__ = [
    "MOST_PANELS",
    "element_names",
    "image_of",
    "image_shape_of",
    "legend",
    "mosaic",
    "new_axes",
    "new_figure",
    "on_one_scale",
    "panels",
    "places_of",
    "text_of",
]

SMALLEST_SQUARE = 8
MOST_TICKS = 40
MOST_PANELS = 24


def new_figure(figure: Canvas | None, size: tuple[float, float]) -> Canvas:
    """Returns a new figure, unless one is given.

    Arguments:
        figure: The given figure or subfigure.
        size: The width and the height of a new one, in inches.
    """
    if figure is not None:
        return figure
    from .picture import Picture

    return Picture(figsize=size, layout="constrained")


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


def legend(figure: Any, place: str = "upper right", **options: Any) -> None:
    """Puts a legend to the right of all panels, if the layout leaves room, else into a corner.

    Arguments:
        figure: The figure.
        place: The corner.
        options: The handles, the title, and further arguments of `figure.legend`.
    """
    has_room = figure.get_layout_engine() is not None
    place = "outside right center" if has_room else place
    figure.legend(**options, loc=place, fontsize="small")


def panels(
    names: Sequence[str],
    size: tuple[float, float],
    *,
    title: str = "",
    ylabel: str = "",
    across: int = 4,
    ax: Axes | None = None,
    figure: Canvas | None = None,
    **options: Any,
) -> tuple[Canvas, list[Axes]]:
    """Returns a figure and small axes in it, one for each name, which is their title.

    Arguments:
        names: The names.
        size: The width and the height of one of the axes in a new figure, in inches.
        title: The title of all of them together.
        ylabel: The label of the vertical axes.
        across: How many stand side by side at most.
        ax: Axes whose place they share, instead of a figure.
        figure: The figure or subfigure to draw into; a new one by default.
        options: Further arguments of `figure.subplots`.
    """
    across = min(len(names), across)
    down = math.ceil(len(names) / across)
    if ax is None:
        figure = new_figure(figure, (max(size[0] * across, 5.6), size[1] * down + 0.8))
        if figure.get_layout_engine() is None:
            options["gridspec_kw"] = {"hspace": 0.6}
        grid = figure.subplots(down, across, squeeze=False, **options).ravel().tolist()
        figure.suptitle(title)
    elif len(names) == 1:
        figure, grid, names = ax.figure, [ax], [f"{title}\n{names[0]}".strip()]
    else:
        figure = ax.figure
        ax.set_title(title, fontsize="small")
        ax.set_axis_off()
        corners = [
            (i % across / across, 1 - (i // across + 0.8) / down) for i in range(len(names))
        ]
        grid = [ax.inset_axes((*corner, 0.8 / across, 0.5 / down)) for corner in corners]
    for i, axes in enumerate(grid):
        axes.set_visible(i < len(names))
        axes.tick_params(labelsize="small")
        axes.locator_params(nbins=4)
        axes.set_ylabel("" if i % across else ylabel, fontsize="small")
        axes.xaxis.get_offset_text().set_size("small")
    for axes, name in zip(grid, names):
        axes.set_title(name, fontsize="small")
    return figure, grid[: len(names)]


def text_of(label: object, most: int = 28) -> str:
    r"""Returns a label as a text that fits a picture and is not taken for a formula.

    Arguments:
        label: The label of a row, a column or a group.
        most: The length from which it is cut.

    Example:
        >>> text_of("the price in $"), text_of("a very long name", 8)
        ('the price in \\$', 'a very …')
    """
    text = " ".join(str(label).split())
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("$", r"\$")


def element_names(site: str, labels: Sequence[np.ndarray]) -> list[str]:
    """Returns the name of each element of a row: that of its column, or the site and its place.

    Arguments:
        site: The name of the site.
        labels: The labels along each dim of a row.

    Example:
        >>> element_names("x", [np.array(["height", "age"])]), element_names("x", [np.arange(2)])
        (['height', 'age'], ['x[0]', 'x[1]'])
    """
    if len(labels) == 1 and labels[0].dtype.kind == "U":
        return [text_of(label) for label in labels[0]]
    places = [", ".join(map(str, place)) for place in itertools.product(*labels)]
    return [text_of(f"{site}[{place}]" if place else site) for place in places]


def places_of(axes: Axes, labels: np.ndarray, what: str) -> np.ndarray:
    """Prepares a horizontal axis for labels, and returns their places along it.

    Numbers and times are their own places; words are written at 0, 1, ..., some of them if there
    are many.

    Arguments:
        axes: The axes.
        labels: The labels of rows or columns.
        what: What they are the labels of.
    """
    axes.set_xlabel(what)
    if labels.dtype.kind in "iufM" and np.isfinite(labels).all():
        if labels.dtype.kind != "M":
            axes.locator_params(axis="x", integer=labels.dtype.kind != "f")
            axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        return labels
    places = np.arange(len(labels))
    shown = places[:: math.ceil(len(labels) / MOST_TICKS)]
    axes.set_xticks(shown, map(text_of, labels[shown]), rotation=90, fontsize="small")
    return places


def image_shape_of(
    labels: Sequence[np.ndarray], wanted: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Returns the shape of a row as an image; `None` for a table, `()` for a line.

    Arguments:
        labels: The labels along each dim of a row.
        wanted: The shape that the caller chose; `()` for a line, `None` for the default.

    Raises:
        ValueError: If the wanted shape does not have as many elements as a row.
    """
    event_shape = tuple(map(len, labels))
    size = math.prod(event_shape)
    if wanted is not None:
        is_shape = isinstance(wanted, tuple) and all(map(is_size, wanted))
        if not is_shape or wanted and (math.prod(wanted) != size or len(wanted) not in (2, 3)):
            raise ValueError(f"Expected an image shape of {size} elements; got {wanted!r}.")
        return wanted
    if len(event_shape) == 1:
        side = math.isqrt(size)
        is_square = side**2 == size and side >= SMALLEST_SQUARE
        has_names = labels[0].dtype.kind == "U"
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


def mosaic(images: Sequence[np.ndarray], across: int) -> np.ndarray:
    """Arranges images in one, with gaps between them.

    Arguments:
        images: The images, all of one shape.
        across: How many stand side by side.
    """
    height, width, *channels = images[0].shape
    gap = max(1, width // 16)
    tall, wide = height + gap, width + gap
    down = math.ceil(len(images) / across)
    whole = np.full((down * tall - gap, across * wide - gap, *channels), np.nan)
    if channels:
        whole[:] = 1.0
    for i, image in enumerate(images):
        top, left = i // across * tall, i % across * wide
        whole[top : top + height, left : left + width] = image
    return whole
