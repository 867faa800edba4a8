"""Objectives of K draws of each row: all that they see of a program is its importance weights."""

import copy
import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..data.checks import checked_count
from .estimator import Estimate, Estimator, refuse_unreparameterised
from .log_densities import Densities, Particles, Program, RowTerms, draw, latent_sites

__all__ = ["Autograd", "Drawn", "MultiSample", "Weighted", "Weights", "log_mean_exp"]


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Returns log mean exp over the first dim.

    Arguments:
        log_weights: Shape (num_particles, rows).
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


class Drawn(Estimator):
    """The base of the objectives that draw K times from the guide, in one pass, for each row.

    The one scale that all sites of the rows share (N / B of a subsampling plate) multiplies the
    loss, and stays out of the objective.

    To add one, subclass it and write `objective`; its gradient is then autograd's.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.
    """

    def __init__(self, num_particles: int, *, max_plate_nesting: float = math.inf) -> None:
        count = checked_count("num_particles", num_particles, least=self.least_particles)
        super().__init__(num_particles=count, max_plate_nesting=max_plate_nesting)

    @abstractmethod
    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            particles: The draws.
            densities: Their log-densities.

        Raises:
            ValueError: Where the estimator would be wrong for the programs.
        """

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns a copy with another number of draws K.

        Arguments:
            num_particles: The number of draws.
        """
        made = copy.copy(self)
        made.num_particles = checked_count(
            "num_particles", num_particles, least=self.least_particles
        )
        return made

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Returns the loss and the terms of the ELBO.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.

        Raises:
            ValueError: Where the estimator would be wrong for the programs.
        """
        particles = self._drawn(model, guide, args, kwargs)
        densities = particles.densities()
        per_row = self.objective(particles, densities)
        loss = -(particles.scale() * per_row).sum()
        return Estimate(loss, per_row, mean_terms(densities))

    def _is_spread(self) -> bool:
        return True

    def _drawn(
        self, model: Program, guide: Program, args: Any, kwargs: Any, handler: Any = None
    ) -> Particles:
        self.settle(model, guide, args, kwargs)
        nesting = int(self.max_plate_nesting)
        particles = draw(model, guide, args, kwargs, self.num_particles, nesting, handler)
        if self.needs_rsample:
            sites = latent_sites(particles.guide)
            without = [n for n, s in sites if not getattr(s["fn"], "has_rsample", False)]
            refuse_unreparameterised(self, tuple(without))
        return particles

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_particles})"


class MultiSample(Drawn):
    r"""The base of the objectives that are a function of K log-weights of each row.

    .. math::
        \log w_k = \log p(x \mid z_k) + \beta\, (\log p(z_k) - \log q(z_k \mid x)),
        \qquad z_k \sim q(z \mid x)

    where the weight :math:`\beta` of the KL terms is 1 but under a warm-up or `BetaELBO`.

    To add one, subclass it and write `bound`; its gradient is then autograd's.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.
    """

    is_linear = False

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            log_weights: Shape (num_particles, rows), in float64.
        """

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the bound of the log-weights.

        Arguments:
            particles: The draws.
            densities: Their log-densities.
        """
        return self.bound(densities.tempered(self.kl_weight))

    def plain(self) -> Estimator | None:
        """Returns itself: its gradient is autograd's of `bound`."""
        return copy.copy(self)


def mean_terms(densities: Densities) -> RowTerms:
    """Returns the ELBO's terms of each row, the mean over its draws.

    Arguments:
        densities: Those of the draws.
    """
    reconstruction = densities.reconstruction.detach()
    log_weights = densities.log_weights.detach()
    return RowTerms(reconstruction.mean(0), (reconstruction - log_weights).mean(0), None)


class Weights(NamedTuple):
    r"""What the gradient of an objective weighs the gradients of its terms by.

    Each of shape (num_particles, rows), without gradient.

    Arguments:
        model: Of log p(x, z) in the model's parameters, z held fixed.
        path: Of log w in z, which goes on into the guide's parameters; `None` for 0.
        guide: Of log q(z | x) in the guide's parameters, z held fixed; `None` for 0.
        ratio: `path / model`, where that is bounded: it saves a pass through the model.
    """

    model: Tensor
    path: Tensor | None
    guide: Tensor | None
    ratio: Tensor | None = None


class Weighted(MultiSample):
    """The base of the objectives whose gradient is not autograd's, but weighs its terms.

    To add one, subclass it and write `weights`, and `bound` where that is not `IWAE`'s.
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns log mean w.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        return log_mean_exp(log_weights)

    @abstractmethod
    def weights(self, log_weights: Tensor) -> Weights:
        """Returns what to weigh the gradients of the terms by.

        Arguments:
            log_weights: Shape (num_particles, rows), in float64, without gradient.
        """

    def plain(self) -> Estimator | None:
        """Returns the same `bound` by autograd, where the gradient claims to be its."""
        return Autograd(self) if self.unbiased_gradient else None

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Returns the loss and the terms of the ELBO.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.

        Raises:
            ValueError: Where the estimator would be wrong for the programs.
        """
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
        return Estimate(loss, value, mean_terms(densities))

    def _surrogate(
        self, particles: Particles, densities: Densities, log_weights: Tensor, gates: "_Gates"
    ) -> Tensor:
        """A sum whose gradient is the estimator's."""
        weights = self.weights(log_weights.detach())
        total = (weights.model * densities.tempered_joint(self.kl_weight)).sum()
        if weights.guide is not None:
            total = total + (weights.guide * densities.log_guide).sum()
        if weights.path is None or not gates.sites:
            return total
        if weights.ratio is not None and len(gates.sites) == 1:
            return total - self._along_one_path(particles, densities, weights, gates)
        return total + gates.along_paths((weights.path * log_weights).sum())

    def _along_one_path(
        self, particles: Particles, densities: Densities, weights: Weights, gates: "_Gates"
    ) -> Tensor:
        """The rest of the path's gradient that the model's terms lack, that of log q in z.

        What comes back through the gate is weighed by the ratio. Of log q both derivatives are
        had at once, so that the one in the guide's parameters is taken away again.
        """
        site: Any = particles.guide.nodes[next(iter(gates.sites))]
        if weights.ratio is not None:
            ratio = particles.spread(weights.ratio, site)
            gates.opening.ratio = ratio.to(site["value"].dtype)
        fixed = site["fn"].log_prob(site["value"].detach())
        at_fixed = particles.to_rows(scale_and_mask(fixed, mask=site["mask"]))
        moving = self.kl_weight * weights.model
        return (moving * (densities.log_guide - at_fixed)).sum()


class Autograd(MultiSample):
    """The objective of another estimator, with autograd's gradient.

    Arguments:
        elbo: The estimator.
        sign: What to multiply its value by: -1 where the guide descends it.
    """

    def __init__(self, elbo: MultiSample, sign: float = 1.0) -> None:
        super().__init__(elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting)
        self.inner, self.sign = elbo, sign

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the value of the other.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        return self.sign * self.inner.bound(log_weights)


class _Opening:
    """What flows back through the gates is weighed by; it must not know the draws.

    Autograd keeps a hook alive as long as its tensor: one that led back to the tensor would keep
    the graph of every step.
    """

    def __init__(self) -> None:
        self.ratio: Tensor | float = 1.0

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.ratio


class _Gates(Messenger):  # type: ignore[misc]
    """Stands between each draw of a guide and what comes of it, and weighs what flows back.

    Arguments:
        pass_on: Whether gradients pass at all.
    """

    def __init__(self, *, pass_on: bool) -> None:
        super().__init__()
        self.pass_on = pass_on
        self.opening = _Opening()
        self.sites: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        before = msg["value"]
        if not self.pass_on or not before.requires_grad:
            msg["value"] = before.detach()
            return
        after = before.view_as(before)
        after.register_hook(self.opening)
        msg["value"] = after
        self.sites[msg["name"]] = (before, after)

    def along_paths(self, total: Tensor) -> Tensor:
        """A sum whose gradient in the guide's parameters is that of `total` by way of the draws.

        Arguments:
            total: A sum of log-weights: what it owes to the parameters directly is left out.
        """
        before, after = zip(*self.sites.values(), strict=True)
        gradients = torch.autograd.grad(total, after, retain_graph=True)
        self.opening.ratio = 0.0
        return torch.stack([(g * z).sum() for g, z in zip(gradients, before, strict=True)]).sum()
