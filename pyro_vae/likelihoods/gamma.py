"""The likelihood of positive data."""

import pyro.distributions as dist
from torch import Tensor

from ..distributions import Family, Likelihood, ParameterSpec, Predicted, Shared
from ..distributions.support import check_positive

__all__ = ["Gamma"]


class Gamma(Family, Likelihood):
    r"""Creates the likelihood of positive data.

    .. math:: p(x \mid z) =
        \prod_j \beta_j^{\alpha_j} x_j^{\alpha_j - 1} e^{-\beta_j x_j} / \Gamma(\alpha_j)

    Arguments:
        concentration: The shape :math:`\alpha > 0`, learned for each column.
        rate: The rate :math:`\beta > 0`, predicted with a log link; the mean is
            :math:`\alpha / \beta`.

    Example:
        >>> Gamma()
        Gamma(concentration=Shared(link='log'), rate=Predicted(link='log'))
    """

    def __init__(
        self,
        *,
        concentration: ParameterSpec = Shared(link="log"),
        rate: ParameterSpec = Predicted(link="log"),
    ) -> None:
        super().__init__(dist.Gamma, concentration=concentration, rate=rate)

    def check(self, x: Tensor) -> None:
        """Refuses data that are not positive: at 0 the density is infinite, or 0.

        Arguments:
            x: Rows of shape (rows, *event_shape).

        Raises:
            ValueError: If a value is NaN, infinite or not positive.
        """
        check_positive(x, "Gamma")
        super().check(x)
