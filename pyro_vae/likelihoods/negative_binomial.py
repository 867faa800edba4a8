"""The likelihood of overdispersed counts without a bound."""

import pyro.distributions as dist

from ..distributions import Family, Likelihood, ParameterSpec, Predicted, Shared

__all__ = ["NegativeBinomial"]


class NegativeBinomial(Family, Likelihood):
    r"""Creates the likelihood of overdispersed counts without a bound.

    .. math:: p(x \mid z) = \prod_j \frac{\Gamma(x_j + r_j)}{x_j!\,\Gamma(r_j)}
        \sigma(\eta_j)^{x_j} (1 - \sigma(\eta_j))^{r_j}

    The mean is :math:`r e^{\eta}`, the variance :math:`\mathrm{mean} + \mathrm{mean}^2 / r`.

    References:
        Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018).

    Arguments:
        total_count: The inverse dispersion :math:`r > 0`, learned for each column, with
            a log link so that it can become large.
        logits: The log-odds :math:`\eta`, which is :math:`\log(\mathrm{mean} / r)`.

    Example:
        >>> NegativeBinomial()
        NegativeBinomial(total_count=Shared(link='log'), logits=Predicted())
    """

    def __init__(
        self,
        *,
        total_count: ParameterSpec = Shared(link="log"),
        logits: ParameterSpec = Predicted(),
    ) -> None:
        super().__init__(dist.NegativeBinomial, total_count=total_count, logits=logits)
