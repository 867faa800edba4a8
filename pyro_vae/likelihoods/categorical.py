"""The likelihood of unordered categories, coded 0, ..., K - 1."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted

__all__ = ["Categorical"]


class Categorical(Family, Likelihood):
    r"""Creates the likelihood of unordered categories, coded 0, ..., K - 1.

    .. math:: p(x \mid z) = \prod_j \mathrm{softmax}(\eta_j)_{x_j}

    Arguments:
        num_categories: The number of categories :math:`K`.
        logits: The unnormalised log-probabilities :math:`\eta`; by default predicted.

    Raises:
        ValueError: If neither or both of the two are given.

    Example:
        >>> Categorical(17)
        Categorical(logits=Predicted(shape=17))
    """

    def __init__(self, num_categories: int | None = None, *, logits: ParameterSpec = None) -> None:
        if (num_categories is None) == (logits is None):
            raise ValueError(
                "Expected either the number of categories, as in Categorical(10), or logits; "
                f"got num_categories={num_categories!r}, logits={logits!r}."
            )
        spec = Predicted(shape=num_categories) if logits is None else logits
        super().__init__(dist.Categorical, logits=spec)
