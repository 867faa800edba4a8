"""Bad input is refused at the public edge: one clear ValueError, nothing computed or written."""

import functools
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import lr_scheduler

import pyro_vae as pv
from pyro_vae import Predicted, Shared
from pyro_vae.data.datasets import load

LIKELIHOODS = pv.likelihoods


@dataclass
class World:
    """What a case may use: a fitted-size VAE of binary rows, its data, a folder with files."""

    vae: pv.VAE
    x: Tensor
    folder: Path

    def fit(self, program: Any = None, x: Any = None, **options: Any) -> Any:
        asked = {"max_epochs": 1, "seed": None, "device": "cpu", "progress": False}
        program = self.vae if program is None else program
        return pv.fit(program, self.x if x is None else x, **asked | options)

    def of(self, likelihood: Any, x: Any, **members: Any) -> Any:
        return self.fit(make(likelihood, **members), x)

    def with_value(self, value: float) -> Tensor:
        x = self.x.clone()
        x[7, 2] = value
        return x


def make(likelihood: Any = None, event_shape: Any = (6,), **members: Any) -> pv.VAE:
    asked = {
        "prior": 2,
        "likelihood": LIKELIHOODS.Bernoulli() if likelihood is None else likelihood,
        "encoder": pv.networks.MLP(4),
        "decoder": pv.networks.MLP(4),
        "seed": 0,
    }
    return pv.VAE(event_shape, **asked | members)


class Program(nn.Module):
    """A program of the user's own, sound or amiss in one way."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.loc, self.fault = nn.Parameter(torch.zeros(2)), fault

    def model(self, x: Any) -> None:
        rows = x["a"] if isinstance(x, dict) else x
        name = "rows" if self.fault == "plate" else "data"
        with pyro.plate(name, len(rows)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=rows.flatten(1).sum(-1))

    def guide(self, x: Any) -> None:
        rows = x["a"] if isinstance(x, dict) else x
        site = "w" if self.fault == "guide" else "z"
        loc = pyro.param("loc", torch.zeros(2)) if self.fault == "param" else self.loc
        with pyro.plate("rows" if self.fault == "plate" else "data", len(rows)):
            pyro.sample(site, dist.Normal(loc, 1.0).to_event(1))


class Returns(nn.Module):
    """A network, prior or member whose forward returns what it is given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any) -> Any:
        return self.value


def linear(inputs: int, outputs: int) -> nn.Linear:
    with torch.random.fork_rng(devices=()):
        return nn.Linear(inputs, outputs)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def words(array: Any) -> pd.DataFrame:
    return pd.DataFrame(array, columns=list("abcdef"))


Case = tuple[Callable[[World], Any], str]

DATA: dict[str, Case] = {
    "too few columns": (lambda w: w.fit(x=ones(9, 5)), r"event shape \(6,\)"),
    "too many dims": (lambda w: w.fit(x=ones(9, 6, 1)), r"event shape \(6,\)"),
    "one dim": (lambda w: w.fit(x=ones(9)), r"event shape \(6,\)"),
    "NaN": (lambda w: w.fit(x=w.with_value(np.nan)), "without NaN.* row 7"),
    "inf": (lambda w: w.of(LIKELIHOODS.Normal(), w.with_value(np.inf)), "finite data.* row 7"),
    "NaN in validation": (
        lambda w: w.fit(validation=w.with_value(np.nan)),
        "without NaN.* row 7",
    ),
    "grey under Bernoulli": (lambda w: w.fit(x=w.with_value(0.3)), "support of Bernoulli.* 0.3"),
    "above the total": (
        lambda w: w.of(LIKELIHOODS.Binomial(16), w.with_value(17.0)),
        "support of Binomial.* got .*17",
    ),
    "half a count": (
        lambda w: w.of(LIKELIHOODS.Poisson(), w.with_value(2.5)),
        "support of Poisson.* 2.5",
    ),
    "a negative count": (
        lambda w: w.of(LIKELIHOODS.Poisson(), w.with_value(-1.0)),
        "support of Poisson.* -1",
    ),
    "a share of 0": (
        lambda w: w.of(LIKELIHOODS.Beta(), w.with_value(0.0).clamp(max=0.9)),
        "support of Beta",
    ),
    "a share of 1": (
        lambda w: w.of(LIKELIHOODS.Beta(), w.with_value(1.0).clamp(min=0.1)),
        "support of Beta",
    ),
    "0 under a log-normal": (
        lambda w: w.of(LIKELIHOODS.LogNormal(), w.x),
        "support of LogNormal",
    ),
    "a code too large": (
        lambda w: w.of(LIKELIHOODS.Categorical(3), w.with_value(3.0)),
        "support of Categorical.* 3",
    ),
    "a short total": (
        lambda w: w.of(LIKELIHOODS.Family(dist.Multinomial, total_count=6), w.with_value(0.0)),
        "support of Multinomial",
    ),
    "no rows": (lambda w: w.fit(x=ones(0, 6)), r"at least one row.* \(0, 6\)"),
    "no columns": (lambda w: w.fit(x=ones(6, 0)), r"at least one row.* \(6, 0\)"),
    "an empty dict": (lambda w: w.fit(x={}), "at least one field"),
    "a scalar": (lambda w: w.fit(x=3.0), "rows along its first dim; got a scalar"),
    "nothing": (lambda w: pv.fit(w.vae, None), "got a NoneType"),
    "a string": (lambda w: w.fit(x="digits"), "numbers"),
    "strings": (lambda w: w.fit(x=np.full((9, 6), "a")), "numbers"),
    "a column of strings": (
        lambda w: w.fit(x=words(w.x.numpy()).assign(a="red")),
        "numbers",
    ),
    "dates": (lambda w: w.fit(x=np.zeros((9, 6), "datetime64[s]")), "numbers"),
    "complex": (lambda w: w.fit(x=ones(9, 6).to(torch.complex64)), "real numbers"),
    "complex in numpy": (lambda w: w.fit(x=np.ones((9, 6), complex)), "numbers"),
    "ragged": (lambda w: w.fit(x=[[1.0, 0.0], [1.0]]), "array of numbers"),
    "fields for a VAE": (lambda w: w.fit(x={"a": w.x}), "rows of x for a VAE"),
    "context for a VAE": (
        lambda w: pv.log_evidence(w.vae, w.x, 10, context=ones(40, 1)),
        "VAE does not use context",
    ),
    "too few weights": (
        lambda w: pv.compare({"a": w.vae}, w.x, 10, weights=ones(3)),
        "equally many rows",
    ),
    "a negative weight": (
        lambda w: pv.to_arviz(w.vae, w.x, 10, weights=-ones(40)),
        "weights that are finite and 0 or more",
    ),
    "fields of two lengths": (
        lambda w: w.fit(Program(), {"a": ones(9, 2), "b": ones(8)}),
        "equally many rows",
    ),
    "a field of strings": (
        lambda w: w.fit(Program(), {"a": ones(9, 2), "b": ["u"] * 9}),
        "Expected numbers in column 0 .field 'b'.; got 'u' in row 0",
    ),
    "validation of another width": (
        lambda w: w.fit(validation=ones(9, 5)),
        r"validation rows like those of x.*\(5,\)",
    ),
    "validation with other fields": (
        lambda w: w.fit(Program(), {"a": ones(9, 2)}, validation={"b": ones(9, 2)}),
        "validation rows like",
    ),
    "one row with validation": (
        lambda w: w.fit(x=w.x[:1], validation=0.5),
        "at least 2 rows",
    ),
    "a share held out of 0": (lambda w: w.fit(validation=0.0), r"share in \(0, 1\).* 0.0"),
    "a share held out of 1": (lambda w: w.fit(validation=1.0), r"share in \(0, 1\).* 1.0"),
    "no rows held out": (lambda w: w.fit(validation=0), "or a number of rows; got 0"),
    "all rows held out": (lambda w: w.fit(validation=40), "fewer than the 40 rows.* got 40"),
    "a share held out of NaN": (lambda w: w.fit(validation=float("nan")), "share"),
    "validation=True": (lambda w: w.fit(validation=True), "scalar"),
    "no validation rows": (lambda w: w.fit(validation=ones(0, 6)), "at least one row"),
}

OPTIONS: dict[str, Case] = {
    "lr of 0": (lambda w: w.fit(lr=0.0), "lr to be a positive number; got 0"),
    "lr below 0": (lambda w: w.fit(lr=-1e-3), "lr to be a positive number"),
    "lr of NaN": (lambda w: w.fit(lr=float("nan")), "lr to be a positive number"),
    "lr as text": (lambda w: w.fit(lr="1e-3"), "lr to be a positive number"),
    "batch_size of 0": (lambda w: w.fit(batch_size=0), "batch_size .*at least 1; got 0"),
    "half a batch_size": (lambda w: w.fit(batch_size=2.5), "batch_size to be an integer"),
    "batch_size=True": (lambda w: w.fit(batch_size=True), "batch_size to be an integer"),
    "no epochs": (lambda w: w.fit(max_epochs=0), "max_epochs"),
    "warm-up below 0": (lambda w: w.fit(warmup=-1), "warmup"),
    "warm-up too long": (
        lambda w: w.fit(warmup=2),
        "warm-up of 2 epochs is longer",
    ),
    "a norm of 0": (lambda w: w.fit(max_grad_norm=0), "max_grad_norm"),
    "a negative seed": (lambda w: w.fit(seed=-1), "seed .*at least 0; got -1"),
    "a huge seed": (lambda w: w.fit(seed=2**70), "seed"),
    "an optimizer by name": (lambda w: w.fit(optimizer="adam"), "an optimiser such as"),
    "an optimizer built": (
        lambda w: w.fit(optimizer=torch.optim.Adam(w.vae.parameters())),
        "an optimiser such as",
    ),
    "an optimizer of no kind": (lambda w: w.fit(optimizer=nn.Linear), "an optimiser such as"),
    "an optimizer misspelt": (
        lambda w: w.fit(optimizer=functools.partial(torch.optim.Adam, beta=0.9)),
        "an optimiser such as .*beta",
    ),
    "an optimizer out of range": (
        lambda w: w.fit(optimizer=functools.partial(torch.optim.SGD, momentum=-1.0)),
        "an optimiser such as .*momentum",
    ),
    "an optimizer with a closure": (
        lambda w: w.fit(optimizer=torch.optim.LBFGS),
        "steps on gradients.* LBFGS",
    ),
    "options by parameter": (
        lambda w: w.fit(optimizer=pyro.optim.Adam(lambda name: {"lr": 0.1})),
        "one dict of options",
    ),
    "clipping by parameter": (
        lambda w: w.fit(optimizer=pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})),
        "clipping left to max_grad_norm",
    ),
    "a schedule without its argument": (
        lambda w: w.fit(schedule=lr_scheduler.StepLR),
        "makes a schedule.*step_size",
    ),
    "a schedule that needs a metric": (
        lambda w: w.fit(schedule=lr_scheduler.ReduceLROnPlateau),
        "makes a schedule.* ReduceLROnPlateau",
    ),
    "a schedule of no kind": (lambda w: w.fit(schedule=lambda o: 3), "makes a schedule.* int"),
    "an ELBO without a differentiable loss": (
        lambda w: w.fit(elbo=pyro.infer.RenyiELBO(num_particles=2)),
        "ELBO with a differentiable loss",
    ),
    "an ELBO's class": (
        lambda w: w.fit(elbo=pv.elbos.Trace_ELBO),
        "an estimator, as Trace_ELBO",
    ),
    "an ELBO by name": (lambda w: w.fit(elbo="elbo"), "ELBO with a differentiable loss"),
    "no particles": (lambda w: pv.elbos.Trace_ELBO(0), "num_particles to be an integer"),
    "a device that is not there": (lambda w: w.fit(device="cuda:99"), "a device out of .*cpu"),
    "a device of no kind": (lambda w: w.fit(device="gpu"), "a device out of .* 'gpu'"),
    "a device that computes nothing": (lambda w: w.fit(device="meta"), "a device out of"),
    "a transform of no kind": (lambda w: w.fit(transform=3), "transform to be a function; got 3"),
    "a transform that drops rows": (
        lambda w: w.fit(transform=lambda x: x[x.sum(1) > 2]),
        "a transform that keeps the 40 rows",
    ),
    "a transform that widens rows": (
        lambda w: w.fit(transform=lambda x: torch.cat([x, x], 1)),
        r"event shape \(6,\)",
    ),
    "a transform that returns nothing": (
        lambda w: w.fit(transform=lambda x: None),
        "got a NoneType",
    ),
    "a transform off the support": (
        lambda w: w.fit(transform=lambda x: x - 0.5),
        "support of Bernoulli",
    ),
    "levels that are no probabilities": (
        lambda w: w.fit(x=3 * w.x, transform=pv.datasets.binarize),
        r"grey levels in \[0, 1\]",
    ),
}

PROGRAMS: dict[str, Case] = {
    "no program": (lambda w: w.fit(42), "a program: an nn.Module.* int"),
    "a network": (lambda w: w.fit(linear(6, 2)), "a program: .* Linear"),
    "a VAE's class": (lambda w: w.fit(pv.VAE), "a program"),
    "no plate of rows": (lambda w: w.fit(Program("plate")), "one plate named 'data'.*'rows'"),
    "a guide of other sites": (
        lambda w: w.fit(Program("guide")),
        r"latent sites of the model, \['z'\]; got \['w'\]",
    ),
    "a parameter in the global store": (lambda w: w.fit(Program("param")), "every parameter"),
    "nothing to train": (
        lambda w: w.fit(make().requires_grad_(requires_grad=False)),
        "parameters to train",
    ),
    "a distribution as an event shape": (lambda w: make(event_shape=(0,)), "positive sizes"),
    "an encoder of the wrong size": (
        lambda w: make(encoder=linear(5, 4)),
        "the encoder to take rows of shape",
    ),
    "a decoder of the wrong size": (
        lambda w: make(decoder=linear(3, 4)),
        "the decoder to take rows of shape",
    ),
    "a decoder without Flatten": (
        lambda w: make(event_shape=(6, 6), decoder=nn.Sequential(nn.Unflatten(1, (2, 1)))),
        "nn.Flatten()",
    ),
    "an encoder of no rows": (
        lambda w: make(encoder=Returns(torch.ones(4))),
        "the encoder to map 2 rows",
    ),
    "a function as encoder": (lambda w: make(encoder=torch.relu), "encoder to be an nn.Module"),
    "a prior of batch shape": (
        lambda w: make(prior=dist.Normal(0.0, 1.0).expand([2])),
        r"batch shape \(\).*to_event\(1\)",
    ),
    "a prior over a number": (
        lambda w: make(prior=dist.Normal(0.0, 1.0)),
        r"expand\(\[1\]\).to_event\(1\)",
    ),
    "a prior without its shape": (lambda w: make(prior=dist.Normal), "a prior with its shape"),
    "a prior of no distribution": (lambda w: make(prior=Returns(3)), "return a distribution"),
    "a posterior off the prior's support": (
        lambda w: make(posterior=pv.posteriors.Family(dist.Exponential), prior=uniform_prior()),
        "support of the prior",
    ),
    "no total": (lambda w: LIKELIHOODS.Family(dist.Binomial), "total_count .*is missing"),
    "no rank": (lambda w: pv.posteriors.LowRankMultivariateNormal(), "either the rank"),
    "no number of categories": (
        lambda w: make(LIKELIHOODS.Family(dist.Categorical)),
        "size of logits",
    ),
    "a likelihood's parameter misspelt": (
        lambda w: LIKELIHOODS.Family(dist.Normal, locc=0.0),
        "perhaps 'loc'",
    ),
    "a link misspelt": (
        lambda w: make(LIKELIHOODS.Poisson(rate=Predicted(link="logg"))),
        "perhaps 'log'",
    ),
    "a word of no kind": (lambda w: LIKELIHOODS.Normal(scale=[1.0]), "Predicted"),
    "a start outside the support": (
        lambda w: make(LIKELIHOODS.Normal(scale=Shared(init=-1.0))),
        "inside its support",
    ),
    "a likelihood by name": (lambda w: make("Bernoulli"), "likelihood to be a member"),
    "a likelihood of a larger event": (
        lambda w: make(LIKELIHOODS.Family(dist.LKJCholesky, dim=3)),
        "",
    ),
    "units below 1": (lambda w: pv.networks.MLP(0), "positive numbers of hidden units"),
    "images that are none": (
        lambda w: make(decoder=pv.networks.Deconvolution(4)),
        "height, width",
    ),
}


def uniform_prior() -> dist.Distribution:
    return dist.Beta(2.0, 2.0).expand([2]).to_event(1)


QUERIES: dict[str, Case] = {
    "too few draws": (lambda w: pv.log_evidence(w.vae, w.x, 1), "num_samples .*got 1"),
    "half a draw": (lambda w: pv.log_evidence(w.vae, w.x, 10.5), "num_samples"),
    "evidence of other rows": (lambda w: pv.log_evidence(w.vae, ones(9, 5)), "event shape"),
    "evidence of NaN": (
        lambda w: pv.log_evidence(w.vae, w.with_value(np.nan)),
        "without NaN.* row 7",
    ),
    "evidence of no program": (lambda w: pv.log_evidence(linear(6, 2), w.x), "a program"),
    "a sample of none": (
        lambda w: w.vae.sample(0),
        "Expected num_rows to be an integer of at least 1",
    ),
    "a replicate of other rows": (lambda w: w.vae.reconstruct(ones(9, 5)), "event shape"),
    "an interval of 1": (lambda w: w.vae.reconstruct(w.x, prob=1.0), "0 < prob < 1"),
    "a tree of other rows": (lambda w: pv.to_arviz(w.vae, ones(9, 5)), "event shape"),
    "a comparison of one program": (lambda w: pv.compare(w.vae, w.x), "a dict of programs"),
    "a comparison of a mass and a density": (
        lambda w: pv.compare({"a": w.vae, "b": make(LIKELIHOODS.Normal())}, w.x),
        "",
    ),
    "a data set misspelt": (lambda w: load("digit"), "digits"),
    "a data set of no kind": (lambda w: load(w.folder / "table.xyz"), r"\.csv"),
}

FILES: dict[str, Case] = {
    "a program saved over another": (
        lambda w: pv.save(w.vae, w.folder / "vae"),
        "exists: choose another path",
    ),
    "a program saved over data": (
        lambda w: pv.save(w.vae, w.folder / "data", overwrite=True),
        "the folder of a saved program to replace",
    ),
    "a program saved over a file": (
        lambda w: pv.save(w.vae, w.folder / "run", overwrite=True),
        "a folder to replace; got the file",
    ),
    "no program saved": (lambda w: pv.save(3, w.folder / "new"), "a program, an nn.Module"),
    "no program to load into": (lambda w: pv.load(w.folder / "vae", into=3), "to load into"),
    "another program to load into": (
        lambda w: pv.load(w.folder / "vae", into=make(decoder=pv.networks.MLP(5))),
        "the program that .* holds",
    ),
    "a program on no device": (lambda w: pv.load(w.folder / "vae", device="gpu"), "a device"),
    "a file for a folder": (lambda w: pv.load(w.folder / "run"), "the folder of a saved program"),
    "another's folder": (lambda w: pv.load(w.folder / "data"), "a folder with spec.json"),
    "an altered program": (lambda w: pv.load(w.folder / "altered"), "an altered file"),
    "a truncated program": (lambda w: pv.load(w.folder / "cut"), "an altered file"),
    "a program without its weights": (lambda w: pv.load(w.folder / "lost"), "no such file"),
    "a program with a pickle in it": (lambda w: pv.load(w.folder / "pickled"), "an altered file"),
    "a checkpoint that is there": (
        lambda w: w.fit(checkpoint=w.folder / "run"),
        "run exists already. Go on from it with resume=True",
    ),
    "a checkpoint that is a folder": (
        lambda w: w.fit(checkpoint=w.folder / "vae", resume=True),
        "checkpoint to be a file; got the folder",
    ),
    "no checkpoint to resume": (
        lambda w: w.fit(resume=True),
        "To resume a fit, give the file",
    ),
    "a checkpoint of another fit": (
        lambda w: w.fit(checkpoint=w.folder / "run", resume=True, seed=3),
        "checkpoint belongs to another fit: seed was 0, now 3",
    ),
    "a checkpoint with a pickle in it": (
        lambda w: w.fit(checkpoint=w.folder / "torch", resume=True),
        "to be a safetensors file",
    ),
    "a checkpoint that is a pickle": (
        lambda w: w.fit(checkpoint=w.folder / "pickle", resume=True),
        "to be a safetensors file",
    ),
    "another's safetensors": (
        lambda w: w.fit(checkpoint=w.folder / "foreign", resume=True),
        "to be a file of pyro_vae",
    ),
    "an empty checkpoint": (
        lambda w: w.fit(checkpoint=w.folder / "empty", resume=True),
        "to be a safetensors file",
    ),
    "an altered checkpoint": (
        lambda w: w.fit(checkpoint=w.folder / "bent", resume=True),
        "an altered file",
    ),
    "a program for a checkpoint": (
        lambda w: w.fit(checkpoint=w.folder / "vae" / "weights.safetensors", resume=True),
        "to be a checkpoint; got program",
    ),
}

CASES = DATA | OPTIONS | PROGRAMS | QUERIES | FILES


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, sound and broken."""
    folder = tmp_path_factory.mktemp("files")
    vae = make()
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    World(vae, x, folder).fit(checkpoint=folder / "run", seed=0)
    for name in ("vae", "altered", "cut", "lost", "pickled"):
        pv.save(vae, folder / name)
    weights = (folder / "vae" / "weights.safetensors").read_bytes()
    (folder / "altered" / "weights.safetensors").write_bytes(weights[:-1] + b"\x07")
    (folder / "cut" / "weights.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "lost" / "weights.safetensors").unlink()
    torch.save(vae.state_dict(), folder / "pickled" / "weights.safetensors")
    (folder / "data").mkdir()
    (folder / "data" / "precious.csv").write_text("1")
    torch.save(vae.state_dict(), folder / "torch")
    (folder / "pickle").write_bytes(pickle.dumps({"epoch": 3}))
    save_file({"a": torch.ones(2)}, folder / "foreign")
    (folder / "empty").write_bytes(b"")
    run = (folder / "run").read_bytes()
    (folder / "bent").write_bytes(run[:-1] + bytes([run[-1] ^ 1]))
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(name: str, prepared: Path, tmp_path: Path) -> None:
    call, said = CASES[name]
    folder = tmp_path / "files"
    shutil.copytree(prepared, folder)
    vae = make()
    x = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    world, files = World(vae, x, folder), content(folder)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    modes, generator = [m.training for m in vae.modules()], torch.get_rng_state()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(world)
    message = str(caught.value)
    assert message[0].isupper(), message
    assert re.search(said, message), message
    assert message.count("Expected ") == message.startswith("Expected "), message
    assert [k for k, v in vae.state_dict().items() if not torch.equal(v, before[k])] == []
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert [m.training for m in vae.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert content(folder) == files


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"^Expected a device out of \['cpu'\]; got 'cuda'"):
        pv.fit(make(), torch.ones(4, 6), device="cuda")


def test_a_programs_own_check_that_is_no_method_is_left_alone() -> None:
    program = Program()
    program.check = True
    assert len(pv.fit(program, torch.ones(9, 2), max_epochs=1, device="cpu", progress=False)) == 1
