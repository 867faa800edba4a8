"""`fit` takes the steps of a PyTorch loop written by hand, and of plain pyro.infer.SVI.

All three see the same weights, permutations, binarisations and eps, in minibatches of which the
last of an epoch is short; `tests/benchmarks/mnist.py` holds the loops.
"""

import copy
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks import mnist
from small_vae import PLAIN
from torch import Tensor

import pyro_vae as pv
from pyro_vae.data import datasets

STEPS = 200
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "float64"])


@functools.cache
def grey() -> Tensor:
    return datasets.load("digits").x / 16


@functools.cache
def losses(dtype: torch.dtype) -> pd.DataFrame:
    return mnist.losses(grey(), dtype, steps=STEPS)


@DTYPES
@pytest.mark.parametrize("name", ["pyro_vae", "pyro.infer.SVI"])
def test_200_losses_are_those_of_a_loop_by_hand(dtype: torch.dtype, name: str) -> None:
    table = losses(dtype)
    assert len(table) == STEPS
    assert table["PyTorch by hand"].iloc[-15:].mean() < 0.7 * table["PyTorch by hand"].iloc[0]
    assert mnist.drifts(table)[name].max() < LIMITS[dtype]


@DTYPES
def test_weights_after_an_epoch_are_those_of_a_loop_by_hand(dtype: torch.dtype) -> None:
    start = mnist.make_vae(64, 0).to(dtype)
    ours, by_hand = (
        fit(copy.deepcopy(start), grey(), 1, 0).vae.state_dict()
        for fit in (mnist.fit_ours, mnist.fit_by_hand)
    )
    moved = {name: (w - start.state_dict()[name]).norm() for name, w in by_hand.items()}
    apart = {name: (w - ours[name]).norm() for name, w in by_hand.items()}
    assert min(moved.values()) > 0
    assert max(apart[name] / moved[name] for name in moved) < 100 * LIMITS[dtype]


def test_history_tells_the_losses_per_row() -> None:
    vae = mnist.make_vae(64, 0)
    with mnist.Recorded() as steps:
        history = pv.fit(
            vae, grey().round(), max_epochs=2, seed=0, device="cpu", progress=False, **PLAIN
        )
    per_epoch = np.reshape([float(loss) for loss in steps.losses], (2, -1)).sum(1)
    np.testing.assert_allclose(history.table["elbo"], -per_epoch / len(grey()), rtol=1e-6)


def test_other_noise_gives_other_losses() -> None:
    vae = mnist.make_vae(64, 0)
    first, other = (
        mnist.fit_by_hand(copy.deepcopy(vae), grey(), 1, seed).per_step() for seed in (0, 1)
    )
    assert np.abs(first / other - 1).min() > LIMITS[torch.float32]
