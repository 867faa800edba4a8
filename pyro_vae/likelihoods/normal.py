"""The likelihood of real data with light tails."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted, Shared

__all__ = ["Normal"]


class Normal(Family, Likelihood):
    r"""Creates the likelihood of real data with light tails.

    .. math:: p(x \mid z) = \prod_j N(x_j;\ \mu_j, \sigma_j^2)

    Arguments:
        loc: The mean :math:`\mu`.
        scale: The standard deviation :math:`\sigma`, learned for each column. If it is
            `Predicted()`, it can shrink towards 0 on rows that are fitted exactly.

    Example:
        >>> Normal(scale=Shared(scalar=True))
        Normal(loc=Predicted(), scale=Shared(scalar=True))
    """

    def __init__(
        self,
        *,
        loc: ParameterSpec = Predicted(),
        scale: ParameterSpec = Shared(),
    ) -> None:
        super().__init__(dist.Normal, loc=loc, scale=scale)
