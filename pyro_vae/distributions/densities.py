"""Log-densities that need fewer temporary tensors than torch's own."""

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["Bernoulli", "Normal", "scored", "to_event"]

MOST_IN_GROUP, LANES = 7, 8


def scored(distribution: Any) -> Any:
    """Returns the version of a Pyro class that needs less memory, or the class itself.

    Arguments:
        distribution: A class of Pyro distributions.

    Example:
        >>> scored(dist.Normal)(0.0, 1.0).log_prob(torch.zeros(()))
        tensor(-0.9189)
    """
    return {dist.Bernoulli: Bernoulli, dist.Normal: Normal}.get(distribution, distribution)


class Bernoulli(dist.Bernoulli):  # type: ignore[misc]
    """Pyro's Bernoulli, with a log-probability that is computed in one buffer.

    torch computes a cross-entropy and negates it in a second buffer, which is as large as all
    draws of all pixels, in the forward and in the backward pass. That costs a tenth of a step of
    `DReG(50)`. Here a weight of -1 negates the cross-entropy in place.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), the same numbers as torch's.

        Arguments:
            value: Zeros and ones, of a shape that broadcasts with the logits.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        minus = logits.new_full((), -1.0)
        return F.binary_cross_entropy_with_logits(logits, value, weight=minus, reduction="none")


class Normal(dist.Normal):  # type: ignore[misc]
    """Pyro's normal; the logarithm and the square of its scale are computed once for all draws.

    torch computes them from the expanded scale, once for each particle, although they are
    the same for all particles.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), the same numbers as torch's.

        Arguments:
            value: Real numbers, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        scale = _once(self.scale)
        squares = -((value - _once(self.loc)) ** 2) / (2 * scale**2)
        log_prob = squares - scale.log() - math.log(math.sqrt(2 * math.pi))
        return log_prob.expand(torch.broadcast_shapes(value.shape, self.batch_shape))


def to_event(base: Any, dims: int) -> Any:
    """Returns a distribution whose last batch dims are part of the event.

    Arguments:
        base: The distribution.
        dims: The number of these dims.
    """
    if isinstance(base, Bernoulli) and dims > 0:
        return Bernoullis(base, dims)
    return base.to_event(dims)


class Bernoullis(dist.Independent):  # type: ignore[misc]
    r"""Independent Bernoulli variables. If no gradient is needed, up to 7 share one logarithm.

    .. math:: \sum_j x_j l_j - \max(l_j, 0) - \log(1 + e^{-|l_j|})

    The last term is the logarithm of a product over up to 7 elements, whose factors lie between
    1 and 2: one logarithm instead of 7. torch's inductor compiler unrolls a product this short,
    and evaluates the whole formula in one pass over the logits.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) of the events.

        Arguments:
            value: Zeros and ones, of a shape that broadcasts with the logits.
        """
        if torch.is_grad_enabled():
            return super().log_prob(value)
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(value)
        dims, logits = self.reinterpreted_batch_ndims, self.base_dist.logits
        size = math.prod(self.event_shape)  # elements per logarithm: a divisor, SIMD-aligned
        divisors = [few for few in range(1, MOST_IN_GROUP + 1) if size % few == 0]
        aligned = [few for few in divisors if size // few % LANES == 0]
        groups = (max(aligned or divisors), -1)
        scores = (value * logits - logits.clamp_min(0.0)).flatten(-dims).unflatten(-1, groups)
        factors = (1.0 + (-logits.abs()).exp()).flatten(-dims).unflatten(-1, groups)
        return (scores.sum(-2) - factors.prod(-2).log()).sum(-1)


def _once(expanded: Tensor) -> Tensor:
    """A tensor without the copies of elements that `expand` added."""
    for dim, stride in enumerate(expanded.stride()):
        if stride == 0 and expanded.shape[dim] > 1:
            expanded = expanded.narrow(dim, 0, 1)
    return expanded
