"""The Weibull posterior of positive latents."""

import pyro.distributions as dist

from ..distributions import Family, ParameterSpec, Posterior, Predicted

__all__ = ["Weibull"]


class Weibull(Family, Posterior):
    r"""Creates a Weibull posterior with independent latents, for a prior on positive numbers.

    .. math:: q(z \mid x) = \prod_j \frac{k_j}{\lambda_j} \Big(\frac{z_j}{\lambda_j}\Big)^{k_j - 1}
        e^{-(z_j / \lambda_j)^{k_j}}

    Its density is positive near 0, like that of a half-normal or an exponential prior. The default
    posterior under such a prior, exp of a normal, has almost no density there.

    References:
        WHAI: Weibull hybrid autoencoding inference (Zhang et al., 2018), arXiv 1803.01328.

    Arguments:
        scale: The scale :math:`\lambda > 0`, predicted with a log link.
        concentration: The shape :math:`k > 0`.

    Example:
        >>> Weibull()
        Weibull(scale=Predicted(link='log'), concentration=Predicted())
    """

    def __init__(
        self,
        *,
        scale: ParameterSpec = Predicted(link="log"),
        concentration: ParameterSpec = Predicted(),
    ) -> None:
        super().__init__(dist.Weibull, scale=scale, concentration=concentration)
