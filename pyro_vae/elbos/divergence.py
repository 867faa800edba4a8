"""The Kullback-Leibler divergences that have a closed form."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

__all__ = ["analytic_kl", "factors", "is_factorised"]


def analytic_kl(q: Distribution, p: Distribution) -> Tensor | None:
    r"""Returns KL(q || p) in closed form, of shape `q.batch_shape`, in nats, or `None`.

    It covers what torch and Pyro have formulas for, and a full-covariance or low-rank normal
    against independent normals:

    .. math::
        \tfrac12 \Big[\sum_d \frac{\Sigma_{dd} + (\mu_d - m_d)^2}{s_d^2} - D
            + 2 \sum_d \log s_d - \log \det \Sigma\Big]

    Arguments:
        q: A distribution.
        p: A distribution with the same event shape.

    Example:
        >>> q = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> analytic_kl(q, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        tensor(0.)
    """
    match q, p:
        case (
            dist.MultivariateNormal() | dist.LowRankMultivariateNormal(),
            Independent(reinterpreted_batch_ndims=1, base_dist=dist.Normal() as normal),
        ):
            scaled = (q.variance + (q.loc - normal.loc).square()) / normal.scale.square() - 1.0
            terms = 0.5 * (scaled + 2.0 * normal.scale.log()).sum(-1)
        case _:
            try:
                return torch.as_tensor(kl_divergence(q, p)).expand(q.batch_shape)
            except NotImplementedError:
                return None
    match q:
        case dist.LowRankMultivariateNormal():
            capacitance = q._capacitance_tril.diagonal(dim1=-2, dim2=-1)
            rest = q._unbroadcasted_cov_diag.log().sum(-1)
            log_determinant = 2.0 * capacitance.log().sum(-1) + rest
        case _:
            scales = q._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1)
            log_determinant = 2.0 * scales.log().sum(-1)
    return terms - 0.5 * log_determinant


def is_factorised(distribution: Distribution) -> bool:
    """Whether a distribution is an `Independent` over all elements of its event.

    Arguments:
        distribution: A distribution.
    """
    return not distribution.event_shape or (
        isinstance(distribution, Independent)
        and distribution.reinterpreted_batch_ndims == len(distribution.event_shape)
    )


def factors(distribution: Distribution) -> Distribution:
    """Returns a factorised distribution with its event dims as batch dims.

    Arguments:
        distribution: A distribution that :func:`is_factorised`.
    """
    return distribution.base_dist if distribution.event_shape else distribution  # type: ignore[attr-defined]
