"""Integrals by the double exponential rule, and tests of draws against them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from pyro.distributions import constraints
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.distributions.links import base_of


class Grid(NamedTuple):
    """Points of the integral, their weights (of a step in each dim), their places s."""

    points: Tensor
    weights: Tensor
    s: Tensor


def grid(support: constraints.Constraint, size: int, reach: float = 3.2) -> Grid:
    """x = g(pi/2 sinh(s)), at even steps of s: each tail dies as exp(-exp(|s|))."""
    s = torch.linspace(-reach, reach, size, dtype=torch.float64, requires_grad=True)
    t = torch.pi / 2 * torch.sinh(s)
    bounds = [getattr(base_of(support), f"{side}_bound", None) for side in ("lower", "upper")]
    lower, upper = (None if b is None else float(torch.as_tensor(b).flatten()[0]) for b in bounds)
    if lower is None:
        x = torch.sinh(t)
    elif upper is None or upper == float("inf"):
        x = lower + torch.exp(t)
    else:
        x = lower + (upper - lower) * torch.sigmoid(2 * t)
    slope = torch.autograd.grad(x.sum(), s)[0]
    step = 2 * reach / (size - 1)
    return Grid(x.detach(), slope * step, s.detach())


def square(line: Grid) -> tuple[Tensor, Tensor]:
    """The points (size, size, 2) of a plane and their weights (size, size)."""
    points = torch.cartesian_prod(line.points, line.points).reshape(len(line.s), len(line.s), 2)
    return points, line.weights[:, None] * line.weights


def mass_of(log_prob: Callable[[Tensor], Tensor], points: Tensor, weights: Tensor) -> Tensor:
    """The probability of each point's cell, which sum to the integral."""
    with torch.no_grad():
        log_prob_of_points = log_prob(points)
    return (log_prob_of_points + weights.log()).exp().nan_to_num(0.0)


def p_of_line(draws: Tensor, line: Grid, mass: Tensor) -> float:
    """The p-value of Kolmogorov and Smirnov's test of draws against a density on a line."""
    cumulated = (mass.cumsum(0) - mass / 2).numpy()
    return stats.kstest(draws.numpy(), lambda x: np.interp(x, line.points, cumulated)).pvalue


def p_of_plane(draws: Tensor, line: Grid, mass: Tensor, cells: int = 6) -> float:
    """The p-value of a chi-square test of draws against a density over cells of a plane."""
    cuts = [edges(mass.sum(1 - axis), line, cells) for axis in (0, 1)]
    cell = [torch.bucketize(line.points, cut) for cut in cuts]
    expected = torch.zeros(cells, cells, dtype=mass.dtype)
    expected.index_put_((cell[0][:, None], cell[1][None]), mass, accumulate=True)
    found = torch.zeros(cells, cells, dtype=mass.dtype)
    place = tuple(torch.bucketize(draws[:, axis].contiguous(), cuts[axis]) for axis in (0, 1))
    found.index_put_(place, torch.ones(len(draws), dtype=mass.dtype), accumulate=True)
    return p_of_counts(found.flatten(), expected.flatten())


def edges(marginal: Tensor, line: Grid, cells: int) -> Tensor:
    """Points midway between those of the grid, near equal shares of a marginal."""
    shares = torch.arange(1, cells, dtype=marginal.dtype) / cells
    after = torch.searchsorted(marginal.cumsum(0), shares * marginal.sum())
    middle = (line.s[after] + line.s[after + 1]) / 2
    return torch.from_numpy(np.interp(middle, line.s, line.points))


def p_of_counts(found: Tensor, probabilities: Tensor) -> float:
    """The p-value of a chi-square test of counts; cells that expect under 5 are put together."""
    expected = probabilities * found.sum()
    small = expected < 5
    pairs = [(found[~small], expected[~small])]
    f, e = (
        torch.cat([v, rest.sum(0, keepdim=True)])
        for v, rest in zip(pairs[0], (found[small], expected[small]))
    )
    keep = e > 0
    assert f[~keep].sum() == 0
    return stats.chisquare(f[keep], e[keep] * f.sum() / e[keep].sum()).pvalue


def integral(distribution: Distribution, size: int = 2001) -> tuple[Grid, Tensor]:
    """The grid and masses of a distribution over an event of shape (1,)."""
    line = grid(distribution.support, size)
    return line, mass_of(lambda x: distribution.log_prob(x[:, None]), line.points, line.weights)
