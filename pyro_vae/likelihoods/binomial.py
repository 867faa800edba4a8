"""The likelihood of counts out of a known total."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["Binomial"]


class Binomial(Family, Likelihood):
    r"""Creates the likelihood of counts out of a known total.

    .. math:: p(x \mid z) =
        \prod_j \binom{n}{x_j} \sigma(\eta_j)^{x_j} (1 - \sigma(\eta_j))^{n - x_j}

    Arguments:
        total_count: The number of trials :math:`n`, a number or a tensor of the event's shape.
        logits: The log-odds :math:`\eta` of a success.

    Example:
        >>> Binomial(total_count=16)
        Binomial(total_count=16, logits=Predicted())
    """

    def __init__(self, total_count: ParameterSpec, *, logits: ParameterSpec = Predicted()) -> None:
        super().__init__(dist.Binomial, total_count=total_count, logits=logits)
