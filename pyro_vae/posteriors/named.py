"""Posteriors with a name."""

import pyro.distributions as dist

from ..distributions import Predicted, Word
from .posterior import Posterior

__all__ = ["Delta", "LowRankMultivariateNormal", "MultivariateNormal", "Normal"]


class Normal(Posterior):
    r"""Creates the posterior whose latents are normal and independent given x.

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
        loc: Word = Predicted(),
        scale: Word = Predicted(),
    ) -> None:
        super().__init__(dist.Normal, loc=loc, scale=scale)


class MultivariateNormal(Posterior):
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
        loc: Word = Predicted(),
        scale_tril: Word = Predicted(),
    ) -> None:
        super().__init__(dist.MultivariateNormal, loc=loc, scale_tril=scale_tril)


class LowRankMultivariateNormal(Posterior):
    r"""Creates the posterior whose covariance given x is diagonal plus low rank.

    .. math:: q(z \mid x) = N(z;\ \mu(x), W(x) W(x)^\top + D(x))

    Arguments:
        rank: The number of columns of :math:`W`.
        loc: The mean :math:`\mu`.
        cov_factor: :math:`W`; by default predicted, of that rank.
        cov_diag: The diagonal of :math:`D`, positive.

    Raises:
        ValueError: Where neither the rank nor a word on the factor is given.

    Example:
        >>> LowRankMultivariateNormal(2).words["cov_factor"]
        Predicted(shape=2)
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        loc: Word = Predicted(),
        cov_factor: Word = None,
        cov_diag: Word = Predicted(),
    ) -> None:
        if (rank is None) == (cov_factor is None):
            raise ValueError(
                "Expected the rank, as in LowRankMultivariateNormal(2), or a word on the factor; "
                f"got rank={rank!r}, cov_factor={cov_factor!r}."
            )
        factor = Predicted(shape=rank) if cov_factor is None else cov_factor
        super().__init__(
            dist.LowRankMultivariateNormal, loc=loc, cov_factor=factor, cov_diag=cov_diag
        )


class Delta(Posterior):
    r"""Creates the posterior that is a point: the plain autoencoder, for contrast.

    .. math:: q(z \mid x) = \delta(z - \mu(x))

    Its ELBO is :math:`\log p(x, \mu(x))`: no bound on log p(x), as the point has no density.

    Arguments:
        v: The point :math:`\mu`.

    Example:
        >>> Delta()
        Delta(v=Predicted())
    """

    def __init__(self, *, v: Word = Predicted()) -> None:
        super().__init__(dist.Delta, v=v, log_density=0.0)

    def arguments(self) -> dict[str, Word]:
        """What the constructor was called with, by name."""
        return {"v": self.words["v"]}

    def extra_repr(self) -> str:
        """The words, as they were written."""
        return f"v={self.words['v']!r}"
