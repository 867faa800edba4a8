"""Columns under which a density has no bound are named before a fit, and never converge."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data.degenerate import degenerate_columns

RNG = np.random.default_rng(0)
PLAIN = RNG.normal(size=(300, 3))
ZEROS = RNG.random((2, 300)) < [[0.6], [0.05]]
QUICK: dict[str, Any] = {"seed": 0, "device": "cpu", "progress": False}
ATOM = "of one value in more than a tenth of the rows"

TABLES: dict[str, tuple[np.ndarray, dict[str, list[int]]]] = {
    "plain": (PLAIN, {}),
    "a constant": (np.c_[PLAIN, np.full(300, 7.3)], {"constant": [3]}),
    "a constant of a large size": (np.c_[PLAIN, np.full(300, 1e12 / 3)], {"constant": [3]}),
    "a copy": (np.c_[PLAIN, PLAIN[:, 1]], {"duplicated": [1, 3]}),
    "a copy in other units": (np.c_[PLAIN, 1e6 - 3.0 * PLAIN[:, 1]], {"duplicated": [1, 3]}),
    "two copies": (np.c_[PLAIN, PLAIN[:, 1], 2.0 * PLAIN[:, 1]], {"duplicated": [1, 3, 4]}),
    "a sum": (np.c_[PLAIN, PLAIN[:, 0] + PLAIN[:, 2]], {"collinear": [0, 2, 3]}),
    "an atom": (
        np.c_[PLAIN, np.where(ZEROS[0], 0.0, PLAIN[:, 0] ** 3)],
        {ATOM: [3]},
    ),
    "a small atom": (
        np.c_[PLAIN, np.where(ZEROS[1], 0.0, PLAIN[:, 0] ** 3)],
        {},
    ),
    "more columns than rows": (RNG.normal(size=(5, 9)), {}),
}


@pytest.mark.parametrize("name", TABLES)
def test_degenerate_columns_are_found(name: str) -> None:
    x, wanted = TABLES[name]
    assert degenerate_columns(torch.as_tensor(x)) == wanted


@pytest.mark.parametrize("likelihood", [pv.likelihoods.Normal, pv.likelihoods.StudentT])
def test_they_are_named_before_the_first_epoch(likelihood: Any) -> None:
    frame = pd.DataFrame(np.c_[PLAIN, PLAIN[:, 1]], columns=["age", "mass", "dose", "weight"])
    vae, seen = pv.VAE(4, 1, likelihood(), seed=0), []
    said = "(columns mass, weight: duplicated)"
    with pytest.warns(pv.DegenerateColumnsWarning, match=re.escape(said)):
        pv.fit(vae, frame, max_epochs=1, callbacks=[seen.append], **QUICK)
    assert len(seen) == 1


REFUSED: dict[str, tuple[Any, str]] = {
    "one row": (PLAIN[:1], "Every column has one value in the 1 rows"),
    "the same row": (
        np.repeat(PLAIN[:1], 30, axis=0),
        "Every column has one value in the 30 rows",
    ),
    "no variance in float64": (
        pd.DataFrame(PLAIN * [1.0, 1e300, 1.0], columns=["age", "mass", "dose"]),
        "The values of column mass are too large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_no_density_describes_are_refused(name: str) -> None:
    x, said = REFUSED[name]
    vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        pv.fit(vae, x, max_epochs=1, validation=None, **QUICK)
    assert not vae.is_initialized
    assert all(v.equal(before[k]) for k, v in vae.state_dict().items())


def test_counts_and_bits_have_a_bound() -> None:
    x = np.repeat(RNG.integers(0, 3, size=(100, 1)), 3, axis=1)
    pv.fit(pv.VAE(3, 1, pv.likelihoods.Poisson(), seed=0), x, max_epochs=1, **QUICK)


@pytest.mark.filterwarnings("ignore::pyro_vae.DegenerateColumnsWarning")
@pytest.mark.parametrize("name", ["a copy", "a sum"])
def test_a_fit_of_them_is_never_called_converged(name: str) -> None:
    vae = pv.VAE(TABLES[name][0].shape[1], 1, pv.likelihoods.Normal(), seed=0)
    history = pv.fit(vae, TABLES[name][0], max_steps=2600, **QUICK)
    assert history.converged is not True
    assert history.stopped != "converged"


@pytest.mark.filterwarnings("ignore::pyro_vae.DegenerateColumnsWarning")
def test_a_scale_at_its_bound_is_said() -> None:
    x = TABLES["an atom"][0]
    vae = pv.VAE(4, 1, pv.likelihoods.Normal(), seed=0).initialize(x)
    assert vae.columns_at_bound() == []
    with torch.no_grad():
        vae.likelihood.shared["scale"][3] = -20.0
    assert vae.columns_at_bound() == [3]
