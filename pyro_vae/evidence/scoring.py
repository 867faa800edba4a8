"""Draws from a proposal, row by row, and the evidence that follows from their weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from ..data.rows import Rows, floating_like
from ..data.source import Row
from ..elbos.chunks import MAX_ELEMENTS, Plan, give_memory_back
from ..engine.row_noise import Noise
from .evidence import estimates

__all__ = ["Drawable", "Stratum", "elements_at_once", "scores"]

IN_CACHE = 2**20  # larger blocks are returned to the system, and zeroed again at each call
PIECES_AT_ONCE = 32


class Stratum(NamedTuple):
    """A part of a proposal: a function of rows and a number of draws, and its random numbers."""

    function: Callable[[Any, int], dict[str, Tensor]]
    noise: Noise


class Drawable(Protocol):
    """A proposal of importance sampling, in strata of its draws."""

    @property
    def is_prior(self) -> np.ndarray:
        """Whether each draw is from the prior, the second stratum, shape (num_samples,)."""

    def strata(self, few: Row, seed: int) -> list[Stratum]:
        """Returns the strata: of the proposal, and of the prior.

        Arguments:
            few: A few rows, with which the operations that need random numbers are recorded.
            seed: The seed.
        """

    def of_rows(self, piece: slice) -> Mapping[str, Tensor]:
        """Returns what the functions need of some rows, beside their data.

        Arguments:
            piece: The rows.
        """


def elements_at_once(program: nn.Module, max_elements: int = MAX_ELEMENTS) -> int:
    """Returns how many elements a tensor may have: on a CPU so many that it fits into the caches.

    Arguments:
        program: The program.
        max_elements: What the user allows.
    """
    is_cpu = floating_like(program).device.type == "cpu"
    return min(max_elements, IN_CACHE) if is_cpu else max_elements


def scores(
    program: nn.Module,
    rows: Rows,
    proposal: Drawable,
    plan: Plan,
    keys: np.ndarray,
    seed: int,
    advance: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """Returns the evidence and its diagnostics by name, each of shape (rows,).

    Arguments:
        program: The program, in evaluation mode.
        rows: The rows.
        proposal: The proposal.
        plan: How rows and draws are divided.
        keys: The keys of the rows, of `row_keys`.
        seed: The seed of the draws.
        advance: Called with the number of draws that were made.
    """
    strata = [_Draws(plan, program, s) for s in proposal.strata(rows.head(2, program), seed)]
    is_prior = proposal.is_prior
    order = np.argsort(np.argsort(is_prior, kind="stable"))
    waiting: list[dict[str, np.ndarray]] = []
    found: list[dict[str, np.ndarray]] = []
    for piece in plan.pieces():
        inputs = {"row": rows.select(piece, program), **proposal.of_rows(piece)}
        parts = [part for stratum in strata for part in stratum.parts(inputs, keys[piece])]
        terms = [part["elbo_terms"] for part in parts if "elbo_terms" in part]
        both = {"log_weights": np.concatenate([p["log_weights"] for p in parts])[order]}
        waiting.append(both | ({"elbo_terms": np.concatenate(terms)} if terms else {}))
        if len(waiting) == PIECES_AT_ONCE or piece.stop == len(rows):
            joined = {k: np.concatenate([w[k] for w in waiting], axis=1) for k in waiting[0]}
            found.append(estimates(**joined, is_prior=is_prior))
            waiting.clear()
            give_memory_back()
        advance(len(is_prior) * (piece.stop - piece.start))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


class _Draws:
    """The draws of one stratum, in parts that fit into memory."""

    def __init__(self, plan: Plan, program: nn.Module, stratum: Stratum) -> None:
        self.plan, self.noise = plan, stratum.noise
        self.num_draws = len(self.noise.table)
        self.table = self.noise.table.to(floating_like(program).device)
        self.drawing = plan.drawing(program, stratum.function, self.num_draws)

    def parts(self, inputs: dict[str, Any], keys: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yields the log-weights of some rows, part by part."""
        shifts = self.noise.shifts(keys).to(self.table.device)
        start = 0
        for count in self.plan.parts(self.num_draws):
            table = self.table[start : start + count]
            found = self.drawing({**inputs, "table": table, "shifts": shifts}, count)
            yield {name: tensor.cpu().numpy() for name, tensor in found.items() if name != "u"}
            start += count
