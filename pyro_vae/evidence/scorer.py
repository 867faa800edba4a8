"""Rows scored by the guide, and by proposals of their own where the guide does not do."""

import time

import numpy as np
import torch
from torch import nn

from ..data.rows import Rows
from ..elbos.chunks import Plan, point_masses
from ..engine.progress import progress_bar
from ..engine.row_noise import ReadFields, row_keys
from ..engine.running import check_gradients
from .evidence import ATTRIBUTES
from .pareto_k import good_k, pareto_k
from .proposal import Proposal
from .refined import PerRow, Refined, Stage, matched, refined, replaced, rows_of, weighted_draws
from .scoring import Drawable, elements_at_once, scores
from .unconstrained import Space

__all__ = ["STAGES", "Scorer", "later"]

LEAST_PILOT, MOST_PILOT = 100, 1000
CERTAIN_K = 0.0  # an estimate of k from few draws has an error of 0.2
OF_OWN = [name for name in ATTRIBUTES if name not in ("elbo", "elbo_mcse", "pareto_k_guide")]
STAGES = Stage(250, 16, 0.05), Stage(300, 32, 0.05), Stage(600, 32, 0.03)
ATTEMPTS = None, None, STAGES[1], None, STAGES[2], None  # None: the moments of weighted draws
BLOCK = 2**24  # numbers in the covariances of the rows that are refined together


class Scorer:
    """Scores rows by the guide, and by proposals of their own where the guide does not do."""

    def __init__(
        self,
        program: nn.Module,
        rows: Rows,
        num_samples: int,
        max_elements: int,
        seed: int | None,
        *,
        progress: bool,
    ) -> None:
        if points := point_masses(program, rows):
            raise ValueError(
                "A guide of point masses (Delta) has no importance weights, so log p(x) cannot be "
                f"estimated; the guide has them at {', '.join(points)}."
            )
        self.program, self.rows, self.num_samples = program, rows, num_samples
        self.max_elements = elements_at_once(program, max_elements)
        self.known = Plan.of(program, rows, num_samples, self.max_elements).structure
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        few = rows.head(2, program)
        read_fields = ReadFields(few) if isinstance(few, dict) else None
        asked = few if read_fields is None else read_fields
        Proposal(program, self.known, 4).strata(asked, 0)  # records the fields that are read
        self.keys = row_keys(rows, () if read_fields is None else read_fields.names)
        self.space = Space.of(program, self.known, few)
        self.is_refined, self.seconds = np.zeros(len(rows), dtype=bool), 0.0
        self.bar = progress_bar(len(rows) * num_samples, "evidence", " draws", progress=progress)

    @property
    def pilot(self) -> int:
        """The number of draws that decide which rows are refined, and are then thrown away."""
        return min(max(LEAST_PILOT, self.num_samples // 4), MOST_PILOT)

    @property
    def block(self) -> int:
        """How many rows are refined together, so that their covariances fit into memory."""
        return max(1, BLOCK // self.space.size**2)

    def run(self, *, refine: bool | str) -> dict[str, np.ndarray]:
        """Returns the evidence and its diagnostics by name, each of shape (rows,)."""
        every = np.arange(len(self.rows))
        if refine is False or not self.space.shapes:
            return self.by_guide(every, self.num_samples, self.seed)
        with torch.enable_grad():
            check_gradients(self.program.parameters())
        self.bar.total += len(every) * self.pilot
        found = self.by_guide(every, self.pilot, later(self.seed, 1))
        is_over = ~(found["pareto_k"] <= CERTAIN_K) | (refine is True)
        if not is_over.all():
            good = every[~is_over]
            for name, values in self.by_guide(good, self.num_samples, self.seed).items():
                found[name][good] = values
        start = time.perf_counter()
        over = every[is_over]
        for first in range(0, len(over), self.block):
            self.by_own(over[first : first + self.block], found)
        self.is_refined, self.seconds = is_over, time.perf_counter() - start
        return found

    def by_guide(self, index: np.ndarray, size: int, seed: int) -> dict[str, np.ndarray]:
        """Scores some rows by draws from the guide."""
        proposal = Proposal(self.program, self.known, size)
        return self.scores(self.part(index), index, proposal, size, seed)

    def proposals(self, index: np.ndarray) -> PerRow:
        """Returns the normal distributions of some rows, improved until their k is small.

        Which rows are improved for longer is decided by draws that are then thrown away: rows
        kept for the small weights that they happened to draw would be too low.
        """
        keys, rows = self.keys[index], self.part(index)
        self.bar.set_description(f"evidence, refining {len(index)} rows")
        seed = later(self.seed, 2)
        normal = refined(self.space, rows, keys, STAGES[0], seed, self.max_elements)
        waiting, better = np.arange(len(index)), normal
        for number, stage in enumerate(ATTEMPTS, start=1):
            trial = Refined(self.space, better, self.pilot)
            plan = Plan.of(self.program, rows, self.pilot, self.max_elements)
            seed = later(self.seed, 2 * number + 1)
            u, log_weights = weighted_draws(trial, rows, keys, plan, seed)
            is_over = ~(pareto_k(log_weights.cpu().numpy()) <= good_k(self.pilot))
            if not is_over.any():
                break
            chosen = torch.from_numpy(is_over)
            waiting, better = waiting[is_over], rows_of(better, chosen)
            self.bar.set_description(f"evidence, refining {len(waiting)} rows")
            keys, rows = self.keys[index[waiting]], self.part(index[waiting])
            if stage is None:
                better = matched(better, u[:, chosen], log_weights[:, chosen])
            else:
                more = later(self.seed, 2 * number + 2), self.max_elements
                better = refined(self.space, rows, keys, stage, *more, better)
            normal = replaced(normal, torch.from_numpy(waiting), better)
        self.bar.set_description("evidence")
        return normal

    def by_own(self, index: np.ndarray, found: dict[str, np.ndarray]) -> None:
        """Replaces the scores of some rows by those of proposals of their own."""
        proposal = Refined(self.space, self.proposals(index), self.num_samples)
        seed = later(self.seed, 1000)
        scores = self.scores(self.part(index), index, proposal, self.num_samples, seed)
        for name in OF_OWN:
            found[name][index] = scores[name]

    def scores(
        self, rows: Rows, index: np.ndarray, proposal: Drawable, size: int, seed: int
    ) -> dict[str, np.ndarray]:
        """Scores some rows by draws from a proposal."""
        plan = Plan.of(self.program, rows, size, self.max_elements)
        keys = self.keys[index]
        return scores(self.program, rows, proposal, plan, keys, seed, self.bar.update)

    def part(self, index: np.ndarray) -> Rows:
        """Returns some rows."""
        if len(index) == len(self.rows):
            return self.rows
        return self.rows[torch.from_numpy(index).to(self.rows.device)]


def later(seed: int, number: int) -> int:
    """Returns another seed for a later part of the draws."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63
