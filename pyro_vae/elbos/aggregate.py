"""Objectives of the aggregate posterior, the mixture of q(z | x) over the rows."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..data.checks import checked_count, checked_finite
from .divergence import analytic_kl, factors, is_factorised
from .estimator import Estimator
from .log_densities import Densities, Particles, latent_sites
from .multi_sample import Drawn

__all__ = ["MMD", "TotalCorrelation", "inverse_multiquadric"]

Kernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class TotalCorrelation(Drawn):
    r"""Creates the ELBO with a further weight on the total correlation of the aggregate posterior.

    .. math::
        L = \sum_n \mathrm{ELBO}(x_n) - (\beta - 1)\, N\, \mathrm{TC}, \qquad
        \mathrm{TC} = \mathrm{KL}\Big(q(z), \prod_j q(z_j)\Big)

    beta-TC-VAE, where the other parts of the KL divergence keep the weight 1. The aggregate
    posterior at the draw of row i is estimated from the B rows at hand: row i with the weight
    1 / N, each other one with (N - 1) / (N (B - 1)), so that the density, not its logarithm, is
    unbiased. TC is then biased, and may be negative at small B. No bound, but at
    :math:`\beta = 1`, where it is the ELBO. The KL divergence is in closed form where it is
    known. Needs `rsample`, and one latent site that is independent over its elements.

    References:
        Isolating sources of disentanglement in VAEs (Chen et al., 2018), arXiv 1802.04942.

    Arguments:
        beta: The weight :math:`\beta` of the total correlation.
        num_rows: How many rows N there are in all; by default the rows at hand.
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where a number is out of its range; when called, where the guide has more than
            one latent site, or one that is not independent over its elements.

    Example:
        >>> TotalCorrelation(6.0, num_rows=60000)
        TotalCorrelation(6, num_rows=60000)
    """

    direction = "no bound"
    unbiased_value = False
    unbiased_gradient = False

    def __init__(
        self, beta: float, *, num_rows: int | None = None, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(1, max_plate_nesting=max_plate_nesting)
        self.beta = checked_finite("beta", beta, least=0.0)
        self.num_rows = None
        if num_rows is not None:
            self.num_rows = checked_count("num_rows", num_rows)

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            particles: The draws.
            densities: Their log-densities.

        Raises:
            ValueError: Where the estimator would be wrong for the programs.
        """
        name, guided = _only_site(particles, self)
        site: Any = particles.model.nodes[name]
        kl = analytic_kl(guided["fn"], site["fn"])
        kl = densities.kl[0] if kl is None else particles.to_rows(kl.double())[0]
        correlation = self._correlation(guided)
        penalty = kl + (self.beta - 1.0) * correlation
        return densities.reconstruction[0] - self.kl_weight * penalty

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns nothing: it takes one draw.

        Arguments:
            num_particles: The number of draws.
        """
        return None

    def _correlation(self, guided: Any) -> Tensor:
        """What each row's draw adds to the estimate of TC, shape (rows,)."""
        q, z = factors(guided["fn"]), guided["value"][0]
        pairs = q.log_prob(z[:, None]).double()
        pairs = pairs.flatten(2) if pairs.ndim > 2 else pairs[..., None]
        weights = self._log_weights(len(z), pairs)[..., None]
        joint = (pairs.sum(2, keepdim=True) + weights).logsumexp(1)
        marginals = (pairs + weights).logsumexp(1)
        return joint.sum(1) - marginals.sum(1)

    def _log_weights(self, rows: int, like: Tensor) -> Tensor:
        total = rows if self.num_rows is None else self.num_rows
        if total < rows:
            raise ValueError(
                f"Expected num_rows to be at least the {rows} rows at hand, under {self}; got "
                f"{total}."
            )
        of_others = (total - 1) / (total * max(rows - 1, 1))
        own = torch.eye(rows, dtype=like.dtype, device=like.device)
        return own * (math.log(1 / total)) + (1.0 - own) * math.log(max(of_others, 1e-300))

    def __repr__(self) -> str:
        return f"TotalCorrelation({self.beta:g}, num_rows={self.num_rows})"


def inverse_multiquadric(one: Tensor, other: Tensor) -> Tensor:
    r"""Returns the mean over seven scales s of :math:`2 D s / (2 D s + |z - z'|^2)`.

    The kernel of Tolstikhin et al. (2018), arXiv 1711.01558, for latents of unit scale.

    Arguments:
        one: Points (..., n, D).
        other: Points (..., m, D).

    Returns:
        The kernel of each pair, (..., n, m).
    """
    squares = (one[..., :, None, :] - other[..., None, :, :]).square().sum(-1)
    size = 2.0 * one.shape[-1]
    kernels = [size * s / (size * s + squares) for s in _SCALES]
    return torch.stack(kernels).mean(0)


_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class MMD(Drawn):
    r"""Creates the reconstruction less the discrepancy of aggregate posterior and prior.

    .. math::
        L = \sum_n E_q[\log p(x_n \mid z_n)] - B \lambda\, \mathrm{MMD}^2(q(z), p(z))

    where :math:`q(z)` is the mixture of q(z | x) over the B rows at hand: draws of one row are
    never paired with each other, so that MMD is unbiased for rows drawn at random. InfoVAE, or the
    Wasserstein autoencoder. No bound on log p(x); value and gradient are unbiased. There are no
    KL terms to weigh. Needs `rsample`, at least two rows, and one latent site.

    References:
        | InfoVAE (Zhao, Song & Ermon, 2019), arXiv 1706.02262.
        | A kernel two-sample test (Gretton et al., 2012), JMLR 13.

    Arguments:
        weight: The weight :math:`\lambda`, in nats per row.
        num_particles: The number of draws of z for each row.
        kernel: A positive definite kernel of (n, D) and (m, D) points, as (n, m).
        max_plate_nesting: The number of dims that plates take; found out by a dry run if left.

    Raises:
        ValueError: Where a number is out of its range; when called, where there is one row, more
            than one latent site, or a prior with parameters and without `rsample`.

    Example:
        >>> MMD(100.0)
        MMD(100, 1)
    """

    direction = "no bound"
    takes_kl_weight = False

    def __init__(
        self,
        weight: float,
        num_particles: int = 1,
        *,
        kernel: Kernel = inverse_multiquadric,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.weight = checked_finite("weight", weight, least=0.0)
        if not callable(kernel):
            raise ValueError(
                f"Expected a kernel, a function of two sets of points; got {kernel!r}."
            )
        self.kernel = kernel

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            particles: The draws.
            densities: Their log-densities.

        Raises:
            ValueError: Where the estimator would be wrong for the programs.
        """
        name, guided = _only_site(particles, self, factorised=False)
        drawn = guided["value"]
        prior = self._prior_draws(particles.model.nodes[name])
        discrepancy = self._squared(_points(drawn), _points(prior)).double()
        return densities.reconstruction.mean(0) - self.weight * discrepancy

    def _prior_draws(self, site: Any) -> Tensor:
        prior = site["fn"]
        if prior.has_rsample:
            draws: Tensor = prior.rsample()
            return draws
        draws = prior.sample()
        if torch.is_grad_enabled() and prior.log_prob(draws).requires_grad:
            raise ValueError(
                f"Expected a prior that draws {site['name']!r} by rsample, or has no parameters, "
                f"under {self}; got {prior}: the ELBO and the multi-sample bounds take it."
            )
        return draws

    def _squared(self, drawn: Tensor, prior: Tensor) -> Tensor:
        """The U-statistic of the squared discrepancy, the mean over particles."""
        within = _mean_of_others(self.kernel(drawn, drawn))
        within = within + _mean_of_others(self.kernel(prior, prior))
        return (within - 2.0 * self.kernel(drawn, prior).mean((-2, -1))).mean()

    def __repr__(self) -> str:
        return f"MMD({self.weight:g}, {self.num_particles})"


def _points(draws: Tensor) -> Tensor:
    """Draws as points (particles, rows, D)."""
    return draws.flatten(2) if draws.ndim > 2 else draws[..., None]


def _mean_of_others(kernel: Tensor) -> Tensor:
    rows = kernel.shape[-1]
    own = kernel.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (kernel.sum((-2, -1)) - own) / (rows * (rows - 1))


def _only_site(particles: Particles, elbo: Drawn, *, factorised: bool = True) -> Any:
    sites = latent_sites(particles.guide)
    if len(sites) != 1 or (particles.dim, particles.rows_dim) != (-2, -1):
        raise ValueError(
            f"Expected one latent site, and no plate in the program but that of the rows, under "
            f"{elbo}; got {', '.join(name for name, _ in sites)}, and plates of "
            f"{-particles.dim - 1} dims."
        )
    name, site = sites[0]
    if site["mask"] is not None or particles.model.nodes[name]["mask"] is not None:  # type: ignore[index]
        raise ValueError(
            f"Expected no mask on {name!r}, under {elbo}; got one: the ELBOs and FreeBits take it."
        )
    if particles.num_rows < 2:
        raise ValueError(f"Expected at least 2 rows under {elbo}; got 1.")
    if factorised and not is_factorised(site["fn"]):
        raise ValueError(
            f"Expected a guide that is independent over the elements of {name!r}, under {elbo}; "
            f"got {site['fn']}: take posteriors.Normal()."
        )
    return name, site
