"""What comes in: every kind of container, dtype, index and name of columns, or one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.data.split import split

QUICK: dict[str, Any] = {"max_epochs": 1, "seed": 0, "device": "cpu", "progress": False}
GENERATOR = np.random.default_rng(0)
FRAME = pd.DataFrame(
    GENERATOR.normal(size=(30, 3)) + [0.0, 5.0, 50.0],
    index=[f"p{i}" for i in range(30)],
    columns=["dose", "age", "weight"],
)


class Own(nn.Module):
    """A program of one's own, with covariates."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(5, 3), nn.Linear(3, 2)

    def model(self, row: dict[str, torch.Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(row["x"]), 2), 1.0).to_event(1))
            context = row["context"].expand(*z.shape[:-1], 3)
            loc = self.decoder(torch.cat([z, context], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=row["x"])

    def guide(self, row: dict[str, torch.Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            pyro.sample("z", dist.Normal(self.encoder(row["x"]), 1.0).to_event(1))


def fitted() -> pv.VAE:
    vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
    pv.fit(vae, FRAME, **QUICK)
    return vae


LABELS: dict[str, list[Any]] = {
    "text": ["dose", "age", "weight"],
    "numbers": [2001, 2002, 2003],
    "positions": [0, 1, 2],
    "dates": [*pd.date_range("2020-01-01", periods=3)],
    "pairs": [*pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)])],
    "floats": [0.5, 1.5, 2.5],
}
FORMS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "frame": lambda frame: frame,
    "dict": lambda frame: {"x": frame},
    "data set": lambda frame: pv.datasets.Dataset("table", frame),
    "rows": read,
    "xarray": lambda frame: xr.DataArray(
        frame.to_numpy(), {"c": frame.columns, "r": frame.index}, ("r", "c")
    ),
    "one row": lambda frame: frame.iloc[0],
}
ASKED: dict[str, Callable[[pv.VAE, Any], Any]] = {
    "log_evidence": lambda vae, x: pv.log_evidence(vae, x, 8, seed=0, progress=False),
    "embed": lambda vae, x: pv.embed(vae, x, seed=0),
    "baselines": lambda vae, x: vae.baselines(x),
}


@pytest.mark.parametrize("kind", LABELS)
def test_columns_are_put_in_the_order_of_the_fit(kind: str) -> None:
    frame = FRAME.set_axis(pd.Index(LABELS[kind]), axis=1)
    vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0).initialize(frame)
    assert read(frame.iloc[:, ::-1], vae).field("x").equal(read(frame, vae).field("x"))
    assert read(frame.to_numpy(), vae).field("x").equal(read(frame, vae).field("x"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ASKED)
def test_every_form_and_every_question_matches_names(form: str, name: str) -> None:
    make, ask, vae = FORMS[form], ASKED[name], fitted()
    one, other = ask(vae, make(FRAME)), ask(vae, make(FRAME[["weight", "dose", "age"]]))
    assert one.drop_attrs().identical(other.drop_attrs())


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "another name": (lambda f: f.rename(columns={"age": "Age"}), "missing.*'age'.*them: 'Age'"),
    "one too many": (lambda f: f.assign(height=1.0), "not among them: 'height'"),
    "one missing": (lambda f: f.drop(columns="dose"), "missing columns: 'dose'"),
    "one twice": (lambda f: f.set_axis(["dose", "age", "age"], axis=1), "of one name: 'age'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_columns_are_refused_by_name(case: str) -> None:
    change, said = WRONG[case]
    vae = fitted()
    for refused in (
        lambda: vae.check(change(FRAME)),
        lambda: pv.log_evidence(vae, change(FRAME), 8),
        lambda: pv.fit(vae, change(FRAME), **QUICK),
        lambda: split(read(FRAME), change(FRAME), seed=0, name="validation"),
    ):
        with pytest.raises(ValueError, match=f"columns of the training rows.*{said}"):
            refused()


def test_validation_is_matched_to_the_training_rows() -> None:
    histories = []
    for validation in (FRAME[:9], FRAME[:9].iloc[:, ::-1]):
        vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
        histories.append(pv.fit(vae, FRAME, validation=validation, **QUICK).table)
    pd.testing.assert_frame_equal(*[h.drop(columns="seconds") for h in histories])


@pytest.mark.parametrize("transform", [None, lambda row: {k: v.abs() for k, v in row.items()}])
def test_own_programs_match_x_and_context(transform: Any, tmp_path: Path) -> None:
    program = Own()
    pv.fit(program, FRAME, context=FRAME, transform=transform, **QUICK)
    turned = FRAME.iloc[:, ::-1]
    for own in (program, pv.load(pv.save(program, tmp_path / "own"), into=Own())):
        rows = read(turned, own, context=turned)
        assert rows.digest() == read(FRAME, own, context=FRAME).digest()
        with pytest.raises(ValueError, match="Expected context with the columns.*'age'"):
            read(FRAME, own, context=FRAME.rename(columns={"age": "years"}))


def test_names_are_saved_with_a_vae(tmp_path: Path) -> None:
    vae = fitted()
    loaded = pv.load(pv.save(vae, tmp_path / "vae"))
    assert loaded.fitted_columns == vae.fitted_columns == {"x": [["dose", "age", "weight"]]}
    with pytest.raises(ValueError, match="not among them: 'Age'"):
        loaded.check(FRAME.rename(columns={"age": "Age"}))
