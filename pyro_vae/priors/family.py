"""The prior from any Pyro distribution, with fixed or learned parameters."""

from torch.distributions import Distribution

from .. import distributions
from ..data.checks import checked_shape, size_of
from ..distributions import Arguments, ParameterSpec, Prior, Shared

__all__ = ["Family"]


class Family(distributions.Family, Prior):
    r"""Creates a prior from any Pyro distribution, with fixed or learned parameters.

    .. math:: p(z) = D(z;\ \theta_1, \theta_2, \dots)

    Arguments:
        distribution: A class of Pyro distributions.
        event_shape: The shape of z, an int or a tuple.
        parameters: How each parameter is obtained: `Shared()`, which is the default, or a fixed
            value.

    Raises:
        ValueError: If the distribution has no parameter of that name, a parameter without a
            default is missing, a fixed value violates its constraint, or a size is not a positive
            integer.

    Example:
        >>> import pyro.distributions as dist
        >>> prior = Family(dist.StudentT, 8, df=4.0, loc=0.0)
        >>> prior().event_shape
        torch.Size([8])
    """

    default = Shared

    def __init__(
        self,
        distribution: type[Distribution],
        event_shape: int | tuple[int, ...],
        /,
        **parameters: ParameterSpec,
    ) -> None:
        super().__init__(distribution, **parameters)
        self.build(checked_shape(event_shape))

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, positional and by name."""
        return (self.distribution, size_of(self.event_shape)), dict(self.specs)
