"""A user's own module in the role of a prior, a likelihood or a posterior."""

from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from .conditional import Likelihood, Posterior, Prior

__all__ = ["OwnLikelihood", "OwnPosterior", "OwnPrior"]


class OwnPrior(Prior):
    """Creates a prior from a module whose `forward()` returns a distribution.

    Arguments:
        module: The module.

    Raises:
        ValueError: If the module's `forward()` does not return a distribution.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        with torch.no_grad():
            self.event_shape = self().event_shape

    @property
    def specification(self) -> nn.Module:
        """The user's module."""
        return self.module

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns p(z)."""
        return completed(self.module(), self.module)


class OwnLikelihood(Likelihood):
    """Creates a likelihood from a module whose `forward(features)` returns a distribution.

    Arguments:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def specification(self) -> nn.Module:
        """The user's module."""
        return self.module

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns p(x | z)."""
        return completed(self.module(features), self.module)


class OwnPosterior(Posterior):
    """Creates a posterior from a module whose `forward(features)` returns a distribution.

    Arguments:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def specification(self) -> nn.Module:
        """The user's module."""
        return self.module

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns q(z | x)."""
        return completed(self.module(features), self.module)


class _Completed(TorchDistribution):  # type: ignore[misc]
    """Adds a support and `sample` to a distribution over real vectors that lacks them.

    `pyro.contrib.zuko.ZukoToPyro` is one: it has only `log_prob`, and a call that draws.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Any) -> None:
        self.base, self.has_rsample = base, base.has_rsample
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        draws: Tensor = self.base(torch.Size(sample_shape))
        return draws

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.base.log_prob(value)
        return log_prob

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Completed":
        return _Completed(self.base.expand(torch.Size(batch_shape)))


def completed(distribution: Any, module: nn.Module) -> Distribution:
    """Returns the distribution, with a support and `sample` added if it lacks them.

    Arguments:
        distribution: The return value of the module's `forward`.
        module: The module, for the message.

    Raises:
        ValueError: If the value is not a distribution.
    """
    if not isinstance(distribution, Distribution):
        raise ValueError(
            f"Expected forward() of {type(module).__name__} to return a distribution; got "
            f"{type(distribution).__name__}."
        )
    try:
        distribution.support  # noqa: B018 - Pyro's own default raises
    except NotImplementedError:
        return _Completed(distribution)
    return distribution
