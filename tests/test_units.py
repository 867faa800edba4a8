"""Units and starts: a VAE of a raw table is the VAE of standardised columns, in its own units."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from sklearn.datasets import load_iris, load_wine
from sklearn.decomposition import FactorAnalysis
from torch import nn

import pyro_vae as pv
from pyro_vae.distributions.starts import STARTS
from pyro_vae.distributions.units import Affine, resolution

IRIS = load_iris().data + np.random.default_rng(0).uniform(-0.05, 0.05, size=(150, 4))
POWERS = np.array([-30, 0, 7, 40])
QUICK: dict[str, Any] = {"max_epochs": 4, "seed": 0, "device": "cpu", "progress": False}
COUNTS = np.random.default_rng(0).negative_binomial(3.0, 0.2, size=(400, 3)).astype(float)
SHARES = np.random.default_rng(1).beta([2.0, 0.7, 40.0], [5.0, 0.7, 9.0], size=(400, 3))


def vae_of(likelihood: Any, x: np.ndarray = IRIS, **members: Any) -> pv.VAE:
    return pv.VAE(x.shape[1], 2, likelihood, seed=0, **members)


def parameters(vae: pv.VAE) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in vae.named_parameters()}


MEASURED = {
    "Normal": pv.likelihoods.Normal,
    "StudentT": pv.likelihoods.StudentT,
    "Laplace": pv.likelihoods.Laplace,
    "Gamma": pv.likelihoods.Gamma,
    "LogNormal": pv.likelihoods.LogNormal,
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_change_of_units_changes_log_p_by_its_jacobian_alone(name: str) -> None:
    raw, scaled = vae_of(MEASURED[name]()), vae_of(MEASURED[name]())
    histories = [pv.fit(raw, IRIS, **QUICK), pv.fit(scaled, IRIS * 2.0**POWERS, **QUICK)]
    for key, value in parameters(raw).items():
        assert torch.equal(value, parameters(scaled)[key]), key
    shift = POWERS.sum() * np.log(2.0)
    elbos = [history.table.elbo.iloc[-1] for history in histories]
    assert elbos[1] == pytest.approx(elbos[0] - shift, abs=1e-4)
    scores = [
        pv.elbos.IWAE(50).per_row(vae, x, seed=0).value.numpy()  # of the same draws
        for vae, x in ((raw, IRIS), (scaled, IRIS * 2.0**POWERS))
    ]
    np.testing.assert_allclose(scores[1], scores[0] - shift, atol=1e-4)


@pytest.mark.parametrize("name", ["Normal", "StudentT", "Laplace"])
def test_a_raw_fit_is_the_fit_of_data_standardised_by_hand(name: str) -> None:
    x = IRIS * [1e-8, 1.0, 1e5, 1e12] + [0.0, 2000.0, -1e6, 0.0]
    mean, scale = x.mean(0), np.sqrt(np.square(x - x.mean(0)).mean(0))
    raw, by_hand = vae_of(MEASURED[name]()), vae_of(MEASURED[name]())
    u = torch.as_tensor(x) - torch.as_tensor(x).mean(0)
    u = u / u.square().mean(0).sqrt()
    pv.fit(raw.initialize(x), x, validation=None, **QUICK)
    pv.fit(by_hand.initialize(u, standardize=False), u, validation=None, **QUICK)
    for key, value in parameters(raw).items():
        assert torch.equal(value, parameters(by_hand)[key]), key
    scores = [
        pv.elbos.IWAE(50).per_row(vae, rows, seed=0).value.numpy()
        for vae, rows in ((raw, x), (by_hand, u))
    ]
    np.testing.assert_allclose(scores[0], scores[1] - np.log(scale).sum(), atol=1e-3)
    assert np.abs(raw.units.loc.numpy() - mean).max() <= 1e-9 * np.abs(mean).max()


def test_a_density_at_a_large_offset_keeps_its_digits() -> None:
    loc = torch.tensor([2000.0, 1e9], dtype=torch.float64)
    scale = torch.tensor([0.5, 1e-2], dtype=torch.float64)
    law = Affine(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), loc, scale)
    x = law.sample((100,))
    exact = stats.norm(loc, scale).logpdf(x.numpy()).sum(1)
    np.testing.assert_allclose(law.log_prob(x), exact, atol=1e-5)
    assert x.dtype == torch.float64
    assert x.std(0)[1] == pytest.approx(1e-2, rel=0.3)
    wide = law.expand((3,))
    assert (wide.batch_shape, wide.sample().shape, wide.mean.shape) == ((3,), (3, 2), (3, 2))
    one = law.base_dist
    np.testing.assert_allclose(one.cdf(one.icdf(torch.full((2,), 0.3))), 0.3, atol=1e-5)
    np.testing.assert_allclose(law.variance, scale.square())


def test_fixed_values_and_initial_values_are_in_the_units_of_the_data() -> None:
    x = IRIS * 1000.0 + 5e4
    z = torch.zeros(2)
    fixed = vae_of(pv.likelihoods.Normal(scale=70.0)).initialize(x)
    np.testing.assert_allclose(fixed.decode(z).stddev.detach(), 70.0, rtol=1e-5)
    begun = vae_of(pv.likelihoods.Normal(scale=pv.Shared(init=70.0))).initialize(x)
    np.testing.assert_allclose(begun.decode(z).stddev.detach(), 70.0, rtol=1e-4)
    centre = torch.as_tensor(x.mean(0) + 3.0)
    known = vae_of(pv.likelihoods.Laplace(loc=centre)).initialize(x)
    np.testing.assert_allclose(known.decode(z).mean.detach(), centre, rtol=1e-6)
    rate = vae_of(pv.likelihoods.Gamma(concentration=3.0, rate=0.001)).initialize(x)
    np.testing.assert_allclose(rate.decode(z).mean.detach(), 3000.0, rtol=1e-5)


def test_one_scale_for_all_columns_is_one_in_the_units_of_the_data() -> None:
    x = IRIS * [1.0, 3.0, 9.0, 27.0]
    vae = vae_of(pv.likelihoods.Normal(scale=pv.Shared(scalar=True))).initialize(x)
    spread = vae.decode(torch.zeros(2)).stddev.detach()
    assert spread.unique().numel() == 1
    assert spread[0] == pytest.approx(np.sqrt(x.var(0).mean()), rel=1e-3)


def mle(law: Any, x: np.ndarray, start: list[float]) -> float:
    """The largest mean log-likelihood of a column, over logarithms of positive parameters."""
    found = optimize.minimize(
        lambda free: -law(*np.exp(free)).mean(), np.log(start), method="Nelder-Mead"
    )
    return -found.fun


def best(name: str, x: np.ndarray) -> float:
    """The sum over columns of the largest mean log-likelihood."""
    if name == "Poisson":
        return sum(stats.poisson(c.mean()).logpmf(c).mean() for c in x.T)
    if name == "NegativeBinomial":
        return sum(
            mle(lambda r, m, c=c: stats.nbinom(r, r / (r + m)).logpmf(c), c, [1.0, c.mean()])
            for c in x.T
        )
    if name in ("Binomial", "BetaBinomial"):
        total = 200
        if name == "Binomial":
            return sum(stats.binom(total, c.mean() / total).logpmf(c).mean() for c in x.T)
        return sum(
            mle(lambda a, b, c=c: stats.betabinom(total, a, b).logpmf(c), c, [1.0, 10.0])
            for c in x.T
        )
    laws = {
        "Normal": lambda c: stats.norm(*stats.norm.fit(c)),
        "Laplace": lambda c: stats.laplace(*stats.laplace.fit(c)),
        "LogNormal": lambda c: stats.lognorm(*stats.lognorm.fit(c, floc=0.0)),
        "Gamma": lambda c: stats.gamma(*stats.gamma.fit(c, floc=0.0)),
        "Beta": lambda c: stats.beta(*stats.beta.fit(c, floc=0.0, fscale=1.0)),
    }
    if name == "StudentT":
        return sum(
            mle(lambda df, m, s, c=c: stats.t(df, m, s).logpdf(c), c, [4.0, c.mean(), c.std()])
            for c in x.T
        )
    return sum(laws[name](c).logpdf(c).mean() for c in x.T)


STARTED: dict[str, tuple[Any, np.ndarray, float]] = {
    "Normal": (pv.likelihoods.Normal(), IRIS * 100.0, 1e-3),
    "Laplace": (pv.likelihoods.Laplace(), IRIS * 100.0, 1e-3),
    "LogNormal": (pv.likelihoods.LogNormal(), IRIS * 100.0, 1e-3),
    "Gamma": (pv.likelihoods.Gamma(), IRIS * 100.0, 1e-3),
    "StudentT": (
        pv.likelihoods.StudentT(),
        np.random.default_rng(2).standard_t(3.0, size=(500, 4)) * 9.0 + 50.0,
        5e-3,
    ),
    "Beta": (pv.likelihoods.Beta(), SHARES, 1e-3),
    "Poisson": (pv.likelihoods.Poisson(), COUNTS, 1e-3),
    "NegativeBinomial": (pv.likelihoods.NegativeBinomial(), COUNTS, 1e-3),
    "Binomial": (pv.likelihoods.Binomial(200), COUNTS, 1e-3),
    "BetaBinomial": (pv.likelihoods.BetaBinomial(200), COUNTS, 0.02),
}


@pytest.mark.parametrize("name", STARTED)
def test_a_fit_starts_at_the_maximum_likelihood_of_each_column(name: str) -> None:
    likelihood, x, tolerance = STARTED[name]
    vae = vae_of(likelihood, x).initialize(x)
    wanted = best(name, x)
    assert float(vae.baselines(x).independent_columns.mean()) == pytest.approx(
        wanted, abs=tolerance
    )
    start = pv.log_evidence(vae, x, num_samples=50, seed=0).log_evidence.mean()
    assert float(start) == pytest.approx(wanted, abs=0.3)


def test_bits_and_categories_start_at_their_shares() -> None:
    bits = (np.random.default_rng(0).random((300, 3)) < [0.1, 0.5, 0.97]).astype(float)
    vae = vae_of(pv.likelihoods.Bernoulli(), bits).initialize(bits)
    shares = vae.units.constants["logits"].sigmoid()
    np.testing.assert_allclose(shares, (bits.sum(0) + 0.5) / 301.0, rtol=1e-5)
    codes = np.random.default_rng(0).integers(0, 3, size=(300, 2)).astype(float)
    vae = vae_of(pv.likelihoods.Categorical(4), codes).initialize(codes)
    found = vae.units.constants["logits"].softmax(-1)
    counts = np.stack([np.bincount(c.astype(int), minlength=4) + 0.5 for c in codes.T])
    np.testing.assert_allclose(found, counts / 302.0, rtol=1e-5)


def test_another_distribution_starts_by_a_short_fit_and_keeps_its_units() -> None:
    x = np.random.default_rng(0).gumbel(2.0, 0.5, size=(400, 3))
    assert dist.Gumbel not in STARTS
    before, vae = (
        vae_of(pv.likelihoods.Family(dist.Gumbel, scale=pv.Shared()), x) for _ in range(2)
    )
    vae.initialize(x)
    assert vae.units.loc is None
    wanted = sum(stats.gumbel_r(*stats.gumbel_r.fit(c)).logpdf(c).mean() for c in x.T)
    start = pv.log_evidence(vae, x, num_samples=50, seed=0).log_evidence.mean()
    assert float(start) == pytest.approx(wanted, abs=0.1)
    unfitted = pv.log_evidence(before, x, num_samples=50, seed=0).log_evidence.mean()
    assert float(unfitted) < wanted - 1.0


@pytest.mark.parametrize(
    "posterior",
    [
        pv.posteriors.Normal(),
        pv.posteriors.MultivariateNormal(),
        pv.posteriors.LowRankMultivariateNormal(1),
    ],
    ids=["Normal", "full", "low rank"],
)
def test_the_posterior_starts_at_the_prior(posterior: Any) -> None:
    prior = dist.Normal(torch.tensor([3.0, -2.0]), torch.tensor([0.5, 4.0])).to_event(1)
    vae = pv.VAE(4, prior, pv.likelihoods.Normal(), posterior, seed=0).initialize(IRIS)
    q = vae.encode(torch.as_tensor(IRIS))
    np.testing.assert_allclose(q.mean.detach(), prior.mean.expand(150, 2), atol=0.7)
    spread = q.variance.detach().sqrt()
    np.testing.assert_allclose(spread, prior.stddev.expand(150, 2), rtol=0.35)


@pytest.mark.parametrize(
    ("likelihood", "x", "form"),
    [
        (pv.likelihoods.Normal(), IRIS, None),
        (pv.likelihoods.Gamma(), IRIS, "log x"),
        (pv.likelihoods.Poisson(), COUNTS, "log1p x"),
        (pv.likelihoods.Binomial(200), COUNTS, "x"),
        (pv.likelihoods.Beta(), SHARES, "x"),
        (pv.likelihoods.Bernoulli(), np.eye(3), None),
    ],
    ids=["real", "positive", "counts", "out of a total", "shares", "bits"],
)
def test_the_encoder_sees_columns_by_their_kind(
    likelihood: Any, x: np.ndarray, form: str | None
) -> None:
    vae = vae_of(likelihood, x).initialize(x)
    assert vae.units.form == form
    seen = vae.units.inputs(torch.as_tensor(x))
    if form is not None or vae.units.loc is not None:
        np.testing.assert_allclose(seen.mean(0), 0.0, atol=1e-6)
        assert (seen.std(0, correction=0) <= 1.0 + 1e-6).all()
    assert ("standardized" in repr(vae)) == (not isinstance(likelihood, pv.likelihoods.Bernoulli))


def test_an_image_with_constant_pixels_is_not_blown_up() -> None:
    x = np.random.default_rng(0).integers(0, 17, size=(50, 8, 8)).astype(float)
    x[:, 0], x[:, 1] = 0.0, 3.0
    x[7, 0, 0] = 1.0
    vae = pv.VAE((8, 8), 2, pv.likelihoods.Binomial(16), seed=0).initialize(x)
    assert vae.units.inputs(torch.as_tensor(x)).abs().max() < 5.0


def test_a_second_fit_keeps_the_units() -> None:
    vae = vae_of(pv.likelihoods.Normal())
    pv.fit(vae, IRIS, **QUICK)
    loc = vae.units.loc.clone()
    pv.fit(vae, IRIS + 7.0, **QUICK)
    assert torch.equal(vae.units.loc, loc)
    for moved in (vae.to(torch.float64), vae.to(torch.float32)):
        assert moved.units.loc.dtype == torch.float64


@pytest.mark.parametrize("into", [False, True])
def test_units_and_baselines_are_saved(into: bool, tmp_path: Path) -> None:
    vae = vae_of(pv.likelihoods.StudentT(scale=pv.Shared(), df=5.0))
    pv.fit(vae, IRIS * 1e4, **QUICK)
    other = vae_of(pv.likelihoods.StudentT(df=5.0)) if into else None
    loaded = pv.load(pv.save(vae, tmp_path / "vae"), into=other)
    assert torch.equal(loaded.sample(5, seed=0), vae.sample(5, seed=0))
    x = IRIS[:9] * 1e4
    assert loaded.baselines(x).equals(vae.baselines(x))
    scores = [pv.log_evidence(v, x, num_samples=9, seed=0) for v in (vae, loaded)]
    assert scores[0].log_evidence.equals(scores[1].log_evidence)


def test_baselines_are_those_of_scipy_and_scikit_learn() -> None:
    x = load_wine().data
    train, test = x[::2], x[1::2]
    vae = vae_of(pv.likelihoods.Normal(), x)
    with pytest.raises(ValueError, match="fit it, or call initialize"):
        vae.baselines(test)
    found = vae.initialize(train).baselines(test)
    mean, scale = train.mean(0), train.std(0)
    independent = stats.norm(mean, scale).logpdf(test).sum(1)
    np.testing.assert_allclose(found.independent_columns, independent, atol=1e-3)
    factors = FactorAnalysis(2, tol=1e-10, max_iter=20_000).fit((train - mean) / scale)
    wanted = factors.score_samples((test - mean) / scale) - np.log(scale).sum()
    np.testing.assert_allclose(found.factor_analysis.mean(), wanted.mean(), atol=0.01)
    np.testing.assert_allclose(found.factor_analysis, wanted, atol=0.05)


@pytest.mark.filterwarnings("ignore::pyro_vae.DegenerateColumnsWarning")
def test_scales_are_bounded_by_the_resolution_of_the_columns() -> None:
    rng = np.random.default_rng(0)
    whole, fine = rng.integers(0, 9, size=300).astype(float), rng.normal(size=300)
    spiked = np.where(rng.random(300) < 0.6, 0.0, rng.normal(size=300))
    x = np.stack([whole, fine, spiked], 1)
    least = resolution(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(least, [0.5, 1e-3 * fine.std(), 1e-3 * spiked.std()], rtol=1e-3)
    vae = vae_of(pv.likelihoods.Normal(scale=pv.Predicted()), x).initialize(x)
    with torch.no_grad():
        for parameter in vae.likelihood.parameters():
            parameter -= 100.0
    spread = vae.decode(torch.zeros(2)).stddev.detach().numpy()
    assert (spread >= least * (1 - 1e-6)).all()


def test_the_weight_prior_reaches_the_matrices_of_networks_alone() -> None:
    vae = vae_of(pv.likelihoods.Normal())
    names = {id(p): n for n, p in vae.named_parameters()}
    chosen = {names[id(p)] for p in vae.network_weights()}
    assert chosen == {n for n in names.values() if n.endswith(".weight")}
    linear = vae_of(pv.likelihoods.Normal(), encoder=nn.Identity(), decoder=nn.Identity())
    assert linear.network_weights() == []
    norms = []
    for weight_prior in (None, 1.0, 0.05):
        vae = vae_of(pv.likelihoods.Normal())
        history = pv.fit(vae, IRIS, **QUICK | {"max_epochs": 60}, weight_prior=weight_prior)
        norms.append(sum(float(w.detach().square().sum()) for w in vae.network_weights()))
        assert history.table.elbo.iloc[-1] < 0.0  # no term of the prior is in it
    assert norms[0] > norms[1] > 5.0 * norms[2]


def test_pyros_own_svi_trains_after_initialize() -> None:
    import pyro

    vae = vae_of(pv.likelihoods.Normal()).initialize(IRIS * 1e3)
    x = torch.as_tensor(IRIS * 1e3)
    svi = pyro.infer.SVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 5e-3}), pyro.infer.Trace_ELBO()
    )
    start = svi.evaluate_loss(x) / 150
    for _ in range(300):
        svi.step(x)
    assert svi.evaluate_loss(x) / 150 < start - 1.0


def test_a_vae_that_was_never_initialised_says_so_once() -> None:
    said = r"never initialised.*vae\.initialize\(x\)"
    vae, x = vae_of(pv.likelihoods.Normal()), torch.as_tensor(IRIS)
    with pytest.warns(UserWarning, match=said) as caught:
        vae.model(x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.model(x)
        vae_of(pv.likelihoods.Normal()).initialize(x).model(x)
        untrained = vae_of(pv.likelihoods.Normal())
        untrained.model(size=3)
        pv.log_evidence(untrained, x, 20, seed=0)


def test_waiting_times_may_be_zero() -> None:
    x = np.random.default_rng(0).exponential([1e-3, 1e6], size=(200, 2))
    x[:15, 0], x[:, 1] = 0.0, np.where(x[:, 1] < 2e5, 0.0, x[:, 1])
    vae = vae_of(pv.likelihoods.Family(dist.Exponential), x)
    with pytest.warns(pv.DegenerateColumnsWarning, match="of one value") as caught:
        assert np.isfinite(pv.fit(vae, x, **QUICK).table.elbo).all()
    assert caught[0].filename == __file__
    assert "factor_analysis" not in vae.baselines(x)


def test_compare_shows_the_baselines_and_marks_a_model_below_them() -> None:
    train, test = IRIS[::2], IRIS[1::2]
    good, bad = vae_of(pv.likelihoods.Normal()), vae_of(pv.likelihoods.Normal())
    pv.fit(good, train, max_steps=1500, **QUICK | {"max_epochs": None})
    pv.fit(bad, train, **QUICK)
    with torch.no_grad():
        bad.likelihood.shared["scale"] += 3.0
    table = pv.compare({"good": good, "bad": bad}, test, 50, seed=0, progress=False)
    baselines = table.attrs["baselines"]
    assert set(baselines) == {
        "independent columns of 'good'",
        "independent columns of 'bad'",
        "factor analysis",
    }
    wanted = good.baselines(test).independent_columns
    assert baselines["independent columns of 'good'"][0] == pytest.approx(float(wanted.mean()))
    assert table.loc["good", "below"] == ""
    assert "independent columns of 'bad'" in table.loc["bad", "below"]
    assert "has not converged" in table.loc["bad", "advice"]
    assert "'bad' is below" in table.summary()
    assert "For comparison, factor analysis" in table.summary()
