"""Differences of models in log p(x)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .canvas import new_axes, text_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["ranking"]


def ranking(table: pd.DataFrame, *, ax: Axes | None = None) -> Canvas:
    """Plots the difference of each model from the best in mean log p(x), ± 2 standard errors.

    Filled dots are the models that equal the best within error, empty ones the others.

    Arguments:
        table: The result of `compare`, or a table of `race`.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If the table has no columns `difference` and `difference_se`.
    """
    needed = {"difference", "difference_se"}
    if not needed <= set(getattr(table, "columns", ())):
        raise ValueError(f"Expected a table with the columns {sorted(needed)}; got {table!r}.")
    names = [text_of(name, 40) for name in table.index]
    longest = max(map(len, names))
    figure, ax = new_axes(ax, (5.5 + 0.08 * longest, 0.4 * len(names) + 1.4))
    places = np.arange(len(names))
    ax.axvline(0.0, color="0.6", linewidth=1.0, zorder=0)
    bars = 2 * table["difference_se"].to_numpy()
    near = table["difference"].abs() <= bars
    is_equal = table.get("within_error", near).to_numpy(dtype=bool)
    for mask, fill, label in (
        (is_equal, "full", "equal within error"),
        (~is_equal, "none", "worse"),
    ):
        if mask.any():
            ax.errorbar(
                table["difference"][mask],
                places[mask],
                xerr=bars[mask],
                fmt="o",
                color="C0",
                fillstyle=fill,
                capsize=3,
                label=label,
            )
    if len(names) > 1:
        ax.legend(loc="best", fontsize="small")
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("difference from the best ± 2 s.e., nats per row")
    ax.set_title("Mean log p(x) of the same rows")
    return figure
