"""Pictures: they open, say what they show, and leave matplotlib as it was."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.text import Text
from own_programs import Covariate, Mixture, SharedLevel, TwoLevels
from torch import nn

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.cli import commands, runs
from pyro_vae.data.read import read
from pyro_vae.evidence import log_evidence
from pyro_vae.plots.canvas import text_of
from pyro_vae.plots.picture import Picture

EPOCHS = np.arange(1, 41)
TABLE = pd.DataFrame(
    {
        "elbo": -90 - 4000 * np.exp(-EPOCHS),
        "elbo_se": 0.5,
        "reconstruction": -80 - 4000 * np.exp(-EPOCHS),
        "kl": 10.0,
        "validation_elbo": -95 - 4000 * np.exp(-EPOCHS),
        "validation_elbo_se": 1.0,
        "validation_reconstruction": -85 - 4000 * np.exp(-EPOCHS),
        "validation_kl": 10.0,
        "seconds": 0.1,
    },
    index=pd.Index(EPOCHS, name="epoch"),
)
HISTORY = SimpleNamespace(table=TABLE, best_epoch=38)
ALONE = TABLE[["elbo", "reconstruction", "kl"]]


def vae(event_shape: int | tuple[int, ...], latents: int = 2) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh())
    likelihood = pv.likelihoods.Normal()
    return pv.VAE(event_shape, latents, likelihood, encoder=network, decoder=network, seed=0)


def rows(*event_shape: int, count: int = 30) -> torch.Tensor:
    return torch.rand(count, *event_shape, generator=torch.Generator().manual_seed(0))


def evidence() -> xr.Dataset:
    return log_evidence(vae(5), rows(5), 50, seed=0)


TABLE_OF_WINES = pd.DataFrame(rows(9).numpy(), columns=[f"column {i}" for i in range(9)])
COVARIATES = {"age": rows(1)[:, 0] / 100, "y": rows(3)}
RANKING = pd.DataFrame(
    {
        "difference": [0.0, -0.3, -2.5],
        "difference_se": [0.0, 0.2, 0.4],
        "within_error": [True, True, False],
    },
    index=pd.Index(["binomial", "beta-binomial", "poisson"], name="model"),
)
FACTORS = xr.Dataset(
    {"factor": ("x_dim_0", [0.9, 1.4, 2.0])}, {"x_dim_0": ["age", "dose", "pulse"]}, {"prob": 0.9}
)
MEMBERS = SimpleNamespace(histories=[pv.History(TABLE, 38, "")] * 3, seeds=[0, 1, 2], training="")
MANY = SimpleNamespace(histories=[pv.History(ALONE, 38, "")] * 12, seeds=range(12), training="")
LABELS = np.arange(30) % 3
WORDS = np.array(["ash", "oak", "elm"])[LABELS]
PICTURES: dict[str, Callable[[], Picture]] = {
    "history": lambda: plots.history(HISTORY),
    "history, no validation": lambda: plots.history(ALONE),
    "history, one epoch": lambda: plots.history(TABLE.iloc[:1]),
    "history, diverged": lambda: plots.history(ALONE * np.nan),
    "reconstructions, vector": lambda: plots.reconstructions(vae(5), rows(5)),
    "reconstructions, square": lambda: plots.reconstructions(vae(64), rows(64)),
    "reconstructions, as lines": lambda: plots.reconstructions(
        vae(64), rows(64), image_shape=(), size=3
    ),
    "reconstructions, oblong": lambda: plots.reconstructions(
        vae(20), rows(20), image_shape=(5, 4)
    ),
    "reconstructions, image": lambda: plots.reconstructions(vae((6, 7)), rows(6, 7), size=1),
    "reconstructions, colour": lambda: plots.reconstructions(vae((3, 6, 7)), rows(3, 6, 7)),
    "reconstructions, block": lambda: plots.reconstructions(vae((2, 4, 2)), rows(2, 4, 2)),
    "reconstructions, categories": lambda: plots.reconstructions(
        pv.VAE(5, 2, pv.likelihoods.Categorical(7), seed=0), rows(5).round()
    ),
    "reconstructions, an image of categories": lambda: plots.reconstructions(
        pv.VAE((6, 7), 2, pv.likelihoods.Categorical(7), seed=0), rows(6, 7).round()
    ),
    "reconstructions, no mean": lambda: plots.reconstructions(
        pv.VAE(5, 2, pv.likelihoods.StudentT(df=1.0), seed=0), rows(5)
    ),
    "reconstructions, an image of no mean": lambda: plots.reconstructions(
        pv.VAE((6, 7), 2, pv.likelihoods.StudentT(df=1.0), seed=0), rows(6, 7)
    ),
    "reconstructions, table": lambda: plots.reconstructions(vae(9), TABLE_OF_WINES),
    "prior samples, vector": lambda: plots.prior_samples(vae(5)),
    "prior samples, square": lambda: plots.prior_samples(vae(64)),
    "prior samples, few": lambda: plots.prior_samples(vae((1, 8, 8)), size=3),
    "prior samples, drawn": lambda: plots.prior_samples(rows(3, 8, 8, count=10)),
    "prior samples, table": lambda: plots.prior_samples(TABLE_OF_WINES),
    "prior samples, categories": lambda: plots.prior_samples(
        pv.VAE(5, 2, pv.likelihoods.Categorical(7), seed=0), data=rows(5).round()
    ),
    "prior samples, images beside data": lambda: plots.prior_samples(vae(64), data=rows(64)),
    "prior samples, colours beside data": lambda: plots.prior_samples(
        rows(3, 8, 8), data=rows(3, 8, 8), size=5
    ),
    "prior samples, lines": lambda: plots.prior_samples(vae(64), data=rows(64), image_shape=()),
    "prior samples, a block": lambda: plots.prior_samples(vae((2, 4, 2)), data=rows(2, 4, 2)),
    "latents, one": lambda: plots.latents(vae(5, 1), rows(5)),
    "latents, one with labels": lambda: plots.latents(vae(5, 1), rows(5), LABELS),
    "latents, two": lambda: plots.latents(vae(5, 2), rows(5), LABELS),
    "latents, three": lambda: plots.latents(vae(5, 3), rows(5), WORDS),
    "latents, many": lambda: plots.latents(vae(5, 7), rows(5), rows(1)[:, 0]),
    "latents, drawn": lambda: plots.latents(rows(4)),
    "latents, sampled means": lambda: plots.latents(flow_like(), rows(5)),
    "reconstructions, a covariate": lambda: plots.reconstructions(Covariate(), COVARIATES),
    "prior samples, a covariate": lambda: plots.prior_samples(Covariate(), x=COVARIATES),
    "prior samples, one number": lambda: plots.prior_samples(
        SharedLevel(), x=rows(1)[:, 0], size=500
    ),
    "latents, two levels": lambda: plots.latents(TwoLevels(), rows(2), LABELS),
    "latents, discrete": lambda: plots.latents(Mixture(), rows(1)[:, 0]),
    "reconstructions, one number": lambda: plots.reconstructions(SharedLevel(), rows(1)[:, 0]),
    "ranking": lambda: plots.ranking(RANKING),
    "conformal": lambda: plots.conformal(FACTORS),
    "conformal, images": lambda: plots.conformal(FACTORS.rename(x_dim_0="i").expand_dims(j=3)),
    "conformal, infinite": lambda: plots.conformal(FACTORS.where(FACTORS["factor"] < 2.0, np.inf)),
    "ensemble": lambda: plots.ensemble(MEMBERS),
    "ensemble, many": lambda: plots.ensemble(MANY),
    "calibration": lambda: pv.calibrate(
        vae(5), num_simulations=50, num_samples=10, seed=0, progress=False
    ).plot(),
    "calibration, near rows": lambda: pv.calibrate(
        TwoLevels(), rows(2), num_simulations=50, num_samples=10, seed=0, progress=False
    ).plot(),
    "pareto k": lambda: plots.pareto_k(evidence()),
    "pareto k, constant": lambda: plots.pareto_k(evidence() * np.nan),
}


def flow_like() -> Any:
    """A posterior on the simplex, which has no mean in closed form."""
    network = pv.networks.MLP(8)
    prior = torch.distributions.Dirichlet(torch.ones(3))
    likelihood = pv.likelihoods.Normal()
    return pv.VAE(5, prior, likelihood, encoder=network, decoder=network, seed=0)


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_opens_and_leaves_no_trace(case: str) -> None:
    before = dict(mpl.rcParams.copy())
    figure = PICTURES[case]()
    assert isinstance(figure, Figure)
    assert len(figure._repr_png_()) > 5000  # what a notebook shows
    assert dict(mpl.rcParams.copy()) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_axes_are_labelled() -> None:
    for axes in plots.history(HISTORY).axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "nats per row")
    (axes,) = plots.latents(vae(5), rows(5)).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("E[z[0] | x]", "E[z[1] | x]")
    (axes,) = plots.pareto_k(evidence()).axes
    assert axes.get_xlabel() == "row"
    assert axes.get_ylabel() == "Pareto k of the importance weights"
    unknown = evidence()
    unknown["pareto_k"][:3] = np.nan
    assert "k not known in 3" in plots.pareto_k(unknown).axes[0].get_title()
    panels = plots.prior_samples(Covariate(), x=COVARIATES).axes
    assert [axes.get_title() for axes in panels if axes.get_visible()] == ["y[0]", "y[1]", "y[2]"]
    (axes,) = plots.prior_samples(TABLE_OF_WINES, image_shape=()).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TABLE_OF_WINES)


def test_the_curves_of_a_fit_say_what_they_are() -> None:
    for history, banded in ((HISTORY, 3), (TABLE[["elbo", "elbo_se", "kl"]], 1)):
        bound, parts = (
            axes.get_legend_handles_labels()[1] for axes in plots.history(history).axes
        )
        assert bound.count("± 1 s.e. over rows") == 1
        assert "training: KL" in parts
        assert len(bound) > banded


def test_validation_is_drawn_if_few_epochs_were_checked() -> None:
    table = TABLE.copy()
    table.loc[~table.index.isin([2, 5, 9, 20, 40]), table.columns.str.startswith("validation")] = (
        np.nan
    )
    (line,) = (
        line
        for line in plots.history(SimpleNamespace(table=table)).axes[0].lines
        if line.get_label() == "validation"
    )
    assert line.get_xdata().tolist() == [2, 5, 9, 20, 40]
    assert line.get_marker() == "o"


def test_the_plunge_of_the_first_epochs_does_not_hide_the_rest() -> None:
    bound = plots.history(HISTORY).axes[0]
    assert bound.get_ylim()[0] > -1000
    assert bound.get_ylim()[1] > -90


def test_components_say_so() -> None:
    pairs = plots.latents(vae(5, 7), rows(5))
    assert any("of variance" in axes.get_xlabel() for axes in pairs.axes)
    assert not any("of variance" in axes.get_xlabel() for axes in plots.latents(rows(4)).axes)


def test_square_vectors_are_images_unless_their_columns_have_names() -> None:
    square = rows(64)
    assert plots.prior_samples(square).axes[0].images
    named = pd.DataFrame(square.numpy(), columns=[f"c{i}" for i in range(64)])
    assert not plots.prior_samples(named).axes[0].images


def test_pictures_stand_side_by_side_in_one_figure() -> None:
    figure = Figure(figsize=(10, 4))
    left, right = figure.subfigures(1, 2)
    assert plots.latents(vae(5), rows(5), LABELS, figure=left) is left
    first, second = right.subplots(1, 2)
    assert plots.pareto_k(evidence(), ax=first) is right
    assert plots.prior_samples(vae(64), ax=second) is right
    figure.savefig(io.BytesIO(), format="png")


def test_the_data_shown_are_those_of_the_site() -> None:
    figure = plots.reconstructions(Covariate(), COVARIATES, size=2, seed=0)
    for i, axes in enumerate(figure.axes):
        (data,) = (line for line in axes.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(data.get_xdata(), COVARIATES["y"][:2, i])


UNITS = {"year": 2000 + 5 * rows(1)[:, 0], "price, $ or $/l": 1e6 * rows(1)[:, 0]}
UNITS |= {"share": 1e-3 * rows(1)[:, 0], "shops": (9 * rows(1)[:, 0]).round()}
BY_NAME = pd.DataFrame({name: values.numpy() for name, values in UNITS.items()}, dtype=np.float64)
SHUFFLED = np.random.default_rng(0).permutation(100)[:30]
DAYS = pd.date_range("2020-01-01", periods=30)
TABLES: dict[str, pd.DataFrame] = {
    "numbered": BY_NAME,
    "held out": BY_NAME.set_axis(SHUFFLED),
    "dates": BY_NAME.set_axis(DAYS),
    "words": BY_NAME.set_axis([f"shop {i} for $, $" for i in range(30)]),
    "long words": BY_NAME.set_axis([f"{i} of the countries of Europe and of Asia" for i in DAYS]),
    "wide": pd.DataFrame(rows(300).numpy(), SHUFFLED, [f"gene {i}" for i in range(300)]),
    "years": pd.DataFrame(rows(3).numpy(), columns=[1990, 1995, 2000]),
}


def scored(table: pd.DataFrame) -> xr.Dataset:
    k = np.linspace(-1, 0.5, len(table))
    k[[3, 7]] = 2.0, np.inf
    return xr.Dataset({"pareto_k": ("datum", k)}, {"datum": table.index}, {"good_k": 0.7})


OF_TABLES: dict[str, Callable[[pd.DataFrame], Picture]] = {
    "reconstructions": lambda table: plots.reconstructions(vae(table.shape[1]), table),
    "prior samples": lambda table: plots.prior_samples(vae(table.shape[1]), data=table),
    "prior samples, alone": lambda table: plots.prior_samples(table),
    "latents": lambda table: plots.latents(vae(table.shape[1]), table),
    "pareto k": lambda table: plots.pareto_k(scored(table)),
}


def texts(figure: Figure) -> set[str]:
    """The texts of a picture, as far as they are drawn, and without the marks of formulas."""
    found = figure.findobj(Text)
    return {text.get_text().replace("\\$", "$") for text in found if text.get_visible()}


def written(labels: Any, most: int = 28) -> set[str]:
    return {text.replace("\\$", "$") for text in (text_of(label, most) for label in labels)}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("picture", OF_TABLES)
def test_a_picture_speaks_the_rows_and_columns_of_the_data(picture: str, kind: str) -> None:
    table = TABLES[kind]
    figure = OF_TABLES[picture](table)
    if kind in ("dates", "words"):
        figure.savefig(io.BytesIO())
    shown = texts(figure)
    columns = [f"x[{name}]" if kind == "years" else name for name in table.columns]
    are_words = kind in ("words", "long words")
    if picture in ("reconstructions", "prior samples, alone"):
        assert written(columns[:24]) <= shown
    if picture.startswith("prior samples"):
        assert len(written(columns) & shown) == min(24, len(columns))
    if picture.startswith(("reconstructions", "prior samples")):
        assert ("of 300 columns; the others are left out" in figure.get_suptitle()) == (
            kind == "wide"
        )
    labels = table.index.to_numpy()
    if picture == "reconstructions":
        assert written(labels[:8]) <= shown
    if picture == "pareto k":
        assert written(labels[3:4]) <= shown
        assert any(text_of(labels[7]).replace("\\$", "$") in text for text in shown)
        drawn = np.concatenate([line.get_xdata() for line in figure.axes[0].lines[:2]])
        places = np.arange(30) if are_words else labels
        np.testing.assert_array_equal(np.sort(drawn), np.sort(np.delete(places, 7)))
    if picture == "latents":
        assert len(written(labels, 16) & shown) == (8 if are_words else 0)


@pytest.mark.parametrize("picture", ["reconstructions", "prior samples", "prior samples, alone"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_no_column_is_flat(picture: str, scale: float) -> None:
    """Each column has an axis in its own units, on which its data are not a point."""
    table = BY_NAME * scale
    panels = [axes for axes in OF_TABLES[picture](table).axes if axes.get_visible()]
    assert len(panels) == table.shape[1]
    for axes, (name, column) in zip(panels, table.items(), strict=True):
        low, high = axes.get_xlim()
        assert axes.get_title().replace("\\$", "$") == name
        assert low < column.iloc[:8].min()
        assert high > column.iloc[:8].max()


SAMPLES: dict[str, np.ndarray] = {
    "normal": np.random.default_rng(0).normal(size=1000),
    "of heavy tails": np.random.default_rng(0).standard_cauchy(1000),
    "counts": np.random.default_rng(0).poisson(3.0, 1000).astype(float),
    "large counts": np.random.default_rng(0).poisson(1e6, 1000).astype(float),
    "rare": (np.arange(1000) == 500).astype(float),
    "constant": np.full(1000, 1e-3),
    "constant and large": np.full(1000, 1e30),
    "partly infinite": np.where(np.arange(1000) % 4, 1.5, np.inf),
    "not a number": np.full(1000, np.nan),
}


@pytest.mark.parametrize("draws", SAMPLES)
def test_histograms_say_how_many_draws_are_left_out(draws: str) -> None:
    """All data are drawn, and all draws but those far out, of which the panel says the share."""
    data = np.array([[0.5], [2.0]])
    drawn = SAMPLES[draws][:, None]
    (axes,) = plots.prior_samples(drawn, data=data).axes
    beyond = float(axes.get_xlabel().split("%")[0] or 0)
    assert beyond < {"of heavy tails": 6, "partly infinite": 26, "not a number": 101}.get(draws, 1)
    of_data, of_draws = axes.containers or [[patch] for patch in axes.patches]
    assert total(of_data) == pytest.approx(100)
    assert total(of_draws) == pytest.approx(100 - beyond, abs=0.051)


def total(patches: Sequence[Any]) -> float:
    """The sum of the heights of the bars of a histogram, or of its outline."""
    if len(patches) > 1:
        return sum(bar.get_height() for bar in patches)
    x, y = patches[0].get_xy().T
    width = np.abs(np.diff(x)).max()
    return abs(np.sum(x[:-1] / width * y[1:] - x[1:] / width * y[:-1])) / 2


@pytest.mark.parametrize("kind", ["numbered", "words", "images"])
@pytest.mark.parametrize("beside", [True, False])
def test_prior_samples_stay_in_the_axes_that_are_passed(kind: str, *, beside: bool) -> None:
    data = rows(64) if kind == "images" else TABLES[kind]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plots.prior_samples(data, data=data if beside else None, ax=left) is figure
    figure.savefig(io.BytesIO(), format="png")
    assert figure.get_suptitle() == ""
    assert "predictive" in left.get_title() + "".join(a.get_title() for a in left.child_axes)
    for axes in left.child_axes:
        assert axes.get_window_extent().x1 <= right.get_window_extent().x0


def test_of_many_columns_those_are_shown_that_fit_worst() -> None:
    draws = np.random.default_rng(0).normal(size=(400, 300))
    data = np.random.default_rng(1).normal(size=(300, 300))
    worst = [5, 40, 77, 290]
    data[:, worst] += [1.0, -1.0, 2.0, 0.7]
    figure = plots.prior_samples(draws, data=data)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 24
    assert {f"x[{i}]" for i in worst} <= set(titles)
    assert "24 worst fitting of 300 columns" in figure.get_suptitle()


def test_the_command_line_names_columns_and_draws_the_held_out_rows_beside_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    about = {"program": vae(4), "rows": read(BY_NAME), "labels": None}
    unscored: Any = SimpleNamespace(
        settings=SimpleNamespace(seed=0), judgement=SimpleNamespace(evidence=None), **about
    )
    shown = [runs.Run.pictures(unscored)["prior_samples"]()]
    assert "30 rows of data" in shown[0].get_suptitle()
    monkeypatch.setattr(commands, "save_picture", lambda figure, path: shown.append(figure))
    commands._WRITERS[".png"](tmp_path / "draws.png", BY_NAME.to_numpy(), list(BY_NAME))
    for figure in shown:
        assert written(BY_NAME.columns) <= texts(figure)


def test_images_of_data_stand_beside_draws_on_one_scale() -> None:
    data = 5 * rows(64, count=50)
    above, below = (axes for axes in plots.prior_samples(vae(64), data=data).axes if axes.images)
    assert [above.get_title(), below.get_title()] == [
        "32 rows of data",
        "32 prior predictive draws",
    ]
    assert above.images[0].get_clim() == below.images[0].get_clim()
    first = above.images[0].get_array()[:8, :8]
    np.testing.assert_array_equal(first, data[0].reshape(8, 8).numpy().astype(np.float64))


def test_latents_are_the_embedding() -> None:
    found = pv.embed(TwoLevels(), rows(2), seed=0)
    figure = plots.latents(TwoLevels(), rows(2), seed=0)
    (points,) = figure.axes[0].collections
    np.testing.assert_allclose(points.get_offsets(), found["mean"][:, :2])
    assert figure.axes[0].get_ylabel() == "E[z[0] | x]"
    assert figure.axes[2].get_xlabel() == "E[w | x]"


def test_a_mosaic_shows_each_image_once() -> None:
    images = rows(9, 8, count=11).numpy()
    (shown,) = plots.prior_samples(images).axes[0].images
    mosaic = shown.get_array()
    assert mosaic.shape == (2 * 10 - 1, 8 * 9 - 1)
    np.testing.assert_array_equal(mosaic[10:19, 18:26], images[10].astype(np.float64))
    assert np.sort(mosaic.compressed()).tolist() == np.sort(images.ravel()).tolist()


def test_a_seed_makes_one_picture() -> None:
    one, two = (plots.prior_samples(vae(64), seed=3).axes[0].images[0] for _ in range(2))
    np.testing.assert_array_equal(one.get_array(), two.get_array())


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no history": (lambda: plots.history([1, 2]), "column 'elbo'"),
    "an empty history": (lambda: plots.history(TABLE.iloc[:0]), "column 'elbo'"),
    "no reconstruct": (
        lambda: plots.reconstructions(nn.Linear(5, 2), rows(5)),
        "Expected a program",
    ),
    "no sample": (lambda: plots.prior_samples(nn.Linear(5, 2)), "Expected a program"),
    "no size": (
        lambda: plots.prior_samples(vae(5), size=0),
        "size to be an integer of at least 1; got 0",
    ),
    "data of another shape": (
        lambda: plots.prior_samples(vae(5), data=rows(4)),
        r"shape \(5,\) of a draw; got rows of shape \(4,\)",
    ),
    "data without the site": (
        lambda: plots.prior_samples(Covariate(), x=COVARIATES, data={"age": rows(3)}),
        "field 'x'",
    ),
    "which site": (
        lambda: plots.prior_samples({"a": rows(5), "b": rows(5)}),
        "site to be one of .*'a', 'b'.*got None",
    ),
    "no covariates": (lambda: plots.prior_samples(Covariate()), "Pass rows as x="),
    "no ranking": (lambda: plots.ranking(TABLE), "columns .'difference'"),
    "another image": (
        lambda: plots.reconstructions(vae(5), rows(5), image_shape=(2, 2)),
        "image shape of 5 elements",
    ),
    "an unknown shape": (lambda: plots.prior_samples(rows(16), image_shape=(16,)), "image shape"),
    "no rows": (lambda: plots.latents(vae(5)), "pass the data as x"),
    "no encode": (lambda: plots.latents(nn.Linear(5, 2), rows(5)), "Expected a program"),
    "few labels": (lambda: plots.latents(vae(5), rows(5), LABELS[:3]), "30 labels"),
    "one-dimensional": (lambda: plots.latents(np.arange(3.0)), "rows, dims"),
    "no k": (lambda: plots.pareto_k(xr.Dataset()), "pareto_k"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
