"""Rows beside their posterior predictive distributions."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from torch import nn

from ..data.checks import checked_draws
from ..data.read import read
from ..elbos.log_densities import programs_of
from ..engine.running import evaluating, public
from ..prediction.reconstruct import reconstruct
from ..prediction.traces import observed_values
from .canvas import (
    column_ticks,
    image_of,
    image_shape_of,
    legend,
    longest_name,
    new_figure,
    on_one_scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["reconstructions"]

TITLE = "Rows and their posterior predictive distributions"


@public
def reconstructions(
    program: nn.Module,
    x: Any,
    *,
    size: int = 8,
    site: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    num_samples: int = 200,
    context: Any = None,
    weights: Any = None,
    seed: int | None = None,
    figure: Canvas | None = None,
) -> Canvas:
    """Plots rows beside the mean and an interval of their posterior predictive distributions.

    Categories are plotted with their probabilities, and the most probable one. Where there is no
    mean, the interval is plotted alone, and its middle in images.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such arrays; the first rows are plotted.
        size: The number of rows to plot.
        site: The name of the observed site, if the model has several.
        image_shape: The shape of a row as an image; `()` plots lines. By default rows of 2 dims,
            rows of 3 dims with 1 or 3 channels, and vectors of 8 * 8, 9 * 9, ... elements whose
            columns have no names are plotted as images.
        num_samples: The number of draws of each row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        seed: The seed of the draws. `None` continues torch's generator from its state.
        figure: The figure or subfigure to draw into; a new one by default.

    Raises:
        ValueError: If `program` is not a program, the data do not fit it, or the image shape does
            not fit a row.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = reconstructions(vae, torch.ones(10, 64))
        >>> figure.savefig("reconstructions.png")  # doctest: +SKIP
    """
    checked_draws("size", size)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)[slice(0, size)]
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress": False}
    found = reconstruct(program, rows, site=site, **options)
    with evaluating(program):
        data = observed_values(program, rows.head(size, program), found.attrs["site"])
    centre = found["mode" if "mode" in found else "mean"]
    found["data"] = centre.copy(data=data.cpu().numpy())
    shape = image_shape_of(tuple(data.shape[1:]), _names(found), image_shape)
    return _lines(found, figure) if shape is None else _images(found, shape, figure)


def _names(found: xr.Dataset) -> np.ndarray | None:
    dims = found["data"].dims[1:]
    return found[dims[0]].to_numpy() if len(dims) == 1 else None


def _images(found: xr.Dataset, shape: tuple[int, ...], figure: Canvas | None) -> Canvas:
    count, site = found.sizes["datum"], found.attrs["site"]
    if "mode" in found:
        names, certainty = ["data", "mode"], "probability\nof the mode"
        rows = [found["data"], found["mode"], found["probability"].max("category")]
    else:
        names, certainty = ["data", "mean"], f"width of\n{found.attrs['prob']:.0%} interval"
        if found["mean"].isnull().any():
            names[1] = "mean, or middle\nof interval"
        mean = found["mean"].fillna((found["lower"] + found["upper"]) / 2)
        rows = [found["data"], mean, found["upper"] - found["lower"]]
    data, centre, last = ([image_of(row, shape) for row in part.to_numpy()] for part in rows)
    figure = new_figure(figure, (1.05 * count + 1.6, 4.0))
    grid = figure.subplots(3, count, squeeze=False)
    _show(figure, grid[:2], data + centre, site, "gray")
    _show(figure, grid[2:], last, certainty.split()[0], "viridis")
    for axes, label in zip(grid[:, 0], [*names, certainty], strict=True):
        axes.set_ylabel(label)
    for axes, name in zip(grid[0], found["datum"].to_numpy(), strict=True):
        axes.set_title(str(name), fontsize="small")
    figure.suptitle("\n".join(textwrap.wrap(TITLE, width=12 * count + 10)))
    return figure


def _show(
    figure: Canvas, grid: np.ndarray, images: list[np.ndarray], label: str, cmap: str
) -> None:
    images, limits = on_one_scale(images)
    for axes, image in zip(grid.ravel(), images, strict=True):
        shown = axes.imshow(image, cmap=cmap, **limits)
        axes.set(xticks=[], yticks=[])
    if images[0].ndim == 2:
        bar = figure.colorbar(shown, ax=grid.ravel().tolist())
        bar.ax.set_title(label, fontsize="small")


def _lines(found: xr.Dataset, figure: Canvas | None) -> Canvas:
    count, names = found.sizes["datum"], _names(found)
    across = min(count, 2)
    down = math.ceil(count / across)
    figure = new_figure(figure, (9.0, 1.4 * down + 1.0 + 0.07 * longest_name(names)))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    data = found["data"].to_numpy().reshape(count, -1)
    places = np.arange(data.shape[1])
    for i, axes in enumerate(grid.ravel()[:count]):
        (_probabilities if "mode" in found else _interval)(axes, found.isel(datum=i))
        axes.plot(places, data[i], "o", markersize=3.5, color="C1", label="data")
        axes.set_title(f"datum {found['datum'].to_numpy()[i]}", fontsize="small")
    for axes in grid.ravel()[count:]:
        axes.set_axis_off()
    if "mode" in found:
        bar = figure.colorbar(grid[0, 0].collections[0], ax=grid.ravel().tolist())
        bar.ax.set_title("probability", fontsize="small")
    for axes in grid[-1]:
        column_ticks(axes, names)
    if len(places) == 1:
        grid[-1, 0].set_xticks(places)
    for axes in grid[:, 0]:
        axes.set_ylabel(found.attrs["site"])
    legend(figure, handles=grid[0, 0].get_legend_handles_labels()[0])
    figure.suptitle(TITLE)
    return figure


def _interval(axes: Axes, row: xr.Dataset) -> None:
    """Draws the mean and the interval of each column of a row."""
    mean, low, high = (row[name].to_numpy().ravel() for name in ("mean", "lower", "upper"))
    places, has_mean = np.arange(len(mean)), np.isfinite(mean)
    what = "mean, " if has_mean.any() else ""
    centre = np.where(has_mean, mean, (low + high) / 2)
    bars = np.maximum((centre - low, high - centre), 0)
    label = f"{what}{row.attrs['prob']:.0%} interval"
    axes.errorbar(places, centre, bars, fmt="_" if has_mean.all() else "none", label=label)
    if not has_mean.all():
        axes.plot(places[has_mean], mean[has_mean], "_", color="C0")


def _probabilities(axes: Axes, row: xr.Dataset) -> None:
    """Draws the probability of each category of each column of a row, and the mode."""
    probability = row["probability"].to_numpy().reshape(-1, row.sizes["category"])
    edges = [np.arange(size + 1) - 0.5 for size in probability.shape]
    axes.pcolormesh(*edges, probability.T, vmin=0, vmax=1, cmap="Blues")
    mode = row["mode"].to_numpy().ravel()
    axes.plot(np.arange(len(mode)), mode, "_", color="C0", label="mode")
