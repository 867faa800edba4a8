"""The likelihood of counts out of a known total that vary more than a binomial's."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["BetaBinomial"]


class BetaBinomial(Family, Likelihood):
    r"""Creates the likelihood of counts out of a known total that vary more than a binomial's.

    .. math:: p(x \mid z) = \prod_j \binom{n}{x_j}
        \frac{B(x_j + \alpha_j, n - x_j + \beta_j)}{B(\alpha_j, \beta_j)}

    Arguments:
        total_count: The number of trials :math:`n`.
        concentration1: :math:`\alpha > 0`.
        concentration0: :math:`\beta > 0`.

    Example:
        >>> BetaBinomial(total_count=16)
        BetaBinomial(total_count=16, concentration1=Predicted(), concentration0=Predicted())
    """

    def __init__(
        self,
        total_count: ParameterSpec,
        *,
        concentration1: ParameterSpec = Predicted(),
        concentration0: ParameterSpec = Predicted(),
    ) -> None:
        super().__init__(
            dist.BetaBinomial,
            total_count=total_count,
            concentration1=concentration1,
            concentration0=concentration0,
        )
