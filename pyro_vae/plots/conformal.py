"""How far conformal intervals are from those of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from .canvas import new_axes, places_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["conformal"]


def conformal(table: xr.Dataset, *, ax: Axes | None = None) -> Canvas:
    """Plots for each column what the half-widths of the model's intervals are multiplied by.

    A column above the line at 1 has values outside the model's own intervals more often than it
    should.

    Arguments:
        table: The attribute `table` of the result of `conformal`.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If the table has no variable `factor`.
    """
    if "factor" not in getattr(table, "data_vars", ()):
        raise ValueError(f"Expected a table with the variable 'factor'; got {table!r}.")
    factor = table["factor"]
    figure, ax = new_axes(ax, (7.0, 4.0))
    values = factor.to_numpy().reshape(-1)
    names = factor[factor.dims[0]].to_numpy() if factor.ndim == 1 else np.arange(factor.size)
    places = places_of(ax, names, "column")
    ax.axhline(1.0, color="0.6", linewidth=1.0, zorder=0, label="the model's own intervals")
    ax.plot(places, values, "o", markersize=4, label="conformal intervals")
    ax.set_ylabel("factor of the half-widths")
    is_finite = np.isfinite(values)
    ax.set_ylim(0.0, 1.1 * max(1.0, values[is_finite].max(initial=0.0)))
    note = "" if is_finite.all() else f", {(~is_finite).sum()} infinite and not drawn"
    ax.set_title(f"Intervals of probability {table.attrs['prob']:g}{note}")
    ax.legend(fontsize="small")
    return figure
