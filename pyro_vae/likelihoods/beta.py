"""The likelihood of proportions in the open interval (0, 1)."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["Beta"]


class Beta(Family, Likelihood):
    r"""Creates the likelihood of proportions in the open interval (0, 1).

    .. math:: p(x \mid z) =
        \prod_j x_j^{\alpha_j - 1} (1 - x_j)^{\beta_j - 1} / B(\alpha_j, \beta_j)

    Arguments:
        concentration1: The first shape :math:`\alpha > 0`; the mean is
            :math:`\alpha / (\alpha + \beta)`.
        concentration0: The second shape :math:`\beta > 0`.

    Example:
        >>> Beta()
        Beta(concentration1=Predicted(), concentration0=Predicted())
    """

    def __init__(
        self,
        *,
        concentration1: ParameterSpec = Predicted(),
        concentration0: ParameterSpec = Predicted(),
    ) -> None:
        super().__init__(dist.Beta, concentration1=concentration1, concentration0=concentration0)
