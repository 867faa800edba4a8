"""The likelihood of real data with heavy tails."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted, Shared

__all__ = ["StudentT"]


class StudentT(Family, Likelihood):
    r"""Creates the likelihood of real data with heavy tails.

    .. math:: p(x \mid z) = \prod_j t_{\nu}\left((x_j - \mu_j) / \sigma_j\right) / \sigma_j

    Arguments:
        df: The degrees of freedom :math:`\nu > 0`, learned for each column, with a log
            link so that it can become large.
        loc: The centre :math:`\mu`.
        scale: The scale :math:`\sigma`, learned for each column.

    Example:
        >>> StudentT(df=4.0)
        StudentT(df=4.0, loc=Predicted(), scale=Shared())
    """

    def __init__(
        self,
        *,
        df: ParameterSpec = Shared(link="log"),
        loc: ParameterSpec = Predicted(),
        scale: ParameterSpec = Shared(),
    ) -> None:
        super().__init__(dist.StudentT, df=df, loc=loc, scale=scale)
