"""The distribution of ranks of true latents among draws from a guide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import new_axes, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["calibration"]

STEPS = 100
MOST_NAMED = 8


def calibration(found: Any, *, ax: Axes | None = None) -> Canvas:
    """Plots how far the distribution function of each PIT is from that of uniform numbers.

    A curve above 0 on the left and below 0 on the right belongs to a guide that is too narrow, the
    opposite to one that is too wide. A curve that is above 0 everywhere belongs to true values
    that are smaller than the guide's. The dark band holds one curve of an exact guide, and the
    light band all of them together, with a probability of 95 % each. The curves of flagged
    quantities are coloured, the eight with the smallest p-values.

    Arguments:
        found: The result of :func:`pyro_vae.calibrate`.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If `found` is not such a result.
    """
    pit, table = getattr(found, "pit", None), getattr(found, "table", None)
    if pit is None or table is None:
        raise ValueError(f"Expected the result of pyro_vae.calibrate; got {found!r}.")
    place: dict[str, Any] = (
        {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if ax is None else {"loc": "best"}
    )
    figure, ax = new_axes(ax, (8.4, 4.4))
    grid = np.linspace(0, 1, STEPS + 1)
    alpha, n = table.attrs["alpha"], len(pit)
    for level, shade, label in (
        (alpha / pit.shape[1], "0.92", f"{1 - alpha:.0%} band of all {pit.shape[1]} curves"),
        (alpha, "0.82", f"{1 - alpha:.0%} band of one curve"),
    ):
        low, high = (np.array([0, *bound, n]) / n - grid for bound in found.band(level))
        ax.fill_between(grid, low, high, color=shade, linewidth=0, label=label)
    flagged = table[table["flagged"]].sort_values("p_value")["quantity"].unique()
    named = flagged[:MOST_NAMED].tolist()
    for quantity in sorted(pit.columns, key=lambda quantity: quantity in named):
        values = np.sort(pit[quantity].to_numpy())
        gap = np.searchsorted(values, grid, side="right") / n - grid
        look: dict[str, Any] = {"color": "0.45", "linewidth": 0.8}
        if quantity in named:
            label = f"TARP, {quantity}" if quantity == pit.columns[-1] else text_of(quantity)
            look = {"color": f"C{named.index(quantity)}", "linewidth": 1.6, "label": label}
        ax.plot(grid, gap, **look)
    ax.set_xlabel("PIT: share of the guide's draws below the true value")
    ax.set_ylabel("distribution function - uniform")
    ax.set_title(
        f"Calibration of the guide, {n} simulated rows: {len(flagged)} quantities flagged"
    )
    ax.legend(fontsize="small", **place)
    return figure
