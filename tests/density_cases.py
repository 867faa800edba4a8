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
    """How to make a density of a class or of its mended version, its log-density in many digits.

    A point has parameters and a value, each a number: `value0` and `value1` are those of a vector.
    Derivatives are measured in units: by the logarithm of a positive parameter, by scales of a
    location.
    """

    make: Callable[..., Any]
    reference: Callable[..., Any]
    points: Callable[[], Iterator[Point]]
    units: Callable[[Point], dict[str, float]]
    fixed: frozenset[str] = frozenset()  # what has no derivative


class Errors(NamedTuple):
    """At each point: log p, and the errors of it and of each derivative, in nats."""

    points: list[Point]
    log_prob: np.ndarray
    error: np.ndarray
    slopes: dict[str, np.ndarray]


def single(x: float) -> float:
    return float(np.float32(x))


def at(value: float, **others: float) -> Point:
    """A point of float32 numbers."""
    return {name: single(v) for name, v in {"value": value, **others}.items()}


def vector(**numbers: float) -> Point:
    return {name: single(v) for name, v in numbers.items()}


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


def weibull(value: Any, scale: Any, concentration: Any) -> Any:
    logs = mp.log(value / scale)
    kernel = (concentration - 1) * logs - mp.exp(concentration * logs)
    return mp.log(concentration / scale) + kernel


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


def of_weibull() -> Iterator[Point]:
    for concentration, scale in itertools.product(SIZES[1:-1], (1e-6, 1.0, 1e4)):
        for quantile in (1e-6, 0.1, 0.5, 0.9, 1.0 - 1e-6):
            logs = math.log(-math.log1p(-quantile)) / concentration
            value = scale * math.exp(min(max(logs, -50.0), 50.0))
            yield at(value, scale=scale, concentration=concentration)


def of_beta() -> Iterator[Point]:
    for size, mean in itertools.product(SIZES, (0.5, 1e-3, 0.999)):
        one, zero = max(size * mean, 1e-13), max(size * (1.0 - mean), 1e-13)
        spread = (mean * (1.0 - mean) / (size + 1.0)) ** 0.5
        values = {mean + step * spread for step in STEPS} | {1e-20, 0.01, 1.0 - 6e-8}
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


def of_categories() -> Iterator[Point]:
    for size in (0.0, 1.0, 100.0, 1e5, 3e6):
        for value in (0.0, 1.0, 2.0):
            yield at(value, logits0=size, logits1=size - 1.0, logits2=0.0)


def of_plane() -> Iterator[Point]:
    """Deviations of standard normal variables, mapped by a lower triangle (first, mixed, last)."""
    for first, mixed, last in itertools.product(
        (1e-3, 1.0), (0.0, 1.0, -100.0), (1e-6, 1e-3, 1.0)
    ):
        for one, two in itertools.product((0.0, 1.0, -5.0), (0.5, -5.0)):
            values = {"value0": 0.3 + first * one, "value1": -2.0 + mixed * one + last * two}
            yield vector(**values, loc0=0.3, loc1=-2.0, first=first, mixed=mixed, last=last)


def of_factor() -> Iterator[Point]:
    for one, two, scale in itertools.product((1.0, 1e3), (1.0, -1e3), (1e-6, 1e-3, 1.0)):
        for step, noise in itertools.product((0.0, 1.0, -5.0), (-1.0, 5.0)):
            values = {"value0": step * one, "value1": step * two + noise * scale**0.5}
            yield vector(**values, factor0=one, factor1=two, scale0=scale, scale1=2.0 * scale)


def triangular(**p: Any) -> Any:
    one = (p["value0"] - p["loc0"]) / p["first"]
    two = (p["value1"] - p["loc1"] - p["mixed"] * one) / p["last"]
    return normal(one, 0, 1) + normal(two, 0, 1) - mp.log(p["first"]) - mp.log(p["last"])


def low_rank(**p: Any) -> Any:
    one, two = p["factor0"], p["factor1"]
    above, below = one**2 + p["scale0"], two**2 + p["scale1"]
    det = p["scale0"] * p["scale1"] + one**2 * p["scale1"] + two**2 * p["scale0"]
    across = 2 * one * two * p["value0"] * p["value1"]
    squares = p["value0"] ** 2 * below + p["value1"] ** 2 * above - across
    return -squares / det / 2 - mp.log(det) / 2 - mp.log(2 * mp.pi)


def of_triangle(kind: Any, **p: Tensor) -> Any:
    rows = [stacked(p["first"], torch.zeros_like(p["first"])), stacked(p["mixed"], p["last"])]
    return kind(stacked(p["loc0"], p["loc1"]), scale_tril=torch.stack(rows, -2))


def of_low_rank(kind: Any, **p: Tensor) -> Any:
    factor, scales = stacked(p["factor0"], p["factor1"]), stacked(p["scale0"], p["scale1"])
    return kind(torch.zeros_like(scales), factor[..., None], scales)


def stacked(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors, -1)


def natural(point: Point) -> dict[str, float]:
    """Derivatives of logits as they are, of other parameters by their logarithms."""
    return {name: 1.0 if "logits" in name else abs(v) or 1.0 for name, v in point.items()}


def in_scales(point: Point) -> dict[str, float]:
    return natural(point) | {"loc": point["scale"], "value": point["scale"]}


def made(kind: Any, **parameters: Tensor) -> Any:
    return kind(**parameters, validate_args=False)


COUNT = frozenset({"value", "total_count"})

LAWS: dict[str, tuple[Any, Law]] = {
    "Bernoulli": (
        dist.Bernoulli,
        Law(
            made,
            lambda value, logits: value * logits - softplus(logits),
            of_logits,
            natural,
            COUNT,
        ),
    ),
    "Beta": (dist.Beta, Law(made, beta, of_beta, natural)),
    "BetaBinomial": (
        dist.BetaBinomial,
        Law(made, beta_binomial, of_beta_binomial, natural, COUNT),
    ),
    "Binomial": (dist.Binomial, Law(made, binomial, of_binomial, natural, COUNT)),
    "Categorical": (
        dist.Categorical,
        Law(
            lambda kind, **p: kind(logits=stacked(p["logits0"], p["logits1"], p["logits2"])),
            lambda value, **p: p[f"logits{int(value)}"] - mp.log(sum(map(mp.exp, p.values()))),
            of_categories,
            natural,
            COUNT,
        ),
    ),
    "ContinuousBernoulli": (
        dist.ContinuousBernoulli,
        Law(made, continuous_bernoulli, of_grey, lambda point: dict.fromkeys(point, 1.0)),
    ),
    "Gamma": (dist.Gamma, Law(made, gamma, of_gamma, natural)),
    "Laplace": (
        dist.Laplace,
        Law(
            made,
            lambda value, loc, scale: -abs(value - loc) / scale - mp.log(2 * scale),
            of_location,
            in_scales,
        ),
    ),
    "LogNormal": (
        dist.LogNormal,
        Law(
            made,
            lambda value, loc, scale: normal(mp.log(value), loc, scale) - mp.log(value),
            of_log_normal,
            lambda point: in_scales(point) | {"value": point["value"]},
        ),
    ),
    "LowRankMultivariateNormal": (
        dist.LowRankMultivariateNormal,
        Law(of_low_rank, low_rank, of_factor, natural, frozenset({"value"})),
    ),
    "MultivariateNormal": (
        dist.MultivariateNormal,
        Law(of_triangle, triangular, of_plane, natural, frozenset({"value"})),
    ),
    "NegativeBinomial": (
        dist.NegativeBinomial,
        Law(made, negative_binomial, of_negative_binomial, natural, frozenset({"value"})),
    ),
    "Normal": (dist.Normal, Law(made, normal, of_location, in_scales)),
    "Poisson": (dist.Poisson, Law(made, poisson, of_poisson, natural, COUNT)),
    "Weibull": (dist.Weibull, Law(made, weibull, of_weibull, natural)),
    "StudentT": (dist.StudentT, Law(made, student_t, of_t, in_scales)),
}


def errors_of(name: str, mended: Callable[[Any], Any] = scored) -> Errors:
    """The errors of a float32 log-density and of its derivatives, in nats per 1000 nats or less.

    Beyond 1000 nats an error counts in proportion, as float32 holds 7 digits.
    """
    kind, law = LAWS[name]
    points = list(law.points())
    tensors = {key: torch.tensor([point[key] for point in points]) for key in points[0]}
    slopes = [key for key in tensors if key not in law.fixed]
    for key in slopes:
        tensors[key].requires_grad_()
    values = [tensor for key, tensor in tensors.items() if key.startswith("value")]
    parameters = {key: tensor for key, tensor in tensors.items() if not key.startswith("value")}
    density = law.make(mended(kind), **parameters)
    log_prob = density.log_prob(values[0] if len(values) == 1 else stacked(*values))
    assert log_prob.dtype == torch.float32
    found = torch.autograd.grad(log_prob.sum(), [tensors[key] for key in slopes])
    exact = [{key: mp.mpf(v) for key, v in point.items()} for point in points]
    true = [law.reference(**point) for point in exact]
    units = [law.units(point) for point in points]
    by_name = {}
    for key, slope in zip(slopes, found, strict=True):
        pairs = zip(exact, units, strict=True)
        wanted = [derivative(law, point, key, unit[key]) for point, unit in pairs]
        ours = [mp.mpf(s) * unit[key] for s, unit in zip(slope.tolist(), units, strict=True)]
        by_name[key] = proportional(ours, wanted)
    error = proportional(list(map(mp.mpf, log_prob.tolist())), true)
    return Errors(points, np.array([float(t) for t in true]), error, by_name)


def derivative(law: Law, point: dict[str, Any], name: str, unit: float) -> Any:
    """A central difference in 60 digits, of a step of 1e-20 units."""
    step = mp.mpf(unit) * mp.mpf(10) ** -20
    above, below = (law.reference(**point | {name: point[name] + s * step}) for s in (1, -1))
    return (above - below) / mp.mpf(10) ** -20 / 2


def proportional(found: list[Any], true: list[Any]) -> np.ndarray:
    pairs = zip(found, true, strict=True)
    return np.array([float(abs(f - t) / max(1, abs(t) / 1000)) for f, t in pairs])
