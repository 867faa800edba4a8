"""The gamma posterior of positive latents."""

import pyro.distributions as dist

from ..distributions import Family, ParameterSpec, Posterior, Predicted

__all__ = ["Gamma"]


class Gamma(Family, Posterior):
    r"""Creates a gamma posterior with independent latents, for a prior on positive numbers.

    .. math:: q(z \mid x) =
        \prod_j \beta_j^{\alpha_j} z_j^{\alpha_j - 1} e^{-\beta_j z_j} / \Gamma(\alpha_j)

    Its draws have gradients by implicit reparameterisation.

    References:
        Implicit reparameterization gradients (Figurnov et al., 2018), arXiv 1805.08498.

    Arguments:
        concentration: The shape :math:`\alpha > 0`.
        rate: The rate :math:`\beta > 0`, predicted with a log link; the mean is
            :math:`\alpha / \beta`.

    Example:
        >>> Gamma()
        Gamma(concentration=Predicted(), rate=Predicted(link='log'))
    """

    def __init__(
        self,
        *,
        concentration: ParameterSpec = Predicted(),
        rate: ParameterSpec = Predicted(link="log"),
    ) -> None:
        super().__init__(dist.Gamma, concentration=concentration, rate=rate)
