"""The normal posterior with a full covariance matrix."""

import pyro.distributions as dist

from ..distributions import Family, ParameterSpec, Posterior, Predicted

__all__ = ["MultivariateNormal"]


class MultivariateNormal(Family, Posterior):
    r"""Creates a normal posterior with a full covariance matrix.

    .. math:: q(z \mid x) = N(z;\ \mu(x), L(x) L(x)^\top)

    Arguments:
        loc: The mean :math:`\mu`.
        scale_tril: The Cholesky factor :math:`L`, lower triangular with a positive diagonal.

    Example:
        >>> from pyro_vae import Shared
        >>> MultivariateNormal(scale_tril=Shared())
        MultivariateNormal(loc=Predicted(), scale_tril=Shared())
    """

    def __init__(
        self,
        *,
        loc: ParameterSpec = Predicted(),
        scale_tril: ParameterSpec = Predicted(),
    ) -> None:
        super().__init__(dist.MultivariateNormal, loc=loc, scale_tril=scale_tril)
