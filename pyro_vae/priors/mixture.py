"""The mixture prior."""

import copy

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from ..data.checks import checked_number_of, checked_shape, short, size_of
from ..distributions import Arguments, Family, Prior, Shared

__all__ = ["Mixture", "mixture_of"]


class Mixture(Prior):
    r"""Creates a prior that is a mixture of K learned components.

    .. math:: p(z) = \sum_{k=1}^{K} \mathrm{softmax}(\eta)_k\, D(z;\ \theta_k)

    Arguments:
        num_components: The number of components :math:`K`.
        event_shape: The shape of z, an int or a tuple.
        component: The family of the components, whose parameters are `Shared()` or fixed; by
            default a normal with independent latents.

    Raises:
        ValueError: If a size is not a positive integer.

    Example:
        >>> Mixture(10, 8)().event_shape
        torch.Size([8])
    """

    def __init__(
        self,
        num_components: int,
        event_shape: int | tuple[int, ...],
        component: Family | None = None,
    ) -> None:
        super().__init__()
        self.num_components = checked_number_of("components", num_components)
        self.event_shape = torch.Size(checked_shape(event_shape))
        if not isinstance(component, Family | None):
            raise ValueError(
                "Expected the component to be a Family, as pyro_vae.priors.Family(...); got "
                f"{short(component)}."
            )
        normal = Family(dist.Normal, loc=Shared(), scale=Shared(init=1.0))
        self.component = copy.deepcopy(normal if component is None else component)
        self.component.build(tuple(self.event_shape), extra=(num_components,))
        self.logits = nn.Parameter(torch.zeros(num_components))
        with torch.no_grad():
            for parameter in self.component.shared.values():
                parameter += 0.5 * torch.randn_like(parameter)

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, positional and by name."""
        return (self.num_components, size_of(self.event_shape)), {"component": self.component}

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns p(z), of batch shape () and event shape (*event)."""
        return mixture_of(self.logits, self.component())


class _Mixture(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture with the support of its components, which NUTS needs."""

    @property
    def support(self) -> Constraint:
        return self.component_distribution.support


def mixture_of(logits: Tensor, components: Distribution) -> Distribution:
    """Returns the mixture of K distributions, of batch shape ().

    Arguments:
        logits: The unnormalised log-weights, shape (K,).
        components: Distributions of batch shape (K,).
    """
    weights = dist.Categorical(logits=logits)
    return _Mixture(weights, components.expand(logits.shape))
