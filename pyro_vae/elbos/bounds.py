"""Multi-sample bounds on log p(x), with the gradients that autograd gives them."""

import math

import torch
from torch import Tensor

from ..data.checks import checked_count, checked_finite
from .estimator import Estimator
from .multi_sample import MultiSample, Weighted, Weights, log_mean_exp

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "Renyi"]


class IWAE(MultiSample):
    r"""Creates the importance-weighted bound.

    .. math:: L_K(x) = E\Big[\log \frac{1}{K} \sum_{k=1}^K w_k\Big] \le \log p(x)

    A lower bound on log p(x), tighter for larger K: what is missing falls as
    Var(w / p(x)) / (2 K), where that is finite.
    Value and gradient are unbiased. The gradient's signal-to-noise ratio grows as
    :math:`\sqrt K` for the model, and falls as :math:`1 / \sqrt K` for the guide: `DReG` mends
    that. Needs `rsample`.

    References:
        | Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        | Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
          arXiv 1802.04537.

    Arguments:
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no positive integer.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> value, mcse = IWAE(50).per_row(vae.model, vae.guide, torch.ones(5, 4))
        >>> value.shape, mcse.shape
        (torch.Size([5]), torch.Size([5]))
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns log mean w.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        return log_mean_exp(log_weights)


class Renyi(MultiSample):
    r"""Creates the variational Renyi bound.

    .. math::
        L_{\alpha, K}(x) = \frac{1}{1 - \alpha}
            E\Big[\log \frac{1}{K} \sum_{k=1}^K w_k^{1 - \alpha}\Big]

    For :math:`\alpha \ge 0` a lower bound on log p(x): `IWAE` at 0, towards the ELBO at 1, below
    it beyond. For :math:`\alpha < 0` it estimates an upper bound, which it reaches as K grows
    alone: at finite K it may lie below log p(x). Model and guide ascend it, which for
    :math:`\alpha < 0` and large K takes the guide away from the posterior: take that to evaluate,
    or at small K alone. Value and gradient are unbiased for the
    expectation above. Needs `rsample`.

    References:
        Renyi divergence variational inference (Li & Turner, 2016), arXiv 1602.02311.

    Arguments:
        alpha: The order :math:`\alpha`, any number but 1.
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no positive integer, or alpha is 1 or not finite.

    Example:
        >>> Renyi(0.5, 10)
        Renyi(0.5, 10)
    """

    def __init__(
        self, alpha: float, num_particles: int, *, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.alpha = checked_finite("alpha", alpha)
        if self.alpha == 1.0:
            raise ValueError(
                "Expected alpha other than 1, where it is the ELBO: Trace_ELBO; got 1."
            )

    @property
    def direction(self) -> str:  # type: ignore[override]
        """What its value is to log p(x)."""
        return "lower bound" if self.alpha >= 0 else "upper bound as num_particles grows"

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the bound of each row.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        return log_mean_exp((1.0 - self.alpha) * log_weights) / (1.0 - self.alpha)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alpha:g}, {self.num_particles})"


class _Grouped(MultiSample):
    """M groups of K draws each."""

    def __init__(
        self, num_bounds: int, num_particles: int, *, max_plate_nesting: float = math.inf
    ) -> None:
        groups = checked_count("num_bounds", num_bounds)
        self.shape = torch.Size([groups, checked_count("num_particles", num_particles)])
        super().__init__(math.prod(self.shape), max_plate_nesting=max_plate_nesting)

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns a copy with another number of draws K of each bound.

        Arguments:
            num_particles: The number of draws.
        """
        return type(self)(self.shape[0], num_particles, max_plate_nesting=self.max_plate_nesting)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}, {self.shape[1]})"


class MIWAE(_Grouped):
    r"""Creates the mean of M importance-weighted bounds of K draws each.

    .. math::
        L_{M, K}(x) = E\Big[\frac{1}{M} \sum_{m=1}^M
            \log \frac{1}{K} \sum_{k=1}^K w_{m k}\Big] \le \log p(x)

    A lower bound on log p(x), that of `IWAE(K)`. Value and gradient are unbiased; the
    signal-to-noise ratio of the gradient grows as :math:`\sqrt M` for model and guide. Needs
    `rsample`. (It is not the MIWAE of Mattei & Frellsen, which imputes.)

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        num_bounds: The number of bounds M.
        num_particles: The number of draws K of each bound.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where M or K is no positive integer.

    Example:
        >>> MIWAE(4, 8)
        MIWAE(4, 8)
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the mean of the bounds.

        Arguments:
            log_weights: Shape (M K, rows).
        """
        return log_mean_exp(log_weights.unflatten(0, self.shape).transpose(0, 1)).mean(0)


class CIWAE(MultiSample):
    r"""Creates the combination of the ELBO and the importance-weighted bound.

    .. math:: L(x) = \beta\, \mathrm{ELBO}(x) + (1 - \beta)\, L_K(x) \le \log p(x)

    A lower bound on log p(x); value and gradient are unbiased. Both parts are of the same K
    draws. Needs `rsample`.

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        beta: The share :math:`\beta` of the ELBO, in [0, 1].
        num_particles: The number of draws K of each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no positive integer, or beta is not in [0, 1].

    Example:
        >>> CIWAE(0.05, 64)
        CIWAE(0.05, 64)
    """

    def __init__(
        self, beta: float, num_particles: int, *, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.beta = checked_finite("beta", beta, least=0.0)
        if self.beta > 1.0:
            raise ValueError(f"Expected beta in [0, 1], the share of the ELBO; got {beta!r}.")

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the combination of both bounds.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        tight = log_mean_exp(log_weights)
        return self.beta * log_weights.mean(0) + (1.0 - self.beta) * tight

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.beta:g}, {self.num_particles})"


class PIWAE(_Grouped, Weighted):
    r"""Creates the partially importance-weighted estimator: a bound each for model and guide.

    The model ascends `IWAE(M K)`, the guide `MIWAE(M, K)`, from the same M K draws, so that both
    signals grow. Each gradient is unbiased for its own bound; the value is that of `IWAE(M K)`, a
    lower bound on log p(x), unbiased. What model and guide share (the encoder of a VampPrior) has
    a gradient of each. Needs `rsample`.

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        num_bounds: The number M of the guide's bounds.
        num_particles: The number of draws K of each of them.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where M or K is no positive integer.

    Example:
        >>> PIWAE(8, 8)
        PIWAE(8, 8)
    """

    is_split = True

    def plain(self) -> Estimator:
        """Returns the guide's bound by autograd."""
        return MIWAE(*self.shape, max_plate_nesting=self.max_plate_nesting)

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns the weights among all draws for the model, in their group for the guide.

        Arguments:
            log_weights: Shape (M K, rows).
        """
        grouped = log_weights.unflatten(0, self.shape).softmax(1).flatten(0, 1) / self.shape[0]
        return Weights(log_weights.softmax(0), grouped, -self.kl_weight * grouped)
