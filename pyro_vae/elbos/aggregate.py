"""Objectives with a term of the aggregate posterior, the mixture of q(z | x) over the rows."""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..data.checks import checked_count, checked_finite
from .divergence import analytic_kl, factors, is_factorised
from .estimator import Estimator
from .log_densities import Densities, Particles, Site, latent_sites
from .multi_sample import MonteCarlo

__all__ = ["MMD", "TotalCorrelation", "inverse_multiquadric"]

Kernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class TotalCorrelation(MonteCarlo):
    r"""Creates the ELBO with a weight on the total correlation of the aggregate posterior.

    .. math::
        L = \sum_n \mathrm{ELBO}(x_n) - (\beta - 1)\, N\, \mathrm{TC}, \qquad
        \mathrm{TC} = \mathrm{KL}\Big(q(z), \prod_j q(z_j)\Big)

    This is beta-TC-VAE; the other parts of the KL divergence have the weight 1. The aggregate
    posterior at the draw of row i is estimated from the B rows of the batch: row i with the weight
    1 / N, each other one with (N - 1) / (N (B - 1)), so that the density is unbiased, but not its
    logarithm. TC is therefore biased, and may be negative if B is small. The objective is no
    bound on log p(x), unless :math:`\beta = 1`, where it is the ELBO. The KL divergence is in
    closed form if there is a formula. Needs `rsample`, and one latent site that is independent
    over its elements.

    References:
        Isolating sources of disentanglement in VAEs (Chen et al., 2018), arXiv 1802.04942.

    Arguments:
        beta: The weight :math:`\beta` of the total correlation.
        num_rows: The number of rows N of the whole data set; by default that of the batch.
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If a number is out of its range; when called, if the guide has more than
            one latent site, or one that is not independent over its elements.

    Example:
        >>> TotalCorrelation(beta=6.0, num_rows=60000)
        TotalCorrelation(beta=6.0, num_rows=60000)
    """

    direction = "no bound"
    unbiased_value = False
    unbiased_gradient = False

    def __init__(
        self, *, beta: float, num_rows: int | None = None, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(1, max_plate_nesting=max_plate_nesting)
        self.beta = checked_finite("beta", beta, least=0.0)
        self.num_rows = None
        if num_rows is not None:
            self.num_rows = checked_count("num_rows", num_rows)

    def objective(self, particles: Particles, densities: Densities) -> Tensor:
        name, guided = _only_site(particles, self)
        site: Site = particles.model.nodes[name]
        kl = analytic_kl(guided["fn"], site["fn"])
        kl = densities.kl[0] if kl is None else particles.to_rows(kl.double())[0]
        q, z = factors(guided["fn"]), guided["value"][0]
        pairs = _points(q.log_prob(z[:, None]).double())
        rows = len(z)
        total = rows if self.num_rows is None else self.num_rows
        if total < rows:
            raise ValueError(
                f"Expected num_rows to be at least the {rows} rows of the batch, under {self}; "
                f"got {total}."
            )
        of_others = (total - 1) / (total * max(rows - 1, 1))
        own = torch.eye(rows, dtype=pairs.dtype, device=pairs.device)
        weights = own * (math.log(1 / total)) + (1.0 - own) * math.log(max(of_others, 1e-300))
        weights = weights[..., None]
        joint = (pairs.sum(2, keepdim=True) + weights).logsumexp(1)
        marginals = (pairs + weights).logsumexp(1)
        penalty = kl + (self.beta - 1.0) * (joint.sum(1) - marginals.sum(1))
        return densities.reconstruction[0] - self.kl_weight * penalty

    def with_particles(self, num_particles: int) -> Estimator | None:
        """Returns `None`, since the number of draws is 1."""
        return None

    def __repr__(self) -> str:
        return f"TotalCorrelation(beta={self.beta!r}, num_rows={self.num_rows})"


def inverse_multiquadric(one: Tensor, other: Tensor) -> Tensor:
    r"""Returns the mean over seven scales s of :math:`2 D s / (2 D s + |z - z'|^2)`.

    The kernel of Tolstikhin et al. (2018), arXiv 1711.01558, for latents of unit scale.

    Arguments:
        one: Points, shape (..., n, D).
        other: Points, shape (..., m, D).

    Returns:
        The kernel of each pair, shape (..., n, m).
    """
    squares = (one[..., :, None, :] - other[..., None, :, :]).square().sum(-1)
    size = 2.0 * one.shape[-1]
    kernels = [size * s / (size * s + squares) for s in _SCALES]
    return torch.stack(kernels).mean(0)


_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class MMD(MonteCarlo):
    r"""Creates the reconstruction term minus the discrepancy of aggregate posterior and prior.

    .. math::
        L = \sum_n E_q[\log p(x_n \mid z_n)] - B \lambda\, \mathrm{MMD}^2(q(z), p(z))

    where :math:`q(z)` is the mixture of q(z | x) over the B rows of the batch. Draws of one row
    are never paired with each other, so that MMD is unbiased for rows drawn at random. This is
    InfoVAE, or the Wasserstein autoencoder. It is no bound on log p(x); value and gradient are
    unbiased. A weight on KL terms, such as a warm-up, is refused. Needs `rsample`, at least two
    rows, and one latent site.

    References:
        | InfoVAE (Zhao, Song & Ermon, 2019), arXiv 1706.02262.
        | A kernel two-sample test (Gretton et al., 2012), JMLR 13.

    Arguments:
        num_particles: The number of draws of z for each row.
        weight: The weight :math:`\lambda`, in nats per row.
        kernel: A positive definite kernel: a function of points of shapes (..., n, D) and
            (..., m, D) that returns shape (..., n, m).
        max_plate_nesting: The number of dims that plates take; by default a dry run infers it.

    Raises:
        ValueError: If a number is out of its range; when called, if there is one row, more
            than one latent site, or a prior with parameters and without `rsample`.

    Example:
        >>> MMD(weight=100.0)
        MMD(1, weight=100.0)
    """

    direction = "no bound"
    takes_kl_weight = False

    def __init__(
        self,
        num_particles: int = 1,
        *,
        weight: float,
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
        name, guided = _only_site(particles, self, factorised=False)
        site: Site = particles.model.nodes[name]
        prior = site["fn"]
        draws = prior.rsample() if prior.has_rsample else prior.sample()
        has_gradient = torch.is_grad_enabled() and not prior.has_rsample
        if has_gradient and prior.log_prob(draws).requires_grad:
            raise ValueError(
                f"Expected a prior that draws {name!r} by rsample, or has no parameters, "
                f"under {self}; got {prior}. The ELBO and the multi-sample bounds accept it."
            )
        of_guide, of_prior = _points(guided["value"]), _points(draws)
        within = _mean_of_others(self.kernel(of_guide, of_guide))
        within = within + _mean_of_others(self.kernel(of_prior, of_prior))
        squared = (within - 2.0 * self.kernel(of_guide, of_prior).mean((-2, -1))).mean()
        return densities.reconstruction.mean(0) - self.weight * squared.double()

    def __repr__(self) -> str:
        return f"MMD({self.num_particles}, weight={self.weight!r})"


def _points(draws: Tensor) -> Tensor:
    """Values with one dim for their elements: draws as points (particles, rows, D)."""
    return draws.flatten(2) if draws.ndim > 2 else draws[..., None]


def _mean_of_others(kernel: Tensor) -> Tensor:
    """The mean of the kernel over pairs of different rows."""
    rows = kernel.shape[-1]
    own = kernel.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (kernel.sum((-2, -1)) - own) / (rows * (rows - 1))


def _only_site(
    particles: Particles, elbo: MonteCarlo, *, factorised: bool = True
) -> tuple[str, Site]:
    """Checks the programs, and returns the one latent site: its name, and the guide's site."""
    sites = latent_sites(particles.guide)
    if len(sites) != 1 or (particles.dim, particles.rows_dim) != (-2, -1):
        raise ValueError(
            f"Expected one latent site, and no plate in the program but that of the rows, under "
            f"{elbo}; got the sites {', '.join(name for name, _ in sites)}, and plates of "
            f"{-particles.dim - 1} dims."
        )
    name, site = sites[0]
    if site["mask"] is not None or particles.model.nodes[name]["mask"] is not None:
        raise ValueError(
            f"Expected no mask on {name!r}, under {elbo}; got one. The ELBOs and FreeBits accept "
            "masks."
        )
    if particles.num_rows < 2:
        raise ValueError(f"Expected at least 2 rows under {elbo}; got 1.")
    if factorised and not is_factorised(site["fn"]):
        raise ValueError(
            f"Expected a guide that is independent over the elements of {name!r}, under {elbo}; "
            f"got {site['fn']}. Use posteriors.Normal()."
        )
    return name, site
