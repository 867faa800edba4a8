"""Rows in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from torch import nn

from ..data.read import read
from ..engine.running import public
from ..prediction.embed import embed
from .canvas import element_names, legend, new_figure, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["latents"]

MOST_GROUPS = 20
MOST_PAIRED = 4
MOST_NAMED = 8


@public
def latents(
    program: Any,
    x: Any = None,
    labels: Sequence[Any] | None = None,
    *,
    num_samples: int = 200,
    context: Any = None,
    weights: Any = None,
    seed: int | None = None,
    figure: Canvas | None = None,
) -> Canvas:
    """Plots the posterior means of rows in latent space, as `embed` computes them.

    One dimension is plotted as a histogram, two as a scatter plot, three and four as all pairs. Of
    more dimensions the first three principal components are plotted. Where the labels of the rows
    are words, the rows farthest from the mean are named.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, or latents, shape
            (rows, dims): an array, a frame, or what `embed` returned.
        x: The data, shape (rows, *event), or a dict of such arrays, if `program` is a program.
        labels: The colour of each row, shape (rows,): its group, or a number on a scale.
        num_samples: The number of draws of each row, if the mean has no closed form.
        context: Covariates of the rows: `row["context"]` of the program.
        weights: The weight of each row: `row["weight"]` of the program.
        seed: The seed of the draws. `None` continues torch's generator from its state.
        figure: The figure or subfigure to draw into; a new one by default.

    Raises:
        ValueError: If `program` is a module and `x` is missing or does not fit it, or if the
            number of labels differs from the number of rows.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = latents(vae, torch.ones(10, 64), labels=torch.arange(10) % 2)
        >>> figure.savefig("latents.png")  # doctest: +SKIP
    """
    beside = {"context": context, "weights": weights}
    means, names, rows = _means(program, x, num_samples, seed, beside)
    colors = None if labels is None else np.asarray(labels)
    if colors is not None and colors.shape != (len(means),):
        raise ValueError(f"Expected {len(means)} labels; got shape {colors.shape}.")
    values, names = _coordinates(means, names)
    groups, palette = (None, []) if colors is None else _groups(colors)
    dims = len(names)
    side = 4.8 if dims <= 2 else 2.1 * (dims - 1) + 1.6
    figure = new_figure(figure, (side + 1.2, side))
    if dims == 1:
        shown = [figure.subplots()]
        if groups is None:
            shown[0].hist(values[:, 0], bins=30)
        else:
            parts = [values[colors == group, 0] for group in groups]
            shown[0].hist(parts, bins=30, stacked=True, color=palette)
        shown[0].set(xlabel=names[0], ylabel="rows")
    else:
        style: dict[str, Any] = {"c": colors, "cmap": "viridis"}
        if colors is None:
            style = {"color": "C0"}
        elif groups is not None:
            style = {"color": [palette[i] for i in np.searchsorted(groups, colors)]}
        shown = _pairs(figure, values, names, rows, style)
    if groups is not None:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], marker="o", linestyle="", color=color, label=text_of(group))
            for group, color in zip(groups, palette, strict=True)
        ]
        legend(figure, handles=handles, title="label")
    elif colors is not None and shown[0].collections:
        figure.colorbar(shown[0].collections[0], ax=shown, label="label")
    figure.suptitle("Posterior means of the latents")
    return figure


def _means(
    program: Any, x: Any, num_samples: int, seed: int | None, beside: dict[str, Any]
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Returns the means, shape (rows, dims), the names of the dims and the labels of the rows."""
    if isinstance(program, nn.Module):
        if x is None:
            raise ValueError("A program needs rows to compute latents for: pass the data as x.")
        options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress": False}
        program = embed(program, x, **options, **beside)
    if isinstance(program, xr.Dataset) and "mean" in program:
        names = [f"E[{unit} | x]" for unit in program["latent"].values]
        return program["mean"].to_numpy(), names, program["datum"].to_numpy()
    rows = read(program)
    means = rows.field().cpu().double().numpy()
    if means.ndim < 2:
        raise ValueError(f"Expected latents of shape (rows, dims); got {means.shape}.")
    return means.reshape(len(means), -1), element_names("z", rows.columns["x"]), rows.labels


def _coordinates(means: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    if len(names) <= MOST_PAIRED:
        return means, names
    left, scales, _ = np.linalg.svd(means - means.mean(0), full_matrices=False)
    kept = min(MOST_PAIRED - 1, len(scales))
    shares = scales**2 / max((scales**2).sum(), np.finfo(float).tiny)
    names = [f"component {i + 1} ({shares[i]:.0%} of variance)" for i in range(kept)]
    return (left * scales)[:, :kept], names


def _groups(colors: np.ndarray) -> tuple[np.ndarray | None, list[Any]]:
    """Returns the distinct labels and their colours; `None` if they are numbers on a scale."""
    from matplotlib import colormaps

    groups = np.unique(colors)
    are_few = len(groups) <= MOST_GROUPS and colors.dtype.kind != "f"
    if not are_few and colors.dtype.kind in "iufb":
        return None, []
    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    return groups, [palette(i % palette.N) for i in range(len(groups))]


def _pairs(
    figure: Canvas, values: np.ndarray, names: list[str], rows: np.ndarray, style: dict[str, Any]
) -> list[Axes]:
    dims = len(names)
    distances = np.square((values - values.mean(0)) / np.maximum(values.std(0), 1e-300))
    most = 0 if rows.dtype.kind in "iufM" else MOST_NAMED // (dims - 1)
    grid = figure.subplots(dims - 1, dims - 1, squeeze=False, sharex="col", sharey="row")
    size = float(np.clip(3000 / len(values), 3, 20))
    for down in range(1, dims):
        for across in range(dims - 1):
            axes = grid[down - 1, across]
            if across >= down:
                axes.set_visible(False)
                continue
            axes.scatter(values[:, across], values[:, down], s=size, linewidths=0, **style)
            axes.label_outer()
            for i in np.argsort(-distances[:, [across, down]].sum(1))[:most]:
                place, look = values[i, [across, down]], {"fontsize": "x-small"}
                axes.annotate(
                    text_of(rows[i], 16), place, (2, 2), textcoords="offset points", **look
                )
    small = {"fontsize": "small"} if dims > 2 else {}
    for i in range(dims - 1):
        grid[-1, i].set_xlabel(names[i].replace(" (", "\n("), **small)
        grid[i, 0].set_ylabel(names[i + 1].replace(" (", "\n("), **small)
    return [axes for axes in grid.ravel() if axes.get_visible()]
