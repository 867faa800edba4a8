"""The prior of any Pyro distribution, its parameters fixed or learned."""

import inspect
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from ..data.checks import checked_shape, short
from ..distributions import ALTERNATIVES, Family, Shared, Word

__all__ = [
    "Prior",
    "StandardNormal",
    "check_prior_shape",
    "from_distribution",
]


class Prior(Family):
    r"""Creates a prior of any Pyro distribution, its parameters fixed or learned.

    .. math:: p(z) = D(z;\ \theta_1, \theta_2, \dots)

    Arguments:
        distribution: A class of Pyro distributions.
        event_shape: The shape of z, an int or a tuple.
        parameters: A number or tensor where a parameter is fixed; `Shared`, or nothing, where it
            is learned.

    Raises:
        ValueError: Where a word is on something that is not a parameter, or a count is not given.

    Example:
        >>> import pyro.distributions as dist
        >>> prior = Prior(dist.StudentT, 8, df=4.0, loc=0.0)
        >>> prior().event_shape
        torch.Size([8])
    """

    default = Shared

    def __init__(
        self,
        distribution: type[Distribution],
        event_shape: int | tuple[int, ...],
        /,
        **parameters: Word,
    ) -> None:
        super().__init__(distribution, **parameters)
        self.build(checked_shape(event_shape))

    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, by name."""
        return {"distribution": self.distribution, "event_shape": self.event_shape} | self.words

    def forward(self) -> Distribution:  # type: ignore[override]
        """Returns p(z), of batch shape () and event shape (*event)."""
        return super().forward(None)

    def extra_repr(self) -> str:
        """The arguments, as they were written."""
        words = [f"{name}={short(word)}" for name, word in self.words.items()]
        return ", ".join([self.distribution.__name__, str(tuple(self.event_shape)), *words])


class StandardNormal(Prior):
    r"""Creates the standard normal prior, the default.

    .. math:: p(z) = N(z;\ 0, I)

    Arguments:
        event_shape: The shape of z, an int or a tuple.

    Raises:
        ValueError: Where a size is not a positive integer.

    Example:
        >>> StandardNormal(8)().event_shape
        torch.Size([8])
    """

    def __init__(self, event_shape: int | tuple[int, ...]) -> None:
        super().__init__(dist.Normal, event_shape, loc=0.0, scale=1.0)

    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, by name."""
        return {"event_shape": tuple(self.event_shape)}

    def extra_repr(self) -> str:
        """The arguments, as they were written."""
        return ", ".join(map(str, self.event_shape))


def from_distribution(distribution: Distribution) -> Prior:
    """Takes a distribution apart into a prior of fixed parameters.

    They become buffers, so that the prior moves, casts and saves with the model it is built into.

    Arguments:
        distribution: A distribution over z, of batch shape () and event shape (*event).

    Raises:
        ValueError: Where its shapes are others, or it cannot be taken apart.

    Example:
        >>> import pyro.distributions as dist
        >>> from_distribution(dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        Prior(Laplace, (2,), loc=tensor of shape (2,), scale=tensor of shape (2,))
    """
    check_prior_shape(distribution)
    base = distribution
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        prior = Prior(type(base), tuple(distribution.event_shape), **_fixed_words(base))
        _check_same(prior, distribution)
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"Expected a prior that can be taken apart into its parameters; got {distribution}: "
            "give a module whose forward() returns it."
        ) from error
    return prior


def check_prior_shape(distribution: Distribution) -> None:
    """Refuses a distribution that is not over one vector of latents.

    Arguments:
        distribution: A distribution over z.

    Raises:
        ValueError: Where its batch shape is not (), or its event shape is.
    """
    if not distribution.event_shape and not distribution.batch_shape:
        raise ValueError(
            "Expected a prior over vectors; got event shape (): write .expand([1]).to_event(1)."
        )
    if distribution.batch_shape:
        raise ValueError(
            f"Expected a prior of batch shape (); got {tuple(distribution.batch_shape)}: write "
            f".to_event({len(distribution.batch_shape)})."
        )


def _fixed_words(base: Distribution) -> dict[str, Word]:
    signature = inspect.signature(type(base).__init__).parameters
    names = [name for name in signature if name not in ("self", "validate_args")]
    for group in ALTERNATIVES:
        own = [name for name in group if name in names]
        known = [name for name in own if name in vars(base) or name == "scale_tril"] or list(group)
        names = [name for name in names if name not in group or name == known[0]]
    values = {name: getattr(base, name, None) for name in names}
    return {k: v for k, v in values.items() if isinstance(v, Tensor | int | float | str)}


def _check_same(prior: Prior, distribution: Distribution) -> None:
    if prior.shared:
        raise ValueError(f"Expected values of {sorted(prior.shared)}; got none.")
    draw = distribution.sample()
    ours, theirs = prior().log_prob(draw.to(prior._like.dtype)), distribution.log_prob(draw)
    if not torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-3):
        raise ValueError(f"Expected log-density {theirs}; got {ours}.")
