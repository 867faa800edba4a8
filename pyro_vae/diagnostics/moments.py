"""Statistics of a repeated gradient: mean, noise, signal, and distance to another gradient."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Moments",
    "Variance",
    "efficiency",
    "median",
    "relative_distance",
    "signal_to_noise",
]

BATCHES = 20
SE_OF_MEDIAN = 1.4826 * math.sqrt(math.pi / 2)  # times MAD / sqrt(n), for a normal distribution


class Moments:
    """Accumulates mean, variance and batch means of a gradient over repeats, and its values.

    The sums stay on the device, in float64, so that `add` does not wait for it.

    Arguments:
        num_repeats: The number of repeats that follow.
    """

    def __init__(self, num_repeats: int) -> None:
        self.num_repeats = num_repeats
        self.num_batches = min(BATCHES, num_repeats)
        self.count = 0
        self.last = torch.zeros(())
        self.values: list[Tensor] = []
        self.halves: list[Tensor] = []

    def add(self, value: Tensor, gradient: Tensor) -> None:
        """Adds one repeat.

        Arguments:
            value: The value of the objective.
            gradient: Its gradient, shape (parameters,).
        """
        if not self.count:
            self.mean, self.squares = torch.zeros_like(gradient), torch.zeros_like(gradient)
            self.sums = gradient.new_zeros(self.num_batches, len(gradient))
        if self.count % 2:
            self.halves.append((gradient - self.last).square().mean() / 2)
        self.sums[self.count * self.num_batches // self.num_repeats] += gradient
        self.count += 1
        change = gradient - self.mean
        self.mean += change / self.count
        self.squares += change * (gradient - self.mean)
        self.last = gradient
        self.values.append(value)

    def variances(self) -> Tensor:
        """Returns the variance of each parameter's gradient over repeats."""
        return self.squares / (self.count - 1)

    def batches(self) -> Tensor:
        """Returns the mean gradients of batches of repeats, shape (batches, parameters)."""
        indices = torch.arange(self.count) * self.num_batches // self.num_repeats
        sizes = torch.bincount(indices, minlength=self.num_batches).to(self.sums)
        return self.sums / sizes[:, None]

    def value(self) -> tuple[float, float]:
        """Returns the mean of the value, and its standard error."""
        values = torch.stack(self.values)
        return float(values.mean()), float(values.std() / math.sqrt(len(values)))

    def variance(self) -> tuple[float, float]:
        """Returns the mean variance over all parameters, and its error from pairs of repeats."""
        halves = torch.stack(self.halves)
        return float(self.variances().mean()), float(halves.std() / math.sqrt(len(halves)))


class Variance(NamedTuple):
    """The variance of a gradient and the time of a step, each with its standard error."""

    variance: float
    variance_se: float
    ms: float
    ms_se: float

    @property
    def price(self) -> float:
        return self.variance * self.ms

    @property
    def relative_error(self) -> float:
        parts = (self.variance_se, self.variance), (self.ms_se, self.ms)
        return math.hypot(*(error / value if value else math.inf for error, value in parts))


def efficiency(first: Variance, own: Variance) -> dict[str, float]:
    """Returns variance x time of the first estimator, divided by that of another, and its error.

    Arguments:
        first: Variance and time of the first estimator.
        own: Those of the other.
    """
    if own is first:
        return {"efficiency": 1.0, "efficiency_se": 0.0}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.float64(first.price) / own.price)
    error = math.hypot(first.relative_error, own.relative_error)
    return {"efficiency": ratio, "efficiency_se": ratio * error}


def signal_to_noise(mean: Tensor, variance: Tensor) -> float:
    """Returns the median of |mean| / s.d. over the parameters that are not dead.

    Arguments:
        mean: The mean of each parameter's gradient, shape (parameters,).
        variance: Its variance over repeats, of the same shape.
    """
    noise = variance.sqrt()
    is_alive = (noise > 0) | (mean != 0)
    ratios = (mean.abs() / noise)[is_alive].cpu().numpy()
    return float(np.median(ratios)) if ratios.size else math.nan


def relative_distance(batches: Tensor, reference: Tensor) -> tuple[float, float]:
    r"""Returns \|E g - r\| / \|r\|, and its standard error; NaN if r may be 0.

    Arguments:
        batches: Independent estimates of g, shape (n, parameters).
        reference: Independent estimates of r, shape (m, parameters).
    """
    centre = reference.mean(0)
    nothing = torch.zeros_like(reference[:1])
    size, size_error = _squared_distance(reference, nothing)
    squared, error = _squared_distance(batches - centre, reference - centre)
    if not (math.isfinite(squared) and size > 2.0 * size_error):
        return math.nan, math.nan
    if error == 0.0:
        return math.sqrt(max(squared, 0.0) / size), 0.0
    return math.sqrt(max(squared, 0.0) / size), error / math.sqrt(max(squared, error) * size)


def _squared_distance(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Estimates the squared distance of two means without bias, with its jackknife error.

    Arguments:
        left: Independent estimates of one mean, shape (n, parameters).
        right: Those of the other, shape (m, parameters).
    """
    pairs = (left, left), (right, right), (left, right)
    own, other, cross = ((one @ two.T).cpu().numpy() for one, two in pairs)

    def off_diagonal_mean(gram: np.ndarray) -> float:
        count = len(gram)
        if count == 1:
            return float(gram.sum())
        return float((gram.sum() - np.trace(gram)) / (count * (count - 1)))

    def estimate(rows: np.ndarray, columns: np.ndarray) -> float:
        within = off_diagonal_mean(own[np.ix_(rows, rows)])
        within += off_diagonal_mean(other[np.ix_(columns, columns)])
        return within - 2.0 * float(cross[np.ix_(rows, columns)].mean())

    rows, columns = np.arange(len(own)), np.arange(len(other))
    without = []
    if len(own) > 1:
        without.append([estimate(np.delete(rows, i), columns) for i in rows])
    if len(other) > 1:
        without.append([estimate(rows, np.delete(columns, i)) for i in columns])
    parts = [(len(values) - 1) * np.var(values) for values in without]
    return estimate(rows, columns), math.sqrt(sum(parts))


def median(values: np.ndarray) -> tuple[float, float]:
    """Returns the median, and its standard error from the median absolute deviation.

    Arguments:
        values: The values, shape (n,).
    """
    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle)))
    return middle, SE_OF_MEDIAN * spread / math.sqrt(len(values))
