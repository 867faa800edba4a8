"""log p(x) in closed form, for programs whose latents are normal given the data."""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from ..data.rows import Rows
from ..elbos.chunks import Plan
from ..engine.running import evaluating
from .hmc import MAX_ELEMENTS, Chains, Scales, space_of

__all__ = ["exact"]

TOLERANCE = 1e-8
DISTANCES = (0.1, 1.0, 10.0, 100.0)
DIRECTIONS = 8  # at each distance


def exact(program: nn.Module, rows: Rows) -> np.ndarray:
    r"""Returns log p(x) of each row if log p(x, u) is quadratic in the latents u.

    .. math::
        \log p(x) = \log p(x, \hat u) + \tfrac{D}{2} \log 2 \pi - \tfrac12 \log \det H, \qquad
        H = -\partial^2 \log p(x, u) / \partial u^2

    This is so in linear Gaussian programs, with missing cells or not. Whether it is quadratic is
    found by evaluating it at random points, near and far. The computation is in float64.

    Arguments:
        program: The program.
        rows: Its data.

    Returns:
        log p(x), shape (rows,), in nats.

    Raises:
        ValueError: If log p(x, u) is not quadratic in the latents of a row, or the program has
            latents that are not continuous or that rows share.
    """
    double = copy.deepcopy(program).double()
    found = []
    with evaluating(double):
        space, _ = space_of(double, rows)
        size = space.size
        probes = _probes(size)
        plan = Plan.of(double, rows, size + 1 + len(probes), MAX_ELEMENTS)
        chains = Chains(space, from_prior=True, calls=0)
        for piece in plan.pieces():
            row = rows.select(piece, double)
            count = piece.stop - piece.start
            unit = torch.eye(size, dtype=torch.float64)
            at = torch.cat([torch.zeros_like(unit[:1]), unit, probes])
            at = at[:, None].expand(-1, count, -1).to(space.from_prior(row, 1).device)
            scales = Scales(torch.zeros_like(at[0]), unit.to(at).expand(count, -1, -1))
            state = chains.at(row, scales, at)
            value, slope = state.log_end[0], state.end_slope[0].double()
            hessian = (slope - state.end_slope[1 : size + 1]).transpose(0, 1).double()
            bend = torch.einsum("srd,rde,sre->sr", at, hessian, at)
            expected = value + (at * slope).sum(-1) - 0.5 * bend
            far = (state.log_end - expected).abs().amax(0) / bend.abs().amax(0)
            factor, failed = torch.linalg.cholesky_ex((hessian + hessian.mT) / 2)
            is_wrong = ~(far <= TOLERANCE) | (failed > 0)
            if is_wrong.any():
                label = rows.labels[piece][int(is_wrong.cpu().nonzero()[0, 0])]
                raise ValueError(
                    "log p(x) has no closed form here, because log p(x, z) is not quadratic in z "
                    f"(row {label}), as it is if the prior is normal and the likelihood is normal "
                    "with a mean linear in z and a fixed scale: use method='ais'."
                )
            solved = torch.cholesky_solve(slope[..., None], factor)[..., 0]
            volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            mass = 0.5 * (size * math.log(2 * math.pi) + (slope * solved).sum(-1)) - volume
            found.append((value + mass).cpu().numpy())
    return np.concatenate(found)


def _probes(size: int) -> Tensor:
    """Points in random directions, shape (points, D)."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(DISTANCES), DIRECTIONS, size)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (directions * torch.tensor(DISTANCES)[:, None, None]).flatten(0, 1)
