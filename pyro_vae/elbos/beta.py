"""A weight on the KL terms."""

import copy
from collections.abc import Callable
from typing import Any

import pyro.infer
from torch import Tensor

from ..data.checks import checked_finite
from .estimator import Estimate, Estimator, Objective, Schedule
from .log_densities import Program, Structure
from .trace_elbo import Trace_ELBO

__all__ = ["BetaELBO"]


class BetaELBO(Estimator):
    r"""Creates the objective with a weight on the KL terms, in model and guide alike.

    .. math:: L(x) = E_q[\log p(x \mid z)] - \beta\, \mathrm{KL}(q(z \mid x), p(z))

    For :math:`\beta \ge 1` a lower bound on log p(x), below the ELBO; for :math:`\beta < 1` no
    bound. Value and gradient are unbiased where those of the estimator inside are. With a
    multi-sample bound inside, the log-weights are
    :math:`\log p(x \mid z) + \beta (\log p(z) - \log q(z \mid x))`, and nothing is bounded.

    References:
        beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl.

    Arguments:
        beta: The weight :math:`\beta`, or a schedule: a function from the number of steps taken to
            the weight. Under :func:`pyro_vae.fit` the count goes on over a resumed fit; under
            `pyro.infer.SVI` every gradient counts as a step. `per_row` and `compare_elbos` take
            the weight at the step that the object is at, 0 for a new one, which `at_step` sets;
            a fit leaves it where it was.
        elbo: The estimator inside, `Trace_ELBO()` by default.

    Raises:
        ValueError: Where beta is negative, or the estimator has no KL terms to weigh.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> elbo = BetaELBO(lambda step: min(1.0, step / 1000), pv.elbos.TraceMeanField_ELBO())
        >>> history = pv.fit(vae, torch.ones(64, 4), elbo=elbo, max_epochs=2, device="cpu")
    """

    def __init__(
        self, beta: float | Callable[[int], float], elbo: Estimator | None = None
    ) -> None:
        if isinstance(beta, pyro.infer.ELBO | type):
            raise ValueError(
                "Expected beta first, and then the estimator, as in BetaELBO(4.0, STL()); got "
                f"{beta!r}."
            )
        self.beta = beta if callable(beta) else checked_finite("beta", beta, least=0.0)
        self.schedule = Schedule(beta) if callable(beta) else None
        self.inner = Trace_ELBO() if elbo is None else copy.copy(elbo)
        if not isinstance(self.inner, Estimator) or not self.inner.takes_kl_weight:
            raise ValueError(
                "Expected an estimator of pyro_vae.elbos whose KL terms have a weight; got "
                f"{elbo!r}."
            )
        super().__init__(
            num_particles=self.inner.num_particles,
            vectorize_particles=self.inner.vectorize_particles,
            max_plate_nesting=self.inner.max_plate_nesting,
        )
        self.max_plate_nesting = self.inner.max_plate_nesting

    @property
    def steps(self) -> int:
        """The step that its schedule is at."""
        return 0 if self.schedule is None else self.schedule.steps

    def __copy__(self) -> "BetaELBO":
        made = BetaELBO(self.beta, self.inner)
        made.kl_weight = self.kl_weight
        made.at_step(self.steps)
        return made

    @property
    def direction(self) -> str:  # type: ignore[override]
        """What its value is to log p(x)."""
        is_bound = self.inner.is_linear and not callable(self.beta) and self.beta >= 1.0
        return self.inner.direction if is_bound else "no bound"

    @property
    def needs_rsample(self) -> bool:  # type: ignore[override]
        """Whether the guide must draw every site by `rsample`."""
        return self.inner.needs_rsample

    @property
    def takes_globals(self) -> bool:  # type: ignore[override]
        """Whether there may be sites outside the plate `"data"`."""
        return self.inner.takes_globals

    @property
    def unbiased_value(self) -> bool:  # type: ignore[override]
        """Whether its value is unbiased for the objective."""
        return self.inner.unbiased_value

    @property
    def unbiased_gradient(self) -> bool:  # type: ignore[override]
        """Whether its gradient is unbiased for that of the objective."""
        return self.inner.unbiased_gradient

    @property
    def is_split(self) -> bool:  # type: ignore[override]
        """Whether model and guide follow objectives of their own."""
        return self.inner.is_split

    @property
    def is_traceable(self) -> bool:  # type: ignore[override]
        """Whether the estimator inside asks for no number."""
        return self.inner.is_traceable

    @property
    def least_particles(self) -> int:  # type: ignore[override]
        """The smallest number of draws that the estimator inside can take."""
        return self.inner.least_particles

    def plain(self) -> Estimator | None:
        """Returns the same with autograd's gradient of the estimator inside."""
        return self._around(self.inner.plain())

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns a copy with another number of draws of the estimator inside.

        Arguments:
            num_particles: The number of draws.
        """
        return self._around(self.inner.with_particles(num_particles))

    def _around(self, inner: Estimator | None) -> Estimator | None:
        if inner is None:
            return None
        made = BetaELBO(self.beta, inner)
        made.kl_weight = self.kl_weight
        made.at_step(self.steps)
        return made

    def check(self, known: Structure) -> None:
        """Refuses programs that the estimator inside would be wrong for.

        Arguments:
            known: What the program is made of.

        Raises:
            ValueError: As the estimator inside.
        """
        self.inner.check(known)

    def at_step(self, steps: int) -> None:
        """Tells the schedule how many steps were taken.

        Arguments:
            steps: The number of steps.
        """
        if self.schedule is not None:
            self.schedule.steps = steps
        self.inner.at_step(steps)

    def settle(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Lets the estimator inside find out what it must.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        self.inner.max_plate_nesting = self.max_plate_nesting
        self.inner.settle(model, guide, args, kwargs)
        self.max_plate_nesting = self.inner.max_plate_nesting

    def schedules(self) -> list[Schedule]:
        """Returns its own, and those of the estimator inside."""
        own = [] if self.schedule is None else [self.schedule]
        return own + self.inner.schedules()

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Returns the loss and the terms of the ELBO.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        self._weigh()
        if self.schedule is not None:
            self.schedule.count()
        estimate = self.inner.estimate(model, guide, *args, **kwargs)
        self.max_plate_nesting = self.inner.max_plate_nesting
        return estimate

    def _weigh(self) -> None:
        beta: Any = self.beta if self.schedule is None else self.schedule.now()
        self.inner.kl_weight = beta * self.kl_weight
        self.inner.max_plate_nesting = self.max_plate_nesting

    def _rows(self, objective: Objective, args: Any, kwargs: Any) -> Tensor:
        self._weigh()
        return self.inner._rows(Objective(*objective.pair, self.inner), args, kwargs)

    def __repr__(self) -> str:
        beta = getattr(self.beta, "__qualname__", repr(self.beta))
        return f"BetaELBO({beta}, {self.inner!r})"
