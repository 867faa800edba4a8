"""Files of other models, of other writers and of other hands: refused, and nothing is lost."""

import functools
import gzip
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from small_vae import PLAIN, assert_same, small, weights
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.files import locked, new_file, new_folder, standing

BENCHMARKS = Path(__file__).with_name("benchmarks")
X = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) + 0.1


def fit(vae: nn.Module, path: Path, **options: Any) -> pv.History:
    asked = PLAIN | {"max_epochs": 1, "seed": 0, "device": "cpu", "progress": False}
    return pv.fit(vae, X, checkpoint=path, **asked | options)


def made(seed: int = 0, **members: Any) -> pv.VAE:
    return small(seed, **{"likelihood": pv.likelihoods.Normal()} | members)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *layers)


class Squashed(nn.Module):
    """A network of a user, with an option that has no weight."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power, self.inner = power, nn.Linear(6, 8)

    def extra_repr(self) -> str:
        return f"power={self.power}"

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).abs() ** self.power


class Other(Squashed):
    pass


Make = Callable[[], pv.VAE]
MODELS: dict[str, tuple[Make, Make, str]] = {
    "likelihood": (
        lambda: made(likelihood=pv.likelihoods.Normal()),
        lambda: made(likelihood=pv.likelihoods.Laplace()),
        "program.likelihood was likelihoods.Normal, now likelihoods.Laplace",
    ),
    "degrees of freedom": (
        lambda: made(likelihood=pv.likelihoods.StudentT(df=3.0)),
        lambda: made(likelihood=pv.likelihoods.StudentT(df=4.0)),
        "program.likelihood.df was 3.0, now 4.0",
    ),
    "degrees of freedom by column": (
        lambda: made(likelihood=pv.likelihoods.StudentT(df=torch.arange(2.0, 8.0))),
        lambda: made(likelihood=pv.likelihoods.StudentT(df=torch.arange(3.0, 9.0))),
        "program.likelihood.df.tensor was ",
    ),
    "family": (
        lambda: made(likelihood=dist.Gumbel),
        lambda: made(likelihood=dist.Laplace),
        "program.likelihood[0].distribution was Gumbel, now Laplace",
    ),
    "link": (
        lambda: made(likelihood=pv.likelihoods.Normal(scale=pv.Predicted(link="softplus"))),
        lambda: made(likelihood=pv.likelihoods.Normal(scale=pv.Predicted(link="log"))),
        "program.likelihood.scale.link was softplus, now log",
    ),
    "prior": (
        lambda: made(prior=dist.StudentT(4.0, 0.0, torch.ones(2)).to_event(1)),
        lambda: made(prior=dist.StudentT(5.0, 0.0, torch.ones(2)).to_event(1)),
        "program[1].df.tensor was ",
    ),
    "component": (
        lambda: made(prior=pv.priors.Mixture(3, 2)),
        lambda: made(
            prior=pv.priors.Mixture(
                3, 2, pv.Family(dist.Laplace, loc=pv.Shared(), scale=pv.Shared(init=1.0))
            )
        ),
        "program[1].component[0].distribution was Normal, now Laplace",
    ),
    "posterior": (
        lambda: made(posterior=pv.posteriors.Normal()),
        lambda: made(posterior=dist.Laplace),
        "program.posterior was posteriors.Normal, now posteriors.Family",
    ),
    "activation": (
        lambda: made(encoder=pv.networks.MLP(8, activation=nn.SiLU)),
        lambda: made(encoder=pv.networks.MLP(8, activation=nn.ReLU)),
        "program.encoder.activation.activation was SiLU, now ReLU",
    ),
    "activation in a network of torch": (
        lambda: made(encoder=network(nn.ReLU())),
        lambda: made(encoder=network(nn.SiLU())),
        "program.encoder.1 was .*ReLU, now .*SiLU",
    ),
    "dropout rate": (
        lambda: made(encoder=network(nn.Dropout(0.1))),
        lambda: made(encoder=network(nn.Dropout(0.2))),
        "program.encoder.1 was p=0.1, inplace=False, now p=0.2, inplace=False",
    ),
    "a layer more": (
        lambda: made(encoder=network(nn.ReLU())),
        lambda: made(encoder=network(nn.ReLU(), nn.ReLU())),
        "program.encoder.2 was None, now ",
    ),
    "option of one's own": (
        lambda: made(encoder=Squashed(1.0)),
        lambda: made(encoder=Squashed(0.5)),
        "program.encoder was power=1.0, now power=0.5",
    ),
    "class of one's own": (
        lambda: made(encoder=Squashed(1.0)),
        lambda: made(encoder=Other(1.0)),
        "program.encoder was .*Squashed, now .*Other",
    ),
}


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x / by


TRANSFORMS: dict[str, tuple[Any, Any]] = {
    "name": (torch.round, torch.floor),
    "code": (lambda x: x / 2.0, lambda x: x / 3.0),
    "arguments": (
        functools.partial(torch.clamp, max=0.9),
        functools.partial(torch.clamp, max=0.8),
    ),
    "none": (None, torch.round),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_another_model_of_the_same_shapes_is_refused(name: str, tmp_path: Path) -> None:
    one, other, text = MODELS[name]
    said = re.escape(text).replace(r"\.\*", ".*")
    saved, fitted = pv.save(one(), tmp_path / "saved"), tmp_path / "fitted"
    fit(one(), fitted, max_epochs=1)
    wrong = other()
    assert weights(one()).keys() == weights(wrong).keys()
    before, content = weights(wrong), fitted.read_bytes()
    with pytest.raises(ValueError, match=f"^Expected the program that .* got another: {said}"):
        pv.load(saved, into=wrong)
    with pytest.raises(ValueError, match=f"^This checkpoint belongs to another fit: {said}"):
        fit(wrong, fitted, max_epochs=2, resume=True)
    assert_same(weights(wrong), before)
    assert fitted.read_bytes() == content
    pv.load(saved, into=one())
    assert len(fit(one(), fitted, max_epochs=2, resume=True)) == 2
    trained = one()
    fit(trained, fitted, max_epochs=3, resume=True)
    pv.load(saved, into=trained)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_another_transform_is_refused(name: str, tmp_path: Path) -> None:
    one, other = TRANSFORMS[name]
    fit(made(), tmp_path / "run", transform=one)
    with pytest.raises(ValueError, match=r"belongs to another fit: .*transform.* was .*, now "):
        fit(made(), tmp_path / "run", transform=other, max_epochs=2, resume=True)
    assert len(fit(made(), tmp_path / "run", transform=one, max_epochs=2, resume=True)) == 2


def test_what_a_transform_refers_to_is_not_compared(tmp_path: Path) -> None:
    fit(made(), tmp_path / "run", transform=scaled(2.0))
    assert fit(made(), tmp_path / "run", transform=scaled(3.0), max_epochs=2, resume=True)


def test_other_versions_may_use_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = pv.save(made(encoder=network(nn.Dropout(0.1))), tmp_path / "saved")
    monkeypatch.setattr(torch.nn.Dropout, "extra_repr", lambda self: f"rate={self.p}")
    monkeypatch.setattr("platform.python_version", lambda: "3.99")
    with pytest.warns(UserWarning, match=r"was p=0.1.* Other versions wrote the file"):
        pv.load(saved, into=made(encoder=network(nn.Dropout(0.1))))


# Writers of one name


def test_a_second_fit_on_a_checkpoint_is_refused(tmp_path: Path) -> None:
    seen = []

    def second(record: object) -> None:
        with pytest.raises(ValueError, match="^Another process or thread is writing") as caught:
            fit(made(), tmp_path / "run", resume=True)
        seen.append(caught)

    fit(made(), tmp_path / "run", max_epochs=2, callbacks=[second])
    assert len(seen) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_that_another_fit_wrote_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pv.training.loop.Loop.__init__

    def late(*args: Any) -> None:
        whole(*args)
        with monkeypatch.context() as patch:
            patch.setattr(pv.training.loop.Loop, "__init__", whole)
            fit(made(), tmp_path / "run")

    monkeypatch.setattr(pv.training.loop.Loop, "__init__", late)
    with pytest.raises(ValueError, match="^Another fit has written the checkpoint"):
        fit(made(seed=3), tmp_path / "run")
    monkeypatch.undo()
    assert len(fit(made(), tmp_path / "run", max_epochs=2, resume=True)) == 2


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Another thread that writes a name."""
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(path):
            begun.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_writer_waits_for_another_one(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locked, "__kwdefaults__", {"wait": 0.01})
    inner = locked.__wrapped__
    monkeypatch.setattr(inner, "__kwdefaults__", {"wait": 0.01})
    with writing(tmp_path / "name"):
        with pytest.raises(ValueError, match="^Another process or thread is writing"):
            make(tmp_path / "name").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_other_names_are_kept(tmp_path: Path) -> None:
    ours = [".run.0123abcd.partial", ".run.lock"]
    others = [".run.partial", ".running.0123abcd.partial", ".a.run.0123abcd.partial", "run.txt"]
    for name in ours + others:
        (tmp_path / name).write_text("1")
    fit(made(), tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "run"])


def test_a_folder_between_two_renames_is_found(tmp_path: Path) -> None:
    vae = made()
    path = pv.save(vae, tmp_path / "vae")
    os.rename(path, tmp_path / ".vae.replaced")
    (tmp_path / ".vae.01234567.partial").mkdir()
    assert standing(path).name == ".vae.replaced"
    assert_same(weights(pv.load(path)), weights(vae))
    with pytest.raises(ValueError, match="exists"):
        pv.save(made(1), path)
    pv.save(made(1), path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_a_folder_is_read_whole_while_it_is_replaced(tmp_path: Path) -> None:
    both = [made(0), made(1)]
    path, ended = pv.save(both[0], tmp_path / "vae"), threading.Event()

    def replace() -> None:
        for i in range(30):
            pv.save(both[i % 2], path, overwrite=True)
        ended.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not ended.is_set():
        loaded = weights(pv.load(path))
        assert any(torch.equal(loaded[k], weights(m)[k]) for m in both for k in list(loaded)[:1])
    thread.join()


# Files of other hands


def test_a_device_is_not_read(tmp_path: Path) -> None:
    folder = pv.save(made(), tmp_path / "vae")
    os.mkfifo(tmp_path / "pipe")
    for target in (Path("/dev/zero"), tmp_path / "pipe"):
        for name in ("spec.json", "weights.safetensors"):
            copied = tmp_path / f"{target.name}-{name}"
            copied.mkdir()
            for file in folder.iterdir():
                (copied / file.name).write_bytes(file.read_bytes())
            (copied / name).unlink()
            (copied / name).symlink_to(target)
            with pytest.raises(ValueError, match=r"^Expected "):
                pv.load(copied)
        for ending in ("csv", "csv.gz", "npy", "npz", "parquet"):
            (tmp_path / f"{target.name}.{ending}").symlink_to(target)
            with pytest.raises(ValueError, match="^Expected .* a device, a pipe or a socket"):
                pv.datasets.load(tmp_path / f"{target.name}.{ending}")


def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    import resource

    idx = b"\0\0\x08\x03" + np.array([2, 2, 2], ">u4").tobytes()
    with gzip.open(tmp_path / "x-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write(idx + bytes(2**20))
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**30, 3)}
    with (tmp_path / "x.npy").open("wb") as array:
        np.lib.format.write_array_header_1_0(array, header)
        array.write(bytes(100))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("x-idx3-ubyte.gz", "x.npy"):
        with pytest.raises(ValueError, match="^Expected "):
            pv.datasets.load(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def script(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *options],
        env=os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_forty_times_written_by_three_and_on_small_disks() -> None:
    printed = script("kills", "--kills", "40", "--rounds", "1")
    assert printed.count("all equal") == 4
    assert sum(int(line.split("kills, ")[1].split()[0]) for line in printed.splitlines()[:4]) > 5


def test_five_hundred_altered_files() -> None:
    printed = script("altered_files", "--files", "500")
    assert printed.count(" 0 wrong") == 12
