"""The Pareto k of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from .canvas import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .canvas import Canvas

__all__ = ["pareto_k"]


def pareto_k(evidence: xr.Dataset, *, ax: Axes | None = None) -> Canvas:
    """Plots the Pareto k of each row, and the limit above which its evidence is unreliable.

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
    places = np.arange(len(values))
    ncols = 3 if ax is None else 1
    figure, ax = new_axes(ax, (7.0, 4.0))
    for chosen, color, label in (
        (is_finite & ~is_over, "C0", f"reliable: {(values <= limit).mean():.1%} of rows"),
        (is_finite & is_over, "C3", f"over the limit, error unknown: {is_over.mean():.1%}"),
    ):
        ax.plot(places[chosen], values[chosen], ".", color=color, label=label, alpha=0.7)
    ax.axhline(limit, color="0.3", linestyle="--", linewidth=1.0, label=f"limit {limit:.2f}")
    ax.set(xlabel="row", ylabel="Pareto k of the importance weights")
    ax.set_xlim(-0.5 - 0.02 * len(values), len(values) - 0.5 + 0.02 * len(values))
    infinite, unknown = int(np.isinf(values).sum()), int(np.isnan(values).sum())
    note = f", {infinite} infinite and not drawn" if infinite else ""
    note += f", k not known in {unknown}" if unknown else ""
    ax.set_title(f"Reliability of log p(x), {len(values)} rows{note}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=ncols, fontsize="small")
    return figure
