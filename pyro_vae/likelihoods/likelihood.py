"""The likelihood of any Pyro distribution, and the check of data against it."""

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution

from ..distributions import Family, Word
from ..distributions.links import base_of

__all__ = ["Likelihood"]


class Likelihood(Family):
    r"""Creates the likelihood of any Pyro distribution.

    .. math:: p(x \mid z) = D(x;\ \theta_1(h), \theta_2(h), \dots), \qquad h = \mathrm{decoder}(z)

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: A word on each of its parameters, as in :class:`pyro_vae.families.Family`:
            predicted from the decoder's features where nothing is said, `Shared`, or fixed.

    Raises:
        ValueError: Where a word is on something that is not a parameter, or a count is not given.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Shared
        >>> Likelihood(dist.StudentT, df=4.0, scale=Shared())
        Likelihood(StudentT, df=4.0, scale=Shared())
    """

    def __init__(self, distribution: type[Distribution], /, **parameters: Word) -> None:
        super().__init__(distribution, **parameters)

    def check(self, x: Tensor) -> None:
        """Refuses data that the distribution cannot have produced.

        Bounds that are learned refuse nothing; counts that must sum to a total are summed; at
        the edge of a support, as 0 and 1 of a beta's, the density must be finite.

        Arguments:
            x: Rows of shape (rows, *event_shape).

        Raises:
            ValueError: Where a value is NaN, infinite or outside the support.
        """
        nan = torch.isnan(x)
        if nan.any():
            raise ValueError(f"Expected data without NaN; got {_found(x, nan)}.")
        infinite = torch.isinf(x)
        if infinite.any():
            raise ValueError(f"Expected finite data; got {_found(x, infinite)}.")
        with torch.enable_grad():
            example = self._at_zero()
        base = base_of(example.support)
        if _is_learned(base):
            return
        outside = _outside(base, x)
        if is_inside := not outside.any():
            outside = _at_infinite_edge(example, base, x)
        if outside.any():
            edge = f" (the log-density is infinite at {_first(x, outside)})"
            remark = edge if is_inside else _hint(base)
            raise ValueError(
                f"Expected data in the support of {self.distribution.__name__}, "
                f"{_name(base)}{remark}; got {_found(x, outside)}."
            )

    def _at_zero(self) -> Distribution:
        if self.feature_shape is None:
            return self()
        return self(self._like.new_zeros((1, *self.feature_shape)))


def _outside(base: Any, x: Tensor) -> Tensor:
    """The elements off the support; the rows, where it is one of vectors."""
    bad: Tensor = ~base.check(x)
    if base.is_discrete:
        bad = bad | _over_event(x != x.round(), bad)
    if isinstance(base, type(constraints.multinomial(1))):
        bad = bad | (x.sum(-1) != base.upper_bound)
    return bad


def _at_infinite_edge(example: Distribution, base: Any, x: Tensor) -> Tensor:
    """The elements on an edge of the support, of rows where the log-density is infinite."""
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


def _over_event(elements: Tensor, bad: Tensor) -> Tensor:
    return elements.flatten(bad.ndim).any(-1) if elements.ndim > bad.ndim else elements


def _is_learned(base: constraints.Constraint) -> bool:
    return any(isinstance(bound, Tensor) and bound.requires_grad for bound in vars(base).values())


def _found(x: Tensor, bad: Tensor) -> str:
    """The first bad value, its place in its row, and the rows that have one."""
    rows = bad.reshape(len(bad), -1).any(-1).nonzero().flatten()
    _, *place = bad.nonzero()[0].tolist()
    column = f" at column {place[0] if len(place) == 1 else place}" if place else ""
    where = f"{len(rows)} of {len(bad)} rows, the first of them row {int(rows[0])}"
    return f"{_first(x, bad)}{column} in {where}"


def _first(x: Tensor, bad: Tensor) -> str:
    value = x[tuple(bad.nonzero()[0].tolist())]
    if value.ndim == 0:
        return str(value.item()).replace("nan", "NaN")
    few = value.flatten()[:8].tolist()
    return f"{few} ({value.numel()} values with sum {value.sum().item():g})"


def _hint(base: constraints.Constraint) -> str:
    is_binary = isinstance(base, type(constraints.boolean))
    return " (binarize grey levels, or take ContinuousBernoulli or Beta)" if is_binary else ""


def _name(base: constraints.Constraint) -> str:
    low, high = (_bound(base, name) for name in ("lower_bound", "upper_bound"))
    for kind, said in (
        (constraints.boolean, "0 or 1"),
        (constraints.simplex, "values >= 0 with sum 1"),
        (constraints.multinomial(1), f"integers >= 0 with sum {high}"),
        (constraints.integer_interval(0, 1), f"integers from {low} to {high}"),
        (constraints.nonnegative_integer, f"integers >= {low}"),
        (constraints.interval(0, 1), f"values in [{low}, {high}]"),
        (constraints.half_open_interval(0, 1), f"values in [{low}, {high})"),
        (constraints.greater_than(0), f"values > {low}"),
        (constraints.greater_than_eq(0), f"values >= {low}"),
        (constraints.less_than(0), f"values < {high}"),
    ):
        if type(base) is type(kind):
            return said
    return type(base).__name__.lstrip("_")


def _bound(base: constraints.Constraint, name: str) -> str:
    values = torch.as_tensor(getattr(base, name, torch.nan)).unique().tolist()
    return " ... ".join(f"{value:.7g}" for value in sorted({values[0], values[-1]}))
