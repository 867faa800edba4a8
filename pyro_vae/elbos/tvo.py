"""The thermodynamic variational objective."""

import math

import numpy as np
import torch
from torch import Tensor

from ..data.checks import checked_draws, checked_finite
from .multi_sample import Weighted, Weights

__all__ = ["TVO"]


class TVO(Weighted):
    r"""Creates the thermodynamic variational objective.

    .. math::
        \log p(x) = \int_0^1 E_{\pi_\beta}[\log w]\, d\beta
            \ge \sum_{j=0}^{J-1} (\beta_{j+1} - \beta_j)\, E_{\pi_{\beta_j}}[\log w],
        \qquad \pi_\beta(z) \propto q(z \mid x)^{1 - \beta}\, p(x, z)^\beta

    It is the left Riemann sum of the thermodynamic integral, with expectations by self-normalised
    weights :math:`w^\beta` of K draws from the guide. A lower bound on log p(x), and the ELBO if
    J = 1. Value and gradient have a bias that falls as 1 / K, except that the value is unbiased if
    J = 1. A draw of weight 0 makes them NaN. The gradient is a covariance with log w, so that it
    needs no `rsample`. The points :math:`\beta_1 \dots \beta_{J-1}` are evenly spaced in the
    logarithm, from `first_beta` on.

    References:
        The thermodynamic variational objective (Masrani, Le & Wood, 2019), arXiv 1907.00031.

    Arguments:
        num_particles: The number of draws K of each row, 2 or more.
        num_partitions: The number J of intervals of the Riemann sum.
        first_beta: The first point after 0, from 1e-6 to below 1.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> TVO(10)
        TVO(10, num_partitions=5, first_beta=0.01)
    """

    needs_rsample = False
    least_particles = 2
    unbiased_value = False
    unbiased_gradient = False

    def __init__(
        self,
        num_particles: int,
        *,
        num_partitions: int = 5,
        first_beta: float = 0.01,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.num_partitions = checked_draws("num_partitions", num_partitions)
        self.first_beta = checked_finite("first_beta", first_beta, least=1e-6)
        if self.first_beta >= 1.0:
            raise ValueError(f"Expected first_beta below 1; got {first_beta!r}.")

    def _pieces(self) -> list[tuple[float, float]]:
        """The points of the integral, and the width of the piece from each point on."""
        inner = np.logspace(math.log10(self.first_beta), 0.0, self.num_partitions).tolist()
        points = [0.0, *inner[: self.num_partitions - 1], 1.0]
        return [(b, after - b) for b, after in zip(points, points[1:], strict=False)]

    def bound(self, log_weights: Tensor) -> Tensor:
        """Returns the Riemann sum."""
        pieces = [
            width * ((point * log_weights).softmax(0) * log_weights).sum(0)
            for point, width in self._pieces()
        ]
        return torch.stack(pieces).sum(0)

    def weights(self, log_weights: Tensor) -> Weights:
        r"""Returns the weights in the derivative of the Riemann sum.

        The derivative of :math:`E_\pi[f] = \sum_k \pi_k f_k` with f = log w in the parameters is
        :math:`\sum_k \pi_k \nabla f_k + \sum_k \pi_k (f_k - \bar f) \nabla \log \tilde\pi_k`,
        where :math:`\log \tilde\pi = \log q + \beta \log w`.
        """
        model = torch.zeros_like(log_weights)
        score = torch.zeros_like(log_weights)
        for point, width in self._pieces():
            normalised = (point * log_weights).softmax(0)
            centred = log_weights - (normalised * log_weights).sum(0)
            model += width * normalised * (1.0 + point * centred)
            score += width * normalised * centred
        return Weights(model, None, score - self.kl_weight * model)

    def __repr__(self) -> str:
        return (
            f"TVO({self.num_particles}, num_partitions={self.num_partitions}, "
            f"first_beta={self.first_beta!r})"
        )
