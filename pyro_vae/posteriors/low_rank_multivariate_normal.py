"""The normal posterior whose covariance is diagonal plus low rank."""

import pyro.distributions as dist

from ..distributions import Family, ParameterSpec, Posterior, Predicted

__all__ = ["LowRankMultivariateNormal"]


class LowRankMultivariateNormal(Family, Posterior):
    r"""Creates a normal posterior whose covariance is diagonal plus low rank.

    .. math:: q(z \mid x) = N(z;\ \mu(x), W(x) W(x)^\top + D(x))

    Arguments:
        rank: The number of columns of :math:`W`.
        loc: The mean :math:`\mu`.
        cov_factor: The factor :math:`W`; by default `Predicted()`, with `rank` columns.
        cov_diag: The diagonal of :math:`D`, positive.

    Raises:
        ValueError: If neither the rank nor `cov_factor` is given, or both are.

    Example:
        >>> LowRankMultivariateNormal(2).specs["cov_factor"]
        Predicted(shape=2)
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        loc: ParameterSpec = Predicted(),
        cov_factor: ParameterSpec = None,
        cov_diag: ParameterSpec = Predicted(),
    ) -> None:
        if (rank is None) == (cov_factor is None):
            raise ValueError(
                "Expected either the rank, as in LowRankMultivariateNormal(2), or cov_factor; "
                f"got rank={rank!r}, cov_factor={cov_factor!r}."
            )
        factor = Predicted(shape=rank) if cov_factor is None else cov_factor
        super().__init__(
            dist.LowRankMultivariateNormal, loc=loc, cov_factor=factor, cov_diag=cov_diag
        )
