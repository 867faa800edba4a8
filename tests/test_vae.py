"""The programs of a VAE under Pyro's own inference, and what networks see."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from cases import LIKELIHOODS, PRIORS
from pyro import infer, poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.elbos.log_densities import log_densities, structure
from pyro_vae.engine.running import seeded

ROWS = 7


def small(**members: Any) -> pv.VAE:
    tanh = {"activation": nn.Tanh}
    parts = {
        "data": (4,),
        "prior": 2,
        "likelihood": pv.likelihoods.Bernoulli(),
        "encoder": pv.networks.MLP(8, **tanh),
        "decoder": pv.networks.MLP(8, **tanh),
        "seed": 0,
    }
    return pv.VAE(**(parts | members))


def linear() -> pv.VAE:
    """Probabilistic PCA, whose posterior is known."""
    return small(
        likelihood=pv.likelihoods.Normal(scale=pv.Shared(init=0.5, scalar=True)),
        posterior=pv.posteriors.MultivariateNormal(scale_tril=pv.Shared()),
        encoder=nn.Identity(),
        decoder=nn.Identity(),
    ).double()


def bits(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape or (ROWS, 4)).float()


def state(vae: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vae.named_parameters()}


def test_the_sites_stand_in_the_plate() -> None:
    vae, x = small(), bits()
    for program, sites in ((vae.model, ["z", "x"]), (vae.guide, ["z"])):
        trace = poutine.trace(program).get_trace(x)
        assert [n for n in trace.nodes if n in ("z", "x")] == sites
        for site in sites:
            (frame,) = trace.nodes[site]["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("data", -1, ROWS)
            assert trace.nodes[site]["fn"].batch_shape == (ROWS,)
            assert len(trace.nodes[site]["fn"].event_shape) == 1
        assert trace.nodes[sites[-1]]["is_observed"] == ("x" in sites)


@pytest.mark.parametrize("name", PRIORS)
def test_sizes_stand_in_for_data(name: str) -> None:
    vae = small(prior=PRIORS[name].make())
    assert vae.model(size=3).shape == (3, 4)
    assert vae.guide(size=3).shape == (3, 2)
    assert vae.model(bits()).shape == (ROWS, 4)
    for wrong in (None, 0, -1, 2.0, True):
        with pytest.raises(ValueError, match="Expected rows x, or a positive size to draw"):
            vae.model(size=wrong)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    vae, x = small(), bits()
    options = {"num_samples": 5, "parallel": parallel, "return_sites": ("z", "x")}
    prior = Predictive(vae.model, **options)(size=3)
    assert (prior["z"].shape, prior["x"].shape) == ((5, 3, 2), (5, 3, 4))
    echo = Predictive(vae.model, guide=vae.guide, **options)(x)
    assert (echo["x"] == x).all()
    replicated = Predictive(poutine.uncondition(vae.model), guide=vae.guide, **options)(x)
    assert replicated["z"].shape == (5, ROWS, 2)
    assert replicated["x"].shape == (5, ROWS, 4)
    assert not (replicated["x"] == x).all()


def test_condition_and_uncondition() -> None:
    vae, x, z = small(), bits(), torch.randn(ROWS, 2)
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    assert torch.equal(trace.nodes["z"]["value"], z)
    expected = vae.decode(z).log_prob(x).sum() - 0.5 * (z**2).sum()
    expected -= z.numel() * 0.5 * torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    free = poutine.trace(poutine.uncondition(vae.model)).get_trace(x)
    assert not free.nodes["x"]["is_observed"]
    observed = poutine.trace(poutine.condition(vae.model, {"x": x})).get_trace(size=ROWS)
    assert observed.nodes["x"]["is_observed"]


@pytest.mark.parametrize("name", ["StandardNormal", "Mixture", "VampPrior"])
def test_nuts_samples_latents_and_no_weights(name: str) -> None:
    vae, x = small(prior=PRIORS[name].make()), bits(3, 4)
    before = state(vae)
    mcmc = MCMC(NUTS(vae.model), num_samples=6, warmup_steps=4, disable_progbar=True)
    mcmc.run(x)
    assert {site: z.shape for site, z in mcmc.get_samples().items()} == {"z": (6, 3, 2)}
    assert mcmc.get_samples()["z"].std(0).min() > 0
    assert all(torch.equal(before[name], value) for name, value in state(vae).items())


def test_nuts_finds_the_exact_posterior() -> None:
    vae = linear()
    x = 2.0 * torch.randn(2, 4, dtype=torch.float64)
    weight = vae.likelihood.heads["loc"].linear
    precision = torch.eye(2) + weight.weight.T @ weight.weight / 0.25
    mean = torch.linalg.solve(precision, weight.weight.T @ (x - weight.bias).T / 0.25).T
    mcmc = MCMC(NUTS(vae.model), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(x)
    z = mcmc.get_samples()["z"]
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    effective = mcmc.diagnostics()["z"]["n_eff"].min()
    assert effective > 50
    assert ((z.mean(0) - mean).abs() < 5 * sd / effective**0.5).all()


class Counted(nn.Module):
    """Says what a network was called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.network(x)


def counted(**members: Any) -> pv.VAE:
    vae = small(
        encoder=Counted(pv.networks.MLP(8)), decoder=Counted(pv.networks.MLP(8)), **members
    )
    vae.encoder.shapes, vae.decoder.shapes = [], []
    return vae


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("elbo", [infer.Trace_ELBO, pv.elbos.Trace_ELBO])
def test_particles_are_folded_into_the_rows(num_particles: int, elbo: Any) -> None:
    vae, x = counted(), bits()
    objective = elbo(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    objective.loss(vae.model, vae.guide, x)
    assert vae.encoder.shapes == [(ROWS, 4)]
    assert vae.decoder.shapes == [(num_particles * ROWS, 2)]


def test_importance_folds_particles_into_the_rows() -> None:
    vae, x = counted(), bits()
    known = structure(vae, x)
    vae.encoder.shapes, vae.decoder.shapes = [], []
    log_densities(vae, x, 6, known=known)
    assert vae.encoder.shapes == [(ROWS, 4)]
    assert vae.decoder.shapes == [(6 * ROWS, 2)]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_encode_and_decode_take_leading_dims(lead: tuple[int, ...]) -> None:
    vae = small()
    x, z = bits(*lead, ROWS, 4), torch.randn(*lead, ROWS, 2)
    posterior, likelihood = vae.encode(x), vae.decode(z)
    assert posterior.batch_shape == likelihood.batch_shape == (*lead, ROWS)
    rowwise = vae.encode(x.reshape(-1, 4)).base_dist.loc.reshape(z.shape)
    torch.testing.assert_close(posterior.base_dist.loc, rowwise)
    rowwise = vae.decode(z.reshape(-1, 2)).base_dist.logits.reshape(x.shape)
    torch.testing.assert_close(likelihood.base_dist.logits, rowwise)


def test_one_row_without_a_batch_is_encoded_too() -> None:
    vae, x = small(), bits()
    assert vae.encode(x[0]).batch_shape == ()
    torch.testing.assert_close(vae.encode(x[0]).base_dist.loc, vae.encode(x).base_dist.loc[0])
    assert vae.decode(torch.randn(2)).batch_shape == ()


def one_hot() -> pv.VAE:
    return small(
        prior=dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2])),
        posterior=dist.OneHotCategorical,
    ).double()


def log_joint_of_each_class(vae: pv.VAE, x: Tensor) -> Tensor:
    z = torch.eye(3, dtype=torch.float64)
    log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    return vae.decode(z[:, None].expand(3, len(x), 3)).log_prob(x) + log_prior[:, None]


def test_a_discrete_latent_is_enumerated_in_the_guide() -> None:
    vae, x = one_hot(), bits().double()
    guide = infer.config_enumerate(vae.guide, "parallel", expand=True)
    elbo = infer.TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(vae.model, guide, x)
    log_q = vae.encode(x).logits.log_softmax(-1).T
    exact = (log_q.exp() * (log_joint_of_each_class(vae, x) - log_q)).sum()
    assert loss == pytest.approx(-exact.item(), abs=1e-6)


def test_a_discrete_latent_is_summed_out_of_the_model() -> None:
    vae, x = one_hot(), bits().double()
    model = infer.config_enumerate(vae.model, "parallel")
    loss = infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    exact = log_joint_of_each_class(vae, x).logsumexp(0).sum()
    assert loss == pytest.approx(-exact.item(), abs=1e-6)


def test_enumeration_trains_a_discrete_latent() -> None:
    vae, x = one_hot().float(), bits(64, 4)
    guide = infer.config_enumerate(vae.guide, "parallel", expand=True)
    elbo = infer.TraceEnum_ELBO(max_plate_nesting=1)
    losses = trained(SVI(vae.model, guide, pyro.optim.Adam({"lr": 0.02}), elbo), x, steps=20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("elbo", [infer.Trace_ELBO, infer.TraceGraph_ELBO, pv.elbos.Trace_ELBO])
def test_a_discrete_latent_trains_by_the_score_function(elbo: Any) -> None:
    vae = small(prior=dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), posterior=dist.Bernoulli)
    before, x = state(vae), bits(32, 4)
    trained(SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), elbo()), x, steps=3)
    assert all(not torch.equal(before[name], value) for name, value in state(vae).items())


def trained(svi: SVI, x: Tensor, *, steps: int) -> list[float]:
    return [float(np.sum(svi.step(x))) / len(x) for _ in range(steps)]


ELBOS: dict[str, Callable[[], infer.ELBO]] = {
    "Trace_ELBO": infer.Trace_ELBO,
    "particles": lambda: infer.Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceGraph_ELBO": infer.TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: infer.TraceEnum_ELBO(strict_enumeration_warning=False),
    "TraceMeanField_ELBO": infer.TraceMeanField_ELBO,
    "RenyiELBO": lambda: infer.RenyiELBO(
        alpha=0.5, num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "ReweightedWakeSleep": lambda: infer.ReweightedWakeSleep(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "our Trace_ELBO": pv.elbos.Trace_ELBO,
}


@pytest.mark.parametrize("name", ELBOS)
def test_the_elbos_of_pyro_train_it(name: str) -> None:
    vae, x = small(), (torch.arange(4) < 2).float().expand(50, 4)
    before = state(vae)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.03}), ELBOS[name]())
    losses = trained(svi, x, steps=25)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    unchanged = [n for n, value in state(vae).items() if torch.equal(before[n], value)]
    assert unchanged == []
    assert len(pyro.get_param_store()) == 0


def test_two_vaes_train_in_turn() -> None:
    encoder, likelihood = pv.networks.MLP(8, activation=nn.Tanh), pv.likelihoods.Bernoulli()
    vaes = [small(encoder=encoder, likelihood=likelihood) for _ in range(2)]
    before, x = [state(vae) for vae in vaes], bits()
    assert all(torch.equal(before[0][name], value) for name, value in before[1].items())
    adam = {"lr": 0.01}
    svis = [SVI(v.model, v.guide, pyro.optim.Adam(adam), infer.Trace_ELBO()) for v in vaes]
    for _ in range(2):
        for svi in svis:
            svi.step(x)
    after = [state(vae) for vae in vaes]
    for one in range(2):
        assert all(not torch.equal(before[one][n], value) for n, value in after[one].items())
    assert all(not torch.equal(after[0][n], value) for n, value in after[1].items())
    assert len(pyro.get_param_store()) == 0


def test_two_vaes_of_the_same_members_are_fitted_one_after_the_other() -> None:
    encoder, prior = pv.networks.MLP(8, activation=nn.Tanh), pv.priors.Mixture(3, 2)
    vaes = [small(encoder=encoder, prior=prior) for _ in range(2)]
    kept, x = state(prior), bits(20, 4)
    for vae in vaes:
        before = state(vae)
        pv.fit(vae, x, max_epochs=2, batch_size=10, seed=0, progress=False)
        assert all(not torch.equal(before[n], value) for n, value in state(vae).items())
    assert all(torch.equal(kept[n], value) for n, value in state(prior).items())
    assert all(torch.equal(state(vaes[0])[n], value) for n, value in state(vaes[1]).items())


def test_a_trained_vae_is_copied_and_pickled() -> None:
    vae, x = small(), bits()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    svi.step(x)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        before = state(vae)
        other_svi = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.1}), infer.Trace_ELBO())
        other_svi.step(x)
        assert all(torch.equal(before[n], value) for n, value in state(vae).items())
        assert all(not torch.equal(before[n], value) for n, value in state(other).items())


class Pixels(nn.Module):
    """A user's network: convolutions, batch norm, dropout, and a view by the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3 * 6 * 5, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.convolution(x.unsqueeze(1))).relu())
        return self.linear(h.view(len(x), -1))


def images() -> pv.VAE:
    decoder = nn.Sequential(
        nn.LazyLinear(30),
        nn.LazyBatchNorm1d(),
        nn.ReLU(),
        nn.Unflatten(1, (1, 6, 5)),
        nn.LazyConvTranspose2d(4, 3, padding=1),
        nn.Flatten(),
    )
    return pv.VAE((6, 5), 2, pv.likelihoods.Bernoulli(), encoder=Pixels(), decoder=decoder, seed=0)


def test_networks_of_the_user_work_unchanged() -> None:
    vae, x = images(), bits(ROWS, 6, 5)
    elbo = infer.Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    before = state(vae)
    trained(svi, x, steps=2)
    assert all(not torch.equal(before[n], v) for n, v in state(vae).items() if dead_free(n))
    assert vae.encoder.norm.num_batches_tracked > 0
    assert vae.sample(5).shape == (5, 6, 5)
    assert vae.reconstruct(x, num_samples=19)["mean"].shape == (ROWS, 6, 5)


def dead_free(name: str) -> bool:
    """A bias before a batch norm has no gradient, but for its rounding."""
    return name not in ("encoder.convolution.bias", "decoder.0.bias")


def test_building_leaves_modes_and_statistics_alone() -> None:
    encoder = Pixels()
    encoder.norm.eval()
    vae = pv.VAE((6, 5), 2, pv.likelihoods.Bernoulli(), encoder=encoder, seed=0)
    assert vae.training
    assert vae.encoder.training
    assert not vae.encoder.norm.training
    assert vae.encoder.norm.num_batches_tracked == 0
    assert (vae.encoder.norm.running_mean == 0).all()
    assert images().decoder[1].num_batches_tracked == 0


def test_a_lazy_specification_stays_lazy() -> None:
    decoder = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d())
    mlp = pv.networks.MLP(5)
    for latents in (2, 3):
        vae = small(prior=latents, decoder=decoder, encoder=mlp)
        assert vae.decoder[0].in_features == latents
    assert isinstance(decoder[0], nn.LazyLinear)
    assert isinstance(mlp.layers[1], nn.LazyLinear)


def test_sampling_leaves_modes_as_they_are() -> None:
    vae, x = images(), bits(ROWS, 6, 5)
    vae.encoder.drop.eval()
    before = {n: m.training for n, m in vae.named_modules()}
    tracked = copy.deepcopy(vae.state_dict())
    vae.sample(3)
    vae.reconstruct(x, num_samples=19)
    assert {n: m.training for n, m in vae.named_modules()} == before
    assert all(torch.equal(tracked[n], value) for n, value in vae.state_dict().items())


@pytest.mark.parametrize("likelihood", [pv.likelihoods.Bernoulli, pv.likelihoods.Normal])
@pytest.mark.parametrize("event", [(9, 6), (2, 9, 6)])
def test_the_convolutional_pair(likelihood: Any, event: tuple[int, ...]) -> None:
    vae = pv.VAE(
        event,
        3,
        likelihood(),
        encoder=pv.networks.Convolution(4, 6),
        decoder=pv.networks.Deconvolution(6, 4),
        seed=0,
    )
    x = bits(5, *event)
    before = state(vae)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    trained(svi, x, steps=2)
    assert all(not torch.equal(before[n], value) for n, value in state(vae).items())
    assert vae.sample(2).shape == (2, *event)


def test_the_seed_of_the_weights_is_all_that_matters() -> None:
    rng = torch.get_rng_state()
    one = small(seed=3)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.randn(5)
    other = small(seed=3)
    assert all(torch.equal(state(one)[n], value) for n, value in state(other).items())
    assert any(not torch.equal(state(one)[n], v) for n, v in state(small(seed=4)).items())
    torch.manual_seed(3)
    free = small(seed=None)
    assert all(torch.equal(state(one)[n], value) for n, value in state(free).items())


def test_seeds_of_draws() -> None:
    vae, x = small(), bits()
    rng = torch.get_rng_state()
    for draw in (
        lambda seed: vae.sample(20, seed=seed),
        lambda seed: torch.tensor(vae.reconstruct(x, num_samples=19, seed=seed)["mean"].values),
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.equal(vae.sample(20), vae.sample(20))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, None, True])
def test_sizes_of_samples_are_checked(wrong: Any) -> None:
    with pytest.raises(ValueError, match="Expected num_rows to be an integer of at least 1"):
        small().sample(wrong)


def test_reconstructions_are_the_posterior_predictive() -> None:
    vae = linear()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = vae.reconstruct(x, num_samples=4000, prob=0.8, seed=0)
    weight = vae.likelihood.heads["loc"].linear
    posterior = vae.encode(x)
    mean = weight(posterior.mean).detach().numpy()
    covariance = weight.weight @ posterior.covariance_matrix[0] @ weight.weight.T
    sd = (covariance.diagonal() + 0.25).sqrt().detach().numpy()
    np.testing.assert_allclose(found["mcse"], sd / 4000**0.5 + 0 * mean, rtol=0.06)
    assert (abs(found["mean"] - mean) < 5 * found["mcse"]).all()
    half = 1.2815515655446004 * sd
    error = 5 * sd * (0.1 * 0.9 / 4000) ** 0.5 / 0.1755
    assert (abs(found["lower"].values - (mean - half)) < error).all()
    assert (abs(found["upper"].values - (mean + half)) < error).all()
    assert (found.attrs["num_samples"], found.attrs["prob"]) == (4000, 0.8)
    for name in ("lower_mcse", "upper_mcse"):
        np.testing.assert_allclose(found[name].mean(), (error / 5).mean(), rtol=0.15)
    assert {name: v.attrs["units"] for name, v in found.items()} == dict.fromkeys(
        ["mean", "mcse", "lower", "lower_mcse", "upper", "upper_mcse"], "those of x"
    )
    assert all(variable.attrs["long_name"] for variable in found.values())


def test_rows_are_checked_and_encoded_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, moved: list[int]
) -> None:
    vae, x = small(), bits(10, 4).double()
    monkeypatch.setattr("pyro_vae.data.rows.CHECKED_AT_ONCE", 4)
    vae.check(x)
    assert moved == [4, 4, 2]
    moved.clear()
    vae.reconstruct(x, num_samples=3, prob=0.5, max_elements=3 * 8 * 2)
    assert max(moved) == 4
    assert moved[-5:] == [2] * 5
    x[9] = 0.5
    with pytest.raises(ValueError, match=r"Bernoulli.* row 9, column 0 \(1 of 10 rows\)"):
        vae.check(x)


def test_reconstructions_are_chunked_without_a_change_of_shape() -> None:
    found = small().reconstruct(bits(), num_samples=3, prob=0.5, max_elements=4 * 3 * 2)
    assert found["lower"].shape == (ROWS, 4)


@pytest.mark.parametrize(
    ("num_samples", "prob"), [(1, 0.9), (2.0, 0.9), (9, 0.0), (9, 1.0), (18, 0.9)]
)
def test_arguments_of_reconstruct_are_checked(num_samples: Any, prob: float) -> None:
    with pytest.raises(ValueError, match="Expected (num_samples|prob) "):
        small().reconstruct(bits(), num_samples=num_samples, prob=prob)


def test_names_come_back_from_pandas_and_xarray() -> None:
    vae, x = small(), bits(3, 4).numpy()
    frame = pd.DataFrame(x, index=list("uvw"), columns=list("abcd"))
    found = vae.reconstruct(frame, num_samples=19, seed=0)
    assert found["datum"].values.tolist() == list("uvw")
    assert found["x_dim_0"].values.tolist() == list("abcd")
    assert found["mean"].dims == ("datum", "x_dim_0")
    array = xr.DataArray(x, dims=("city", "item"), coords={"city": [10, 20, 30]})
    named = vae.reconstruct(array, num_samples=19, seed=0)
    assert named["datum"].values.tolist() == [10, 20, 30]
    assert named["x_dim_0"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(named["mean"], found["mean"])
    plain = vae.reconstruct(x, num_samples=19, seed=0)
    np.testing.assert_array_equal(plain["mean"], found["mean"])


def test_reconstruct_refuses_what_check_refuses() -> None:
    vae = small()
    with pytest.raises(ValueError, match="support of Bernoulli"):
        vae.reconstruct(0.5 * torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"event shape \(4,\)"):
        vae.reconstruct(torch.ones(3, 5))
    with pytest.raises(ValueError, match="rows of x for a VAE; got fields"):
        vae.reconstruct({"a": torch.ones(3, 4)})


COUNTS = ["BetaBinomial", "Binomial", "Categorical", "NegativeBinomial", "Poisson", "Geometric"]


@pytest.mark.parametrize("name", [*COUNTS, "Bernoulli"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
def test_integers_are_scored_as_floats(name: str, dtype: torch.dtype) -> None:
    geometric = pv.likelihoods.Family(dist.Geometric)
    vae = small(likelihood=geometric if name == "Geometric" else LIKELIHOODS[name].make())
    top = 2 if name == "Bernoulli" or dtype == torch.bool else 5
    x = torch.randint(0, top, (ROWS, 4)).to(dtype)
    vae.check(x)
    torch.manual_seed(1)
    ours = log_densities(vae, x, 3)
    torch.manual_seed(1)
    theirs = log_densities(vae, x.float(), 3)
    assert torch.equal(ours.log_weights, theirs.log_weights)
    assert ours.log_weights.isfinite().all()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    assert np.isfinite(svi.step(x))


def test_bytes_of_255_are_counts() -> None:
    vae = small(likelihood=pv.likelihoods.Poisson())
    x = np.full((3, 4), 255, dtype=np.uint8)
    vae.check(x)
    log_prob = vae.decode(torch.zeros(3, 2)).log_prob(vae.likelihood._like + torch.as_tensor(x))
    torch.manual_seed(0)
    found = log_densities(vae, torch.as_tensor(x), 2)
    assert found.log_weights.isfinite().all()
    assert log_prob.isfinite().all()
    rate = vae.decode(found.values["z"]).base_dist.rate.double()
    exact = (255 * rate.log() - rate - torch.lgamma(torch.tensor(256.0).double())).sum(-1)
    torch.testing.assert_close(found.reconstruction, exact, rtol=1e-5, atol=1e-2)


def test_doubles_meet_singles() -> None:
    vae, x = small(), bits().double()
    assert vae.encode(x).base_dist.loc.dtype == torch.float32
    assert vae.decode(torch.randn(3, 2).double()).base_dist.logits.dtype == torch.float32
    assert vae.double().encode(x.float()).base_dist.loc.dtype == torch.float64


class Sphere(nn.Module):
    """Members of the user's own, who build nothing: a prior, a likelihood, a posterior."""

    def forward(self) -> Any:
        return dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0]))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(3)

    def forward(self, features: Tensor) -> Any:
        return dist.ProjectedNormal(self.linear(features))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, features: Tensor) -> Any:
        return dist.Normal(self.linear(features), 1.0).to_event(1)


def test_members_of_the_users_own() -> None:
    vae = small(prior=Sphere(), likelihood=Mixed(), posterior=Around())
    assert vae.latent_shape == (3,)
    before, x = state(vae), torch.randn(ROWS, 4)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    trained(svi, x, steps=1)
    assert all(not torch.equal(before[n], value) for n, value in state(vae).items())
    assert vae.sample(3).shape == (3, 4)
    assert log_densities(vae, x, 2).log_weights.shape == (2, ROWS)


def test_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for prior in ("Mixture", "VampPrior", "from_distribution"):
            vae = small(prior=PRIORS[prior].make())
            assert {p.dtype for p in vae.state_dict().values()} == {torch.float64}
            assert vae.sample(2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_networks_in_double_precision_make_the_rest_so() -> None:
    vae = small(encoder=nn.Linear(4, 3).double(), decoder=nn.Linear(2, 3).double())
    assert {p.dtype for p in vae.state_dict().values()} == {torch.float64}
    assert vae.sample(2).dtype == torch.float64


def test_it_shows_what_it_is_made_of() -> None:
    text = repr(small(prior=pv.priors.Mixture(3, 2)))
    for word in ("event_shape=(4,)", "latent_shape=(2,)", "Mixture", "Bernoulli", "Normal"):
        assert word in text


def test_a_rate_that_left_its_bounds_comes_back() -> None:
    vae, x = small(likelihood=pv.likelihoods.Poisson()), bits()
    bias = vae.likelihood.heads["rate"].linear.bias
    with torch.no_grad():
        bias.fill_(40.0)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), infer.Trace_ELBO())
    trained(svi, x, steps=3)
    assert (bias < 40.0).all()


class Seen(nn.Linear):
    """A network that notes how many rows it sees at once."""

    most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        return super().forward(x)


def test_reconstructions_are_cut_by_the_largest_layer() -> None:
    vae = small(decoder=Seen(2, 50))
    vae.decoder.most = 0
    vae.reconstruct(bits(200, 4), num_samples=30, max_elements=50 * 30 * 2)
    assert vae.decoder.most == 30 * 2


class Normalised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())


def test_running_statistics_are_those_of_the_data_alone() -> None:
    prior = pv.priors.VampPrior(5, 2, 100.0 + torch.rand(5, 4))
    vae, x = small(prior=prior, encoder=Normalised()), bits(50, 4)
    alone = copy.deepcopy(vae.encoder)
    alone(x)
    loss = infer.Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    assert vae.prior.pseudo_inputs.grad.abs().sum() > 0
    for name, value in alone.named_buffers():
        torch.testing.assert_close(vae.encoder.get_buffer(name), value)
    assert vae.encoder[1].track_running_stats


def test_a_lazy_buffer_is_copied_with_its_dtype() -> None:
    encoder = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d()).double()
    vae = small(encoder=encoder, decoder=nn.Linear(2, 3).double())
    assert vae.encoder[1].running_mean.dtype == torch.float64
    assert encoder[1].running_mean.dtype == torch.float64


def test_autocast_leaves_weights_and_densities_in_full_precision() -> None:
    x = bits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vae = small(posterior=pv.posteriors.MultivariateNormal())
        assert {p.dtype for p in vae.state_dict().values()} == {torch.float32}
        posterior = vae.encode(x)
        z = posterior.rsample()
        assert posterior.log_prob(z).dtype == torch.float32
        assert vae.decode(z).log_prob(x).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_cuda_is_not_started_to_keep_its_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    torch.manual_seed(7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", told.append)
    with seeded(3):
        first = torch.rand(())
    assert told == [3, 7]
    with seeded(3):
        assert torch.rand(()) == first


def test_a_seed_gives_all_weights_and_leaves_the_generator() -> None:
    def built() -> pv.VAE:
        networks = {"encoder": pv.networks.MLP(8, 8), "decoder": pv.networks.MLP(8, 8)}
        return pv.VAE((6,), 2, pv.likelihoods.Bernoulli(), **networks, seed=0)

    before = torch.get_rng_state()
    one, other = built().state_dict(), built().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
