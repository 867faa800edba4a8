"""Intervals for reconstructions and hidden cells that are valid whatever the guide is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .. import plots
from ..data.cells import place_name, shown
from ..data.checks import checked_draws, is_number, short
from ..data.read import read
from ..data.rows import Rows
from ..elbos.chunks import MAX_ELEMENTS
from ..elbos.log_densities import programs_of, structure
from ..engine.row_noise import row_digests
from ..engine.running import evaluating, public, seeded
from ..prediction.reconstruct import ROUNDING, reconstruct
from ..prediction.traces import trace_of
from .observed import observed_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Conformal", "conformal"]

AT_ONCE = 2**14  # rows whose observed values are looked up
OTHER_DRAWS = 0x5DEECE66D  # the draws of the calibration are not those of `intervals`, at any seed
FINEST = 1e-6  # of a value: the smallest scale, or float32 rounding would be an error
CHANCE = 1e-6  # rows are refused if as many equal rows of the fit by chance this seldom

UNKNOWN_FIT = (
    "it is not known whether rows of the fit are among the calibration rows, since the program "
    "was loaded from a file, fitted with a transform, or not fitted by pyro_vae.fit"
)
ATTRIBUTES = {
    "reconstruction": "centre of the intervals: the posterior predictive mean of {site}",
    "lower": "lower bound of the conformal interval of {site}",
    "upper": "upper bound of the conformal interval of {site}",
    "model_lower": "lower bound of the model's own predictive interval of {site}",
    "model_upper": "upper bound of the model's own predictive interval of {site}",
}
TABLE = {
    "factor": "what the half-widths of the model's intervals are multiplied by",
    "num_rows": "number of calibration values",
    "coverage": "probability that the conformal interval holds a new value",
    "model_coverage": "share of the calibration values in the model's own intervals",
}


@dataclass(frozen=True, eq=False, repr=False)
class Conformal:
    """The calibration of the intervals of a program, as :func:`conformal` returns it.

    Arguments:
        program: The program.
        table: Over the dims of the site: `factor`, by which the half-widths of the model's
            intervals are multiplied; `num_rows`, the number n of calibration values of each
            column; `coverage`, the probability ceil((n + 1) prob) / (n + 1) that a new value is in
            its interval, exact if scores do not tie, else a lower bound; `model_coverage`, the
            share of the calibration values that are in the model's own intervals. Its `attrs` are
            the settings and `remark`, whether the rows of the fit were known.
        fill: What a hidden cell is replaced by, a value for each column of x; `None` if the
            intervals are for reconstructions.
    """

    program: nn.Module
    table: xr.Dataset
    fill: Tensor | None = None

    def intervals(
        self,
        x: object,
        *,
        context: object = None,
        weights: object = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> xr.Dataset:
        r"""Returns the interval of each value, beside the model's own.

        Arguments:
            x: The rows, shape (rows, \*event), in the form of the calibration rows. If the
                calibration was of cells, the cells to predict are those that are NaN.
            context: Covariates of the rows, shape (rows, \*context): `row["context"]` of the
                program.
            weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
            seed: The seed of the draws; if `None`, torch's global generator is used.
            progress: Whether to show a progress bar, on a terminal or in a notebook.

        Raises:
            ValueError: If the rows do not fit the program, their columns are not those of the
                calibration, or the calibration was of cells and none is NaN.

        Returns:
            A dataset with the dims `datum` and those of the site: `lower`, `upper`, `model_lower`,
            `model_upper` and `reconstruction`, in the units of x. If the calibration was of
            cells, they are NaN at the cells that x holds. A bound is infinite if the model gave
            no width to the intervals of too many calibration rows.
        """
        check = self.fill is None
        rows = read(x, self.program, context=context, weights=weights, check=check)
        is_asked: Any = True
        if self.fill is not None:
            is_asked = rows.field("x").double().isnan().cpu().numpy()
            if not is_asked.any():
                raise ValueError(
                    "Expected NaN in the cells of x that are to be predicted, since conformal was "
                    "called with cells; got none."
                )
            rows = _hide(rows, is_asked, self.fill)
        found = _predicted(self.program, rows, self.table.attrs, seed, progress=progress)
        event = self.table["factor"].shape
        if found["mean"].shape[1:] != event:
            raise ValueError(
                f"Expected rows with columns of shape {event}, as the calibration rows have; got "
                f"{found['mean'].shape[1:]}."
            )
        centre, *scales = _scales(found)
        with np.errstate(invalid="ignore"):
            down, up = (
                np.nan_to_num(self.table["factor"].to_numpy() * scale, nan=np.inf, posinf=np.inf)
                for scale in scales
            )
        values = {
            "lower": centre - down,
            "upper": centre + up,
            "model_lower": found["lower"].to_numpy(),
            "model_upper": found["upper"].to_numpy(),
            "reconstruction": centre,
        }
        attrs, dims = self.table.attrs, found["mean"].dims
        variables = {
            name: (
                dims,
                np.where(is_asked, value, math.nan),
                {
                    "long_name": ATTRIBUTES[name].format(site=attrs["site"]),
                    "units": f"those of {attrs['site']}",
                },
            )
            for name, value in values.items()
        }
        return xr.Dataset(variables, found.coords, attrs)

    def plot(self, *, ax: Axes | None = None) -> Canvas:
        """Draws the factor of each column: :func:`pyro_vae.plots.conformal`.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        return plots.conformal(self.table, ax=ax)

    def __repr__(self) -> str:
        attrs, table = self.table.attrs, self.table
        what = "reconstructions" if self.fill is None else "hidden cells"
        least, most = (int(f(table["num_rows"])) for f in (np.min, np.max))
        rows = f"{least}" if least == most else f"{least} to {most}"
        low, middle, high = np.quantile(table["factor"], [0.0, 0.5, 1.0])
        own = table["model_coverage"].to_numpy()
        return (
            f"Conformal intervals of {what} of {attrs['site']!r}, prob={attrs['prob']:g}, from "
            f"{rows} calibration values a column.\n"
            f"The model's own intervals hold {own.mean():.1%} of them (by column {own.min():.1%} "
            f"to {own.max():.1%}); their half-widths are multiplied by {middle:.2f} (median; "
            f"{low:.2f} to {high:.2f}).\n"
            f"Remark: {attrs['remark']}."
        )


@public
def conformal(
    program: nn.Module,
    calibration_rows: Any,
    *,
    prob: float = 0.9,
    cells: float | None = None,
    site: str | None = None,
    num_samples: int = 200,
    max_elements: int = MAX_ELEMENTS,
    context: Any = None,
    weights: Any = None,
    seed: int | None = None,
    progress: bool = True,
) -> Conformal:
    r"""Calibrates intervals by rows that were held out from the fit: split conformal prediction.

    The score of a value is its distance from the reconstruction, divided by the half-width of the
    model's predictive interval (:func:`pyro_vae.reconstruct`) on that side of it, but at least by
    the predictive standard deviation. The half-widths of the intervals of new rows are those of
    the model times a `factor` of the column: the k-th smallest of the n scores of that column,

    .. math:: k = \lceil (n + 1)\, \mathrm{prob} \rceil, \qquad
        P(x \in \text{interval}) = \frac{k}{n + 1} \text{ if scores do not tie, else more}

    This holds for any model and any guide, if the calibration rows and the new rows are drawn
    alike and are exchangeable. It is a mean over rows and over sets of calibration rows: the
    intervals of some kind of rows may hold less, and those of others more. It holds for each
    column on its own, not for all columns of a row at once. If all rows share latents, it holds up
    to the Monte Carlo error of their draws.

    A reconstruction has seen the row that it reconstructs. Its interval says how far values are
    from their own reconstructions, which a program that copies its input makes small; it does not
    say how well an unseen value is predicted. Intervals of `cells` do: each cell of the
    calibration rows is hidden at random with the probability `cells`, and is predicted from the
    cells that are left. The guide sees the column's median in place of a hidden cell, as the
    programs take no missing cells. The intervals are then valid for cells that are hidden
    completely at random, with that probability, up to the influence of one row on the medians.
    They are no guarantee for cells that are missing by another mechanism, such as those that are
    missing because of their value.

    References:
        Distribution-free predictive inference for regression (Lei et al., 2018), arXiv 1604.04173.
        Conformalized quantile regression (Romano et al., 2019), arXiv 1905.03222.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        calibration_rows: Rows that were not used in the fit, shape (rows, \*event), or a dict of
            tensors. Values that the program masks are not used.
        prob: The probability of the intervals. It needs n >= prob / (1 - prob) calibration
            values of each column, 9 for 0.9.
        cells: The probability with which cells are hidden, in (0, 1), for intervals of hidden
            cells; `None` for intervals of reconstructions.
        site: The name of the observed site. It is needed only if the model has several.
        num_samples: The number of draws S of x' for each row.
        max_elements: The approximate maximum number of elements of one tensor, to limit memory.
        context: Covariates of the rows, shape (rows, \*context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program. They do not
            weigh the scores.
        seed: The seed of the draws and of the hidden cells. With `None` torch's global generator
            is used.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Raises:
        ValueError: If the data do not fit the program, there are too few calibration rows, some of
            them are rows of the fit (by a digest of each row; rows of discrete values may be
            equal by chance, as often as rows of the fit are equal to each other), an argument is
            out of range, or the site has categories, which have no order.

    Returns:
        A :class:`Conformal`, with :meth:`Conformal.intervals`, a `table` by column, and
        :meth:`Conformal.plot`. It says if it is not known which rows the program was fitted to.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0)
        >>> x = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
        >>> calibrated = conformal(vae, x[:50], seed=0)
        >>> found = calibrated.intervals(x[50:], seed=1)
        >>> found["lower"].dims, round(float(calibrated.table["coverage"][0]), 3)
        (('datum', 'x_dim_0'), 0.902)
    """
    num_samples = checked_draws("num_samples", num_samples, least=2)
    if not is_number(prob) or not 0.0 < prob < 1.0:
        raise ValueError(f"Expected prob with 0 < prob < 1; got {short(prob)}.")
    if cells is not None and (not is_number(cells) or not 0.0 < cells < 1.0):
        raise ValueError(f"Expected cells with 0 < cells < 1, or None; got {short(cells)}.")
    prob = float(prob)
    programs_of(program)
    rows = read(calibration_rows, program, context=context, weights=weights)
    least = math.ceil(prob / (1.0 - prob) - ROUNDING)
    if len(rows) < least:
        raise ValueError(
            f"Expected at least {least} calibration rows for intervals of probability {prob:g}; "
            f"got {len(rows)}. Hold out more rows, or lower prob."
        )
    remark = _remark_on_fit(program, rows)
    given = {"site": site, "prob": prob, "num_samples": num_samples, "max_elements": max_elements}
    few = _predicted(program, rows[:2], given, 0, progress=False)
    attrs = {**given, "site": few.attrs["site"], "remark": remark}
    values = _observed(program, rows, few.attrs["site"])
    fill = None
    with seeded(None if seed is None else seed ^ OTHER_DRAWS):
        if cells is not None:
            x = rows.field("x")
            if not np.array_equal(values, x.double().cpu(), equal_nan=True):
                raise ValueError(
                    "Expected a program whose site observes x as it is, for intervals of cells; "
                    f"the values of the site {attrs['site']!r} are others. Leave cells out."
                )
            fill = torch.nanmedian(x.double(), 0).values.to(x.dtype)
            hidden = (torch.rand(x.shape) < float(cells)).numpy()
            rows, values = _hide(rows, hidden, fill), np.where(hidden, values, math.nan)
            attrs["cells"] = float(cells)
        found = _predicted(program, rows, attrs, None, progress=progress)
    return Conformal(program, _calibrated(values, found, least, attrs), fill)


def _calibrated(
    values: np.ndarray, found: xr.Dataset, least: int, attrs: dict[str, Any]
) -> xr.Dataset:
    """The table of a :class:`Conformal`, from the calibration values, NaN where not used."""
    own = {name: found.coords[name] for name in found["mean"].dims[1:]}
    count = (~np.isnan(values)).sum(0)
    if (count < least).any():
        place = [int(i) for i in np.argwhere(count < least)[0]]
        name = place_name(place, count.shape, [labels.to_numpy() for labels in own.values()])
        raise ValueError(
            f"Expected at least {least} calibration values of each column for intervals of "
            f"probability {attrs['prob']:g}; {name} has {count[tuple(place)]}. Hold out more "
            "rows, lower prob, or hide more cells."
        )
    centre, down, up = _scales(found)
    distance = values - centre
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.abs(distance) / np.where(distance > 0.0, up, down)
    scores = np.sort(np.where(distance == 0.0, 0.0, scores), axis=0)  # NaN are the last
    rank = np.ceil((count + 1) * attrs["prob"] - ROUNDING).astype(int)
    is_inside = (values >= found["lower"].to_numpy()) & (values <= found["upper"].to_numpy())
    columns = {
        "factor": np.take_along_axis(scores, rank[None] - 1, axis=0)[0],
        "num_rows": count,
        "coverage": rank / (count + 1),
        "model_coverage": is_inside.sum(0) / count,
    }
    about = {name: {"long_name": TABLE[name], "units": "1"} for name in columns}
    variables = {name: (tuple(own), array, about[name]) for name, array in columns.items()}
    return xr.Dataset(variables, own, attrs)


def _remark_on_fit(program: nn.Module, rows: Rows) -> str:
    """Refuses rows of the fit, and says what is known of it."""
    if (fitted := vars(program).get("fitted_rows")) is None:
        return UNKNOWN_FIT
    from scipy.special import bdtrc  # importing SciPy adds a filter of warnings

    is_fitted = np.isin(row_digests(rows), fitted)
    _, counts = np.unique(fitted, return_counts=True)
    share, found = counts[counts > 1].sum() / len(fitted), int(is_fitted.sum())
    if found and bdtrc(found - 1, len(rows), share) < CHANCE:
        raise ValueError(
            f"{found} of the {len(rows)} calibration rows are rows of the fit, the first is row "
            f"{shown(rows.labels, int(is_fitted.argmax()))}; their scores would be too small. "
            "Calibrate by rows that fit did not get, as x or as validation."
        )
    if found:
        return f"{found} calibration rows equal rows of the fit, no more than by chance"
    return "no rows of the fit are among the calibration rows"


def _predicted(
    program: nn.Module, rows: Rows, attrs: Mapping[str, Any], seed: int | None, *, progress: bool
) -> xr.Dataset:
    options = {k: attrs[k] for k in ("site", "prob", "num_samples", "max_elements")}
    found = reconstruct(program, rows, seed=seed, progress=progress, **options)
    if "mean" not in found:
        raise ValueError(
            f"The site {found.attrs['site']!r} has categories, which have no order, so that there "
            "are no intervals: see the probabilities of pyro_vae.reconstruct."
        )
    return found


def _observed(program: nn.Module, rows: Rows, site: str) -> np.ndarray:
    """The values of a site, shape (rows, ...), as float64, NaN where masked."""
    model, _ = programs_of(program)
    with seeded(0), evaluating(program):
        known = structure(program, rows.head(2, program))
        pieces = []
        for piece in rows.chunks(AT_ONCE):
            nodes = trace_of(model, piece.to_like(program).x).nodes
            pieces.append(observed_cells(nodes[site], known).double().cpu())
    return torch.cat(pieces).numpy()


def _hide(rows: Rows, hidden: np.ndarray, fill: Tensor) -> Rows:
    """Replaces hidden cells of x by the fill of their columns."""
    x = rows.field("x")
    filled = torch.where(torch.from_numpy(hidden).to(x.device), fill.to(x), x)
    return replace(rows, x={**rows.fields, "x": filled} if isinstance(rows.x, dict) else filled)


def _scales(found: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centre of each predictive distribution, and its scales below and above it."""
    mean, lower, upper, error = (found[n].to_numpy() for n in ("mean", "lower", "upper", "mcse"))
    centre = np.where(np.isnan(mean), (lower + upper) / 2.0, mean)
    deviation = error * math.sqrt(found.attrs["num_samples"])
    least = np.fmax(deviation, FINEST * np.abs(centre))
    return centre, np.fmax(centre - lower, least), np.fmax(upper - centre, least)
