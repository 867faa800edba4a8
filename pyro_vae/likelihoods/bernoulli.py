"""The likelihood of binary data."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["Bernoulli"]


class Bernoulli(Family, Likelihood):
    r"""Creates the likelihood of binary data.

    .. math:: p(x \mid z) = \prod_j \sigma(\eta_j)^{x_j} (1 - \sigma(\eta_j))^{1 - x_j}

    Grey levels in (0, 1) are refused: a Bernoulli variable is 0 or 1. Binarise them
    (`pyro_vae.datasets.binarize`), or use :class:`ContinuousBernoulli` or :class:`Beta`.

    Arguments:
        logits: The log-odds :math:`\eta` of a one.

    Example:
        >>> Bernoulli()
        Bernoulli(logits=Predicted())
    """

    def __init__(self, *, logits: ParameterSpec = Predicted()) -> None:
        super().__init__(dist.Bernoulli, logits=logits)
