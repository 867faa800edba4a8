"""Conversion of a distribution to a prior with fixed parameters."""

import inspect

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from ..distributions import ALTERNATIVES, ParameterSpec
from .family import Family

__all__ = ["check_prior_shape", "from_distribution"]


def from_distribution(distribution: Distribution) -> Family:
    """Converts a distribution to a prior with fixed parameters.

    The parameters become buffers: they follow the program to another device or dtype, and are
    saved with it.

    Arguments:
        distribution: A distribution over z, of batch shape () and event shape (*event).

    Raises:
        ValueError: If its batch shape is not (), its event shape is (), or its parameters cannot
            be read.

    Example:
        >>> import pyro.distributions as dist
        >>> from_distribution(dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        Family(Laplace, 2, loc=tensor of shape (2,), scale=tensor of shape (2,))
    """
    check_prior_shape(distribution)
    base = distribution
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        prior = Family(type(base), tuple(distribution.event_shape), **_fixed_parameters(base))
        if prior.shared:
            raise ValueError(f"Expected values of {sorted(prior.shared)}; got none.")
        draw = distribution.sample()
        ours, theirs = prior().log_prob(draw.to(prior._like.dtype)), distribution.log_prob(draw)
        if not torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-3):
            raise ValueError(f"Expected log-density {theirs}; got {ours}.")
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"The parameters of {distribution} cannot be read from it. Give a module whose "
            "forward() returns it."
        ) from error
    return prior


def check_prior_shape(distribution: Distribution) -> None:
    """Refuses a distribution with a batch shape, or one of a scalar.

    Arguments:
        distribution: A distribution over z.

    Raises:
        ValueError: If its batch shape is not (), or its event shape is ().
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


def _fixed_parameters(base: Distribution) -> dict[str, ParameterSpec]:
    signature = inspect.signature(type(base).__init__).parameters
    names = [name for name in signature if name not in ("self", "validate_args")]
    for group in ALTERNATIVES:
        own = [name for name in group if name in names]
        known = [name for name in own if name in vars(base) or name == "scale_tril"] or list(group)
        names = [name for name in names if name not in group or name == known[0]]
    values = {name: getattr(base, name, None) for name in names}
    return {k: v for k, v in values.items() if isinstance(v, Tensor | int | float | str)}
