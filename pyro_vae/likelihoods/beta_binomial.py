"""The likelihood of overdispersed counts out of a known total."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["BetaBinomial"]


class BetaBinomial(Family, Likelihood):
    r"""Creates the likelihood of overdispersed counts out of a known total.

    .. math:: p(x \mid z) = \prod_j \binom{n}{x_j}
        \frac{B(x_j + \alpha_j, n - x_j + \beta_j)}{B(\alpha_j, \beta_j)}

    Arguments:
        total_count: The number of trials :math:`n`, a number or a tensor of the event's shape.
        concentration1: The first shape :math:`\alpha > 0`; the mean is
            :math:`n \alpha / (\alpha + \beta)`.
        concentration0: The second shape :math:`\beta > 0`.

    Example:
        >>> BetaBinomial(total_count=16)
        BetaBinomial(total_count=16, concentration1=Predicted(link='log'),
        concentration0=Predicted(link='log'))
    """

    def __init__(
        self,
        total_count: ParameterSpec,
        *,
        concentration1: ParameterSpec = Predicted(link="log"),
        concentration0: ParameterSpec = Predicted(link="log"),
    ) -> None:
        super().__init__(
            dist.BetaBinomial,
            total_count=total_count,
            concentration1=concentration1,
            concentration0=concentration0,
        )
