"""Base classes of the objectives that are estimated from K draws of each row."""

import contextlib
import copy
import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..data.checks import checked_count, checked_draws
from .estimator import Estimate, Estimator, refuse_unreparameterised
from .log_densities import (
    Args,
    Densities,
    Kwargs,
    Particles,
    Program,
    RowTerms,
    Site,
    draw,
    unreparameterised,
)

__all__ = ["Autograd", "MonteCarlo", "MultiSample", "Weighted", "Weights", "log_mean_exp"]


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Returns log mean exp over the first dim.

    Arguments:
        log_weights: The logarithms, shape (num_particles, rows).

    Returns:
        Shape (rows,).
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


class MonteCarlo(Estimator):
    """The base class of the objectives that draw K times from the guide, in one pass.

    If all sites of the rows have one scale (N / B of a subsampling plate), it multiplies the loss
    and is left out of the objective of each row.

    To add an objective, subclass it and write `objective`; autograd then gives the gradient.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.
    """

    def __init__(self, num_particles: int, *, max_plate_nesting: float = math.inf) -> None:
        count = checked_draws("num_particles", num_particles, least=self.least_particles)
        if max_plate_nesting != math.inf:
            checked_count("max_plate_nesting", max_plate_nesting, least=0)
        super().__init__(num_particles=count, max_plate_nesting=max_plate_nesting)

    @abstractmethod
    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            particles: The draws, and the traces of model and guide.
            densities: Their log-densities.

        Raises:
            ValueError: If the estimator does not apply to the programs.
        """

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns a copy with another number of draws K."""
        made = copy.copy(self)
        made.num_particles = checked_draws(
            "num_particles", num_particles, least=self.least_particles
        )
        return made

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Draws from the guide and evaluates the objective."""
        particles = self._drawn(model, guide, args, kwargs)
        densities = particles.densities()
        per_row = self.objective(particles, densities)
        loss = -(particles.scale() * per_row).sum()
        return Estimate(loss, per_row, _mean_terms(densities))

    def infer_plate_nesting(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> None:
        """Infers `max_plate_nesting` by a dry run, if the user did not set it."""
        if math.isinf(self.max_plate_nesting):
            self._guess_max_plate_nesting(model, guide, args, kwargs)

    def _drawn(
        self,
        model: Program,
        guide: Program,
        args: Args,
        kwargs: Kwargs,
        handler: contextlib.AbstractContextManager[object] | None = None,
    ) -> Particles:
        self.infer_plate_nesting(model, guide, args, kwargs)
        nesting = int(self.max_plate_nesting)
        particles = draw(model, guide, args, kwargs, self.num_particles, nesting, handler)
        if self.needs_rsample:
            refuse_unreparameterised(self, unreparameterised(particles.guide))
        return particles

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_particles})"


class MultiSample(MonteCarlo):
    r"""The base class of the objectives that are a function of K log-weights of each row.

    .. math::
        \log w_k = \log p(x \mid z_k) + \beta\, (\log p(z_k) - \log q(z_k \mid x)),
        \qquad z_k \sim q(z \mid x)

    The weight :math:`\beta` of the KL terms is 1 unless there is a warm-up or a `BetaELBO`.

    To add an objective, subclass it and write `bound`; autograd then gives the gradient.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.
    """

    is_linear = False

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            log_weights: Shape (num_particles, rows), in float64.
        """

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the bound of the log-weights."""
        return self.bound(densities.tempered(self.kl_weight))

    def plain(self) -> Estimator | None:
        """Returns a copy of the estimator, since its gradient is autograd's already."""
        return copy.copy(self)


def _mean_terms(densities: Densities) -> RowTerms:
    """The terms of the ELBO of each row, the mean over particles, without gradient."""
    reconstruction = densities.reconstruction.detach()
    log_weights = densities.log_weights.detach()
    return RowTerms(reconstruction.mean(0), (reconstruction - log_weights).mean(0), None)


class Weights(NamedTuple):
    r"""The weights of the terms in the gradient of an objective.

    Each has the shape (num_particles, rows), and no gradient.

    Arguments:
        model: The weight of the derivative of log p(x, z) in the model's parameters, with z fixed.
        path: The weight of the derivative of log w in z, which the chain rule takes to the guide's
            parameters; `None` for 0.
        guide: The weight of the derivative of log q(z | x) in the guide's parameters, with z
            fixed; `None` for 0.
        ratio: `path / model`, if that is bounded. It saves a backward pass through the model.
    """

    model: Tensor
    path: Tensor | None
    guide: Tensor | None
    ratio: Tensor | None = None


class Weighted(MultiSample):
    """The base class of the objectives whose gradient is a weighted sum over the draws.

    To add an objective, subclass it and write `weights`; write `bound` too, unless the value is
    that of `IWAE`.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns log mean w, the value of `IWAE`."""
        return log_mean_exp(log_weights)

    @abstractmethod
    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the weights of the gradients of the terms.

        Arguments:
            log_weights: Shape (num_particles, rows), in float64, without gradient.
        """

    def plain(self) -> Estimator | None:
        """Returns the same `bound` with autograd's gradient, if this gradient is unbiased."""
        return Autograd(self) if self.unbiased_gradient else None

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Draws from the guide, evaluates the bound, and gives it the weighted gradient."""
        gates = _Gates(pass_on=self.needs_rsample)
        particles = self._drawn(model, guide, args, kwargs, gates)
        densities = particles.densities()
        log_weights = densities.tempered(self.kl_weight)
        value = self.bound(log_weights.detach())
        scale = particles.scale()
        loss = -(scale * value).sum()
        if torch.is_grad_enabled():
            surrogate = self._surrogate(particles, densities, log_weights, gates)
            loss = loss - scale * (surrogate - surrogate.detach())
        return Estimate(loss, value, _mean_terms(densities))

    def _surrogate(
        self, particles: Particles, densities: Densities, log_weights: Tensor, gates: "_Gates"
    ) -> Tensor:
        """A sum whose gradient is the estimator's.

        If the weights have a bounded ratio and there is one latent site, one backward pass is
        enough: a hook multiplies the gradient of the model's terms in the draws by the ratio. The
        derivative of log q in z is then missing. It is the gradient of the last term, the
        difference of log q at the draws and at the detached draws, in which the derivatives in the
        guide's parameters cancel.
        """
        weights = self.weights(log_weights.detach())
        total = (weights.model * densities.tempered_joint(self.kl_weight)).sum()
        if weights.guide is not None:
            total = total + (weights.guide * densities.log_guide).sum()
        if weights.path is None or not gates.draws:
            return total
        if weights.ratio is None or len(gates.draws) > 1:
            return total + gates.along_paths((weights.path * log_weights).sum())
        site: Site = particles.guide.nodes[next(iter(gates.draws))]
        gates.scaling.ratio = particles.spread(weights.ratio, site).to(site["value"].dtype)
        fixed = site["fn"].log_prob(site["value"].detach())
        at_fixed = particles.to_rows(scale_and_mask(fixed, mask=site["mask"]))
        moving = self.kl_weight * weights.model
        return total - (moving * (densities.log_guide - at_fixed)).sum()


class Autograd(MultiSample):
    """The objective of another estimator, with autograd's gradient.

    Arguments:
        elbo: The estimator.
        sign: The factor of its value; -1 if the guide minimises the value.
    """

    def __init__(self, elbo: MultiSample, *, sign: float = 1.0) -> None:
        super().__init__(elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting)
        self.inner, self.sign = elbo, sign

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the value of the other estimator, times the sign."""
        return self.sign * self.inner.bound(log_weights)


class _ScaledGradient:
    """Backward hook that multiplies the gradient reaching a draw by `ratio`.

    It must not reference the draw, or autograd keeps the graph of every step alive.
    """

    def __init__(self) -> None:
        self.ratio: Tensor | float = 1.0

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.ratio


class _Gates(Messenger):  # type: ignore[misc]
    """Effect handler that stops or scales the gradient that reaches each draw of a guide.

    Arguments:
        pass_on: Whether gradients reach the draws at all.

    Attributes:
        scaling: The hook that all draws have in common.
        draws: For each site the draw, and the view of it that the programs see.
    """

    def __init__(self, *, pass_on: bool) -> None:
        super().__init__()
        self.pass_on = pass_on
        self.scaling = _ScaledGradient()
        self.draws: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        before = msg["value"]
        if not self.pass_on or not before.requires_grad:
            msg["value"] = before.detach()
            return
        after = before.view_as(before)
        after.register_hook(self.scaling)
        msg["value"] = after
        self.draws[msg["name"]] = (before, after)

    def along_paths(self, total: Tensor) -> Tensor:
        """Returns a sum whose gradient is that of `total` through the draws alone.

        Arguments:
            total: A sum of log-weights. Its direct dependence on the parameters is left out.
        """
        before, after = zip(*self.draws.values(), strict=True)
        gradients = torch.autograd.grad(total, after, retain_graph=True)
        self.scaling.ratio = 0.0
        return torch.stack([(g * z).sum() for g, z in zip(gradients, before, strict=True)]).sum()
