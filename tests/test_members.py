"""Laws 1 to 3 over every member: densities, draws, gradients, copies, files."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from cases import DECODERS, ENCODERS, LIKELIHOODS, POSTERIORS, PRIORS, Case, members
from pyro import poutine
from quadrature import grid, integral, mass_of, p_of_counts, p_of_line, p_of_plane, square
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

import pyro_vae as pv
from pyro_vae.distributions.densities import scored
from pyro_vae.distributions.links import base_of
from pyro_vae.elbos.log_densities import log_densities

DRAWS = 4000
P = 1e-4


def swapped(**members: Any) -> pv.VAE:
    """A small VAE, some of its members changed."""
    small = {
        "data": (3,),
        "prior": 2,
        "likelihood": pv.likelihoods.Normal(),
        "encoder": pv.networks.MLP(8, activation=nn.Tanh),
        "decoder": pv.networks.MLP(8, activation=nn.Tanh),
        "seed": 0,
    }
    return pv.VAE(**(small | members))


def of_images(case: Case, **networks: nn.Module) -> pv.VAE:
    return swapped(data=case.event_shape, **networks)


def vaes() -> dict[str, tuple[Callable[[], pv.VAE], Case]]:
    """Every member in a VAE, by its name."""
    table: dict[str, tuple[Callable[[], pv.VAE], Case]] = {}
    for role, cases in {
        "prior": PRIORS,
        "posterior": POSTERIORS,
        "likelihood": LIKELIHOODS,
    }.items():
        for name, case in cases.items():
            make = partial(
                lambda role, case: swapped(**case.beside, **{role: case.make()}), role, case
            )
            table[f"{role}-{name}"] = make, case
    for role, cases in {"encoder": ENCODERS, "decoder": DECODERS}.items():
        for name, case in cases.items():
            make = partial(lambda role, case: of_images(case, **{role: case.make()}), role, case)
            table[f"{role}-{name}"] = make, case
    return table


VAES = vaes()


@pytest.fixture(params=VAES)
def example(request: pytest.FixtureRequest) -> tuple[pv.VAE, Tensor]:
    make, case = VAES[request.param]
    vae = make()
    return vae, case.data((12, *vae.event_shape))


@pytest.mark.parametrize(
    ("room", "cases"),
    [
        (pv.priors, PRIORS),
        (pv.likelihoods, LIKELIHOODS),
        (pv.posteriors, POSTERIORS),
        (pv.networks, ENCODERS | DECODERS),
    ],
    ids=["priors", "likelihoods", "posteriors", "networks"],
)
def test_every_public_member_has_a_case(room: ModuleType, cases: dict[str, Case]) -> None:
    assert members(room) == cases.keys()


def each(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", table)


def likelihood_of(name: str, *event_shape: int) -> Distribution:
    features = torch.randn(1, 4, dtype=torch.float64)
    with torch.no_grad():
        return LIKELIHOODS[name].make().build(event_shape, features)(features)


DISCRETE = [n for n in LIKELIHOODS if base_of(likelihood_of(n, 1).support).is_discrete]
CONTINUOUS = [name for name in LIKELIHOODS if name not in DISCRETE]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_likelihoods_are_densities(name: str) -> None:
    distribution = likelihood_of(name, 1)
    line, mass = integral(distribution)
    assert abs(mass.sum() - 1) < 2e-5
    draws = distribution.expand((DRAWS,)).sample().flatten()
    assert p_of_line(draws, line, mass) > P


@pytest.mark.parametrize("name", CONTINUOUS)
def test_likelihoods_are_densities_in_the_plane(name: str) -> None:
    distribution = likelihood_of(name, 2)
    line = grid(distribution.support, 401)
    mass = mass_of(distribution.log_prob, *square(line))
    assert abs(mass.sum() - 1) < 1e-3
    assert p_of_plane(distribution.expand((DRAWS,)).sample(), line, mass) > P


@pytest.mark.parametrize("name", DISCRETE)
def test_likelihoods_are_mass_functions(name: str) -> None:
    distribution = likelihood_of(name, 1)
    upper = getattr(base_of(distribution.support), "upper_bound", 1)
    if name in ("Poisson", "NegativeBinomial"):
        upper = 400
    points = torch.arange(float(upper) + 1, dtype=torch.float64)
    mass = distribution.log_prob(points[:, None]).exp()
    assert abs(mass.sum() - 1) < 1e-9
    draws = distribution.expand((DRAWS,)).sample().flatten()
    assert p_of_counts(torch.bincount(draws.long(), minlength=len(points)).double(), mass) > P


@pytest.mark.parametrize("name", DISCRETE)
def test_events_are_scored_and_drawn_jointly(name: str) -> None:
    distribution = likelihood_of(name, 2, 2)
    draws = distribution.expand((DRAWS,)).sample()
    alone = distribution.base_dist.log_prob(draws).sum((-1, -2))
    torch.testing.assert_close(distribution.log_prob(draws), alone)
    noise = torch.corrcoef(draws.flatten(1).T)[~torch.eye(4, dtype=torch.bool)]
    assert noise.nan_to_num(0).abs().max() < 5 / DRAWS**0.5


def prior_of(vae: pv.VAE) -> Distribution:
    return poutine.trace(vae.model).get_trace(size=1).nodes["z"]["fn"]


@each(PRIORS)
def test_priors_are_densities(name: str) -> None:
    distribution = prior_of(swapped(prior=PRIORS[name].make()).double())
    assert (distribution.event_shape, distribution.batch_shape) == ((2,), (1,))
    assert_density_of_the_plane(distribution)


@each({name: case for name, case in POSTERIORS.items() if name != "Delta"})
def test_posteriors_are_densities(name: str) -> None:
    case = POSTERIORS[name]
    vae = swapped(**case.beside, posterior=case.make()).double()
    assert_density_of_the_plane(vae.encode(torch.randn(1, 3, dtype=torch.float64)))


def assert_density_of_the_plane(distribution: Distribution, support: Any = None) -> None:
    line = grid(support or distribution.support, 801)
    with torch.no_grad():
        mass = mass_of(lambda x: distribution.log_prob(x[..., None, :])[..., 0], *square(line))
        draws = distribution.expand((DRAWS, 1)).sample()[:, 0]
    assert abs(mass.sum() - 1) < 1e-4
    assert p_of_plane(draws, line, mass) > P


def test_a_delta_is_its_point() -> None:
    vae = swapped(posterior=pv.posteriors.Delta())
    point = vae.encode(torch.randn(4, 3))
    assert torch.equal(point.sample(), point.rsample())
    assert (point.log_prob(point.sample()) == 0).all()
    assert (point.log_prob(point.sample() + 1) == -torch.inf).all()


def logit(p: Tensor) -> Tensor:
    return p.log() - (1 - p).log()


def log_jacobian_of_sticks(z: Tensor) -> Tensor:
    rest = 1 - z.cumsum(-1)[..., :-1] + z[..., :-1]
    share = z[..., :-1] / rest
    return (share.log() + (1 - share).log() + rest.log()).sum(-1)


def sticks(z: Tensor) -> Tensor:
    rest = 1 - z.cumsum(-1)[..., :-1] + z[..., :-1]
    size = z.shape[-1] - 1
    return logit(z[..., :-1] / rest) + torch.arange(size, 0, -1, dtype=z.dtype).log()


Free = Callable[[Tensor], Tensor]
CARRIED: dict[str, tuple[Distribution, Free, Free]] = {
    "Gamma": (
        dist.Gamma(2.0, torch.ones(2)).to_event(1),
        torch.log,
        lambda z: z.log().sum(-1),
    ),
    "HalfNormal": (
        dist.HalfNormal(torch.ones(2)).to_event(1),
        torch.log,
        lambda z: z.log().sum(-1),
    ),
    "Beta": (
        dist.Beta(torch.tensor([2.0, 0.7]), 1.5).to_event(1),
        logit,
        lambda z: (z.log() + (1 - z).log()).sum(-1),
    ),
    "Uniform": (
        dist.Uniform(torch.tensor([-1.0, -1.0]), 3.0).to_event(1),
        lambda z: logit((z + 1) / 4),
        lambda z: ((z + 1).log() + (3 - z).log() - torch.tensor(4.0).double().log()).sum(-1),
    ),
    "Pareto": (
        dist.Pareto(torch.full((2,), 0.5), 2.0).to_event(1),
        lambda z: (z - 0.5).log(),
        lambda z: (z - 0.5).log().sum(-1),
    ),
    "Dirichlet": (dist.Dirichlet(torch.tensor([2.0, 1.0, 0.5])), sticks, log_jacobian_of_sticks),
}
REAL = {name: POSTERIORS[name] for name in ("Normal", "MultivariateNormal", "Family")}


@each(CARRIED)
@pytest.mark.parametrize("posterior", REAL)
def test_posteriors_are_carried_over_by_the_change_of_variables(name: str, posterior: str) -> None:
    prior, free, log_jacobian = CARRIED[name]
    vae = swapped(prior=prior, posterior=REAL[posterior].make()).double()
    assert vae.latent_shape == prior.event_shape
    x = torch.randn(5, 3, dtype=torch.float64)
    carried = vae.encode(x)
    assert (carried.batch_shape, carried.event_shape) == ((5,), prior.event_shape)
    z = carried.sample((7,))
    assert prior.support.check(z.float()).all()
    base = vae.posterior.base(vae.encoder(x))
    expected = base.log_prob(free(z)) - log_jacobian(z)
    torch.testing.assert_close(carried.log_prob(z), expected, rtol=1e-8, atol=1e-8)
    if name != "Dirichlet":
        assert_density_of_the_plane(vae.encode(x[:1]), prior.support)


def test_a_posterior_carried_to_the_simplex_is_a_density() -> None:
    vae = swapped(prior=CARRIED["Dirichlet"][0]).double()
    carried = vae.encode(torch.randn(1, 3, dtype=torch.float64))
    line = grid(dist.constraints.unit_interval, 301)
    shares, weights = square(line)
    first, second = shares[..., 0], shares[..., 1] * (1 - shares[..., 0])
    weights = weights * (1 - shares[..., 0])
    z = torch.stack([first, second, 1 - first - second], -1).clamp(min=1e-300)
    inside = z[..., 2] > 1e-12
    with torch.no_grad():
        log_prob = carried.log_prob(z[inside][:, None])[:, 0]
    assert abs((log_prob + weights[inside].log()).exp().sum() - 1) < 1e-4


def test_a_point_is_carried_over_and_scored() -> None:
    vae = swapped(prior=CARRIED["Gamma"][0], posterior=pv.posteriors.Delta())
    found = log_densities(vae, torch.randn(4, 3), 5)
    assert found.log_weights.isfinite().all()
    assert (found.values["z"][0] == found.values["z"][1]).all()


@each(CARRIED)
def test_carried_posteriors_train(name: str) -> None:
    vae = swapped(prior=CARRIED[name][0])
    x = torch.randn(6, 3)
    elbo = pv.elbos.Trace_ELBO(num_particles=3)
    elbo(vae.model, vae.guide)(x).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    assert vae.sample(4).isfinite().all()
    assert vae.reconstruct(x, num_samples=19)["mean"].notnull().all()


def test_a_gradient_reaches_every_parameter(example: tuple[pv.VAE, Tensor]) -> None:
    vae, x = example
    elbo = pv.elbos.Trace_ELBO(num_particles=20)
    elbo(vae.model, vae.guide)(x).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_each_parameter_is_registered_once(example: tuple[pv.VAE, Tensor]) -> None:
    vae, _ = example
    names = [name for name, _ in vae.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(map(id, vae.parameters())))
    stated = poutine.trace(vae.guide).get_trace(torch.zeros(2, *vae.event_shape)).param_nodes
    stated += poutine.trace(vae.model).get_trace(size=2).param_nodes
    assert len(set(stated)) == len(names)


def test_no_tensor_of_the_state_is_shared(example: tuple[pv.VAE, Tensor]) -> None:
    vae, _ = example
    places = [t.untyped_storage().data_ptr() for t in vae.state_dict().values()]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_copies_are_equal_and_share_nothing(
    example: tuple[pv.VAE, Tensor], again: Callable[[pv.VAE], pv.VAE]
) -> None:
    vae, x = example
    pv.elbos.Trace_ELBO()(vae.model, vae.guide)(x).backward()
    other = again(vae)
    assert_same(other, vae, x)
    assert not tensors(vae) & tensors(other)


def tensors(vae: pv.VAE) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*vae.parameters(), *vae.buffers())}


def assert_same(one: pv.VAE, other: pv.VAE, x: Tensor) -> None:
    z = other.encode(x).sample()
    assert torch.equal(one.encode(x).log_prob(z), other.encode(x).log_prob(z))
    assert torch.equal(one.decode(z).log_prob(x), other.decode(z).log_prob(x))
    assert torch.equal(one.sample(3, seed=1), other.sample(3, seed=1))
    assert repr(one) == repr(other)


def test_saved_and_loaded_it_is_the_same(example: tuple[pv.VAE, Tensor], tmp_path: Path) -> None:
    vae, x = example
    assert_same(pv.load(pv.save(vae, tmp_path / "vae")), vae, x)


def test_double_precision_is_all_or_nothing(example: tuple[pv.VAE, Tensor]) -> None:
    vae, x = example
    vae.double()
    assert {t.dtype for t in vae.state_dict().values() if t.is_floating_point()} <= {torch.float64}
    trace = poutine.trace(poutine.replay(vae.model, poutine.trace(vae.guide).get_trace(x)))
    nodes = trace.get_trace(x).nodes
    for site in ("z", "x"):
        assert nodes[site]["value"].dtype == torch.float64
        log_prob = nodes[site]["fn"].log_prob(nodes[site]["value"])
        assert (log_prob.dtype, log_prob.shape) == (torch.float64, (len(x),))
        assert log_prob.isfinite().all()


def test_two_vaes_of_the_same_members_share_no_weight() -> None:
    for role, cases in {
        "prior": PRIORS,
        "posterior": POSTERIORS,
        "likelihood": LIKELIHOODS,
    }.items():
        for name, case in cases.items():
            member = case.make()
            given = case.beside | {role: member}
            one, other = swapped(**given), swapped(**given)
            assert not tensors(one) & tensors(other), name
            assert not tensors(one) & {t.data_ptr() for t in member.parameters()}, name


def test_members_accept_their_data_and_refuse_the_rest(example: tuple[pv.VAE, Tensor]) -> None:
    vae, x = example
    vae.check(x)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[1].view(-1)[0] = wrong
        with pytest.raises(ValueError, match="row 1[,. ].*1 of 12 rows"):
            vae.check(bad)
    with pytest.raises(ValueError, match="event shape"):
        vae.check(x[..., :1])


Refused = tuple[Callable[[], Any], str]
NORMAL = pv.likelihoods.Normal()


class Returns(nn.Module):
    """A member of the user's own, that returns what it is told."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, features: Any = None) -> Any:
        return self.make(features)


def torchs(features: Any) -> Any:
    loc = torch.zeros(2) if features is None else torch.zeros(len(features), 3)
    return Independent(torch.distributions.Normal(loc, 1.0), 1)


def lost(features: Any) -> Any:
    return {}["loc"]


REFUSED: dict[str, Refused] = {
    "prior of torch": (
        lambda: swapped(prior=Returns(torchs)),
        "prior that returns a Pyro distribution; got .*take it from pyro.distributions",
    ),
    "likelihood of torch": (
        lambda: swapped(likelihood=Returns(torchs)),
        "likelihood that returns a Pyro distribution",
    ),
    "posterior of torch": (
        lambda: swapped(prior=3, posterior=Returns(torchs)),
        "posterior that returns a Pyro distribution",
    ),
    "likelihood of no plate": (
        lambda: swapped(likelihood=dist.SoftAsymmetricLaplace),
        "likelihood that works in a plate",
    ),
    "prior of no plate": (
        lambda: swapped(prior=Returns(lambda _: dist.LKJ(2, torch.tensor(1.0)))),
        "works in a plate|fit each other",
    ),
    "member of a lost name": (lambda: swapped(likelihood=Returns(lost)), "KeyError: 'loc'"),
    "scalar prior": (
        lambda: swapped(prior=dist.Normal(0.0, 1.0)),
        r"event shape \(\): write .expand\(\[1\]\).to_event\(1\)",
    ),
    "batch of priors": (
        lambda: swapped(prior=dist.Normal(0.0, torch.ones(2))),
        r"batch shape \(\); got \(2,\): write .to_event\(1\)",
    ),
    "class as prior": (lambda: swapped(prior=dist.Normal), "prior with its shape"),
    "name as prior": (
        lambda: swapped(prior="Normal"),
        "the prior to be a distribution.*latent size",
    ),
    "no latents": (lambda: swapped(prior=0), "positive sizes; got 0"),
    "specification as prior": (
        lambda: swapped(prior=NORMAL),
        "Expected a prior, a pyro_vae.Prior; got Normal.*has another role",
    ),
    "network as prior": (
        lambda: swapped(prior=nn.Identity()),
        "members .* do not fit each other",
    ),
    "transformed prior": (
        lambda: swapped(
            prior=dist.TransformedDistribution(
                dist.Normal(0.0, torch.ones(2)), [dist.transforms.ExpTransform()]
            ).to_event(1)
        ),
        r"cannot be read from it. Give a module whose forward\(\) returns it",
    ),
    "prior of another shape": (
        lambda: swapped(prior=pv.priors.Family(dist.Normal, 2, loc=torch.zeros(5))),
        "size of tensor",
    ),
    "predicted prior": (
        lambda: pv.priors.Family(dist.Normal, 2, loc=pv.Predicted()),
        "loc to be Shared or fixed",
    ),
    "pseudo-inputs of another shape": (
        lambda: swapped(prior=pv.priors.VampPrior(3, 2, torch.rand(10, 4))),
        r"have event shape \(3,\).*got \(4,\)",
    ),
    "few rows for pseudo-inputs": (
        lambda: pv.priors.VampPrior(11, 2, torch.rand(10, 4)),
        "at least 11 rows",
    ),
    "no components": (lambda: pv.priors.Mixture(0, 2), "positive number of components; got 0"),
    "components by a truth": (lambda: pv.priors.Mixture(True, 2), "components; got True"),
    "continuous posterior of a mass": (
        lambda: swapped(prior=dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)),
        "both discrete or both continuous",
    ),
    "discrete posterior of a density": (
        lambda: swapped(posterior=dist.Poisson),
        "both discrete or both continuous",
    ),
    "posterior outside the prior": (
        lambda: swapped(
            prior=dist.Beta(torch.ones(2), 1.0).to_event(1),
            posterior=dist.Gamma,
        ),
        "on the support of the prior.*some draws lie outside it",
    ),
    "posterior on the sphere's hull": (
        lambda: swapped(prior=dist.ProjectedNormal(torch.ones(3))),
        "fit each other",
    ),
    "name as posterior": (lambda: swapped(posterior="Normal"), "the posterior to be a member"),
    "no likelihood": (lambda: swapped(likelihood=None), "Expected a likelihood, as in"),
    "instance as likelihood": (
        lambda: swapped(likelihood=dist.Normal(0.0, 1.0)),
        "the likelihood to be a member",
    ),
    "likelihood of another shape": (
        lambda: swapped(data=(3, 3), likelihood=pv.likelihoods.Family(dist.LKJ, dim=2)),
        r"likelihood of event shape \(3, 3\); got \(2, 2\)",
    ),
    "totals of another shape": (
        lambda: swapped(likelihood=pv.likelihoods.Binomial(torch.ones(5))),
        "fit each other",
    ),
    "prior as likelihood": (
        lambda: swapped(likelihood=pv.priors.StandardNormal(3)),
        "Expected a likelihood, a pyro_vae.Likelihood; got StandardNormal",
    ),
    "posterior and likelihood swapped": (
        lambda: pv.VAE(3, 2, pv.posteriors.Normal(), pv.likelihoods.Normal()),
        "Expected a likelihood, a pyro_vae.Likelihood; got Normal",
    ),
    "function as encoder": (lambda: swapped(encoder=torch.tanh), "encoder to be an nn.Module"),
    "encoder of another size": (
        lambda: swapped(encoder=nn.Linear(4, 2)),
        r"encoder to take rows of shape \(2, 3\)",
    ),
    "encoder that mixes rows": (
        lambda: swapped(encoder=nn.Flatten(0)),
        "encoder to map 2 rows to features",
    ),
    "decoder of another size": (
        lambda: swapped(decoder=nn.Linear(4, 2)),
        r"decoder to take rows of shape \(2, 2\)",
    ),
    "decoder to maps": (
        lambda: swapped(decoder=nn.Unflatten(1, (1, 2))),
        r"End the network with nn.Flatten\(\)",
    ),
    "scalar event": (lambda: swapped(data=()), r"positive sizes; got \(\)"),
    "negative event": (lambda: swapped(data=(3, -1)), "positive sizes"),
    "event of half a size": (lambda: swapped(data=3.5), "positive sizes; got 3.5"),
    "hidden units of none": (lambda: pv.networks.MLP(8, 0), "hidden units"),
    "no channels": (lambda: pv.networks.Convolution(), "channels"),
    "image of one dim": (
        lambda: swapped(decoder=pv.networks.Deconvolution(4)),
        "height, width",
    ),
    "no categories": (lambda: pv.likelihoods.Categorical(), "number of categories"),
    "categories of none": (
        lambda: pv.likelihoods.Categorical(0),
        "a positive integer.*got shape=0",
    ),
    "categories by a truth": (lambda: pv.likelihoods.Categorical(True), "a positive integer"),
    "half a category": (lambda: pv.likelihoods.Categorical(2.5), "a positive integer"),
    "rank below none": (lambda: pv.posteriors.LowRankMultivariateNormal(-1), "a positive integer"),
    "negative scale": (lambda: pv.likelihoods.Normal(scale=-1.0), "scale to lie in GreaterThan"),
    "scale that is no number": (
        lambda: pv.posteriors.Normal(scale=torch.tensor([1.0, torch.nan])),
        "scale to lie in GreaterThan",
    ),
    "negative total": (lambda: pv.likelihoods.Binomial(-1), "total_count to lie in"),
    "half a total": (lambda: pv.likelihoods.BetaBinomial(2.5), "total_count to lie in"),
    "predicted total": (
        lambda: swapped(likelihood=pv.likelihoods.Binomial(pv.Predicted())),
        "no default link",
    ),
    "no rank": (lambda: pv.posteriors.LowRankMultivariateNormal(), "either the rank"),
}


@each(REFUSED)
def test_what_does_not_fit_is_refused_when_built(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        make()
    assert str(error.value).startswith(("Expected ", "The "))


def instances() -> dict[str, Distribution]:
    one = torch.full((3,), 0.7)
    singles = {
        "Bernoulli": dist.Bernoulli(one),
        "Bernoulli of logits": dist.Bernoulli(logits=one),
        "Beta": dist.Beta(one, 2.0),
        "Cauchy": dist.Cauchy(one, 1.0),
        "Chi2": dist.Chi2(one),
        "Exponential": dist.Exponential(one),
        "expanded": dist.Gamma(2.0, 1.0).expand([3]),
        "Gumbel": dist.Gumbel(one, 1.0),
        "HalfCauchy": dist.HalfCauchy(one),
        "HalfNormal": dist.HalfNormal(one),
        "Laplace": dist.Laplace(one, 2.0),
        "LogNormal": dist.LogNormal(one, 1.0),
        "StudentT": dist.StudentT(4.1, one, 1.0),
        "Uniform": dist.Uniform(0 * one, one),
        "Weibull": dist.Weibull(one, one),
    }
    vectors = {
        "Dirichlet": dist.Dirichlet(one),
        "LKJCholesky": dist.LKJCholesky(3, 1.0),
        "LogisticNormal": dist.LogisticNormal(one, one),
        "MultivariateNormal": dist.MultivariateNormal(one, 2 * torch.eye(3)),
        "of a precision": dist.MultivariateNormal(one, precision_matrix=2 * torch.eye(3)),
        "of a factor": dist.MultivariateNormal(one, scale_tril=2 * torch.eye(3)),
        "MultivariateStudentT": dist.MultivariateStudentT(4.0, one, torch.eye(3)),
        "OneHotCategorical": dist.OneHotCategorical(one),
    }
    return {name: d.to_event(1) for name, d in singles.items()} | vectors


@each(instances())
@pytest.mark.parametrize("used", [False, True])
def test_plain_distributions_are_taken_apart(name: str, used: bool) -> None:
    distribution = instances()[name]
    draws = distribution.sample((20,))
    if used:
        distribution.log_prob(draws)
    prior = pv.priors.from_distribution(distribution)
    assert not list(prior.parameters())
    assert prior().event_shape == distribution.event_shape
    torch.testing.assert_close(prior().log_prob(draws), distribution.log_prob(draws))
    prior.double()
    assert prior().sample().dtype == torch.float64
    assert {value.dtype for value in prior.state_dict().values()} <= {torch.float64}


def test_a_normal_is_taken_apart_by_its_factor() -> None:
    normal = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3))
    assert set(pv.priors.from_distribution(normal).specs) == {"loc", "scale_tril"}
    named = pv.priors.Family(dist.MultivariateNormal, 3, covariance_matrix=torch.eye(3))
    assert "covariance_matrix" in named.specs


def test_a_mixture_of_any_family() -> None:
    full = pv.Family(dist.MultivariateNormal, loc=pv.Shared(), scale_tril=pv.Shared())
    vae = swapped(prior=pv.priors.Mixture(3, 2, full)).double()
    assert_density_of_the_plane(prior_of(vae))
    gamma = pv.Family(dist.Gamma, concentration=pv.Shared(), rate=pv.Shared())
    vae = swapped(prior=pv.priors.Mixture(3, 2, gamma)).double()
    assert prior_of(vae).support.check(torch.ones(2))
    assert not prior_of(vae).support.check(-torch.ones(2))


def test_components_and_pseudo_inputs_start_apart() -> None:
    mixture = pv.priors.Mixture(5, 2)
    means = mixture.component.shared["loc"]
    assert torch.pdist(means.detach()).min() > 0
    rows = torch.rand(20, 3)
    vamp = swapped(prior=pv.priors.VampPrior(5, 2, rows)).prior.pseudo_inputs
    assert ((vamp[:, None] == rows).all(-1).sum(1) == 1).all()
    assert torch.pdist(vamp.detach()).min() > 0


@pytest.mark.parametrize("posterior", [dist.LogNormal, dist.Exponential, dist.Beta])
def test_a_posterior_that_misses_a_part_of_the_prior_is_refused(posterior: type) -> None:
    with pytest.raises(
        ValueError, match="The posterior lies on .* and does not cover the support of the prior"
    ):
        pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), posterior)


SCORED = {
    "bernoulli": (dist.Bernoulli, {"logits": torch.randn(3, 50)}, torch.rand(3, 50).round()),
    "normal": (
        dist.Normal,
        {"loc": torch.randn(3, 50), "scale": torch.rand(3, 50) + 0.1},
        torch.randn(7, 3, 50),
    ),
    "one scale": (
        dist.Normal,
        {"loc": torch.randn(3, 50), "scale": torch.tensor(0.3)},
        torch.randn(3, 50),
    ),
    "one value": (
        dist.Normal,
        {"loc": torch.tensor(0.1), "scale": torch.tensor(0.3)},
        torch.randn(50),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORED)
def test_what_is_scored_by_us_is_scored_as_torch_does(name: str, dtype: torch.dtype) -> None:
    kind, arguments, value = SCORED[name]
    leaves = {k: v.to(dtype).requires_grad_() for k, v in arguments.items()}
    ours, torchs = (
        made(**leaves).expand((7, 3, 50)).to_event(1).log_prob(value.to(dtype))
        for made in (scored(kind), kind)
    )
    assert scored(kind) is not kind
    assert torch.equal(ours, torchs)
    for one, other in zip(
        *(torch.autograd.grad(v.sum(), list(leaves.values())) for v in (ours, torchs)), strict=True
    ):
        torch.testing.assert_close(one, other)
