"""log p(x) by annealed importance sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.rows import Rows
from ..data.source import Row
from ..elbos.chunks import Plan
from ..engine.progress import progress_bar
from .hmc import MAX_ELEMENTS, MOMENT_DRAWS, TARGET, Chains, Scales, State, space_of, warmed_up

__all__ = ["STARTS", "Annealed", "annealed"]

STARTS = ("pilot", "guide", "prior")

PILOT_CHAINS = 8
PILOT_MOVES = 2  # at each temperature
FIRST_MOVES = 20  # at the first temperature, from a step size that nothing is known of
GAIN = 0.4  # of the logarithm of a step size, per unit of the rate of acceptance
STEEPNESS = 4.0
WARM_CHAINS = 32
WARM_MOVES = 60
WARM_ENDS = (0.25, 0.6, 1.0)


@dataclass(frozen=True, eq=False)
class Annealed:
    """The weights of annealed importance sampling.

    Arguments:
        log_weights: The logarithms of the weights, whose mean is p(x) in expectation, shape
            (chains, rows).
        log_reverse: For rows simulated from the model, the logarithms of the weights of the
            reverse chains: the mean of exp(-log_reverse) is 1 / p(x) in expectation, shape
            (chains, rows). `None` for other rows.
        acceptance_rate: The mean probability of acceptance of each row, shape (rows,).
    """

    log_weights: np.ndarray
    log_reverse: np.ndarray | None
    acceptance_rate: np.ndarray


def annealed(
    program: nn.Module,
    rows: Rows,
    num_chains: int = 64,
    *,
    num_temperatures: int = 100,
    num_steps: int = 4,
    start: str = "pilot",
    simulated: Tensor | None = None,
    progress: bool = False,
) -> Annealed:
    r"""Estimates log p(x) of each row by annealed importance sampling.

    .. math::
        \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1})\,
        \bigl(\log p(x, u_{t-1}) - \log p_0(u_{t-1})\bigr), \qquad
        \log \hat p(x) = \log \frac{1}{C} \sum_{c=1}^C w_c

    Each chain starts at a draw from p_0, and moves by one trajectory of Hamiltonian Monte Carlo at
    each temperature, towards the posterior. In expectation the estimate is a lower bound of
    log p(x), whatever the chains do. Step sizes, one of each row and temperature, are adapted in a
    pilot run, whose chains are not used for the value, and are then fixed. The inverse
    temperatures are those of a sigmoid at even distances. Random numbers come from torch's
    generator.

    A row that was simulated from the model has a draw from its posterior: the latents that it was
    simulated with. Chains that start there and move backwards give an upper bound of log p(x) in
    expectation (bidirectional Monte Carlo). A real row has the lower bound alone.

    References:
        Annealed importance sampling (Neal, 2001), doi 10.1023/A:1008923215028.
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse et al., 2015),
        arXiv 1511.02543.

    Arguments:
        program: The program, in evaluation mode.
        rows: Its data.
        num_chains: The number of chains C of each row, 4 or more.
        num_temperatures: The number of temperatures T, 2 or more.
        num_steps: The number of steps of a trajectory.
        start: The distribution p_0: `"guide"`, the normal distribution that has the moments of the
            guide's draws; `"pilot"`, that of the draws of a short run of HMC from there; or
            `"prior"`.
        simulated: The latents u of simulated rows, shape (rows, D).
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the program has latents that Hamiltonian Monte Carlo cannot move.
    """
    space, _ = space_of(program, rows)
    plan = Plan.of(program, rows, num_chains, MAX_ELEMENTS)
    moves = PILOT_MOVES + (1 if simulated is None else 2)
    calls = len(plan.pieces()) * num_temperatures * moves * num_steps
    chains = Chains(space, from_prior=start == "prior", calls=calls)
    path = _Path(chains, num_temperatures, num_steps, num_chains, start)
    found = []
    total = len(rows) * (num_temperatures - 1) * moves
    with progress_bar(total, "annealing", " moves", progress=progress) as bar:
        for piece in plan.pieces():
            done = functools.partial(bar.update, piece.stop - piece.start)
            ends = None if simulated is None else simulated[piece]
            row = rows.select(piece, program)
            found.append(path.run(row, ends, done))
    reverse = [part.log_reverse for part in found if part.log_reverse is not None]
    return Annealed(
        np.concatenate([part.log_weights for part in found], axis=1),
        np.concatenate(reverse, axis=1) if reverse else None,
        np.concatenate([part.acceptance_rate for part in found]),
    )


@dataclass(frozen=True)
class _Path:
    """The way from the start to the posterior, and how the chains walk it."""

    chains: Chains
    num_temperatures: int
    num_steps: int
    num_chains: int
    start: str

    def run(self, row: Row, ends: Tensor | None, done: Callable[[], Any]) -> Annealed:
        """Anneals some rows, after a pilot run that finds their step sizes."""
        space = self.chains.space
        if self.start == "pilot":
            u = space.from_guide(row, WARM_CHAINS)
            scales = warmed_up(self.chains, row, u, WARM_MOVES, int, WARM_ENDS).moments
        else:
            draw = space.from_prior if self.start == "prior" else space.from_guide
            scales = Scales.of(draw(row, MOMENT_DRAWS))
        places = torch.linspace(
            -STEEPNESS,
            STEEPNESS,
            self.num_temperatures + 1,
            dtype=torch.float64,
            device=scales.loc.device,
        ).sigmoid()
        betas = (places - places[0]) / (places[-1] - places[0])

        def first(count: int) -> State:
            if self.start == "prior":
                points = scales.points(space.from_prior(row, count))
            else:
                points = torch.randn_like(scales.loc.expand(count, -1, -1))
            return self.chains.at(row, scales, points)

        steps = self._pilot(row, scales, first(PILOT_CHAINS), betas, done)
        state = first(self.num_chains)
        log_weights, rate = self._walk(row, scales, state, betas, steps, done)
        reverse = None
        if ends is not None:
            points = scales.points(ends.to(scales.loc)[None]).expand_as(state.points)
            state = self.chains.at(row, scales, points)
            downwards, _ = self._walk(row, scales, state, betas.flip(0), steps.flip(0), done)
            reverse = -downwards.cpu().numpy()
        return Annealed(log_weights.cpu().numpy(), reverse, rate.cpu().numpy())

    def _pilot(
        self, row: Row, scales: Scales, state: State, betas: Tensor, done: Callable[[], Any]
    ) -> Tensor:
        """Returns the step sizes, shape (temperatures - 1, rows), in standard deviations."""
        step = torch.full_like(state.log_end[0], 0.5).log()
        found = []
        for t, beta in enumerate(betas[1:-1]):
            for _ in range(PILOT_MOVES if t else FIRST_MOVES):
                options = beta, step.exp(), self.num_steps
                state, chance = self.chains.moved(row, scales, state, *options)
                step = step + GAIN * (chance.mean(0) - TARGET)
            found.append(step)
            for _ in range(PILOT_MOVES):
                done()
        return torch.stack(found).exp()

    def _walk(
        self,
        row: Row,
        scales: Scales,
        state: State,
        betas: Tensor,
        steps: Tensor,
        done: Callable[[], Any],
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-weights, shape (chains, rows), and the rates of acceptance, (rows,)."""
        log_weights = (betas[1] - betas[0]) * state.log_ratio
        rate = torch.zeros_like(steps[0])
        for t, step in enumerate(steps, 1):
            state, chance = self.chains.moved(row, scales, state, betas[t], step, self.num_steps)
            log_weights = log_weights + (betas[t + 1] - betas[t]) * state.log_ratio
            rate = rate + chance.mean(0) / len(steps)
            done()
        return log_weights, rate
