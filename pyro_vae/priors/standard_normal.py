"""The standard normal prior."""

import pyro.distributions as dist

from ..data.checks import checked_shape, size_of
from ..distributions import Arguments, Family, Prior

__all__ = ["StandardNormal"]


class StandardNormal(Family, Prior):
    r"""Creates the standard normal prior, the default.

    .. math:: p(z) = N(z;\ 0, I)

    Arguments:
        event_shape: The shape of z, an int or a tuple.

    Raises:
        ValueError: If a size is not a positive integer.

    Example:
        >>> StandardNormal(8)().event_shape
        torch.Size([8])
    """

    def __init__(self, event_shape: int | tuple[int, ...]) -> None:
        super().__init__(dist.Normal, loc=0.0, scale=1.0)
        self.build(checked_shape(event_shape))

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, positional and by name."""
        return (size_of(self.event_shape),), {}
