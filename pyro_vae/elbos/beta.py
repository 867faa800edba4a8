"""A weight on the KL terms."""

import copy
from collections.abc import Callable

import pyro.infer
from torch import Tensor

from ..data.checks import checked_finite
from ..data.source import Row
from .estimator import Estimate, Estimator, Objective, Schedule
from .log_densities import Args, Kwargs, Program, Structure
from .trace_elbo import Trace_ELBO

__all__ = ["BetaELBO"]


class BetaELBO(Estimator):
    r"""Creates the objective with a weight on the KL terms, in model and guide alike.

    .. math:: L(x) = E_q[\log p(x \mid z)] - \beta\, \mathrm{KL}(q(z \mid x), p(z))

    For :math:`\beta \ge 1` a lower bound on log p(x), below the ELBO; for :math:`\beta < 1` no
    bound. Value and gradient are unbiased if those of the inner estimator are. If that is a
    multi-sample bound, the log-weights are
    :math:`\log p(x \mid z) + \beta (\log p(z) - \log q(z \mid x))`, and the value is no bound.

    References:
        beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl.

    Arguments:
        beta: The weight :math:`\beta`, or a schedule: a function from the number of steps taken to
            the weight. In :func:`pyro_vae.fit` a resumed fit continues the count; in
            `pyro.infer.SVI` every gradient counts as a step. `per_row` and `compare_elbos` use the
            weight at the current number of steps, which is 0 for a new object. `at_step` sets it;
            a fit does not change it.
        elbo: The inner estimator, whose KL terms get the weight; `Trace_ELBO()` by default.

    Raises:
        ValueError: If beta is negative, or the estimator has no weight on KL terms.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> inner = pv.elbos.TraceMeanField_ELBO()
        >>> elbo = BetaELBO(beta=lambda step: min(1.0, step / 1000), elbo=inner)
        >>> history = pv.fit(vae, torch.ones(64, 4), elbo=elbo, max_epochs=2, device="cpu")
        >>> BetaELBO(beta=4.0)
        BetaELBO(beta=4.0, elbo=Trace_ELBO(1, vectorize_particles=False))
    """

    def __init__(
        self, *, beta: float | Callable[[int], float], elbo: Estimator | None = None
    ) -> None:
        if isinstance(beta, pyro.infer.ELBO | type):
            raise ValueError(
                "Expected beta to be a number or a function of the step, as in BetaELBO(beta=4.0, "
                f"elbo=STL()); got {beta!r}."
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
        is_bound = self.inner.is_linear and not callable(self.beta) and self.beta >= 1.0
        self.direction = self.inner.direction if is_bound else "no bound"
        self.unbiased_value = self.inner.unbiased_value
        self.unbiased_gradient = self.inner.unbiased_gradient
        self.needs_rsample = self.inner.needs_rsample
        self.takes_globals = self.inner.takes_globals
        self.is_split = self.inner.is_split
        self.is_traceable = self.inner.is_traceable
        self.least_particles = self.inner.least_particles

    @property
    def steps(self) -> int:
        """The number of steps that its schedule has counted; 0 if the weight is a number."""
        return 0 if self.schedule is None else self.schedule.steps

    def _around(self, inner: Estimator) -> "BetaELBO":
        made = BetaELBO(beta=self.beta, elbo=inner)
        made.kl_weight = self.kl_weight
        made.at_step(self.steps)
        return made

    def __copy__(self) -> "BetaELBO":
        return self._around(self.inner)

    def plain(self) -> Estimator | None:
        """Returns the same weight on `plain()` of the inner estimator, or `None`."""
        inner = self.inner.plain()
        return None if inner is None else self._around(inner)

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns a copy with another number of draws of the inner estimator."""
        inner = self.inner.with_particles(num_particles)
        return None if inner is None else self._around(inner)

    def check(self, structure: Structure) -> None:
        """Refuses programs that the inner estimator does not apply to."""
        self.inner.check(structure)

    def at_step(self, steps: int) -> None:
        """Sets the number of steps of its schedule and of the inner estimator's schedules."""
        if self.schedule is not None:
            self.schedule.steps = steps
        self.inner.at_step(steps)

    def infer_plate_nesting(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> None:
        """Sets `max_plate_nesting` as the inner estimator infers it."""
        self.inner.max_plate_nesting = self.max_plate_nesting
        self.inner.infer_plate_nesting(model, guide, args, kwargs)
        self.max_plate_nesting = self.inner.max_plate_nesting

    def schedules(self) -> list[Schedule]:
        """Returns its schedule, and those of the inner estimator."""
        own = [] if self.schedule is None else [self.schedule]
        return own + self.inner.schedules()

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Returns the estimate of the inner estimator with the weight."""
        self._set_inner_weight()
        if self.schedule is not None:
            self.schedule.count()
        estimate = self.inner.estimate(model, guide, *args, **kwargs)
        self.max_plate_nesting = self.inner.max_plate_nesting
        return estimate

    def _set_inner_weight(self) -> None:
        beta = self.beta if self.schedule is None else self.schedule.now()
        self.inner.kl_weight = beta * self.kl_weight  # type: ignore[operator]
        self.inner.max_plate_nesting = self.max_plate_nesting

    def _row_values(self, objective: Objective, x: Row) -> Tensor:
        self._set_inner_weight()
        return self.inner._row_values(Objective(*objective.pair, self.inner), x)

    def __repr__(self) -> str:
        beta = getattr(self.beta, "__qualname__", repr(self.beta))
        return f"BetaELBO(beta={beta}, elbo={self.inner!r})"
