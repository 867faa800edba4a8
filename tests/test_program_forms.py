"""`pv.Program`: pairs of Pyro programs as tutorials write them, through the whole package."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

import pyro_vae as pv

ROWS = 24


def joined(*parts: Tensor) -> Tensor:
    """Concatenates along the last dim, and spreads covariates over the draws."""
    shape = torch.broadcast_shapes(*[part.shape[:-1] for part in parts])
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def normal(features: Tensor) -> dist.Distribution:
    loc, scale = features.chunk(2, -1)
    return dist.Normal(loc, softplus(scale) + 0.01).to_event(1)


class SemiSupervised(nn.Module):
    """Kingma's M2: x depends on a class y, known for some rows, and on z."""

    classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.decoder = network(2 + self.classes, 4)
        self.classifier = network(4, self.classes)
        self.encoder = network(4 + self.classes, 4)

    def model(self, row: dict[str, Tensor]) -> None:
        pyro.module("semi_supervised", self)
        x, known = row["x"], row["y"] >= 0
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            prior = dist.Categorical(logits=x.new_zeros(self.classes))
            y = pyro.sample("y", prior, obs=row["y"].clamp(min=0), obs_mask=known)
            mean = self.decoder(joined(z, one_hot(y, self.classes).to(x)))
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    def guide(self, row: dict[str, Tensor]) -> None:
        pyro.module("semi_supervised", self)
        x, known = row["x"], row["y"] >= 0
        with pyro.plate("batch", len(x)):
            with poutine.mask(mask=~known):
                drawn = pyro.sample("y_unobserved", dist.Categorical(logits=self.classifier(x)))
            y = torch.where(known, row["y"], drawn)
            features = self.encoder(joined(x, one_hot(y, self.classes).to(x)))
            pyro.sample("z", normal(features))


def semi_supervised() -> pv.Program:
    module = SemiSupervised()
    return pv.Program(module.model, module.guide, plate="batch")


def single_cells() -> pv.Program:
    """A scANVI of small size: library size, class, z, and one pyro.param."""
    decoder, library, encoder, classifier = (
        network(*sizes) for sizes in ((2 + 2, 5), (5, 2), (5, 4), (2, 2))
    )

    def model(counts: Tensor) -> None:
        pyro.module("decoder", decoder)
        dispersion = pyro.param("dispersion", 2.0 * torch.ones(5), constraint=constraints.positive)
        with pyro.plate("cells", len(counts)):
            z = pyro.sample("z", dist.Normal(counts.new_zeros(2), 1.0).to_event(1))
            kind = pyro.sample("kind", dist.OneHotCategorical(logits=counts.new_zeros(2)))
            size = pyro.sample("size", dist.LogNormal(counts.new_tensor([3.0]), 0.5).to_event(1))
            share = decoder(joined(z, kind)).softmax(-1)
            logits = (size * share).log() - dispersion.log()
            counted = dist.NegativeBinomial(dispersion, logits=logits, validate_args=False)
            pyro.sample("counts", counted.to_event(1), obs=counts)

    def guide(counts: Tensor) -> None:
        for name, module in (("library", library), ("encoder", encoder), ("classes", classifier)):
            pyro.module(name, module)
        logs = counts.log1p()
        with pyro.plate("cells", len(counts)):
            loc, scale = library(logs).chunk(2, -1)
            pyro.sample("size", dist.LogNormal(3.0 + loc, softplus(scale) + 0.01).to_event(1))
            z = pyro.sample("z", normal(encoder(logs)))
            pyro.sample("kind", dist.OneHotCategorical(logits=classifier(z)))

    return pv.Program(model, guide, plate="cells")


class Conditional:
    """A conditional VAE as a plain object that holds two networks: p(x | z, c), q(z | x, c)."""

    def __init__(self) -> None:
        self.decoder, self.encoder = network(2 + 1, 4), network(4 + 1, 4)

    def model(self, row: dict[str, Tensor]) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(row["x"])):
            z = pyro.sample("z", dist.Normal(row["x"].new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(joined(z, row["c"]))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=row["x"])

    def guide(self, row: dict[str, Tensor]) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(row["x"])):
            pyro.sample("z", normal(self.encoder(joined(row["x"], row["c"]))))


def conditional() -> pv.Program:
    pair = Conditional()
    return pv.Program(pair.model, pair.guide)


def topics() -> pv.Program:
    """ProdLDA of three topics: a logistic-normal over topics, words of a product of experts."""
    beta = nn.Sequential(nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6, affine=False))
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Dropout(0.2), nn.Linear(8, 6))

    def model(docs: Tensor) -> None:
        pyro.module("decoder", beta)
        with pyro.plate("documents", docs.shape[0]):
            loc = docs.new_zeros((docs.shape[0], 3))
            log_theta = pyro.sample("log_theta", dist.Normal(loc, 1.0).to_event(1))
            theta = log_theta.softmax(-1)
            words = beta(theta.flatten(0, -2)).reshape(*theta.shape[:-1], 6).softmax(-1)
            pyro.sample("words", dist.Multinomial(20, words), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("log_theta", normal(encoder(docs)))

    return pv.Program(model, guide, plate="documents")


class Chain(PyroModule):
    """A deep Markov model over sequences of one length, whose guide reads x_t and z_{t-1}."""

    def __init__(self) -> None:
        super().__init__()
        self.transition, self.emission = network(2, 4), network(2, 3)
        self.combiner = network(2 + 3, 4)
        self.start = nn.Parameter(torch.zeros(2))
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def model(self, x: Tensor) -> None:
        with pyro.plate("sequences", len(x)):
            z = self.start
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", normal(self.transition(z)))
                emitted = dist.Normal(self.emission(z), self.noise)
                pyro.sample(f"x_{t}", emitted.to_event(1), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        z = pyro.param("first", torch.zeros(2))
        rows = pyro.plate("sequences", len(x))
        for t in pyro.markov(range(x.shape[1])):
            with rows:
                z = pyro.sample(f"z_{t}", normal(self.combiner(joined(z, x[:, t]))))


def sequences() -> pv.Program:
    chain = Chain()
    return pv.Program(chain.model, chain.guide, plate="sequences")


def line(row: dict[str, Tensor]) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("people", len(row["y"])):
        pyro.sample("y", dist.Normal(row["x"] @ weight, noise), obs=row["y"])


def regression(guide: Callable[..., Any] = AutoNormal) -> pv.Program:
    return pv.Program(line, guide(line), plate="people")


def labelled_rows() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, 4), "y": torch.arange(ROWS) % 4 - 1}


def regression_rows(rows: int = ROWS) -> dict[str, Tensor]:
    x = torch.randn(rows, 2)
    return {"x": x, "y": x @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(rows)}


FORMS: dict[str, tuple[Callable[[], pv.Program], Callable[[], Any]]] = {
    "semi-supervised": (semi_supervised, labelled_rows),
    "single cells": (single_cells, lambda: torch.poisson(4.0 * torch.ones(ROWS, 5))),
    "conditional": (
        conditional,
        lambda: {"x": torch.rand(ROWS, 4).round(), "c": torch.randn(ROWS, 1)},
    ),
    "topics": (topics, lambda: dist.Multinomial(20, torch.ones(6)).sample((ROWS,))),
    "sequences": (sequences, lambda: torch.randn(ROWS, 4, 3)),
}
LATENTS = {
    "semi-supervised": {"z", "y_unobserved"},
    "single cells": {"z", "kind", "size"},
    "conditional": {"z"},
    "topics": {"log_theta"},
    "sequences": {"z_0", "z_1", "z_2", "z_3"},
}
OBSERVED = {
    "semi-supervised": "x",
    "single cells": None,
    "conditional": None,
    "topics": None,
    "sequences": "x_1",
}
ALL = FORMS | {"regression": (regression, regression_rows)}

fit = partial(pv.fit, batch_size=8, max_epochs=2, lr=0.01, seed=0, device="cpu", progress=False)


def made(name: str) -> tuple[pv.Program, Any]:
    torch.manual_seed(0)
    make, rows = ALL[name]
    return make(), rows()


def weights(program: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(bool((one[k] == other[k]).all()) for k in one)


@pytest.mark.parametrize("name", ALL)
def test_fit_trains_every_parameter(name: str) -> None:
    program, x = made(name)
    before = weights(program.prepare(x))
    history = fit(program, x)
    after = weights(program)
    assert after.keys() == before.keys()
    assert [name for name in after if bool((after[name] == before[name]).all())] == []
    assert np.isfinite(history.table["elbo"]).all()
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", ALL)
def test_a_fit_that_prepares_ends_like_one_after_prepare(name: str) -> None:
    program, x = made(name)
    fit(program, x, max_epochs=1)
    torch.manual_seed(0)
    make, _ = ALL[name]
    prepared = make()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        prepared.prepare(x)
    fit(prepared, x, max_epochs=1)
    assert same(program.state_dict(), prepared.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_a_traced_fit_ends_like_an_eager_one(name: str) -> None:
    program, x = made(name)
    other, _ = made(name)
    fit(program, x, engine="eager")
    fit(other, x, engine="traced")
    for key, value in program.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


@pytest.mark.parametrize("name", FORMS)
def test_log_evidence(name: str) -> None:
    program, x = made(name)
    evidence = pv.log_evidence(program, x, num_samples=50, seed=0)
    assert evidence["log_evidence"].shape == (ROWS,)
    assert np.isfinite(evidence["log_evidence"]).all()
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", FORMS)
def test_to_arviz(name: str) -> None:
    program, x = made(name)
    tree = pv.to_arviz(program, x, 10, num_predictive=4, seed=0)
    assert set(tree["posterior"].data_vars) == LATENTS[name]
    assert dict(tree["posterior"].sizes)["datum"] == ROWS


@pytest.mark.parametrize("name", FORMS)
def test_embed_reconstruct_sample_and_plots(name: str) -> None:
    program, x = made(name)
    embedded = pv.embed(program, x, num_samples=20, seed=0)
    assert embedded["mean"].sizes["datum"] == ROWS
    assert embedded["mean"].notnull().all()
    found = pv.reconstruct(program, x, site=OBSERVED[name], num_samples=19, seed=0)
    assert found.sizes["datum"] == ROWS
    drawn = pv.sample(program, 3, x=x, seed=0)
    for values in drawn.values() if isinstance(drawn, dict) else [drawn]:
        assert len(values) == 3
    pv.plots.latents(program, x, num_samples=8, seed=0)
    pv.plots.reconstructions(program, x, site=OBSERVED[name], num_samples=19, seed=0)


def test_a_regression_has_a_tree() -> None:
    program, x = made("regression")
    fit(program, x, max_epochs=1)
    with pytest.raises(ValueError, match="Expand each tensor of the rows to the draws"):
        pv.reconstruct(program, x, num_samples=19, seed=0)
    tree = pv.to_arviz(program, x, 10, seed=0)
    assert tree["posterior"]["weight"].dims[:2] == ("chain", "draw")
    assert "datum" not in tree["posterior"]["weight"].dims
    with pytest.raises(ValueError, match="only latent sites that all rows share: weight, noise"):
        pv.embed(program, x)


@pytest.mark.parametrize("name", FORMS)
def test_compare_elbos(name: str) -> None:
    program, x = made(name)
    elbos = {"ELBO": pv.elbos.Trace_ELBO(), "RWS": pv.elbos.RWS(4)}
    comparison = pv.compare_elbos(program, x, elbos, num_repeats=8, reference=32)
    assert np.isfinite(comparison.table["value"]).all()


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    program, x = made(name)
    fit(program, x, max_epochs=1)
    make, _ = ALL[name]
    other = make().prepare(x)
    assert not same(other.state_dict(), program.state_dict())
    pv.load(pv.save(program, tmp_path / "program"), into=other)
    assert same(other.state_dict(), program.state_dict())
    if name in FORMS:
        one, two = (pv.log_evidence(p, x, num_samples=8, seed=0) for p in (program, other))
        np.testing.assert_array_equal(one["log_evidence"], two["log_evidence"])


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_a_copy_is_independent(name: str, prepared: bool) -> None:
    program, x = made(name)
    if prepared:
        program.prepare(x)
    other = copy.deepcopy(program)
    before = weights(program.prepare(x))
    fit(other, x, max_epochs=1)
    assert same(weights(program), before)
    assert [k for k, v in weights(other).items() if bool((v == before[k]).all())] == []
    after = weights(other)
    fit(program, x, max_epochs=1)
    assert same(weights(other), after)


@pytest.mark.parametrize("name", ALL)
def test_two_programs_share_nothing(name: str) -> None:
    program, x = made(name)
    other, _ = made(name)
    before = weights(other.prepare(x))
    fit(program, x, max_epochs=1)
    assert same(weights(other), before)


def test_two_programs_do_not_share_a_first_value() -> None:
    start = torch.zeros(())

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", start)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + loc, 1.0))

    program, other = (simple(guide).prepare(torch.zeros(3)) for _ in range(2))
    fit(program, torch.ones(9))
    assert start.item() == other.params.loc.item() == 0.0 != program.params.loc.item()


@pytest.mark.parametrize("name", ALL)
def test_pyros_own_svi_trains_a_program(name: str) -> None:
    program, x = made(name)
    program.prepare(x)
    before = weights(program)
    elbo = pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        svi.step(x)
    assert [k for k, v in weights(program).items() if bool((v == before[k]).all())] == []
    assert len(pyro.get_param_store()) == 0


@pytest.mark.param_store
def test_the_global_store_stays_as_it_was() -> None:
    pyro.param("dispersion", torch.tensor(7.0), constraint=constraints.positive)
    pyro.param("other", torch.tensor(3.0))
    store = pyro.get_param_store()
    before = {name: tensor.clone() for name, tensor in store.named_parameters()}
    program, x = made("single cells")
    fit(program, x, max_epochs=1)
    pv.log_evidence(program, x, num_samples=4)
    assert same(dict(store.named_parameters()), before)
    assert program.params.dispersion.shape == (5,)


def test_the_plain_functions_train_in_svi() -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS) + 3.0
    module = nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        mean = pyro.param("mean", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean.expand(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("module", module)
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(module(x[:, None])[:, 0], scale))

    for engine in ("eager", "traced"):
        svi = pv.svi.SVI(
            model, guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), lr=0.05, engine=engine
        )
        losses = [float(svi.step(x)) for _ in range(150)]
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 5.0
        assert len(svi.parameters) == 4
    assert len(pyro.get_param_store()) == 0


def test_svi_of_a_program_that_was_not_prepared() -> None:
    program, x = made("single cells")
    elbo = pv.elbos.Trace_ELBO()
    svi = pv.svi.SVI(program.model, program.guide, torch.optim.Adam, elbo)
    svi.step(x)
    assert {id(p) for p in svi.parameters} == {id(p) for p in program.parameters()}


def test_svi_takes_an_autoguide() -> None:
    rows = regression_rows()
    model = poutine.block(line, hide=[])
    with pytest.raises(ValueError, match="No site of the program is in a plate named 'data'"):
        pv.svi.SVI(line, AutoNormal(line), torch.optim.Adam, pv.elbos.Trace_ELBO()).step(rows)
    program = pv.Program(model, AutoNormal(model), plate="people")
    svi = pv.svi.SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO())
    assert torch.isfinite(svi.step(rows))
    assert len(svi.parameters) == 4


def test_svi_takes_functions_of_several_arguments() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ slope, 0.3), obs=y)

    rows, guide = regression_rows(), AutoNormal(model)
    svi = pv.svi.SVI(model, guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), lr=0.05)
    for _ in range(200):
        svi.step(rows["x"], y=rows["y"])
    found = guide.median()["slope"]
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0]), atol=0.2, rtol=0.0)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
def test_a_regression_finds_the_posterior(guide: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    rows = regression_rows(200)
    program = regression(guide)
    fit(program, rows, max_epochs=250, batch_size=50, lr=0.02)
    exact = torch.linalg.lstsq(rows["x"], rows["y"][:, None]).solution[:, 0]
    found = program.parts.guide.median(rows)
    torch.testing.assert_close(found["weight"], exact, atol=0.05, rtol=0.0)
    assert abs(float(found["noise"]) - 0.3) < 0.06


@pytest.mark.parametrize("call", [pv.log_evidence, pv.diagnostics.active_units])
def test_what_is_per_row_refuses_shared_latents_by_name(call: Callable[..., Any]) -> None:
    program, x = made("regression")
    with pytest.raises(ValueError, match=r"got weight, noise outside it\."):
        call(program, x)


def test_a_positive_parameter_stays_positive() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(0.001 * z, scale), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = 0.1 * torch.randn(ROWS)
    program = pv.Program(model, guide)
    fit(program, x, max_epochs=100, lr=0.05)
    unconstrained = program.params.scale
    scale = poutine.trace(program.model).get_trace(x).nodes["scale"]["value"]
    assert 0.05 < scale.item() < 0.2
    assert unconstrained.item() == pytest.approx(np.log(scale.item()))
    assert scale.unconstrained() is unconstrained


def test_an_enumerated_class() -> None:
    def model(x: Tensor) -> None:
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("documents", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(means[y], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope, start = pyro.param("slope", torch.zeros(2)), pyro.param("start", torch.zeros(2))
        given = dist.Categorical(logits=start + slope * x[:, None])
        with pyro.plate("documents", len(x)):
            pyro.sample("y", given, infer={"enumerate": "parallel"})

    program = pv.Program(model, guide, plate="documents")
    x = torch.randn(200) + 3.0 * torch.randint(2, (200,))
    fit(program, x, elbo=pv.elbos.TraceEnum_ELBO(), max_epochs=60, batch_size=50, lr=0.05)
    means = program.params.means.detach().sort().values
    torch.testing.assert_close(means, torch.tensor([0.0, 3.0]), atol=0.5, rtol=0.0)


def test_a_plate_that_subsamples() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.param("mean", torch.zeros(()))
        with pyro.plate("documents", 100, subsample=x):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(mean, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("documents", 100, subsample=x):
            pyro.sample("z", dist.Normal(loc + x / 2, 0.7))

    program = pv.Program(model, guide, plate="documents")
    svi = pv.svi.SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO())
    losses = [float(svi.step(torch.ones(size))) / 100 for size in (4, 50)]
    assert 1.0 < min(losses)
    assert max(losses) < 8.0


def test_an_autoguide_beside_a_guide_of_the_rows() -> None:
    encoder = network(1, 2)

    def model(x: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(torch.zeros(()), 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(center.expand(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def rows(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(encoder(x)))

    shared = AutoNormal(poutine.block(model, hide=["z", "x"]))

    def guide(x: Tensor) -> None:
        shared(x)
        rows(x)

    program = pv.Program(model, guide)
    x = torch.randn(ROWS, 1) + 2.0
    before = weights(program.prepare(x))
    assert any(name.startswith("parts.encoder") for name in before)
    fit(program, x)
    assert not same(weights(program), before)


def test_modules_that_are_not_stated_move_and_change_modes_too() -> None:
    dropping = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dropping(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    program = pv.Program(model, guide).eval()
    assert not dropping[1].training
    assert {name.partition(".")[0] for name, _ in program.named_parameters()} == {"parts"}


def test_the_dry_runs_leave_buffers_and_modes() -> None:
    program, x = made("topics")
    program.prepare(x)
    assert all(module.training for module in program.modules())
    assert int(program.state_dict()["parts.beta.1.num_batches_tracked"]) == 0


def test_a_vae_trains_alike_as_a_program() -> None:
    x = torch.rand(ROWS, 4).round()
    vae, other = (pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0) for _ in range(2))
    for each in (vae, other):
        each.initialize(x)
    program = pv.Program(other.model, other.guide)
    fit(vae, x, validation=None, weight_prior=None)
    fit(program, x)
    assert same(vae.state_dict(), other.state_dict())
    assert np.array_equal(
        pv.log_evidence(vae, x, num_samples=4, seed=0)["log_evidence"],
        pv.log_evidence(program, x, num_samples=4, seed=0)["log_evidence"],
    )


class Weights(PyroModule):
    """A regression whose weights are random attributes of a module, and are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1)
        self.layer.weight = PyroSample(lambda _: dist.Normal(0.0, 5.0).expand([1, 2]).to_event(2))
        self.noise = PyroParam(torch.ones(()), constraint=constraints.positive)

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        mean = self.layer(row["x"]).squeeze(-1)
        with pyro.plate("data", len(row["x"])):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=row["y"])


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_module_of_random_weights(engine: str) -> None:
    torch.manual_seed(0)
    rows = regression_rows(200)
    module = Weights()
    program = pv.Program(module, AutoNormal(module))
    fit(program, rows, max_epochs=150, batch_size=50, lr=0.03, engine=engine)
    found = program.parts.guide.median(rows)["layer.weight"]
    torch.testing.assert_close(found, torch.tensor([[1.0, -2.0]]), atol=0.1, rtol=0.0)
    assert 0.2 < module.noise.item() < 0.45
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", ALL)
def test_a_copy_is_traced_like_the_first(name: str) -> None:
    program, x = made(name)
    other = copy.deepcopy(program.prepare(x))
    fit(program, x, engine="traced")
    fit(other, x, engine="traced")
    assert same(program.state_dict(), other.state_dict())


def test_a_fit_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    (whole, x), (part, _), (rest, _) = made("topics"), made("topics"), made("topics")
    fit(whole, x, max_epochs=3)
    fit(part, x, max_epochs=1, checkpoint=tmp_path / "fit")
    fit(rest, x, max_epochs=3, checkpoint=tmp_path / "fit", resume=True)
    assert same(whole.state_dict(), rest.state_dict())


def test_names_with_dots() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("prior.loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc.expand(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        values = pyro.param("values", lambda: torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + values, 1.0))

    program = pv.Program(model, guide)
    fit(program, torch.randn(ROWS), engine="traced")
    assert sorted(program.state_dict()) == ["params.prior/loc", "params.values"]
    other = pv.Program(model, guide).prepare(torch.randn(3))
    other.load_state_dict(program.state_dict())
    assert same(other.state_dict(), program.state_dict())


def simple(guide: Callable[[Tensor], Any], rows: str = "data", **options: Any) -> pv.Program:
    def model(x: Tensor) -> None:
        with pyro.plate(rows, len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return pv.Program(model, guide(model) if guide is AutoNormal else guide, **options)


def by_size(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def by_branch(x: Tensor) -> None:
    shift = pyro.param("early", torch.zeros(()))
    if len(x) > 3:
        shift = pyro.param("late", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + shift, 1.0))


def without_parameters(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


def in_two_plates(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a parameter of the size of the batch": (
        lambda: fit(simple(by_size), torch.zeros(9)),
        r"^The shape of pyro.param\('loc'\) depends on the number of rows, \(2,\) for 2",
    ),
    "an AutoGuide of the rows": (
        lambda: fit(simple(AutoNormal), torch.zeros(9)),
        "^AutoNormal has parameters of its own for each row of z, .* a guide that computes",
    ),
    "a parameter of a branch": (
        lambda: fit(simple(by_branch), torch.zeros(9), batch_size=9),
        r"^The statement pyro.param\('late'\) did not run when",
    ),
    "another plate": (
        lambda: fit(simple(by_branch, "rows", plate="documents"), torch.zeros(9)),
        r"plate named 'documents': its plates are \['data', 'rows'\]\. .*plate=\.\.\.",
    ),
    "a second plate called data": (
        lambda: fit(simple(in_two_plates, "rows", plate="rows"), torch.zeros(9)),
        "^The plate of the rows is 'rows', and another plate is named 'data'",
    ),
    "a class": (lambda: pv.Program(nn.Linear, by_size), "the model to be a function"),
    "a number": (lambda: pv.Program(by_size, 3), "the guide to be a function.* got 3"),
    "no name": (lambda: simple(by_size, plate=3), "the name of a plate; got 3"),
    "the state before any data": (
        lambda: simple(by_size).state_dict(),
        r"^This Program has no parameters yet.*program\.prepare\(x\)",
    ),
    "a state before any data": (lambda: simple(by_size).load_state_dict({}), r"\.prepare\(x\)"),
    "nothing to train": (
        lambda: fit(simple(without_parameters), torch.zeros(9)),
        "parameters to train; got none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    if case != "a parameter of a branch":
        assert "Trace Shapes" not in str(refusal.value)


def test_random_starts_follow_the_seed_of_the_fit() -> None:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + loc, 1.0))

    starts = []
    for seed in (0, 0, 1):
        program = simple(guide)
        fit(program, torch.zeros(9), max_epochs=1, lr=1e-9, seed=seed)
        starts.append(program.params.loc.item())
    assert starts[0] == starts[1] != starts[2]


def test_evaluation_leaves_the_generators() -> None:
    program, x = made("topics")
    before = torch.get_rng_state()
    pv.log_evidence(program, x, num_samples=4, seed=0)
    assert bool((torch.get_rng_state() == before).all())
