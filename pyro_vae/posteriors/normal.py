"""The normal posterior with independent latents."""

import pyro.distributions as dist

from ..distributions import Family, ParameterSpec, Posterior, Predicted

__all__ = ["Normal"]


class Normal(Family, Posterior):
    r"""Creates a normal posterior with independent latents.

    .. math:: q(z \mid x) = \prod_j N(z_j;\ \mu_j(x), \sigma_j(x)^2)

    References:
        Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114.

    Arguments:
        loc: The mean :math:`\mu`.
        scale: The standard deviation :math:`\sigma`.

    Example:
        >>> Normal()
        Normal(loc=Predicted(), scale=Predicted())
    """

    def __init__(
        self,
        *,
        loc: ParameterSpec = Predicted(),
        scale: ParameterSpec = Predicted(),
    ) -> None:
        super().__init__(dist.Normal, loc=loc, scale=scale)
