"""Proposals of their own for rows whose guide is far from the posterior."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._pytree import tree_leaves

from ..data.rows import Rows
from ..data.source import Row
from ..elbos.chunks import Plan
from ..engine.row_noise import Noise, RowNoise, standard_normal
from .hmc import Scales
from .proposal import PRIOR_SHARE, spread_out
from .scoring import Stratum
from .unconstrained import Space

__all__ = [
    "FullNormal",
    "LowRankNormal",
    "PerRow",
    "Refined",
    "Stage",
    "log_density",
    "matched",
    "refined",
    "replaced",
    "rows_of",
    "start",
    "weighted_draws",
]

DEGREES = 5  # of freedom of the tail of the draws
WIDE, WIDE_SHARE = 3.0, 0.15  # a part of the draws from a wider t, for skewed posteriors
MOST_FULL = 100  # latents; beyond, a covariance of low rank plus a diagonal
RANK = 10
FIRST_DRAWS = 256, 16  # of the guide: at least, and for each latent
DECAYS = 0.9, 0.95  # of the two averages of Adam


@dataclass(frozen=True)
class Stage:
    """How long a proposal is improved: steps of Adam, draws of a step, learning rate.

    The rate falls to 0 by a half cosine, and is in units of the proposal's standard deviations.
    """

    steps: int
    draws: int
    lr: float


@dataclass(frozen=True, eq=False)
class FullNormal:
    """A normal distribution of each row, with any covariance.

    Arguments:
        loc: The means, shape (rows, D).
        scale_tril: The Cholesky factors, shape (rows, D, D).
    """

    loc: Tensor
    scale_tril: Tensor

    @property
    def noise_size(self) -> int:
        """The number of standard normal numbers of a draw."""
        return self.loc.shape[-1]

    def points(self, noise: Tensor) -> Tensor:
        """Turns standard normal numbers (draws, rows, noise_size) into draws (draws, rows, D)."""
        return self.loc + torch.einsum("rij,srj->sri", self.scale_tril, noise)

    def distribution(self) -> Distribution:
        """Returns the distribution, in float64."""
        tril = self.scale_tril.double()
        return MultivariateNormal(self.loc.double(), scale_tril=tril, validate_args=False)

    def gradients(self, noise: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradient in coordinates where the distribution is standard normal.

        Arguments:
            noise: The noise of some draws, (draws, rows, noise_size).
            slopes: The gradient with respect to these draws, (draws, rows, D).
        """
        local = torch.einsum("rji,srj->sri", self.scale_tril, slopes)
        outer = torch.einsum("sri,srj->rij", local, noise) / len(noise)
        return local.mean(0), outer.tril()

    def moved(self, loc: Tensor, scale: Tensor) -> "FullNormal":
        """Moves the distribution by steps in these coordinates."""
        growth = torch.diag_embed(scale.diagonal(dim1=-2, dim2=-1).exp()) + scale.tril(-1)
        mean = self.loc + torch.einsum("rij,rj->ri", self.scale_tril, loc)
        return FullNormal(mean, self.scale_tril @ growth)


@dataclass(frozen=True, eq=False)
class LowRankNormal:
    """A normal distribution of each row, with covariance diag(scale^2) + factor factor^T.

    Arguments:
        loc: The means, shape (rows, D).
        scale: Standard deviations, shape (rows, D).
        factor: Shape (rows, D, rank); rank 0 makes the latents independent.
    """

    loc: Tensor
    scale: Tensor
    factor: Tensor

    @property
    def noise_size(self) -> int:
        """The number of standard normal numbers of a draw."""
        return sum(self.factor.shape[-2:])

    def points(self, noise: Tensor) -> Tensor:
        """Turns standard normal numbers (draws, rows, noise_size) into draws (draws, rows, D)."""
        own, common = noise.split(self.factor.shape[-2:], dim=-1)
        return self.loc + self.scale * own + torch.einsum("rij,srj->sri", self.factor, common)

    def distribution(self) -> Distribution:
        """Returns the distribution, in float64."""
        loc, scale, factor = (t.double() for t in (self.loc, self.scale, self.factor))
        if not factor.shape[-1]:
            return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
        return LowRankMultivariateNormal(loc, factor, scale.square(), validate_args=False)

    def gradients(self, noise: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradient in coordinates where `scale` is 1.

        Arguments:
            noise: The noise of some draws, (draws, rows, noise_size).
            slopes: The gradient with respect to these draws, (draws, rows, D).
        """
        own, common = noise.split(self.factor.shape[-2:], dim=-1)
        local = self.scale * slopes
        outer = torch.einsum("sri,srj->rij", local, common) / len(noise)
        return local.mean(0), (local * own).mean(0), outer

    def moved(self, loc: Tensor, scale: Tensor, factor: Tensor) -> "LowRankNormal":
        """Moves the distribution by steps in these coordinates."""
        grown = self.factor + self.scale[..., None] * factor
        return LowRankNormal(self.loc + self.scale * loc, self.scale * scale.exp(), grown)


PerRow: TypeAlias = FullNormal | LowRankNormal


def start(points: Tensor, *, is_diagonal: bool = False) -> PerRow:
    """Returns normal distributions with the moments of the guide's draws.

    The correlations are shrunk towards 0, since the draws are few.

    Arguments:
        points: The draws in unconstrained space, shape (draws, rows, D).
        is_diagonal: Whether the latents are to be independent.
    """
    size, scales = points.shape[-1], Scales.of(points)
    if not is_diagonal and size <= MOST_FULL:
        return FullNormal(scales.loc, scales.factor)
    scale = points.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, 0 if is_diagonal else RANK, generator=generator).to(scale)
    return LowRankNormal(scales.loc, scale, 0.1 * scale[..., None] * factor)


def log_density(normal: PerRow, u: Tensor, degrees: int | None, factor: float = 1.0) -> Tensor:
    r"""Returns log q(u), in float64, of the normal distribution or of Student's t.

    .. math:: \log t_\nu(u) = \log N(m) + \tfrac{D}{2} \log \tfrac{2}{\nu f^2}
        + \log \tfrac{\Gamma((\nu + D) / 2)}{\Gamma(\nu / 2)}
        - \tfrac{\nu + D}{2} \log(1 + d^2 / (\nu f^2)), \quad d^2 = 2 (\log N(m) - \log N(u))

    Arguments:
        normal: The normal distributions of the rows.
        u: The points, shape (draws, rows, D).
        degrees: The degrees of freedom of t; `None` for the normal distribution.
        factor: The factor f on the scale of t.
    """
    distribution = normal.distribution()
    found: Tensor = distribution.log_prob(u.double())
    if degrees is None:
        return found
    size, top = u.shape[-1], distribution.log_prob(normal.loc.double())
    constant = math.lgamma((degrees + size) / 2) - math.lgamma(degrees / 2)
    constant += size / 2 * math.log(2 / (degrees * factor**2))
    distance = 2 * (top - found) / (degrees * factor**2)
    return top + constant - (degrees + size) / 2 * torch.log1p(distance)


def rows_of(normal: PerRow, index: Tensor | slice) -> PerRow:
    """Returns the distributions of some rows.

    Arguments:
        normal: The distributions.
        index: Which rows, as an index of tensors.
    """
    return type(normal)(**{name: tensor[index] for name, tensor in vars(normal).items()})


def replaced(normal: PerRow, index: Tensor, others: PerRow) -> PerRow:
    """Returns the distributions with those of some rows replaced.

    Arguments:
        normal: The distributions.
        index: Which rows.
        others: Their new distributions.
    """
    new = vars(others)
    found = {
        name: t.index_copy(0, index.to(t.device), new[name]) for name, t in vars(normal).items()
    }
    return type(normal)(**found)


def matched(normal: PerRow, u: Tensor, log_weights: Tensor) -> PerRow:
    """Returns normal distributions with the moments of weighted draws.

    Unlike the best ELBO, which may leave out a tail, these cover the posterior (a step of
    population Monte Carlo). The fewer the effective draws, the more of the old covariance is kept.

    References:
        Adaptive importance sampling in general mixture classes (Cappé et al., 2008),
        doi 10.1007/s11222-008-9059-x.

    Arguments:
        normal: The distributions that were drawn from.
        u: The draws, shape (draws, rows, D).
        log_weights: Their log-weights, shape (draws, rows).
    """
    weights = log_weights.softmax(0).nan_to_num(1.0 / len(u)).to(u)
    share = 1.0 / weights.square().sum(0)
    share = (share / (share + u.shape[-1] ** 2))[:, None]
    loc = torch.lerp(normal.loc, torch.einsum("sr,sri->ri", weights, u), share)
    centred = u - loc
    match normal:
        case FullNormal():
            old = normal.scale_tril @ normal.scale_tril.mT
            new = torch.einsum("sr,sri,srj->rij", weights, centred, centred)
            tril, failed = torch.linalg.cholesky_ex(torch.lerp(old, new, share[..., None]))
            return FullNormal(
                loc, torch.where((failed == 0)[:, None, None], tril, normal.scale_tril)
            )
        case LowRankNormal():
            new = torch.einsum("sr,sri->ri", weights, centred.square())
            own = (new - normal.factor.square().sum(-1)).clamp_min(0.0)
            return replace(
                normal, loc=loc, scale=torch.lerp(normal.scale.square(), own, share).sqrt()
            )


def refined(
    space: Space,
    rows: Rows,
    keys: np.ndarray,
    stage: Stage,
    seed: int,
    max_elements: int,
    normal: PerRow | None = None,
    *,
    is_diagonal: bool = False,
) -> PerRow:
    """Returns a normal distribution of each row, improved on the row's own ELBO.

    Arguments:
        space: The unconstrained space of the program, in evaluation mode.
        rows: The rows.
        keys: Their keys.
        stage: How long each is improved.
        seed: The seed.
        max_elements: About how many elements one tensor may have.
        normal: Where to start; by default at the moments of the guide.
        is_diagonal: Whether the latents are to be independent.
    """
    plan = Plan.of(space.program, rows, stage.draws, max_elements)
    found = []
    for piece in plan.pieces():
        row, own = rows.select(piece, space.program), keys[piece]
        begin = None if normal is None else rows_of(normal, piece)
        begin = begin or start(_of_guide(space, row, own, plan, seed), is_diagonal=is_diagonal)
        found.append(_improved(space, row, own, begin, stage, seed + 1))
    parts = [vars(part) for part in found]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return type(found[0])(**joined)


def _of_guide(space: Space, row: Row, keys: np.ndarray, plan: Plan, seed: int) -> Tensor:
    """Draws of the guide, (draws, rows, D), in parts that fit into memory."""
    with RowNoise(space.known.rows_dim) as recorded:
        space.from_guide(row, 2)
    count = max(FIRST_DRAWS[0], FIRST_DRAWS[1] * space.size)
    noise, device = Noise(recorded.sizes, count, seed), tree_leaves(row)[0].device
    table, shifts = noise.table.to(device), noise.shifts(keys).to(device)
    found = []
    for part in table.split(plan.draws_at_once):
        with RowNoise(space.known.rows_dim, part, shifts):
            found.append(space.from_guide(row, len(part)))
    return torch.cat(found)


def _improved(
    space: Space, row: Row, keys: np.ndarray, normal: PerRow, stage: Stage, seed: int
) -> PerRow:
    r"""Improves the normal distributions by Adam.

    .. math:: \nabla\, E_q[\log p(x, u) - \log q(u)], \qquad u = m + L \epsilon

    The gradient is that along the path of the draws alone (Roeder et al., 2017), which has no
    noise if q is the posterior. It is taken in coordinates where q is standard normal, so that
    the steps do not depend on the scales of the latents. The weights of the program are fixed.

    References:
        Sticking the landing (Roeder et al., 2017), arXiv 1703.09194.
    """
    size = normal.noise_size
    few = torch.zeros_like(normal.loc)[None]
    with RowNoise(space.known.rows_dim) as left:
        space(row, few)
    noise = Noise([size, *left.sizes], stage.steps * stage.draws, seed)
    table, shifts = noise.table.to(few.device), noise.shifts(keys).to(few.device)
    adam: torch.optim.Adam | None = None
    for step in range(stage.steps):
        part = table[step * stage.draws : (step + 1) * stage.draws]
        numbers = standard_normal(part[:, None, :size] + shifts[:, :size], few.dtype)
        slopes = _slopes(space, row, normal, normal.points(numbers), (part, shifts, size))
        gradients = normal.gradients(numbers, slopes)
        if adam is None:
            moves = [torch.zeros_like(gradient) for gradient in gradients]
            adam = torch.optim.Adam(moves, stage.lr, DECAYS, maximize=True)
            rates = CosineAnnealingLR(adam, stage.steps)
        for move, gradient in zip(moves, gradients, strict=True):
            move.grad = gradient
            move.zero_()  # each step starts where q is standard normal
        adam.step()
        rates.step()
        normal = normal.moved(*moves)
    return normal


def _slopes(
    space: Space, row: Row, normal: PerRow, u: Tensor, left: tuple[Tensor, Tensor, int]
) -> Tensor:
    """The gradient of log p(x, u) - log q(u) with respect to u, 0 if it is not finite."""
    table, shifts, size = left
    with torch.enable_grad(), RowNoise(space.known.rows_dim, table[:, size:], shifts[:, size:]):
        u = u.detach().requires_grad_()
        terms = space(row, u).log_joint - normal.distribution().log_prob(u.double())
        (slopes,) = torch.autograd.grad(terms.sum(), u)
    return slopes.nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Refined:
    r"""The proposal of each row: two Student's t around its own normal, and the prior.

    .. math:: w_s = \frac{p(x, u_s)}{0.95\,(0.85\, t_5(u_s) + 0.15\, t_5^{3}(u_s))
        + 0.05\, p(u_s)}

    The second t is three times as wide, for posteriors that are skewed.

    Sites that are left to the guide are drawn from it given the others, and then there is no part
    of the prior.

    Arguments:
        space: The unconstrained space of the program.
        normal: The normal distribution of each row.
        num_samples: The number of draws of each row.
        degrees: The degrees of freedom of t; `None` for draws of the normal distribution alone,
            whose mean log-weight is the ELBO.
    """

    space: Space
    normal: PerRow
    num_samples: int
    degrees: int | None = DEGREES

    @property
    def num_prior(self) -> int:
        """The number of draws of each row that come from the prior."""
        is_mixed = self.degrees is not None and not self.space.left
        return math.ceil(PRIOR_SHARE * self.num_samples) if is_mixed else 0

    @property
    def is_prior(self) -> np.ndarray:
        """Whether each draw comes from the prior, shape (num_samples,), at even distances."""
        return spread_out(self.num_prior, self.num_samples)

    @property
    def order(self) -> np.ndarray:
        """The place of each draw among those of both strata, one after the other."""
        return np.argsort(np.argsort(self.is_prior, kind="stable"))

    def strata(self, few: Row, seed: int) -> list[Stratum]:
        """Returns the draws from the proposal of a row, and those from the prior.

        Arguments:
            few: A few rows, with which the operations that need random numbers are recorded.
            seed: The seed.
        """
        space = self.space
        points = self.normal.loc.new_zeros(2, len(tree_leaves(few)[0]), space.size)
        with RowNoise(space.known.rows_dim) as left:
            space(few, points)
        columns = [self.normal.noise_size, *self._tail_sizes, *left.sizes]
        own = Noise(columns, self.num_samples - self.num_prior, seed)
        if not self.num_prior:
            return [Stratum(self.own, own)]
        with RowNoise(space.known.rows_dim) as prior:
            space.from_prior(few, 2)
        spread = Noise(prior.sizes, self.num_prior, seed + 1, is_stratified=True)
        return [Stratum(self.own, own), Stratum(self.prior, spread)]

    def of_rows(self, piece: slice) -> Mapping[str, Tensor]:
        """Returns the parameters of the normal distributions of some rows.

        Arguments:
            piece: The rows.
        """
        return vars(rows_of(self.normal, piece))

    def own(self, x: Any, count: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Draws from the proposal of each row.

        Arguments:
            x: A dict of the rows, `"row"`, of their random numbers, `"table"` and `"shifts"`, and
                of the result of :meth:`of_rows`.
            count: The number of draws.

        Returns:
            `log_weights`, shape (count, rows), and the points `u`, shape (count, rows, D).
        """
        normal = self._normal(x)
        sizes = [normal.noise_size, *self._tail_sizes]
        parts = [part.split([*sizes, part.shape[1] - sum(sizes)], 1) for part in _noise(x)]
        numbers = [table[:, None] + shifts for table, shifts in zip(*parts, strict=True)]
        left, left_shifts = parts[0][-1], parts[1][-1]
        dtype = normal.loc.dtype
        noise = standard_normal(numbers[0], dtype)
        if self.degrees is not None:
            tail = standard_normal(numbers[1], dtype).square().mean(-1, keepdim=True).sqrt()
            is_wide = numbers[2] < (2 * WIDE_SHARE - 1) * 2**31  # of integers from -2^31 on
            noise = noise / tail * torch.where(is_wide, WIDE, 1.0).to(dtype)
        with RowNoise(self.space.known.rows_dim, left, left_shifts):
            return self._weighted(x, normal, normal.points(noise))

    def prior(self, x: Any, count: int) -> dict[str, Tensor]:
        """Draws from the prior, with the result of :meth:`own`.

        Arguments:
            x: As for :meth:`own`.
            count: The number of draws.
        """
        with RowNoise(self.space.known.rows_dim, *_noise(x)):
            u = self.space.from_prior(x["row"], count)
        return self._weighted(x, self._normal(x), u)

    @property
    def _tail_sizes(self) -> list[int]:
        """The random numbers of the tail of a draw: of its length, and of whether it is wide."""
        return [] if self.degrees is None else [self.degrees, 1]

    def _normal(self, x: Any) -> PerRow:
        normal: PerRow = type(self.normal)(**{name: x[name] for name in vars(self.normal)})
        return normal

    def _weighted(self, x: Any, normal: PerRow, u: Tensor) -> dict[str, Tensor]:
        point, log_proposal = self.space(x["row"], u), log_density(normal, u, self.degrees)
        if self.degrees is not None:
            wide = log_density(normal, u, self.degrees, WIDE)
            parts = math.log1p(-WIDE_SHARE) + log_proposal, math.log(WIDE_SHARE) + wide
            log_proposal = torch.logaddexp(*parts)
        if self.num_prior:
            share = self.num_prior / self.num_samples
            parts = math.log1p(-share) + log_proposal, math.log(share) + point.log_prior
            log_proposal = torch.logaddexp(*parts)
        log_weights = (point.log_joint - log_proposal).nan_to_num(-math.inf, math.inf, -math.inf)
        return {"log_weights": log_weights, "u": u}


def weighted_draws(
    proposal: Refined, rows: Rows, keys: np.ndarray, plan: Plan, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns draws u, shape (draws, rows, D), and their log-weights, shape (draws, rows).

    Arguments:
        proposal: The proposal of the rows.
        rows: The rows.
        keys: Their keys.
        plan: How rows and draws are divided.
        seed: The seed.
    """
    program, device = proposal.space.program, proposal.normal.loc.device
    strata = proposal.strata(rows.head(2, program), seed)
    pieces = []
    for piece in plan.pieces():
        inputs = {"row": rows.select(piece, program), **proposal.of_rows(piece)}
        parts = []
        for function, noise in strata:
            shifts = noise.shifts(keys[piece]).to(device)
            for table in noise.table.to(device).split(plan.draws_at_once):
                found = function({**inputs, "table": table, "shifts": shifts}, len(table))
                parts.append((found["u"], found["log_weights"]))
        pieces.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    u, log_weights = (torch.cat(tensors, dim=1) for tensors in zip(*pieces, strict=True))
    return u, log_weights


def _noise(x: Any) -> tuple[Tensor, Tensor]:
    return x["table"], x["shifts"]
