"""compare and race accept programs that score the same data, and refuse all others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.diagnostics.observed import Observed, check_same_data

Row = dict[str, Tensor]
Score = Callable[[Row, Tensor], Any]
COUNTS = torch.poisson(torch.full((12, 4), 5.0), generator=torch.Generator().manual_seed(0)) + 1
ROWS = {
    "x": COUNTS,
    "y": COUNTS.flip(0) + 0.5,
    "shown": torch.arange(48).reshape(12, 4) % 5 > 0,
}


class Scoring(nn.Module):
    """A latent of each row, and observed sites that a function scores."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score, self.shift = score, nn.Parameter(torch.zeros(()))

    def model(self, row: Row) -> None:
        with pyro.plate("data", len(row["x"]), dim=-1):
            z = pyro.sample("z", dist.Normal(self.shift, 1.0))
            self.score(row, z[..., None])

    def guide(self, row: Row) -> None:
        with pyro.plate("data", len(row["x"]), dim=-1):
            pyro.sample("z", dist.Normal(self.shift, 1.0).expand([len(row["x"])]))


def seen(x: Tensor, z: Tensor, name: str = "x") -> None:
    mean = z.expand(*z.shape[:-1], x.shape[-1])
    pyro.sample(name, dist.Normal(mean, 3.0).to_event(1), obs=x)


def one_cell_moved(row: Row, z: Tensor) -> None:
    seen(row["x"] + 0.01 * ((row["x"] == COUNTS[-1]).all(-1, keepdim=True)), z)


def masked_by_a_handler(row: Row, z: Tensor) -> None:
    with pyro.poutine.mask(mask=row["shown"][:, 0]):
        seen(row["x"], z)


def masked_by_a_distribution(row: Row, z: Tensor) -> None:
    mean = z.expand(*z.shape[:-1], 4)
    pyro.sample("x", dist.Normal(mean, 3.0).mask(row["shown"]).to_event(1), obs=row["x"])


def masked_rows(row: Row, z: Tensor) -> None:
    law = dist.Normal(z.expand(*z.shape[:-1], 4), 3.0).to_event(1)
    pyro.sample("x", law.mask(row["shown"][:, 0]), obs=row["x"])


def with_a_factor(row: Row, z: Tensor, size: float = 2.0) -> None:
    seen(row["x"], z)
    pyro.factor("bonus", z[..., 0] * 0 + size)


def in_two_sites(row: Row, z: Tensor) -> None:
    seen(row["x"][:, [3, 1]], z, "some")
    seen(row["x"][:, [0, 2]], z, "others")


def log_normal(row: Row, z: Tensor) -> None:
    mean = z.expand(*z.shape[:-1], 4)
    pyro.sample("x", dist.LogNormal(mean, 1.0).to_event(1), obs=row["x"])


def counted(row: Row, z: Tensor) -> None:
    rate = z.exp().expand(*z.shape[:-1], 4)
    pyro.sample("x", dist.Poisson(rate).to_event(1), obs=row["x"])


def plain(row: Row, z: Tensor) -> None:
    seen(row["x"], z)


SAME: dict[str, tuple[Score, Score]] = {
    "a site of another name": (plain, lambda row, z: seen(row["x"], z, "counts")),
    "columns in another order": (plain, lambda row, z: seen(row["x"].flip(1), z)),
    "two sites": (plain, in_two_sites),
    "another density": (plain, log_normal),
    "another precision": (plain, lambda row, z: seen(row["x"].double(), z)),
    "values that are equal but for rounding": (plain, lambda r, z: seen(r["x"].log().exp(), z)),
    "a mask by other means": (masked_by_a_handler, masked_rows),
    "cells masked in both": (masked_by_a_distribution, masked_by_a_distribution),
    "one factor in both": (with_a_factor, with_a_factor),
    "a factor that adds nothing": (plain, lambda row, z: with_a_factor(row, z, 0.0)),
    "rows of one number": (
        lambda row, z: pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=row["x"][:, 0]),
        lambda row, z: seen(row["x"][:, :1], z),
    ),
}
OTHER: dict[str, tuple[Score, Score, str]] = {
    "log(x)": (plain, lambda row, z: seen(row["x"].log(), z), r"row 0, x\[0\] is "),
    "standardised": (plain, lambda r, z: seen((r["x"] - 5) / 2, z), r"row 0, x\[0\] is "),
    "other units": (plain, lambda row, z: seen(row["x"] * 1.001, z), "same units"),
    "one cell": (plain, one_cell_moved, r"row 11, x\[0\] is "),
    "some columns": (plain, lambda row, z: seen(row["x"][:, :2], z), r"4 values .*x\[0\], x\[1\]"),
    "another field": (plain, lambda row, z: seen(row["y"], z), r"x\[0\] is "),
    "another order of rows": (plain, lambda row, z: seen(row["y"] - 0.5, z), r"x\[0\] is "),
    "a mask by a handler": (plain, masked_by_a_handler, r"row 0, x\[0\] is \d.*is masked"),
    "a masked row": (plain, masked_rows, r"row 0, x\[0\] is \d.*is masked"),
    "masked cells": (plain, masked_by_a_distribution, r"row 0, x\[0\] is \d.*is masked"),
    "another mask": (masked_rows, masked_by_a_distribution, "is masked in 'one'|in 'other'"),
    "a factor": (plain, with_a_factor, "the sum of pyro.factor is 0 .* is 2"),
    "another factor": (
        with_a_factor,
        lambda row, z: with_a_factor(row, z, 3.0),
        "the sum of pyro.factor is 2 .* is 3",
    ),
    "a mass beside a density": (plain, counted, "a density and a mass function for x.0."),
}


def compared(one: Score, other: Score) -> Any:
    programs = {"one": Scoring(one), "other": Scoring(other)}
    return pv.compare(programs, ROWS, 30, seed=0, progress=False)


def raced(one: Score, other: Score) -> Any:
    """A race of programs that score by the one with seed 0, by the other with seed 1."""
    rows = {name: values.repeat(2, *[1] * (values.ndim - 1)) for name, values in ROWS.items()}
    return pv.race(
        lambda seed: Scoring((one, other)[seed]),
        rows,
        {"ELBO": pv.elbos.Trace_ELBO()},
        [0, 1],
        1,
        held_out=ROWS,
        num_samples=30,
        seed=0,
        progress=False,
    )


@pytest.mark.filterwarnings("ignore:The difference from:UserWarning")
@pytest.mark.parametrize("case", SAME)
def test_the_same_data_are_accepted(case: str) -> None:
    one, other = SAME[case]
    assert np.isfinite(compared(one, other)["difference"]).all()
    assert np.isfinite(compared(other, one)["difference"]).all()


def test_a_race_over_the_same_data_is_run() -> None:
    assert raced(plain, in_two_sites).stopped == "finished"


@pytest.mark.parametrize("case", OTHER)
def test_other_data_are_refused(case: str) -> None:
    one, other, message = OTHER[case]
    with pytest.raises(ValueError, match=message) as refused:
        compared(one, other)
    assert "cannot be compared" in str(refused.value)
    with pytest.raises(ValueError, match="cannot be compared"):
        compared(other, one)
    with pytest.raises(ValueError, match="cannot be compared"):
        raced(one, other)


def test_vaes_in_any_units_are_accepted_and_others_are_not() -> None:
    x = np.random.default_rng(0).gamma(2.0, [1e-3, 1.0, 1e6], size=(60, 3))

    def made(likelihood: Any) -> pv.VAE:
        return pv.VAE(3, 2, likelihood, seed=0)

    alike = {
        "initialized": made(pv.likelihoods.Normal()).initialize(x),
        "in units of 1": made(pv.likelihoods.Normal()).initialize(x, standardize=False),
        "log-normal": made(pv.likelihoods.LogNormal()).initialize(x),
    }
    found = {name: Observed.of(vae, read(x, vae), 2**20) for name, vae in alike.items()}
    check_same_data(found, np.arange(len(x)))
    scaled = pv.Program(
        lambda x: Scoring(plain).model({"x": x / 2}), lambda x: Scoring(plain).guide({"x": x})
    )
    with pytest.raises(ValueError, match=r"in row 0, x\[0\] is .* in 'initialized'"):
        pv.compare({**alike, "halved": scaled}, x, 4, seed=0, progress=False)
