"""Pareto k: how heavy the tail of importance weights is."""

import math

import numpy as np

__all__ = ["good_k", "note_on", "notes", "pareto_k"]

PRIOR_DRAWS = 10
MIN_TAIL = 5
MAX_ELEMENTS = 2**17
FLOAT32_NOISE = 1e-6
OK, UNKNOWN, NO_K = "ok", "error unknown", "k not known"


def good_k(num_samples: int) -> float:
    r"""Returns the largest Pareto k at which importance sampling is reliable.

    .. math:: \min(1 - 1 / \log_{10} S, \; 0.7)

    References:
        Pareto smoothed importance sampling (Vehtari et al., 2024), arXiv 1507.02646.

    Arguments:
        num_samples: The number of draws S.

    Example:
        >>> round(good_k(1000), 3), good_k(10_000)
        (0.667, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def notes(k: np.ndarray, limit: float) -> np.ndarray:
    """Says for each row what its Pareto k means for the error of its log p(x).

    Over the limit the standard error is too small and log p(x) too low, by unknown amounts.
    Without a k (it needs more than 20 draws) neither is known.

    Arguments:
        k: The Pareto k of each row, shape (rows,).
        limit: The result of :func:`good_k`.

    Returns:
        `"error unknown"` if k is over the limit, `"k not known"` if it is NaN, and otherwise
        `"ok"`, shape (rows,).

    Example:
        >>> notes(np.array([0.2, 0.9, np.nan]), 0.67).tolist()
        ['ok', 'error unknown', 'k not known']
    """
    return np.select([np.isnan(k), k > limit], [NO_K, UNKNOWN], OK)


def note_on(notes: np.ndarray) -> str:
    """Counts the rows with a note; an empty string if there are none.

    Arguments:
        notes: The result of :func:`notes`.

    Example:
        >>> note_on(np.array(["ok", "error unknown", "k not known", "error unknown"]))
        'error unknown in 2 of 4 rows, k not known in 1 of 4 rows'
    """
    counts = {note: int((notes == note).sum()) for note in (UNKNOWN, NO_K)}
    parts = [f"{note} in {count} of {len(notes)} rows" for note, count in counts.items() if count]
    return ", ".join(parts)


def pareto_k(log_weights: np.ndarray) -> np.ndarray:
    r"""Estimates, row by row, how heavy the tail of importance weights is.

    k is the shape of a generalised Pareto distribution, fitted to the largest
    ceil(min(S / 5, 3 sqrt(S))) weights by Zhang and Stephens' estimator and shrunk towards 0.5
    with the weight of ten draws. Moments of the weights are finite up to order 1 / k. If k is
    over `good_k`, their mean is not reliable.

    Degenerate weights raise no error and no warning. The result is -inf if the weights agree to
    float32 precision or the tail is one value; NaN if the tail has fewer than 5 weights, all
    weights are 0 or one is NaN; inf if the tail has fewer than 5 different weights or one is
    infinite.

    References:
        A new and efficient estimation method for the generalized Pareto distribution (Zhang &
        Stephens, 2009), doi 10.1198/tech.2009.08017.
        Pareto smoothed importance sampling (Vehtari et al., 2024), arXiv 1507.02646.

    Arguments:
        log_weights: log w, shape (S, rows). A constant may be added to each row.

    Returns:
        The estimates of k, shape (rows,).

    Example:
        >>> draws = np.random.default_rng(0).normal(scale=0.7, size=(1000, 1))
        >>> log_weights = draws**2 / (2 * 0.7**2) - draws**2 / 2  # N(0, 1) by N(0, 0.7)
        >>> bool(abs(pareto_k(log_weights)[0] - (1 - 0.7**2)) < 0.3)
        True
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    size, rows = log_weights.shape
    k = np.full(rows, np.nan)
    if size == 0:
        return k
    length = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    block = max(1, MAX_ELEMENTS // max(size, length * _grid_length(length)))
    with np.errstate(all="ignore"):
        for start in range(0, rows, block):
            own, part = k[start : start + block], log_weights[:, start : start + block]
            top = part.max(axis=0)
            constant = top - part.min(axis=0) <= FLOAT32_NOISE * np.maximum(1, np.abs(top))
            own[top == np.inf] = np.inf
            if MIN_TAIL <= length < size:
                usable = np.isfinite(top) & ~constant
                own[usable] = _fit_tails(part[:, usable] - top[usable], length)
            own[constant & np.isfinite(top)] = -np.inf
    return k


def _grid_length(count: int) -> int:
    return 30 + math.isqrt(count)


def _fit_tails(log_weights: np.ndarray, length: int) -> np.ndarray:
    """Fits the tails of all rows that have equally many weights above the cutoff at once."""
    size, rows = log_weights.shape
    cut = size - length - 1
    weights = np.exp(np.sort(np.partition(log_weights, cut, axis=0)[cut:], axis=0))
    cutoff = np.maximum(weights[0], np.finfo(np.float64).tiny)
    excess = np.maximum(weights[1:] - cutoff, 0)
    counts = (excess > 0).sum(axis=0)
    k = np.where(counts == 0, -np.inf, np.inf)
    for count in np.unique(counts[counts >= MIN_TAIL]):
        alike = counts == count
        k[alike] = _zhang_stephens(excess[length - count :, alike])
    return k


def _zhang_stephens(excess: np.ndarray) -> np.ndarray:
    count = len(excess)
    grid = _grid_length(count)
    quartile = excess[int(count / 4 + 0.5) - 1]
    steps = 1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    rates = 1 / excess[-1] + steps[:, None] / (3 * quartile)
    shapes = np.log1p(-rates[:, None] * excess).mean(axis=1)
    profile = count * (np.log(-rates / shapes) - shapes - 1)
    profile = np.where(np.isnan(profile), -np.inf, profile)
    posterior = np.exp(profile - profile.max(axis=0))
    rate = (posterior * rates).sum(axis=0) / posterior.sum(axis=0)
    k = np.log1p(-rate * excess).mean(axis=0)
    k = (count * k + PRIOR_DRAWS * 0.5) / (count + PRIOR_DRAWS)
    return np.where(np.isnan(k), np.inf, k)
