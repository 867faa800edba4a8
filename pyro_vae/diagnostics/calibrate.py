"""Simulation-based calibration: whether the guide is the posterior, on data of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .. import plots
from ..data.checks import checked_draws, is_number
from ..data.read import read
from ..data.rows import Rows, floating_like
from ..data.source import Row
from ..data.table import Table
from ..elbos.chunks import MAX_ELEMENTS, Plan, data_sites
from ..elbos.log_densities import (
    Structure,
    draw,
    programs_of,
    refuse_shared,
    structure,
)
from ..engine.progress import progress_bar
from ..engine.running import Site, evaluating, public, seeded
from ..prediction.labels import unit_labels
from ..prediction.sample import sample_sites
from ..prediction.traces import guide_trace, trace_of, values_by_row
from .uniformity import band, holm, pit_of, symmetry_p_value, uniformity_p_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Calibration", "calibrate"]

ALPHA = 0.05
CENTRAL = 0.9
CANDIDATES = 20  # of each row that is selected near the given ones
EMBEDDING_DRAWS = 64
MATCHED = 64  # rows by whose values sites are matched with fields
QUANTILES = (0.158655, 0.5, 0.841345)  # of a normal distribution at -1, 0 and 1
ROUNDING = 64.0  # units in the last place by which equal log-densities may differ
MOST_NAMED = 6
CHECKS = ("SBC", "VSBC", "TARP")
LOGS = ("log p(z)", "log p(x | z)", "log p(x, z)")
TARP = "all latents"
UNREADABLE = (
    "The data of the observed site {!r} are not columns of one field of a row, so simulated data "
    "cannot be given to the guide: pass rows that hold its values as they are."
)
NOT_SIMULATED = (
    "A pyro.factor ({}) changes the density of the model but not its simulated rows, so the guide "
    "cannot be tested by simulation: write it as a distribution of a latent or an observed site."
)
NOT_FINITE = (
    "The model simulates infinite or NaN values of {!r} in {} of {} rows, so its guide cannot be "
    "tested. Check the scale of the likelihood, or train longer."
)
NOT_NUMBERS = (
    "The guide draws infinite or NaN latents in {} of {} rows, so it cannot be tested. Train it "
    "on rows of the whole range of the model."
)
UNFAITHFUL = (
    "The model gives simulated rows another log p(x, z) than it simulated them with, because it "
    "reads the data for more than its observed sites: its guide cannot be tested by simulation."
)


@public
def calibrate(
    program: nn.Module,
    x: object = None,
    *,
    num_simulations: int = 1000,
    num_samples: int = 100,
    context: object = None,
    weights: object = None,
    near: bool = True,
    num_candidates: int | None = None,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Tests whether the guide q(z | x) is the posterior, on rows simulated from the model.

    .. math:: z^* \sim p(z), \quad x^* \sim p(x \mid z^*), \quad
        z_1, \ldots, z_L \sim q(z \mid x^*)

    If q is the posterior, :math:`z^*` and the L draws are exchangeable given :math:`x^*`. Then the
    share of draws below :math:`z^*`, the probability integral transform (PIT), is uniform on
    (0, 1), in each latent dimension and for each function of z and x. Ties are broken at random,
    so this is exact for any L and for discrete latents. Nothing is fitted again. The checks are:

    - SBC: the PIT of each latent dimension, and of log p(z), log p(x | z) and log p(x, z), is
      uniform. It sees a q that is too narrow, too wide or shifted. It cannot see errors that
      cancel over the simulated rows. In particular, a q that ignores x and equals the prior is
      right in each latent dimension; log p(x | z) shows it. Wrong correlations of the latents are
      seen through the log-densities at most.
    - VSBC: the PIT of each latent dimension is symmetric around 1/2. It sees a shift. It cannot
      see a wrong scale: it flagged a scale of 0.7 or 1.4 in 8 to 10 % of cases. A shift that has
      either sign, by the row, cancels.
    - TARP: the share of draws that are closer than :math:`z^*` to a random point is uniform, where
      each dimension is measured in units of its spread under the prior. It sees a wrong scale of
      all latents together. It hardly sees a shift, because points lie on all sides: a shift of
      0.3 standard deviations was flagged in 3 to 40 % of cases with few latents (in 88 % where all
      of 8 latents were shifted). It cannot see that q ignores x.

    The rows are the model's own, so a pass says nothing about the fit of the model to data: it
    says that q is the posterior where the model is right. An average over all rows of the prior
    can hide faults where data are, and show faults where none are. With `x` the test is made near
    the data: many rows are simulated, and those are selected whose mean of z under q is nearest to
    that of one of the given rows, in units of the guide's standard deviation. The selection
    depends on the simulated :math:`x^*` alone. To select by :math:`z^*` would be wrong:
    even an exact guide would fail then.

    With x, rows are simulated with the covariates (`context`, `weights` and other fields) of
    rows drawn at random from those given.

    References:
        Validating Bayesian inference algorithms with simulation-based calibration (Talts et al.,
        2018), arXiv 1804.06788.
        Simulation-based calibration checking for Bayesian computation: the choice of test
        quantities shapes sensitivity (Modrák et al., 2023), arXiv 2211.02383.
        Yes, but did it work?: Evaluating variational inference (Yao et al., 2018),
        arXiv 1802.02538.
        Sampling-based accuracy testing of posterior estimators for general inference (Lemos et
        al., 2023), arXiv 2302.03026.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`. Each observed site must take its
            data from one field of a row.
        x: Rows, shape (rows, *event), or a dict of such, near which the guide is tested. A model
            that cannot run without data needs them.
        num_simulations: The number of simulated rows.
        num_samples: The number of draws L from the guide for each of them.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        near: Whether rows near x are selected. With `False`, x gives only the covariates.
        num_candidates: The number of rows that are simulated in order to select from them; by
            default 20 times `num_simulations`.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws. With `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        A :class:`Calibration`.

    Raises:
        ValueError: If `program` is not a program, if it has sites that all rows share, if the
            model cannot run without data and x is `None`, if simulated data cannot be put into a
            row that the guide reads, or if simulated data or draws are infinite or NaN.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> found = calibrate(vae, num_simulations=100, num_samples=20, seed=0)
        >>> found.table[found.table["check"] == "TARP"]["quantity"].to_list()
        ['all latents']
        >>> found.pit.columns.to_list()
        ['z[0]', 'z[1]', 'log p(z)', 'log p(x | z)', 'log p(x, z)', 'all latents']
    """
    num_simulations = checked_draws("num_simulations", num_simulations, least=2)
    num_samples = checked_draws("num_samples", num_samples, least=2)
    if num_candidates is None:
        num_candidates = CANDIDATES * num_simulations
    num_candidates = checked_draws("num_candidates", num_candidates, least=num_simulations)
    programs_of(program)
    rows = None
    if x is None:
        drawn = sample_sites(program, 2, x=None, context=context, weights=weights, seed=0)
        few: Row = drawn if len(drawn) > 1 else next(iter(drawn.values()))
    else:
        rows = read(x, program, context=context, weights=weights)
        few = rows.head(MATCHED, program)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    is_near = near and rows is not None
    candidates = num_candidates if is_near else num_simulations
    total = candidates + num_simulations
    with (
        seeded(seed),
        evaluating(program),
        progress_bar(total, "calibration", " rows", progress=progress) as bar,
    ):
        simulator = _Simulator.of(program, rows, few)
        simulated, distances = simulator.simulate(
            num_simulations, candidates, max_elements, is_near=is_near, tick=bar.update
        )
        names, values = simulator.pits(
            simulated, num_samples, max_elements, np.random.default_rng(seed), bar.update
        )
    pit = Table(values, columns=names)
    table = _table(pit)
    table.attrs = {
        "num_simulations": num_simulations,
        "num_samples": num_samples,
        "seed": seed,
        "alpha": ALPHA,
        "near": is_near,
    }
    if is_near:
        table.attrs["num_candidates"] = candidates
        table.attrs["median_distance"] = float(np.median(distances))
        table.attrs["largest_distance"] = float(distances.max())
    return Calibration(table, pit)


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """The checks of a guide that :func:`calibrate` returns.

    Arguments:
        table: A line a check and quantity:

            - `check`: SBC, VSBC or TARP; and `quantity`, a latent dimension (`z[0]`, ...), a
              log-density, or all latents together;
            - `p_value`, uniform on (0, 1) if the guide is the posterior, and `p_holm`, adjusted
              for the number of lines by Holm's method;
            - `flagged`: whether `p_holm` is below 0.05. An exact guide has a flagged line in at
              most 5 % of cases;
            - `shift`, the mean of the PIT's normal scores: by how many standard deviations of the
              guide the true values are too high for it, about 0 for an exact guide; and
              `coverage`, the share of true values in the guide's central 90 % intervals, below 0.9
              for a guide that is too narrow. For lines of SBC alone.

            Its `attrs` hold `num_simulations`, `num_samples`, `seed`, `alpha` and `near`, and with
            x the number of candidates, and the median and the largest distance of a selected row
            to the nearest given one, in units of the guide's standard deviation.
        pit: The PIT of each quantity, a line a simulated row; the last column is that of TARP.
    """

    table: pd.DataFrame
    pit: pd.DataFrame

    def __repr__(self) -> str:
        text = self.table.to_string(float_format="{:.3g}".format, na_rep="", index=False)
        return f"{text}\n\n{self.summary()}"

    def summary(self) -> str:
        """Describes in sentences which checks fail, and what that means."""
        attrs, flagged = self.table.attrs, self.table[self.table["flagged"]]
        where = "from the model"
        if attrs["near"]:
            where += (
                " near the given rows (the median distance to the nearest is "
                f"{attrs['median_distance']:.2g} standard deviations of the guide)"
            )
        lines = [
            f"{attrs['num_simulations']} rows were simulated {where}, with "
            f"{attrs['num_samples']} draws from the guide for each."
        ]
        level = f"at {attrs['alpha']:.0%} for all {len(self.table)} checks together (Holm)"
        if flagged.empty:
            lines.append(
                f"No check is flagged {level}: nothing here tells the guide from the posterior."
            )
        else:
            lines.append(
                f"The guide is not the posterior: {len(flagged)} of the checks are flagged, "
                f"{level}."
            )
        for check, part in flagged.sort_values("p_value").groupby("check", sort=False):
            named = [
                str(line["quantity"])
                if check != "SBC" or line["quantity"] in LOGS
                else f"{line['quantity']} (its central {CENTRAL:.0%} intervals hold "
                f"{line['coverage']:.0%} of the true values, which are {abs(line['shift']):.2f} "
                f"standard deviations {'above' if line['shift'] > 0 else 'below'} the guide on "
                "average)"
                for _, line in part.head(MOST_NAMED).iterrows()
            ]
            more = f" and {len(part) - MOST_NAMED} more" if len(part) > MOST_NAMED else ""
            lines.append(f"{check} flags {', '.join(named)}{more}.")
        lines.append(
            "This tests the guide on the model's own data, and not the model on real data."
        )
        return " ".join(lines)

    def band(self, alpha: float = ALPHA) -> tuple[np.ndarray, np.ndarray]:
        """Returns a simultaneous band of the distribution function of the PIT of an exact guide.

        Arguments:
            alpha: The probability with which the function leaves the band at any of the points
                0.01, 0.02, ..., 0.99.

        Returns:
            The smallest and the largest number of rows whose PIT is up to each point, (99,).

        Raises:
            ValueError: If `alpha` is not between 0 and 1.
        """
        if not is_number(alpha) or not 0 < alpha < 1:
            raise ValueError(f"Expected alpha to be between 0 and 1; got {alpha!r}.")
        return band(len(self.pit), alpha)

    def plot(self, *, ax: Axes | None = None) -> Canvas:
        """Draws the distribution functions of the PIT: :func:`pyro_vae.plots.calibration`.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        return plots.calibration(self, ax=ax)


@dataclass(frozen=True, eq=False)
class _Simulator:
    """Simulates rows from a model, and compares their latents with draws from the guide.

    Simulated rows are a flat dict of tensors whose first dim is the rows: `"row.*"` are the fields
    that the guide reads, `"site.*"` the values of the latent sites, and `"log_joint"`.

    Arguments:
        program: The program, in evaluation mode.
        rows: The given rows, from which covariates are drawn, if there are any.
        known: The sites and plates of the program.
        fields: The field of the given rows, and its columns, from which each observed site takes
            its data.
    """

    program: nn.Module
    rows: Rows | None
    known: Structure
    fields: dict[str, tuple[str, Tensor]]

    @classmethod
    def of(cls, program: nn.Module, rows: Rows | None, few: Row) -> _Simulator:
        """Finds the sites of a program, and the columns that each observed site takes."""
        known = structure(program, few)
        refuse_shared(known.global_latents + known.global_observed)
        if factors := sorted({*known.observed} - {*data_sites(known)}):
            raise ValueError(NOT_SIMULATED.format(", ".join(factors)))
        if rows is None:
            return cls(program, rows, known, {})
        nodes = trace_of(programs_of(program)[0], few).nodes
        given = few if isinstance(few, dict) else {"x": few}
        fields = {}
        for name in data_sites(known):
            own = values_by_row(nodes[name])
            own = own.reshape(len(own), -1)
            for field in sorted(given, key=lambda field: (field != name, field != "x")):
                columns = _columns(own, given[field].reshape(len(own), -1).to(own))
                if columns is not None:
                    fields[name] = field, columns
                    break
            else:
                raise ValueError(UNREADABLE.format(name))
        return cls(program, rows, known, fields)

    def row(self, simulated: Mapping[str, Tensor]) -> Row:
        """Returns simulated rows as the guide reads them."""
        fields = {n[4:]: values for n, values in simulated.items() if n.startswith("row.")}
        is_dict = isinstance(self.rows.x, dict) if self.rows else len(fields) > 1
        return fields if is_dict else next(iter(fields.values()))

    def draw(self, count: int) -> dict[str, Tensor]:
        """Draws latents from the prior, and data given them."""
        known, fields = self.known, {}
        free = poutine.uncondition(programs_of(self.program)[0])
        if self.rows is None:
            drawn = draw(free, free, (), {"size": count}, 1, known.max_plate_nesting)
        else:
            index = torch.randint(len(self.rows), (count,)).to(self.rows.device)
            row = self.rows.select(index, self.program)
            drawn = draw(free, free, (row,), {}, 1, known.max_plate_nesting)
            fields = dict(row) if isinstance(row, dict) else {"x": row}
        found = drawn.densities()
        for name in data_sites(known):
            data = found.values[name][0]
            if bad := int((~data.isfinite()).reshape(count, -1).any(1).sum()):
                raise ValueError(NOT_FINITE.format(name, bad, count))
            if self.rows is None:
                fields[name] = data
            else:
                field, columns = self.fields[name]
                values = fields[field].reshape(count, -1).clone()
                values[:, columns] = data.reshape(count, -1).to(values)
                fields[field] = values.reshape(fields[field].shape)
        simulated = {f"row.{name}": values for name, values in fields.items()}
        for name in known.latents:
            site: Site = drawn.guide.nodes[name]
            dim = known.rows_dim - len(known.event_shapes[name])
            simulated[f"site.{name}"] = site["value"].movedim(dim, 0)
        return simulated | {"log_joint": found.log_joint[0]}

    def means(self, row: Row) -> np.ndarray:
        """Returns the mean and the variance of the latents of rows, shape (2, rows, units)."""
        nodes = guide_trace(self.program, row, EMBEDDING_DRAWS, self.known).nodes
        values = [values_by_row(nodes[name]) for name in self.known.latents]
        joined = torch.cat([v.reshape(*v.shape[:2], -1).double() for v in values], 2)
        if bad := int((~joined.isfinite()).any(2).any(0).sum()):
            raise ValueError(NOT_NUMBERS.format(bad, joined.shape[1]))
        return torch.stack([joined.mean(0), joined.var(0)]).cpu().numpy()

    def simulate(
        self,
        count: int,
        candidates: int,
        max_elements: int,
        *,
        is_near: bool,
        tick: Callable[[int], object],
    ) -> tuple[dict[str, Tensor], np.ndarray]:
        """Simulates candidates, and selects those that are nearest to the given rows.

        Unless `is_near`, the distances are 0, and there are as many candidates as rows.

        Returns:
            The selected rows, and their distances to the nearest given row, shape (count,).
        """
        from scipy.spatial import KDTree

        few = read(self.row(self.draw(3)), self.program, check=False)
        elements = Plan.of(self.program, few, 2, max_elements).elements
        at_once = max(1, max_elements // (elements * EMBEDDING_DRAWS))
        scale, tree = np.ones(1), None
        if is_near and self.rows is not None:
            given = [
                self.means(rows.to_like(self.program).x) for rows in self.rows.chunks(at_once)
            ]
            means, variances = np.concatenate(given, axis=1)
            scale = np.sqrt(variances.mean(0))
            scale[scale == 0] = 1
            tree = KDTree(means / scale)
        kept: dict[str, Tensor] = {}
        for start in range(0, candidates, at_once):
            drawn = self.draw(min(at_once, candidates - start))
            distances = np.zeros(len(drawn["log_joint"]))
            if tree is not None:
                distances, _ = tree.query(self.means(self.row(drawn))[0] / scale)
            drawn["distance"] = torch.as_tensor(distances).to(drawn["log_joint"].device)
            kept = {n: torch.cat([kept[n], v]) if kept else v for n, v in drawn.items()}
            nearest = kept["distance"].argsort(stable=True)[:count]
            kept = {name: values[nearest] for name, values in kept.items()}
            tick(len(distances))
        return kept, kept.pop("distance").cpu().numpy()

    def pits(
        self,
        simulated: Mapping[str, Tensor],
        num_samples: int,
        max_elements: int,
        rng: np.random.Generator,
        tick: Callable[[int], object],
    ) -> tuple[list[str], np.ndarray]:
        """Returns the names of the quantities, and their PIT, shape (rows, quantities)."""
        rows = read(self.row(simulated), self.program, check=False)
        plan = Plan.of(self.program, rows, num_samples + 1, max_elements)
        truth = {n: v for n, v in simulated.items() if n.startswith("site.")}
        flat = torch.cat([v.flatten(1).double() for v in truth.values()], 1).cpu().numpy()
        low, middle, high = np.quantile(flat, QUANTILES, axis=0)
        scale = np.where(high > low, (high - low) / 2, 1)
        reference = middle + scale * rng.normal(size=flat.shape)
        rounding = ROUNDING * torch.finfo(floating_like(self.program).dtype).eps
        found = []
        for piece in plan.pieces():
            row = rows.select(piece, self.program)
            sites = {name[5:]: values[piece] for name, values in truth.items()}
            parts = [self.compared(row, sites, count) for count in plan.parts(num_samples)]
            first, *others = parts
            latents, logs = (
                np.concatenate([first[i], *(part[i][1:] for part in others)]) for i in (0, 1)
            )
            expected = simulated["log_joint"][piece].cpu().numpy()
            is_same = np.isclose(logs[0, :, -1], expected, rtol=0.01, atol=0.01, equal_nan=True)
            if is_same.mean() < 0.99:
                raise ValueError(UNFAITHFUL)
            distances = np.square((latents - reference[piece]) / scale).sum(2, keepdims=True)
            pits = pit_of(latents, rng), pit_of(logs, rng, rounding), pit_of(distances, rng)
            found.append(np.concatenate(pits, axis=1))
            tick(len(expected))
        return [*first[2], *LOGS, TARP], np.concatenate(found)

    def compared(
        self, row: Row, sites: Mapping[str, Tensor], count: int
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Draws from the guide, and puts the true latents before the draws.

        Returns:
            The latents, shape (1 + count, rows, units), the log-densities, shape
            (1 + count, rows, 3), and the labels of the units.
        """
        model, guide = programs_of(self.program)
        nesting = self.known.max_plate_nesting
        planted = _Planted(sites, self.known.rows_dim)
        found = draw(model, guide, (row,), {}, count + 1, nesting, planted).densities()
        values = [found.values[name] for name in self.known.latents]
        parts = [value.reshape(*value.shape[:2], -1).double() for value in values]
        latents = torch.cat(parts, 2).cpu().numpy()
        if bad := int((~np.isfinite(latents)).any((0, 2)).sum()):
            raise ValueError(NOT_NUMBERS.format(bad, latents.shape[1]))
        logs = torch.stack([found.log_prior, found.reconstruction, found.log_joint], 2)
        shapes = {name: tuple(found.values[name].shape[2:]) for name in self.known.latents}
        units = [label for name, shape in shapes.items() for label in unit_labels(name, shape)]
        return latents, logs.nan_to_num(-math.inf, math.inf, -math.inf).cpu().numpy(), units


class _Planted(Messenger):  # type: ignore[misc]
    """Effect handler that replaces the first of the draws of each site by given values.

    Arguments:
        values: For each site the values, the rows first.
        rows_dim: The dim of the plate `"data"`, negative.
    """

    def __init__(self, values: Mapping[str, Tensor], rows_dim: int) -> None:
        super().__init__()
        self.values, self.rows_dim = values, rows_dim

    def _pyro_post_sample(self, msg: Site) -> None:
        if msg["name"] in self.values:
            value, dim = msg["value"], self.rows_dim - len(msg["fn"].event_shape)
            first = self.values[msg["name"]].movedim(0, dim).to(value)
            msg["value"] = torch.cat([first.expand(1, *value.shape[1:]), value[1:]])


def _columns(own: Tensor, values: Tensor) -> Tensor | None:
    """Finds the columns of a field that hold the columns of a site, `None` if they do not.

    Arguments:
        own: Some rows of the site, shape (rows, n).
        values: The same rows of the field, shape (rows, m).
    """
    if torch.equal(own, values):
        return torch.arange(own.shape[1], device=own.device)
    is_same = (values[:, None, :] == own[:, :, None]).all(0)
    columns = is_same.int().argmax(1)
    is_found = is_same.any(1).all() and len(columns.unique()) == len(columns)
    return columns if is_found else None


def _table(pit: pd.DataFrame) -> Table:
    """Tests the PIT of each quantity."""
    from scipy.special import ndtri

    lines: list[dict[str, Any]] = []
    for quantity in pit.columns:
        values = pit[quantity].to_numpy()
        line = {"check": "SBC", "quantity": quantity, "p_value": uniformity_p_value(values)}
        if quantity == TARP:
            lines.append(line | {"check": "TARP"})
            continue
        is_central = np.abs(values - 0.5) <= CENTRAL / 2
        lines.append(line | {"shift": ndtri(values).mean(), "coverage": is_central.mean()})
        if quantity not in LOGS:
            lines.append(line | {"check": "VSBC", "p_value": symmetry_p_value(values)})
    lines.sort(key=lambda line: CHECKS.index(line["check"]))
    table = Table(lines)
    table.insert(3, "p_holm", holm(table["p_value"].to_numpy()))
    table.insert(4, "flagged", table["p_holm"] < ALPHA)
    return table
