"""Signal-to-noise and cost of estimators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import legend, new_figure, text_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["estimators"]


def estimators(curves: pd.DataFrame, *, figure: Canvas | None = None) -> Canvas:
    """Plots the signal-to-noise ratio and the cost of estimators against the number of draws K.

    Arguments:
        curves: The table that the method `curves` of :func:`pyro_vae.compare_elbos`'s result
            returns.
        figure: The figure or subfigure to draw into; a new one by default.

    Raises:
        ValueError: If the table is empty or lacks a column.
    """
    needed = {"estimator", "num_particles", "ms"}
    if not needed <= set(getattr(curves, "columns", ())) or not len(curves):
        raise ValueError(f"Expected a table with the columns {sorted(needed)}; got {curves!r}.")
    groups = [g for g in ("encoder", "decoder") if f"snr_{g}" in curves]
    panels = [(f"snr_{g}", f"Signal-to-noise, {g}", "median of |mean| / s.d.") for g in groups]
    panels.append(("ms", "Cost", "ms a step"))
    figure = new_figure(figure, (3.3 * len(panels) + 2.0, 3.6))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    counts = sorted(curves["num_particles"].dropna().unique())
    styles: dict[str, dict[str, Any]] = {
        name: {"color": f"C{i % 10}", "label": text_of(name), "linewidth": 1.5}
        for i, name in enumerate(dict.fromkeys(curves["estimator"]))
    }
    for axes, (column, title, label) in zip(grid, panels, strict=True):
        is_finite = np.isfinite(curves[column].to_numpy(dtype=np.float64))
        for i, (name, style) in enumerate(styles.items()):
            own = curves[(curves["estimator"] == name) & is_finite & (curves[column] > 0)]
            if own["num_particles"].isna().any():
                axes.axhline(own[column].iloc[0], linestyle="--", **style)
            else:
                marker = "os^vDPX*<>"[i % 10]
                axes.plot(own["num_particles"], own[column], marker=marker, markersize=5, **style)
        floor = f"snr_floor_{column.removeprefix('snr_')}"
        if floor in curves:
            axes.axhline(
                curves[floor].max(), color="0.5", linewidth=4.0, alpha=0.5, label="noise floor"
            )
        _particle_axes(axes, counts)
        axes.set(title=title, ylabel=label)
    legend(figure, handles=grid[0].get_legend_handles_labels()[0])
    return figure


def _particle_axes(axes: Axes, counts: list[float]) -> None:
    """Makes both axes logarithmic, with a tick at each K."""
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
