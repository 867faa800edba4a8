"""The likelihood of real data with exponential tails."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted, Shared

__all__ = ["Laplace"]


class Laplace(Family, Likelihood):
    r"""Creates the likelihood of real data with exponential tails.

    .. math:: p(x \mid z) = \prod_j \exp(-|x_j - \mu_j| / b_j) / (2 b_j)

    Arguments:
        loc: The median :math:`\mu`.
        scale: The mean absolute deviation :math:`b`, learned for each column.

    Example:
        >>> Laplace()
        Laplace(loc=Predicted(), scale=Shared())
    """

    def __init__(
        self,
        *,
        loc: ParameterSpec = Predicted(),
        scale: ParameterSpec = Shared(),
    ) -> None:
        super().__init__(dist.Laplace, loc=loc, scale=scale)
