"""The posterior on the real line, transported to the support of a prior."""

from collections.abc import Callable
from typing import Self

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from ..distributions import Posterior

__all__ = ["Transported"]


class Transported(Posterior):
    r"""Creates a posterior that maps the draws of another one to the support of the prior.

    .. math:: z = g(u), \quad u \sim q(u \mid x), \qquad g : \mathbb{R}^n \to \mathrm{support}

    A program wraps a posterior on the real line in this one if the prior has another support.

    Arguments:
        base: The posterior on the real line.
        prior: A function that returns p(z). The support is read at each call, because its bounds
            may be learned.
    """

    def __init__(self, base: Posterior, prior: Callable[[], Distribution]) -> None:
        super().__init__()
        self.base = base
        self._prior = prior

    @property
    def specification(self) -> nn.Module:
        """The posterior on the real line."""
        return self.base

    def build(self, event_shape: tuple[int, ...], features: Tensor | None = None) -> Self:
        """Builds the posterior on the real line with the shape that maps to `event_shape`.

        Arguments:
            event_shape: The shape of z.
            features: An example of the features.
        """
        free = biject_to(self._prior().support).inverse_shape(event_shape)
        self.base.build(tuple(free), features)
        return super().build(event_shape)

    def initialize(self, y: Tensor, units: tuple[Tensor, Tensor] | None = None) -> None:
        """Starts the posterior on the real line at values that are mapped back to it."""
        self.base.initialize(biject_to(self._prior().support).inv(y), units)

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns q(z | x) of each row."""
        transform = biject_to(self._prior().support).with_cache()
        transported: Distribution = dist.TransformedDistribution(self.base(features), [transform])
        return transported
