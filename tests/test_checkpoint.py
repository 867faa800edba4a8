"""Programs and fits on disk: whole or not there, resumed bit for bit, and no code run."""

import errno
import functools
import importlib
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from small_vae import GREY, PLAIN, X, assert_same, small, weights
from torch import Tensor, nn
from torch.optim import lr_scheduler

import pyro_vae as pv
from pyro_vae import Predicted, Shared
from pyro_vae.data import files
from pyro_vae.data.files import read_json, read_tensors, write_json, write_tensors
from pyro_vae.programs.saving import _digest

checkpoint = importlib.import_module("pyro_vae.programs.saving")


def table(history: pv.History) -> dict[str, list[float]]:
    return history.table.drop(columns="seconds").fillna(0.0).to_dict("list")


# A fit broken and resumed


class BrokenError(Exception):
    pass


class Breaking:
    """A transform that raises at a minibatch, once."""

    def __init__(self, at: int = 0) -> None:
        self.left = at

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 16:
            self.left -= 1
            if self.left == 0:
                raise BrokenError
        return torch.bernoulli(x)


def fit(program: nn.Module, path: Path | None, at: int = 0, **options: Any) -> pv.History:
    asked = PLAIN | {
        "averaged": True,
        "batch_size": 16,
        "max_epochs": 6,
        "seed": 0,
        "lr": 0.02,
        "transform": Breaking(at),
        "device": "cpu",
        "progress": False,
        "checkpoint": path,
    }
    return pv.fit(program, options.pop("x", GREY), **asked | options)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.8**epoch),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.MultiStepLR(o, [1, 2])], [3]
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no seed": {"seed": None, "validation": 0.2},
    "validation": {"validation": 0.2, "lr": 0.3, "warmup": 1},
    "rows to validate on": {"validation": GREY[:10]},
    "warm-up": {"warmup": 5, "validation": 0.2},
    "clipping": {"max_grad_norm": 0.1},
    "particles": {"elbo": lambda: pv.elbos.Trace_ELBO(num_particles=3)},
    "Pyro's particles": {
        "elbo": lambda: pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True)
    },
    "SGD": {"optimizer": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)},
    "RMSprop": {"optimizer": torch.optim.RMSprop},
    "NAdam": {"optimizer": torch.optim.NAdam},
    "amsgrad": {"optimizer": functools.partial(torch.optim.AdamW, amsgrad=True, foreach=True)},
    "ClippedAdam": {"optimizer": pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.98})},
    **{f"schedule, {name}": {"schedule": make} for name, make in SCHEDULES.items()},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_broken_fit_ends_bit_equal(name: str, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        made = dict(SETTINGS[name])
        return made | {"elbo": made["elbo"]()} if "elbo" in made else made

    torch.manual_seed(3)
    whole, broken = small(), small()
    history = fit(whole, tmp_path / "whole", **options())
    torch.manual_seed(3)
    with pytest.raises(BrokenError):
        fit(broken, tmp_path / "broken", at=11, **options())
    resumed = small(seed=9)
    torch.randn(5)
    after = fit(resumed, tmp_path / "broken", resume=True, **options())
    assert_same(weights(resumed), weights(whole))
    assert table(after) == table(history)
    assert (after.best_epoch, after.stopped) == (history.best_epoch, history.stopped)
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "broken")


def assert_same_checkpoints(one: Path, other: Path) -> None:
    (tensors, said), (others, heard) = read_tensors(one), read_tensors(other)
    for header in (said, heard):
        for record in header["records"]:
            del record["seconds"]
    assert_same(tensors, others)
    assert said == heard


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_and_dtype_are_resumed(dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return small(encoder=nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))).to(dtype)

    whole, broken, resumed = make(), make(), make()
    broken.load_state_dict(whole.state_dict())
    fit(whole, None)
    with pytest.raises(BrokenError):
        fit(broken, tmp_path / "run", at=14)
    fit(resumed, tmp_path / "run", resume=True)
    assert_same(weights(resumed), weights(whole))


def test_broken_before_the_first_epoch_ended(tmp_path: Path) -> None:
    whole, broken = small(), small()
    fit(whole, None)
    with pytest.raises(BrokenError):
        fit(broken, tmp_path / "run", at=3)
    resumed = small(seed=5)
    fit(resumed, tmp_path / "run", resume=True)
    assert_same(weights(resumed), weights(whole))


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    options = {"validation": 0.2, "lr": 0.3}
    vae, again = small(), small(seed=7)
    history = fit(vae, tmp_path / "run", **options)
    before = (tmp_path / "run").read_bytes()
    after = fit(again, tmp_path / "run", at=1, resume=True, **options)
    assert after.table.equals(history.table)
    assert_same(weights(again), weights(vae))
    assert (tmp_path / "run").read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"validation": 0.2, "warmup": 3, "lr": 0.3}])
def test_a_longer_run_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    whole, part = small(), small()
    history = fit(whole, None, **options)
    fit(part, tmp_path / "run", max_epochs=3, **options)
    after = fit(part, tmp_path / "run", resume=True, **options)
    assert_same(weights(part), weights(whole))
    assert table(after) == table(history)
    assert after.best_epoch == history.best_epoch


def test_a_verdict_is_kept(tmp_path: Path) -> None:
    options = {"validation": 0.2, "lr": 0.1, "max_epochs": 3000, "until_converged": True}
    vae, again = small(), small()
    history = fit(vae, tmp_path / "run", **options)
    assert history.converged
    after = fit(again, tmp_path / "run", resume=True, **options)
    assert (len(after), after.reason) == (len(history), history.reason)


def test_the_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    fit(small(), tmp_path / "run", max_epochs=1)
    fit(small(), tmp_path / "run", max_epochs=2, resume=True)
    pv.load(pv.save(small(prior=pv.priors.Mixture(3, 2), seed=0), tmp_path / "vae"))
    torch.set_rng_state(before)
    pv.load(tmp_path / "vae")
    assert torch.equal(torch.get_rng_state(), before)


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.03},
    "batch_size": {"batch_size": 10},
    "warmup": {"warmup": 2},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "seed": {"seed": 1},
    "rows": {"x": GREY + 0.0001 * (GREY < 0.5)},
    "validation": {"validation": 0.3},
    "transform": {"transform": torch.round},
    "elbo": {"elbo": pv.elbos.Trace_ELBO(num_particles=2)},
    "optimizer": {"optimizer": functools.partial(torch.optim.Adam, betas=(0.8, 0.99))},
    "schedule": {"schedule": lambda o: lr_scheduler.StepLR(o, 3)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    fit(small(), tmp_path / "run", max_epochs=1, schedule=lambda o: lr_scheduler.StepLR(o, 2))
    vae, before = small(seed=4), (tmp_path / "run").read_bytes()
    start = weights(vae)
    options = {"schedule": lambda o: lr_scheduler.StepLR(o, 2), **CHANGES[name]}
    with pytest.raises(
        ValueError, match=rf"^This checkpoint belongs to another fit: .*{name} was .*, now "
    ):
        fit(vae, tmp_path / "run", resume=True, **options)
    assert_same(weights(vae), start)
    assert (tmp_path / "run").read_bytes() == before


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "other sizes": lambda: small(decoder=pv.networks.MLP(9)),
    "other names": lambda: small(decoder=pv.networks.MLP(8, 8)),
    "another dtype": lambda: small().double(),
    "frozen": lambda: small().requires_grad_(requires_grad=False),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_another_program_is_refused_and_keeps_its_weights(name: str, tmp_path: Path) -> None:
    fit(small(), tmp_path / "run", max_epochs=1)
    program = PROGRAMS[name]()
    before = weights(program)
    with pytest.raises(
        ValueError, match="Expected the program|checkpoint belongs|parameters to train"
    ):
        fit(program, tmp_path / "run", resume=True)
    assert_same(weights(program), before)


def test_the_checkpoint_outlives_a_bad_batch(tmp_path: Path) -> None:
    class Spoiling(Breaking):
        def __call__(self, x: Tensor) -> Tensor:
            try:
                return super().__call__(x)
            except BrokenError:
                self.left = 1
                return x * torch.nan

    Spoiling.__name__ = "Breaking"
    whole, vae = small(), small()
    fit(whole, None)
    halved = pytest.warns(UserWarning, match="epoch 3, batch 2 of 4 .* rate was halved")
    with halved, pytest.raises(FloatingPointError, match="epoch 3, batch") as caught:
        fit(vae, tmp_path / "run", transform=Spoiling(8))
    assert len(caught.value.history) == 2
    assert len(read_tensors(tmp_path / "run")[1]["records"]) == 2
    fit(vae, tmp_path / "run", resume=True)
    assert_same(weights(vae), weights(whole))


# Programs saved and loaded

MEMBERS: dict[str, Callable[[], pv.VAE]] = {
    "defaults": lambda: pv.VAE((6,), 2, pv.likelihoods.Bernoulli()),
    "a bare class": lambda: small(likelihood=dist.Gumbel, posterior=dist.Laplace),
    "words": lambda: small(
        likelihood=pv.likelihoods.Family(
            dist.StudentT,
            df=4.1,
            loc=Predicted(link="softplus"),
            scale=Shared(init=0.3, scalar=True),
        )
    ),
    "a tensor": lambda: small(
        likelihood=pv.likelihoods.Binomial(total_count=torch.tensor([1, 2, 3, 4, 5, 6]))
    ),
    "a shared start": lambda: small(
        likelihood=pv.likelihoods.Normal(scale=Shared(init=torch.linspace(0.1, 0.7, 6)))
    ),
    "a mixture": lambda: small(prior=pv.priors.Mixture(3, 2)),
    "a mixture of a family": lambda: small(
        prior=pv.priors.Mixture(3, 2, pv.Family(dist.Laplace, loc=Shared(), scale=0.5))
    ),
    "pseudo-inputs": lambda: small(prior=pv.priors.VampPrior(4, 2, data=X)),
    "a distribution": lambda: small(prior=dist.StudentT(4.1, 0.0, torch.ones(2)).to_event(1)),
    "another support": lambda: small(prior=dist.Gamma(2.0, 1.0).expand([2]).to_event(1)),
    "full covariance": lambda: small(posterior=pv.posteriors.MultivariateNormal()),
    "low rank": lambda: small(posterior=pv.posteriors.LowRankMultivariateNormal(1)),
    "a point": lambda: small(posterior=pv.posteriors.Delta()),
    "codes": lambda: small(likelihood=pv.likelihoods.Categorical(3)),
    "linear": lambda: small(encoder=nn.Identity(), decoder=nn.Identity()),
    "an activation": lambda: small(encoder=pv.networks.MLP(8, 4, activation=nn.Tanh)),
    "images": lambda: pv.VAE(
        (1, 8, 8),
        2,
        pv.likelihoods.Bernoulli(),
        encoder=pv.networks.Convolution(4, 8),
        decoder=pv.networks.Deconvolution(8, 4),
    ),
    "float64": lambda: small(prior=pv.priors.Mixture(3, 2)).double(),
    "evaluating": lambda: small().eval(),
}


def assert_same_program(one: pv.VAE, other: pv.VAE) -> None:
    assert_same(weights(one), weights(other))
    assert repr(one) == repr(other)
    assert one.training is other.training
    assert torch.equal(one.sample(5, seed=0), other.sample(5, seed=0))
    x = one.sample(4, seed=1)
    assert torch.equal(
        pv.elbos.Trace_ELBO().per_row(one, x, seed=0).value,
        pv.elbos.Trace_ELBO().per_row(other, x, seed=0).value,
    )


@pytest.mark.parametrize("name", MEMBERS)
def test_members_come_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    vae = MEMBERS[name]()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    path = pv.save(vae, tmp_path / "deep" / "vae")
    loaded = pv.load(path)
    assert isinstance(loaded, pv.VAE)
    assert_same_program(loaded, vae)
    assert_same_program(pv.load(pv.save(loaded, tmp_path / "again")), vae)
    assert sorted(p.name for p in path.iterdir()) == ["spec.json", "weights.safetensors"]


def test_the_spec_is_readable(tmp_path: Path) -> None:
    spec = read_json(pv.save(small().double(), tmp_path / "vae") / "spec.json")
    assert spec["dtype"] == "float64"
    assert spec["versions"].keys() >= {"python", "torch", "pyro", "pyro_vae"}
    assert spec["sha256"].keys() == {"spec.json", "weights.safetensors"}
    assert members(spec)["likelihood"]["member"] == "likelihoods.Bernoulli"


class Own(nn.Module):
    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))
        self.shift = nn.Linear(size, 1)

    def model(self, x: Tensor) -> None: ...

    def guide(self, x: Tensor) -> None: ...


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "a program": Own,
    "a network": lambda: small(encoder=nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))),
    "a link": lambda: small(
        likelihood=pv.likelihoods.Normal(scale=Shared(link=dist.transforms.ExpTransform()))
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_loaded_into_a_program(name: str, tmp_path: Path) -> None:
    program, other = FOREIGN[name](), FOREIGN[name]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1.0
    path = pv.save(program, tmp_path / "program")
    with pytest.raises(ValueError, match=r"^Expected .*call pyro_vae.load\(path, into=program\)"):
        pv.load(path)
    assert pv.load(path, into=other) is other
    assert_same(weights(other), weights(program))


@pytest.mark.parametrize("into", [Own(3), small(), Own().double()], ids=["size", "kind", "dtype"])
def test_another_program_to_load_into_keeps_its_weights(into: nn.Module, tmp_path: Path) -> None:
    before = weights(into)
    with pytest.raises(ValueError, match="^Expected the program that .* got another"):
        pv.load(pv.save(Own(), tmp_path / "own"), into=into)
    assert_same(weights(into), before)


# Files that are not as they were


def members(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["parts"]["members"]["program"]["kwargs"]


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Changes a specification as one who knows how it is signed."""
    spec = read_json(folder / "spec.json")
    change(spec)
    spec["sha256"].pop("spec.json")
    if sign:
        for name in spec["sha256"]:
            spec["sha256"][name] = files.sha256(folder / name)
    spec["sha256"]["spec.json"] = _digest(spec) if sign else 64 * "0"
    write_json(folder / "spec.json", spec)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def pickled(file: Path) -> None:
    torch.save({"weight": torch.ones(2)}, file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda f: flip(f / "weights.safetensors", -5),
    "a bit of the header": lambda f: flip(f / "weights.safetensors", 20),
    "cut weights": lambda f: cut(f / "weights.safetensors"),
    "empty weights": lambda f: (f / "weights.safetensors").write_bytes(b""),
    "no weights": lambda f: (f / "weights.safetensors").unlink(),
    "no spec": lambda f: (f / "spec.json").unlink(),
    "cut spec": lambda f: cut(f / "spec.json"),
    "binary spec": lambda f: (f / "spec.json").write_bytes(b"\xff\x00"),
    "a list for a spec": lambda f: (f / "spec.json").write_text("[]"),
    "deep spec": lambda f: (f / "spec.json").write_text("[" * 100_000),
    "another's spec": lambda f: (f / "spec.json").write_text('{"a": 1}'),
    "edited spec": lambda f: edit(f, lambda s: s.update(training=False), sign=False),
    "a newer format": lambda f: edit(f, lambda s: s.update(format="pyro_vae 9")),
    "an unknown entry": lambda f: edit(f, lambda s: s.update(callback="os.system")),
    "an unknown part": lambda f: edit(f, lambda s: s["parts"].update(later={"version": 1})),
    "units of another form": lambda f: edit(
        f, lambda s: s["parts"].update(units={"version": 1, "form": "exp x"})
    ),
    "a part of another version": lambda f: edit(
        f, lambda s: s["parts"]["members"].update(version=2)
    ),
    "another dtype": lambda f: edit(f, lambda s: s.update(dtype="int64")),
    "no record of the weights": lambda f: edit(
        f, lambda s: s["sha256"].pop("weights.safetensors")
    ),
    "a record outside": lambda f: edit_record(f, "../../../../etc/passwd"),
    "an absolute record": lambda f: edit_record(f, "/etc/passwd"),
    "a pickle": lambda f: (pickled(f / "weights.safetensors"), edit(f, lambda s: None)),
    "another's weights": lambda f: (
        save_file({"a": torch.ones(2)}, f / "weights.safetensors"),
        edit(f, lambda s: None),
    ),
    "other weights": lambda f: (
        write_tensors(f / "weights.safetensors", {"program.a": torch.ones(2)}, {}),
        edit(f, lambda s: None),
    ),
}


def edit_record(folder: Path, name: str) -> None:
    edit(folder, lambda s: None)
    spec = read_json(folder / "spec.json")
    spec["sha256"].pop("spec.json")
    spec["sha256"][name] = 64 * "0"
    spec["sha256"]["spec.json"] = _digest(spec)
    write_json(folder / "spec.json", spec)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = pv.save(small(), tmp_path / "vae")
    DAMAGES[name](folder)
    with pytest.raises(ValueError, match="^Expected |has the format|does not know"):
        pv.load(folder)
    with pytest.raises(ValueError, match="^Expected |has the format|does not know"):
        pv.load(folder, into=small())


NAMES: list[Any] = [
    {"member": "os.system", "kwargs": {"command": "true"}},
    {"member": "subprocess.Popen"},
    {"member": "builtins.eval"},
    {"member": "networks.nn"},
    {"member": "networks.math"},
    {"member": "networks.Any"},
    {"member": "networks.Network"},
    {"member": "networks.MLP.forward"},
    {"member": "priors.checked_shape"},
    {"member": "families.dist"},
    {"member": "likelihoods.bernoulli"},
    {"member": ["VAE"]},
    {"member": {"a": 1}},
    {"member": None},
    {"parameter": "eval"},
    {"parameter": ["Shared"]},
    {"distribution": "os"},
    {"distribution": ["Normal"]},
    {"distribution": "Normal", "kwargs": {}},
    {"activation": "functional"},
    {"activation": "Parameter"},
    {"tensor": "nothing"},
    {"tensor": ["nothing"]},
    {"foreign": "os.system"},
    {"member": "likelihoods.Family", "args": "Normal"},
    {"member": "likelihoods.Family", "kwargs": ["Normal"]},
    {"member": "likelihoods.Family", "args": [1]},
    {"member": "likelihoods.Bernoulli", "kwargs": {"logits": {"parameter": "Shared"}, "a": 1}},
    {"member": "likelihoods.Bernoulli", "call": "os.system"},
    {"member": "networks.MLP", "args": ["a"]},
    {"member": "priors.StandardNormal", "kwargs": {"event_shape": {"a": 1}}},
    {},
    "likelihoods.Bernoulli",
    17,
]


@pytest.mark.parametrize("entry", NAMES, ids=json.dumps)
def test_a_spec_can_name_nothing_else(
    entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("run for a file")

    folder = pv.save(small(), tmp_path / "vae")
    edit(folder, lambda s: members(s).update(likelihood=entry))
    for place in ("os.system", "subprocess.Popen", "builtins.eval", "importlib.import_module"):
        monkeypatch.setattr(place, refuse)
    modules, generator = set(sys.modules), torch.get_rng_state()
    with pytest.raises(ValueError, match="^Expected "):
        pv.load(folder)
    assert set(sys.modules) == modules
    assert torch.equal(torch.get_rng_state(), generator)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    for name, write in (("torch", torch.save), ("plain", dump)):
        write({"a": Payload(tmp_path / "run")}, tmp_path / name)
        with pytest.raises(ValueError, match="^Expected .* to be a safetensors file"):
            fit(small(), tmp_path / name, resume=True)
        with pytest.raises(ValueError, match="^Expected the folder of a saved program"):
            pv.load(tmp_path / name)
    assert not (tmp_path / "run").exists()


def dump(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("damage", [cut, functools.partial(flip, at=-3), pickled])
def test_a_damaged_checkpoint_is_refused(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    vae = small()
    fit(vae, tmp_path / "run", max_epochs=1)
    before = weights(vae)
    damage(tmp_path / "run")
    with pytest.raises(ValueError, match="^Expected "):
        fit(vae, tmp_path / "run", resume=True)
    assert_same(weights(vae), before)


def test_a_program_is_no_checkpoint(tmp_path: Path) -> None:
    folder = pv.save(small(), tmp_path / "vae")
    with pytest.raises(ValueError, match="^Expected .* to be a checkpoint; got program"):
        fit(small(), folder / "weights.safetensors", resume=True)


@pytest.mark.parametrize("number", [None, 0, 2, "3"])
def test_a_checkpoint_of_another_format_is_refused(number: Any, tmp_path: Path) -> None:
    vae = small()
    fit(vae, tmp_path / "run", max_epochs=1)
    tensors, header = read_tensors(tmp_path / "run")
    assert header["format"] == 3
    del header["format"]
    write_tensors(
        tmp_path / "run", tensors, header | ({} if number is None else {"format": number})
    )
    before = weights(vae)
    with pytest.raises(ValueError, match=rf"has format {number or 0}, and .* reads format 3 only"):
        fit(vae, tmp_path / "run", resume=True)
    assert_same(weights(vae), before)


# What is there already


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    one, other = small(0), small(1)
    path = pv.save(one, tmp_path / "vae")
    with pytest.raises(ValueError, match="^The folder .* exists: choose another path"):
        pv.save(other, path)
    assert_same_program(pv.load(path), one)
    pv.save(other, path, overwrite=True)
    assert_same_program(pv.load(path), other)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_only_a_saved_program_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.csv").write_text("1")
    (tmp_path / "file").write_text("1")
    for name in ("data", "file"):
        with pytest.raises(ValueError, match="^Expected .*folder"):
            pv.save(small(), tmp_path / name, overwrite=True)
    assert (tmp_path / "data" / "precious.csv").read_text() == "1"
    assert (tmp_path / "file").read_text() == "1"


def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    left = [at]

    def fail(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "it broke")
        return real(*args, **kwargs)

    return fail


FAILURES = {
    "writing the weights": (Path, "write_bytes", 1),
    "writing the spec": (Path, "write_text", 1),
    "moving a file": (os, "replace", 2),
    "moving the old one": (os, "rename", 1),
    "moving the new one": (os, "rename", 2),
    "reaching the disk": (os, "fsync", 1),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_old_is_kept_until_the_new_is_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = small(0)
    path = pv.save(one, tmp_path / "vae")
    place, what, at = FAILURES[name]
    with monkeypatch.context() as patch:
        patch.setattr(place, what, failing(getattr(place, what), at))
        with pytest.raises(OSError, match="it broke"):
            pv.save(small(1), path, overwrite=True)
    assert_same_program(pv.load(path), one)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


# What the system refuses


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Lets no file grow beyond a size: the system refuses, as when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_passes_and_leaves_nothing(tmp_path: Path) -> None:
    vae = small()
    before = weights(vae)
    with small_disk(1000), pytest.raises(OSError) as caught:  # noqa: PT011
        pv.save(vae, tmp_path / "vae")
    assert caught.value.errno == errno.EFBIG
    with small_disk(1000), pytest.raises(OSError) as caught:  # noqa: PT011
        fit(vae, tmp_path / "run")
    assert caught.value.errno == errno.EFBIG
    assert_same(weights(vae), before)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, vae = small(), small()
    fit(whole, None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(Path.write_bytes, 4))
        with pytest.raises(OSError, match="it broke"):
            fit(vae, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert len(fit(vae, tmp_path / "run", resume=True)) == 6
    assert_same(weights(vae), weights(whole))


def test_a_path_below_a_plain_file_passes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    vae = small()
    before = weights(vae)
    for path in (tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run"):
        for call in (
            functools.partial(pv.save, vae, path),
            functools.partial(pv.load, path),
            functools.partial(fit, vae, path),
        ):
            with pytest.raises((NotADirectoryError, FileExistsError)):
                call()
    assert_same(weights(vae), before)
    with pytest.raises(FileNotFoundError):
        pv.load(tmp_path / "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_passes(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        pv.save(small(), tmp_path / "locked" / "vae")
    with pytest.raises(PermissionError):
        fit(small(), tmp_path / "locked" / "run")


@pytest.mark.parametrize("depth", [300, 450, 900])
def test_a_spec_of_many_levels_is_refused(depth: int, tmp_path: Path) -> None:
    def nested() -> Any:
        return functools.reduce(lambda inner, _: [inner], range(depth), [])

    folder = pv.save(small(), tmp_path / "vae")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        edit(
            folder,
            lambda s: members(s).update(likelihood=nested()),
        )
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(ValueError, match="^Expected "):
        pv.load(folder)
