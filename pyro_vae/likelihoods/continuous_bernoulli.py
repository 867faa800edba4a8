"""The likelihood of grey levels in [0, 1]."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["ContinuousBernoulli"]


class ContinuousBernoulli(Family, Likelihood):
    r"""Creates the likelihood of grey levels in [0, 1].

    .. math:: p(x \mid z) = \prod_j C(\lambda_j) \lambda_j^{x_j} (1 - \lambda_j)^{1 - x_j}

    :math:`C(\lambda)` is the constant that normalises the density.

    References:
        The continuous Bernoulli (Loaiza-Ganem & Cunningham, 2019), arXiv 1907.06845.

    Arguments:
        logits: The logit of :math:`\lambda`.

    Example:
        >>> ContinuousBernoulli()
        ContinuousBernoulli(logits=Predicted())
    """

    def __init__(self, *, logits: ParameterSpec = Predicted()) -> None:
        super().__init__(dist.ContinuousBernoulli, logits=logits)
