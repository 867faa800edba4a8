"""compare and race accept programs that score the same data, and refuse all others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import AffineTransform

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
    "share": COUNTS / COUNTS.sum(1, keepdim=True),
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


class Columns(TorchDistribution):
    """A normal or a Poisson distribution for each column, as one distribution of a row."""

    arg_constraints = {}

    def __init__(self, loc: Tensor, kinds: str, grouped: bool = False) -> None:
        self.loc, self.kinds, self.grouped = loc, kinds, grouped
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def support(self) -> Any:
        of = {"n": constraints.real, "p": constraints.nonnegative_integer}
        parts = [of[kind] for kind in self.kinds]
        if not self.grouped:
            return constraints.stack(parts, dim=-1)
        return constraints.cat(parts[::2], dim=-1, lengths=[2, 2])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Columns":
        return Columns(self.loc.expand(*batch_shape, -1), self.kinds, self.grouped)

    def log_prob(self, value: Tensor) -> Tensor:
        scores = [
            (dist.Normal(loc, 3.0) if kind == "n" else dist.Poisson(loc.exp())).log_prob(x)
            for kind, loc, x in zip(self.kinds, self.loc.unbind(-1), value.unbind(-1))
        ]
        return torch.stack(scores, dim=-1).sum(-1)


def columns(kinds: str, places: list[int], grouped: bool = False) -> Score:
    """Scores some columns of x, each by its own kind of distribution."""

    def score(row: Row, z: Tensor) -> None:
        law = Columns(z.expand(*z.shape[:-1], len(places)), kinds, grouped)
        pyro.sample("x", law, obs=row["x"][:, places])

    return score


def two_sites(row: Row, z: Tensor) -> None:
    """The normal columns 1 and 0, and the Poisson columns 2 and 3."""
    seen(row["x"][:, [1, 0]], z, "weights")
    rate = z.exp().expand(*z.shape[:-1], 2)
    pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=row["x"][:, [2, 3]])


def scored_by(law: Callable[[Tensor], Any], field: str = "x") -> Score:
    """Scores four columns by the distribution that a function makes of their means."""

    def score(row: Row, z: Tensor) -> None:
        pyro.sample(field, law(z.expand(*z.shape[:-1], 4)), obs=row[field])

    return score


def on_a_grid(mean: Tensor) -> Any:
    """A Poisson distribution whose support torch gives as the real numbers."""
    grid = dist.TransformedDistribution(dist.Poisson(mean.exp()), [AffineTransform(0.0, 1.0)])
    return grid.to_event(1)


def of_two_counts(mean: Tensor) -> Any:
    parts = dist.Poisson(mean.exp()), dist.Geometric(torch.sigmoid(mean))
    return dist.MaskedMixture(torch.tensor([True, False, True, False]), *parts).to_event(1)


def zero_inflated(mean: Tensor) -> Any:
    return dist.ZeroInflatedDistribution(dist.Normal(mean, 3.0), gate=0.2 + 0 * mean).to_event(1)


def last_column_masked(law: Callable[[Tensor], Any]) -> Score:
    def score(row: Row, z: Tensor) -> None:
        seen(row["x"][:, :3], z, "first")
        mean = z.expand(*z.shape[:-1], 1)
        last = law(mean).mask(torch.tensor([False])).to_event(1)
        pyro.sample("last", last, obs=row["x"][:, 3:])

    return score


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
    "columns of two kinds, in two sites": (columns("nnpp", [0, 1, 2, 3]), two_sites),
    "columns of two kinds, in groups": (columns("nnpp", [0, 1, 2, 3], grouped=True), two_sites),
    "columns of two kinds, in another order": (
        columns("nnpp", [0, 1, 2, 3]),
        columns("pnpn", [3, 0, 2, 1]),
    ),
    "one column of two kinds": (columns("np", [0, 0]), columns("pn", [0, 0])),
    "counts on a grid": (counted, scored_by(on_a_grid)),
    "counts of two kinds": (counted, scored_by(of_two_counts)),
    "two densities on the simplex": (
        scored_by(lambda mean: dist.Dirichlet(mean.exp()), "share"),
        scored_by(
            lambda mean: dist.LogisticNormal(mean[..., :3], 1.0 + 0 * mean[..., :3]), "share"
        ),
    ),
    "any distribution of cells that are masked": (
        last_column_masked(lambda mean: dist.Normal(mean, 1.0)),
        last_column_masked(lambda mean: dist.Poisson(mean.exp())),
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
    "one column of masses": (
        plain,
        columns("nnpn", [0, 1, 2, 3]),
        r"a density and a mass function for x\[2\]",
    ),
    "another column of masses": (
        columns("nnpn", [0, 1, 2, 3]),
        columns("npnn", [0, 1, 2, 3]),
        r"a density and a mass function for x\[1\]",
    ),
    "a column of masses, in another order": (
        columns("nnpn", [0, 1, 2, 3]),
        columns("nnnn", [3, 2, 1, 0]),
        r"a mass function and a density for x\[2\]",
    ),
    "one column of two kinds": (
        columns("np", [0, 0]),
        columns("pp", [0, 0]),
        "a density and a mass function for x",
    ),
    "the logarithm of one column": (
        plain,
        lambda row, z: seen(torch.cat([row["x"][:, :3], row["x"][:, 3:].log()], 1), z),
        r"row 0, x\[3\] is ",
    ),
    "counts on a grid": (plain, scored_by(on_a_grid), "a density and a mass function"),
    "counts of two kinds": (plain, scored_by(of_two_counts), "a density and a mass function"),
    "point masses": (
        plain,
        scored_by(lambda mean: dist.Delta(mean, torch.zeros_like(mean)).to_event(1)),
        "a density and a mass function",
    ),
    "a density with an atom": (
        plain,
        scored_by(zero_inflated),
        "a density and a mixture of mass and density",
    ),
    "a density on the simplex": (
        lambda row, z: seen(row["share"], z, "share"),
        scored_by(lambda mean: dist.Dirichlet(mean.exp()), "share"),
        "a density and a density in 3 of 4 dimensions for share.0.",
    ),
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
