"""The curves of several fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["ensemble"]

MOST_NAMED = 10
STEEP = 0.05  # the share of the points of a curve that may be cut off, as it rises from its start


def ensemble(members: Any, *, ax: Axes | None = None) -> Canvas:
    """Plots the ELBO of each fit over its epochs, and its value at the best epoch.

    If rows were held out, it is the ELBO of these rows, at the epochs that were checked. Each fit
    holds out rows by its own seed, so that the heights of such curves differ by these rows too.

    Arguments:
        members: The result of `ensemble`, which has `histories` and `seeds`.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If it has no histories, or no epochs.
    """
    histories = getattr(members, "histories", [])
    if not any(len(history) for history in histories):
        raise ValueError(f"Expected an ensemble of fits; got {members!r}.")
    figure, ax = new_axes(ax, (7.0, 4.0))
    name = "validation_elbo" if "validation_elbo" in histories[0].table else "elbo"
    late = []
    for place, (seed, history) in enumerate(zip(members.seeds, histories, strict=True)):
        known = history.table[name].dropna()
        late.append(known.iloc[int(STEEP * len(known)) :])
        label = f"seed {seed}" if len(histories) <= MOST_NAMED else None
        (line,) = ax.plot(known.index, known, linewidth=1.0, color=f"C{place % 10}", label=label)
        best = known.loc[known.index == history.best_epoch]
        ax.plot(best.index, best, "o", markersize=4, color=line.get_color())
    values = np.concatenate(late)
    margin = 0.1 * np.ptp(values) if len(values) else 0.0
    if margin > 0.0:
        ax.set_ylim(values.min() - margin, values.max() + margin)
    what = "rows that each fit held out" if name == "validation_elbo" else "training rows"
    ax.set(xlabel="epoch", ylabel=f"ELBO of the {what}, nats per row")
    ax.set_title(f"{len(histories)} fits that differ in their {members.training}")
    ax.locator_params(axis="x", integer=True)
    if len(histories) <= MOST_NAMED:
        ax.legend(fontsize="small")
    return figure
