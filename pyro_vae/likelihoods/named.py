r"""Likelihoods with a name: a Pyro distribution, and what the field expects of its parameters."""

import pyro.distributions as dist

from ..distributions import Predicted, Shared, Word
from .likelihood import Likelihood

__all__ = [
    "Bernoulli",
    "Beta",
    "BetaBinomial",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "Gamma",
    "Laplace",
    "LogNormal",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
]


class Bernoulli(Likelihood):
    r"""Creates the likelihood of binary data.

    .. math:: p(x \mid z) = \prod_j \sigma(\eta_j)^{x_j} (1 - \sigma(\eta_j))^{1 - x_j}

    Grey levels in (0, 1) are refused: under a Bernoulli they have no density. Binarise them
    (`pyro_vae.datasets.binarize`), or take :class:`ContinuousBernoulli` or :class:`Beta`.

    Arguments:
        logits: The log-odds :math:`\eta` of a one.

    Example:
        >>> Bernoulli()
        Bernoulli(logits=Predicted())
    """

    def __init__(self, *, logits: Word = Predicted()) -> None:
        super().__init__(dist.Bernoulli, logits=logits)


class ContinuousBernoulli(Likelihood):
    r"""Creates the likelihood of grey levels in [0, 1].

    .. math:: p(x \mid z) = \prod_j C(\lambda_j) \lambda_j^{x_j} (1 - \lambda_j)^{1 - x_j}

    References:
        The continuous Bernoulli (Loaiza-Ganem & Cunningham, 2019), arXiv 1907.06845.

    Arguments:
        logits: The logit of :math:`\lambda`.

    Example:
        >>> ContinuousBernoulli()
        ContinuousBernoulli(logits=Predicted())
    """

    def __init__(self, *, logits: Word = Predicted()) -> None:
        super().__init__(dist.ContinuousBernoulli, logits=logits)


class Binomial(Likelihood):
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

    def __init__(self, total_count: Word, *, logits: Word = Predicted()) -> None:
        super().__init__(dist.Binomial, total_count=total_count, logits=logits)


class BetaBinomial(Likelihood):
    r"""Creates the likelihood of counts out of a known total that vary more than a binomial's.

    .. math:: p(x \mid z) = \prod_j \binom{n}{x_j}
        \frac{B(x_j + \alpha_j, n - x_j + \beta_j)}{B(\alpha_j, \beta_j)}

    Arguments:
        total_count: The number of trials :math:`n`.
        concentration1: :math:`\alpha > 0`.
        concentration0: :math:`\beta > 0`.

    Example:
        >>> BetaBinomial(total_count=16)
        BetaBinomial(total_count=16, concentration1=Predicted(), concentration0=Predicted())
    """

    def __init__(
        self,
        total_count: Word,
        *,
        concentration1: Word = Predicted(),
        concentration0: Word = Predicted(),
    ) -> None:
        super().__init__(
            dist.BetaBinomial,
            total_count=total_count,
            concentration1=concentration1,
            concentration0=concentration0,
        )


class Categorical(Likelihood):
    r"""Creates the likelihood of codes 0, ..., K - 1 without order.

    .. math:: p(x \mid z) = \prod_j \mathrm{softmax}(\eta_j)_{x_j}

    Arguments:
        num_categories: The number of categories :math:`K`.
        logits: The unnormalised log-probabilities :math:`\eta`; by default predicted.

    Raises:
        ValueError: Where neither of the two is given.

    Example:
        >>> Categorical(17)
        Categorical(logits=Predicted(shape=17))
    """

    def __init__(self, num_categories: int | None = None, *, logits: Word = None) -> None:
        if (num_categories is None) == (logits is None):
            raise ValueError(
                "Expected the number of categories, as in Categorical(10), or a word on the "
                f"logits; got num_categories={num_categories!r}, logits={logits!r}."
            )
        word = Predicted(shape=num_categories) if logits is None else logits
        super().__init__(dist.Categorical, logits=word)


class Poisson(Likelihood):
    r"""Creates the likelihood of counts without a bound.

    .. math:: p(x \mid z) = \prod_j e^{-\lambda_j} \lambda_j^{x_j} / x_j!

    Arguments:
        rate: The mean :math:`\lambda > 0`, predicted with a log link.

    Example:
        >>> Poisson()
        Poisson(rate=Predicted(link='log'))
    """

    def __init__(self, *, rate: Word = Predicted(link="log")) -> None:
        super().__init__(dist.Poisson, rate=rate)


class NegativeBinomial(Likelihood):
    r"""Creates the likelihood of counts that vary more than a Poisson's.

    .. math:: p(x \mid z) = \prod_j \frac{\Gamma(x_j + r_j)}{x_j!\,\Gamma(r_j)}
        \sigma(\eta_j)^{x_j} (1 - \sigma(\eta_j))^{r_j}

    The mean is :math:`r e^{\eta}`, the variance :math:`\mathrm{mean} + \mathrm{mean}^2 / r`.

    References:
        Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018).

    Arguments:
        total_count: The inverse dispersion :math:`r > 0`, learned for each column.
        logits: :math:`\eta`.

    Example:
        >>> NegativeBinomial()
        NegativeBinomial(total_count=Shared(), logits=Predicted())
    """

    def __init__(
        self,
        *,
        total_count: Word = Shared(),
        logits: Word = Predicted(),
    ) -> None:
        super().__init__(dist.NegativeBinomial, total_count=total_count, logits=logits)


class Normal(Likelihood):
    r"""Creates the likelihood of real data with light tails.

    .. math:: p(x \mid z) = \prod_j N(x_j;\ \mu_j, \sigma_j^2)

    Arguments:
        loc: The mean :math:`\mu`.
        scale: The standard deviation :math:`\sigma`, learned for each column. Predicted, it can
            shrink to nothing on rows that are fitted exactly.

    Example:
        >>> Normal(scale=Shared(scalar=True))
        Normal(loc=Predicted(), scale=Shared(scalar=True))
    """

    def __init__(
        self,
        *,
        loc: Word = Predicted(),
        scale: Word = Shared(),
    ) -> None:
        super().__init__(dist.Normal, loc=loc, scale=scale)


class StudentT(Likelihood):
    r"""Creates the likelihood of real data with heavy tails.

    .. math:: p(x \mid z) = \prod_j t_{\nu}\left((x_j - \mu_j) / \sigma_j\right) / \sigma_j

    Arguments:
        df: The degrees of freedom :math:`\nu > 0`.
        loc: The centre :math:`\mu`.
        scale: The scale :math:`\sigma`, learned for each column.

    Example:
        >>> StudentT(df=4.0)
        StudentT(df=4.0, loc=Predicted(), scale=Shared())
    """

    def __init__(
        self,
        *,
        df: Word = Shared(init=4.0),
        loc: Word = Predicted(),
        scale: Word = Shared(),
    ) -> None:
        super().__init__(dist.StudentT, df=df, loc=loc, scale=scale)


class Laplace(Likelihood):
    r"""Creates the likelihood of real data with exponential tails.

    .. math:: p(x \mid z) = \prod_j \exp(-|x_j - \mu_j| / b_j) / (2 b_j)

    Arguments:
        loc: The median :math:`\mu`.
        scale: The mean absolute deviation :math:`b`, learned for each column.

    Example:
        >>> Laplace()
        Laplace(loc=Predicted(), scale=Shared())
    """

    def __init__(
        self,
        *,
        loc: Word = Predicted(),
        scale: Word = Shared(),
    ) -> None:
        super().__init__(dist.Laplace, loc=loc, scale=scale)


class LogNormal(Likelihood):
    r"""Creates the likelihood of positive data, normal on the log scale.

    .. math:: p(x \mid z) = \prod_j N(\log x_j;\ \mu_j, \sigma_j^2) / x_j

    Arguments:
        loc: The mean :math:`\mu` of the logarithm.
        scale: The standard deviation :math:`\sigma` of the logarithm, learned for each column.

    Example:
        >>> LogNormal()
        LogNormal(loc=Predicted(), scale=Shared())
    """

    def __init__(
        self,
        *,
        loc: Word = Predicted(),
        scale: Word = Shared(),
    ) -> None:
        super().__init__(dist.LogNormal, loc=loc, scale=scale)


class Gamma(Likelihood):
    r"""Creates the likelihood of positive data.

    .. math:: p(x \mid z) =
        \prod_j \beta_j^{\alpha_j} x_j^{\alpha_j - 1} e^{-\beta_j x_j} / \Gamma(\alpha_j)

    Arguments:
        concentration: The shape :math:`\alpha > 0`, learned for each column.
        rate: The rate :math:`\beta > 0`, predicted with a log link; the mean is
            :math:`\alpha / \beta`.

    Example:
        >>> Gamma()
        Gamma(concentration=Shared(), rate=Predicted(link='log'))
    """

    def __init__(
        self,
        *,
        concentration: Word = Shared(),
        rate: Word = Predicted(link="log"),
    ) -> None:
        super().__init__(dist.Gamma, concentration=concentration, rate=rate)


class Beta(Likelihood):
    r"""Creates the likelihood of shares in the open interval (0, 1).

    .. math:: p(x \mid z) =
        \prod_j x_j^{\alpha_j - 1} (1 - x_j)^{\beta_j - 1} / B(\alpha_j, \beta_j)

    Arguments:
        concentration1: :math:`\alpha > 0`.
        concentration0: :math:`\beta > 0`.

    Example:
        >>> Beta()
        Beta(concentration1=Predicted(), concentration0=Predicted())
    """

    def __init__(
        self,
        *,
        concentration1: Word = Predicted(),
        concentration0: Word = Predicted(),
    ) -> None:
        super().__init__(dist.Beta, concentration1=concentration1, concentration0=concentration0)
