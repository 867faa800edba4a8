"""The ELBO whose KL terms cost nothing up to a threshold."""

import math
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..data.checks import checked_finite
from .divergence import analytic_kl, factors, is_factorised
from .log_densities import Densities, Particles, latent_sites
from .multi_sample import Drawn

__all__ = ["FreeBits"]


class FreeBits(Drawn):
    r"""Creates the ELBO with free nats: a KL term below a threshold has no gradient.

    .. math::
        \sum_n E_q[\log p(x_n \mid z_n)] - B \sum_j \max\Big(\lambda,
            \frac{1}{B} \sum_{n=1}^B \mathrm{KL}_j(x_n)\Big)

    with the latent dims j, and the mean over the B rows at hand. A row's objective is its own
    ELBO less its share, 1 / B, of what the threshold adds. Below the ELBO, so a lower bound on
    log p(x). Value and gradient are unbiased for these rows where the divergence is known in
    closed form, a dim at a time where guide and prior are independent over their elements, else a
    site at a time with the threshold of all its dims; where it is drawn, the maximum of the drawn
    ones has a bias upwards. Needs `rsample`.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016),
        arXiv 1606.04934.

    Arguments:
        nats: The threshold :math:`\lambda` of each latent dim, in nats.
        num_particles: The number of draws of z for each row.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where a number is out of its range.

    Example:
        >>> FreeBits(0.1)
        FreeBits(0.1, 1)
    """

    def __init__(
        self, nats: float, num_particles: int = 1, *, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.nats = checked_finite("nats", nats, least=0.0)

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            particles: The draws.
            densities: Their log-densities.
        """
        per_row = densities.reconstruction.mean(0)
        for name, guided in latent_sites(particles.guide):
            if name in particles.model.nodes:
                kl, threshold = _divergences(particles, guided, particles.model.nodes[name])
                mean = kl.mean(0)
                excess = (mean.clamp_min(self.nats * threshold) - mean).sum()
                per_row = per_row - self.kl_weight * (kl.sum(1) + excess)
        return per_row

    def __repr__(self) -> str:
        return f"FreeBits({self.nats:g}, {self.num_particles})"


def _divergences(particles: Particles, guided: Any, site: Any) -> tuple[Tensor, int]:
    """The divergence of each row and group, shape (rows, groups), and the dims of a group."""
    q, p, events, dims = guided["fn"], site["fn"], 0, 1
    if is_factorised(q) and is_factorised(p):
        events = len(q.event_shape)
        q, p = factors(q), factors(p)
    else:
        dims = q.event_shape.numel()
    masks = [_of_elements(s["mask"], events) for s in (guided, site)]
    kl = analytic_kl(q, p) if guided["mask"] is site["mask"] else None
    if kl is None:
        scores = (d.log_prob(guided["value"]) for d in (q, p))
        own, other = (scale_and_mask(v, mask=m) for v, m in zip(scores, masks, strict=True))
        kl = own - other
    else:
        kl = scale_and_mask(kl, mask=masks[0])
    rows = kl.double().mean(0).movedim(particles.rows_dim - events, 0)
    return (rows.flatten(1) if rows.ndim > 1 else rows[:, None]), dims


def _of_elements(mask: Any, events: int) -> Any:
    return mask.reshape(mask.shape + (1,) * events) if isinstance(mask, Tensor) else mask
