"""The Pareto k of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .canvas import new_axes, places_of, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["pareto_k"]

MOST_NAMED = 5


def pareto_k(evidence: xr.Dataset, *, ax: Axes | None = None) -> Canvas:
    """Plots the Pareto k of each row, and the limit above which its evidence is unreliable.

    If rows were refined, empty dots show the k of the guide's own draws. The axis shows the labels
    of the rows, and the five rows farthest above the limit are named.

    Arguments:
        evidence: The result of `log_evidence`.
        ax: The axes to draw into; a new figure by default.

    Raises:
        ValueError: If `evidence` has no variable `pareto_k`.

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
    is_over, is_finite = values > limit, np.isfinite(values)
    labels = evidence[evidence["pareto_k"].dims[0]].to_numpy()
    is_new = ax is None
    figure, ax = new_axes(ax, (7.0, 5.0 if labels.dtype.kind in "OTU" else 4.0))
    places = places_of(ax, labels, "row")
    before = evidence.get("pareto_k_guide", evidence["pareto_k"]).to_numpy()
    changed = before != values
    is_moved = bool((changed & ~np.isnan(before)).any())
    ncols = (2 if is_moved else 3) if is_new else 1
    if is_moved:
        share = (before > limit).mean()
        drawn = changed & np.isfinite(before)
        label = f"before it was refined: {share:.1%} over the limit"
        look: dict[str, Any] = {"markerfacecolor": "none", "markersize": 3.0, "alpha": 0.5}
        ax.plot(places[drawn], before[drawn], "o", color="0.5", label=label, **look)
    for chosen, color, label in (
        (is_finite & ~is_over, "C0", f"reliable: {(values <= limit).mean():.1%} of rows"),
        (is_finite & is_over, "C3", f"over the limit, error unknown: {is_over.mean():.1%}"),
    ):
        ax.plot(places[chosen], values[chosen], ".", color=color, label=label, alpha=0.7)
    ax.axhline(limit, color="0.3", linestyle="--", linewidth=1.0, label=f"limit {limit:.2f}")
    for i in [i for i in np.argsort(np.where(is_over, -values, 0)) if chosen[i]][:MOST_NAMED]:
        style: dict[str, Any] = {"fontsize": "small", "textcoords": "offset points"}
        ax.annotate(text_of(labels[i]), (places[i], values[i]), (3, 3), **style)
    ax.set_ylabel("Pareto k of the importance weights")
    is_infinite, unknown = np.isinf(values), int(np.isnan(values).sum())
    names = ", ".join([text_of(label) for label in labels[is_infinite][:MOST_NAMED]])
    note = f"\n{is_infinite.sum()} infinite and not drawn, the first {names}" if names else ""
    note += f", k not known in {unknown}" if unknown else ""
    ax.set_title(
        f"Reliability of log p(x), {len(values)} rows{note}",
        pad=8 + (64 if is_moved else 48) / ncols,
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=ncols, fontsize="small")
    return figure
