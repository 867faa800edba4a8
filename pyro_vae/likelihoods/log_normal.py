"""The likelihood of positive data, normal on the log scale."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted, Shared

__all__ = ["LogNormal"]


class LogNormal(Family, Likelihood):
    r"""Creates the likelihood of positive data, normal on the log scale.

    .. math:: p(x \mid z) = \prod_j N(\log x_j;\ \mu_j, \sigma_j^2) / x_j

    Arguments:
        loc: The mean :math:`\mu` of the logarithm.
        scale: The standard deviation :math:`\sigma` of the logarithm, learned for each column.

    Example:
        >>> LogNormal()
        LogNormal(loc=Predicted(), scale=Shared())
    """

    def __init__(
        self,
        *,
        loc: ParameterSpec = Predicted(),
        scale: ParameterSpec = Shared(),
    ) -> None:
        super().__init__(dist.LogNormal, loc=loc, scale=scale)
