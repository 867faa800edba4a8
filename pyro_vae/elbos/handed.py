"""What Pyro's own estimators have in common when they are handed on."""

import contextlib
from abc import abstractmethod
from typing import Any

from torch import Tensor

from ..data.checks import checked_count
from .estimator import Estimate, Estimator, Tempered
from .log_densities import Program

__all__ = ["Handed"]


class Handed(Estimator):
    """The base of Pyro's estimators: their arguments, and the weight of the KL terms.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether they are drawn in one pass.
        options: What else the class of Pyro's takes.
    """

    needs_rsample = False
    takes_globals = True

    def __init__(
        self, num_particles: int = 1, *, vectorize_particles: bool = True, **options: Any
    ) -> None:
        num_particles = checked_count("num_particles", num_particles)
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles and num_particles > 1,
            **options,
        )

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Returns the loss and the terms of the ELBO.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        with self._tempered():
            return self._estimate(model, guide, args, kwargs)

    def _tempered(self) -> Any:
        is_tempered = isinstance(self.kl_weight, Tensor) or self.kl_weight != 1.0
        return Tempered(self.kl_weight) if is_tempered else contextlib.nullcontext()

    @abstractmethod
    def _estimate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Estimate: ...

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_particles={self.num_particles}, "
            f"vectorize_particles={self.vectorize_particles})"
        )
