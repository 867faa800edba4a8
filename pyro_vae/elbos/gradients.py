"""Bounds on log p(x) with gradients of less variance than autograd's, or without `rsample`."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .bounds import IWAE
from .estimator import Estimator
from .log_densities import Particles, latent_sites
from .multi_sample import Weighted, Weights
from .trace_elbo import PLAIN_PARTICLES, Trace_ELBO

__all__ = ["RWS", "STL", "VIMCO", "DReG"]


class STL(Weighted):
    r"""Creates the ELBO with the gradient that sticks the landing.

    .. math::
        \mathrm{ELBO}(x) = E\Big[\frac{1}{K} \sum_{k=1}^K \log w_k\Big] \le \log p(x), \qquad
        \nabla_\phi = \frac{1}{K} \sum_{k=1}^K
            \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}

    The mean of K one-sample ELBOs: inside an importance-weighted bound of K > 1 the same trick
    would be biased, `DReG` is the one for that. A lower bound on log p(x); value and gradient are
    unbiased. The term left out, the derivative of log q in its own parameters, is zero in
    expectation: without it the guide's gradient vanishes at the exact posterior. Needs `rsample`.

    References:
        Sticking the landing (Roeder, Wu & Duvenaud, 2017), arXiv 1703.09194.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no positive integer.

    Example:
        >>> STL()
        STL(1)
    """

    is_linear = True

    def __init__(self, num_particles: int = 1, *, max_plate_nesting: float = math.inf) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)

    def plain(self) -> Estimator:
        """Returns the ELBO by autograd, of several draws."""
        return Trace_ELBO(PLAIN_PARTICLES)

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the mean of the log-weights.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        return log_weights.mean(0)

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns 1 / K for model and path.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        equal = torch.full_like(log_weights, 1.0 / len(log_weights))
        return Weights(equal, equal, None, torch.ones_like(equal))


class DReG(Weighted):
    r"""Creates the importance-weighted bound with the doubly reparameterised gradient.

    .. math::
        \nabla_\theta = \sum_k \tilde w_k\, \nabla_\theta \log p(x, z_k), \qquad
        \nabla_\phi = \sum_k \big((1 - \beta)\, \tilde w_k + \beta\, \tilde w_k^2\big)
            \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}

    with the normalised weights :math:`\tilde w` and the weight :math:`\beta` of the KL terms, 1
    but under a warm-up. The value is that of `IWAE(K)`, a lower bound on log p(x); value and
    gradient are unbiased, and the guide's signal-to-noise ratio does not fall with K. All latent
    sites count as one: z depends on the guide's parameters through every site before it, so
    that hierarchical guides, and priors with parameters, are right. Needs `rsample`.

    References:
        | Doubly reparameterized gradient estimators (Tucker et al., 2019), arXiv 1810.04152.
        | Generalized doubly reparameterized gradient estimators (Bauer & Mnih, 2021),
          arXiv 2101.11046.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no positive integer; when called, where the guide is a point mass.

    Example:
        >>> DReG(50)
        DReG(50)
    """

    def plain(self) -> Estimator:
        """Returns the same bound by autograd."""
        return IWAE(self.num_particles, max_plate_nesting=self.max_plate_nesting)

    def _drawn(self, *args: Any, **kwargs: Any) -> Particles:
        particles = super()._drawn(*args, **kwargs)
        points = [name for name, site in latent_sites(particles.guide) if _is_point(site["fn"])]
        if points:
            raise ValueError(
                f"Expected a guide with a density, under {self}; got a point mass at "
                f"{', '.join(points)}: IWAE and STL take it."
            )
        return particles

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the normalised weights for the model, about their squares for the path.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        normalised = log_weights.softmax(0)
        ratio = 1.0 - self.kl_weight + self.kl_weight * normalised
        return Weights(normalised, ratio * normalised, None, ratio)


class VIMCO(Weighted):
    r"""Creates the importance-weighted bound with the score function's gradient, for any guide.

    .. math::
        \nabla_\phi = \sum_k \big(\hat L - \hat L_{-k}\big)\, \nabla_\phi \log q(z_k \mid x)
            - \sum_k \tilde w_k\, \nabla_\phi \log q(z_k \mid x)

    where the baseline :math:`\hat L_{-k}` puts the geometric mean of the other weights in the
    place of :math:`w_k`. The value is that of `IWAE(K)`, a lower bound on log p(x); value and
    gradient are unbiased. Needs no `rsample`: for discrete latents.

    References:
        Variational inference for Monte Carlo objectives (Mnih & Rezende, 2016),
        arXiv 1602.06725.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no integer of at least 2.

    Example:
        >>> VIMCO(10)
        VIMCO(10)
    """

    needs_rsample = False
    least_particles = 2

    def plain(self) -> Estimator:
        """Returns the same bound by autograd."""
        return IWAE(self.num_particles, max_plate_nesting=self.max_plate_nesting)

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the normalised weights for the model, the learning signal for the guide.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        normalised = log_weights.softmax(0)
        signal = log_weights.logsumexp(0) - _with_mean_of_others(log_weights)
        return Weights(normalised, None, signal - self.kl_weight * normalised)


class RWS(Weighted):
    r"""Creates reweighted wake-sleep, with the wake phases of model and guide.

    .. math::
        \nabla_\theta = \sum_k \tilde w_k\, \nabla_\theta \log p(x, z_k), \qquad
        \nabla_\phi = \sum_k \tilde w_k\, \nabla_\phi \log q(z_k \mid x)

    The weights are normalised in each row. The model ascends `IWAE(K)`, unbiased, whose value is
    the one returned, a lower bound on log p(x). The guide descends the inclusive divergence
    KL(p(z | x), q(z | x)), with a bias that falls as 1 / K: at finite K its gradient is that of no
    stated objective. It has no KL terms to weigh. Needs no `rsample`: for discrete latents.

    References:
        | Reweighted wake-sleep (Bornschein & Bengio, 2015), arXiv 1406.2751.
        | Revisiting reweighted wake-sleep (Le et al., 2019), arXiv 1805.10469.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no integer of at least 2.

    Example:
        >>> RWS(10)
        RWS(10)
    """

    needs_rsample = False
    least_particles = 2
    takes_kl_weight = False
    unbiased_gradient = False

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the normalised weights for model and guide.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        normalised = log_weights.softmax(0)
        return Weights(normalised, None, normalised)


def _is_point(distribution: Any) -> bool:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)


def _with_mean_of_others(log_weights: Tensor) -> Tensor:
    """log sum w where each weight in turn is the geometric mean of the others."""
    zero = torch.zeros_like(log_weights[:1])
    below = torch.cat([zero, log_weights.cumsum(0)[:-1]])
    above = torch.cat([log_weights.flip(0).cumsum(0).flip(0)[1:], zero])
    mean_of_others = (below + above) / (len(log_weights) - 1)
    return torch.logaddexp(_log_sum_of_others(log_weights), mean_of_others)


def _log_sum_of_others(log_weights: Tensor) -> Tensor:
    """log sum of all weights but one, for each: from both sides, so that nothing cancels."""
    nothing = torch.full_like(log_weights[:1], -math.inf)
    below = torch.cat([nothing, log_weights.logcumsumexp(0)[:-1]])
    above = torch.cat([log_weights.flip(0).logcumsumexp(0).flip(0)[1:], nothing])
    return torch.logaddexp(below, above)
