"""The data that programs score, cell by cell, and whether they are the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import (
    Delta,
    ExpandedDistribution,
    MaskedDistribution,
    MaskedMixture,
    ZeroInflatedDistribution,
    constraints,
)
from torch import Tensor, nn
from torch.distributions import Independent, TransformedDistribution, biject_to

from ..data.rows import Rows
from ..elbos.chunks import Plan, data_sites
from ..elbos.log_densities import Structure, programs_of, sum_to_rows
from ..engine.running import Site, evaluating, seeded
from ..prediction.labels import unit_labels
from ..prediction.traces import trace_of

__all__ = ["Observed", "base_measures", "check_same_data", "observed_cells"]

TOLERANCE = 1e-5  # relative to a value and to its column: float32 rounding, not other units
FACTORS = "the sum of pyro.factor"
DENSITY, MASS, MIXED = "density", "mass function", "mixture of mass and density"
ADVICE = "Their log p(x) cannot be compared. All must score the same values in the same units."


@dataclass(frozen=True, eq=False)
class Observed:
    """The data that a program scores.

    Arguments:
        values: The values, shape (rows, cells), NaN where masked. The last cell is what all
            `pyro.factor` sites together add to log p(x).
        names: The name of each cell, such as `"x[2]"`.
        measures: What the program has for each cell: the result of :func:`base_measures`.
    """

    values: np.ndarray
    names: list[str]
    measures: np.ndarray

    @classmethod
    def of(cls, program: nn.Module, rows: Rows, max_elements: int) -> "Observed":
        """Finds the observed sites by traces of the model at one draw of each row.

        Arguments:
            program: The program.
            rows: Its data.
            max_elements: About how many elements one tensor may have.

        Raises:
            ValueError: If it is not a program, or has sites outside the plate `"data"`.
        """
        model, guide = programs_of(program)
        pieces: list[np.ndarray] = []
        with seeded(0), evaluating(program):
            plan = Plan.of(program, rows, 1, max_elements)
            known = plan.structure
            for piece in plan.pieces():
                x = rows.select(piece, program)
                replayed = poutine.replay(model, trace=trace_of(guide, x))
                nodes = trace_of(replayed, x).nodes
                cells = {name: observed_cells(nodes[name], known) for name in data_sites(known)}
                parts = [cell.double().reshape(len(cell), -1).cpu() for cell in cells.values()]
                added = torch.zeros(piece.stop - piece.start, dtype=torch.float64)
                for name in set(known.observed) - cells.keys():
                    site: Site = nodes[name]
                    log_prob = site["fn"].log_prob(site["value"])
                    added = added + sum_to_rows(log_prob, site).double().cpu()
                pieces.append(torch.cat([*parts, added[:, None]], dim=1).numpy())
        shapes = {name: tuple(cell.shape[1:]) for name, cell in cells.items()}
        names = [label for name, shape in shapes.items() for label in unit_labels(name, shape)]
        measures = []
        for name, shape in shapes.items():
            law: Any = nodes[name]["fn"]
            own = base_measures(law, tuple(law.shape()))
            own = own[(0,) * len(law.batch_shape)]
            measures += np.broadcast_to(own, shape).ravel().tolist()
        return cls(np.concatenate(pieces), [*names, FACTORS], np.array([*measures, DENSITY]))

    def order(self) -> np.ndarray:
        """Returns an order of the cells that depends on their values, not on the sites.

        Cells of equal values are in the order of their base measures.
        """
        weights = np.random.default_rng(0).normal(size=len(self.values))
        values = np.nan_to_num(self.values, nan=-math.pi, posinf=1e30, neginf=-1e30)
        sums, scales = weights @ values, np.abs(weights) @ np.abs(values)
        order = np.argsort(sums)
        is_new = np.diff(sums[order], prepend=-np.inf) > TOLERANCE * scales[order]
        groups = np.empty(len(order), dtype=int)
        groups[order] = np.cumsum(is_new)
        return np.lexsort((sums, self.measures, groups))


def check_same_data(found: Mapping[str, Observed], labels: np.ndarray) -> None:
    """Checks that programs score the same values, cell by cell, in any order of the cells.

    Arguments:
        found: The data of each program, by name.
        labels: The labels of the rows, shape (rows,).

    Raises:
        ValueError: If a program scores another number of values, other values, or other cells
            than the first (by a mask), if a `pyro.factor` adds something else, or if one has a
            mass function where the other has a density.
    """
    (first, one), *others = found.items()
    for name, other in others:
        pair = f"The programs {first!r} and {name!r}"
        if len(one.names) != len(other.names):
            raise ValueError(
                f"{pair} score different data: {len(one.names) - 1} values of each row "
                f"({_listed(one)}), and {len(other.names) - 1} ({_listed(other)}). {ADVICE}"
            )
        place = _first_difference(one.values, other.values)
        columns = np.arange(len(one.names)), np.arange(len(other.names))
        if place is not None or (one.measures != other.measures).any():
            ordered = one.order(), other.order()
            if _first_difference(one.values[:, ordered[0]], other.values[:, ordered[1]]) is None:
                place, columns = None, ordered
        if place is not None:
            row, cell = place
            raise ValueError(
                f"{pair} score different data: in row {labels[row]}, "
                f"{one.names[cell]} {_shown(one.values[place])} in {first!r}, and "
                f"{other.names[cell]} {_shown(other.values[place])} in {name!r}. {ADVICE}"
            )
        is_scored = ~np.isnan(one.values).all(axis=0)[columns[0]]
        is_mixed = (one.measures[columns[0]] != other.measures[columns[1]]) & is_scored
        if is_mixed.any():
            cell, its = min(zip(*(own[is_mixed] for own in columns), strict=True))
            raise ValueError(
                f"{pair} have different base measures: a {one.measures[cell]} and a "
                f"{other.measures[its]} for {one.names[cell]}. Their log p(x) cannot be compared: "
                "a mass function has no units, and a density has those of its values."
            )


def base_measures(law: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Names for each cell of a distribution what log p is relative to.

    Arguments:
        law: The distribution of an observed site.
        shape: The shape of its values, batch and event.

    Returns:
        For each cell `"mass function"`, `"density"`, `"mixture of mass and density"`, or for
        example `"density in 2 of 3 dimensions"` (on the simplex), an array of that shape.

    Example:
        >>> import pyro.distributions as dist
        >>> base_measures(dist.Poisson(torch.ones(2)), (2,)).tolist()
        ['mass function', 'mass function']
    """
    match law:
        case Independent() | ExpandedDistribution() | MaskedDistribution():
            return base_measures(law.base_dist, shape)
        case TransformedDistribution():  # torch takes its support for continuous
            base: Any = law.base_dist
            if (base_measures(base, tuple(base.batch_shape + base.event_shape)) == MASS).any():
                return np.full(shape, MASS)
        case ZeroInflatedDistribution():
            base = base_measures(law.base_dist, shape)
            return np.where(base == DENSITY, MIXED, base)
        case MaskedMixture():
            one, other = (base_measures(c, shape) for c in (law.component0, law.component1))
            return np.where(one == other, one, MIXED)
        case Delta():
            return np.full(shape, MASS)
    try:
        return _measures_on(law.support, shape)
    except (NotImplementedError, AttributeError):  # a distribution without a support
        return np.full(shape, DENSITY)


def _measures_on(support: Any, shape: tuple[int, ...]) -> np.ndarray:
    match support:
        case constraints.independent():
            return _measures_on(support.base_constraint, shape)
        case constraints.stack():
            shape = tuple(np.delete(shape, support.dim))
            return np.stack([_measures_on(c, shape) for c in support.cseq], axis=support.dim)
        case constraints.cat():
            axis, sizes = support.dim, list(shape)
            parts = []
            for part, sizes[axis] in zip(support.cseq, support.lengths, strict=True):
                parts.append(_measures_on(part, tuple(sizes)))
            return np.concatenate(parts, axis=axis)
    if support.is_discrete:
        return np.full(shape, MASS)
    event = shape[len(shape) - support.event_dim :]
    free = math.prod(biject_to(support).inverse_shape(event)) if event else 1
    size = math.prod(event)
    return np.full(shape, DENSITY if free == size else f"{DENSITY} in {free} of {size} dimensions")


def _first_difference(one: np.ndarray, other: np.ndarray) -> tuple[int, int] | None:
    """The row and the cell of the first difference, if there is one. NaN equals NaN."""
    with np.errstate(invalid="ignore"):  # the difference of two infinite values
        spread = np.abs(np.nan_to_num(one)).mean(axis=0)
        is_close = np.abs(one - other) <= TOLERANCE * (np.abs(one) + spread)
    is_same = is_close | (one == other) | (np.isnan(one) & np.isnan(other))
    if is_same.all():
        return None
    row, cell = np.unravel_index(int((~is_same).argmax()), is_same.shape)
    return int(row), int(cell)


def _shown(value: Any) -> str:
    return "is masked" if np.isnan(value) else f"is {value:.6g}"


def _listed(observed: Observed) -> str:
    names = observed.names[:-1]
    return ", ".join(names if len(names) <= 6 else [*names[:2], "...", *names[-2:]])


def observed_cells(site: Site, known: Structure) -> Tensor:
    r"""Returns the data of an observed site, with NaN in the cells that are masked.

    Arguments:
        site: The site of a trace, in the plate `"data"`.
        known: The structure of the program.

    Returns:
        The values, shape (rows, \*plates, \*event).
    """
    value: Tensor = site["value"]
    events = len(site["fn"].event_shape)
    value = value.expand(torch.broadcast_shapes(value.shape, site["fn"].shape()))
    if not (scored := _is_scored(site)).all():
        value = (value if value.is_floating_point() else value.double()).where(
            scored.to(value.device), math.nan
        )
    plates = known.max_plate_nesting
    value = value.reshape((1,) * (plates + events - value.ndim) + value.shape)
    frames = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    inner = [value.shape[dim - events] for dim in sorted(frames - {known.rows_dim})]
    value = value.movedim(known.rows_dim - events, 0)
    return torch.reshape(value, (len(value), *inner, *value.shape[plates:]))


def _is_scored(site: Site) -> Tensor:
    """Whether each cell of a site is in its density: not masked by a handler or a distribution.

    Returns:
        Booleans that broadcast to the site's value.
    """
    distribution = site["fn"]
    scored = _of_cells(site["mask"], len(distribution.event_shape))
    while isinstance(distribution, MaskedDistribution | Independent | ExpandedDistribution):
        if isinstance(distribution, MaskedDistribution):
            mask = distribution._mask
            scored = scored & _of_cells(mask, len(distribution.event_shape)).to(scored.device)
        distribution = distribution.base_dist
    return scored


def _of_cells(mask: Any, event_dims: int) -> Tensor:
    """Adds event dims to a mask over batch dims, so that it broadcasts to the cells."""
    cells = torch.as_tensor(True if mask is None else mask)
    return cells.reshape(cells.shape + (1,) * event_dims)
