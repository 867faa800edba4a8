"""`compare_elbos`: its numbers are right, and the program does not change."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import ESTIMATORS
from matplotlib.figure import Figure
from programs import linear_gaussian as by_hand
from sklearn.decomposition import PCA
from small_vae import assert_same, weights
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.diagnostics import Comparison, moments
from pyro_vae.diagnostics.memory import LiveBytes
from pyro_vae.elbos import Weighted, Weights
from pyro_vae.evidence import linear_gaussian
from pyro_vae.evidence.linear_gaussian import marginal

estimators = importlib.import_module("pyro_vae.diagnostics.compare_elbos")

E = pv.elbos
X = 1.5 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FULL = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
LEARNED = pv.priors.Family(dist.Normal, 2)


def linear(prior: Any = 2, decoder: nn.Module | None = None, **members: Any) -> pv.VAE:
    asked: dict[str, Any] = {
        "likelihood": pv.likelihoods.Normal(scale=pv.Shared(init=0.7)),
        "posterior": pv.posteriors.Normal(),
        "encoder": nn.Identity(),
        "decoder": nn.Identity() if decoder is None else decoder,
    }
    return pv.VAE(4, prior, **asked | members, seed=0).double()


def by_formula(vae: pv.VAE, x: Tensor) -> Tensor:
    """log p(x) by a dense covariance, from the layers themselves."""
    head = vae.likelihood.heads["loc"].linear
    weight, offset = head.weight, head.bias
    if isinstance(vae.decoder, nn.Linear):
        weight, offset = weight @ vae.decoder.weight, offset + weight @ vae.decoder.bias
    noise = vae.likelihood.links["scale"](vae.likelihood.shared["scale"]).expand(4).square()
    prior = vae.prior()
    spread = getattr(prior, "covariance_matrix", None)
    spread = prior.variance.flatten().diag() if spread is None else spread
    covariance = weight @ spread @ weight.T + noise.diag()
    return MultivariateNormal(offset + weight @ prior.mean.flatten(), covariance).log_prob(x)


LINEAR: dict[str, Callable[[], pv.VAE]] = {
    "standard normal": linear,
    "a full covariance": functools.partial(linear, FULL),
    "a learned prior": functools.partial(linear, LEARNED),
    "two dims": functools.partial(
        linear, dist.Normal(0.5, 2.0).expand([2, 1]).to_event(2), nn.Flatten()
    ),
    "a linear decoder": functools.partial(linear, 2, nn.Linear(2, 7)),
}
CURVED: dict[str, Callable[[], pv.VAE]] = {
    "a network": functools.partial(linear, 2, pv.networks.MLP(8)),
    "a link": functools.partial(
        linear, likelihood=pv.likelihoods.Normal(loc=pv.Predicted(link="softplus"))
    ),
    "a scale of each row": functools.partial(
        linear, likelihood=pv.likelihoods.Normal(scale=pv.Predicted())
    ),
    "another likelihood": functools.partial(linear, likelihood=pv.likelihoods.Laplace()),
    "a mixture": functools.partial(linear, pv.priors.Mixture(3, 2)),
    "a prior of the encoder": functools.partial(linear, pv.priors.VampPrior(3, 2)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_log_evidence_is_exact_if_the_program_is_linear_and_gaussian(case: str) -> None:
    vae = LINEAR[case]()
    expected = by_formula(vae, X)
    np.testing.assert_allclose(linear_gaussian(vae, X), expected.detach(), rtol=1e-10)
    vae.eval()
    parameters = [p for p in (*vae.decoder.parameters(), *vae.likelihood.parameters())]
    parameters += list(vae.prior.parameters())
    both = (
        torch.autograd.grad(value.sum(), parameters)
        for value in (marginal(vae).log_prob(X), expected)
    )
    for found, wanted in zip(*both, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CURVED)
def test_other_programs_have_no_exact_evidence(case: str) -> None:
    assert linear_gaussian(CURVED[case](), X) is None


def test_a_subclass_with_another_model_has_no_exact_evidence() -> None:
    class Halved(pv.VAE):
        def model(self, x: Any = None, *, size: int | None = None) -> Any:
            with pyro.poutine.scale(scale=0.5):
                return super().model(x, size=size)

    program = Halved(4, 2, pv.likelihoods.Normal(), decoder=nn.Identity())
    assert linear_gaussian(program, X) is None
    assert linear_gaussian(by_hand()[0], by_hand()[1]) is None


def test_exact_evidence_is_that_of_principal_components() -> None:
    pca = PCA(2).fit(X.numpy())
    vae = linear(likelihood=pv.likelihoods.Normal(scale=pv.Shared(init=1.0)))
    head, noise = vae.likelihood.heads["loc"].linear, pca.noise_variance_
    loadings = pca.components_.T * np.sqrt(pca.explained_variance_ - noise)
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(loadings))
        head.bias.copy_(torch.as_tensor(pca.mean_))
        scale = torch.full((4,), math.sqrt(noise), dtype=torch.float64)
        vae.likelihood.shared["scale"].copy_(vae.likelihood.links["scale"].inv(scale))
    np.testing.assert_allclose(linear_gaussian(vae, X), pca.score_samples(X), rtol=1e-8)


@functools.cache
def compared() -> Comparison:
    """Every estimator of the table, on a linear VAE with a learned prior."""
    chosen = {name: make() for name, make in ESTIMATORS.items()}
    return pv.compare_elbos(linear(LEARNED), X, chosen, num_repeats=40, seed=1)


NAMES = list(ESTIMATORS)
AUTOGRADS = {"RWS", "TVO", "FreeBits", "FreeBits, 0", "MMD"} | {
    "TotalCorrelation",
    "TotalCorrelation, 1",
}
COLUMNS = [
    *("value", "value_se", "bias", "bias_se", "direction"),
    *(
        name.format(group)
        for group in ("encoder", "decoder", "prior")
        for name in ("grad_bias_{}", "grad_bias_{}_se", "sd_{}", "snr_{}", "snr_floor_{}")
    ),
    *("ms", "ms_se", "memory_mb", "efficiency", "efficiency_se"),
]


def test_the_table_has_a_row_an_estimator_in_the_order_given() -> None:
    found = compared()
    assert found.table.index.to_list() == NAMES
    assert found.table.columns.to_list() == COLUMNS
    assert found.reference == "exact"
    assert found.table.attrs == {
        "reference": "exact",
        "gradient_reference": "exact",
        "num_repeats": 40,
        "seed": 1,
        "num_rows": 12,
    }
    assert np.allclose(found.table["snr_floor_prior"], 0.67449 / math.sqrt(40), rtol=1e-4)
    assert (found.table[["ms", "memory_mb", "efficiency", "sd_encoder"]] > 0).all(axis=None)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "TraceEnum_ELBO"])
def test_values_are_those_per_row(name: str) -> None:
    """4.5 standard errors of the difference of two independent means."""
    vae = linear(LEARNED)
    own, mcse = ESTIMATORS[name]().per_row(vae, X, num_repeats=100)
    line = compared().table.loc[name]
    error = math.hypot(line["value_se"], float(mcse.square().sum().sqrt()) / len(X))
    coupled = name in {"TotalCorrelation", "TotalCorrelation, 1", "MMD", "FreeBits"}
    error *= 2.0 if coupled else 1.0  # mcse assumes independent rows
    assert abs(line["value"] - float(own.mean())) < 4.5 * error
    exact = linear_gaussian(vae, X).mean()
    assert line["bias"] == pytest.approx(line["value"] - exact, abs=1e-9)
    if line["direction"] == "lower bound":
        assert line["bias"] < 4.5 * line["bias_se"]


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_encoder_has_no_bias(name: str) -> None:
    """6 errors: a sum of a few squares has longer tails than a normal distribution."""
    line = compared().table.loc[name]
    if name in AUTOGRADS:
        assert math.isnan(line["grad_bias_encoder"])
    else:
        assert line["grad_bias_encoder"] < 6 * line["grad_bias_encoder_se"]
        assert line["grad_bias_encoder_se"] < 1


def gradient(vae: pv.VAE, value: Tensor, group: str) -> Tensor:
    owners = {"decoder": (vae.decoder, vae.likelihood), "prior": (vae.prior,)}[group]
    parameters = [p for owner in owners for p in owner.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("group", ["decoder", "prior"])
def test_the_distance_to_the_gradient_of_log_evidence(group: str) -> None:
    """Compared with 4000 draws, within 5 errors and 5% of the distance."""
    vae = linear(LEARNED)
    wanted = gradient(vae, by_formula(vae, X).mean(), group)
    for name, elbo in {"Trace_ELBO": E.STL(4000), "TraceMeanField_ELBO": E.STL(4000)}.items():
        own = gradient(vae, -elbo(vae.model, vae.guide)(X) / len(X), group)
        expected = float((own - wanted).norm() / wanted.norm())
        line = compared().table.loc[name]
        found, error = line[f"grad_bias_{group}"], line[f"grad_bias_{group}_se"]
        assert abs(found - expected) < 5 * error + 0.05 * expected
        assert found > 3 * error


def test_the_bias_of_the_decoder_falls_with_the_number_of_draws() -> None:
    counts = (1, 4, 64)
    found = pv.compare_elbos(linear(), X, {str(k): E.IWAE(k) for k in counts}, num_repeats=150)
    bias = found.table["grad_bias_decoder"]
    assert bias["1"] > 1.3 * bias["4"] > 2 * bias["64"]
    assert "snr_prior" not in found.table


class StickingInside(Weighted):
    """The mistake that DReG corrects: only the path derivative in an importance-weighted bound."""

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.logsumexp(0) - math.log(len(log_weights))

    def weights(self, log_weights: Tensor) -> Weights:
        normalised = log_weights.softmax(0)
        return Weights(normalised, normalised, None, torch.ones_like(normalised))


def test_a_wrong_gradient_is_detected() -> None:
    """With 200 repeats the bias of a wrong gradient is many errors, that of a right one 0."""
    chosen = {"wrong": StickingInside(5), "right": E.DReG(5)}
    table = pv.compare_elbos(linear(), X, chosen, num_repeats=200).table
    assert table.loc["wrong", "grad_bias_encoder"] > 8 * table.loc["wrong", "grad_bias_encoder_se"]
    assert table.loc["right", "grad_bias_encoder"] < 6 * table.loc["right", "grad_bias_encoder_se"]
    assert abs(table["value"].diff().iloc[1]) < 4.5 * np.hypot(*table["value_se"])


def test_sd_and_snr_are_those_of_a_loop() -> None:
    """400 repeats each: 10% is 2 to 3 errors of one s.d., and there are many parameters."""
    vae, chosen = linear(LEARNED), {"IWAE": E.IWAE(3)}
    line = pv.compare_elbos(vae, X, chosen, num_repeats=400).table.loc["IWAE"]
    loss = chosen["IWAE"](vae.model, vae.guide)
    groups = {
        "encoder": [*vae.encoder.parameters(), *vae.posterior.parameters()],
        "decoder": [*vae.decoder.parameters(), *vae.likelihood.parameters()],
        "prior": [*vae.prior.parameters()],
    }
    parameters = [p for group in groups.values() for p in group]
    draws = [torch.autograd.grad(-loss(X) / len(X), parameters) for _ in range(400)]
    start = 0
    for name, group in groups.items():
        own = slice(start, start := start + len(group))
        flat = torch.stack([torch.cat([g.flatten() for g in draw[own]]) for draw in draws])
        assert line[f"sd_{name}"] == pytest.approx(float(flat.var(0).mean().sqrt()), rel=0.1)
        snr = np.median((flat.mean(0).abs() / flat.std(0)).numpy())
        assert line[f"snr_{name}"] == pytest.approx(snr, abs=0.15)


def test_efficiency_is_variance_times_time_of_the_first() -> None:
    table = compared().table
    assert table["efficiency"].iloc[0] == 1.0
    sizes = {"encoder": 20, "decoder": 16, "prior": 4}
    price = sum(size * table[f"sd_{group}"] ** 2 for group, size in sizes.items()) * table["ms"]
    np.testing.assert_allclose(table["efficiency"], price.iloc[0] / price, rtol=1e-8)
    assert (table["efficiency_se"].iloc[1:] > 0).all()


@pytest.mark.parametrize("distance", [0.0, 0.3, 3.0])
def test_a_squared_distance_and_its_error_are_unbiased(distance: float) -> None:
    """600 simulations, within 4.5 errors; at 0 the jackknife is too wide by up to sqrt(2)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 6
    there = torch.full((6,), distance / math.sqrt(6), dtype=torch.float64)
    found = []
    for _ in range(600):
        noise = torch.randn(24, 6, generator=generator, dtype=torch.float64) @ mixing
        found.append(moments._squared_distance(noise[:20] + there, noise[20:]))
    squares, errors = np.array(found).T
    assert abs(squares.mean() - distance**2) < 4.5 * squares.std() / math.sqrt(600)
    ratio = np.sqrt(np.square(errors).mean()) / squares.std()
    assert 0.85 < ratio < 1.75


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_a_program_of_ones_own_with_a_given_reference(factor: float) -> None:
    """The ELBO is below log p(x) by the KL divergence, within 4.5 errors."""
    program, x = by_hand(factor=factor)
    exact = program.log_evidence(x)
    found = pv.compare_elbos(
        program, x, {"ELBO": E.Trace_ELBO(), "IWAE": E.IWAE(20)}, reference=exact
    )
    assert found.reference == "given, as exact"
    line = found.table.loc["ELBO"]
    assert abs(line["bias"] + program.kl()) < 4.5 * line["bias_se"] + 1e-6
    assert "sd_decoder" not in found.table  # its only weight is also one of the guide


REFERENCES: dict[str, tuple[Any, str]] = {
    "draws": (400, "IWAE(400), a lower bound"),
    "IWAE": (E.IWAE(400), "IWAE(400), a lower bound"),
    "an estimator": (E.MIWAE(4, 100), "MIWAE(4, 100), a lower bound"),
}


@torch.no_grad()
def near() -> pv.VAE:
    """A guide that is the exact posterior, except that its latents are not correlated."""
    vae = linear(LEARNED, posterior=pv.posteriors.Normal(scale=pv.Shared()))
    weight, offset = (p.clone() for p in vae.likelihood.heads["loc"].linear.parameters())
    scaled, prior = weight.T / 0.7**2, vae.prior().base_dist
    precision = scaled @ weight + prior.variance.reciprocal().diag()
    head, covariance = vae.posterior.heads["loc"].linear, precision.inverse()
    head.weight.copy_(covariance @ scaled)
    head.bias.copy_(covariance @ (prior.mean / prior.variance - scaled @ offset))
    link = vae.posterior.links["scale"]
    vae.posterior.shared["scale"].copy_(link.inv(precision.diagonal().rsqrt()))
    return vae


@pytest.mark.parametrize("case", REFERENCES)
def test_references_agree(case: str) -> None:
    """Near the exact posterior, where 100 draws are enough: within 5 errors of both references."""
    reference, label = REFERENCES[case]
    chosen = {"ELBO": E.TraceMeanField_ELBO()}
    found = pv.compare_elbos(near(), X, chosen, reference=reference)
    exact = pv.compare_elbos(near(), X, chosen)
    assert found.reference.startswith(label)
    for name in ("bias", "grad_bias_decoder", "grad_bias_prior"):
        one, other = found.table.iloc[0], exact.table.iloc[0]
        error = math.hypot(one[f"{name}_se"], other[f"{name}_se"])
        assert abs(one[name] - other[name]) < 5 * error + 0.05 * abs(other[name])


def test_a_point_mass_has_no_reference() -> None:
    vae = linear(2, pv.networks.MLP(4), posterior=pv.posteriors.Delta())
    found = pv.compare_elbos(vae, X, {"ELBO": E.Trace_ELBO()}, num_repeats=5)
    assert found.reference == "none: a point mass at z"
    assert math.isnan(found.table.loc["ELBO", "bias"])
    assert math.isnan(found.table.loc["ELBO", "grad_bias_decoder"])
    assert found.table.loc["ELBO", "sd_encoder"] == 0.0  # they still are the encoder's


class Shared(nn.Module):
    """One slope for all rows, and bits of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(2))
        self.logit = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.logit))
            pyro.sample("x", dist.Normal(slope * z + self.shift, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("slope", dist.Normal(self.slope[0], self.slope[1].exp()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.slope[0] * x))


def test_latents_that_all_rows_share() -> None:
    chosen = {"trace": E.Trace_ELBO(), "graph": E.TraceGraph_ELBO()}
    found = pv.compare_elbos(Shared(), torch.randn(10), chosen, num_repeats=100)
    assert found.reference.startswith("none: there are sites that all rows share")
    assert found.table["grad_bias_encoder"].notna().all()
    assert {"sd_encoder", "sd_decoder", "sd_prior"} <= set(found.table)
    with pytest.raises(ValueError, match=r"VIMCO\(2\).*slope outside.*'tight'"):
        pv.compare_elbos(Shared(), torch.randn(10), chosen | {"tight": E.VIMCO(2)})


def test_groups_follow_from_what_depends_on_what() -> None:
    vae = linear(pv.priors.VampPrior(3, 2), pv.networks.MLP(5))
    groups, is_tied = estimators._parameters(vae, X)
    names = {id(p): name.split(".")[0] for name, p in vae.named_parameters()}
    found = {group: {names[id(p)] for p in own} for group, own in groups.items()}
    assert found == {
        "encoder": {"posterior"},
        "decoder": {"decoder", "likelihood"},
        "prior": {"prior"},
    }
    assert is_tied
    assert not estimators._parameters(linear(LEARNED), X)[1]
    chosen = {"PIWAE": E.PIWAE(2, 2), "DReG": E.DReG(2)}
    bias = pv.compare_elbos(vae, X, chosen, num_repeats=20, reference=40).table[
        "grad_bias_encoder"
    ]
    assert math.isnan(bias["PIWAE"])  # two objectives have a parameter in common
    assert math.isfinite(bias["DReG"])


def test_a_scale_that_all_rows_share_changes_nothing() -> None:
    class Scaled(nn.Module):
        def __init__(self, vae: pv.VAE) -> None:
            super().__init__()
            self.vae = vae

        def model(self, x: Tensor) -> None:
            with pyro.poutine.scale(scale=7.0):
                self.vae.model(x)

        def guide(self, x: Tensor) -> None:
            with pyro.poutine.scale(scale=7.0):
                self.vae.guide(x)

    chosen = {"trace": E.Trace_ELBO(), "DReG": E.DReG(3)}
    kept = ["value", "sd_encoder", "sd_decoder", "snr_encoder"]
    one, other = (
        pv.compare_elbos(program, X, chosen, num_repeats=20, reference=40, seed=0).table[kept]
        for program in (linear(), Scaled(linear()))
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-9)


def test_a_schedule_does_not_advance() -> None:
    elbo = E.BetaELBO(beta=lambda step: 1.0 + step)
    found = pv.compare_elbos(linear(), X, {"warm": elbo, "ELBO": E.Trace_ELBO()})
    assert elbo.steps == 0
    difference = found.table["value"].diff().iloc[1]
    assert abs(difference) < 4.5 * np.hypot(*found.table["value_se"])


def test_the_program_does_not_change() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh())
    vae = linear(LEARNED, encoder=network).train()
    for parameter in vae.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, state = weights(vae), torch.get_rng_state()
    chosen: dict[str, Any] = {"a": E.Trace_ELBO(), "b": E.IWAE(3), "c": E.TraceGraph_ELBO()}
    kept = {name: str(vars(elbo)) for name, elbo in chosen.items()}
    found = pv.compare_elbos(vae, X, chosen, num_repeats=8, seed=0)
    found.plot([1, 2], num_repeats=4)
    assert_same(weights(vae), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in vae.modules())
    assert all((p.grad == 1).all() and p.requires_grad for p in vae.parameters())
    assert {name: str(vars(elbo)) for name, elbo in chosen.items()} == kept
    again = pv.compare_elbos(vae, X, chosen, num_repeats=8, seed=0).table
    measured = [n for n in again if not n.startswith(("ms", "memory", "efficiency"))]
    pd.testing.assert_frame_equal(again[measured], found.table[measured])


def test_a_seed_is_drawn_and_recorded() -> None:
    one, two = (pv.compare_elbos(linear(), X, ELBO, num_repeats=4) for _ in range(2))
    assert one.table.attrs["seed"] != two.table.attrs["seed"]
    again = pv.compare_elbos(linear(), X, ELBO, num_repeats=4, seed=one.table.attrs["seed"])
    assert again.table["value"].equals(one.table["value"])


def test_single_precision_and_frames() -> None:
    vae = linear(2, pv.networks.MLP(4)).float()
    frame = pd.DataFrame(X.numpy(), columns=list("abcd"))
    found = pv.compare_elbos(vae, frame, {"DReG": E.DReG(4)}, num_repeats=6, reference=40, seed=0)
    assert found.table.notna().all(axis=None)


def test_live_bytes_are_counted() -> None:
    with LiveBytes() as live:
        a = torch.ones(1000, dtype=torch.float64)
        b = (a + 1.0).view(10, 100)
        del a
        c = b.add_(1.0).T + 2.0
        del b, c
        torch.ones(10)
    assert live.most == 16000
    assert live.now == 0


def test_memory_is_what_a_step_holds() -> None:
    """The tensors of the backward pass grow with K, by some values for each hidden unit."""
    vae, x = linear(2, pv.networks.MLP(64)), X.repeat(10, 1)
    chosen = {str(k): E.IWAE(k) for k in (8, 16, 32)}
    memory = pv.compare_elbos(vae, x, chosen, num_repeats=4, reference=16).table["memory_mb"]
    one, other = memory.diff().iloc[1:]
    assert other == pytest.approx(2 * one, rel=0.1)
    hidden = 120 * 16 * 64 * 8 / 1e6  # one layer's values at K = 16
    assert 1 < memory["16"] / hidden < 8


@pytest.mark.parametrize("groups", [("encoder", "decoder"), ("encoder",)])
def test_the_plot(groups: tuple[str, ...]) -> None:
    program, x = (linear(), X) if len(groups) == 2 else by_hand()
    chosen = {"ELBO": E.Trace_ELBO(), "DReG": E.DReG(2), "VIMCO": E.VIMCO(2)}
    chosen |= {"PIWAE": E.PIWAE(2, 2), "beta": E.BetaELBO(beta=2.0, elbo=E.IWAE(3))}
    found = pv.compare_elbos(program, x, chosen, num_repeats=4, reference=40)
    curves = found.curves([1, 3])
    counts = curves.groupby("estimator", sort=False)["num_particles"].apply(list).to_dict()
    assert list(counts) == list(chosen)
    assert np.isnan(counts.pop("ELBO")).all()
    assert counts == {"DReG": [1, 3], "VIMCO": [3], "PIWAE": [1, 3], "beta": [1, 3]}
    figure = found.plot([1, 3])
    assert isinstance(figure, Figure)
    assert len(figure.axes) == len(groups) + 1
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlabel() == "draws K"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["median of |mean| / s.d."] * len(groups) + ["ms a step"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*chosen, "noise floor"]
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= max(a.get_window_extent().x1 for a in figure.axes)


def test_it_prints_itself() -> None:
    text = repr(compared())
    assert "bias to: exact" in text
    assert "gradient of the encoder" in text
    assert max(map(len, text.splitlines())) < 120
    assert "<table" in compared()._repr_html_()


def test_a_summary_in_sentences() -> None:
    chosen = {"wrong": StickingInside(5), "right": E.DReG(5)}
    found = pv.compare_elbos(linear(), X, chosen, num_repeats=200, seed=0)
    text, line = found.summary(), found.table.loc["right"]
    assert text.startswith("Each estimator was evaluated 200 times on 12 rows.")
    assert "The reference of log p(x) is exact." in text
    assert "The reference of the gradients of decoder and prior is exact." in text
    assert f"'right' (lower bound) is {line['value']:.3f} (s.e. {line['value_se']:.3f})" in text
    assert f"{-line['bias']:.3f} (s.e. {line['bias_se']:.3f}) below the reference." in text
    assert "The gradient of the encoder has a clear bias for 'wrong'." in text
    best = found.table["efficiency"].idxmax()
    sentence = f"{best!r} needs the least compute for the same noise"
    assert (sentence if best == "right" else "No other estimator has a larger") in text


def test_a_summary_without_a_reference() -> None:
    vae = linear(2, pv.networks.MLP(4), posterior=pv.posteriors.Delta())
    text = pv.compare_elbos(vae, X, ELBO, num_repeats=5).summary()
    assert "There is no reference of log p(x): a point mass at z." in text
    assert "the reference." not in text
    assert "The reference of" not in text
    assert "fficiency" not in text


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no estimators": (lambda: pv.compare_elbos(linear(), X, {}), "dict of estimators"),
    "a list": (lambda: pv.compare_elbos(linear(), X, [E.IWAE(2)]), "dict of estimators"),
    "a class": (lambda: ask({"a": E.IWAE}), r"such as .*Trace_ELBO\(\); got <class .*IWAE.*'a'"),
    "an ELBO of Pyro": (lambda: ask({"a": pyro.infer.Trace_ELBO()}), "pyro_vae.elbos.*'a'"),
    "few repeats": (lambda: ask(num_repeats=3), "num_repeats .* at least 4; got 3"),
    "half a repeat": (lambda: ask(num_repeats=10.5), "num_repeats"),
    "few draws": (lambda: ask(reference=8), "reference .* at least 16; got 8"),
    "a wrong length": (lambda: ask(reference=np.zeros(3)), "12 finite numbers.*shape"),
    "not finite": (lambda: ask(reference=np.full(12, np.nan)), "12 finite numbers"),
    "no rows": (lambda: pv.compare_elbos(linear(), X[:0], ELBO), "at least one row"),
    "other columns": (lambda: pv.compare_elbos(linear(), X[:, :2], ELBO), "event shape"),
    "no program": (lambda: pv.compare_elbos(nn.Linear(2, 2), X, ELBO), "Expected a program"),
    "no parameters": (
        lambda: pv.compare_elbos(linear().requires_grad_(False), X, ELBO),
        "parameters that take a gradient",
    ),
    "no rsample": (
        lambda: pv.compare_elbos(discrete(), X, {"fine": E.VIMCO(2), "bad": E.DReG(2)}),
        r"rsample, under DReG\(2\).*'bad'",
    ),
    "wrong when called": (
        lambda: ask({"tc": E.TotalCorrelation(beta=2.0)}, linear(posterior=FULL_GUIDE)),
        "independent over the elements.*'tc'",
    ),
    "a wrong reference": (
        lambda: pv.compare_elbos(discrete(), X, {"a": E.VIMCO(2)}, reference=E.DReG(9)),
        r"rsample.*\(reference\)",
    ),
    "no counts": (lambda: compared().plot([]), "at least one number of particles"),
    "a count of 0": (lambda: compared().curves([0]), "num_particles"),
    "not curves": (lambda: pv.plots.estimators(pd.DataFrame()), "table with the columns"),
}
ELBO = {"ELBO": E.Trace_ELBO()}
FULL_GUIDE = pv.posteriors.MultivariateNormal()


def ask(elbos: Any = None, program: nn.Module | None = None, **options: Any) -> Comparison:
    return pv.compare_elbos(program or linear(), X, elbos or ELBO, **options)


def discrete() -> pv.VAE:
    prior = dist.Bernoulli(probs=0.5).expand([2]).to_event(1)
    return linear(prior, posterior=dist.Bernoulli)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_discrete_latents() -> None:
    """VIMCO and RWS have the gradient of IWAE(4) in the decoder, within 6 errors."""
    chosen = {"VIMCO": E.VIMCO(4), "RWS": E.RWS(4), "trace": E.Trace_ELBO()}
    found = pv.compare_elbos(discrete(), X, chosen, num_repeats=100, reference=400)
    bias = found.table["grad_bias_encoder"]
    assert np.isnan(bias[["VIMCO", "RWS"]]).all()
    assert bias["trace"] < 6 * found.table.loc["trace", "grad_bias_encoder_se"]
    one, other = found.table.loc["VIMCO"], found.table.loc["RWS"]
    error = math.hypot(one["grad_bias_decoder_se"], other["grad_bias_decoder_se"])
    assert abs(one["grad_bias_decoder"] - other["grad_bias_decoder"]) < 6 * error


def test_there_is_no_distance_without_a_gradient() -> None:
    """At the exact posterior the gradient of the encoder is noise around 0, so its bias is NaN."""
    program, x = by_hand()
    program.requires_grad_(False)
    program.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    posterior = program.posterior
    program.posterior = lambda x: (posterior(x)[0] + program.shift, posterior(x)[1])
    found = pv.compare_elbos(program, x, {"ELBO": E.Trace_ELBO(), "STL": E.STL()})
    assert found.table["grad_bias_encoder"].isna().all()
    assert found.table.loc["STL", "sd_encoder"] < 1e-6
    assert (
        0.1 < found.table.loc["ELBO", "snr_encoder"] / found.table["snr_floor_encoder"].iloc[0] < 4
    )
