"""The gaps between the ELBO and log p(x), over the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from .canvas import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["gaps"]


def gaps(found: xr.Dataset, *, ax: Axes | None = None) -> Canvas:
    """Plots the share of rows whose approximation and amortisation gap is below a value.

    Arguments:
        found: The result of `gaps`.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If the two gaps are not among the variables.
    """
    names = ["approximation", "amortisation"]
    if not set(names) <= set(found):
        raise ValueError(f"Expected the variables {names}; got {list(found)}.")
    figure, ax = new_axes(ax, (6.4, 4.0))
    for name in names:
        values = found[name].to_numpy()
        ax.ecdf(values, label=f"{name}: mean {values.mean():.2f}")
    ax.axvline(0.0, color="0.6", linewidth=1.0, zorder=0)
    ax.set_xlabel("gap, nats")
    ax.set_ylabel("share of the rows with a smaller gap")
    ax.set_title(f"What the ELBO loses, {found.sizes['datum']} rows")
    ax.legend(fontsize="small")
    return figure
