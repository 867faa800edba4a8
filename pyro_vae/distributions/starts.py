"""Maximum likelihood of distributions without features: where training starts."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STARTS", "Start", "searched"]

Values: TypeAlias = dict[str, Tensor]
Start: TypeAlias = Callable[[Tensor, Mapping[str, Tensor]], Values]

ELEMENTS = 2**20  # a search uses so many rows that rows times columns are at most this many
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def searched(score: Callable[[Tensor], Tensor], low: float, high: float, like: Tensor) -> Tensor:
    """Maximises a function of one positive number for each column at once.

    A grid over the logarithm brackets each maximum, and a golden-section search refines it.

    Arguments:
        score: The mean log-likelihood of each column, given one number a column.
        low: The least number.
        high: The largest number.
        like: A tensor of the shape of the result.

    Example:
        >>> peak = torch.tensor([2.0, 5.0], dtype=torch.float64)
        >>> searched(lambda v: -((v.log() - peak.log()) ** 2), 1e-2, 1e2, peak).round(decimals=3)
        tensor([2., 5.], dtype=torch.float64)
    """
    grid = torch.linspace(math.log(low), math.log(high), 41, dtype=like.dtype, device=like.device)
    scores = torch.stack([score(point.exp().expand_as(like)) for point in grid])
    best = scores.nan_to_num(nan=-math.inf).argmax(0)
    left, right = grid[(best - 1).clamp_min(0)], grid[(best + 1).clamp_max(len(grid) - 1)]
    for _ in range(40):
        first, second = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        is_left = score(first.exp()) > score(second.exp())
        left, right = torch.where(is_left, left, first), torch.where(is_left, second, right)
    return ((left + right) / 2.0).exp()


def _few(x: Tensor) -> Tensor:
    """Rows at even distances, so many that a search over them is fast."""
    rows = max(ELEMENTS // max(x[0].numel(), 1), 100)
    return x[:: math.ceil(len(x) / rows)]


def _normal(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    loc = fixed.get("loc", x.mean(0))
    return {"loc": loc, "scale": (x - loc).square().mean(0).sqrt()}


def _laplace(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    loc = fixed.get("loc", x.median(0).values)
    return {"loc": loc, "scale": (x - loc).abs().mean(0)}


def _log_normal(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    return _normal(x.log(), fixed)


def _student_t(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    """Location and scale by EM (Liu & Rubin, 1995) for each df of a grid; the best df is kept."""
    x = _few(x)
    grid = torch.logspace(0.0, math.log10(200.0), 24, dtype=x.dtype, device=x.device)
    choices = [fixed["df"]] if "df" in fixed else list(grid)
    best: Values = {}
    score = torch.full_like(x[0], -math.inf)
    for df in choices:
        df = df.expand_as(x[0]).to(x)
        loc, scale = x.median(0).values, x.std(0, correction=0).clamp_min(1e-6)
        for _ in range(50):
            weight = (df + 1.0) / (df + ((x - loc) / scale).square())
            loc = fixed.get("loc", (weight * x).sum(0) / weight.sum(0))
            scale = (weight * (x - loc).square()).mean(0).sqrt().clamp_min(1e-6)
        found = torch.distributions.StudentT(df, loc, scale).log_prob(x).mean(0)
        is_better = found > score
        score = torch.where(is_better, found, score)
        for name, value in {"df": df, "loc": loc.expand_as(df), "scale": scale}.items():
            best[name] = torch.where(is_better, value, best.get(name, value))
    return best


def _gamma(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    mean, log_mean = x.mean(0), x.log().mean(0)

    def score(shape: Tensor) -> Tensor:
        rate = shape / mean
        return shape * rate.log() + (shape - 1.0) * log_mean - rate * mean - shape.lgamma()

    shape = (
        fixed["concentration"] if "concentration" in fixed else searched(score, 1e-3, 1e6, mean)
    )
    return {"concentration": shape.expand_as(mean), "rate": shape / mean}


def _weibull(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    """The concentration by a search; the scale at its maximum for each concentration."""
    logs = _few(x).clamp_min(torch.finfo(x.dtype).tiny).log()
    mean = logs.mean(0)

    def log_scale(shape: Tensor) -> Tensor:
        if "scale" in fixed:
            return fixed["scale"].log().expand_as(mean)
        return ((shape * logs).logsumexp(0) - math.log(len(logs))) / shape

    def score(shape: Tensor) -> Tensor:
        loc = log_scale(shape)
        powers = (shape * (logs - loc)).exp().mean(0)
        return shape.log() - loc + (shape - 1.0) * (mean - loc) - powers

    shape = (
        fixed["concentration"] if "concentration" in fixed else searched(score, 1e-2, 1e4, mean)
    )
    shape = shape.expand_as(mean)
    return {"concentration": shape, "scale": log_scale(shape).exp()}


def _exponential(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    return {"rate": 1.0 / x.mean(0)}


def _poisson(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    return {"rate": x.mean(0).clamp_min(0.5 / len(x))}


def _negative_binomial(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    mean = x.mean(0).clamp_min(0.5 / len(x))
    few = _few(x)

    def score(total: Tensor) -> Tensor:
        logits = mean.log() - total.log()
        law = torch.distributions.NegativeBinomial(total, logits=logits)
        return law.log_prob(few).mean(0)

    if "total_count" in fixed:
        total = fixed["total_count"].to(mean)
    else:
        total = searched(score, 1e-3, 1e4, mean)
    logits = mean.log() - total.log()
    return {"total_count": total.expand_as(mean), "logits": logits, "probs": logits.sigmoid()}


def _bernoulli(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    probs = (x.sum(0) + 0.5) / (len(x) + 1.0)
    return {"probs": probs, "logits": probs.logit()}


def _binomial(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    total = fixed["total_count"].to(x).expand_as(x[0])
    probs = (x.sum(0) + 0.5) / (len(x) * total + 1.0)
    return {"probs": probs, "logits": probs.logit()}


def _beta_binomial(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    few, probs = _few(x), _binomial(x, fixed)["probs"]
    total = fixed["total_count"].to(x).expand_as(x[0])

    def score(precision: Tensor) -> Tensor:
        a, b = probs * precision, (1.0 - probs) * precision
        return (_log_beta(few + a, total - few + b) - _log_beta(a, b)).mean(0)

    precision = searched(score, 1e-2, 1e5, probs)
    return {"concentration1": probs * precision, "concentration0": (1.0 - probs) * precision}


def _beta(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    """The mean and the precision in turns, each by a search."""
    logs, complements = x.log().mean(0), (1.0 - x).log().mean(0)

    def score(mean: Tensor, size: Tensor) -> Tensor:
        first, second = mean * size, (1.0 - mean) * size
        scored = (first - 1.0) * logs + (second - 1.0) * complements
        return scored - _log_beta(first, second)

    def of_odds(size: Tensor, odds: Tensor) -> Tensor:
        return score(odds / (1.0 + odds), size)

    mean = size = x.mean(0)
    for _ in range(20):
        size = searched(functools.partial(score, mean), 1e-2, 1e6, mean)
        odds = searched(functools.partial(of_odds, size), 1e-5, 1e5, mean)
        mean = odds / (1.0 + odds)
    return {"concentration1": mean * size, "concentration0": (1.0 - mean) * size}


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


def _continuous_bernoulli(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    """Solves mean(logits) = mean(x) by bisection; the mean rises with the logits."""
    wanted = x.mean(0).clamp(1e-3, 1.0 - 1e-3)
    low, high = torch.full_like(wanted, -1e3), torch.full_like(wanted, 1e3)
    for _ in range(80):
        middle = (low + high) / 2.0
        is_small = middle.abs() < 1e-3
        safe = torch.where(is_small, torch.ones_like(middle), middle)
        mean = torch.where(is_small, 0.5 + middle / 12.0, 1.0 / (-torch.expm1(-safe)) - 1.0 / safe)
        low, high = (
            torch.where(mean < wanted, middle, low),
            torch.where(mean < wanted, high, middle),
        )
    logits = (low + high) / 2.0
    return {"logits": logits, "probs": logits.sigmoid()}


def _categorical(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    """The shares of the categories, with 1/2 added to each count."""
    counts = F.one_hot(x.long(), int(fixed["num_categories"])).sum(0).to(x.dtype) + 0.5
    logits = counts.log() - counts.sum(-1, keepdim=True).log()
    return {"logits": logits, "probs": logits.exp()}


def _multivariate_normal(x: Tensor, fixed: Mapping[str, Tensor]) -> Values:
    loc = x.mean(0)
    spread = (x - loc).square().mean(0).sqrt()
    return {
        "loc": loc,
        "scale_tril": spread.diag_embed(),
        "covariance_matrix": spread.square().diag_embed(),
        "cov_diag": spread.square(),
    }


STARTS: dict[Any, Start] = {
    dist.Bernoulli: _bernoulli,
    dist.Beta: _beta,
    dist.BetaBinomial: _beta_binomial,
    dist.Binomial: _binomial,
    dist.Categorical: _categorical,
    dist.ContinuousBernoulli: _continuous_bernoulli,
    dist.Exponential: _exponential,
    dist.Gamma: _gamma,
    dist.Laplace: _laplace,
    dist.LogNormal: _log_normal,
    dist.LowRankMultivariateNormal: _multivariate_normal,
    dist.MultivariateNormal: _multivariate_normal,
    dist.NegativeBinomial: _negative_binomial,
    dist.Normal: _normal,
    dist.Poisson: _poisson,
    dist.StudentT: _student_t,
    dist.Weibull: _weibull,
}
