"""What a user meets on the first day: tables at any width and in LaTeX, and messages that help."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae import priors
from pyro_vae.cli import member
from pyro_vae.cli.runs import Settings
from pyro_vae.data.checks import short

X = torch.as_tensor(np.random.default_rng(0).normal(size=(60, 3)))
QUIET: dict[str, Any] = {"seed": 0, "progress": False}


def vae(likelihood: Any = pv.likelihoods.Normal) -> pv.VAE:
    return pv.VAE(3, 1, likelihood(), seed=0).initialize(X)


@pytest.fixture(scope="module")
def ranking() -> pd.DataFrame:
    named = {"a model with a rather long name": vae(), "student_t": vae(pv.likelihoods.StudentT)}
    return pv.compare(named, X, 50, **QUIET)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_a_ranking_shows_the_difference_and_its_error_at_any_width(
    ranking: pd.DataFrame, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    first, *_ = text = repr(ranking).splitlines()
    assert first.split()[0] == "difference"
    assert width < 70 or first.split()[1] == "difference_se"
    assert "columns not shown: within_error, weight, training_sd, trend" in text[-1]
    assert "equal to the best within error: " in text[-2]
    assert list(ranking)[:2] == ["difference", "difference_se"]


TABLES: dict[str, Callable[[pd.DataFrame], Any]] = {
    "ranking": lambda ranking: ranking,
    "rounded ranking": lambda ranking: ranking.round(2),
    "part of a ranking": lambda ranking: ranking[["difference", "difference_se"]],
    "evidence": lambda _: pv.log_evidence(vae(), X, 50, **QUIET).summary(),
    "active units": lambda _: pv.diagnostics.active_units(vae(), X, seed=0),
    "history": lambda _: pv.fit(vae(), X, max_epochs=1, device="cpu", **QUIET).table,
    "calibration": lambda _: pv.calibrate(vae(), num_simulations=30, **QUIET).table,
    "estimators": lambda _: (
        pv.compare_elbos(vae(), X, {"IWAE_2": pv.elbos.IWAE(2)}, num_repeats=4, **QUIET).table
    ),
    "race": lambda _: (
        pv.race(lambda seed: vae(), X, {"an_ELBO": pv.elbos.Trace_ELBO()}, [0], 1, **QUIET).table
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_can_be_read_by_latex(name: str, ranking: pd.DataFrame) -> None:
    table = TABLES[name](ranking)
    text = table.to_latex()
    assert re.search(r"[^\\][_%#$]", text.replace("\\_", "").replace("\\%", "")) is None
    assert "_" in table.to_latex(escape=False).replace("\\_", "")


MESSAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shared in quotes": (
        lambda _: pv.likelihoods.Normal(scale="shared"),
        r"Write scale=pv\.Shared\(\) in place of scale='shared'\.",
    ),
    "predicted in quotes": (
        lambda _: pv.likelihoods.StudentT(df="Predicted"),
        r"Write df=pv\.Predicted\(\) in place of",
    ),
    "a word for a posterior's scale": (
        lambda _: pv.posteriors.Normal(scale="fixed"),
        r"Write scale=pv\.Shared\(\), pv\.Predicted\(\) or a number in place of",
    ),
    "a class in place of an object": (
        lambda _: pv.likelihoods.Normal(scale=pv.Shared),
        r"scale to be pv\.Predicted\(\), pv\.Shared\(\), a number or a tensor; got Shared",
    ),
    "a list of programs": (
        lambda _: pv.compare([vae(), vae()], X),  # type: ignore[arg-type]
        r"Expected a dict of programs by name; got a list of 2\.$",
    ),
    "a list of estimators": (
        lambda _: pv.compare_elbos(vae(), X, [pv.elbos.STL()] * 40),  # type: ignore[arg-type]
        r"Expected a dict of estimators by name; got a list of 40\.$",
    ),
    "an existing folder": (lambda path: pv.save(vae(), path), r"replace it by overwrite=True\.$"),
    "no such likelihood": (
        lambda _: member("Foo", "likelihood"),
        r"there are Bernoulli, Beta, .*StudentT, or any other distribution of Pyro$",
    ),
    "no such prior": (
        lambda _: member("Foo", "prior"),
        r"there are Mixture, StandardNormal, VampPrior, or any other distribution of Pyro$",
    ),
    "no such estimator": (lambda _: member("Foo", "ELBO"), "the name of an ELBO; got 'Foo'"),
    "ours before Pyro's": (lambda _: member("Nrmal", "likelihood"), "did you mean 'Normal' or"),
    "Pyro's": (lambda _: member("Gumbl", "likelihood"), r"did you mean 'Gumbel'\?"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_says_what_to_write(name: str, tmp_path: Path) -> None:
    call, said = MESSAGES[name]
    with pytest.raises(ValueError, match=said) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [vae(), [vae()] * 3, {"a": vae()}, pd.DataFrame(X.numpy()), X.numpy(), "x" * 10**6]
)
def test_a_large_value_is_named_and_not_printed(value: Any) -> None:
    assert type(value).__name__ in short(value)
    assert len(short(value)) < 60


def test_python_and_the_command_line_have_the_same_defaults() -> None:
    in_python = {k: p.default for k, p in inspect.signature(pv.fit).parameters.items()}
    on_the_line = {k: f.default for k, f in Settings.__dataclass_fields__.items()}
    shared = in_python.keys() & on_the_line.keys() - {"elbo", "seed", "validation"}
    assert {"lr", "batch_size", "weight_prior", "max_steps", "engine"} <= shared
    assert {k: in_python[k] for k in shared} == {k: on_the_line[k] for k in shared}
    assert isinstance(member(on_the_line["posterior"], "posterior"), pv.posteriors.Normal)
    assert isinstance(priors.StandardNormal(2), pv.Prior)


CHOICES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all but the words": ({"drop": ["group"]}, ["age", "dose", "mass"]),
    "as a text": ({"drop": "group, age"}, ["dose", "mass"]),
    "in their order": ({"columns": ["mass", "age"]}, ["mass", "age"]),
    "both": ({"columns": "mass,age,group", "drop": "group"}, ["mass", "age"]),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", CHOICES)
def test_columns_are_chosen_by_name(name: str, ending: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(X.numpy(), columns=["age", "dose", "mass"])
    frame["group"] = "high"
    path = tmp_path / f"table.{ending}"
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    options, wanted = CHOICES[name]
    found = pv.datasets.load(path, **options).x
    np.testing.assert_allclose(found, frame[wanted])
    assert list(found) == wanted
    with pytest.raises(ValueError, match="column 'group'"):
        pv.datasets.load(path)
    with pytest.raises(ValueError, match="perhaps 'dose'; got 'doses'"):
        pv.datasets.load(path, columns=["doses"])
    with pytest.raises(ValueError, match="Expected columns to keep"):
        pv.datasets.load(path, drop=list(frame))


def test_columns_of_a_named_data_set_are_chosen_and_images_have_none(tmp_path: Path) -> None:
    wine = pv.datasets.load("wine", columns=["alcohol", "hue"])
    assert (list(wine.x), len(wine.y)) == (["alcohol", "hue"], 178)
    np.save(tmp_path / "x.npy", X.numpy())
    with pytest.raises(ValueError, match="Expected drop= only with a table"):
        pv.datasets.load(tmp_path / "x.npy", drop=["0"])
