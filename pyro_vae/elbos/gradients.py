"""Bounds on log p(x) whose gradients have less variance than autograd's or need no `rsample`."""

import contextlib
import math

import torch
from torch import Tensor

from .bounds import IWAE
from .estimator import Estimator
from .log_densities import Args, Kwargs, Particles, Program, is_point_mass, latent_sites
from .multi_sample import Weighted, Weights
from .trace_elbo import PLAIN_PARTICLES, Trace_ELBO

__all__ = ["RWS", "STL", "VIMCO", "DReG"]


class STL(Weighted):
    r"""Creates the ELBO with the sticking-the-landing gradient.

    .. math::
        \mathrm{ELBO}(x) = E\Big[\frac{1}{K} \sum_{k=1}^K \log w_k\Big] \le \log p(x), \qquad
        \nabla_\phi = \frac{1}{K} \sum_{k=1}^K
            \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}

    The value is the mean of K one-sample ELBOs. (In an importance-weighted bound of K > 1 this
    gradient would be biased; use `DReG` for that.) A lower bound on log p(x); value and gradient
    are unbiased. The gradient omits the derivative of log q in its own parameters, which is zero
    in expectation. Without that term the guide's gradient has no variance at the exact posterior.
    Needs `rsample`.

    References:
        Sticking the landing (Roeder, Wu & Duvenaud, 2017), arXiv 1703.09194.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not a positive integer.

    Example:
        >>> STL()
        STL(1)
    """

    is_linear = True

    def __init__(self, num_particles: int = 1, *, max_plate_nesting: float = math.inf) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)

    def plain(self) -> Estimator:
        """Returns the ELBO of several draws, with autograd's gradient."""
        return Trace_ELBO(PLAIN_PARTICLES)

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the mean of the log-weights."""
        return log_weights.mean(0)

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns 1 / K for model and path."""
        equal = torch.full_like(log_weights, 1.0 / len(log_weights))
        return Weights(equal, equal, None, torch.ones_like(equal))


class DReG(Weighted):
    r"""Creates the importance-weighted bound with the doubly reparameterised gradient.

    .. math::
        \nabla_\theta = \sum_k \tilde w_k\, \nabla_\theta \log p(x, z_k), \qquad
        \nabla_\phi = \sum_k \big((1 - \beta)\, \tilde w_k + \beta\, \tilde w_k^2\big)
            \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}

    with the normalised weights :math:`\tilde w`, and the weight :math:`\beta` of the KL terms,
    which is 1 unless there is a warm-up. The value is that of `IWAE(K)`, a lower bound on log
    p(x); value and gradient are unbiased, and the guide's signal-to-noise ratio does not fall with
    K. All latent sites are treated as one vector z, so that the gradient is correct for
    hierarchical guides, in which a site depends on those before it, and for priors with
    parameters. Needs `rsample`.

    References:
        | Doubly reparameterized gradient estimators (Tucker et al., 2019), arXiv 1810.04152.
        | Generalized doubly reparameterized gradient estimators (Bauer & Mnih, 2021),
          arXiv 2101.11046.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not a positive integer; when called, if the guide is a point mass.

    Example:
        >>> DReG(50)
        DReG(50)
    """

    def plain(self) -> Estimator:
        """Returns the same bound, with autograd's gradient."""
        return IWAE(self.num_particles, max_plate_nesting=self.max_plate_nesting)

    def _drawn(
        self,
        model: Program,
        guide: Program,
        args: Args,
        kwargs: Kwargs,
        handler: contextlib.AbstractContextManager[object] | None = None,
    ) -> Particles:
        particles = super()._drawn(model, guide, args, kwargs, handler)
        points = [name for name, site in latent_sites(particles.guide) if is_point_mass(site)]
        if points:
            raise ValueError(
                f"Expected a guide with a density, under {self}; got a point mass at "
                f"{', '.join(points)}. IWAE and STL accept it."
            )
        return particles

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the normalised weights for the model, their squares for the path if beta = 1."""
        normalised = log_weights.softmax(0)
        ratio = 1.0 - self.kl_weight + self.kl_weight * normalised
        return Weights(normalised, ratio * normalised, None, ratio)


class VIMCO(Weighted):
    r"""Creates the importance-weighted bound with the score function's gradient, for any guide.

    .. math::
        \nabla_\phi = \sum_k \big(\hat L - \hat L_{-k}\big)\, \nabla_\phi \log q(z_k \mid x)
            - \sum_k \tilde w_k\, \nabla_\phi \log q(z_k \mid x)

    where the baseline :math:`\hat L_{-k}` is the bound with the geometric mean of the other
    weights in place of :math:`w_k`. The value is that of `IWAE(K)`, a lower bound on log p(x);
    value and gradient are unbiased. It needs no `rsample`, and so allows discrete latents.

    References:
        Variational inference for Monte Carlo objectives (Mnih & Rezende, 2016),
        arXiv 1602.06725.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not an integer of at least 2.

    Example:
        >>> VIMCO(10)
        VIMCO(10)
    """

    needs_rsample = False
    least_particles = 2

    def plain(self) -> Estimator:
        """Returns the same bound, with autograd's gradient."""
        return IWAE(self.num_particles, max_plate_nesting=self.max_plate_nesting)

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the normalised weights for the model and the learning signal for the guide."""
        normalised = log_weights.softmax(0)
        signal = log_weights.logsumexp(0) - _with_mean_of_others(log_weights)
        return Weights(normalised, None, signal - self.kl_weight * normalised)


class RWS(Weighted):
    r"""Creates reweighted wake-sleep, with the wake phases of model and guide.

    .. math::
        \nabla_\theta = \sum_k \tilde w_k\, \nabla_\theta \log p(x, z_k), \qquad
        \nabla_\phi = \sum_k \tilde w_k\, \nabla_\phi \log q(z_k \mid x)

    The weights are normalised in each row. The model maximises `IWAE(K)`, with an unbiased
    gradient; its value, a lower bound on log p(x), is the one returned. The guide minimises the
    inclusive divergence KL(p(z | x), q(z | x)), with a bias that falls as 1 / K; at finite K its
    gradient is not that of a known objective. A weight on KL terms, such as a warm-up, is refused.
    It needs no `rsample`, and so allows discrete latents.

    References:
        | Reweighted wake-sleep (Bornschein & Bengio, 2015), arXiv 1406.2751.
        | Revisiting reweighted wake-sleep (Le et al., 2019), arXiv 1805.10469.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not an integer of at least 2.

    Example:
        >>> RWS(10)
        RWS(10)
    """

    needs_rsample = False
    least_particles = 2
    takes_kl_weight = False
    unbiased_gradient = False

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the normalised weights for model and guide."""
        normalised = log_weights.softmax(0)
        return Weights(normalised, None, normalised)


def _with_mean_of_others(log_weights: Tensor) -> Tensor:
    """Log-sums of the weights, each weight in turn replaced by the geometric mean of the others.

    The log-sum of the other weights is added up from both sides, so that nothing cancels.
    """
    zero = torch.zeros_like(log_weights[:1])
    below = torch.cat([zero, log_weights.cumsum(0)[:-1]])
    above = torch.cat([log_weights.flip(0).cumsum(0).flip(0)[1:], zero])
    mean_of_others = (below + above) / (len(log_weights) - 1)
    nothing = torch.full_like(log_weights[:1], -math.inf)
    sum_below = torch.cat([nothing, log_weights.logcumsumexp(0)[:-1]])
    sum_above = torch.cat([log_weights.flip(0).logcumsumexp(0).flip(0)[1:], nothing])
    return torch.logaddexp(torch.logaddexp(sum_below, sum_above), mean_of_others)
