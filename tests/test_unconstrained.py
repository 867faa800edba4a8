"""The unconstrained space of latents, and proposals in it, against automatic derivatives."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from own_programs import TwoLevels
from programs import Grid
from pyro import poutine
from pyro.distributions import constraints
from quadrature import grid, mass_of, p_of_line, p_of_plane, square
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from pyro_vae.data.read import read
from pyro_vae.elbos.chunks import Plan
from pyro_vae.elbos.log_densities import structure
from pyro_vae.engine.row_noise import row_keys
from pyro_vae.evidence.refined import (
    DEGREES,
    WIDE,
    WIDE_SHARE,
    FullNormal,
    LowRankNormal,
    PerRow,
    Refined,
    log_density,
    weighted_draws,
)
from pyro_vae.evidence.unconstrained import Space

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
ONE, TWO, THREE = (torch.ones(n, **DOUBLE) for n in (1, 2, 3))
ROWS = torch.tensor([[0.3], [1.2], [-0.4], [0.9]], **DOUBLE)
SEVERAL: dict[str, Distribution] = {
    "real": dist.Normal(THREE, 2.0).to_event(1),
    "positive": dist.Gamma(2.0 * THREE, 1.5).to_event(1),
    "interval": dist.Uniform(-THREE, 3.0).to_event(1),
    "unit interval": dist.Beta(0.7 * TWO, 1.5).to_event(1),
    "beyond a bound": dist.Pareto(0.5 * TWO, 2.0).to_event(1),
    "simplex": dist.Dirichlet(torch.tensor([0.8, 1.5, 2.0, 3.0], **DOUBLE)),
    "no event": dist.HalfNormal(ONE[0]),
}
LINES: dict[str, Distribution] = {
    "Normal": dist.Normal(ONE, 2.0).to_event(1),
    "StudentT": dist.StudentT(4.0 * ONE).to_event(1),
    "HalfNormal": dist.HalfNormal(ONE).to_event(1),
    "Exponential": dist.Exponential(ONE).to_event(1),
    "Gamma": dist.Gamma(0.7 * ONE, 1.0).to_event(1),
    "LogNormal": dist.LogNormal(ONE, 0.5).to_event(1),
    "Beta": dist.Beta(2.0 * ONE, 0.8).to_event(1),
    "Uniform": dist.Uniform(-ONE, 3.0).to_event(1),
    "Dirichlet": dist.Dirichlet(torch.tensor([0.8, 2.0], **DOUBLE)),
}


class OneSite(nn.Module):
    """z of a given prior, and x ~ N(sum of z, 1); the guide is the prior."""

    def __init__(self, prior: Distribution) -> None:
        super().__init__()
        self.prior = prior
        self.noise = nn.Parameter(torch.ones((), **DOUBLE))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            total = z.sum(-1) if self.prior.event_shape else z
            pyro.sample("x", dist.Normal(total, self.noise), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.prior)


def space_of(program: nn.Module, x: Any) -> Space:
    return Space.of(program, structure(program, x), read(x, program).head(2, program))


def points(space: Space, draws: int, rows: int) -> Tensor:
    return torch.randn(draws, rows, space.size, **DOUBLE)


@pytest.mark.parametrize("name", SEVERAL)
def test_points_are_turned_into_values_and_back(name: str) -> None:
    program = OneSite(SEVERAL[name])
    space = space_of(program, ROWS)
    u = points(space, 5, len(ROWS))
    with torch.no_grad():
        values = space(ROWS, u).values["z"]
    assert values.shape == (5, len(ROWS), *program.prior.event_shape)
    assert program.prior.support.check(values).all()
    again = biject_to(program.prior.support).inv(values).reshape(u.shape)
    torch.testing.assert_close(again, u, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_prior_has_the_jacobian_of_automatic_derivatives(name: str) -> None:
    program = OneSite(SEVERAL[name])
    space, prior = space_of(program, ROWS), program.prior
    to_support = biject_to(prior.support)

    def free(u: Tensor) -> Tensor:
        """As many numbers of z as of u: the last part of a simplex follows from the others."""
        return to_support(u.reshape(next(iter(space.shapes.values())))).reshape(-1)[: space.size]

    u = points(space, 3, len(ROWS))
    with torch.no_grad():
        point = space(ROWS, u)
    for draw in range(3):
        for row in range(len(ROWS)):
            slopes = torch.autograd.functional.jacobian(free, u[draw, row])
            expected = prior.log_prob(point.values["z"][draw, row]) + slopes.det().abs().log()
            assert float(point.log_prior[draw, row]) == pytest.approx(float(expected), abs=1e-9)
    total = point.values["z"].sum(-1) if prior.event_shape else point.values["z"]
    with torch.no_grad():
        likelihood = dist.Normal(total, program.noise).log_prob(ROWS[:, 0])
    torch.testing.assert_close(point.log_likelihood, likelihood)
    torch.testing.assert_close(point.log_joint, point.log_prior + likelihood)
    assert (point.log_left == 0).all()


@pytest.mark.parametrize("name", LINES)
def test_the_prior_of_points_integrates_to_one(name: str) -> None:
    space = space_of(OneSite(LINES[name]), ROWS)
    line = grid(constraints.real, 2001)
    u = line.points.clamp(-700.0, 700.0)[:, None, None].expand(-1, 2, 1)
    with torch.no_grad():
        log_prior = space(ROWS[:2], u).log_prior.nan_to_num(-torch.inf)
    masses = (log_prior + line.weights.log()[:, None]).exp().sum(0)
    np.testing.assert_allclose(masses, 1.0, atol=1e-4)


@pytest.mark.parametrize("source", ["from_guide", "from_prior"])
@pytest.mark.parametrize("name", SEVERAL)
def test_draws_are_those_of_the_program(name: str, source: str) -> None:
    program = OneSite(SEVERAL[name])
    space = space_of(program, ROWS)
    pyro_program = program.guide if source == "from_guide" else program.model
    torch.manual_seed(1)
    u = getattr(space, source)(ROWS, 6)
    torch.manual_seed(1)
    with torch.no_grad():
        found = space(ROWS, u).values["z"]
        trace = poutine.trace(pyro.plate("_", 6, dim=-2)(pyro_program)).get_trace(ROWS)
    torch.testing.assert_close(found, trace.nodes["z"]["value"], rtol=1e-6, atol=1e-9)


def test_levels_and_plates_have_their_place_in_the_vector() -> None:
    x = torch.randn(4, 2)
    program = TwoLevels()
    space = space_of(program, x)
    assert (space.size, space.left) == (3, ())
    u = torch.randn(5, 4, 3)
    with torch.no_grad():
        point = space(x, u)
    w, z = u[..., 0], u[..., 1:]
    expected = dist.Normal(0.0, 1.0).log_prob(w) + dist.Normal(w[..., None], 1.0).log_prob(z).sum(
        -1
    )
    torch.testing.assert_close(point.log_prior.float(), expected)
    torch.testing.assert_close(point.values["z"], z)
    likelihood = dist.Normal(z, 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(point.log_likelihood.float(), likelihood)

    cells = {"cells": torch.randn(4, 3, **DOUBLE), "flag": torch.ones(4, **DOUBLE)}
    space = space_of(Grid(), cells)
    u = points(space, 5, 4)
    with torch.no_grad():
        point = space(cells, u)
    joint = dist.Normal(0.0, 1.0).log_prob(u[..., 0]) + nn.functional.logsigmoid(u[..., 0])
    joint = joint + dist.Normal(u, 1.0).log_prob(cells["cells"]).sum(-1)
    torch.testing.assert_close(point.log_joint, joint)


def normal_of(kind: str, size: int) -> PerRow:
    """A normal distribution of two equal rows, away from the prior."""
    loc = torch.tensor([0.5, -0.3], **DOUBLE)[:size].expand(2, size)
    tril = torch.tensor([[0.4, 0.0], [0.3, 0.5]], **DOUBLE)[:size, :size].expand(2, size, size)
    if kind == "full":
        return FullNormal(loc, tril)
    scale = torch.tensor([0.4, 0.6], **DOUBLE)[:size].expand(2, size)
    factor = torch.tensor([[0.5], [-0.7]], **DOUBLE)[:size, : int(kind[-1])]
    return LowRankNormal(loc, scale, factor.expand(2, *factor.shape))


KINDS = ["full", "rank 0", "rank 1"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_a_proposal_integrates_to_one_and_is_that_of_its_draws(
    kind: str, size: int
) -> None:
    prior = dist.Normal(torch.zeros(size, **DOUBLE), 1.0).to_event(1)
    program = OneSite(prior)
    x = ROWS[:1].expand(2, 1)
    space, normal = space_of(program, x), normal_of(kind, size)
    rows, proposal = read(x, program), Refined(space, normal, 4000)

    def log_q(u: Tensor) -> Tensor:
        """Two t and the prior, of points (draws, D)."""
        u = u[:, None].expand(-1, 2, -1)
        parts = [
            np.log(0.95 * (1 - WIDE_SHARE)) + log_density(normal, u, DEGREES),
            np.log(0.95 * WIDE_SHARE) + log_density(normal, u, DEGREES, WIDE),
            np.log(0.05) + prior.log_prob(u),
        ]
        return torch.logsumexp(torch.stack(parts), 0)[:, 0]

    plan = Plan.of(program, rows, 4000, 2**20)
    with torch.no_grad():
        u, log_weights = weighted_draws(proposal, rows, row_keys(rows), plan, seed=0)
        for row in range(2):
            own = space(x, u).log_joint[:, row] - log_weights[:, row]
            torch.testing.assert_close(own, log_q(u[:, row]))
    assert not torch.equal(u[:, 0], u[:, 1])
    line = grid(constraints.real, 2001 if size == 1 else 401)
    if size == 1:
        mass = mass_of(log_q, line.points[:, None], line.weights)
        p = [p_of_line(u[:, row, 0], line, mass) for row in range(2)]
    else:
        plane, weights = square(line)
        mass = mass_of(log_q, plane.flatten(0, 1), weights.flatten()).reshape(weights.shape)
        p = [p_of_plane(u[:, row], line, mass) for row in range(2)]
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-4)
    assert min(p) > 0.01
    values = log_density(normal, u, None)
    torch.testing.assert_close(values, normal.distribution().log_prob(u))


@pytest.mark.parametrize("kind", KINDS)
def test_the_slopes_are_those_of_moves(kind: str) -> None:
    """The gradient of an ELBO along the path, by automatic derivatives through `moved`."""
    normal = normal_of(kind, 2)
    noise = torch.randn(7, 2, normal.noise_size, **DOUBLE)
    u = normal.points(noise).requires_grad_()
    target = dist.MultivariateNormal(torch.zeros(2, **DOUBLE), torch.eye(2, **DOUBLE) + 0.5)
    (slopes,) = torch.autograd.grad(target.log_prob(u).mean(0).sum() * len(u), u)
    found = normal.gradients(noise, slopes)
    moves = [torch.zeros_like(part, requires_grad=True) for part in found]
    moved = target.log_prob(normal.moved(*moves).points(noise)).mean(0).sum()
    expected = torch.autograd.grad(moved, moves)
    for one, other in zip(found, expected):
        torch.testing.assert_close(
            one, other.tril() if kind == "full" and other.ndim == 3 else other
        )
