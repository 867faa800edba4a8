"""The variational posterior of any Pyro distribution."""

from torch.distributions import Distribution

from ..distributions import Family, Word

__all__ = ["Posterior"]


class Posterior(Family):
    r"""Creates the variational posterior of any Pyro distribution.

    .. math:: q(z \mid x) = D(z;\ \theta_1(h), \theta_2(h), \dots), \qquad h = \mathrm{encoder}(x)

    Where its support is the real line and the prior's is not, it is carried over to the prior's
    by `biject_to(prior.support)`, as in Stan and in Pyro's autoguides.

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: A word on each of its parameters, as in :class:`pyro_vae.families.Family`:
            predicted from the encoder's features where nothing is said, `Shared`, or fixed.

    Raises:
        ValueError: Where a word is on something that is not a parameter, or a count is not given.

    Example:
        >>> import pyro.distributions as dist
        >>> Posterior(dist.Laplace)
        Posterior(Laplace)
    """

    def __init__(self, distribution: type[Distribution], /, **parameters: Word) -> None:
        super().__init__(distribution, **parameters)
