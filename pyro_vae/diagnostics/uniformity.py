"""Tests of probability integral transforms (PIT): are they uniform, are they symmetric?"""

import math

import numpy as np

__all__ = ["band", "counts_below", "holm", "pit_of", "symmetry_p_value", "uniformity_p_value"]

STEPS = 100
GRID = np.arange(1, STEPS) / STEPS
TINY = 1e-10  # below it the bound of Bonferroni is used, since 1 - p is not exact enough
ABOVE = 1 + 1e-9  # so that a bound excludes the count whose p-value it was made from


def pit_of(values: np.ndarray, rng: np.random.Generator, tolerance: float = 0.0) -> np.ndarray:
    """Returns the share of values below the first one, with ties broken at random.

    If the first value and the others are exchangeable, the result is uniform on (0, 1), whatever
    their number, and whether they are continuous or discrete. Sorted values whose neighbours
    differ by less than the tolerance are ties, so that rounding does not order equal values.

    Arguments:
        values: The values, shape (1 + draws, *rest).
        rng: The generator that breaks ties.
        tolerance: The largest difference of ties, relative to the largest value.

    Returns:
        The PIT, shape (*rest,).

    Example:
        >>> pit = pit_of(np.array([[3.0], [1.0], [2.0], [4.0]]), np.random.default_rng(0))
        >>> bool(2 / 4 < pit[0] < 3 / 4)
        True
    """
    order = values.argsort(axis=0)
    ordered = np.take_along_axis(values, order, axis=0)
    largest = np.where(np.isfinite(values), np.abs(values), 0).max(axis=0)
    with np.errstate(invalid="ignore"):  # the difference of two infinite values
        is_larger = np.diff(ordered, axis=0) > tolerance * largest
    group = np.concatenate([np.zeros_like(is_larger[:1], int), is_larger.cumsum(axis=0)])
    own = np.take_along_axis(group, (order == 0).argmax(axis=0)[None], axis=0)
    below, ties = (group < own).sum(axis=0), (group == own).sum(axis=0)
    return (below + rng.uniform(size=below.shape) * ties) / len(values)


def counts_below(pit: np.ndarray) -> np.ndarray:
    """Counts the values up to each point of the grid 0.01, 0.02, ..., 0.99.

    Arguments:
        pit: The values, shape (n,).
    """
    return np.searchsorted(np.sort(pit), GRID, side="right")


def uniformity_p_value(pit: np.ndarray) -> float:
    """Returns the p-value of the hypothesis that independent values are uniform on (0, 1).

    The statistic is the smallest of the two-sided binomial p-values of the empirical distribution
    function at 99 points. Its distribution is exact, so the p-value is that of the simultaneous
    band of :func:`band`: it is below alpha if the function leaves the band somewhere.

    References:
        Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation
        and multiple sample comparison (Säilynoja et al., 2022), arXiv 2103.10522.

    Arguments:
        pit: The values, shape (n,).

    Example:
        >>> values = np.random.default_rng(0).uniform(size=1000)
        >>> uniformity_p_value(values) > 0.05, uniformity_p_value(values**1.5) < 0.001
        (True, True)
    """
    from scipy.stats import binom

    n, counts = len(pit), counts_below(pit)
    tails = np.minimum(binom.cdf(counts, n, GRID), binom.sf(counts - 1, n, GRID))
    level = min(1.0, 2 * float(tails.min()))
    if level < TINY:
        return level * len(GRID)
    return max(level, 1 - _stays_inside(*_bounds(n, level)))


def band(n: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns bounds of the counts of :func:`counts_below` that hold together for uniform values.

    Arguments:
        n: The number of values.
        alpha: The probability with which a count is outside, at any point of the grid.

    Returns:
        The smallest and the largest count inside, each of shape (99,).

    Example:
        >>> low, high = band(1000, 0.05)
        >>> low[49].item(), high[49].item()
        (453, 547)
    """
    outside, inside = math.log(alpha), math.log(alpha / len(GRID))
    for _ in range(20):
        middle = (outside + inside) / 2
        is_wide = 1 - _stays_inside(*_bounds(n, math.exp(middle))) <= alpha
        outside, inside = (outside, middle) if is_wide else (middle, inside)
    return _bounds(n, math.exp(inside))


def symmetry_p_value(pit: np.ndarray) -> float:
    """Returns the p-value of the hypothesis that values are symmetric around 1/2.

    It is that of Wilcoxon's signed-rank test.

    Arguments:
        pit: The values, shape (n,).

    Example:
        >>> values = np.random.default_rng(0).uniform(size=1000)
        >>> symmetry_p_value(values) > 0.05, symmetry_p_value(values**1.5) < 0.001
        (True, True)
    """
    from scipy.stats import wilcoxon

    return float(wilcoxon(pit - 0.5).pvalue)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusts p-values for their number by Holm's method, which holds under any dependence.

    References:
        A simple sequentially rejective multiple test procedure (Holm, 1979), Scandinavian Journal
        of Statistics 6.

    Arguments:
        p_values: The p-values, shape (n,).

    Returns:
        The adjusted p-values. The probability that one of those of true hypotheses is below alpha
        is at most alpha.

    Example:
        >>> holm(np.array([0.5, 0.01, 0.02])).tolist()
        [0.5, 0.03, 0.04]
    """
    order = np.argsort(p_values)
    steps = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def _bounds(n: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The counts whose two-sided binomial p-value is above a level, at each point of the grid."""
    from scipy.stats import binom

    low = np.maximum(binom.ppf(level / 2 * ABOVE, n, GRID), 0).astype(int)
    return low, n - low[::-1]


def _stays_inside(low: np.ndarray, high: np.ndarray) -> float:
    """The probability that the counts of uniform values are within bounds at all points.

    The counts of n uniform values are those of a Poisson process of which n events are known, so
    the increments between two points are independent until the last step.
    """
    from scipy.stats import poisson

    n = int(low[0] + high[-1])
    step = poisson.pmf(np.arange(n + 1), n / STEPS)
    chance, start = np.ones(1), 0
    for least, most in zip([*low, n], [*high, n]):
        if least > most:
            return 0.0
        chance = np.convolve(chance, step[: most - start + 1])[least - start : most - start + 1]
        start = least
    return float(chance[0] / poisson.pmf(n, n))
