"""The likelihood from any Pyro distribution."""

from .. import distributions
from ..distributions import Likelihood

__all__ = ["Family"]


class Family(distributions.Family, Likelihood):
    r"""Creates a likelihood from any Pyro distribution.

    .. math:: p(x \mid z) = D(x;\ \theta_1(h), \theta_2(h), \dots), \qquad h = \mathrm{decoder}(z)

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: How each of its parameters is obtained: `Predicted()` from the decoder's
            features, which is the default, `Shared()`, or a fixed value.

    Raises:
        ValueError: If the distribution has no parameter of that name, a parameter without a
            default is missing, or a fixed value violates the constraint of its parameter.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Shared
        >>> Family(dist.StudentT, df=4.0, scale=Shared())
        Family(StudentT, df=4.0, scale=Shared())
    """
