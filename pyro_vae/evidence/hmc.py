"""Hamiltonian Monte Carlo of many rows and chains at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.rows import Rows
from ..data.source import Row
from ..elbos.chunks import Plan
from ..elbos.drawing import Drawing
from ..elbos.log_densities import Structure, structure
from ..engine.progress import progress_bar
from ..engine.running import check_gradients
from .unconstrained import Space

__all__ = ["Chains", "Draws", "Scales", "State", "Warm", "hmc", "space_of", "warmed_up"]

MOMENT_DRAWS = 1024
MAX_ELEMENTS = 2**20  # of one tensor: a gradient needs many at a time, which fit into the caches
JITTER = 0.25  # the step of a trajectory is this much shorter or longer, at random
PATH = 2.0  # the length of a trajectory, in standard deviations: a quarter of a period is 1.57
MOST_STEPS = 32
FIRST_STEPS = 4
TARGET = 0.8  # the rate of acceptance
HARD_TO_REACH = 0.05  # the share of the rows whose small steps do not set the length of all


@dataclass(frozen=True, eq=False)
class Scales:
    """The coordinates in which the chains of each row move: u = loc + factor @ point.

    Arguments:
        loc: The location of each row, shape (rows, D).
        factor: A lower triangular matrix of each row, shape (rows, D, D): the mass matrix of the
            momenta in u is the inverse of factor @ factor.T.
    """

    loc: Tensor
    factor: Tensor

    @classmethod
    def of(cls, u: Tensor, within: Tensor | None = None) -> Scales:
        """Takes the moments of draws, with correlations shrunk towards 0 if the draws are few.

        Arguments:
            u: The draws, shape (draws, rows, D).
            within: The draws less the means of their chains, of the same shape.
        """
        count, size = len(u), u.shape[-1]
        loc = u.double().mean(0)
        centred = (u.double() - loc if within is None else within.double()).transpose(0, 1)
        covariance = centred.mT @ centred / (count - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        variance = torch.where(variance > 1e-12, variance, 1.0).nan_to_num(1.0, 1.0, 1.0)
        sd = variance.sqrt()
        share = size / (count + size)
        correlation = (1 - share) * (covariance / (sd[..., None] * sd[..., None, :]))
        unit = torch.eye(size, dtype=sd.dtype, device=sd.device)
        correlation = torch.where(unit.bool(), unit, correlation.nan_to_num(0.0, 0.0, 0.0))
        factor, failed = torch.linalg.cholesky_ex(correlation)
        factor = torch.where(failed[:, None, None] > 0, unit, factor)
        return cls(loc.to(u), (sd[..., None] * factor).to(u))

    def u(self, points: Tensor) -> Tensor:
        """Returns u of points, both of shape (chains, rows, D)."""
        return self.loc + (points.transpose(0, 1) @ self.factor.mT).transpose(0, 1)

    def points(self, u: Tensor) -> Tensor:
        """Inverts :meth:`u`."""
        centred = (u - self.loc).permute(1, 2, 0)
        return torch.linalg.solve_triangular(self.factor, centred, upper=False).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class State:
    """Points of the chains, with two log-densities and their gradients.

    Arguments:
        points: The points, shape (chains, rows, D).
        log_start: log p of the start of the path, shape (chains, rows), in nats.
        log_end: log p(x, u), shape (chains, rows), in nats.
        start_slope: The gradient of `log_start`, shape (chains, rows, D).
        end_slope: The gradient of `log_end`, shape (chains, rows, D).
    """

    points: Tensor
    log_start: Tensor
    log_end: Tensor
    start_slope: Tensor
    end_slope: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log_end - log_start, shape (chains, rows); -inf where the end has no density."""
        return (self.log_end - self.log_start).nan_to_num(-math.inf, math.inf, -math.inf)

    def log_density(self, beta: Tensor) -> Tensor:
        """(1 - beta) log_start + beta log_end, shape (chains, rows).

        Arguments:
            beta: The inverse temperature, over 0, shape ().
        """
        return torch.where(beta < 1, (1 - beta) * self.log_start, 0.0) + beta * self.log_end

    def slope(self, beta: Tensor) -> Tensor:
        """The gradient of `log_density`, 0 where it is not finite, shape (chains, rows, D).

        Arguments:
            beta: The inverse temperature, shape ().
        """
        slope = torch.lerp(self.start_slope, self.end_slope, beta.to(self.end_slope))
        return slope.nan_to_num(0.0, 0.0, 0.0)


class Chains:
    r"""Moves chains on the path from a start to the posterior of each row, by HMC.

    .. math:: \log p_\beta(u) = (1 - \beta) \log p_0(u) + \beta \log p(x, u)

    All chains of all rows move together, so that a step of a trajectory is one evaluation of the
    program and one gradient. Nothing waits for the device.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), arXiv 1206.1901.

    Arguments:
        space: The unconstrained space of the program.
        from_prior: Whether the start is the prior; otherwise it is the normal distribution of the
            scales.
        calls: The approximate number of evaluations to come.
    """

    def __init__(self, space: Space, *, from_prior: bool, calls: int) -> None:
        self.space, self.from_prior = space, from_prior
        self.drawing = Drawing(space.program, self._evaluated, calls, 0)

    def _evaluated(self, x: Any, count: int) -> dict[str, Tensor]:
        scales = Scales(x["loc"], x["factor"])
        with torch.enable_grad():
            points = x["points"].detach().requires_grad_()
            found = self.space(x["row"], scales.u(points))
            log_start, log_end = found.log_prior, found.log_joint
            if not self.from_prior:
                size = points.shape[-1]
                volume = scales.factor.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
                squares = points.double().square().sum(-1)
                log_start = -0.5 * (squares + size * math.log(2 * math.pi)) - volume
            slopes = [
                torch.autograd.grad(log_density.sum(), points, retain_graph=True)[0]
                for log_density in (log_start, log_end)
            ]
        return {
            "log_start": log_start.detach(),
            "log_end": log_end.detach(),
            "start_slope": slopes[0],
            "end_slope": slopes[1],
        }

    def at(self, row: Row, scales: Scales, points: Tensor) -> State:
        """Evaluates the program at points of the chains.

        Arguments:
            row: The rows.
            scales: Their coordinates.
            points: The points, shape (chains, rows, D).
        """
        inputs: Any = {
            "row": row,
            "points": points.contiguous(),
            "loc": scales.loc,
            "factor": scales.factor,
        }
        return State(points, **self.drawing(inputs, len(points)))

    def moved(
        self, row: Row, scales: Scales, state: State, beta: Tensor, step: Tensor, num_steps: int
    ) -> tuple[State, Tensor]:
        """Moves each chain by one trajectory, which is accepted or refused.

        Arguments:
            row: The rows.
            scales: Their coordinates.
            state: The points of the chains.
            beta: The inverse temperature, shape ().
            step: The step size of each row, shape (rows,).
            num_steps: The number of steps of the trajectory.

        Returns:
            The new state, and the probability of each acceptance, shape (chains, rows).
        """
        shape = state.points.shape
        momentum = torch.randn_like(state.points)
        uniform = torch.rand((2, *shape[:2]), dtype=torch.float64, device=momentum.device)
        jitter = 1 + JITTER * (2 * uniform[0] - 1)
        steps = (step * jitter).to(momentum)[..., None]
        moved, slope = state, state.slope(beta)
        force = momentum + 0.5 * steps * slope
        for i in range(num_steps):
            moved = self.at(row, scales, moved.points + steps * force)
            share = 0.5 if i == num_steps - 1 else 1.0
            force = force + share * steps * moved.slope(beta)
        kinetic = 0.5 * (momentum.double().square() - force.double().square()).sum(-1)
        ratio = moved.log_density(beta) - state.log_density(beta) + kinetic
        chance = ratio.nan_to_num(-math.inf, math.inf, -math.inf).exp().clamp_max(1.0)
        is_accepted = uniform[1] < chance
        fields = {
            name: torch.where(is_accepted[..., None] if new.ndim == 3 else is_accepted, new, old)
            for (name, new), old in zip(vars(moved).items(), vars(state).values(), strict=True)
        }
        return State(**fields), chance


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws from the posterior of each row, by HMC.

    Arguments:
        u: The draws, shape (chains, draws, rows, D).
        acceptance_rate: The mean probability of acceptance of each row, shape (rows,).
        step_size: The step size of each row, in standard deviations, shape (rows,).
        num_steps: The number of steps of a trajectory of each row, shape (rows,).
    """

    u: Tensor
    acceptance_rate: np.ndarray
    step_size: np.ndarray
    num_steps: np.ndarray


def space_of(program: nn.Module, rows: Rows) -> tuple[Space, Structure]:
    """Returns the unconstrained space of a program whose latents all have a gradient.

    Arguments:
        program: The program, in evaluation mode.
        rows: Its data, of which two rows are read.

    Raises:
        ValueError: If it has latents that all rows share or that are not continuous, or no latents
            at all, or if there are no gradients.
    """
    few = rows.head(2, program)
    with torch.enable_grad():
        check_gradients(program.parameters())
    known = structure(program, few)
    space = Space.of(program, known, few)
    outside = known.global_latents + space.left
    if outside or not space.shapes:
        raise ValueError(
            "Hamiltonian Monte Carlo moves continuous latents of each row; the program has "
            f"{', '.join(outside) or 'no latents'} of another kind: use method='guide'."
        )
    return space, known


def hmc(
    program: nn.Module,
    rows: Rows,
    num_samples: int,
    num_chains: int,
    *,
    num_warmup: int = 500,
    progress: bool = False,
) -> Draws:
    """Draws from the posterior of each row by several chains of Hamiltonian Monte Carlo.

    Half of the chains start at draws of the guide, the others at draws of the prior, so that a
    second mode, which the guide lacks, can be seen. The warm-up adapts, for each row, a step size
    and a full mass matrix; they are then fixed. The length of the trajectories is about a quarter
    of a period of a normal distribution, at random.

    Arguments:
        program: The program, in evaluation mode.
        rows: Its data.
        num_samples: The number of draws of each chain.
        num_chains: The number of chains of each row.
        num_warmup: The number of trajectories of the warm-up.
        progress: Whether to show a progress bar.
    """
    space, _ = space_of(program, rows)
    plan = Plan.of(program, rows, num_chains, MAX_ELEMENTS)
    total = num_warmup + num_samples
    calls = len(plan.pieces()) * total * FIRST_STEPS
    chains = Chains(space, from_prior=False, calls=calls)
    found = []
    with progress_bar(len(rows) * total, "HMC", " draws", progress=progress) as bar:
        for piece in plan.pieces():
            row = rows.select(piece, program)
            done = functools.partial(bar.update, piece.stop - piece.start)
            u = space.from_guide(row, (num_chains + 1) // 2)
            if num_chains > 1:
                u = torch.cat([u, space.from_prior(row, num_chains // 2)])
            warm = warmed_up(chains, row, u, num_warmup, done)
            found.append(_drawn(chains, row, warm, num_samples, done))
    return Draws(
        torch.cat([part.u for part in found], dim=2),
        np.concatenate([part.acceptance_rate for part in found]),
        np.concatenate([part.step_size for part in found]),
        np.concatenate([part.num_steps for part in found]),
    )


@dataclass(frozen=True, eq=False)
class Warm:
    """Chains after their warm-up.

    Arguments:
        state: The points of the chains.
        scales: The coordinates in which they moved at last.
        step: The step size of each row, in standard deviations, shape (rows,).
        moments: The moments of the draws of the last phase.
    """

    state: State
    scales: Scales
    step: Tensor
    moments: Scales


def warmed_up(
    chains: Chains,
    row: Row,
    u: Tensor,
    num_warmup: int,
    done: Callable[[], Any],
    ends: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0),
) -> Warm:
    """Moves chains towards the posterior, with other scales from the draws of each phase.

    Arguments:
        chains: What moves them.
        row: The rows.
        u: Where the chains start, shape (chains, rows, D).
        num_warmup: The number of trajectories.
        done: What is called after each trajectory.
        ends: Where the phases end, as shares of the trajectories.
    """
    parts = [chains.space.from_guide(row, len(u)) for _ in range(-(-MOMENT_DRAWS // len(u)))]
    moments = Scales.of(torch.cat(parts))  # in parts, which fit into memory as the chains do
    one = torch.ones((), dtype=torch.float64, device=u.device)
    step = torch.full((u.shape[1],), 0.5, dtype=torch.float64, device=u.device).log()
    starts = [0, *(int(num_warmup * share) for share in ends)]
    for start, end in zip(starts, starts[1:], strict=False):
        scales, kept, steps = moments, [], []
        state = chains.at(row, scales, scales.points(u))
        for i in range(end - start):
            state, chance = chains.moved(row, scales, state, one, step.exp(), FIRST_STEPS)
            step = step + (chance.mean(0) - TARGET) / math.sqrt(i + 4)
            if i >= (end - start) // 2:
                kept.append(scales.u(state.points))
                steps.append(step)
            done()
        u, step, draws = kept[-1], torch.stack(steps).mean(0), torch.stack(kept)
        moments = Scales.of(draws.flatten(0, 1), (draws - draws.mean(0)).flatten(0, 1))
    return Warm(state, scales, step.exp(), moments)


def _drawn(
    chains: Chains, row: Row, warm: Warm, num_samples: int, done: Callable[[], Any]
) -> Draws:
    """Draws with fixed step sizes, in trajectories of one number of steps for all rows."""
    small = torch.quantile(warm.step, HARD_TO_REACH)
    num_steps = min(MOST_STEPS, max(1, math.ceil(PATH / float(small))))
    step = warm.step.clamp_max(PATH / num_steps)
    state, drawn = warm.state, []
    rate = torch.zeros_like(step)
    one = torch.ones_like(small)
    for _ in range(num_samples):
        state, chance = chains.moved(row, warm.scales, state, one, step, num_steps)
        drawn.append(warm.scales.u(state.points))
        rate = rate + chance.mean(0) / num_samples
        done()
    steps = np.full(len(step), num_steps)
    return Draws(torch.stack(drawn, dim=1).cpu(), rate.cpu().numpy(), step.cpu().numpy(), steps)
