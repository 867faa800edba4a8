"""Log-densities in float32 against 60 digits: the laws, their parameters, their data.

The parameters span what the links give (`"log"`: e^-30 to e^30; softplus: 1e-6 and more; logits of
any size), the data what float32 holds: whole numbers below 2^24, and for each parameter points at
the centre, one and five deviations from it, and at the ends of the support.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.distributions.densities import scored

Point = dict[str, float]

mp.mp.dps = 60
MOST = 2**24 - 1  # the largest whole number below which float32 holds all
STEPS = (0.0, -1.0, 1.0, -5.0, 5.0)
SIZES = (1e-13, 1e-6, 1e-3, 0.5, 1.0, 30.0, 1e3, 9.9e4, 1e5, 1e6, 1e9, 1e13)
LOGITS = [
    s * a for a in (1e-6, 1e-3, 0.49, 0.5, 1.0, 5.0, 16.0, 17.0, 40.0, 1e3, 1e5) for s in (-1, 1)
]


class Law(NamedTuple):
    """A class of Pyro, its log-density in many digits, and points: parameters and a value each."""

    kind: Any
    reference: Callable[..., Any]
    points: Callable[[], Iterator[Point]]
    units: Callable[[Point], dict[str, float]]  # in which a derivative is measured
    has_kink: Callable[[Point], bool] = lambda point: False


class Errors(NamedTuple):
    """At each point: log p, and the errors of it and of each derivative, in nats."""

    points: list[Point]
    log_prob: np.ndarray
    error: np.ndarray
    slopes: dict[str, np.ndarray]


def single(x: float) -> float:
    return float(np.float32(x))


def at(x: Any, **parameters: float) -> Point:
    return {"value": single(x), **{name: single(v) for name, v in parameters.items()}}


def whole(mean: float, spread: float, most: float = MOST) -> set[float]:
    """Counts around a mean, and the ends of the support."""
    around = {round(mean + step * max(spread, 1.0)) for step in STEPS if mean < 2.0 * MOST}
    return {float(min(max(k, 0), most)) for k in around | {0, 1, most}}


def log_beta(a: Any, b: Any) -> Any:
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


def log_choose(n: Any, k: Any) -> Any:
    return mp.loggamma(n + 1) - mp.loggamma(k + 1) - mp.loggamma(n - k + 1)


def softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(-abs(x))) + max(x, mp.mpf(0))


def normal(value: Any, loc: Any, scale: Any) -> Any:
    return -(((value - loc) / scale) ** 2) / 2 - mp.log(scale) - mp.log(2 * mp.pi) / 2


def student_t(value: Any, df: Any, loc: Any, scale: Any) -> Any:
    kernel = -(df + 1) / 2 * mp.log1p(((value - loc) / scale) ** 2 / df)
    ratio = mp.loggamma((df + 1) / 2) - mp.loggamma(df / 2)
    return ratio - mp.log(df * mp.pi) / 2 - mp.log(scale) + kernel


def continuous_bernoulli(value: Any, logits: Any) -> Any:
    mass = 1 + logits / 2 if abs(logits) < 1e-40 else mp.expm1(logits) / logits
    return value * logits - mp.log(mass)


def gamma(value: Any, concentration: Any, rate: Any) -> Any:
    kernel = (concentration - 1) * mp.log(value) - rate * value
    return kernel + concentration * mp.log(rate) - mp.loggamma(concentration)


def beta(value: Any, concentration1: Any, concentration0: Any) -> Any:
    kernel = (concentration1 - 1) * mp.log(value) + (concentration0 - 1) * mp.log1p(-value)
    return kernel - log_beta(concentration1, concentration0)


def binomial(value: Any, total_count: Any, logits: Any) -> Any:
    return log_choose(total_count, value) + value * logits - total_count * softplus(logits)


def negative_binomial(value: Any, total_count: Any, logits: Any) -> Any:
    ways = mp.loggamma(total_count + value) - mp.loggamma(total_count) - mp.loggamma(value + 1)
    return ways + value * logits - (total_count + value) * softplus(logits)


def beta_binomial(value: Any, total_count: Any, concentration1: Any, concentration0: Any) -> Any:
    after = log_beta(concentration1 + value, concentration0 + total_count - value)
    return log_choose(total_count, value) + after - log_beta(concentration1, concentration0)


def poisson(value: Any, rate: Any) -> Any:
    return value * mp.log(rate) - rate - mp.loggamma(value + 1)


def of_logits() -> Iterator[Point]:
    for logits, value in itertools.product([0.0, *LOGITS], (0.0, 1.0)):
        yield at(value, logits=logits)


def of_grey() -> Iterator[Point]:
    for logits in [0.0, *LOGITS]:
        end = 1.0 - 1.0 / logits if logits > 1.0 else -1.0 / min(logits, -1.0)
        for value in (0.0, 1e-6, 0.25, 0.5, 0.9, 1.0 - 6e-8, 1.0, end):
            yield at(value, logits=logits)


def of_location() -> Iterator[Point]:
    for loc, scale in itertools.product((0.0, -1e3, 1e6), (1e-6, 1e-3, 1.0, 1e6, 1e13)):
        for step in (*STEPS, -30.0, 1e4):
            yield at(loc + step * scale, loc=loc, scale=scale)


def of_t() -> Iterator[Point]:
    for df, point in itertools.product(SIZES, of_location()):
        if point["scale"] in (single(1e-3), 1.0) and point["loc"] != 1e6:
            yield point | {"df": single(df)}


def of_log_normal() -> Iterator[Point]:
    for loc, scale in itertools.product((-20.0, 0.0, 10.0), (1e-6, 1e-3, 1.0, 30.0)):
        for step in (*STEPS, 30.0):
            yield at(math.exp(min(max(loc + step * scale, -80.0), 80.0)), loc=loc, scale=scale)


def of_gamma() -> Iterator[Point]:
    for concentration, mean in itertools.product(SIZES, (1e-6, 1.0, 1e4)):
        rate = min(max(concentration / mean, 1e-13), 1e13)
        centre = single(concentration) / single(rate)
        shares = [1.0 + step / concentration**0.5 for step in STEPS]
        for share in [*(share for share in shares if 0.0 < share < 1e3), 1e-6, 10.0]:
            yield at(max(centre * share, 1e-30), concentration=concentration, rate=rate)


def of_beta() -> Iterator[Point]:
    for size, mean in itertools.product(SIZES, (0.5, 1e-3, 0.999)):
        one, zero = max(size * mean, 1e-13), max(size * (1.0 - mean), 1e-13)
        spread = (mean * (1.0 - mean) / (size + 1.0)) ** 0.5
        values = {mean + step * spread for step in STEPS} | {1e-30, 0.01, 1.0 - 6e-8}
        for value in sorted(value for value in values if 0.0 < single(value) < 1.0):
            yield at(value, concentration1=one, concentration0=zero)


def of_poisson() -> Iterator[Point]:
    for rate in (*SIZES, 1.6e7):
        for value in sorted(whole(rate, rate**0.5)):
            yield at(value, rate=rate)


def of_binomial() -> Iterator[Point]:
    logits = [0.0, *LOGITS, -20.5, 20.5, 30.0]
    for total, logit in itertools.product((1.0, 16.0, 255.0, 1e4, 1e6, MOST), logits):
        probs = float(1.0 / (1.0 + mp.exp(-logit)))
        for value in sorted(whole(total * probs, (total * probs * (1.0 - probs)) ** 0.5, total)):
            yield at(value, total_count=total, logits=logit)


def of_negative_binomial() -> Iterator[Point]:
    for total, mean in itertools.product(SIZES, (1e-3, 1.0, 100.0, 1e4, 1e6)):
        for value in sorted(whole(mean, (mean + mean**2 / total) ** 0.5)):
            yield at(value, total_count=total, logits=math.log(mean / total))


def of_beta_binomial() -> Iterator[Point]:
    for total, size, mean in itertools.product((1.0, 16.0, 1e4, 1e6, MOST), SIZES, (0.5, 0.999)):
        one, zero = max(size * mean, 1e-13), max(size * (1.0 - mean), 1e-13)
        inner = mean * (1.0 - mean) * (size + total) / (size + 1.0)
        for value in sorted(whole(total * mean, (total * inner) ** 0.5, total)):
            yield at(value, total_count=total, concentration1=one, concentration0=zero)


def as_it_is(point: Point) -> dict[str, float]:
    """Derivatives of positive parameters by their logarithms, others as they are."""
    return {name: 1.0 if name == "logits" else max(abs(v), 1e-6) for name, v in point.items()}


def in_scales(point: Point) -> dict[str, float]:
    return as_it_is(point) | {"loc": point["scale"], "value": point["scale"]}


LAWS = {
    "Bernoulli": Law(
        dist.Bernoulli,
        lambda value, logits: value * logits - softplus(logits),
        of_logits,
        as_it_is,
    ),
    "Beta": Law(dist.Beta, beta, of_beta, as_it_is),
    "BetaBinomial": Law(dist.BetaBinomial, beta_binomial, of_beta_binomial, as_it_is),
    "Binomial": Law(dist.Binomial, binomial, of_binomial, as_it_is),
    "ContinuousBernoulli": Law(dist.ContinuousBernoulli, continuous_bernoulli, of_grey, as_it_is),
    "Gamma": Law(dist.Gamma, gamma, of_gamma, as_it_is),
    "Laplace": Law(
        dist.Laplace,
        lambda value, loc, scale: -abs(value - loc) / scale - mp.log(2 * scale),
        of_location,
        in_scales,
    ),
    "LogNormal": Law(
        dist.LogNormal,
        lambda value, loc, scale: normal(mp.log(value), loc, scale) - mp.log(value),
        of_log_normal,
        lambda point: in_scales(point) | {"value": point["value"]},
    ),
    "NegativeBinomial": Law(
        dist.NegativeBinomial, negative_binomial, of_negative_binomial, as_it_is
    ),
    "Normal": Law(dist.Normal, normal, of_location, in_scales),
    "Poisson": Law(dist.Poisson, poisson, of_poisson, as_it_is),
    "StudentT": Law(dist.StudentT, student_t, of_t, in_scales),
}


def errors_of(law: Law, kind: Any = None) -> Errors:
    """The errors of a float32 log-density and of its derivatives, in nats per 1000 nats or less.

    Beyond 1000 nats an error counts in proportion, as float32 holds 7 digits. Derivatives are by
    the logarithm of positive parameters, and by scales of locations and of values.
    """
    points = list(law.points())
    names = [
        name for name in points[0] if name != "total_count" or law.kind is dist.NegativeBinomial
    ]
    tensors = {name: torch.tensor([point[name] for point in points]) for name in points[0]}
    is_discrete = law.reference in (poisson, binomial, negative_binomial, beta_binomial)
    slopes = [n for n in names if n != "value" or not (is_discrete or law.kind is dist.Bernoulli)]
    for name in slopes:
        tensors[name].requires_grad_()
    parameters = {name: tensor for name, tensor in tensors.items() if name != "value"}
    made = (kind or scored(law.kind))(**parameters, validate_args=False)
    log_prob: Tensor = made.log_prob(tensors["value"])
    assert log_prob.dtype == torch.float32
    found = torch.autograd.grad(log_prob.sum(), [tensors[name] for name in slopes])
    exact = [{name: mp.mpf(v) for name, v in point.items()} for point in points]
    true = [law.reference(**point) for point in exact]
    units = [law.units(point) for point in points]
    by_name = {}
    for name, slope in zip(slopes, found, strict=True):
        wanted = [
            derivative(law, p, name, unit[name]) for p, unit in zip(exact, units, strict=True)
        ]
        ours = [mp.mpf(float(s)) * unit[name] for s, unit in zip(slope, units, strict=True)]
        by_name[name] = proportional(ours, wanted)
    ours = [mp.mpf(float(p)) for p in log_prob.detach()]
    return Errors(points, np.array([float(t) for t in true]), proportional(ours, true), by_name)


def derivative(law: Law, point: dict[str, Any], name: str, unit: float) -> Any:
    """A central difference in 60 digits, of a step of 1e-20 units."""
    step = mp.mpf(unit) * mp.mpf(10) ** -20
    above, below = (law.reference(**point | {name: point[name] + s * step}) for s in (1, -1))
    return (above - below) / mp.mpf(10) ** -20 / 2


def proportional(found: list[Any], true: list[Any]) -> np.ndarray:
    pairs = zip(found, true, strict=True)
    return np.array([float(abs(f - t) / max(1, abs(t) / 1000)) for f, t in pairs])
