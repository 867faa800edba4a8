"""The ELBO whose KL terms have no gradient below a threshold."""

import math

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..data.checks import checked_finite
from .divergence import analytic_kl, factors, is_factorised
from .log_densities import Densities, Particles, Site, latent_sites
from .multi_sample import MonteCarlo

__all__ = ["FreeBits"]


class FreeBits(MonteCarlo):
    r"""Creates the ELBO with free nats: a KL term below a threshold has no gradient.

    .. math::
        \sum_n E_q[\log p(x_n \mid z_n)] - B \sum_j \max\Big(\lambda,
            \frac{1}{B} \sum_{n=1}^B \mathrm{KL}_j(x_n)\Big)

    where j runs over the latent dims, and the mean is over the B rows of the batch. The
    objective of a row is its ELBO minus 1 / B of the total that the threshold adds to the
    batch. It is at most the ELBO, and so a lower bound on log p(x). If guide and prior are
    independent over their elements, the threshold applies to each dim. Otherwise it applies to
    each site, multiplied by the number of dims of the site. Value and gradient are unbiased for
    these rows if the divergence has a closed form. If it is estimated from draws, the maximum has
    an upward bias. Needs `rsample`.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016),
        arXiv 1606.04934.

    Arguments:
        num_particles: The number of draws of z for each row.
        nats: The threshold :math:`\lambda` of each latent dim, in nats.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> FreeBits(nats=0.1)
        FreeBits(1, nats=0.1)
    """

    def __init__(
        self, num_particles: int = 1, *, nats: float, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.nats = checked_finite("nats", nats, least=0.0)

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        per_row = densities.reconstruction.mean(0)
        for name, guided in latent_sites(particles.guide):
            if name not in particles.model.nodes:
                continue
            site: Site = particles.model.nodes[name]
            q, p, events, dims = guided["fn"], site["fn"], 0, 1
            if is_factorised(q) and is_factorised(p):
                events = len(q.event_shape)
                q, p = factors(q), factors(p)
            else:  # All dims of the site are one group.
                dims = q.event_shape.numel()
            own_mask, mask = (
                m.reshape(m.shape + (1,) * events) if isinstance(m, Tensor) else m
                for m in (guided["mask"], site["mask"])
            )
            kl = analytic_kl(q, p) if guided["mask"] is site["mask"] else None
            if kl is None:
                own = scale_and_mask(q.log_prob(guided["value"]), mask=own_mask)
                kl = own - scale_and_mask(p.log_prob(guided["value"]), mask=mask)
            else:
                kl = scale_and_mask(kl, mask=own_mask)
            kl = kl.double().mean(0).movedim(particles.rows_dim - events, 0)
            kl = kl.flatten(1) if kl.ndim > 1 else kl[:, None]  # (rows, groups of dims)
            mean = kl.mean(0)
            excess = (mean.clamp_min(self.nats * dims) - mean).sum()
            per_row = per_row - self.kl_weight * (kl.sum(1) + excess)
        return per_row

    def __repr__(self) -> str:
        return f"FreeBits({self.num_particles}, nats={self.nats!r})"
