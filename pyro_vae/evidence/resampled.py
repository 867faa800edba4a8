"""Draws from the posterior of each row, by resampling draws of refined proposals."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..data.rows import Rows
from ..elbos.chunks import MAX_ELEMENTS, Plan
from ..engine.running import check_gradients
from .evidence import estimates
from .refined import Refined, weighted_draws
from .scorer import Scorer, later

__all__ = ["Resampled", "resampled"]

PER_DRAW = 4  # weighted draws for each draw that is kept


@dataclass(frozen=True, eq=False)
class Resampled:
    """Draws from the posterior of each row.

    Arguments:
        u: The draws in unconstrained space, shape (1, draws, rows, D).
        scores: The evidence and its diagnostics by name, from the weights, each of shape (rows,).
        num_weighted: The number of weighted draws that these were chosen from.
    """

    u: Tensor
    scores: dict[str, np.ndarray]
    num_weighted: int


def resampled(
    program: nn.Module, rows: Rows, num_samples: int, seed: int | None, *, progress: bool
) -> Resampled:
    r"""Draws from the posterior of each row by sampling importance resampling.

    Each row gets a proposal of its own, of which four times as many weighted draws are made as are
    kept. They are chosen in proportion to their weights, at even distances (systematic
    resampling), so that a draw can come several times.

    References:
        Using the SIR algorithm to simulate posterior distributions (Rubin, 1988).

    Arguments:
        program: The program, in evaluation mode.
        rows: The rows.
        num_samples: The number of draws that are kept.
        seed: The seed.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If some latents are not continuous, or there are no gradients.
    """
    with torch.enable_grad():
        check_gradients(program.parameters())
    count = PER_DRAW * num_samples
    scorer = Scorer(program, rows, count, MAX_ELEMENTS, seed, progress=progress)
    if scorer.space.left or not scorer.space.shapes:
        raise ValueError(
            "Expected latents that are all continuous, for proposals of each row; got "
            f"{', '.join(scorer.known.latents)}: use method='guide'."
        )
    at_once = max(1, min(scorer.block, MAX_ELEMENTS // (count * scorer.space.size)))
    kept, scores = [], []
    with scorer.bar:
        for first in range(0, len(rows), at_once):
            index = np.arange(first, min(first + at_once, len(rows)))
            part, keys = scorer.part(index), scorer.keys[index]
            proposal = Refined(scorer.space, scorer.proposals(index), count)
            plan = Plan.of(program, part, count, scorer.max_elements)
            u, log_weights = weighted_draws(proposal, part, keys, plan, later(scorer.seed, 1000))
            weights = log_weights.softmax(0).cumsum(0)
            order = torch.rand(num_samples, generator=torch.Generator().manual_seed(scorer.seed))
            places = (torch.arange(num_samples) + 0.5) / num_samples
            marks = (places.to(weights)[:, None] * weights[-1]).T.contiguous()
            chosen = torch.searchsorted(weights.T.contiguous(), marks).T[order.argsort()]
            kept.append(
                u.gather(0, chosen.clamp_max(count - 1)[..., None].expand_as(u[:num_samples]))
            )
            found = log_weights.cpu().numpy()[
                np.argsort(np.argsort(proposal.is_prior, kind="stable"))
            ]
            scores.append(estimates(found, is_prior=proposal.is_prior))
            scorer.bar.update(count * len(index))
    joined = {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}
    return Resampled(torch.cat(kept, dim=1)[None], joined, count)
