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
from .canvas import column_ticks, image_of, image_shape_of, new_axes, on_one_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["prior_samples"]

MOST_ACROSS = 8


@public
def prior_samples(
    program: Any,
    *,
    x: Any = None,
    size: int = 32,
    site: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    seed: int | None = None,
    ax: Axes | None = None,
) -> Canvas:
    """Plots rows that are drawn from the prior predictive distribution.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, or rows that `sample`
            returned, shape (rows, *event).
        x: Rows to run the model on, if it cannot run without data, as in `sample`.
        size: The number of rows to plot.
        site: The name of the observed site, if the model has several.
        image_shape: The shape of a row as an image; `()` plots lines. By default it is chosen as
            in :func:`reconstructions`.
        seed: The seed of the draws. `None` continues torch's generator from its state.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If the program cannot be sampled, there are several observed sites and none is
            named, or the image shape does not fit a row.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = prior_samples(vae, seed=0)
        >>> figure.savefig("samples.png")  # doctest: +SKIP
    """
    checked_draws("size", size)
    is_program = isinstance(program, nn.Module)
    drawn = sample_sites(program, size, x=x, seed=seed) if is_program else program
    rows = read(drawn)[slice(0, size)]
    sites = list(rows.event_shapes())
    if site is None and len(sites) == 1:
        site = sites[0]
    if site not in sites:
        raise ValueError(f"Expected site to be one of the observed sites, {sites}; got {site!r}.")
    data, labels = rows.field(site).cpu().numpy(), rows.columns[site]
    names = labels[0] if len(labels) == 1 else None
    shape = image_shape_of(data.shape[1:], names, image_shape)
    if data[0].size == 1:
        figure, ax = new_axes(ax, (7.0, 4.0))
        ax.hist(data.ravel(), bins=30)
        ax.set(xlabel=site, ylabel="rows")
    elif shape is None:
        figure, ax = new_axes(ax, (7.0, 4.0))
        ax.plot(data.reshape(len(data), -1).T, color="C0", alpha=0.35, linewidth=1.0)
        ax.set_ylabel(site)
        column_ticks(ax, names)
    else:
        images, limits = on_one_scale(image_of(row, shape) for row in data)
        across = min(MOST_ACROSS, len(images))
        down = math.ceil(len(images) / across)
        figure, ax = new_axes(ax, (max(5.6, 0.95 * across + 1.2), 0.95 * down + 0.9))
        shown = ax.imshow(_mosaic(images, across, down), cmap="gray", **limits)
        ax.set_axis_off()
        if images[0].ndim == 2:
            figure.colorbar(shown, ax=ax).ax.set_title(site, fontsize="small")
    ax.set_title(f"{len(data)} prior predictive draws")
    return figure


def _mosaic(images: list[np.ndarray], across: int, down: int) -> np.ndarray:
    """Arranges images in one, `across` in each row, with gaps between them."""
    height, width, *channels = images[0].shape
    gap = max(1, width // 16)
    tall, wide = height + gap, width + gap
    mosaic = np.full((down * tall - gap, across * wide - gap, *channels), np.nan)
    if channels:
        mosaic[:] = 1.0
    for i, image in enumerate(images):
        top, left = i // across * tall, i % across * wide
        mosaic[top : top + height, left : left + width] = image
    return mosaic
