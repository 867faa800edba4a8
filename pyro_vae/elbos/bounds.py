"""Multi-sample bounds on log p(x) with autograd's gradients."""

import math

import torch
from torch import Tensor

from ..data.checks import checked_draws, checked_finite
from .estimator import Estimator
from .multi_sample import MultiSample, Weighted, Weights, log_mean_exp

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "Renyi"]


class IWAE(MultiSample):
    r"""Creates the importance-weighted bound.

    .. math:: L_K(x) = E\Big[\log \frac{1}{K} \sum_{k=1}^K w_k\Big] \le \log p(x)

    A lower bound on log p(x), tighter for larger K: the gap falls as Var(w / p(x)) / (2 K) if
    that variance is finite. Value and gradient are unbiased. The gradient's signal-to-noise ratio
    grows as :math:`\sqrt K` for the model, but falls as :math:`1 / \sqrt K` for the guide, which
    `DReG` avoids. Needs `rsample`.

    References:
        | Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        | Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
          arXiv 1802.04537.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not a positive integer.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> value, mcse = IWAE(50).per_row(vae, torch.ones(5, 4))
        >>> value.shape, mcse.shape
        (torch.Size([5]), torch.Size([5]))
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns log mean w."""
        return log_mean_exp(log_weights)


class Renyi(MultiSample):
    r"""Creates the variational Renyi bound.

    .. math::
        L_{\alpha, K}(x) = \frac{1}{1 - \alpha}
            E\Big[\log \frac{1}{K} \sum_{k=1}^K w_k^{1 - \alpha}\Big]

    For :math:`\alpha \ge 0` it is a lower bound on log p(x): `IWAE` at 0, close to the ELBO near
    1, and below the ELBO above 1. For :math:`\alpha < 0` it estimates an upper bound and converges
    to it as K grows, but at finite K it may lie below log p(x). Model and guide maximise it. For
    :math:`\alpha < 0` and large K this moves the guide away from the posterior: use a negative
    order for evaluation only, or with a small K. Value and gradient are unbiased for the
    expectation above. Needs `rsample`.

    References:
        Renyi divergence variational inference (Li & Turner, 2016), arXiv 1602.02311.

    Arguments:
        num_particles: The number of draws K of each row.
        alpha: The order :math:`\alpha`, any number but 1.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not a positive integer, or alpha is 1 or not finite.

    Example:
        >>> Renyi(10, alpha=0.5)
        Renyi(10, alpha=0.5)
    """

    def __init__(
        self, num_particles: int, *, alpha: float, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.alpha = checked_finite("alpha", alpha)
        if self.alpha == 1.0:
            raise ValueError(
                "Expected alpha other than 1; got 1. The limit at 1 is the ELBO: use Trace_ELBO."
            )
        if self.alpha < 0.0:
            self.direction = "upper bound as num_particles grows"

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the bound of each row."""
        return log_mean_exp((1.0 - self.alpha) * log_weights) / (1.0 - self.alpha)

    def __repr__(self) -> str:
        return f"Renyi({self.num_particles}, alpha={self.alpha!r})"


class _Grouped(MultiSample):
    """Base class of MIWAE and PIWAE, whose draws form M groups of K draws each."""

    def __init__(
        self, num_bounds: int, num_particles: int, *, max_plate_nesting: float = math.inf
    ) -> None:
        groups = checked_draws("num_bounds", num_bounds)
        self.shape = torch.Size([groups, checked_draws("num_particles", num_particles)])
        super().__init__(math.prod(self.shape), max_plate_nesting=max_plate_nesting)

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns a copy with another number of draws K of each bound."""
        return type(self)(self.shape[0], num_particles, max_plate_nesting=self.max_plate_nesting)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}, {self.shape[1]})"


class MIWAE(_Grouped):
    r"""Creates the mean of M importance-weighted bounds of K draws each.

    .. math::
        L_{M, K}(x) = E\Big[\frac{1}{M} \sum_{m=1}^M
            \log \frac{1}{K} \sum_{k=1}^K w_{m k}\Big] \le \log p(x)

    A lower bound on log p(x), the same as that of `IWAE(K)`. Value and gradient are unbiased; the
    signal-to-noise ratio of the gradient grows as :math:`\sqrt M` for model and guide. Needs
    `rsample`. (It is not the MIWAE of Mattei & Frellsen, a method of imputation.)

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        num_bounds: The number of bounds M.
        num_particles: The number of draws K of each bound.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If M or K is not a positive integer.

    Example:
        >>> MIWAE(4, 8)
        MIWAE(4, 8)
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the mean of the bounds."""
        return log_mean_exp(log_weights.unflatten(0, self.shape).transpose(0, 1)).mean(0)


class CIWAE(MultiSample):
    r"""Creates the combination of the ELBO and the importance-weighted bound.

    .. math:: L(x) = \beta\, \mathrm{ELBO}(x) + (1 - \beta)\, L_K(x) \le \log p(x)

    A lower bound on log p(x); value and gradient are unbiased. Both parts use the same K draws.
    Needs `rsample`.

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        num_particles: The number of draws K of each row.
        beta: The share :math:`\beta` of the ELBO, in [0, 1].
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not a positive integer, or beta is not in [0, 1].

    Example:
        >>> CIWAE(64, beta=0.05)
        CIWAE(64, beta=0.05)
    """

    def __init__(
        self, num_particles: int, *, beta: float, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.beta = checked_finite("beta", beta, least=0.0)
        if self.beta > 1.0:
            raise ValueError(f"Expected beta in [0, 1], the share of the ELBO; got {beta!r}.")

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the combination of both bounds."""
        tight = log_mean_exp(log_weights)
        return self.beta * log_weights.mean(0) + (1.0 - self.beta) * tight

    def __repr__(self) -> str:
        return f"CIWAE({self.num_particles}, beta={self.beta!r})"


class PIWAE(_Grouped, Weighted):
    r"""Creates the partially importance-weighted estimator, with one bound for each program.

    The model maximises `IWAE(M K)` and the guide `MIWAE(M, K)`, from the same M K draws, so that
    the signal-to-noise ratio grows for both. Each gradient is unbiased for its own bound. The
    value is that of `IWAE(M K)`, a lower bound on log p(x), unbiased. A parameter that model
    and guide share, such as one of an encoder in a VampPrior, gets the sum of both gradients.
    Needs `rsample`.

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        num_bounds: The number M of the guide's bounds.
        num_particles: The number of draws K of each of them.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If M or K is not a positive integer.

    Example:
        >>> PIWAE(8, 8)
        PIWAE(8, 8)
    """

    is_split = True

    def plain(self) -> Estimator:
        """Returns the guide's bound, with autograd's gradient."""
        return MIWAE(*self.shape, max_plate_nesting=self.max_plate_nesting)

    def weights(self, log_weights: Tensor) -> Weights:
        """Normalises the weights over all draws for the model, in each group for the guide."""
        grouped = log_weights.unflatten(0, self.shape).softmax(1).flatten(0, 1) / self.shape[0]
        return Weights(log_weights.softmax(0), grouped, -self.kl_weight * grouped)
