"""The point posterior of a plain autoencoder."""

import pyro.distributions as dist

from ..distributions import Arguments, Family, ParameterSpec, Posterior, Predicted

__all__ = ["Delta"]


class Delta(Family, Posterior):
    r"""Creates a point posterior, which makes the model a plain autoencoder.

    .. math:: q(z \mid x) = \delta(z - \mu(x))

    The ELBO becomes :math:`\log p(x, \mu(x))`. It is not a bound on log p(x), because the point
    has no density.

    Arguments:
        v: The point :math:`\mu`.

    Example:
        >>> Delta()
        Delta(v=Predicted())
    """

    def __init__(self, *, v: ParameterSpec = Predicted()) -> None:
        super().__init__(dist.Delta, v=v, log_density=0.0)

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, positional and by name."""
        return (), {"v": self.specs["v"]}
