"""Public calls in threads give what the same calls give one after the other."""

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import xarray as xr
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import active_units
from pyro_vae.evidence import bidirectional, linear_gaussian

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
ELBOS = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(2)}
QUIET: dict[str, Any] = {"seed": 0, "progress": False}
FIT: dict[str, Any] = QUIET | {"max_epochs": 2, "engine": "eager", "warmup": 0, "device": "cpu"}


def new(seed: int = 0) -> pv.VAE:
    return pv.VAE(4, 2, pv.likelihoods.Normal(), seed=seed)


VAE = new().initialize(X)
LINEAR = pv.VAE(4, 2, pv.likelihoods.Normal(), decoder=nn.Identity(), seed=0)


def fitted() -> nn.Module:
    vae = new()
    pv.fit(vae, X, **FIT)
    return vae


def stepped() -> nn.Module:
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), pv.posteriors.Delta(), seed=0)  # draws nothing
    svi = pv.svi.SVI(vae.model, vae.guide, torch.optim.Adam, pv.elbos.Trace_ELBO())
    for _ in range(20):
        svi.step(X)
    return vae


def program() -> nn.Module:
    vae = new()
    own = pv.Program(vae.model, vae.guide)
    pv.fit(own, X, **FIT)
    return own


CALLS: dict[str, Callable[[], Any]] = {
    "fit": fitted,
    "fit of a Program": program,
    "SVI.step": stepped,
    "VAE": new,
    "VAE.initialize": lambda: new().initialize(X),
    "VAE.sample": lambda: VAE.sample(20, seed=0),
    "sample": lambda: pv.sample(VAE, 20, seed=0),
    "embed": lambda: pv.embed(VAE, X, **QUIET),
    "reconstruct": lambda: pv.reconstruct(VAE, X, num_samples=30, **QUIET),
    "log_evidence": lambda: pv.log_evidence(VAE, X, 50, **QUIET),
    "many pieces": lambda: pv.log_evidence(VAE, X, 50, max_elements=1000, **QUIET),
    "linear_gaussian": lambda: linear_gaussian(LINEAR, X),
    "per_row": lambda: torch.stack([*pv.elbos.IWAE(3).per_row(VAE, X, seed=0)]),
    "active_units": lambda: active_units(VAE, X, 20, **QUIET),
    "calibrate": lambda: pv.calibrate(VAE, X, num_simulations=30, num_samples=5, **QUIET).pit,
    "to_arviz": lambda: np.asarray(pv.to_arviz(VAE, X, 10, seed=0)["posterior"]["z"]),
    "posterior": lambda: np.asarray(
        pv.posterior(VAE, X, "hmc", 10, chains=2, **QUIET)["posterior"]["z"]
    ),
    "bidirectional": lambda: bidirectional(VAE, 4, 4, num_temperatures=4, **QUIET),
    "compare": lambda: pv.compare({"a": VAE, "b": VAE}, X, 50, **QUIET).drop(columns="note"),
    "compare_elbos": lambda: pv.compare_elbos(
        VAE, X, ELBOS, num_repeats=4, reference=16, **QUIET
    ).table.filter(regex="^(sd|snr|grad)"),
    "conformal": lambda: pv.conformal(VAE, X, **QUIET).table,
    "ensemble": lambda: pv.ensemble(new, X, seeds=1, max_epochs=1, device="cpu").programs[0],
    "race": lambda: pv.race(new, X, ELBOS, [0], 1, num_samples=10, **QUIET).table[["elbo"]],
}


def numbers(result: Any) -> list[np.ndarray]:
    match result:
        case nn.Module():
            return [value.numpy() for value in result.state_dict().values()]
        case pd.DataFrame():
            return [result.select_dtypes("number").to_numpy()]
        case xr.Dataset():
            return [result[name].to_numpy() for name in result]
    return [np.asarray(result)]


@pytest.mark.parametrize("call", CALLS)
def test_calls_in_threads_are_those_in_turn(call: str) -> None:
    expected = numbers(CALLS[call]())
    beside = CALLS["log_evidence"], CALLS["VAE.sample"]
    others = [numbers(function()) for function in beside]
    with ThreadPoolExecutor(6) as pool:
        waiting = [(pool.submit(CALLS[call]), expected) for _ in range(3)]
        waiting += [(pool.submit(f), o) for f, o in zip(beside, others, strict=True)]
        for future, wanted in waiting:
            found = numbers(future.result())
            assert all(map(np.array_equal, found, wanted, [True] * len(found)))
    assert pyro.poutine.runtime._PYRO_STACK == []


def test_a_callback_may_call_while_another_thread_waits() -> None:
    scores, waiting = [], threading.Thread(target=CALLS["log_evidence"])

    def callback(record: dict[str, float]) -> None:
        if record["epoch"] == 1:
            waiting.start()
        scores.append(float(pv.log_evidence(VAE, X, 20, **QUIET)["elbo"].mean()))

    pv.fit(new(), X, callbacks=[callback], **FIT)
    waiting.join(timeout=20)
    assert not waiting.is_alive()
    assert scores == [scores[0]] * 2


def test_every_public_call_that_takes_a_program_waits_its_turn() -> None:
    tables = [pv, pv.plots, pv.evidence, pv.diagnostics]
    names = {"program", "programs", "build"}
    taking = {
        name: function
        for table in tables
        for name, function in vars(table).items()
        if inspect.isfunction(function) and names & inspect.signature(function).parameters.keys()
    }
    assert len(taking) >= 13
    assert [n for n, f in taking.items() if not inspect.unwrap(f) is not f] == []
