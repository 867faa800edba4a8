"""The curves of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["history"]


def history(history: Any, *, figure: Canvas | None = None) -> Canvas:
    """Plots the ELBO and its two terms over the epochs, in nats per row.

    Arguments:
        history: The result of `fit`, or its table, indexed by epoch.
        figure: The figure or subfigure to draw into; a new one by default.

    Raises:
        ValueError: If the table has no column `elbo`, or no epochs.
    """
    table = getattr(history, "table", history)
    if "elbo" not in getattr(table, "columns", ()) or not len(table):
        raise ValueError(f"Expected a history with a column 'elbo'; got {history!r}.")
    figure = new_figure(figure, (9.0, 3.6))
    bound, terms = figure.subplots(1, 2)
    with_label = "validation_elbo" if "validation_elbo_se" in table else "elbo"
    for prefix, label, color in (("", "training", "C0"), ("validation_", "validation", "C1")):
        column = f"{prefix}elbo"
        _curve(bound, table, column, label, color)
        if f"{column}_se" in table:
            known = table[[column, f"{column}_se"]].dropna()
            low, high = (known[column] + sign * known[f"{column}_se"] for sign in (-1, 1))
            band = "± 1 s.e. over rows" if column == with_label else None
            shade: dict[str, Any] = {"color": color, "alpha": 0.25, "linewidth": 0}
            bound.fill_between(known.index, low, high, label=band, **shade)
        _curve(terms, table, f"{prefix}reconstruction", f"{label}: E log p(x | z)", color)
        _curve(terms, table, f"{prefix}kl", f"{label}: KL", color, style="--")
    best = getattr(history, "best_epoch", None)
    if best is not None:
        bound.axvline(best, color="0.6", linewidth=1.0, zorder=0, label=f"best epoch, {best}")
    _finish(bound, table, [name for name in table if name.endswith("elbo")])
    _finish(terms, table, [name for name in table if name.endswith(("reconstruction", "kl"))])
    bound.set_title("Evidence lower bound")
    terms.set_title("Reconstruction and KL")
    return figure


def _curve(
    axes: Axes, table: pd.DataFrame, column: str, label: str, color: str, *, style: str = "-"
) -> None:
    if column in table:
        known = table[column].dropna()
        marker = "" if len(known) == len(table) > 1 else "o"
        line: dict[str, Any] = {"marker": marker, "markersize": 4, "color": color, "label": label}
        axes.plot(known.index, known, style, linewidth=1.5, **line)


def _finish(axes: Axes, table: pd.DataFrame, columns: list[str]) -> None:
    """Labels the axes, and sets their limits by the epochs after the first steep rise."""
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
