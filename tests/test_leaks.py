"""A step keeps nothing of itself: draws, weights and graphs are gone with it."""

import gc
import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.engine.running import local_parameters


class Remembering(nn.Module):
    """Two latent sites a row, the second of the first, with weak references to what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.drawn: list[Any] = []

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(self.loc, 1.0))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        self.drawn += [weakref.ref(y), weakref.ref(z)]

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(x + self.loc, 1.0))
            z = pyro.sample("z", dist.Normal(y + self.loc, 1.0))
        self.drawn += [weakref.ref(y), weakref.ref(z)]


class OneSite(Remembering):
    """The same with one latent site."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        self.drawn += [weakref.ref(z)]

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x + self.loc, 1.0))
        self.drawn += [weakref.ref(z)]


ESTIMATORS = [
    pv.elbos.Trace_ELBO(3),
    pv.elbos.TraceMeanField_ELBO(3),
    pv.elbos.TraceGraph_ELBO(3),
    pv.elbos.IWAE(3),
    pv.elbos.STL(3),
    pv.elbos.DReG(3),
    pv.elbos.PIWAE(2, 3),
    pv.elbos.VIMCO(3),
    pv.elbos.TVO(3),
    pv.elbos.CUBO(3),
    pv.elbos.FreeBits(nats=0.1),
]


@pytest.mark.parametrize("make", [Remembering, OneSite])
def test_nothing_of_a_step_is_kept(make: type[Remembering]) -> None:
    programs = {}
    for elbo in ESTIMATORS:
        program = programs[str(elbo)] = make()
        svi = pv.svi.SVI(program.model, program.guide, torch.optim.Adam, elbo)
        with pyro.validation_enabled(False), local_parameters(program):
            for _ in range(3):
                svi.step(torch.randn(4))
    gc.collect()
    assert all(program.drawn for program in programs.values())
    kept = {k: sum(r() is not None for r in program.drawn) for k, program in programs.items()}
    assert {name: count for name, count in kept.items() if count} == {}
