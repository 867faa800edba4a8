"""Rows beside their posterior predictive distributions."""

from __future__ import annotations

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
    MOST_PANELS,
    element_names,
    image_of,
    image_shape_of,
    legend,
    new_figure,
    on_one_scale,
    panels,
    places_of,
    text_of,
)

if TYPE_CHECKING:
    from .canvas import Canvas

__all__ = ["reconstructions"]

LEAST_SHOWN = 0.005
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

    A table is plotted with a panel for each column, in its own units; of more than 24 columns the
    first 24. Categories have a bar for each probability, and in images the most probable one.
    Where there is no mean, the interval is plotted alone, and its middle in images.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such arrays; the first rows are plotted.
        size: The number of rows to plot.
        site: The name of the observed site, if the model has several.
        image_shape: The shape of a row as an image; `()` plots numbers as lines over all columns,
            a panel for each row. By default rows of 2 dims, rows of 3 dims with 1 or 3 channels,
            and vectors of 8 * 8, 9 * 9, ... elements whose columns have no names are plotted as
            images.
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
    labels = [found[dim].to_numpy() for dim in found["data"].dims[1:]]
    shape = image_shape_of(labels, image_shape)
    if shape:
        return _images(found, shape, figure)
    if shape is None or "mode" in found:
        return _columns(found, element_names(found.attrs["site"], labels), figure)
    return _lines(found, labels[0] if len(labels) == 1 else np.arange(data[0].numel()), figure)


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
        axes.set_title(text_of(name, 14), fontsize="small")
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
        bar.ax.set_title(text_of(label), fontsize="small")


def _columns(found: xr.Dataset, names: list[str], figure: Canvas | None) -> Canvas:
    """Draws a panel for each column, in which the rows stand one below the other."""
    rows, title = [text_of(label) for label in found["datum"].to_numpy()], TITLE
    if len(names) > MOST_PANELS:
        title += f"\nThe first {MOST_PANELS} of {len(names)} columns; the others are left out."
    shown, size = names[:MOST_PANELS], (2.5, 0.17 * len(rows) + 0.7)
    figure, grid = panels(shown, size, title=title, ylabel="row", figure=figure, sharey=True)
    places, count = np.arange(len(rows)), found.sizes.get("category", 1)
    for i, axes in enumerate(grid):
        part = {
            name: array.to_numpy().reshape(len(rows), len(names), -1)[:, i].ravel()
            for name, array in found.items()
        }
        if "mode" in found:
            codes, feet = np.tile(np.arange(count), len(rows)), np.repeat(places + 0.4, count)
            is_seen = (share := part["probability"]) > LEAST_SHOWN
            bars = (codes[is_seen], -0.8 * share[is_seen])
            axes.bar(*bars, bottom=feet[is_seen], label="probability")
            axes.locator_params(axis="x", nbins=4, integer=True)
        else:
            bounds = f"{found.attrs['prob']:.0%} interval"
            axes.hlines(places, part["lower"], part["upper"], label=bounds)
            known = "mean" if np.isfinite(part["mean"]).any() else None
            axes.plot(part["mean"], places, "|", color="C0", label=known)
        level = places + 0.4 * ("mode" in found)
        axes.plot(part["data"], level, "o", markersize=3.5, color="C1", label="data")
    grid[0].set_yticks(places, rows)
    grid[0].set_ylim(len(rows) - 0.5, -0.5)
    legend(figure, "lower right", handles=grid[0].get_legend_handles_labels()[0])
    return figure


def _lines(found: xr.Dataset, labels: np.ndarray, figure: Canvas | None) -> Canvas:
    """Draws a panel for each row, with all columns along one axis."""
    names = [f"row {text_of(label)}" for label in found["datum"].to_numpy()]
    options: dict[str, Any] = {"across": 2, "sharex": True, "sharey": True}
    site = text_of(found.attrs["site"])
    figure, grid = panels(names, (4.5, 1.4), title=TITLE, ylabel=site, figure=figure, **options)
    for i, axes in enumerate(grid):
        part = {name: array[i].to_numpy().ravel() for name, array in found.items()}
        places = places_of(axes, labels, "")
        bounds = f"{found.attrs['prob']:.0%} interval"
        axes.fill_between(places, part["lower"], part["upper"], alpha=0.3, label=bounds)
        axes.plot(places, part["mean"], color="C0", linewidth=1.0, label="mean")
        axes.plot(places, part["data"], ".", markersize=3.0, color="C1", label="data")
    legend(figure, "lower right", handles=grid[0].get_legend_handles_labels()[0])
    return figure
