"""What every estimator of the table keeps to: values, scales, KL weights, refusals."""

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import members
from elbo_cases import (
    BASES,
    ESTIMATORS,
    Discrete,
    Gaussian,
    Hierarchy,
    Pair,
    estimates,
    exact,
    grads,
    that,
    worst,
)
from programs import Grid
from pyro import poutine
from pyro.infer import SVI
from small_vae import PLAIN, X, assert_same, small, weights
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import elbos
from pyro_vae.cli.members import member
from pyro_vae.elbos import Estimator
from pyro_vae.elbos.log_densities import RowTerms
from pyro_vae.engine.running import seeded

QUICK: dict[str, Any] = PLAIN | {"batch_size": 25, "max_epochs": 2, "seed": 0, "device": "cpu"}
STILL: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 1e-30}
TAKES_KL = that(lambda elbo: elbo.takes_kl_weight)
REFUSES_KL = that(lambda elbo: not elbo.takes_kl_weight)
NEEDS_RSAMPLE = that(lambda elbo: elbo.needs_rsample)
TAKES_DISCRETE = that(lambda elbo: not elbo.needs_rsample)


PER_SITE = {
    name: make
    for name, make in ESTIMATORS.items()
    if isinstance(make(), elbos.Trace_ELBO | elbos.TraceGraph_ELBO | elbos.TraceEnum_ELBO)
}


def fit(program: nn.Module, x: Any, **options: Any) -> pv.History:
    return pv.fit(program, x, **QUICK | {"progress": False} | options)


def of_seed(elbo: Estimator, program: Any, x: Any, seed: int = 0) -> elbos.Estimate:
    """An estimate of given draws: how deep plates nest is found out before."""
    elbo.loss(program.model, program.guide, x)
    with seeded(seed):
        return elbo.estimate(program.model, program.guide, x)


def test_every_estimator_is_in_the_table() -> None:
    named = {type(make()).__name__ for make in ESTIMATORS.values()}
    assert named == members(elbos) - BASES


# Values


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loss_is_minus_the_sum_of_the_rows(name: str) -> None:
    vae, elbo = small(), ESTIMATORS[name]()
    loss, per_row, terms = of_seed(elbo, vae, X)
    assert isinstance(terms, RowTerms)
    assert loss.shape == ()
    assert [part.shape for part in terms[:2]] == [(50,), (50,)]
    assert not terms.elbo.requires_grad or not isinstance(elbo, elbos.MonteCarlo)
    if per_row is not None:
        assert per_row.shape == (50,)
        assert -per_row.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    value, mcse = elbo.per_row(vae, X, num_repeats=20)
    assert (value.shape, mcse.shape) == ((50,), (50,))
    assert loss.item() == pytest.approx(-value.sum().item(), rel=0.2)


@pytest.mark.parametrize("name", that(lambda elbo: elbo.direction == "lower bound"))
def test_a_lower_bound_lies_below_log_evidence(name: str) -> None:
    program, elbo = Gaussian(10_000), ESTIMATORS[name]()
    found = elbo.per_row(program, program.x, num_repeats=1).value
    below = (found - program.log_evidence().detach()).reshape(-1, 2)
    assert (below.mean(0) < -4.5 * below.std(0) / math.sqrt(len(below))).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_error_of_the_objective_of_each_row_is_calibrated(name: str) -> None:
    """Its square is the variance of the value: here over two rows' many copies."""
    program, elbo = Gaussian(100 if name in OF_ONE_PLATE else 1000), ESTIMATORS[name]()
    value, mcse = elbo.per_row(program, program.x, num_repeats=16)
    variance = value.reshape(-1, 2).var(0)
    assert (mcse.square().reshape(-1, 2).mean(0) / variance).tolist() == pytest.approx(
        [1.0, 1.0], rel=0.5 if name in OF_ONE_PLATE else 0.2
    )


def test_one_repeat_has_no_error() -> None:
    vae = small()
    assert elbos.IWAE(3).per_row(vae, X, num_repeats=1).mcse.isnan().all()
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="^Expected num_repeats to be an integer"):
            elbos.IWAE(3).per_row(vae, X, num_repeats=wrong)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_objective_of_each_row_leaves_all_as_it_was(name: str) -> None:
    vae = small(encoder=nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)))
    vae.train()
    vae.likelihood.eval()
    before, modes = weights(vae), [module.training for module in vae.modules()]
    found = ESTIMATORS[name]().per_row(vae, X, num_repeats=2)
    assert not found.value.requires_grad
    assert [module.training for module in vae.modules()] == modes
    assert all(p.grad is None for p in vae.parameters())
    assert_same(weights(vae), before)


STEEP = [[0.0], [-1e5], [-3e5]], [[-1e6], [-1e6 - 1.0], [-1e6 + 1.0]], [[1e5], [0.0], [1e4]]


@pytest.mark.parametrize("log_weights", STEEP)
@pytest.mark.parametrize("name", that(lambda elbo: isinstance(elbo, elbos.MultiSample)))
def test_steep_weights_give_finite_numbers(name: str, log_weights: list[list[float]]) -> None:
    elbo = ESTIMATORS[name]()
    steep = torch.tensor(log_weights, dtype=torch.float64)
    steep = steep.repeat(2, 1)[: 4 if elbo.num_particles == 4 else 3].requires_grad_()
    value = elbo.bound(steep)
    (gradient,) = torch.autograd.grad(value.sum(), steep)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    if isinstance(elbo, elbos.Weighted):
        found = [part for part in elbo.weights(steep.detach()) if part is not None]
        assert all(torch.isfinite(part).all() for part in found)


# How they are used


@pytest.mark.parametrize("name", ESTIMATORS)
def test_plain_pyro_trains_with_it(name: str) -> None:
    vae = small()
    before = weights(vae)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), ESTIMATORS[name]())
    losses = [float(svi.step(X)) for _ in range(3)]
    assert np.isfinite([*losses, float(svi.evaluate_loss(X))]).all()
    assert [n for n, value in weights(vae).items() if torch.equal(value, before[n])] == []


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_is_a_module(name: str) -> None:
    vae = small()
    before, loss = weights(vae), ESTIMATORS[name]()(vae.model, vae.guide)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in vae.parameters()}
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    loss(X).backward()
    optimizer.step()
    assert [n for n, value in weights(vae).items() if torch.equal(value, before[n])] == []


@pytest.mark.parametrize("name", ESTIMATORS)
def test_fit_trains_with_it(name: str) -> None:
    vae, elbo = small(), ESTIMATORS[name]()
    before, said = weights(vae), vars(elbo).copy()
    history = fit(vae, X, elbo=elbo, validation=0.2, lr=0.01)
    assert np.isfinite(history.table.drop(columns="seconds")).all(axis=None)
    assert [n for n, value in weights(vae).items() if torch.equal(value, before[n])] == []
    assert vars(elbo) == said


def test_pyros_tracegraph_is_no_module_and_ours_is() -> None:
    vae = small()
    assert not hasattr(pyro.infer.TraceGraph_ELBO(), "differentiable_loss")
    losses = [elbos.TraceGraph_ELBO(), elbos.Trace_ELBO()]
    with pyro.validation_enabled(False):
        ours, plain = (of_seed(elbo, vae, X).loss for elbo in losses)
    torch.testing.assert_close(ours, plain)


def grid() -> dict[str, Tensor]:
    cells = torch.randn(7, 3, dtype=torch.float64)
    return {"cells": cells, "flag": (cells.sum(1) > 0).double()}


OF_ONE_PLATE = ("TotalCorrelation", "TotalCorrelation, 1", "MMD")


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in OF_ONE_PLATE])
def test_of_dicts_and_two_plates(name: str) -> None:
    program, x, elbo = Grid(), grid(), ESTIMATORS[name]()
    found = elbo.per_row(program, x, num_repeats=2)
    assert found.value.shape == (7,)
    elbo.differentiable_loss(program.model, program.guide, x).backward()
    assert program.shift.grad.isfinite()
    assert program.shift.grad != 0
    assert len(fit(program, x, elbo=elbo, lr=0.01, batch_size=4)) == 2


@pytest.mark.parametrize("name", OF_ONE_PLATE)
def test_of_two_plates_or_sites_that_are_refused(name: str) -> None:
    for program, x in ((Grid(), grid()), (Hierarchy(), Hierarchy().x)):
        with pytest.raises(ValueError, match="Expected one latent site, and no plate"):
            ESTIMATORS[name]().estimate(program.model, program.guide, x)


def test_a_guide_with_covariance_has_no_total_correlation() -> None:
    vae = small(posterior=pv.posteriors.MultivariateNormal())
    with pytest.raises(ValueError, match="independent over the elements of 'z'.*posteriors.Norm"):
        elbos.TotalCorrelation(beta=3.0).estimate(vae.model, vae.guide, X)


def test_the_discrepancy_needs_two_rows() -> None:
    vae = small()
    with pytest.raises(ValueError, match="Expected at least 2 rows under MMD"):
        elbos.MMD(weight=1.0).estimate(vae.model, vae.guide, X[:1])


def test_the_discrepancy_to_a_prior_that_learns_needs_rsample() -> None:
    vae = small(prior=pv.priors.Mixture(3, 2))
    with pytest.raises(ValueError, match="Expected a prior that draws 'z' by rsample"):
        elbos.MMD(weight=1.0).estimate(vae.model, vae.guide, X)


class Shared(nn.Module):
    """A mean that all rows share, and a latent of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(self.loc, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + 0.5 * x, 0.7))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sites_that_all_rows_share(name: str) -> None:
    program, x, elbo = Shared(), torch.randn(6), ESTIMATORS[name]()
    with pytest.raises(ValueError, match="^Expected (latent )?sites"):
        elbo.per_row(program, x)
    if elbo.takes_globals:
        assert len(fit(program, x, elbo=elbo)) == 2
        return
    with pytest.raises(ValueError, match="got mean outside it"):
        elbo.estimate(program.model, program.guide, x)
    before = weights(program)
    with pytest.raises(
        ValueError, match=r"got mean outside it\. Trace_ELBO.* accept such sites\.$"
    ):
        fit(program, x, elbo=elbo)
    assert_same(weights(program), before)


# Scales


class Subsampled(Gaussian):
    """Rows of a minibatch, out of 1000."""

    def rows(self, x: Tensor) -> Any:
        return pyro.plate("data", 1000, subsample=torch.arange(len(x)))


class Scaled(Gaussian):
    """Model and guide have a scale of 2.5 alike."""

    def rows(self, x: Tensor) -> Any:
        return _Scaled(pyro.plate("data", len(x)), 2.5)


class TensorScaled(Gaussian):
    """The same, with one tensor."""

    factor = torch.tensor(2.5, dtype=torch.float64)

    def rows(self, x: Tensor) -> Any:
        return _Scaled(pyro.plate("data", len(x)), self.factor)


class _Scaled:
    def __init__(self, plate: Any, scale: Any) -> None:
        self.handlers = [plate, poutine.scale(scale=scale)]

    def __enter__(self) -> None:
        for handler in self.handlers:
            handler.__enter__()

    def __exit__(self, *args: Any) -> None:
        for handler in reversed(self.handlers):
            handler.__exit__(*args)


SCALES: dict[str, tuple[type[Gaussian], float, float]] = {
    "minibatch": (Subsampled, 1.0, 200.0),
    "scale": (Scaled, 1.0, 2.5),
    "tensor": (TensorScaled, 1.0, 2.5),
    "around both": (Gaussian, 3.0, 3.0),
}


def of_five_rows(program: Gaussian) -> Gaussian:
    program.x = torch.cat([program.x, program.x + 1.0, program.x - 1.0])[:5]
    for name, values in dict(program.copies.items()).items():
        program.copies[name] = values.detach()[:1].expand(5, *values.shape[1:]).clone()
    return program


def scaled_cases() -> list[tuple[str, str]]:
    """A tensor is refused but by Pyro's own: a product of it is not known to be one scale."""
    by_tensor = {*PER_SITE, "BetaELBO"}
    return [(n, s) for n in ESTIMATORS for s in SCALES if s != "tensor" or n in by_tensor]


@pytest.mark.parametrize(("name", "scale"), scaled_cases())
def test_a_scale_of_all_rows_multiplies_the_loss_alone(name: str, scale: str) -> None:
    make, around, factor = SCALES[scale]
    plain, scaled = of_five_rows(Gaussian()), of_five_rows(make())
    found, gradients = [], []
    for program, factor_around in ((plain, 1.0), (scaled, around)):
        pair = [poutine.scale(f, scale=factor_around) for f in (program.model, program.guide)]
        elbo = ESTIMATORS[name]()
        elbo.loss(*pair, program.x)
        with seeded(3):
            estimate = elbo.estimate(*pair, program.x)
        with seeded(3):
            per_row = elbo.per_row(Pair(program, *pair), program.x, num_repeats=1).value
        found.append((estimate, per_row))
        gradients.append(grads(program, estimate.loss))
    (one, of_one), (other, of_other) = found
    torch.testing.assert_close(of_other, of_one)
    torch.testing.assert_close(other.terms[:2], one.terms[:2])
    torch.testing.assert_close(other.loss, factor * one.loss)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], factor * gradient)
    if one.per_row is not None:
        torch.testing.assert_close(other.per_row, one.per_row)


class SeenScaled(Gaussian):
    """A scale around the likelihood alone."""

    factor: Any = 0.3

    def model(self, x: Tensor) -> None:
        with _SiteScale("x", self.factor):
            super().model(x)


class ModelAnnealed(SeenScaled):
    """A scale around the prior's term, in the model alone."""

    def model(self, x: Tensor) -> None:
        with _SiteScale("z", self.factor):
            Gaussian.model(self, x)


class _SiteScale(poutine.messenger.Messenger):
    def __init__(self, name: str, scale: Any) -> None:
        super().__init__()
        self.name, self.scale = name, scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["scale"] = msg["scale"] * self.scale


@pytest.mark.parametrize("make", [SeenScaled, ModelAnnealed, TensorScaled])
@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in {*PER_SITE, "BetaELBO"}])
def test_a_scale_of_one_site_is_refused(name: str, make: type[Gaussian]) -> None:
    program, elbo = make(), ESTIMATORS[name]()
    with pytest.raises(ValueError, match="Expected one scale .* for all sites of the rows"):
        elbo.estimate(program.model, program.guide, program.x)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in {*PER_SITE, "BetaELBO"}])
def test_a_scale_of_each_row_is_refused(name: str) -> None:
    program, elbo = Gaussian(), ESTIMATORS[name]()
    pair = [poutine.scale(each, scale=torch.ones(2)) for each in (program.model, program.guide)]
    with pytest.raises(ValueError, match="Expected one scale for all rows"):
        elbo.estimate(*pair, program.x)


def parts_scaled(program: Gaussian, seen_scale: float, prior_scale: float) -> Tensor:
    seen, kl = program.parts()
    entropy = (program.log_spread + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    log_prior = -entropy - kl.sum(-1)
    return seen_scale * seen + prior_scale * log_prior + entropy


@pytest.mark.parametrize("name", PER_SITE)
def test_annealing_in_the_model_alone_is_heeded(name: str) -> None:
    """Pyro's own mean-field ELBO knows the guide's scale alone."""
    for make, scales in ((ModelAnnealed, (1.0, 0.3)), (SeenScaled, (0.3, 1.0))):
        program = make()
        wanted = exact(program, parts_scaled(program, *scales))
        found = estimates(make, PER_SITE[name](), 5000)
        assert worst(found, wanted, set(dict(program.copies.items()))) < 4.5


def test_a_scale_that_pyros_renyi_gets_wrong() -> None:
    """Pyro's takes the power of N / B of the weights, and comes out above log p(x)."""
    program = Subsampled(2500)
    found = elbos.Renyi(3, alpha=0.0).per_row(program, program.x, num_repeats=1)
    assert found.value.mean() < program.log_evidence().mean()
    theirs = pyro.infer.RenyiELBO(
        alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1
    )
    total = -theirs.loss(program.model, program.guide, program.x)
    scale = 1000 / len(program.x)
    assert total / scale / len(program.x) != pytest.approx(found.value.mean().item(), abs=0.01)


# Analytic KL


WITH_COVARIANCE = {
    "full covariance": pv.posteriors.MultivariateNormal(),
    "low rank": pv.posteriors.LowRankMultivariateNormal(1),
    "diagonal": pv.posteriors.Normal(),
}


@pytest.mark.parametrize("name", WITH_COVARIANCE)
def test_the_kl_to_a_standard_normal_is_in_closed_form(name: str) -> None:
    """However the prior is written; a warning would be an error."""
    vae = small(prior=3, posterior=WITH_COVARIANCE[name]).double()
    x = X.double()
    elbo = elbos.TraceMeanField_ELBO()
    with torch.no_grad():
        first, second = (of_seed(elbo, vae, x, seed).terms.kl for seed in (0, 1))
        q = vae.encode(x)
        covariance = getattr(q, "covariance_matrix", None)
        if covariance is None:
            covariance = torch.diag_embed(q.variance)
        q = torch.distributions.MultivariateNormal(q.mean, covariance)
        unit = torch.distributions.MultivariateNormal(
            torch.zeros(3).double(), torch.eye(3).double()
        )
        wanted = torch.distributions.kl_divergence(q, unit)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, wanted)
    free = elbos.FreeBits(nats=0.0).estimate(vae.model, vae.guide, x)
    torch.testing.assert_close(free.per_row - free.terms.reconstruction, -wanted)


def test_the_kl_of_any_normal_prior_is_in_closed_form() -> None:
    loc, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.7, 2.0])
    prior = dist.Normal(loc, scale).to_event(1)
    vae = small(prior=prior, posterior=pv.posteriors.MultivariateNormal()).double()
    with torch.no_grad():
        found = elbos.TraceMeanField_ELBO().estimate(vae.model, vae.guide, X.double()).terms.kl
        dense = torch.distributions.MultivariateNormal(
            loc.double(), scale.double().square().diag()
        )
        wanted = torch.distributions.kl_divergence(vae.encode(X.double()), dense)
    torch.testing.assert_close(found, wanted)


DRAWN_PRIORS = {
    "StudentT": dist.StudentT(4.0, 0.0, 1.0).expand([2]).to_event(1),
    "Mixture": pv.priors.Mixture(3, 2),
    "VampPrior": pv.priors.VampPrior(3, 2),
}


@pytest.mark.parametrize("name", DRAWN_PRIORS)
def test_a_kl_that_is_drawn_is_said_once(name: str) -> None:
    vae, elbo = small(prior=DRAWN_PRIORS[name]), elbos.TraceMeanField_ELBO()
    with pytest.warns(UserWarning, match="No analytic KL divergence for site 'z', from Indep"):
        elbo.estimate(vae.model, vae.guide, X)
    elbo.estimate(vae.model, vae.guide, X)
    with pytest.warns(UserWarning, match="No analytic KL divergence") as told:
        fit(vae, X, elbo=elbos.TraceMeanField_ELBO(), batch_size=10)
    assert len(told) == 1


class Swapped(Hierarchy):
    """The guide draws the two in the other order."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            middle = pyro.sample("middle", dist.Normal(self.top_intercept, 0.8))
            pyro.sample("top", dist.Normal(0.5 * middle, self.top_log_spread.exp()))


@pytest.mark.filterwarnings("ignore:Failed to verify mean field")
def test_the_other_order_of_latents_is_refused_by_mean_field() -> None:
    program = Swapped()
    for validates in (True, False):
        with pyro.validation_enabled(validates), pytest.raises(ValueError, match="model's order"):
            elbos.TraceMeanField_ELBO().estimate(program.model, program.guide, program.x)
    assert elbos.Trace_ELBO().loss(program.model, program.guide, program.x).isfinite()


def test_the_other_order_is_refused_before_a_fit(tmp_path: Path) -> None:
    program, checkpoint = Swapped(), tmp_path / "fit.safetensors"
    with pytest.raises(ValueError, match="model's order"):
        pv.fit(program, program.x, elbo=elbos.TraceMeanField_ELBO(), checkpoint=checkpoint)
    assert not checkpoint.exists()


# Weight of the KL terms


@pytest.mark.parametrize("name", TAKES_KL)
def test_warmup_changes_what_is_optimised(name: str) -> None:
    after = []
    for warmup in (0, 2):
        vae = small()
        vae.posterior.heads["loc"].linear.weight.data *= 5.0
        fit(vae, X, elbo=ESTIMATORS[name](), warmup=warmup, batch_size=50, lr=0.01)
        after.append(weights(vae))
    for key, value in after[0].items():
        if key.startswith("posterior"):
            assert (value - after[1][key]).abs().max() > 1e-5, key


@pytest.mark.parametrize("name", TAKES_KL)
def test_warmup_changes_nothing_that_is_reported(name: str) -> None:
    tables, estimates_ = [], []
    for warmup, weight in ((0, 1.0), (2, torch.tensor(0.1))):
        vae, elbo = small(), ESTIMATORS[name]()
        options = {"elbo": elbo, "warmup": warmup, "batch_size": 50, "validation": 0.2, **STILL}
        table = fit(vae, X, **options).table
        tables.append(table.drop(columns=["seconds", "kl_weight"], errors="ignore"))
        elbo.kl_weight = weight
        estimates_.append(of_seed(elbo, vae, X))
    names = [name for name in tables[0] if not name.startswith("validation")]
    assert tables[0][names].equals(tables[1][names])
    assert tables[0].iloc[-1].equals(tables[1].iloc[-1])
    one, other = estimates_
    torch.testing.assert_close(one.terms[:2], other.terms[:2], rtol=0, atol=0)
    assert one.loss != other.loss


@pytest.mark.parametrize("name", REFUSES_KL)
def test_warmup_is_refused_without_kl_terms(name: str) -> None:
    vae, elbo = small(), ESTIMATORS[name]()
    before, generator = weights(vae), torch.get_rng_state()
    with pytest.raises(ValueError, match="whose KL terms have a weight, for a warm-up; got"):
        fit(vae, X, elbo=elbo, warmup=1, seed=None)
    assert_same(weights(vae), before)
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ValueError, match="^Expected an estimator of pyro_vae.elbos whose KL term"):
        elbos.BetaELBO(beta=2.0, elbo=elbo)


def test_those_without_kl_terms() -> None:
    assert REFUSES_KL == ["RWS", "CUBO", "MMD"]


@pytest.mark.parametrize("name", TAKES_KL)
def test_a_weight_is_that_of_beta_elbo(name: str) -> None:
    vae, elbo = small(), ESTIMATORS[name]()
    beta = elbos.BetaELBO(beta=0.4, elbo=elbo)
    inside = of_seed(beta, vae, X)
    elbo.kl_weight = 0.4
    torch.testing.assert_close(inside.loss, of_seed(elbo, vae, X).loss)
    rows = []
    for each in (beta, elbo):
        with seeded(1):
            rows.append(each.per_row(vae, X, num_repeats=2).value)
    torch.testing.assert_close(*rows)


def test_of_a_weight_on_what_is_summed_out() -> None:
    program = Discrete()
    guide = pyro.infer.config_enumerate(program.guide)
    elbo = elbos.BetaELBO(beta=0.4, elbo=elbos.TraceEnum_ELBO(max_plate_nesting=1))
    log_q, log_p, seen = program.tables()
    wanted = (log_q.exp() * (seen + 0.4 * (log_p - log_q))).sum(-1)
    found = elbo.per_row(Pair(program, program.model, guide), program.x, num_repeats=1).value
    torch.testing.assert_close(found, wanted.detach())
    loss = elbo.differentiable_loss(program.model, guide, program.x)
    torch.testing.assert_close(-loss, wanted.sum())


def test_a_schedule_is_asked_for_the_weight_of_each_step() -> None:
    asked: list[int] = []

    def beta(step: int) -> float:
        asked.append(step)
        return min(1.0, 0.1 * step)

    vae = small()
    fit(vae, X, elbo=elbos.BetaELBO(beta=beta), batch_size=25, max_epochs=3)
    assert sorted(set(asked))[:6] == [0, 1, 2, 3, 4, 5]
    asked.clear()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), elbos.BetaELBO(beta=beta))
    for _ in range(3):
        svi.step(X)
        svi.evaluate_loss(X)
    assert asked == [0, 1, 1, 2, 2, 3]


def climbing(step: int) -> float:
    return min(1.0, 0.1 + 0.05 * step)


def test_a_schedule_goes_on_over_a_resumed_fit(tmp_path: Path) -> None:
    whole, broken, restarted = small(), small(), small()
    options = {"batch_size": 10, "lr": 0.01}
    fit(whole, X, elbo=elbos.BetaELBO(beta=climbing), max_epochs=4, **options)
    path = tmp_path / "fit.safetensors"
    for program, epochs in ((broken, 2), (restarted, 4)):
        elbo = elbos.BetaELBO(beta=climbing)
        fit(program, X, elbo=elbo, max_epochs=epochs, checkpoint=path, resume=True, **options)
    assert_same(weights(restarted), weights(whole))
    constant = small()
    fit(constant, X, elbo=elbos.BetaELBO(beta=0.1), max_epochs=4, **options)
    after = weights(constant)
    assert not any(torch.equal(value, after[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize("name", TAKES_KL)
def test_directions_under_a_weight(name: str) -> None:
    elbo = ESTIMATORS[name]()
    keeps = elbo.is_linear and not isinstance(elbo, elbos.BetaELBO)
    if keeps and elbo.direction == "lower bound":
        assert elbos.BetaELBO(beta=2.0, elbo=elbo).direction == "lower bound"
    assert elbos.BetaELBO(beta=0.5, elbo=elbo).direction == "no bound"
    assert elbos.BetaELBO(beta=climbing, elbo=elbo).direction == "no bound"


# Sites without rsample


class Drawn(nn.Module):
    """One latent of each row, from distributions that are handed over."""

    def __init__(self, prior: Callable[[], Any], posterior: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.slope = nn.Parameter(torch.tensor(0.3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.slope * z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(self.slope * x))


def mixture(loc: Tensor) -> Any:
    parts = dist.Normal(torch.stack([loc, -loc], -1), 1.0)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(*loc.shape, 2)), parts)


WITHOUT_RSAMPLE: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Any]]] = {
    "categorical": (
        lambda: dist.Categorical(torch.ones(3)),
        lambda loc: dist.Categorical(logits=torch.stack([loc, -loc, 0 * loc], -1)),
    ),
    "Gamma without rsample": (
        lambda: dist.Gamma(2.0, 1.0),
        lambda loc: dist.Gamma(loc.exp(), 1.0).has_rsample_(False),
    ),
    "mixture": (lambda: dist.Normal(0.0, 1.0), mixture),
}


@pytest.mark.parametrize("latent", WITHOUT_RSAMPLE)
@pytest.mark.parametrize("name", NEEDS_RSAMPLE)
def test_a_site_without_rsample_is_refused(name: str, latent: str) -> None:
    program, x, elbo = Drawn(*WITHOUT_RSAMPLE[latent]), torch.randn(6), ESTIMATORS[name]()
    before, generator = weights(program), torch.get_rng_state()
    said = (
        r"draws every latent site by rsample, under .*; got z without rsample.*: Trace_ELBO, Trace"
    )
    with pytest.raises(ValueError, match=said):
        fit(program, x, elbo=elbo, seed=None)
    assert_same(weights(program), before)
    assert torch.equal(torch.get_rng_state(), generator)
    for validates in (True, False):
        with pyro.validation_enabled(validates), pytest.raises(ValueError, match=said) as refused:
            elbo.estimate(program.model, program.guide, x)
    offered = str(refused.value).split(": ")[-1].removesuffix(".")
    kinds = {type(ESTIMATORS[able]()).__name__ for able in TAKES_DISCRETE} - {"BetaELBO"}
    assert set(offered.replace(" and ", ", ").split(", ")) == kinds


@pytest.mark.parametrize("latent", WITHOUT_RSAMPLE)
@pytest.mark.parametrize("name", TAKES_DISCRETE)
def test_a_site_without_rsample_that_is_taken(name: str, latent: str) -> None:
    program, x, elbo = Drawn(*WITHOUT_RSAMPLE[latent]), torch.randn(6), ESTIMATORS[name]()
    assert elbo.estimate(program.model, program.guide, x).loss.isfinite()
    before = weights(program)
    fit(program, x, elbo=elbo, lr=0.01)
    assert not torch.equal(program.slope, before["slope"])


@pytest.mark.parametrize("name", ["VIMCO", "RWS", "TVO", "Trace_ELBO", "TraceGraph_ELBO"])
def test_a_discrete_vae_trains(name: str) -> None:
    prior = dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)
    vae = small(prior=prior, posterior=dist.Bernoulli)
    before = dict(vae.named_parameters())
    before = {key: value.detach().clone() for key, value in before.items()}
    fit(vae, X, elbo=ESTIMATORS[name](), lr=0.01)
    assert [n for n, value in vae.named_parameters() if torch.equal(value, before[n])] == []


def test_what_is_summed_out_of_the_model_has_no_objective_of_each_row() -> None:
    program = Discrete()
    model = pyro.infer.config_enumerate(program.model)

    def guide(x: Tensor) -> None:
        """Draws nothing."""

    with pytest.raises(ValueError, match="^Expected latent sites that the guide has"):
        elbos.TraceEnum_ELBO(max_plate_nesting=1).per_row(Pair(program, model, guide), program.x)


# Arguments


BAD: dict[str, Callable[[], Any]] = {
    "no particles": lambda: elbos.IWAE(0),
    "half a particle": lambda: elbos.DReG(2.5),
    "true": lambda: elbos.STL(True),
    "one of VIMCO": lambda: elbos.VIMCO(1),
    "one of RWS": lambda: elbos.RWS(1),
    "one of TVO": lambda: elbos.TVO(1),
    "alpha 1": lambda: elbos.Renyi(3, alpha=1.0),
    "alpha nan": lambda: elbos.Renyi(3, alpha=math.nan),
    "no bounds": lambda: elbos.MIWAE(0, 3),
    "no draws": lambda: elbos.PIWAE(3, 0),
    "share above 1": lambda: elbos.CIWAE(3, beta=1.5),
    "negative share": lambda: elbos.CIWAE(3, beta=-0.1),
    "order below 1": lambda: elbos.CUBO(3, order=0.5),
    "order 1": lambda: elbos.CUBO(3, order=1.0),
    "one draw": lambda: elbos.CUBO(1),
    "an estimator as beta": lambda: elbos.BetaELBO(beta=elbos.STL()),
    "a class as beta": lambda: elbos.BetaELBO(beta=elbos.STL),
    "a kernel of 3": lambda: elbos.MMD(weight=1.0, kernel=3),
    "a word for a point": lambda: elbos.TVO(3, first_beta="a"),
    "a point of nothing": lambda: elbos.TVO(3, first_beta=1e-320),
    "no number of Trace_ELBO": lambda: elbos.Trace_ELBO(True),
    "negative beta": lambda: elbos.BetaELBO(beta=-1.0),
    "infinite beta": lambda: elbos.BetaELBO(beta=math.inf),
    "Pyro's inside": lambda: elbos.BetaELBO(beta=1.0, elbo=pyro.infer.Trace_ELBO()),
    "a class inside": lambda: elbos.BetaELBO(beta=1.0, elbo=elbos.Trace_ELBO),
    "negative nats": lambda: elbos.FreeBits(nats=-0.1),
    "negative correlation": lambda: elbos.TotalCorrelation(beta=-1.0),
    "no rows": lambda: elbos.TotalCorrelation(beta=1.0, num_rows=0),
    "negative weight": lambda: elbos.MMD(weight=-1.0),
    "a point of 0": lambda: elbos.TVO(3, first_beta=0.0),
    "no pieces": lambda: elbos.TVO(3, num_partitions=0),
    "no particles of Pyro's": lambda: elbos.TraceEnum_ELBO(0),
    "no particles of mean field": lambda: elbos.TraceMeanField_ELBO(0),
    "a word": lambda: elbos.IWAE("3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected .*; got "):
        BAD[name]()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_its_repr_makes_it_again(name: str) -> None:
    elbo = ESTIMATORS[name]()
    made = member(repr(elbo), "ELBO")
    assert type(made) is type(elbo)
    assert made.num_particles == elbo.num_particles
    assert repr(made) == repr(copy.copy(elbo)) == repr(elbo)
    assert elbo.direction in ("lower bound", "no bound", "upper bound as num_particles grows")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_number_of_draws_alone_is_positional(name: str) -> None:
    parameters = inspect.signature(type(ESTIMATORS[name]())).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert set(by_position) <= {"num_bounds", "num_particles"}


def test_a_point_mass_has_no_double_reparameterisation() -> None:
    vae = pv.VAE((4,), 2, pv.likelihoods.Normal(), pv.posteriors.Delta(), seed=0)
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="point mass at z. IWAE and STL accept it"):
        elbos.DReG(3).estimate(vae.model, vae.guide, x)
    assert elbos.STL(3).loss(vae.model, vae.guide, x).isfinite()


def test_a_draw_of_weight_0_leaves_vimco_finite() -> None:
    log_weights = torch.tensor([[-1.0], [-2.0], [-math.inf]], dtype=torch.float64)
    weights = elbos.VIMCO(3).weights(log_weights)
    assert weights.model.isfinite().all()
    assert weights.guide.isfinite().all()


class Masked(nn.Module):
    """A normal latent site, masked in every second row, in the guide as well or not."""

    def __init__(self, *, in_guide: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))
        self.in_guide = in_guide

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) % 2 == 0):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        mask = torch.arange(len(x)) % 2 == 0 if self.in_guide else torch.ones(len(x)) == 1
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(self.loc.expand(2), 0.7).to_event(1))


@pytest.mark.parametrize("in_guide", [True, False])
def test_masks_of_model_and_guide_are_heeded_each(in_guide: bool) -> None:  # noqa: FBT001
    program, x = Masked(in_guide=in_guide), torch.randn(4)
    wanted = elbos.Trace_ELBO(100).per_row(program, x, num_repeats=50)
    found = elbos.FreeBits(100, nats=0.0).per_row(program, x, num_repeats=50)
    if in_guide:
        error = (wanted.mcse**2 + found.mcse**2).sqrt() + 1e-9
        assert ((found.value - wanted.value).abs() / error).max() < 4.5
    else:  # no threshold binds, but the mean over rows of what is drawn is below 0 there
        assert (found.value <= wanted.value + 4.5 * (wanted.mcse + found.mcse)).all()
    for elbo in (elbos.TotalCorrelation(beta=1.0), elbos.MMD(weight=1.0)):
        with pytest.raises(ValueError, match="Expected no mask on 'z'"):
            elbo.estimate(program.model, program.guide, x)


def test_the_aggregate_needs_rows() -> None:
    vae = small()
    for elbo in (elbos.TotalCorrelation(beta=6.0, num_rows=60000), elbos.MMD(weight=1.0)):
        with pytest.raises(ValueError, match="at least 2 rows"):
            elbo.estimate(vae.model, vae.guide, X[:1])
    with pytest.raises(ValueError, match="num_rows to be at least the 50 rows"):
        elbos.TotalCorrelation(beta=6.0, num_rows=10).estimate(vae.model, vae.guide, X)


class Scalar(nn.Module):
    """A latent site of shape ()."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.loc, 0.7))


@pytest.mark.parametrize(
    "elbo", [elbos.TotalCorrelation(beta=1.0), elbos.MMD(weight=1.0)], ids=str
)
def test_a_scalar_latent_has_an_aggregate(elbo: Estimator) -> None:
    program = Scalar()
    elbo(program.model, program.guide)(torch.randn(6)).backward()
    assert program.loc.grad.isfinite()


def test_per_row_reads_and_checks_rows_as_others_do() -> None:
    vae, elbo = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0), elbos.IWAE(3)
    assert elbo.per_row(vae, np.ones((5, 4))).value.shape == (5,)
    for bad in (torch.full((5, 4), 0.3), torch.full((5, 4), math.nan), torch.ones(0, 4)):
        with pytest.raises(ValueError, match=r"^Expected "):
            elbo.per_row(vae, bad)
    assert elbo.per_row(vae, np.ones((5, 4)), seed=3).value.equal(
        elbo.per_row(vae, torch.ones(5, 4), seed=3).value
    )
    with pytest.raises(ValueError, match=r"with the methods model\(x\) and guide\(x\); got metho"):
        elbo.per_row(vae.model, torch.ones(5, 4))


def test_a_schedule_gives_numbers() -> None:
    vae = small()
    for schedule in (lambda step: -1.0, lambda step: None, lambda step: "a"):
        with pytest.raises(ValueError, match="Expected beta to be a finite number"):
            elbos.BetaELBO(beta=schedule).estimate(vae.model, vae.guide, X)


def test_a_class_is_not_an_estimator() -> None:
    with pytest.raises(ValueError, match=r"Expected an estimator, as STL\(...\); got the class"):
        fit(small(), X, elbo=elbos.STL)
