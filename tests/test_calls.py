"""What surrounds a call: gradients switched off, Ctrl-C, handlers on methods, odd numbers."""

import fractions
import gc
import linecache
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor, nn
from torch.fx.graph_module import _loader

import pyro_vae as pv
from pyro_vae.data.checks import part_size
from pyro_vae.engine.replay import Graph
from pyro_vae.evidence import bidirectional

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
ELBOS = {"ELBO": pv.elbos.Trace_ELBO(), "STL": pv.elbos.STL()}
FIT: dict[str, Any] = {"seed": 0, "progress": False, "device": "cpu", "warmup": 0}
FEW: dict[str, Any] = {"num_repeats": 4, "reference": 16, "seed": 0, "progress": False}


def vae(seed: int = 0) -> pv.VAE:
    return pv.VAE(4, 2, pv.likelihoods.Normal(), None, pv.networks.MLP(4), seed=seed)


def stepped(program: Any) -> Tensor:
    return pv.svi.SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.STL()).step(X)


COMPARED = pv.compare_elbos(vae(), X, ELBOS, **FEW)
TRAINING: dict[str, Callable[[Any], object]] = {
    "fit": lambda program: pv.fit(program, X, max_epochs=1, **FIT),
    "SVI.step": stepped,
    "race": lambda _: pv.race(vae, X, ELBOS, [0], 1, num_samples=10, seed=0, progress=False),
    "ensemble": lambda _: pv.ensemble(vae, X, seeds=1, max_epochs=1, device="cpu"),
}
DIFFERENTIATING = TRAINING | {
    "compare_elbos": lambda program: pv.compare_elbos(program, X, ELBOS, **FEW),
    "posterior": lambda program: pv.posterior(program, X, "hmc", 10, seed=0, progress=False),
    "bidirectional": lambda program: bidirectional(program, 4, 4, seed=0, progress=False),
    "curves": lambda _: COMPARED.curves([1, 2], progress=False),
}


@pytest.mark.parametrize("call", TRAINING)
def test_training_without_gradients_is_refused(call: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"outside of torch\.no_grad\(\)\.$"):
        TRAINING[call](vae())


@pytest.mark.parametrize("call", DIFFERENTIATING)
def test_gradients_under_inference_mode_are_refused(call: str) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="under torch.inference_mode"):
        DIFFERENTIATING[call](vae())
    if call not in ("race", "ensemble", "curves"):
        with torch.inference_mode():
            program = vae()
        with pytest.raises(ValueError, match="under torch.inference_mode"):
            DIFFERENTIATING[call](program)


def handled(handler: Callable[[Any], Any]) -> nn.Module:
    """A program of a mixture, whose methods carry a handler of Pyro."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits, self.loc = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.arange(2.0))

        @handler
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(logits=self.logits))
                pyro.sample("x", dist.Normal(self.loc[z], 1.0), obs=x.sum(-1))

        @handler
        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Categorical(logits=self.logits.expand(len(x), 2)))

    return Mixture()


HANDLERS: dict[str, Callable[[Any], Any]] = {
    "config_enumerate": config_enumerate,
    "config_enumerate by keyword": config_enumerate(default="parallel"),
    "infer_config": lambda f: poutine.infer_config(f, lambda site: {"enumerate": "parallel"}),
    "two": lambda f: poutine.infer_config(config_enumerate(f), lambda site: {}),
    "mask": lambda f: config_enumerate(poutine.mask(f, mask=True)),
}


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_method_with_handlers_is_still_that_of_its_module(handler: str) -> None:
    program, elbo = handled(HANDLERS[handler]), pv.elbos.TraceEnum_ELBO()
    before = program.loc.detach().clone()
    pv.fit(program, X, max_epochs=2, elbo=elbo, **FIT)
    assert not torch.equal(program.loc, before)
    weights = program.state_dict()
    again = handled(HANDLERS[handler])
    again.load_state_dict(weights)
    plain = handled(config_enumerate)
    plain.load_state_dict(weights)
    losses = [pv.svi.SVI(p.model, p.guide, torch.optim.Adam, elbo).step(X) for p in (again, plain)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "share",
    [np.float16(0.25), np.float32(0.25), np.float64(0.25), np.longdouble(0.25)]
    + [fractions.Fraction(1, 4), 0.25],
    ids=lambda share: type(share).__name__,
)
def test_a_share_of_any_type_is_that_share(share: Any) -> None:
    for rows in (2, 7, 178, 70_001):
        size = part_size("test", share, rows)
        assert type(size) is int
        assert size == part_size("test", 0.25, rows)
    train, test = pv.datasets.load("wine").split(share)
    assert (len(train), len(test)) == (134, 44)
    assert len(pv.fit(vae(), X, validation=share, max_epochs=1, **FIT)) == 1


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), np.int16(3)], ids=str)
def test_a_seed_of_numpy_is_that_seed(seed: Any) -> None:
    assert torch.equal(pv.sample(vae(), 3, seed=seed), pv.sample(vae(), 3, seed=3))


def interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()


def test_ctrl_c_ends_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(graph: Graph, tensors: object) -> None:
        interrupt_after(0.1)
        time.sleep(30.0)

    monkeypatch.setattr(Graph, "compile", compiling)
    program, before = vae(), signal.getsignal(signal.SIGINT)
    start = time.perf_counter()
    history = pv.fit(program, X, engine="compiled", max_epochs=5, **FIT)
    assert time.perf_counter() - start < 3.0
    assert (history.stopped, len(history)) == ("interrupted", 0)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(pv.fit(program, X, engine="traced", max_epochs=2, **FIT)) == 2


TRACED: dict[str, Callable[[], object]] = {
    "fit": lambda: pv.fit(vae(), X, engine="traced", max_epochs=1, **FIT),
    "log_evidence": lambda: pv.log_evidence(vae(), X, 16, max_elements=64, seed=0, progress=False),
    "per_row": lambda: ELBOS["STL"].per_row(vae(), X, num_repeats=64, seed=0),
}


@pytest.mark.parametrize("call", TRACED)
def test_a_traced_call_leaves_nothing(call: str) -> None:
    def counts() -> tuple[int, int, int]:
        gc.collect()
        graphs = sum(issubclass(type(held), torch.fx.GraphModule) for held in gc.get_objects())
        sources = [name for name in linecache.cache if name.startswith("<eval_with_key>")]
        return graphs, len(sources), len(_loader.eval_cache)

    TRACED[call]()
    before = counts()
    TRACED[call]()
    assert counts() == before
