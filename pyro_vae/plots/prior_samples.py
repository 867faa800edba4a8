"""Draws from the prior predictive distribution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..data.checks import checked_draws
from ..data.read import read
from ..engine.running import public
from ..prediction.sample import sample_sites
from .canvas import (
    MOST_PANELS,
    element_names,
    image_of,
    image_shape_of,
    mosaic,
    new_axes,
    on_one_scale,
    panels,
    places_of,
    text_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["prior_samples"]

MOST_ACROSS = 8
MOST_BINS = 30
MOST_IMAGES = 32
MOST_ROWS = 1000
MOST_DATA = 10_000


@public
def prior_samples(
    program: Any,
    *,
    data: Any = None,
    x: Any = None,
    size: int | None = None,
    site: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    seed: int | None = None,
    ax: Axes | None = None,
) -> Canvas:
    """Plots rows that are drawn from the prior predictive distribution, beside rows of data.

    A table is plotted as a histogram of each column, in its own units, or bars if it has few whole
    numbers. Of more than 24 columns those are plotted whose draws differ most from the data, by
    the largest difference of their distribution functions; without data, the first ones.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, or rows that `sample`
            returned, shape (rows, *event).
        data: Rows of data to plot beside the draws, shape (rows, *event), or a dict with the
            observed site: as many images or lines as there are draws; all rows of a table, or
            every k-th of more than 10,000.
        x: Rows to run the model on, if it cannot run without data, as in `sample`.
        size: The number of draws to plot. By default 32 images or lines, 1000 rows of a table.
        site: The name of the observed site, if the model has several.
        image_shape: The shape of a row as an image; `()` plots lines over the columns, all on one
            axis. By default it is chosen as in :func:`reconstructions`.
        seed: The seed of the draws. `None` continues torch's generator from its state.
        ax: The axes to draw into, which several panels share; a new figure by default.

    Raises:
        ValueError: If the program cannot be sampled, there are several observed sites and none is
            named, the data have another shape than the draws, or the image shape does not fit a
            row.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = prior_samples(vae, data=torch.ones(10, 64), seed=0)
        >>> figure.savefig("samples.png")  # doctest: +SKIP
    """
    checked_draws("size", MOST_IMAGES if size is None else size)
    is_program = isinstance(program, nn.Module)
    given = None if data is None else read(data, program if is_program else None, check=False)
    count = size or MOST_IMAGES
    rows = read(sample_sites(program, count, x=x, seed=seed) if is_program else program)
    sites = list(rows.event_shapes())
    if site is None and len(sites) == 1:
        site = sites[0]
    if site not in sites:
        raise ValueError(f"Expected site to be one of the observed sites, {sites}; got {site!r}.")
    event_shape = rows.event_shapes()[site]
    beside = np.empty((0, *event_shape))
    if given is not None:
        beside = given.field(site if site in given.fields else "x").cpu().numpy()
    if beside.shape[1:] != event_shape:
        raise ValueError(
            f"Expected data whose rows have the shape {event_shape} of a draw; got rows of shape "
            f"{beside.shape[1:]}."
        )
    named = given or (rows if x is None else read(x, check=False))
    labels = list(named.coords(site, event_shape).values())
    shape = image_shape_of(labels, image_shape)
    if shape is None and is_program and size is None:
        rows = read(sample_sites(program, MOST_ROWS, x=x, seed=seed))
    draws = rows.field(site)[: size if shape is None else count].cpu().numpy()
    if shape is None:
        thinned = beside[:: math.ceil(len(beside) / MOST_DATA) or 1]
        return _columns(draws, thinned, element_names(site, labels), ax)
    if shape:
        return _images(draws, beside[: len(draws)], shape, site, ax)
    figure, ax = new_axes(ax, (7.0, 4.0))
    places = places_of(ax, labels[0] if len(labels) == 1 else np.arange(draws[0].size), "column")
    parts = {"C1": ("rows of data", beside[: len(draws)]), "C0": ("draws", draws)}
    for color, (what, part) in parts.items():
        curves = part.reshape(len(part), draws[0].size).T
        for first in ax.plot(places, curves, color=color, alpha=0.35, linewidth=1.0)[:1]:
            first.set_label(what)
    if len(beside):
        ax.legend(fontsize="small")
    ax.set(title=f"{len(draws)} prior predictive draws", ylabel=text_of(site))
    return figure


def _columns(draws: np.ndarray, data: np.ndarray, names: list[str], ax: Axes | None) -> Canvas:
    """Draws a histogram of each column of the draws, and one of the data behind it."""
    draws, data = (part.reshape(len(part), len(names)).astype(float) for part in (draws, data))
    shown, which = list(range(len(names))), "first"
    title = f"{len(draws)} prior predictive draws"
    if len(data):
        from scipy.stats import ks_2samp

        pairs = [(data[:, i], np.nan_to_num(draws[:, i], nan=np.inf)) for i in shown]
        gaps = [ks_2samp(*pair, method="asymp", nan_policy="omit").statistic for pair in pairs]
        shown.sort(key=lambda i: -gaps[i])
        which = "worst fitting"
        title += f" (outlined) and {len(data)} rows of data (filled)"
    if len(names) > MOST_PANELS:
        title += f"\nThe {MOST_PANELS} {which} of {len(names)} columns; the others are left out."
    shown = sorted(shown[:MOST_PANELS])
    names = [names[i] for i in shown]
    figure, grid = panels(names, (2.6, 1.7), title=title, ylabel="% of rows", ax=ax)
    for axes, i in zip(grid, shown, strict=True):
        edges, is_whole = _bins(draws[:, i], data[:, i])
        filled: dict[str, Any] = {"histtype": "bar" if is_whole else "stepfilled", "color": "C1"}
        outlined = {"histtype": "bar" if is_whole else "step", "edgecolor": "C0", "fill": False}
        for values, look in ((data[:, i], filled | {"alpha": 0.5}), (draws[:, i], outlined)):
            finite = values[np.isfinite(values)]
            share = np.full(len(finite), 100 / max(len(values), 1))
            axes.hist(finite, edges.tolist(), weights=share, rwidth=0.8, **look)
        axes.locator_params(axis="x", nbins=4, integer=is_whole)
        beyond = 1 - ((draws[:, i] >= edges[0]) & (draws[:, i] <= edges[-1])).mean()
        if beyond:
            axes.set_xlabel(f"{beyond:.1%} of draws beyond", fontsize="x-small")
    return figure


def _bins(draws: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns the edges of the bins, and whether each is one whole number.

    They reach over all data, and over the draws without the extreme ones of heavy tails.
    """
    draws, data = draws[np.isfinite(draws)], data[np.isfinite(data)]
    values = np.concatenate([draws, data]) if len(draws) + len(data) else np.zeros(1)
    is_whole = bool((values == values.round()).all())
    low, high = values.min(), values.max()
    if len(draws) and not (is_whole and high - low < MOST_BINS):
        first, last = np.quantile(draws, (0.05, 0.95), method="inverted_cdf")
        reach = (last - first) or math.inf
        low = np.append(data, max(low, first - reach)).min()
        high = np.append(data, min(high, last + reach)).max()
    if is_whole:
        step = math.ceil((high - low + 1) / MOST_BINS)
        return np.arange(low, high + 1 + step, step) - 0.5, step == 1
    width = (high - low) or 1e-3 * abs(high)
    fewest = min(len(data) or len(draws), len(draws))
    count = int(np.clip(2 * fewest**0.5, MOST_BINS // 3, MOST_BINS))
    return (low + high) / 2 + width * np.linspace(-0.5, 0.5, count + 1), False


def _images(
    draws: np.ndarray, data: np.ndarray, shape: tuple[int, ...], site: str, ax: Axes | None
) -> Canvas:
    """Draws images in a mosaic, those of the data in another one beside it."""
    names = [f"{len(data)} rows of data", f"{len(draws)} prior predictive draws"][not len(data) :]
    images, limits = on_one_scale(image_of(row, shape) for row in [*data, *draws])
    across = min(MOST_ACROSS, len(draws))
    size = (0.85 * across + 1.2, 0.85 * math.ceil(len(draws) / across))
    figure, grid = panels(names, size, across=1, ax=ax)
    parts = [images[: len(data)], images[len(data) :]][-len(grid) :]
    for axes, part in zip(grid, parts, strict=True):
        shown = axes.imshow(mosaic(part, across), cmap="gray", **limits)
        axes.set_axis_off()
    if images[0].ndim == 2:
        bar = figure.colorbar(shown, ax=grid if ax is None else ax)
        bar.ax.set_title(text_of(site), fontsize="small")
    return figure
