"""Convergence: the rule on made checks, and what a fit says of itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

import pyro_vae as pv
from pyro_vae.training.convergence import RATIO, Check, Convergence

STEPS = [round(500 * RATIO**i) for i in range(7)]
IRIS = load_iris().data + np.random.default_rng(0).uniform(-0.05, 0.05, size=(150, 4))
QUICK: dict[str, Any] = {"seed": 0, "device": "cpu", "progress": False}


def verdict(
    means: list[float],
    *,
    held_out: bool = True,
    noise: float = 0.0,
    rows: int = 100,
    kl: float = 2,
) -> tuple[tuple[bool | None, str] | None, int]:
    """The verdict of the first check that gives one, and the number of checks until then."""
    convergence = Convergence(is_held_out=held_out)
    generator = torch.Generator().manual_seed(0)
    for i, (steps, mean) in enumerate(zip(STEPS, means, strict=False)):
        draws = torch.randn(rows, generator=generator, dtype=torch.float64)
        convergence.checks.append(Check(steps, i + 1, mean + noise * draws, kl))
        if (found := convergence.verdict()) is not None:
            return found, i + 1
    return None, len(means)


def test_a_plateau_has_converged_after_three_times_the_steps() -> None:
    for held_out in (True, False):
        found, checks = verdict([-9.0, -5.0, -5.0, -5.0, -5.0], held_out=held_out)
        assert (found[0], checks) == (True, 4)
        assert found[1].endswith("no longer gain")


def test_a_slow_rise_has_not_converged() -> None:
    assert verdict([-9.0, -8.9, -8.8, -8.7, -8.6, -8.5, -8.4]) == (None, 7)
    assert verdict([-9.0, -8.99, -8.98], held_out=False)[0][0] is True


def test_rows_that_lose_end_the_fit_if_they_are_held_out() -> None:
    found, checks = verdict([-9.0, -5.0, -5.5, -6.0, -7.0])
    assert (found, checks) == ((True, "held-out rows no longer gain"), 4)
    found, _ = verdict([-9.0, -5.0, -5.02, -4.95, -6.0, -6.5, -7.0], noise=0.2, rows=400)
    assert found[0] is True


def test_few_rows_end_a_fit_without_a_claim() -> None:
    found, checks = verdict([-9.0, -3.0, -4.2, -4.1, -4.3], noise=1.5, rows=14)
    assert (found[0], checks) == (None, 4)
    assert "too uncertain to call the fit converged" in found[1]
    assert verdict([-9.0, -5.0, -5.2, -5.1, -5.3], noise=1.0, rows=14, held_out=False)[0] is None


def test_dead_latents_are_no_convergence_before_a_thousand_steps() -> None:
    means = [-5.0] * 5
    assert STEPS[2] > 1000 > STEPS[1]
    convergence = Convergence(is_held_out=True)
    for i, steps in enumerate([100, 200, 400, 800]):
        convergence.checks.append(Check(steps, i, torch.full((9,), -5.0), 0.01))
        assert convergence.verdict() is None
    assert verdict(means, kl=0.01)[1] == 3


def test_a_flat_objective_has_not_converged_while_the_kl_still_falls() -> None:
    for kls, checks in (([3.5, 2.4, 2.0, 1.9, 1.9, 1.9], 5), ([3.5] * 6, 3), ([math.nan] * 6, 3)):
        convergence = Convergence(is_held_out=True)
        for i, (steps, kl) in enumerate(zip(STEPS, kls, strict=False)):
            convergence.checks.append(Check(steps, i, torch.full((9,), -5.0), kl))
            if (found := convergence.verdict()) is not None:
                break
        assert (found, i + 1) == ((True, "held-out rows no longer gain"), checks)


def test_a_check_of_nan_is_never_the_best_and_never_converged() -> None:
    assert verdict([-9.0, math.nan, math.nan, math.nan])[0][0] is None
    convergence = Convergence(is_held_out=True)
    for i, mean in enumerate([math.nan, -5.0, math.nan]):
        convergence.checks.append(Check(i + 1, i + 1, torch.full((9,), mean), 1.0))
    assert convergence.best is convergence.checks[1]


def test_checks_are_due_after_growing_numbers_of_steps() -> None:
    convergence, due = Convergence(is_held_out=True), []
    for steps in range(1, 200):
        if convergence.is_due(steps):
            due.append(steps)
            convergence.checks.append(Check(steps, steps, torch.zeros(3), 1.0))
    assert due == [1, 2, 3, 5, 9, 16, 28, 48, 83, 144]


def test_a_fit_that_was_cut_short_says_how_much_it_rose() -> None:
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    history = pv.fit(vae, IRIS, max_steps=1500, **QUICK)
    assert (history.stopped, history.converged) == ("max_steps", False)
    assert "nats per row and 1000 steps at the end" in history.reason
    assert pv.fit(vae, IRIS, max_epochs=1, **QUICK).converged is None


def test_all_rows_are_used_after_the_rows_held_out_stopped_a_fit() -> None:
    x = torch.as_tensor(np.r_[IRIS, IRIS[:50] + 0.3])
    options = QUICK | {"max_steps": 1500}
    first, second, again = (pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0) for _ in range(3))
    stopped = pv.fit(first, x, **options)
    history = pv.fit(second, x, refit=True, **options)
    steps = stopped.best_epoch * 2  # an epoch of 180 rows, or of 200
    assert history.reason == f"{stopped.reason}; then trained on all rows for {steps} steps"
    assert (history.stopped, history.converged) == (stopped.stopped, stopped.converged)
    assert len(history) == history.best_epoch == stopped.best_epoch
    assert "validation_elbo" not in history.table
    assert second.verdict == (history.converged, history.reason)
    assert second.units.loc.equal(x.mean(0))
    limits: dict[str, Any] = {"max_steps": steps, "validation": None, "until_converged": False}
    pv.fit(again, x, **QUICK | limits)
    pairs = zip(second.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_the_program_gets_the_averaged_weights_of_the_best_check() -> None:
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    history = pv.fit(vae, IRIS, max_steps=1500, **QUICK)
    checked = history.table.validation_elbo.dropna()
    assert history.best_epoch == checked.idxmax()
    assert history.stopped in ("converged", "no gain", "max_steps")
    noisy = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    pv.fit(noisy, IRIS, averaged=False, max_steps=900, until_converged=False, **QUICK)
    smooth = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    pv.fit(smooth, IRIS, max_steps=900, until_converged=False, **QUICK)
    elbos = [
        float(pv.log_evidence(v, IRIS, num_samples=200, seed=0).elbo.mean())
        for v in (noisy, smooth)
    ]
    assert elbos[1] > elbos[0]


def test_a_linear_vae_converges_without_rows_held_out() -> None:
    x = np.random.default_rng(0).normal(size=(400, 2)) @ [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]
    x = x + 0.5 * np.random.default_rng(1).normal(size=x.shape)
    vae = pv.VAE(
        3,
        1,
        pv.likelihoods.Normal(),
        encoder=torch.nn.Identity(),
        decoder=torch.nn.Identity(),
        seed=0,
    )
    history = pv.fit(vae, x, validation=None, weight_prior=None, **QUICK)
    assert (history.stopped, history.converged) == ("converged", True)
    assert history.reason == "the training rows no longer gain"
    best = vae.baselines(x).factor_analysis.mean()
    found = pv.log_evidence(vae, x, num_samples=200, seed=0).log_evidence.mean()
    assert float(found) == pytest.approx(float(best), abs=0.1)
