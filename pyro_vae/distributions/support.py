"""Checks of data against the support of a distribution."""

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution

from ..data.cells import CellError
from ..data.frames import EXACT
from .links import base_of

__all__ = ["check_finite", "check_positive", "check_support"]


def check_finite(x: Tensor) -> None:
    """Refuses values that are NaN or infinite, and integers that float64 does not hold.

    Arguments:
        x: Rows (rows, *event_shape).

    Raises:
        ValueError: If there are any. The message names the first, its column and the rows.
    """
    fill = " Drop these rows, or fill the values in."
    for bad, wanted, advice in (
        (torch.isnan(x), "data without NaN (missing values)", fill),
        (torch.isinf(x), "finite data", ""),
    ):
        if bad.any():
            raise CellError(f"Expected {wanted}", x, bad, advice)
    if x.dtype == torch.int64 and (bad := (x > EXACT) | (x < -EXACT)).any():
        raise CellError("Expected integers up to 2**53, as float64 holds no more", x, bad)


def check_support(example: Distribution, x: Tensor, name: str) -> None:
    """Refuses values outside the support, or at an edge where the log-density is infinite.

    Counts that the dtype of x cannot tell from their neighbours are refused, too.

    If the bounds of the support are learned, or the distribution has no support, it accepts all.

    Arguments:
        example: The distribution, at any features.
        x: Finite rows (rows, *event_shape).
        name: The name of the distribution in the message.

    Raises:
        ValueError: If there are such values. The message names the first, its column and the rows.
    """
    try:
        base = base_of(example.support)
    except NotImplementedError:
        return
    if any(isinstance(bound, Tensor) and bound.requires_grad for bound in vars(base).values()):
        return
    outside: Tensor = ~base.check(x)  # elements, or whole rows if the support is one of vectors
    if base.is_discrete:
        broken = x != x.round()
        of_rows = broken.ndim > outside.ndim
        outside = outside | (broken.flatten(outside.ndim).any(-1) if of_rows else broken)
    if isinstance(base, constraints.multinomial):
        outside = outside | (x.sum(-1) != base.upper_bound)
    remark = ""
    if not outside.any():
        outside = _at_infinite_edge(example, base, x)
        if outside.any():
            edge = CellError("", x, outside).value
            remark = f" (the log-density is infinite at {edge})"
    if outside.any():
        is_open = []
        for end in ("lower_bound", "upper_bound"):
            bound = torch.as_tensor(getattr(base, end, torch.nan)).to(x).expand_as(x[:1])
            is_in = bool(base.check(bound).all())
            is_open.append(is_in and bool(_at_infinite_edge(example, base, bound).any()))
        wanted = f"Expected data in the support of {name}, {_describe(base, is_open)}{remark}"
        raise CellError(wanted, x, outside)
    most = 2.0 / torch.finfo(x.dtype).eps if base.is_discrete and x.is_floating_point() else None
    if most is not None and (large := x.abs() >= most).any():
        wanted = (
            f"Expected counts below {most:.0f}, since {x.dtype} does not hold all whole numbers "
            "above"
        )
        raise CellError(wanted, x, large, " Call .double() on the program.")


def check_positive(x: Tensor, name: str) -> None:
    """Refuses values of 0 or less under a density of positive numbers.

    Arguments:
        x: Rows (rows, *event_shape).
        name: The name of the distribution in the message.

    Raises:
        ValueError: If there are any; the message names the first one and the rows.
    """
    if (bad := x <= 0.0).any():
        wanted = (
            f"Expected data in the support of {name}, values > 0 (the log-density is infinite at "
            "0 or has no bound there)"
        )
        raise CellError(wanted, x, bad)


def _at_infinite_edge(example: Distribution, base: Any, x: Tensor) -> Tensor:
    """Marks the elements on an edge of the support, in rows whose log-density is infinite."""
    edges = [getattr(base, name, None) for name in ("lower_bound", "upper_bound")]
    if isinstance(base, type(constraints.simplex)):
        edges = [0.0]
    is_edge = torch.zeros_like(x, dtype=torch.bool)
    for edge in edges:
        if edge is not None and not base.is_discrete:
            is_edge = is_edge | (x == edge)
    bad = is_edge.flatten(1).any(1)
    if bad.any():
        with torch.no_grad():
            bad[bad.clone()] = ~example.log_prob(x[bad]).isfinite()
    return is_edge & bad.reshape(-1, *[1] * (x.ndim - 1))


def _describe(base: constraints.Constraint, is_open: list[bool]) -> str:
    bounds = []
    for name in ("lower_bound", "upper_bound"):
        values = torch.as_tensor(getattr(base, name, torch.nan)).unique().tolist()
        ends = sorted({values[0], values[-1]})
        bounds.append(" ... ".join(f"{end:.7g}" for end in ends))
    low, high = bounds
    left, right = "[("[is_open[0]], "])"[is_open[1]]
    texts = {
        type(constraints.boolean): (
            "0 or 1 (binarize grey levels, or use ContinuousBernoulli or Beta)"
        ),
        type(constraints.simplex): "values >= 0 with sum 1",
        constraints.multinomial: f"integers >= 0 with sum {high}",
        constraints.integer_interval: f"integers from {low} to {high}",
        type(constraints.nonnegative_integer): f"integers >= {low}",
        constraints.interval: f"values in {left}{low}, {high}{right}",
        constraints.half_open_interval: f"values in {left}{low}, {high})",
        constraints.greater_than: f"values > {low}",
        constraints.greater_than_eq: f"values {'>' if is_open[0] else '>='} {low}",
        constraints.less_than: f"values < {high}",
    }
    return texts.get(type(base), type(base).__name__.lstrip("_"))
