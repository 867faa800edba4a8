"""Log-densities that are right in float32 at any parameters, and need less memory than torch's."""

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.multivariate_normal import _batch_mahalanobis
from torch.distributions.utils import broadcast_all

from . import counts
from .special import log_rising, once, rounded, stirling_rest

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "Gamma",
    "LogNormal",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "Normal",
    "StudentT",
    "Weibull",
    "scored",
    "to_event",
]

MOST_IN_GROUP, LANES = 7, 8
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def scored(distribution: Any) -> Any:
    """Returns the version of a Pyro class whose log-density is exact, or the class itself.

    Arguments:
        distribution: A class of Pyro distributions.

    Example:
        >>> scored(dist.Normal)(0.0, 1.0).log_prob(torch.zeros(()))
        tensor(-0.9189)
    """
    return {
        dist.Bernoulli: Bernoulli,
        dist.Beta: Beta,
        dist.BetaBinomial: counts.BetaBinomial,
        dist.Binomial: counts.Binomial,
        dist.Categorical: Categorical,
        dist.ContinuousBernoulli: ContinuousBernoulli,
        dist.Gamma: Gamma,
        dist.LogNormal: LogNormal,
        dist.LowRankMultivariateNormal: LowRankMultivariateNormal,
        dist.MultivariateNormal: MultivariateNormal,
        dist.NegativeBinomial: counts.NegativeBinomial,
        dist.Normal: Normal,
        dist.Poisson: counts.Poisson,
        dist.StudentT: StudentT,
        dist.Weibull: Weibull,
    }.get(distribution, distribution)


class Bernoulli(dist.Bernoulli):  # type: ignore[misc]
    """Pyro's Bernoulli, with a log-probability that is computed in one buffer.

    torch computes a cross-entropy and negates it in a second buffer, which is as large as all
    draws of all pixels, in the forward and in the backward pass. That costs a tenth of a step of
    `DReG(50)`. Here a weight of -1 negates the cross-entropy in place.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), the same numbers as torch's.

        Arguments:
            value: Zeros and ones, of a shape that broadcasts with the logits.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        minus = logits.new_full((), -1.0)
        return F.binary_cross_entropy_with_logits(logits, value, weight=minus, reduction="none")


class Normal(dist.Normal):  # type: ignore[misc]
    """Pyro's normal; the logarithm and the square of its scale are computed once for all draws.

    torch computes them from the expanded scale, once for each particle, although they are
    the same for all particles.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value), the same numbers as torch's.

        Arguments:
            value: Real numbers, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        scale = once(self.scale)
        squares = -((value - once(self.loc)) ** 2) / (2 * scale**2)
        log_prob = squares - scale.log() - math.log(math.sqrt(2 * math.pi))
        return log_prob.expand(torch.broadcast_shapes(value.shape, self.batch_shape))


class LogNormal(dist.LogNormal):  # type: ignore[misc]
    """Pyro's log-normal; the distance of log(value) from its mean is computed in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Positive numbers, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        logs, scale = value.double().log(), once(self.scale)
        scores = (logs - once(self.loc).double()).to(scale.dtype) / scale
        log_prob = -0.5 * scores**2 - scale.log() - HALF_LOG_2PI - logs.to(scale.dtype)
        return rounded(log_prob, value, self.loc)


class StudentT(dist.StudentT):  # type: ignore[misc]
    """Pyro's Student t; its constant is computed in float64, and goes to the normal's."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Real numbers, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        df, scale = once(self.df).double(), once(self.scale).double()
        half = 0.5 * df
        constant = log_rising(half, torch.full_like(half, 0.5)) - 0.5 * half.log() - HALF_LOG_2PI
        squares = ((value.double() - once(self.loc).double()) / scale) ** 2
        kernel = (df + 1.0) * (-0.5 * torch.log1p(squares / df))
        return rounded(kernel + (constant - scale.log()), value, self.loc)


class Gamma(dist.Gamma):  # type: ignore[misc]
    r"""Pyro's gamma, in float64 and as a deviance, in which large concentrations do not cancel.

    .. math:: (a - 1) \log u - a (u - 1) + \log(b / a) - (\log\Gamma(a) - a \log a + a),
        \qquad u = b x / a
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Positive numbers, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape, rate = once(self.concentration).double(), once(self.rate).double()
        log_prob = _deviance(shape, rate * value.double() / shape) + (rate / shape).log()
        return rounded(log_prob - stirling_rest(shape), value, self.rate)


class Weibull(dist.Weibull):  # type: ignore[misc]
    """Pyro's Weibull, with a log-density in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Positive numbers, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape, scale = once(self.concentration).double(), once(self.scale).double()
        ratio = value.double() / scale
        kernel = torch.xlogy(shape - 1.0, ratio) - ratio**shape
        return rounded(kernel + (shape / scale).log(), value, self.scale)


class Beta(dist.Beta):  # type: ignore[misc]
    """Pyro's beta, in float64 and as a deviance, as :class:`Gamma`."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Numbers between 0 and 1, of a shape that broadcasts with the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        first, second, x = (
            self.concentration1.double(),
            self.concentration0.double(),
            value.double(),
        )
        total = first + second
        up, down = total / first, total / second
        kernel = _deviance(first, x * up) + _deviance(second, (1.0 - x) * down)
        rests = stirling_rest(total) - stirling_rest(first) - stirling_rest(second)
        return rounded(kernel + (up * down).log() + rests, value, self.concentration1)


def _deviance(shape: Tensor, ratio: Tensor) -> Tensor:
    """(shape - 1) log(ratio) - shape (ratio - 1); roundings of ratios near 1 cancel."""
    return torch.xlogy(shape - 1.0, ratio) - shape * (ratio - 1.0)


class Categorical(dist.Categorical):  # type: ignore[misc]
    """Pyro's categorical; its logits are normalised from their largest, at any size."""

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        below = None if logits is None else logits - logits.detach().amax(-1, keepdim=True)
        super().__init__(probs, below, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Returns the distribution with another batch shape.

        Arguments:
            batch_shape: The batch shape.
        """
        return super().expand(batch_shape, self._get_checked_instance(Categorical, _instance))


class ContinuousBernoulli(dist.ContinuousBernoulli):  # type: ignore[misc]
    r"""Pyro's continuous Bernoulli as a function of the logits, for logits of any size.

    torch computes it from probabilities that float32 rounds to 0 or 1 beyond logits of 16. Here
    it is an exponential distribution with rate a = \|logits\|, cut off at 1, of the distance t to
    0 or 1, whichever is more likely; near 0 it is a Taylor series.

    .. math:: \log p(x) = -a t + \log a - \log(1 - e^{-a})
    """

    def _sizes(self, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where logits are near 0; these alone, else 0; the sizes of the others, else 1; signs."""
        logits = self.logits
        near = logits.abs() < least
        small = torch.where(near, logits, torch.zeros_like(logits))
        large = torch.where(near, torch.ones_like(logits), logits.abs())
        return near, small, large, logits > 0.0

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Numbers from 0 to 1, of a shape that broadcasts with the logits.
        """
        if self._validate_args:
            self._validate_sample(value)
        near, small, large, up = self._sizes(0.5)
        squares = small**2
        series = squares * (1 / 24 - squares * (1 / 2880 - squares / 181440))
        rest = large.log() - torch.log1p(-(-large).exp())
        away = torch.where(up, 1.0 - value, value)
        return torch.where(near, small * (value - 0.5) - series, rest - large * away)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        near, small, large, up = self._sizes(0.5)
        squares = small**2
        series = 0.5 + small * (1 / 12 - squares * (1 / 720 - squares / 30240))
        away = 1.0 / large - 1.0 / torch.expm1(large)
        return torch.where(near, series, torch.where(up, 1.0 - away, away))

    @property
    def variance(self) -> Tensor:
        """The variance."""
        near, small, large, _ = self._sizes(1.0)
        squares = small**2
        series = 1 / 12 - squares * (1 / 240 - squares * (1 / 6048 - squares / 172800))
        return torch.where(near, series, large**-2 - (-large).exp() / torch.expm1(-large) ** 2)

    def entropy(self) -> Tensor:
        """Returns the entropy: log p(x) is linear in x."""
        return -self.log_prob(self.mean)

    def cdf(self, value: Tensor) -> Tensor:
        """Returns the distribution function.

        Arguments:
            value: Numbers from 0 to 1.
        """
        if self._validate_args:
            self._validate_sample(value)
        near, small, large, up = self._sizes(1e-3)
        away = torch.where(up, 1.0 - value, value)
        below = torch.expm1(-large * away) / torch.expm1(-large)
        series = value - 0.5 * small * value * (1.0 - value)
        return torch.where(near, series, torch.where(up, 1.0 - below, below)).clamp(0.0, 1.0)

    def icdf(self, value: Tensor) -> Tensor:
        """Returns the quantiles.

        Arguments:
            value: Probabilities.
        """
        near, small, large, up = self._sizes(0.1)
        spread = value * (1.0 - value)
        cubic = small * spread * (1.0 - 6.0 * spread) / 24
        series = value + small * (spread / 2 + small * (spread * (1.0 - 2.0 * value) / 6 + cubic))
        share = torch.where(up, 1.0 - value, value).clamp_max(1.0 - torch.finfo(large.dtype).eps)
        away = (-torch.log1p(share * torch.expm1(-large)) / large).clamp(0.0, 1.0)
        return torch.where(near, series, torch.where(up, 1.0 - away, away))


class MultivariateNormal(dist.MultivariateNormal):  # type: ignore[misc]
    """Pyro's multivariate normal; its triangular system is solved in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Real vectors, of a shape that broadcasts with the mean.
        """
        if self._validate_args:
            self._validate_sample(value)
        tril, away = self._unbroadcasted_scale_tril.double(), value.double() - self.loc
        log_scales = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        squares = _batch_mahalanobis(tril, away)
        log_prob = -0.5 * squares - log_scales - self._event_shape[0] * HALF_LOG_2PI
        return rounded(log_prob, value[..., 0], self.loc[..., 0])


class LowRankMultivariateNormal(dist.LowRankMultivariateNormal):  # type: ignore[misc]
    r"""Pyro's low-rank multivariate normal, in float64 and as a least-squares problem.

    .. math:: (x - \mu)^\top (W W^\top + D)^{-1} (x - \mu)
        = \min_c\; (x - \mu - W c)^\top D^{-1} (x - \mu - W c) + c^\top c

    Woodbury's identity, which torch uses, subtracts numbers whose ratio to the result is that of
    :math:`W W^\top` to D; and the Cholesky factor of its inner matrix fails in float32 for
    factors of ordinary size.
    """

    def __init__(
        self,
        loc: Tensor,
        cov_factor: Tensor,
        cov_diag: Tensor,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        super().__init__(loc, cov_factor.double(), cov_diag.double(), validate_args)
        for name in ("cov_factor", "cov_diag", "_capacitance_tril"):
            setattr(self, name, getattr(self, name).to(loc.dtype))
        self._unbroadcasted_cov_factor = cov_factor
        self._unbroadcasted_cov_diag = cov_diag

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Returns the distribution with another batch shape.

        Arguments:
            batch_shape: The batch shape.
        """
        new = self._get_checked_instance(LowRankMultivariateNormal, _instance)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Real vectors, of a shape that broadcasts with the mean.
        """
        if self._validate_args:
            self._validate_sample(value)
        factor, scales = (
            self._unbroadcasted_cov_factor.double(),
            self._unbroadcasted_cov_diag.double(),
        )
        away, weighted = value.double() - self.loc, (factor / scales[..., None]).mT
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        inner = identity + weighted @ factor
        tril = torch.linalg.cholesky(inner)
        shared = torch.cholesky_solve(weighted @ away[..., None], tril)
        rest = away - (factor @ shared)[..., 0]
        squares = (rest**2 / scales).sum(-1) + (shared**2).sum((-2, -1))
        log_scales = 0.5 * scales.log().sum(-1) + tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_prob = -0.5 * squares - log_scales - self._event_shape[0] * HALF_LOG_2PI
        return rounded(log_prob, value[..., 0], self.loc[..., 0])


def to_event(base: Any, dims: int) -> Any:
    """Returns a distribution whose last batch dims are part of the event.

    Arguments:
        base: The distribution.
        dims: The number of these dims.
    """
    if isinstance(base, Bernoulli) and dims > 0:
        return Bernoullis(base, dims)
    return base.to_event(dims)


class Bernoullis(dist.Independent):  # type: ignore[misc]
    r"""Independent Bernoulli variables. If no gradient is needed, up to 7 share one logarithm.

    .. math:: \sum_j x_j l_j - \max(l_j, 0) - \log(1 + e^{-|l_j|})

    The last term is the logarithm of a product over up to 7 elements, whose factors lie between
    1 and 2: one logarithm instead of 7. torch's inductor compiler unrolls a product this short,
    and evaluates the whole formula in one pass over the logits.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) of the events.

        Arguments:
            value: Zeros and ones, of a shape that broadcasts with the logits.
        """
        if torch.is_grad_enabled():
            return super().log_prob(value)
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(value)
        dims, logits = self.reinterpreted_batch_ndims, self.base_dist.logits
        size = math.prod(self.event_shape)  # elements per logarithm: a divisor, SIMD-aligned
        divisors = [few for few in range(1, MOST_IN_GROUP + 1) if size % few == 0]
        aligned = [few for few in divisors if size // few % LANES == 0]
        groups = (max(aligned or divisors), -1)
        scores = (value * logits - logits.clamp_min(0.0)).flatten(-dims).unflatten(-1, groups)
        factors = (1.0 + (-logits.abs()).exp()).flatten(-dims).unflatten(-1, groups)
        return (scores.sum(-2) - factors.prod(-2).log()).sum(-1)
