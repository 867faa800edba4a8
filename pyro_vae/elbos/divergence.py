"""The Kullback-Leibler divergences that are known in closed form."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

__all__ = ["analytic_kl", "factors", "is_factorised"]


def analytic_kl(q: Distribution, p: Distribution) -> Tensor | None:
    r"""Returns KL(q || p) in closed form, of shape `q.batch_shape`, in nats, or `None`.

    What torch and Pyro know, and a full-covariance or low-rank normal against independent ones:

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
    if _is_joint_normal(q) and _is_independent_normal(p):
        return _joint_to_independent(q, p.base_dist)  # type: ignore[attr-defined]
    try:
        divergence = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return torch.as_tensor(divergence).expand(q.batch_shape)


def is_factorised(distribution: Distribution) -> bool:
    """Whether a distribution is independent over the elements of its event, and says so.

    Arguments:
        distribution: A distribution.
    """
    return not distribution.event_shape or (
        isinstance(distribution, Independent)
        and distribution.reinterpreted_batch_ndims == len(distribution.event_shape)
    )


def factors(distribution: Any) -> Distribution:
    """Returns a factorised distribution with its event dims as batch dims.

    Arguments:
        distribution: A distribution that :func:`is_factorised`.
    """
    factorised: Distribution = distribution.base_dist if distribution.event_shape else distribution
    return factorised


def _is_joint_normal(q: Any) -> bool:
    return isinstance(q, dist.MultivariateNormal | dist.LowRankMultivariateNormal)


def _is_independent_normal(p: Any) -> bool:
    is_vector = isinstance(p, Independent) and p.reinterpreted_batch_ndims == 1
    return is_vector and isinstance(p.base_dist, dist.Normal)


def _joint_to_independent(q: Any, p: Any) -> Tensor:
    scaled = (q.variance + (q.loc - p.loc).square()) / p.scale.square() - 1.0
    return 0.5 * (scaled + 2.0 * p.scale.log()).sum(-1) - 0.5 * _log_determinant(q)


def _log_determinant(q: Any) -> Tensor:
    if isinstance(q, dist.LowRankMultivariateNormal):
        capacitance = q._capacitance_tril.diagonal(dim1=-2, dim2=-1)
        return 2.0 * capacitance.log().sum(-1) + q._unbroadcasted_cov_diag.log().sum(-1)
    return 2.0 * q._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
