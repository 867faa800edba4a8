"""The chi upper bound."""

import math

from torch import Tensor

from ..data.checks import checked_finite
from .estimator import Estimator
from .multi_sample import Autograd, Weighted, Weights, log_mean_exp

__all__ = ["CUBO"]


class CUBO(Weighted):
    r"""Creates the chi upper bound, which the guide minimises.

    .. math:: \mathrm{CUBO}_n(x) = \frac{1}{n} \log E_q[w^n] \ge \log p(x), \qquad
        \frac{1}{n} \log \frac{1}{K} \sum_{k=1}^K w_k^n

    The value is the estimate on the right. It converges to the upper bound as K grows, but at
    finite K it is too low, by more for a guide with lighter tails than the posterior, and may lie
    below log p(x). At K = 1 it is the ELBO. Only :math:`E[w^n]` is estimated without bias.

    At finite K the estimate has no minimum in the guide: far from the posterior all weights
    vanish, and the guide diverges, sooner with more latent dims and fewer draws. Use it for
    evaluation, or to improve a guide that is already good, with few dims and a large K.

    The guide minimises it, which widens q until it covers the posterior. The model maximises
    `IWAE(K)` of the same draws, since minimising an upper bound would lower log p(x) itself. Each
    gradient is unbiased for its own objective at this K. The loss is minus the value for every
    estimator, so that for this one the loss rises as the guide improves. A weight on KL
    terms, such as a warm-up, is refused. Needs `rsample`.

    References:
        Variational inference via chi upper bound minimization (Dieng et al., 2017),
        arXiv 1611.00328.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        order: The order n of the divergence, more than 1.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If K is not an integer of at least 2, or n is not above 1.

    Example:
        >>> CUBO(100)
        CUBO(100, order=2.0)
    """

    direction = "upper bound as num_particles grows"
    takes_kl_weight = False
    is_split = True
    least_particles = 2

    def __init__(
        self, num_particles: int, *, order: float = 2.0, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.order = checked_finite("order", order)
        if self.order <= 1.0:
            raise ValueError(f"Expected an order above 1; got {order!r}. At 1 it is IWAE.")

    def plain(self) -> Estimator:
        """Returns the guide's objective, minus the bound, with autograd's gradient."""
        return Autograd(self, sign=-1.0)

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the estimate of the bound."""
        return log_mean_exp(self.order * log_weights) / self.order

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns normalised weights for the model, and minus those of order n for the guide."""
        steep = (self.order * log_weights).softmax(0)
        return Weights(log_weights.softmax(0), -steep, steep)

    def __repr__(self) -> str:
        return f"CUBO({self.num_particles}, order={self.order!r})"
