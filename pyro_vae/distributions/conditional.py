"""Base classes of priors, likelihoods and posteriors: modules that return a distribution."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from ..data.checks import short
from .support import check_finite, check_support

__all__ = ["Arguments", "ConditionalDistribution", "Encode", "Likelihood", "Posterior", "Prior"]

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Encode: TypeAlias = Callable[[Tensor], Distribution]


class ConditionalDistribution(nn.Module, ABC):
    r"""A module whose forward returns a Pyro distribution, given features.

    .. math:: h \mapsto p(y \mid h)

    Priors, likelihoods and posteriors are such modules. They differ in their features: none for a
    :class:`Prior`, the decoder's output for a :class:`Likelihood`, the encoder's output for a
    :class:`Posterior`. A program uses only the methods that these classes declare.

    To write one of your own:

    - Subclass :class:`Prior`, :class:`Likelihood` or :class:`Posterior`.
    - Write `forward(features)`. It returns a distribution of `pyro.distributions` whose batch
      shape is that of the rows of features, and whose event shape is that of one draw.
    - If layers depend on sizes, create them in `build`, and return `self`.
    - If the distribution cannot produce some values, raise a ValueError for them in `check`.

    Attributes:
        event_shape: The shape of one draw. `build` sets it, or the constructor of a prior.

    Example:
        >>> import pyro.distributions as dist
        >>> class Tied(Likelihood):
        ...     def build(self, event_shape, features=None):
        ...         self.loc = nn.Linear(features.shape[-1], *event_shape)
        ...         return super().build(event_shape, features)
        ...
        ...     def forward(self, features=None):
        ...         return dist.Normal(self.loc(features), 0.1).to_event(1)
        >>> Tied().build((3,), torch.ones(2, 4))(torch.ones(5, 4)).batch_shape
        torch.Size([5])
    """

    event_shape: torch.Size = torch.Size()
    feature_shape: torch.Size | None = None
    _like: Tensor

    def build(self, event_shape: tuple[int, ...], features: Tensor | None = None) -> Self:
        r"""Creates the layers that depend on sizes. A program calls it once, except on its prior.

        Arguments:
            event_shape: The shape of one draw.
            features: An example of the features, (rows, \*feature_shape); `None` if there are
                none.

        Returns:
            The module itself.
        """
        self.event_shape = torch.Size(event_shape)
        if features is not None:
            self.feature_shape = features.shape[1:]
            self.register_buffer("_like", features.new_zeros(()), persistent=False)
        return self

    @abstractmethod
    def forward(self, features: Tensor | None = None) -> Distribution:
        r"""Returns the distribution of each row.

        Arguments:
            features: Features (\*rows, \*feature_shape); `None` if there are none.
        """

    def check(self, x: Tensor) -> None:
        r"""Refuses values that the distribution cannot produce. By default it accepts all values.

        Arguments:
            x: Values (rows, \*event_shape).

        Raises:
            ValueError: If there are such values; the message names the first of them.
        """

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, positional and by name.

        A member of this package is printed and saved with them. A class of your own may omit this
        method.
        """
        return (), {}

    @property
    def specification(self) -> nn.Module:
        """The member as the user passed it, without the wrapper that a program may add."""
        return self

    def extra_repr(self) -> str:
        """The arguments of the constructor, as Python code."""
        args, kwargs = self.arguments()
        return ", ".join([*map(short, args), *(f"{k}={short(v)}" for k, v in kwargs.items())])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Prior(ConditionalDistribution):
    """The role of p(z): a distribution over latents, without features.

    The constructor of a prior sets `event_shape`, the shape of z. A program does not call `build`
    on a prior; it calls `connect`.

    Example:
        >>> import pyro.distributions as dist
        >>> class Halves(Prior):
        ...     event_shape = torch.Size([2])
        ...
        ...     def forward(self, features=None):
        ...         return dist.HalfNormal(torch.ones(2)).to_event(1)
        >>> Halves()().event_shape
        torch.Size([2])
    """

    def connect(self, x_shape: tuple[int, ...], encode: Encode) -> None:
        r"""Passes the shape of x and the encoder to the prior. Most priors ignore both.

        Arguments:
            x_shape: The shape of one row of x.
            encode: The map from rows (rows, \*x_shape) to q(z | x).
        """

    @property
    def support(self) -> Constraint | None:
        """The set in which z lies; `None` if it is that of the posterior, as for a `VampPrior`."""
        support: Constraint = self().support
        return support


class Likelihood(ConditionalDistribution):
    """The role of p(x | z): a distribution over x, given the features of a decoder.

    Example:
        >>> import pyro_vae as pv
        >>> likelihood = pv.likelihoods.Poisson().build((3,), torch.ones(2, 4))
        >>> isinstance(likelihood, Likelihood), likelihood(torch.ones(5, 4)).event_shape
        (True, torch.Size([3]))
    """

    def check(self, x: Tensor) -> None:
        """Refuses data that the likelihood cannot produce.

        If the bounds of the support are learned, only NaN and infinite values are refused. The
        counts of a multinomial must add up to its total. At an edge of the support, such as 0 and
        1 for a beta, the log-density must be finite.

        Arguments:
            x: Rows of shape (rows, *event_shape).

        Raises:
            ValueError: If a value is NaN, infinite, outside the support, or at an edge where the
                log-density is infinite.
        """
        check_finite(x)
        if not self.event_shape:
            return
        with torch.enable_grad():
            if self.feature_shape is None:
                example = self()
            else:
                example = self(self._like.new_zeros((1, *self.feature_shape)))
            check_support(example, x, self._title())

    def _title(self) -> str:
        return type(self).__name__


class Posterior(ConditionalDistribution):
    """The role of q(z | x): a distribution over latents, given the features of an encoder.

    Example:
        >>> import pyro_vae as pv
        >>> posterior = pv.posteriors.Normal().build((2,), torch.ones(2, 4))
        >>> isinstance(posterior, Posterior), posterior(torch.ones(5, 4)).event_shape
        (True, torch.Size([2]))
    """
