"""The posterior of any Pyro distribution."""

from .. import distributions
from ..distributions import Posterior

__all__ = ["Family"]


class Family(distributions.Family, Posterior):
    r"""Creates the posterior of any Pyro distribution.

    .. math:: q(z \mid x) = D(z;\ \theta_1(h), \theta_2(h), \dots), \qquad h = \mathrm{encoder}(x)

    A posterior on the real line serves a prior on another support too: its draws are mapped there
    by `biject_to(prior.support)`, as in Stan and in Pyro's autoguides.

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: How each of its parameters is obtained: `Predicted()` from the encoder's
            features, which is the default, `Shared()`, or a fixed value.

    Raises:
        ValueError: If there is no such parameter, or one without a default is missing.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.Laplace)
        Family(Laplace)
    """
