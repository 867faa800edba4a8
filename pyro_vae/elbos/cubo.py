"""The chi upper bound."""

import math

from torch import Tensor

from ..data.checks import checked_finite
from .estimator import Estimator
from .multi_sample import Autograd, Weighted, Weights, log_mean_exp

__all__ = ["CUBO"]


class CUBO(Weighted):
    r"""Creates the chi upper bound, that the guide descends.

    .. math:: \mathrm{CUBO}_n(x) = \frac{1}{n} \log E_q[w^n] \ge \log p(x), \qquad
        \frac{1}{n} \log \frac{1}{K} \sum_{k=1}^K w_k^n

    The estimate on the right, which is the value, reaches the upper bound as K grows alone: at
    finite K it is too low, by more for a guide with lighter tails than the posterior, and may lie
    below log p(x); at K = 1 it is the ELBO. What is unbiased is :math:`E[w^n]`.

    At finite K it has no lower bound in the guide: far from the posterior all weights vanish, and
    the guide runs away from it, the sooner the more latent dims and the fewer draws. Take it to
    evaluate, or to go on from a guide that is good, with few dims and a large K.

    The guide descends it, which widens q until it covers the posterior; the model, for which
    descending an upper bound is no fit, ascends `IWAE(K)` of the same draws. Each gradient is
    unbiased for its own objective at this K. As elsewhere the loss is minus the value, so that
    for this one estimator the loss rises as the guide improves. There are no KL terms to weigh.
    Needs `rsample`.

    References:
        Variational inference via chi upper bound minimization (Dieng et al., 2017),
        arXiv 1611.00328.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        order: The order n of the divergence, more than 1.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where K is no integer of at least 2, or n is not more than 1.

    Example:
        >>> CUBO(100)
        CUBO(100, order=2)
    """

    direction = "upper bound as num_particles grows"
    takes_kl_weight = False
    is_split = True
    least_particles = 2

    def __init__(
        self, num_particles: int, order: float = 2.0, *, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.order = checked_finite("order", order)
        if self.order <= 1.0:
            raise ValueError(f"Expected an order above 1, where it is IWAE; got {order!r}.")

    def plain(self) -> Estimator:
        """Returns what the guide ascends, by autograd: minus the bound."""
        return Autograd(self, -1.0)

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the estimate of the bound.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        return log_mean_exp(self.order * log_weights) / self.order

    def weights(self, log_weights: Tensor) -> Weights:
        """Returns normalised weights for the model, and minus those of order n for the guide.

        Arguments:
            log_weights: Shape (num_particles, rows).
        """
        steep = (self.order * log_weights).softmax(0)
        return Weights(log_weights.softmax(0), -steep, steep)

    def __repr__(self) -> str:
        return f"CUBO({self.num_particles}, order={self.order:g})"
