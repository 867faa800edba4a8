"""Any Pyro distribution as a likelihood: issue acceptance 4, links, words on parameters."""

import copy
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from cases import CLASS_ALONE, DISTRIBUTIONS, Case
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import Predicted, Shared
from pyro_vae.distributions import Family
from pyro_vae.distributions.links import link_of, named_links
from pyro_vae.distributions.starts import STARTS
from pyro_vae.likelihoods import Family as Likelihood

ROWS = 4


def built(case: Case, *lead: int) -> tuple[Any, Tensor]:
    features = torch.randn(ROWS, 5, dtype=case.dtype)
    return case.make().build(case.event_shape, features), features.expand(*lead, ROWS, 5)


def each(table: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table)


def test_the_table_is_as_long_as_was_asked() -> None:
    assert len(CLASS_ALONE) == len(set(CLASS_ALONE))
    assert len(DISTRIBUTIONS) >= 45


@each(DISTRIBUTIONS)
def test_samples_and_scores(case: Case) -> None:
    family, features = built(case, 7)
    distribution = family(features)
    assert distribution.batch_shape == (7, ROWS)
    assert distribution.event_shape == case.event_shape
    x = distribution.sample()
    assert x.shape == (7, ROWS, *case.event_shape)
    log_prob = family(features[0]).log_prob(x)
    assert log_prob.shape == (7, ROWS)
    torch.testing.assert_close(log_prob, distribution.log_prob(x))
    assert log_prob.isfinite().all()


@each(DISTRIBUTIONS)
def test_has_a_gradient_in_every_parameter(case: Case) -> None:
    family, features = built(case, 20)
    x = family(features).sample().detach()
    family(features).log_prob(x).sum().backward()
    words = family.heads.keys() | family.shared.keys()
    assert words
    for name, parameter in family.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


UNPLACED = ("LKJ", "SoftAsymmetricLaplace")
"""Those of Pyro 1.9 whose expand() raises, so that they cannot stand in a plate."""


@pytest.mark.parametrize("name", UNPLACED)
def test_what_cannot_stand_in_a_plate_is_refused(name: str) -> None:
    case = DISTRIBUTIONS[name]
    with pytest.raises(ValueError, match="likelihood that works in a plate"):
        pv.VAE(case.event_shape, 2, case.make())


@each({name: case for name, case in DISTRIBUTIONS.items() if name not in UNPLACED})
def test_saves_and_loads(case: Case, tmp_path: Path) -> None:
    vae = pv.VAE(case.event_shape, 2, case.make(), None, pv.networks.MLP(5), pv.networks.MLP(5))
    z = torch.randn(ROWS, 2)
    x = vae.decode(z).sample().detach()
    loaded = pv.load(pv.save(vae, tmp_path / "vae"))
    assert loaded is not vae
    assert torch.equal(loaded.decode(z).log_prob(x), vae.decode(z).log_prob(x))
    assert repr(loaded.likelihood) == repr(vae.likelihood)


@each(DISTRIBUTIONS)
def test_checks_its_own_draws(case: Case) -> None:
    family, features = built(case)
    with torch.no_grad():
        family.check(family(torch.zeros_like(features)).sample())


def widened(case: Case) -> Case:
    return case._replace(event_shape=(2, *case.event_shape))


SCALAR_WORDS = {
    name: case
    for name, case in DISTRIBUTIONS.items()
    if not name.startswith(("Mixture", "SineBivariate"))
}


@each(SCALAR_WORDS)
def test_events_of_one_more_dim_are_scored_together(case: Case) -> None:
    family, features = built(widened(case))
    distribution = family(features)
    assert distribution.batch_shape == (ROWS,)
    assert distribution.event_shape == (2, *case.event_shape)
    x = distribution.sample()
    assert distribution.log_prob(x).shape == (ROWS,)
    inner = distribution.base_dist.log_prob(x)
    torch.testing.assert_close(inner.reshape(ROWS, -1).sum(1), distribution.log_prob(x))


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda: Likelihood(dist.Normal),
        lambda: Likelihood(dist.Beta),
        lambda: pv.likelihoods.Binomial(total_count=4),
        lambda: pv.likelihoods.Categorical(5),
        lambda: Likelihood(dist.OrderedLogistic, cutpoints=Predicted(shape=3)),
        lambda: Likelihood(dist.StudentT, df=4.0, scale=Shared()),
        lambda: Likelihood(dist.Normal, scale=Shared(scalar=True)),
    ],
    ids=["normal", "beta", "binomial", "categorical", "ordinal", "student", "scalar"],
)
@pytest.mark.parametrize("event", [(6, 7), (3, 6, 7), (7,)])
def test_features_of_images_give_each_pixel_its_parameters(
    likelihood: Any, event: tuple[int, ...]
) -> None:
    channels = 4
    features = torch.randn(2, channels, *event[-2:])
    family = likelihood().build(event, features)
    one = family(features)
    assert (one.batch_shape, one.event_shape) == ((2,), event)
    moved = torch.roll(features, 1, -1)
    x = one.sample()
    if not any(word.scalar is False for word in shared_words(family)):
        torch.testing.assert_close(
            family(moved).log_prob(torch.roll(x, 1, -1)), one.log_prob(x), rtol=1e-4, atol=1e-4
        )


def test_each_pixel_is_a_linear_map_of_its_own_features() -> None:
    features = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    normal = Likelihood(dist.Normal, scale=1.0).build((3, 6, 7), features)
    linear = normal.heads["loc"].linear
    expected = torch.einsum("ck,nkij->ncij", linear.weight, features)
    expected += linear.bias[:, None, None]
    torch.testing.assert_close(normal(features).base_dist.loc, expected)
    coded = pv.likelihoods.Categorical(5).build((3, 6, 7), features)
    linear = coded.heads["logits"].linear
    weight, bias = linear.weight.reshape(3, 5, 4), linear.bias.reshape(3, 1, 1, 5)
    expected = torch.einsum("cmk,nkij->ncijm", weight, features) + bias
    found = coded(features).base_dist.logits
    torch.testing.assert_close(found, expected.log_softmax(-1))


OUTSIDE: dict[str, tuple[Likelihood, list[float]]] = {
    "grey under Bernoulli": (pv.likelihoods.Bernoulli(), [0.0, 0.5, 1.0]),
    "two under Bernoulli": (pv.likelihoods.Bernoulli(), [0.0, 2.0, 1.0]),
    "above the total": (pv.likelihoods.Binomial(4), [0.0, 5.0, 1.0]),
    "above a column's total": (
        pv.likelihoods.BetaBinomial(torch.tensor([4, 4, 2])),
        [0.0, 4.0, 3.0],
    ),
    "half a count": (pv.likelihoods.Poisson(), [0.0, 2.5, 1.0]),
    "half a binomial count": (pv.likelihoods.Binomial(4), [0.0, 2.5, 1.0]),
    "negative count": (pv.likelihoods.NegativeBinomial(), [0.0, -1.0, 1.0]),
    "a code too many": (pv.likelihoods.Categorical(5), [0.0, 5.0, 1.0]),
    "half a code": (pv.likelihoods.Categorical(5), [0.0, 0.5, 1.0]),
    "zero under LogNormal": (pv.likelihoods.LogNormal(), [0.0, 0.5, 1.0]),
    "negative under Gamma": (pv.likelihoods.Gamma(), [-0.1, 0.5, 1.0]),
    "over one": (pv.likelihoods.ContinuousBernoulli(), [0.0, 0.5, 1.1]),
    "a short total": (Likelihood(dist.Multinomial, total_count=5), [1.0, 2.0, 1.0]),
    "fractions of a total": (Likelihood(dist.Multinomial, total_count=5), [1.5, 2.5, 1.0]),
    "off the simplex": (Likelihood(dist.Dirichlet), [0.5, 0.5, 0.5]),
    "two at once": (Likelihood(dist.OneHotCategorical), [1.0, 1.0, 0.0]),
    "off the sphere": (Likelihood(dist.ProjectedNormal), [1.0, 1.0, 0.0]),
    "a share of nothing": (pv.likelihoods.Beta(), [0.0, 0.5, 0.9]),
    "a share of all": (pv.likelihoods.Beta(), [0.3, 0.5, 1.0]),
    "zero under Gamma": (pv.likelihoods.Gamma(), [0.0, 0.5, 1.0]),
    "a part of nothing": (Likelihood(dist.Dirichlet), [0.0, 0.5, 0.5]),
    "the open end": (Likelihood(dist.Uniform, low=0.0, high=2.0), [0.0, 1.0, 2.0]),
    "below a fixed bound": (Likelihood(dist.Pareto, scale=1.0), [0.5, 2.0, 3.0]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_the_support_are_refused(name: str) -> None:
    likelihood, row = OUTSIDE[name]
    features = torch.randn(4, 5)
    family = likelihood.build((3,), features)
    x = family(features).sample().float()
    family.check(x)
    x[2] = torch.tensor(row)
    with pytest.raises(ValueError, match=r"in the support of .* row 2\W.*\(1 of 4 rows\)"):
        family.check(x)


SAID = {
    "0 or 1 (binarize grey levels, or use ContinuousBernoulli or Beta); got 0.5": (
        pv.likelihoods.Bernoulli(),
        0.5,
    ),
    "Binomial, integers from 0 to 16; got 17.0": (pv.likelihoods.Binomial(16), 17.0),
    "Poisson, integers >= 0; got -1.0": (pv.likelihoods.Poisson(), -1.0),
    "Beta, values in (0, 1); got 1.5": (pv.likelihoods.Beta(), 1.5),
    "or has no bound there); got -2.0": (pv.likelihoods.Gamma(), -2.0),
    "LogNormal, values > 0; got -2.0": (pv.likelihoods.LogNormal(), -2.0),
    "(0, 1) (the log-density is infinite at 0.0); got 0.0": (pv.likelihoods.Beta(), 0.0),
    "without NaN (missing values); got NaN": (pv.likelihoods.Normal(), float("nan")),
    "finite data; got -inf": (pv.likelihoods.Normal(), float("-inf")),
}


@pytest.mark.parametrize("said", SAID)
def test_a_refusal_names_the_value_and_its_column(said: str) -> None:
    likelihood, value = SAID[said]
    features = torch.randn(4, 5)
    family = likelihood.build((6,), features)
    x = family(features).sample().float()
    x[1:, 4] = value
    with pytest.raises(ValueError, match="Expected .*; got ") as error:
        family.check(x)
    assert f"{said} in row 1, column 4 (3 of 4 rows)." in str(error.value)
    images = likelihood.build((1, 6), features)
    with pytest.raises(ValueError, match=r"column \[0, 4\] \(3 of 4 rows"):
        images.check(x[:, None])


@pytest.mark.parametrize(
    "likelihood",
    [
        pv.likelihoods.ContinuousBernoulli(),
        pv.likelihoods.Beta(concentration1=1.0, concentration0=1.0),
        Likelihood(dist.Exponential),
        Likelihood(dist.HalfNormal),
    ],
    ids=["continuous Bernoulli", "flat beta", "exponential", "half-normal"],
)
def test_edges_of_finite_density_are_kept(likelihood: Likelihood) -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]]).expand(4, 3)
    likelihood.build((3,), torch.randn(4, 5)).check(x)


@pytest.mark.parametrize("name", ["Pareto", "Uniform", "AffineBeta", "GeneralizedPareto"])
def test_learned_bounds_refuse_nothing_finite(name: str) -> None:
    family, features = built(DISTRIBUTIONS[name])
    x = 100.0 * torch.randn(ROWS, 3, dtype=features.dtype)
    family.check(x)
    with torch.no_grad():
        family.check(x)


def shared_words(family: Family) -> list[Shared]:
    return [word for word in family.specs.values() if isinstance(word, Shared)]


def test_features_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"End the network with nn.Flatten\(\)"):
        Likelihood(dist.Normal).build((3, 6, 7), torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="no features to predict"):
        Likelihood(dist.Normal).build((3,))
    with pytest.raises(ValueError, match="pixel by pixel"):
        Likelihood(dist.Dirichlet, concentration=Predicted(shape=3)).build(
            (4, 6), torch.randn(2, 5, 6)
        )


POSITIVE = ["Beta", "Gamma", "LogNormal", "NegativeBinomial", "Normal", "Poisson", "StudentT"]
POSITIVE += ["Weibull", "InverseGamma", "MultivariateNormal", "LowRankMultivariateNormal"]
POSITIVE += ["ZeroInflatedPoisson"]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_sixty_fresh_networks_give_parameters_in_the_open(name: str, factor: float) -> None:
    event = 6
    for seed in range(5):
        torch.manual_seed(seed)
        network = pv.networks.MLP(32, 32)
        features = network(factor * torch.randn(64, event)).detach()
        assert_open(DISTRIBUTIONS[name].make().build((event,), features), features)


def assert_open(family: Family, features: Tensor) -> None:
    for name, value in family._values(features).items():
        if not isinstance(value, Tensor) or family.constraints[name] is dist.constraints.real:
            continue
        assert value.isfinite().all(), name
        if family.constraints[name] is dist.constraints.positive:
            assert (value > 0).all(), name
        if name == "scale_tril":
            assert (value.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("seed", range(60))
def test_sixty_fresh_vaes_with_large_inputs_score_finitely(seed: int) -> None:
    vae = pv.VAE(
        (20,),
        4,
        Likelihood(dist.Normal),
        encoder=pv.networks.MLP(32, 32),
        decoder=pv.networks.MLP(32, 32),
        seed=seed,
    )
    torch.manual_seed(seed)
    x = 100.0 * torch.randn(16, 20)
    posterior = vae.encode(x)
    assert (posterior.base_dist.scale > 0).all()
    z = posterior.rsample()
    likelihood = vae.decode(z)
    assert (likelihood.base_dist.scale > 0).all()
    log_weights = likelihood.log_prob(x) - posterior.log_prob(z)
    log_weights.sum().backward()
    assert log_weights.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("name", named_links())
def test_named_links(name: str) -> None:
    link = link_of(dist.constraints.real, name)
    x = torch.linspace(-200.0, 200.0, 401)
    y = link(x)
    assert y.isfinite().all()
    if name in ("log", "softplus"):
        assert (y > 0).all()
    near = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(link.inv(link(near)), near, rtol=1e-8, atol=1e-8)
    slope = torch.autograd.grad(link(near).sum(), near)[0]
    torch.testing.assert_close(link.log_abs_det_jacobian(near, link(near)).exp(), slope)


def test_a_link_does_what_its_name_says() -> None:
    features = torch.randn(5, 4)
    family = Likelihood(dist.Poisson, rate=Predicted(link="log")).build((2,), features)
    predictor = family.heads["rate"](features)
    torch.testing.assert_close(family(features).base_dist.rate, predictor.exp())
    family = Likelihood(dist.Poisson, rate=Predicted(link=dist.transforms.ExpTransform()))
    assert family.build((2,), features)(features).base_dist.rate.shape == (5, 2)
    with pytest.raises(ValueError, match="perhaps 'softplus'; got 'softpluss'"):
        Likelihood(dist.Poisson, rate=Predicted(link="softpluss")).build((2,), features)


@pytest.mark.parametrize(
    ("distribution", "name", "init"),
    [
        (dist.Normal, "scale", 0.3),
        (dist.Normal, "loc", -2.0),
        (dist.StudentT, "df", 4.0),
        (dist.Gamma, "concentration", 1e-4),
        (dist.Gamma, "rate", 1e4),
        (dist.Bernoulli, "probs", 0.25),
    ],
)
@pytest.mark.parametrize("scalar", [False, True])
def test_shared_starts_where_it_is_told(
    distribution: Any, name: str, init: float, scalar: bool
) -> None:
    features = torch.randn(4, 5, dtype=torch.float64)
    word = Shared(init=init, scalar=scalar)
    family = Likelihood(distribution, **{name: word}).build((3,), features)
    assert family.shared[name].numel() == (1 if scalar else 3)
    assert family.shared[name].dtype == torch.float64
    value = getattr(family(features).base_dist, name)
    torch.testing.assert_close(value, torch.full_like(value, init), rtol=1e-9, atol=1e-12)


def test_shared_starts_each_element_where_it_is_told() -> None:
    init = torch.tensor([0.1, 1.0, 10.0])
    family = Likelihood(dist.Normal, scale=Shared(init=init)).build((3,), torch.randn(4, 5))
    torch.testing.assert_close(family(torch.randn(4, 5)).base_dist.scale, init.expand(4, 3))


@pytest.mark.parametrize(
    ("distribution", "name", "init"),
    [
        (dist.MultivariateNormal, "scale_tril", torch.eye(3) + 0.3 * torch.ones(3, 3).tril(-1)),
        (dist.MultivariateNormal, "covariance_matrix", torch.eye(3) + 0.2),
        (dist.OneHotCategorical, "probs", torch.tensor([0.2, 0.3, 0.5])),
        (dist.Dirichlet, "concentration", torch.tensor([0.5, 1.0, 7.0])),
    ],
    ids=["factor", "covariance", "simplex", "vector"],
)
@pytest.mark.parametrize("event", [(3,), (2, 3)])
def test_shared_starts_vectors_and_matrices_where_it_is_told(
    distribution: Any, name: str, init: Tensor, event: tuple[int, ...]
) -> None:
    features = torch.randn(4, 5)
    family = Likelihood(distribution, **{name: Shared(init=init)}).build(event, features)
    found = family(features)
    value = getattr(found.base_dist if len(event) == 2 else found, name)
    torch.testing.assert_close(value, init.expand(value.shape))
    assert value.shape[: len(event)] == (4, *event[:-1])


def test_shared_cannot_start_outside() -> None:
    features = torch.randn(4, 5)
    for init in (-1.0, 0.0, torch.zeros(2), float("nan")):
        with pytest.raises(ValueError, match="init of scale"):
            Likelihood(dist.Normal, scale=Shared(init=init)).build((3,), features)
    for init in (0.5, -torch.eye(3), torch.ones(3, 3)):
        with pytest.raises(ValueError, match="init of scale_tril inside"):
            Likelihood(dist.MultivariateNormal, scale_tril=Shared(init=init)).build((3,), features)


def test_a_shared_vector_is_shared_by_rows_and_elements_alike() -> None:
    features = torch.randn(4, 5)
    family = pv.likelihoods.Categorical(logits=Shared(shape=5)).build((3,), features)
    assert family.shared["logits"].shape == (3, 5)
    logits = family(features).base_dist.logits
    assert logits.shape == (4, 3, 5)
    assert (logits[0] == logits[1]).all()


def test_fixed_numbers_stay_exact_under_double() -> None:
    features = torch.randn(4, 5)
    family = Likelihood(dist.StudentT, df=4.1, scale=torch.tensor([0.1, 0.2, 0.3])).build(
        (3,), features
    )
    family.double()
    base = family(features.double()).base_dist
    assert base.df.dtype == torch.float64
    assert (base.df == 4.1).all()
    assert base.scale.dtype == torch.float64
    count = pv.likelihoods.Binomial(total_count=16).build((3,), features).double()
    assert count(features.double()).base_dist.total_count.eq(16).all()
    assert "fixed_scale" in dict(family.named_buffers())


def test_fixed_tensors_are_copied_and_counts_stay_counts() -> None:
    total, features = torch.tensor([1, 2, 3]), torch.randn(4, 5)
    family = pv.likelihoods.Binomial(total_count=total).build((3,), features)
    total += 10
    assert family(features).base_dist.total_count[0].tolist() == [1, 2, 3]
    assert (family(features).sample((50,)).amax((0, 1)) <= torch.tensor([1, 2, 3])).all()


@pytest.mark.parametrize(
    "name",
    ["Binomial", "Multinomial", "BetaBinomial", "DirichletMultinomial", "ExtendedBinomial"]
    + ["ExtendedBetaBinomial"],
)
def test_counts_are_mandatory(name: str) -> None:
    with pytest.raises(ValueError, match=r"total_count of \w+ is missing: pass it by name"):
        Likelihood(getattr(dist, name))


@pytest.mark.parametrize(
    ("distribution", "wrong", "near"),
    [
        (dist.Normal, "scal", "scale"),
        (dist.Bernoulli, "logit", "logits"),
        (dist.Gamma, "concentraton", "concentration"),
        (dist.Binomial, "total", "total_count"),
        (dist.StudentT, "sigma", None),
    ],
)
def test_wrong_names_are_refused_with_a_near_one(
    distribution: Any, wrong: str, near: str | None
) -> None:
    hint = f"perhaps '{near}'; got '{wrong}'" if near else f"]; got '{wrong}'"
    with pytest.raises(ValueError, match="Expected parameters of") as error:
        Likelihood(distribution, **{wrong: 1.0})
    assert hint in str(error.value)


@pytest.mark.parametrize("wrong", [[1.0], {"a": 1}, object(), Shared, nn.Linear(1, 1)])
def test_wrong_words_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected scale to be pv.Predicted\(\), pv.Shared\(\)"):
        Likelihood(dist.Normal, scale=wrong)


@pytest.mark.parametrize("wrong", [dist.Normal(0.0, 1.0), "Normal", nn.Linear, int, None])
def test_what_is_no_class_of_distributions_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a class of pyro.distributions; got"):
        Likelihood(wrong)


@pytest.mark.parametrize(
    ("distribution", "parameter"),
    [
        (dist.Categorical, "logits"),
        (dist.OrderedLogistic, "cutpoints"),
        (dist.LowRankMultivariateNormal, "cov_factor"),
    ],
)
def test_sizes_that_cannot_be_told_are_asked_for(distribution: Any, parameter: str) -> None:
    with pytest.raises(ValueError, match=rf"size of {parameter} .* {parameter}=Predicted\(shape"):
        Likelihood(distribution).build((3,), torch.randn(2, 4))


@pytest.mark.parametrize("name", ["LKJ", "MultivariateNormal", "Dirichlet"])
def test_events_of_too_few_dims_are_refused(name: str) -> None:
    case, few = DISTRIBUTIONS[name], DISTRIBUTIONS[name].make()
    depth = {"LKJ": 2}.get(name, 1)
    with pytest.raises(ValueError, match=f"at least {depth} dims"):
        few.build(case.event_shape[1:][: depth - 1], torch.randn(2, 4))


def test_a_torch_class_is_taken_for_pyros() -> None:
    assert Likelihood(torch.distributions.Normal).distribution is dist.Normal


class Normal(dist.Normal):
    """A user's own class, of the name of Pyro's."""


def test_a_class_of_the_users_own_is_kept() -> None:
    assert Likelihood(Normal).distribution is Normal


def test_alternatives_stand_for_each_other() -> None:
    features = torch.randn(4, 5)
    assert list(Likelihood(dist.Bernoulli).build((3,), features).heads) == ["logits"]
    probs = Likelihood(dist.Bernoulli, probs=Predicted()).build((3,), features)
    assert list(probs.heads) == ["probs"]
    full = Likelihood(dist.MultivariateNormal, covariance_matrix=torch.eye(3))
    assert list(full.build((3,), features).heads) == ["loc"]
    torch.testing.assert_close(full(features).covariance_matrix, torch.eye(3).expand(4, 3, 3))


def test_a_specification_is_no_family_yet() -> None:
    with pytest.raises(ValueError, match=r"Laplace.* has no layers yet: call build"):
        Likelihood(dist.Laplace)(torch.randn(2, 4))


@pytest.mark.parametrize("start", [31.0, -31.0, 1e9])
def test_the_log_link_has_a_gradient_beyond_its_bounds(start: float) -> None:
    link = link_of(dist.constraints.real, "log")
    x = torch.tensor(start, requires_grad=True)
    y = link(x)
    torch.testing.assert_close(y.log().item(), max(-30.0, min(start, 30.0)))
    assert torch.autograd.grad(y, x)[0] == y
    torch.testing.assert_close(link.log_abs_det_jacobian(x, y), y.log())


def test_a_fixed_tensor_keeps_its_dtype_until_it_is_cast() -> None:
    tenth = torch.full((2,), 0.1, dtype=torch.float64)
    prior = pv.priors.Family(dist.Normal, 2, loc=tenth)
    assert (prior().base_dist.loc == tenth).all()
    assert prior().log_prob(prior().sample()).dtype == torch.float64
    networks = {"encoder": nn.Linear(4, 3), "decoder": nn.Linear(2, 3)}
    normal = dist.Normal(tenth, 1.0).to_event(1)
    for given in (prior, normal, pv.priors.Family(dist.Normal, 2, loc=tenth, scale=1.0)):
        single = pv.VAE((4,), given, pv.likelihoods.Normal(), **networks)
        assert {p.dtype for p in single.state_dict().values()} == {torch.float32}
        assert single.sample(2).dtype == torch.float32
        doubles = {name: copy.deepcopy(network).double() for name, network in networks.items()}
        double = pv.VAE((4,), given, pv.likelihoods.Normal(), **doubles)
        assert (double.prior().base_dist.loc == tenth).all()


@pytest.mark.parametrize(
    ("likelihood", "value"),
    [
        (pv.likelihoods.Poisson(), -1.0),
        (pv.likelihoods.Poisson(), 0.5),
        (pv.likelihoods.Beta(), 1.0),
    ],
)
def test_the_value_that_is_refused_is_named(likelihood: Any, value: float) -> None:
    vae = pv.VAE((5,), 2, likelihood)
    x = torch.full((3, 5), 0.25) if value == 1.0 else torch.zeros(3, 5)
    x[1, 3] = value
    with pytest.raises(ValueError, match=rf"got {value} .*row 1"):
        vae.check(x)


@pytest.mark.parametrize("fixed", [{}, {"scale": 2.0}, {"concentration": 1.5}])
@pytest.mark.parametrize("name", ["Weibull", "Gamma"])
def test_positive_members_start_at_maximum_likelihood(name: str, fixed: dict[str, float]) -> None:
    if name == "Gamma" and "scale" in fixed:
        fixed = {"concentration": 0.5}
    torch.manual_seed(0)
    x = dist.Weibull(torch.tensor([2.0, 50.0]), 1.5).sample((4000,)).double()
    given = {key: torch.tensor(value).double() for key, value in fixed.items()}
    distribution = getattr(dist, name)
    found = STARTS[distribution](x, given)
    free = {key: found[key].clone().requires_grad_() for key in found if key not in fixed}
    distribution(**(given | free)).log_prob(x).mean(0).sum().backward()
    for key, value in free.items():
        assert (value.grad * value).abs().max() < 1e-3, key
