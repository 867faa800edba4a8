"""The likelihood of any Pyro distribution, and the check of data against it."""

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution

from ..families import Family, Word

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
            raise ValueError(f"Expected data without NaN; got NaN in {_where(nan)}.")
        infinite = torch.isinf(x)
        if infinite.any():
            raise ValueError(f"Expected finite data; got an infinite value in {_where(infinite)}.")
        with torch.enable_grad():
            example = self._at_zero()
        support: Any = example.support
        if not _is_learned(support):
            outside = _outside(support, x)
            if not outside.any():
                outside = _at_infinite_edge(example, support, x)
            if outside.any():
                raise ValueError(
                    f"Expected data in the support of {self.distribution.__name__}, "
                    f"{_name(support)}; got {_worst(x, outside)} in {_where(outside)}."
                )

    def _at_zero(self) -> Distribution:
        if self.feature_shape is None:
            return self()
        return self(self._like.new_zeros((1, *self.feature_shape)))


def _outside(support: constraints.Constraint, x: Tensor) -> Tensor:
    bad = ~support.check(x)
    base = _base(support)
    if base.is_discrete:
        bad = bad | _over_event(x != x.round(), bad)
    if isinstance(base, type(constraints.multinomial(1))):
        bad = bad | (x.sum(-1) != base.upper_bound)
    return bad


def _at_infinite_edge(example: Distribution, support: Any, x: Tensor) -> Tensor:
    """The rows on an edge of the support where the log-density is infinite."""
    base = _base(support)
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
    return bad


def _over_event(elements: Tensor, bad: Tensor) -> Tensor:
    return elements.flatten(bad.ndim).any(-1) if elements.ndim > bad.ndim else elements


def _base(support: constraints.Constraint) -> constraints.Constraint:
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return support


def _is_learned(support: constraints.Constraint) -> bool:
    bounds = vars(_base(support)).values()
    return any(isinstance(bound, Tensor) and bound.requires_grad for bound in bounds)


def _where(bad: Tensor) -> str:
    rows = bad.reshape(len(bad), -1).any(-1).nonzero().flatten()
    return f"{len(rows)} of {len(bad)} rows, the first of them row {int(rows[0])}"


def _worst(x: Tensor, outside: Tensor) -> Any:
    value = x[outside].flatten()
    return (
        value[0].item() if outside.shape == x.shape else f"{x[outside][0].flatten()[:4].tolist()}"
    )


def _name(support: constraints.Constraint) -> str:
    base = _base(support)
    bounds = {
        name: value.unique().tolist() if isinstance(value, Tensor) else value
        for name, value in vars(base).items()
        if name in ("lower_bound", "upper_bound")
    }
    said = ", ".join(
        f"{k} {v[0] if isinstance(v, list) and len(v) == 1 else v}" for k, v in bounds.items()
    )
    kind = type(base).__name__.lstrip("_")
    return f"{kind}({said})" if said else kind
