"""The likelihood of counts without a bound."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["Poisson"]


class Poisson(Family, Likelihood):
    r"""Creates the likelihood of counts without a bound.

    .. math:: p(x \mid z) = \prod_j e^{-\lambda_j} \lambda_j^{x_j} / x_j!

    Arguments:
        rate: The mean :math:`\lambda > 0`, predicted with a log link.

    Example:
        >>> Poisson()
        Poisson(rate=Predicted(link='log'))
    """

    def __init__(self, *, rate: ParameterSpec = Predicted(link="log")) -> None:
        super().__init__(dist.Poisson, rate=rate)
