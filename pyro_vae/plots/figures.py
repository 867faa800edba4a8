"""Pictures of fits, draws and diagnostics, on matplotlib.

Each returns its figure, to be saved by `figure.savefig(path)`, and draws into `figure` where one
is given (a subfigure too). No state of pyplot and no style is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from ..data.checks import checked_count
from ..data.read import read
from ..data.rows import Rows
from ..engine.running import evaluating, seeded

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    Canvas: TypeAlias = Figure | SubFigure

__all__ = [
    "estimators",
    "latents",
    "pareto_k",
    "prior_samples",
    "reconstructions",
    "training",
]

SMALLEST_SQUARE = 8
MOST_TICKS = 30
MOST_GROUPS = 20
MOST_PAIRED = 4


def training(history: Any, *, figure: Canvas | None = None) -> Canvas:
    """Draws the ELBO over the epochs, and its parts.

    Arguments:
        history: What `fit` returns, or its table, indexed by epoch.
        figure: Where to draw.

    Raises:
        ValueError: Where the table has no column `elbo`, or no epochs.
    """
    table = getattr(history, "table", history)
    if "elbo" not in getattr(table, "columns", ()) or not len(table):
        raise ValueError(f"Expected a history with a column 'elbo'; got {history!r}.")
    figure = _figure(figure, (9.0, 3.6))
    bound, parts = figure.subplots(1, 2)
    banded = "validation_elbo" if "validation_elbo_se" in table else "elbo"
    for prefix, label, color in (("", "training", "C0"), ("validation_", "validation", "C1")):
        named = "± 1 s.e. over rows" if f"{prefix}elbo" == banded else None
        _curve(bound, table, f"{prefix}elbo", label, color, band=True, band_label=named)
        _curve(parts, table, f"{prefix}reconstruction", f"{label}: E log p(x | z)", color)
        _curve(parts, table, f"{prefix}kl", f"{label}: KL, one draw", color, style="--")
    best = getattr(history, "best_epoch", None)
    if best is not None:
        bound.axvline(best, color="0.6", linewidth=1.0, zorder=0, label=f"best epoch, {best}")
    _settle(bound, table, [name for name in table if name.endswith("elbo")])
    _settle(parts, table, [name for name in table if name.endswith(("reconstruction", "kl"))])
    bound.set_title("Evidence lower bound")
    parts.set_title("Reconstruction and KL")
    return figure


def _curve(
    axes: Axes,
    table: pd.DataFrame,
    column: str,
    label: str,
    color: str,
    *,
    style: str = "-",
    band: bool = False,
    band_label: str | None = None,
) -> None:
    if column not in table:
        return
    values = table[column]
    marker = "o" if len(table) == 1 else ""
    axes.plot(table.index, values, style, marker=marker, color=color, label=label, linewidth=1.5)
    if band and f"{column}_se" in table:
        error = table[f"{column}_se"]
        low, high = values - error, values + error
        shade: dict[str, Any] = {"color": color, "alpha": 0.25, "linewidth": 0}
        axes.fill_between(table.index, low, high, label=band_label, **shade)


def _settle(axes: Axes, table: pd.DataFrame, columns: list[str]) -> None:
    """Labels the axes and leaves the plunge of the first epochs outside."""
    axes.set(xlabel="epoch", ylabel="nats per row")
    axes.locator_params(axis="x", integer=True)
    first, last = table.index[0], table.index[-1]
    axes.set_xlim(first - 0.5 - 0.03 * (last - first), last + 0.5 + 0.03 * (last - first))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    if len(table) < 20 or not columns:
        return
    late = table[columns].iloc[len(table) // 20 :].to_numpy(dtype=np.float64)
    late = late[np.isfinite(late)]
    if late.size and np.ptp(late):
        margin = 0.1 * np.ptp(late)
        axes.set_ylim(late.min() - margin, late.max() + margin)


def reconstructions(
    program: Any,
    x: Any,
    *,
    size: int = 8,
    image_shape: tuple[int, ...] | None = None,
    seed: int | None = 0,
    figure: Canvas | None = None,
) -> Canvas:
    """Draws rows beside what their posteriors predict: the mean, and an interval.

    Arguments:
        program: A program with `reconstruct`, as `VAE` has it.
        x: Rows, of which the first are drawn.
        size: How many.
        image_shape: The shape of a row as an image; `()` for lines. By default a square vector
            without named columns and rows of 2 or 3 dims are images.
        seed: Starts the draws.
        figure: Where to draw.

    Raises:
        ValueError: Where the program does not reconstruct, or the shape does not fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = reconstructions(vae, torch.ones(10, 64))
        >>> figure.savefig("reconstructions.png")  # doctest: +SKIP
    """
    checked_count("size", size)
    reconstruct = _method(program, "reconstruct")
    rows = read(x, program, check=False)[:size]
    replicates = reconstruct(rows, seed=seed)
    data = rows.field("x").cpu().numpy()
    shape = _image_shape(data.shape[1:], rows, image_shape)
    if shape is None:
        return _line_panels(data, replicates, rows, figure)
    return _image_panels(data, replicates, rows, shape, figure)


def _image_panels(
    data: np.ndarray,
    replicates: xr.Dataset,
    rows: Rows,
    shape: tuple[int, ...],
    figure: Canvas | None,
) -> Canvas:
    count, prob = len(data), replicates.attrs.get("prob")
    width = (replicates["upper"] - replicates["lower"]).to_numpy()
    interval = "interval" if prob is None else f"{prob:.0%} interval"
    lines = [("data", data), ("mean", replicates["mean"].to_numpy())]
    figure = _figure(figure, (1.05 * count + 1.6, 4.0))
    grid = figure.subplots(3, count, squeeze=False)
    shown = _show_images(grid[:2], np.stack([values for _, values in lines]), shape)
    spread = _show_images(grid[2:], width[None], shape, cmap="viridis")
    if shown.get_array().ndim == 2:
        _color_bar(figure, shown, grid[:2], "x")
        _color_bar(figure, spread, grid[2:], "width")
    for axes, label in zip(grid[:, 0], ["data", "mean", f"width of\n{interval}"], strict=True):
        axes.set_ylabel(label)
    for axes, name in zip(grid[0], rows.labels, strict=True):
        axes.set_title(str(name), fontsize="small")
    gap = "\n" if count < 4 else " "
    figure.suptitle(f"Rows and their{gap}posterior predictive{gap}distributions")
    return figure


def _color_bar(figure: Canvas, shown: Any, grid: np.ndarray, label: str) -> None:
    bar = figure.colorbar(shown, ax=grid.ravel().tolist())
    bar.ax.set_title(label, fontsize="small")


def _show_images(
    grid: np.ndarray, values: np.ndarray, shape: tuple[int, ...], cmap: str = "gray"
) -> Any:
    """Draws values (lines, columns, *event) as images on one scale."""
    low, high = np.nanmin(values), np.nanmax(values)
    for axes, value in zip(grid.ravel(), values.reshape(-1, *values.shape[2:]), strict=True):
        picture = _picture(value, shape)
        if picture.ndim == 3:
            picture = np.clip((picture - low) / max(high - low, np.finfo(float).tiny), 0, 1)
        shown = axes.imshow(picture, vmin=low, vmax=high, cmap=cmap)
        axes.set(xticks=[], yticks=[])
    return shown


def _line_panels(
    data: np.ndarray, replicates: xr.Dataset, rows: Rows, figure: Canvas | None
) -> Canvas:
    count = len(data)
    across = min(count, 2)
    down = math.ceil(count / across)
    figure = _figure(figure, (9.0, 1.4 * down + 1.0 + 0.07 * _longest_name(rows)))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    middle, low, high = (
        replicates[name].to_numpy().reshape(count, -1) for name in ("mean", "lower", "upper")
    )
    prob = replicates.attrs.get("prob")
    interval = "interval" if prob is None else f"{prob:.0%} interval"
    places = np.arange(middle.shape[1])
    for axes, i in zip(grid.ravel(), range(count), strict=False):
        bars = (middle[i] - low[i], high[i] - middle[i])
        axes.errorbar(
            places, middle[i], np.maximum(bars, 0), fmt="_", color="C0", label=f"mean, {interval}"
        )
        axes.plot(places, data[i].ravel(), "o", markersize=3.5, color="C1", label="data")
        axes.set_title(f"datum {rows.labels[i]}", fontsize="small")
    for axes in grid.ravel()[count:]:
        axes.set_axis_off()
    for axes in grid[-1]:
        _column_ticks(axes, rows)
    for axes in grid[:, 0]:
        axes.set_ylabel("x")
    _legend(figure, handles=grid[0, 0].get_legend_handles_labels()[0])
    figure.suptitle("Rows and their posterior predictive distributions")
    return figure


def _longest_name(rows: Rows) -> int:
    names = rows.column_names() or []
    return max(map(len, names), default=0) if len(names) <= MOST_TICKS else 0


def _column_ticks(axes: Axes, rows: Rows) -> None:
    names = rows.column_names()
    if names is not None and _longest_name(rows):
        axes.set_xticks(np.arange(len(names)), names, rotation=90)
    else:
        axes.set_xlabel("column")


def prior_samples(
    program: Any,
    *,
    size: int = 32,
    image_shape: tuple[int, ...] | None = None,
    seed: int | None = 0,
    figure: Canvas | None = None,
) -> Canvas:
    """Draws rows that the model makes up: z from the prior, x from the likelihood.

    Arguments:
        program: A program with `sample`, as `VAE` has it, or rows drawn already.
        size: How many.
        image_shape: The shape of a row as an image; `()` for lines.
        seed: Starts the draws.
        figure: Where to draw.

    Raises:
        ValueError: Where there is nothing to draw from, or the shape does not fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = prior_samples(vae, seed=0)
        >>> figure.savefig("samples.png")  # doctest: +SKIP
    """
    checked_count("size", size)
    drawn = program
    if isinstance(program, torch.nn.Module):
        drawn = _method(program, "sample")(size, seed=seed)
    rows = read(drawn)[:size]
    data = rows.field("x").cpu().numpy()
    shape = _image_shape(data.shape[1:], rows, image_shape)
    if shape is None:
        figure = _figure(figure, (7.0, 4.0))
        axes = figure.subplots()
        axes.plot(data.reshape(len(data), -1).T, color="C0", alpha=0.35, linewidth=1.0)
        axes.set_ylabel("x")
        _column_ticks(axes, rows)
    else:
        across = min(8, len(data))
        down = math.ceil(len(data) / across)
        figure = _figure(figure, (max(5.6, 0.95 * across + 1.2), 0.95 * down + 0.9))
        grid = figure.subplots(down, across, squeeze=False)
        shown = _show_images(grid.ravel()[: len(data)], data[None], shape)
        for axes in grid.ravel()[len(data) :]:
            axes.set_axis_off()
        if shown.get_array().ndim == 2:
            _color_bar(figure, shown, grid, "x")
    figure.suptitle(f"{len(data)} draws from the prior predictive distribution")
    return figure


def latents(
    program: Any,
    x: Any = None,
    labels: Sequence[Any] | None = None,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    figure: Canvas | None = None,
) -> Canvas:
    """Draws where rows lie in latent space: the means of their posteriors.

    One dimension is drawn as a histogram, two as a scatter, three and four as pairs, and of more
    the first principal components.

    Arguments:
        program: A program with `encode`, as `VAE` has it, or latents drawn already, (rows, dims).
        x: The rows, where `program` is one.
        labels: A value a row, to colour by: groups, or a number.
        num_samples: The number of draws that a mean is taken of.
        seed: Starts the draws.
        figure: Where to draw.

    Raises:
        ValueError: Where `program` does not encode, or there are more or less labels than rows.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = latents(vae, torch.ones(10, 64), labels=torch.arange(10) % 2)
        >>> figure.savefig("latents.png")  # doctest: +SKIP
    """
    means = _latent_means(program, x, num_samples, seed)
    colors = None if labels is None else np.asarray(labels)
    if colors is not None and colors.shape != (len(means),):
        raise ValueError(f"Expected {len(means)} labels; got shape {colors.shape}.")
    values, names = _coordinates(means)
    dims = len(names)
    side = 4.8 if dims <= 2 else 2.1 * (dims - 1) + 1.6
    figure = _figure(figure, (side + 1.2, side))
    if dims == 1:
        shown = [figure.subplots()]
        _histogram(shown[0], values[:, 0], names[0], colors)
    else:
        shown = _pairs(figure, values, names, colors)
    _color_key(figure, shown, colors)
    figure.suptitle("Posterior means of the latents")
    return figure


def _latent_means(program: Any, x: Any, num_samples: int, seed: int | None) -> np.ndarray:
    if x is None and not hasattr(program, "encode"):
        means = np.asarray(program, dtype=np.float64)
    else:
        encode = _method(program, "encode")
        if x is None:
            raise ValueError("Expected rows x to encode; got None.")
        rows = read(x, program)
        with seeded(seed), evaluating(program):
            chunks = [
                _posterior_mean(encode(chunk.head(256, program)), num_samples).cpu()
                for chunk in rows.chunks(256)
            ]
        means = torch.cat(chunks).double().numpy()
    if means.ndim < 2:
        raise ValueError(f"Expected latents of shape (rows, dims); got {means.shape}.")
    return means.reshape(len(means), -1)


def _posterior_mean(posterior: Any, num_samples: int) -> torch.Tensor:
    try:
        mean: torch.Tensor = posterior.mean
    except NotImplementedError:
        mean = posterior.sample((num_samples,)).double().mean(0)
    return mean


def _coordinates(means: np.ndarray) -> tuple[np.ndarray, list[str]]:
    if means.shape[1] <= MOST_PAIRED:
        return means, [f"E[z[{i}] | x]" for i in range(means.shape[1])]
    left, scales, _ = np.linalg.svd(means - means.mean(0), full_matrices=False)
    kept = min(MOST_PAIRED - 1, len(scales))
    shares = scales**2 / max((scales**2).sum(), np.finfo(float).tiny)
    names = [f"component {i + 1} ({shares[i]:.0%} of variance)" for i in range(kept)]
    return (left * scales)[:, :kept], names


def _groups(colors: np.ndarray | None) -> np.ndarray | None:
    """Returns the distinct labels where these are groups, not a scale."""
    if colors is None:
        return None
    distinct = np.unique(colors)
    few = len(distinct) <= MOST_GROUPS and colors.dtype.kind != "f"
    return distinct if few or colors.dtype.kind not in "iufb" else None


def _palette(colors: np.ndarray | None) -> dict[str, Any]:
    groups = _groups(colors)
    if colors is None:
        return {"color": "C0"}
    if groups is None:
        return {"c": colors, "cmap": "viridis"}
    name = "tab10" if len(groups) <= 10 else "tab20"
    return {"c": np.searchsorted(groups, colors) % 20, "cmap": name, **_limits(name)}


def _limits(name: str) -> dict[str, float]:
    return {"vmin": -0.5, "vmax": 9.5 if name == "tab10" else 19.5}


def _histogram(axes: Axes, values: np.ndarray, name: str, colors: np.ndarray | None) -> None:
    groups = _groups(colors)
    if groups is None or colors is None:
        axes.hist(values, bins=30)
    else:
        from matplotlib import colormaps

        palette = colormaps["tab10" if len(groups) <= 10 else "tab20"]
        axes.hist(
            [values[colors == group] for group in groups],
            bins=30,
            stacked=True,
            color=[palette(i % palette.N) for i in range(len(groups))],
        )
    axes.set(xlabel=name, ylabel="rows")


def _pairs(
    figure: Canvas, values: np.ndarray, names: list[str], colors: np.ndarray | None
) -> list[Axes]:
    dims = len(names)
    grid = figure.subplots(dims - 1, dims - 1, squeeze=False, sharex="col", sharey="row")
    size = float(np.clip(3000 / len(values), 3, 20))
    for down in range(1, dims):
        for across in range(dims - 1):
            axes = grid[down - 1, across]
            if across >= down:
                axes.set_visible(False)
                continue
            axes.scatter(
                values[:, across], values[:, down], s=size, linewidths=0, **_palette(colors)
            )
            axes.label_outer()
    small = {"fontsize": "small"} if dims > 2 else {}
    for i in range(dims - 1):
        grid[-1, i].set_xlabel(names[i].replace(" (", "\n("), **small)
        grid[i, 0].set_ylabel(names[i + 1].replace(" (", "\n("), **small)
    return [axes for axes in grid.ravel() if axes.get_visible()]


def _color_key(figure: Canvas, shown: list[Axes], colors: np.ndarray | None) -> None:
    groups = _groups(colors)
    if colors is None:
        return
    if groups is None:
        if shown[0].collections:
            figure.colorbar(shown[0].collections[0], ax=shown, label="label")
        return
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    handles = [
        Line2D([], [], marker="o", linestyle="", color=palette(i % palette.N), label=str(group))
        for i, group in enumerate(groups)
    ]
    _legend(figure, handles=handles, title="label")


def _legend(figure: Any, *, side: str = "right center", **options: Any) -> None:
    has_room = figure.get_layout_engine() is not None
    place = f"outside {side}" if has_room else "upper right"
    figure.legend(**options, loc=place, fontsize="small")


def pareto_k(evidence: xr.Dataset, *, figure: Canvas | None = None) -> Canvas:
    """Draws the Pareto k of each row, and the limit over which its evidence is not to be trusted.

    Arguments:
        evidence: What `log_evidence` returns.
        figure: Where to draw.

    Raises:
        ValueError: Where there is no Pareto k in it.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> figure = pareto_k(pv.log_evidence(vae, torch.ones(10, 64), 100, seed=0))
        >>> figure.savefig("pareto_k.png")  # doctest: +SKIP
    """
    if "pareto_k" not in evidence:
        raise ValueError(f"Expected evidence with the variable 'pareto_k'; got {list(evidence)}.")
    values = evidence["pareto_k"].to_numpy()
    limit = evidence.attrs.get("good_k", 0.7)
    over = ~(values <= limit)
    finite = np.isfinite(values)
    places = np.arange(len(values))
    figure = _figure(figure, (7.0, 4.0))
    axes = figure.subplots()
    for chosen, color, label in (
        (finite & ~over, "C0", f"reliable: {(~over).mean():.1%} of rows"),
        (finite & over, "C3", f"over the limit or unknown: {over.mean():.1%}"),
    ):
        axes.plot(places[chosen], values[chosen], ".", color=color, label=label, alpha=0.7)
    axes.axhline(limit, color="0.3", linestyle="--", linewidth=1.0, label=f"limit {limit:.2f}")
    axes.set(xlabel="row", ylabel="Pareto k of the importance weights")
    axes.set_xlim(-0.5 - 0.02 * len(values), len(values) - 0.5 + 0.02 * len(values))
    missing = int((~finite).sum())
    note = f", {missing} not finite and not drawn" if missing else ""
    axes.set_title(f"Reliability of log p(x), {len(values)} rows{note}")
    _legend(figure, side="lower center", handles=axes.get_legend_handles_labels()[0], ncols=3)
    return figure


def estimators(curves: pd.DataFrame, *, figure: Canvas | None = None) -> Canvas:
    """Draws signal-to-noise and cost of estimators against the number of draws K.

    Arguments:
        curves: What `curves` of a :func:`pyro_vae.compare_elbos` comparison returns.
        figure: Where to draw.

    Raises:
        ValueError: Where it is no such table.
    """
    needed = {"estimator", "num_particles", "ms"}
    if not needed <= set(getattr(curves, "columns", ())) or not len(curves):
        raise ValueError(f"Expected a table with the columns {sorted(needed)}; got {curves!r}.")
    groups = [g for g in ("encoder", "decoder") if f"snr_{g}" in curves]
    panels = [(f"snr_{g}", f"Signal-to-noise, {g}", "median of |mean| / s.d.") for g in groups]
    panels.append(("ms", "Cost", "ms a step"))
    figure = _figure(figure, (3.3 * len(panels) + 2.0, 3.6))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    counts = sorted(curves["num_particles"].dropna().unique())
    for axes, (column, title, label) in zip(grid, panels, strict=True):
        _against_particles(axes, curves, column)
        floor = f"snr_floor_{column.removeprefix('snr_')}"
        if floor in curves:
            axes.axhline(
                curves[floor].max(), color="0.5", linewidth=4.0, alpha=0.5, label="noise floor"
            )
        _particle_axes(axes, counts)
        axes.set(title=title, ylabel=label)
    _legend(figure, handles=grid[0].get_legend_handles_labels()[0])
    return figure


def _against_particles(axes: Axes, curves: pd.DataFrame, column: str) -> None:
    finite = np.isfinite(curves[column].to_numpy(dtype=np.float64)) & (curves[column] > 0)
    for i, name in enumerate(dict.fromkeys(curves["estimator"])):
        own = curves[(curves["estimator"] == name) & finite]
        style: dict[str, Any] = {"color": f"C{i % 10}", "label": name, "linewidth": 1.5}
        if own["num_particles"].isna().any():
            axes.axhline(own[column].iloc[0], linestyle="--", **style)
        else:
            marker = "os^vDPX*<>"[i % 10]
            axes.plot(own["num_particles"], own[column], marker=marker, markersize=5, **style)


def _particle_axes(axes: Axes, counts: list[float]) -> None:
    """Logarithmic both ways, with a tick at each K."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(xscale="log", yscale="log", xlabel="draws K")
    if counts:
        axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
    low, high = axes.get_ylim()
    if high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _figure(figure: Canvas | None, size: tuple[float, float]) -> Canvas:
    if figure is not None:
        return figure
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _method(program: Any, name: str) -> Any:
    method = getattr(program, name, None)
    if not callable(method):
        raise ValueError(
            f"Expected a program with the method {name}, as VAE has it; got "
            f"{type(program).__name__}."
        )
    return method


def _image_shape(
    event_shape: tuple[int, ...], rows: Rows, asked: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    size = math.prod(event_shape)
    if asked is not None:
        if asked and (math.prod(asked) != size or len(asked) not in (2, 3)):
            raise ValueError(f"Expected an image shape of {size} elements; got {asked}.")
        return asked or None
    if len(event_shape) == 1:
        side = math.isqrt(size)
        square = side**2 == size and side >= SMALLEST_SQUARE
        return (side, side) if square and rows.column_names() is None else None
    return event_shape if len(event_shape) == 2 or _has_channels(event_shape) else None


def _has_channels(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and (shape[0] in (1, 3) or shape[2] in (1, 3))


def _picture(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    picture = row.reshape(shape).astype(np.float64)
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        picture = np.moveaxis(picture, 0, 2)
    return picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
