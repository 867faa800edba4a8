"""The posterior whose latents are normal with a full covariance given x."""

import pyro.distributions as dist

from ..distributions import Family, ParameterSpec, Posterior, Predicted

__all__ = ["MultivariateNormal"]


class MultivariateNormal(Family, Posterior):
    r"""Creates the posterior whose latents are normal with a full covariance given x.

    .. math:: q(z \mid x) = N(z;\ \mu(x), L(x) L(x)^\top)

    Arguments:
        loc: The mean :math:`\mu`.
        scale_tril: The lower triangle :math:`L`, its diagonal positive.

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
