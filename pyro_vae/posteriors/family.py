"""The posterior from any Pyro distribution."""

from .. import distributions
from ..distributions import Posterior

__all__ = ["Family"]


class Family(distributions.Family, Posterior):
    r"""Creates a posterior from any Pyro distribution.

    .. math:: q(z \mid x) = D(z;\ \theta_1(h), \theta_2(h), \dots), \qquad h = \mathrm{encoder}(x)

    If the prior has another support, the draws of a posterior on the real line are mapped to it by
    `biject_to(prior.support)`, as in Stan and in Pyro's autoguides.

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: How each of its parameters is obtained: `Predicted()` from the encoder's
            features, which is the default, `Shared()`, or a fixed value.

    Raises:
        ValueError: If the distribution has no parameter of that name, a parameter without a
            default is missing, or a fixed value violates the constraint of its parameter.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.Laplace)
        Family(Laplace)
    """
