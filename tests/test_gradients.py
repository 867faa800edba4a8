"""The mean of each estimator's gradient is the gradient of its objective, in every parameter.

Means over repeats are compared with closed forms, sums over all draws, or the means of plain
autograd written out here, in standard errors of both. 4.5 of them are passed by chance in one of
150 000 comparisons; there are some 2000, of seeded draws.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pytest
import torch
from elbo_cases import (
    COUPLED,
    ESTIMATORS,
    Copies,
    Discrete,
    Gaussian,
    Handed,
    Hierarchy,
    Mean,
    Moments,
    Pair,
    Positive,
    chunks,
    estimates,
    exact,
    grads,
    log_normal,
    that,
    worst,
)
from torch import Tensor

import pyro_vae as pv
from pyro_vae import elbos
from pyro_vae.elbos import Estimator, Weights
from pyro_vae.engine.running import seeded

REPEATS = 50_000  # of two rows: 10^5 gradients
DRAWS = 10**6
BOUND = 4.5

Bound = Callable[[Tensor], Tensor]


def log_mean(log_weights: Tensor, dim: int = 0) -> Tensor:
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def mean_of_bounds(log_weights: Tensor) -> Tensor:
    return log_mean(log_weights.unflatten(0, (2, 2)), 1).mean(0)


@functools.cache
def of_order(order: float) -> Bound:
    return lambda log_weights: log_mean(order * log_weights) / order


def combined(log_weights: Tensor) -> Tensor:
    return 0.3 * log_weights.mean(0) + 0.7 * log_mean(log_weights)


class Wanted(NamedTuple):
    """The objectives of K log-weights that an estimator claims: of the value and of gradients."""

    num_particles: int
    value: Bound
    encoder: Bound
    others: Bound
    sign_of_encoder: float = 1.0


def alike(num_particles: int, bound: Bound) -> Wanted:
    return Wanted(num_particles, bound, bound, bound)


OF_WEIGHTS = {
    "IWAE": alike(3, log_mean),
    "Renyi": alike(3, of_order(0.5)),
    "Renyi, 2": alike(3, of_order(-1.0)),
    "Renyi, -1": alike(3, of_order(2.0)),
    "MIWAE": alike(4, mean_of_bounds),
    "CIWAE": alike(3, combined),
    "PIWAE": Wanted(4, log_mean, mean_of_bounds, log_mean),
    "DReG": alike(3, log_mean),
    "VIMCO": alike(3, log_mean),
    "CUBO": Wanted(3, of_order(2.0), of_order(2.0), log_mean, -1.0),
}


def mean_field(program: Gaussian) -> Tensor:
    return program.elbo()


def half_free(program: Gaussian) -> Tensor:
    """Free bits of 0.15 nats: a dim whose mean over the rows is below has no gradient."""
    seen, kl = program.parts()
    mean = kl.mean(0)
    assert (mean < 0.15).tolist() == [False, True]
    excess = (0.15 - mean[1]).detach()
    return seen - kl[:, 0] - kl[:, 1].detach() - excess


CLOSED: dict[str, Callable[[Gaussian], Tensor]] = {
    "Trace_ELBO": mean_field,
    "Trace_ELBO, 2": mean_field,
    "TraceMeanField_ELBO": mean_field,
    "TraceMeanField_ELBO, 2": mean_field,
    "TraceGraph_ELBO": mean_field,
    "TraceGraph_ELBO, 2": mean_field,
    "TraceEnum_ELBO": mean_field,
    "STL": mean_field,
    "STL, 3": mean_field,
    "BetaELBO": lambda program: program.elbo(2.0),
    "FreeBits, 0": mean_field,
    "FreeBits": half_free,
    "TotalCorrelation, 1": mean_field,
}
TEMPERED = {"BetaELBO of DReG"}  # below, with the other weights on the KL terms
OF_BATCHES = {"MMD", "TotalCorrelation"}
SELF_NORMALISED = {"RWS", "TVO"}


def test_every_estimator_has_an_objective() -> None:
    named = CLOSED.keys() | OF_WEIGHTS.keys() | TEMPERED | OF_BATCHES | SELF_NORMALISED
    assert named == ESTIMATORS.keys()
    biased = set(that(lambda elbo: not elbo.unbiased_gradient))
    assert biased == {"RWS", "TVO", "TotalCorrelation", "TotalCorrelation, 1"}


# Unbiased


@functools.cache
def reference(
    make: type[Copies], num_particles: int, bound: Bound, beta: float = 1.0
) -> dict[str, Mean]:
    """The mean of plain autograd over 10^6 draws."""
    moments = Moments()
    with seeded(1):
        for size in chunks(DRAWS // (2 * num_particles), 10_000):
            program = make(size)
            per_row = bound(program.log_weights(num_particles, beta))
            moments.add(program.distinct, value=per_row, **grads(program, per_row.sum()))
    return moments.means()


def distance(make: type[Copies], estimator: Estimator, wanted: Wanted, beta: float = 1.0) -> float:
    """The largest distance of value and gradients to the objectives, in standard errors."""
    found = estimates(make, estimator, REPEATS)
    groups = [
        ({"value"}, wanted.value, 1.0),
        (make.names("encoder"), wanted.encoder, wanted.sign_of_encoder),
        (make.names("decoder", "prior"), wanted.others, 1.0),
    ]
    return max(
        worst(found, signed(reference(make, wanted.num_particles, bound, beta), sign), names)
        for names, bound, sign in groups
    )


def signed(means: dict[str, Mean], sign: float) -> dict[str, Mean]:
    return {name: Mean(sign * mean.value, mean.se) for name, mean in means.items()}


@pytest.mark.parametrize("name", CLOSED)
def test_of_the_closed_form(name: str) -> None:
    repeats = 200 if name in COUPLED and name != "FreeBits" else REPEATS
    found, program = estimates(Gaussian, ESTIMATORS[name](), repeats), Gaussian()
    wanted = exact(program, CLOSED[name](program))
    assert worst(found, wanted, found.keys() & wanted.keys()) < BOUND


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_of_a_function_of_weights(name: str) -> None:
    assert distance(Gaussian, ESTIMATORS[name](), OF_WEIGHTS[name]) < BOUND


def tempered(make: Callable[[], Estimator], beta: float) -> Estimator:
    elbo = make()
    elbo.kl_weight = beta
    return elbo


MEAN: Bound = functools.partial(torch.mean, dim=0)
ALONG_PATHS: dict[str, tuple[Callable[[], Estimator], Wanted]] = {
    "TraceMeanField_ELBO": (elbos.TraceMeanField_ELBO, alike(2, MEAN)),
    "STL": (lambda: elbos.STL(2), alike(2, MEAN)),
    "DReG": (lambda: elbos.DReG(3), OF_WEIGHTS["DReG"]),
    "PIWAE": (lambda: elbos.PIWAE(2, 2), OF_WEIGHTS["PIWAE"]),
}


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", ALONG_PATHS)
def test_of_two_levels_of_latents(name: str, beta: float) -> None:
    make, wanted = ALONG_PATHS[name]
    assert distance(Hierarchy, tempered(make, beta), wanted, beta) < BOUND


@pytest.mark.parametrize("name", [n for n in ALONG_PATHS if n != "TraceMeanField_ELBO"])
def test_of_a_transformed_posterior(name: str) -> None:
    make, wanted = ALONG_PATHS[name]
    assert distance(Positive, make(), wanted) < BOUND


WITH_WEIGHT = ["IWAE", "CIWAE", "PIWAE", "DReG", "VIMCO"]


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_with_a_weight_on_the_kl_terms(name: str) -> None:
    elbo = tempered(ESTIMATORS[name], 0.5)
    assert distance(Gaussian, elbo, OF_WEIGHTS[name], 0.5) < BOUND


def test_of_sticking_the_landing_with_a_weight() -> None:
    program = Gaussian()
    found = estimates(Gaussian, tempered(elbos.STL, 0.5), REPEATS)
    assert worst(found, exact(program, program.elbo(0.5)), set(found)) < BOUND


def test_of_a_bound_inside_beta_elbo() -> None:
    """Its inner estimator is told the weight beta times the warm-up's."""
    elbo = tempered(lambda: elbos.BetaELBO(beta=0.625, elbo=elbos.DReG(3)), 0.8)
    assert distance(Gaussian, elbo, OF_WEIGHTS["DReG"], 0.5) < BOUND


# What is wrong is found out


class SquaredWeights(elbos.DReG):
    """DReG whose guide has the weight w^2 whatever the weight of the KL terms."""

    def weights(self, log_weights: Tensor) -> Weights:
        normalised = log_weights.softmax(0)
        return Weights(normalised, normalised.square(), None, normalised)


class LandingInside(elbos.DReG):
    """Sticking the landing inside an importance-weighted bound."""

    def weights(self, log_weights: Tensor) -> Weights:
        normalised = log_weights.softmax(0)
        return Weights(normalised, normalised, None, torch.ones_like(normalised))


def biased(family: type[Estimator], beta: float) -> float:
    found = estimates(Gaussian, tempered(lambda: family(3), beta), 5000)
    wanted = reference(Gaussian, 3, log_mean, beta)
    assert worst(found, wanted, Gaussian.names("decoder", "prior")) < BOUND
    return worst(found, wanted, Gaussian.names("encoder"))


def test_squared_weights_under_a_kl_weight_are_found_out() -> None:
    assert biased(SquaredWeights, 1.0) < BOUND
    assert biased(SquaredWeights, 0.5) > 20.0


def test_sticking_the_landing_inside_a_bound_is_found_out() -> None:
    assert biased(LandingInside, 1.0) > 20.0


def test_autograd_of_the_surrogate_is_not_that_of_the_value() -> None:
    """A guide's gradient by autograd is that of IWAE(4), which PIWAE's guide must not have."""
    found = estimates(Gaussian, elbos.IWAE(4), 5000)
    wanted = reference(Gaussian, 4, mean_of_bounds)
    assert worst(found, wanted, Gaussian.names("encoder")) > 10.0


# At the exact posterior


class Landed(Gaussian):
    """The guide is the posterior: its spread is diagonal, as the columns of W are orthogonal."""

    def __init__(self, repeats: int = 1) -> None:
        weight = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.0, 0.0]], dtype=torch.float64)
        start = Gaussian(1)
        noise, spread = (2 * start.log_noise[0]).exp(), (2 * start.log_scale[0]).exp()
        precision = (weight.square().sum(0) / noise) + 1 / spread
        slope = weight.T / noise / precision[:, None]
        super().__init__(
            repeats,
            weight=weight,
            slope=slope.detach(),
            intercept=(start.loc[0] / spread / precision).detach(),
            log_spread=(-0.5 * precision.log()).detach(),
        )


OF_IMPORTANCE_WEIGHTS = [*OF_WEIGHTS, "STL", "STL, 3", "RWS", "TVO"]


@pytest.mark.parametrize("name", OF_IMPORTANCE_WEIGHTS)
def test_the_value_at_the_posterior_is_log_evidence(name: str) -> None:
    program = Landed(50)
    found = ESTIMATORS[name]().estimate(program.model, program.guide, program.x).per_row
    assert (found - program.log_evidence()).abs().max() < 1e-6


def guide_gradient(program: Copies, elbo: Estimator) -> float:
    found = grads(program, elbo.estimate(program.model, program.guide, program.x).loss)
    return max(found[name].abs().max().item() for name in program.names("encoder"))


@pytest.mark.parametrize("name", ["STL", "STL, 3", "DReG"])
def test_the_guide_has_no_gradient_at_the_posterior(name: str) -> None:
    assert guide_gradient(Landed(50), ESTIMATORS[name]()) < 1e-6


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceMeanField_ELBO", "IWAE", "PIWAE"])
def test_plain_gradients_of_the_guide_scatter_at_the_posterior(name: str) -> None:
    assert guide_gradient(Landed(50), ESTIMATORS[name]()) > 0.1


# Powers of the weights


class Wide(Landed):
    """A guide wider than the posterior, so that powers of the weights have moments."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__(repeats)
        with torch.no_grad():
            self.log_spread.add_(0.3)
            self.intercept.add_(0.1)

    def log_moment(self, power: float) -> Tensor:
        """log E_q[w^n] = log of the integral of p(x, z)^n q(z)^(1 - n), a quadratic form."""
        exact = Landed(len(self.x) // self.distinct)
        mean = (exact.slope * self.x[:, None]).sum(-1) + exact.intercept
        away, p, q = self.intercept - exact.intercept, -2 * exact.log_spread, -2 * self.log_spread
        p, q = p.exp(), q.exp()
        precision = power * p + (1 - power) * q
        assert mean.shape == away.shape
        assert (precision > 0).all()
        exponent = -0.5 * power * (1 - power) * p * q / precision * away.square()
        normaliser = power * p.log() + (1 - power) * q.log() - precision.log()
        return power * self.log_evidence() + (exponent + 0.5 * normaliser).sum(-1)


POWERS = {
    "CUBO": (lambda: elbos.CUBO(3), 2.0),
    "CUBO, 3": (lambda: elbos.CUBO(3, order=3.0), 3.0),
    "Renyi, -1": (lambda: elbos.Renyi(3, alpha=-1.0), 2.0),
    "Renyi, -0.5": (lambda: elbos.Renyi(3, alpha=-0.5), 1.5),
    "Renyi, 0.5": (lambda: elbos.Renyi(3, alpha=0.5), 0.5),
    "IWAE": (lambda: elbos.IWAE(3), 1.0),
}


@pytest.mark.parametrize("name", POWERS)
def test_the_mean_of_the_power_of_weights(name: str) -> None:
    make, power = POWERS[name]
    program, moments = Wide(10_000), Moments()
    found = make().estimate(program.model, program.guide, program.x).per_row
    moments.add(2, value=(power * found).exp())
    wanted = program.log_moment(power).exp()[:2].detach()
    assert moments.means()["value"].z(Mean(wanted, torch.zeros(2))) < BOUND


def test_cubo_of_few_draws_is_no_upper_bound() -> None:
    below = Gaussian(10_000)
    with torch.no_grad():
        values = {
            count: elbos.CUBO(count).estimate(below.model, below.guide, below.x).per_row.mean()
            for count in (2, 100)
        }
        truth = below.log_evidence().mean()
    assert values[2] < truth - 0.02
    assert values[100] > truth


# Of whole batches


def gaussian_kernel(one: Tensor, other: Tensor) -> Tensor:
    return (-0.5 * (one[..., :, None, :] - other[..., None, :, :]).square().sum(-1)).exp()


def mean_kernel(loc: Tensor, variance: Tensor) -> Tensor:
    """E exp(-d^2 / 2) of d ~ N(loc, variance), over the last dim."""
    exponent = -0.5 * loc.square() / (1 + variance)
    return (exponent - 0.5 * (1 + variance).log()).sum(-1).exp()


def test_of_the_discrepancy() -> None:
    """Each particle is a batch of its own: a gradient is the mean of as many."""
    particles, moments = 1000, Moments()
    elbo = elbos.MMD(particles, weight=2.0, kernel=gaussian_kernel)
    with pyro.validation_enabled(False):
        for _ in range(100):
            program = Gaussian()
            estimate = elbo.estimate(program.model, program.guide, program.x)
            moments.add(2, value=estimate.per_row, **grads(program, -estimate.loss))
    program = Gaussian()
    assert worst(moments.means(), exact_discrepancy(program), moments.sums.keys()) < BOUND


def exact_discrepancy(program: Gaussian) -> dict[str, Mean]:
    loc = (program.slope * program.x[:, None]).sum(-1) + program.intercept
    variance, prior = (2 * program.log_spread).exp(), (2 * program.log_scale).exp()
    within = mean_kernel(loc[0] - loc[1], variance.sum(0))
    between = mean_kernel(program.loc[0] - program.loc[1], prior.sum(0))
    across = [
        mean_kernel(loc[i] - program.loc[j], variance[i] + prior[j])
        for i, j in itertools.product(range(2), repeat=2)
    ]
    discrepancy = within + between - 2 * torch.stack(across).mean()
    return exact(program, program.parts()[0] - 2.0 * discrepancy)


def test_the_total_correlation_of_a_known_aggregate() -> None:
    """Many rows of a linear encoder: the aggregate posterior is normal, of correlation r."""
    x = torch.randn(1000, 1, dtype=torch.float64) * torch.tensor([2.0, 0.5, 2.0]).double()
    program = Gaussian()
    program.x = x
    for name, values in program.copies.items():
        program.copies[name] = values[:1].expand(len(x), *values.shape[1:]).detach().clone()
    slope, spread = program.slope[0], (2 * program.log_spread[0]).exp()
    covariance = slope @ torch.cov(x.T) @ slope.T + spread.diag()
    correlation = covariance[0, 1].square() / covariance.diag().prod()
    truth = -0.5 * (1 - correlation).log()
    values = []
    for beta in (1.0, 2.0):
        with seeded(0):
            elbo = elbos.TotalCorrelation(beta=beta)
            values.append(elbo.estimate(program.model, program.guide, x).per_row.mean())
    assert truth > 0.05
    assert (values[0] - values[1]).item() == pytest.approx(truth.item(), abs=0.02)


@pytest.mark.parametrize("total", [None, 10, 100])
def test_the_total_correlation_in_a_double_loop(total: int | None) -> None:
    x, program = torch.randn(5, 3).double(), Gaussian(5)
    program.x, program.distinct = x.repeat(2, 1), 10
    z = torch.randn(1, 10, 2, dtype=torch.float64)
    loc = (program.slope * program.x[:, None]).sum(-1) + program.intercept
    rows, count = len(program.x), total or 10
    weights = torch.full((rows, rows), (count - 1) / (count * (rows - 1))).double()
    weights.fill_diagonal_(1 / count)
    terms = []
    for i in range(rows):
        densities = log_normal(z[0, i], loc, program.log_spread).exp()
        joint = (weights[i] * densities.prod(-1)).sum().log()
        terms.append(joint - (weights[i][:, None] * densities).sum(0).log().sum())
    with Handed(z=z), torch.no_grad():
        one, three = (
            elbos.TotalCorrelation(beta=beta, num_rows=total)
            .estimate(program.model, program.guide, program.x)
            .per_row
            for beta in (1.0, 3.0)
        )
    torch.testing.assert_close((one - three) / 2, torch.stack(terms).detach())


# Discrete latents: all draws are gone through


def multisets(num_particles: int) -> tuple[Tensor, Tensor]:
    """The draws up to their order, (K, count), and how many orders each has."""
    draws = list(itertools.combinations_with_replacement(range(3), num_particles))
    orders = [
        math.factorial(num_particles)
        / math.prod(math.factorial(draw.count(value)) for value in range(3))
        for draw in draws
    ]
    return torch.tensor(draws).T, torch.tensor(orders, dtype=torch.float64)


def summed(estimator: Estimator, num_particles: int) -> dict[str, Mean]:
    """The expectation of a value and a gradient over all draws, for each row."""
    draws, orders = multisets(num_particles)
    program = Discrete(len(orders))
    draws = draws.repeat_interleave(2, 1)
    log_q = program.tables()[0].detach()
    chance = orders.repeat_interleave(2) * log_q.gather(1, draws.T).sum(1).exp()
    with Handed(z=draws if num_particles > 1 else draws[0]):
        found = estimator.estimate(program.model, program.guide, program.x)
    values = {"value": found.per_row} | grads(program, -found.loss)
    means = {}
    for name, value in values.items():
        weighted = value.detach() * chance.reshape(-1, *[1] * (value.ndim - 1))
        total = weighted.unflatten(0, (-1, 2)).sum(0)
        means[name] = Mean(total, torch.zeros_like(total))
    return means


def bound_of_all_draws(
    program: Discrete, num_particles: int, bound: Bound, beta: float = 1.0
) -> Tensor:
    """The expectation of a function of weights, by the draws' probabilities, (rows,)."""
    draws, orders = multisets(num_particles)
    log_q, log_p, seen = program.tables()
    log_weights = (seen + beta * (log_p - log_q))[:, draws]
    chance = orders * log_q[:, draws].sum(1).exp()
    return (chance * bound(log_weights.movedim(1, 0))).sum(-1)


def furthest(one: dict[str, Mean], other: dict[str, Mean], names: set[str]) -> float:
    return max((one[name].value - other[name].value).abs().max().item() for name in names)


EVERY = {"value"} | Discrete.names("prior", "decoder", "encoder")
SUMMED: dict[str, tuple[Callable[[], Estimator], int, Bound]] = {
    "Trace_ELBO": (elbos.Trace_ELBO, 1, MEAN),
    "Trace_ELBO, 2": (lambda: elbos.Trace_ELBO(2), 2, MEAN),
    "TraceGraph_ELBO": (elbos.TraceGraph_ELBO, 1, MEAN),
    "TraceGraph_ELBO, 2": (lambda: elbos.TraceGraph_ELBO(2), 2, MEAN),
    "VIMCO, 2": (lambda: elbos.VIMCO(2), 2, log_mean),
    "VIMCO, 5": (lambda: elbos.VIMCO(5), 5, log_mean),
}


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", SUMMED)
def test_of_discrete_latents(name: str, beta: float) -> None:
    make, num_particles, bound = SUMMED[name]
    elbo, program = tempered(make, beta), Discrete()
    wanted = exact(program, bound_of_all_draws(program, num_particles, bound, beta))
    assert furthest(summed(elbo, num_particles), wanted, EVERY) < 1e-10


REALLY_DRAWN = {
    "VIMCO": (lambda: elbos.VIMCO(3), 3, log_mean),
    "TraceGraph_ELBO": (elbos.TraceGraph_ELBO, 1, MEAN),
    "TraceGraph_ELBO, 2": (lambda: elbos.TraceGraph_ELBO(2), 1, MEAN),
    "Trace_ELBO": (elbos.Trace_ELBO, 1, MEAN),
    "Trace_ELBO, 2": (lambda: elbos.Trace_ELBO(2), 1, MEAN),
}


@pytest.mark.parametrize("name", REALLY_DRAWN)
def test_of_discrete_latents_that_are_drawn(name: str) -> None:
    make, num_particles, bound = REALLY_DRAWN[name]
    program = Discrete()
    wanted = exact(program, bound_of_all_draws(program, num_particles, bound))
    found = estimates(Discrete, make(), REPEATS)
    assert worst(found, wanted, EVERY) < BOUND


def enumerated(program: Discrete, *, in_guide: bool) -> dict[str, Mean]:
    marked = pyro.infer.config_enumerate
    elbo = elbos.TraceEnum_ELBO(max_plate_nesting=1)
    pair = (program.model, marked(program.guide)) if in_guide else (marked(program.model), nothing)
    estimate = elbo.estimate(*pair, program.x)
    value = {"value": Mean(-estimate.loss.detach(), torch.zeros(()))}
    gradients = grads(program, -estimate.loss)
    return value | {n: Mean(g, torch.zeros_like(g)) for n, g in gradients.items()}


def nothing(x: Tensor) -> None:
    """A guide without sites."""


@pytest.mark.parametrize("in_guide", [True, False])
def test_of_discrete_latents_that_are_summed_out(in_guide: bool) -> None:
    program = Discrete()
    log_q, log_p, seen = program.tables()
    elbo = (log_q.exp() * (log_p + seen - log_q)).sum(-1)
    truth = elbo if in_guide else (log_p + seen).logsumexp(-1)
    wanted = exact(program, truth)
    wanted["value"] = Mean(wanted["value"].value.sum(), torch.zeros(()))
    assert furthest(enumerated(program, in_guide=in_guide), wanted, EVERY) < 1e-10


def test_the_objective_of_each_row_of_what_is_summed_out() -> None:
    program = Discrete()
    log_q, log_p, seen = program.tables()
    elbo = elbos.TraceEnum_ELBO(max_plate_nesting=1)
    guide = pyro.infer.config_enumerate(program.guide)
    found = elbo.per_row(Pair(program, program.model, guide), program.x, num_repeats=2)
    wanted = (log_q.exp() * (log_p + seen - log_q)).sum(-1)
    torch.testing.assert_close(found.value, wanted.detach())
    assert (found.mcse < 1e-6).all()


def wake(program: Discrete, num_particles: int) -> dict[str, Mean]:
    """The expectation of sum_k w_k grad log q(z_k), all draws summed, weights held fixed."""
    draws, orders = multisets(num_particles)
    log_q, log_p, seen = program.tables()
    log_weights = (seen + log_p - log_q)[:, draws].detach()
    chance = orders * log_q[:, draws].sum(1).exp().detach()
    total = (chance * (log_weights.softmax(1) * log_q[:, draws]).sum(1)).sum(-1)
    return exact(program, total)


def test_of_reweighted_wake_sleep() -> None:
    found, program = estimates(Discrete, elbos.RWS(3), REPEATS), Discrete()
    model = exact(program, bound_of_all_draws(program, 3, log_mean))
    assert worst(found, wake(program, 3), Discrete.names("encoder")) < BOUND
    assert worst(found, model, {"value"} | Discrete.names("prior", "decoder")) < BOUND
    of_all = summed(elbos.RWS(3), 3)
    assert furthest(of_all, wake(program, 3), Discrete.names("encoder")) < 1e-10
    assert furthest(of_all, model, {"value"} | Discrete.names("prior", "decoder")) < 1e-10


def inclusive(program: Discrete) -> Tensor:
    """Minus KL(p(z | x), q(z | x)), but for what does not depend on q."""
    log_q, log_p, seen = program.tables()
    return ((log_p + seen).softmax(-1).detach() * log_q).sum(-1)


def log_path(program: Discrete, beta: float) -> Tensor:
    """The objective of TVO(K, 5) as K grows: its pieces, each over its own posterior."""
    log_q, log_p, seen = program.tables()
    log_weights = seen + beta * (log_p - log_q)
    points = [0.0, *torch.logspace(-2.0, 0.0, 5, dtype=torch.float64).tolist()[:4]]
    ends = [*points[1:], 1.0]
    pieces = [
        (end - point) * ((log_q + point * log_weights).softmax(-1) * log_weights).sum(-1)
        for point, end in zip(points, ends)
    ]
    return torch.stack(pieces).sum(0)


LIMITS: dict[str, tuple[type[Estimator], Callable[[Discrete], Tensor], float, set[str]]] = {
    "RWS": (elbos.RWS, inclusive, 1.0, Discrete.names("encoder")),
    "TVO": (elbos.TVO, lambda p: log_path(p, 1.0), 1.0, EVERY),
    "TVO, 0.5": (elbos.TVO, lambda p: log_path(p, 0.5), 0.5, EVERY),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_bias_of_normalised_weights_halves_as_draws_double(name: str) -> None:
    family, objective, beta, names = LIMITS[name]
    program, biases = Discrete(), []
    wanted = exact(program, objective(program))
    for num_particles in (8, 16, 32):
        elbo = tempered(lambda: family(num_particles), beta)  # noqa: B023
        biases.append(furthest(summed(elbo, num_particles), wanted, names))
    ratios = [after / before for before, after in itertools.pairwise(biases)]
    assert biases[0] > 1e-3
    assert ratios == pytest.approx([0.5, 0.5], abs=0.07)


def test_a_row_has_weights_of_its_own() -> None:
    """Pyro's own reweighted wake-sleep has one weight for the whole batch."""
    log_weights = torch.randn(1000, 50, dtype=torch.float64)
    for elbo in (elbos.RWS(1000), elbos.DReG(1000), elbos.VIMCO(1000), elbos.PIWAE(10, 100)):
        normalised = elbo.weights(log_weights).model
        torch.testing.assert_close(normalised.sum(0), torch.ones(50, dtype=torch.float64))
        assert (1 / normalised.square().sum(0)).min() > 100


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in COUPLED])
def test_rows_do_not_see_each_other(name: str) -> None:
    """Each row has the same value and gradient whatever stands beside it."""
    elbo, found = ESTIMATORS[name](), []
    z = torch.randn(elbo.num_particles, 2, dtype=torch.float64)
    for seen in (X_PAIR, X_PAIR.flip(0)):
        program = Gaussian()
        program.x = seen
        noise = z if torch.equal(seen, X_PAIR) else z.flip(1)
        found.append(by_noise(program, elbo, noise))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other.flip(0))


X_PAIR = torch.tensor([[0.7, -0.3, 1.1], [-2.9, 1.8, 0.2]], dtype=torch.float64)


def by_noise(program: Gaussian, elbo: Estimator, noise: Tensor) -> list[Tensor]:
    """An estimate at z = loc + scale * noise, the same for both dims."""
    loc = (program.slope * program.x[:, None]).sum(-1) + program.intercept
    z = loc + program.log_spread.exp() * noise[..., None]
    is_single = elbo.num_particles == 1 and not isinstance(elbo, elbos.MonteCarlo)
    with Handed(z=z[0] if is_single else z):
        estimate = elbo.estimate(program.model, program.guide, program.x)
    return list(grads(program, estimate.loss).values())


def test_a_vae_has_the_gradients_of_plain_torch() -> None:
    """The same draws, one seed: IWAE by hand on a small network."""
    vae = pv.VAE((3,), 2, pv.likelihoods.Normal(), seed=0).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    with seeded(5):
        loss = elbos.IWAE(4, max_plate_nesting=1).estimate(vae.model, vae.guide, x).loss
    ours = torch.autograd.grad(loss, list(vae.parameters()))
    with seeded(5):
        q = vae.encode(x)
        z = q.rsample((4,))
    log_weights = vae.decode(z).log_prob(x) + log_normal(z, 0 * z, 0 * z).sum(-1) - q.log_prob(z)
    by_hand = torch.autograd.grad(-log_mean(log_weights).sum(), list(vae.parameters()))
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one, other)
