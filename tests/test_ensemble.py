"""ensemble: the same fits as by hand, the spread that training adds, and how it ends."""

import math
import os
import signal
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from programs import LinearGaussian, linear_gaussian
from scipy.stats import ortho_group
from small_vae import X, assert_same, small, weights

import pyro_vae as pv
from pyro_vae.engine.row_noise import row_digests
from pyro_vae.training.ensemble import aligned

QUICK: dict[str, Any] = {"max_epochs": 2, "batch_size": 16, "lr": 0.01, "device": "cpu"}
QUIET: dict[str, Any] = {"seed": 0, "progress": False}


def ensemble(build: Any = small, x: Any = X, **options: Any) -> pv.Ensemble:
    return pv.ensemble(build, x, **{"seeds": [3, 5]} | QUICK | options)


@pytest.mark.parametrize(
    "options", [{}, {"validation": None}, {"elbo": pv.elbos.IWAE(3)}], ids=str
)
def test_the_members_are_the_fits_of_their_seeds(options: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    found, again = (ensemble(**options) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert found.seeds == [3, 5]
    for seed, program, other in zip(found.seeds, found.programs, again.programs, strict=True):
        alone = small(seed)
        history = pv.fit(alone, X, seed=seed, progress=False, **QUICK, **options)
        assert_same(weights(program), weights(alone))
        assert_same(weights(program), weights(other))
        column = "elbo" if options.get("validation", 0) is None else "validation_elbo"
        assert found.table.loc[seed, column] == history.table[column].dropna().iloc[-1]


def test_a_number_of_seeds_are_the_first() -> None:
    found = ensemble(seeds=3)
    assert found.seeds == [0, 1, 2]
    assert len(found) == len(found.programs) == len(found.histories) == len(found.table) == 3
    assert len({str(weights(program)) for program in found.programs}) == 3


@pytest.mark.parametrize(
    "validation", ["auto", 0.2, X[:7], None], ids=["auto", "0.2", "rows", "none"]
)
def test_a_bootstrap_draws_rows_anew_and_none_of_those_held_out(
    validation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__("sys").modules["pyro_vae.training.ensemble"]
    seen: list[tuple[Any, Any]] = []

    def recorded(program: Any, x: Any, **options: Any) -> Any:
        seen.append((x, options["validation"]))
        return pv.fit(program, x, **options)

    monkeypatch.setattr(module, "fit", recorded)
    wide = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).sigmoid()
    found = ensemble(
        lambda seed: pv.VAE(6, 2, pv.likelihoods.Normal(), seed=seed),
        wide,
        bootstrap=True,
        validation=wide[:7] if torch.is_tensor(validation) else validation,
    )
    drawn = []
    for train, held_out in seen:
        digests = row_digests(train)
        drawn.append(digests)
        assert len(train) == {"auto": 54, "0.2": 48}.get(str(validation), 60)
        assert 0.5 < len(np.unique(digests)) / len(digests) < 0.8
        if isinstance(validation, str | float):
            assert not np.isin(row_digests(held_out), digests).any()
    assert not np.array_equal(np.sort(drawn[0]), np.sort(drawn[1]))
    assert found.training == "seeds and bootstraps of the rows"
    for program in found.programs:
        with pytest.raises(ValueError, match="1 of the 13 calibration rows are rows of the fit"):
            pv.conformal(program, torch.cat([wide[:1], wide[:12] / 2]), **QUIET)


# Spread


def moved(shifts: list[float], **options: float) -> tuple[pv.Ensemble, torch.Tensor]:
    """Members whose exact log p(x) is known: their weights are times 1 + shift, and rotated."""
    program, x = linear_gaussian(60, **options)
    members = []
    for place, shift in enumerate(shifts):
        turn = torch.from_numpy(ortho_group.rvs(2, random_state=place))
        members.append(LinearGaussian(program.weight.detach() * (1 + shift) @ turn, **options))
    return pv.Ensemble(members, [], list(range(len(shifts)))), x


def test_the_spread_of_log_evidence_is_that_of_training() -> None:
    members, x = moved([-0.2, 0.0, 0.1, 0.3])
    exact = np.stack([program.log_evidence(x) for program in members.programs])
    found = members.evidence(x, 200, **QUIET)
    assert np.allclose(found["log_evidence"], exact)
    assert np.allclose(found["mean"], exact.mean(0))
    assert np.allclose(found["training_sd"], exact.std(0, ddof=1))
    table = found.summary()
    assert table.loc["training", "sd"] == pytest.approx(exact.mean(1).std(ddof=1))
    assert table.loc["rows", "sd"] == pytest.approx(exact.mean(0).std(ddof=1))
    assert table.loc["draws", "sd"] < 1e-6
    assert table["se"].tolist() == pytest.approx((table["sd"] / np.sqrt([4, 60, 240])).tolist())
    assert table.attrs["log_evidence"] == pytest.approx(exact.mean())


def test_the_error_of_draws_is_no_spread_of_training() -> None:
    members, x = moved([0.0] * 12, factor=1.3)
    found = members.evidence(x, 100, **QUIET)
    raw = found["log_evidence"].std("member", ddof=1)
    assert float(raw.mean()) > 0.03
    table = found.summary()
    assert table.loc["training", "sd"] < 0.01 < table.loc["draws", "sd"]
    assert float((found["training_sd"] ** 2).mean()) < 0.3 * float((raw**2).mean())


def test_a_rotation_is_no_spread_of_embeddings() -> None:
    members, x = moved([0.0] * 4)
    found = members.embed(x, **QUIET)
    exact, covariance = members.programs[0].posterior(x)
    assert np.allclose(found["centre"], exact.detach())
    assert float(found["training_sd"].max()) < 1e-6
    assert np.allclose(found["similarity"], 1.0)
    assert np.allclose(found["rows_sd"], exact.detach().std(0))
    assert np.allclose(found["guide_sd"][:, 0], covariance[0, 0].sqrt().item(), rtol=0.3)
    others, _ = moved([0.0, 0.5])
    spread = others.embed(x, **QUIET)
    assert float(spread["training_sd"].mean()) > 0.1
    assert float(spread["similarity"].min()) < 0.99


def test_means_by_draws_do_not_add_their_error_to_the_spread() -> None:
    def build(seed: int) -> pv.VAE:
        prior = dist.LogNormal(torch.zeros(2), 1.0).to_event(1)
        return pv.VAE(6, prior, pv.likelihoods.Normal(), seed=0)

    members = pv.Ensemble([build(0)] * 10, [], list(range(10)))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = members.embed(x, 50, progress=False)
    raw = found["mean"].std("member", ddof=1)
    assert float((found["training_sd"] ** 2).mean()) < 0.6 * float((raw**2).mean())


@pytest.mark.parametrize("shape", [(30, 1), (30, 2), (30, 5), (3, 5)])
def test_alignment_undoes_rotations_in_the_axes_of_the_first(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=shape)
    turned = [first]
    for seed in range(4):
        turn = ortho_group.rvs(shape[1], random_state=seed) if shape[1] > 1 else -np.ones((1, 1))
        turned.append(first @ turn)
    stack = np.stack(turned)
    assert np.allclose(stack @ aligned(stack), first)
    noisy = stack + 0.1 * rng.normal(size=stack.shape)
    rotations = aligned(noisy)
    assert np.allclose(rotations[0], np.eye(shape[1]))
    assert np.allclose(rotations @ rotations.swapaxes(1, 2), np.eye(shape[1]))


def test_members_with_other_numbers_of_latents_have_no_common_embedding() -> None:
    found = ensemble(lambda seed: small(seed, prior=1 + seed), seeds=2)
    assert found.evidence(X, 50, **QUIET).sizes == {"member": 2, "datum": 50}
    with pytest.raises(ValueError, match=r"same number of latents, .* got \[1, 2\]"):
        found.embed(X)


def test_one_member_has_no_spread() -> None:
    found = ensemble(seeds=[4])
    evidence = found.evidence(X, 50, **QUIET)
    assert np.isnan(evidence["training_sd"]).all()
    assert np.isnan(evidence.summary().loc["training", "sd"])
    assert np.isfinite(evidence.summary().loc["rows", "sd"])
    assert np.allclose(found.embed(X)["mean"][0], pv.embed(found.programs[0], X)["mean"])


def test_an_impossible_row_has_no_spread_and_spoils_no_other() -> None:
    x = X.clone()
    x[3] = 0.5
    found = ensemble().evidence(x, 50, on_invalid="inf", **QUIET)
    assert np.flatnonzero(np.isnan(found["training_sd"])).tolist() == [3]
    assert found.summary().attrs["log_evidence"] == -math.inf


def test_the_same_seed_gives_the_same_numbers() -> None:
    found = ensemble()
    for call in (lambda s: found.evidence(X, 50, seed=s), lambda s: found.embed(X, seed=s)):
        assert call(2).equals(call(2))
    assert not found.evidence(X, 50, seed=2).equals(found.evidence(X, 50, seed=3))


def test_it_prints_and_draws() -> None:
    found = ensemble(max_epochs=4)
    assert repr(found).startswith("Ensemble of 2 fits that differ in their seeds\n")
    assert "max_epochs" in repr(found)
    axes = found.plot().axes[0]
    assert axes.get_legend_handles_labels()[1] == ["seed 3", "seed 5"]
    assert "rows that each fit held out" in axes.get_ylabel()
    assert "training rows" in ensemble(validation=None).plot().axes[0].get_ylabel()
    with pytest.raises(ValueError, match="Expected an ensemble of fits"):
        pv.plots.ensemble(pv.Ensemble())


# How it ends


def interrupt(record: dict[str, float]) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_ctrl_c_keeps_the_fits_that_are_done(done: int) -> None:
    counted: list[int] = []

    def build(seed: int) -> pv.VAE:
        counted.append(seed)
        return small(seed)

    def at_epoch(record: dict[str, float]) -> None:
        if len(counted) - 2 > done:  # two are built to check the function
            interrupt(record)

    options = {"seeds": 4, "callbacks": [at_epoch], "max_epochs": 3}
    if not done:
        with pytest.raises(KeyboardInterrupt):
            ensemble(build, **options)
        return
    found = ensemble(build, **options)
    assert (found.stopped, found.seeds) == ("interrupted", list(range(done)))
    assert "(interrupted)" in repr(found)
    assert_same(
        weights(found.programs[-1]), weights(ensemble(seeds=done, max_epochs=3).programs[-1])
    )


class Failing(pv.elbos.Trace_ELBO):
    """Its loss is NaN for weights of some seeds."""

    def estimate(self, *args: Any) -> Any:
        estimate = super().estimate(*args)
        return estimate._replace(loss=estimate.loss * self.factor)


def test_a_fit_that_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(seed: int) -> pv.VAE:
        monkeypatch.setattr(Failing, "factor", math.nan if seed else 1.0, raising=False)
        return small(seed)

    with (
        pytest.warns(UserWarning, match="learning rate was halved"),
        pytest.warns(UserWarning, match=r"at the seeds \[1\], whose fits are left out"),
    ):
        found = ensemble(build, seeds=[0, 1], elbo=Failing())
    assert found.seeds == [0]
    with (
        pytest.warns(UserWarning, match="learning rate was halved"),
        pytest.raises(FloatingPointError, match="Try a smaller lr"),
    ):
        ensemble(build, seeds=[1, 2], elbo=Failing())


@pytest.mark.parametrize("name", ["seed", "checkpoint", "resume"])
def test_options_of_one_fit_are_refused(name: str) -> None:
    built: list[int] = []
    with pytest.raises(ValueError, match=f"Expected no {name} in the options of the fits: "):
        ensemble(lambda seed: built.append(seed), **{name: 1})
    assert built == []
