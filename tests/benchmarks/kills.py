"""Kills, second writers and full disks: what is on disk is whole, and what is left goes on.

`python tests/benchmarks/kills.py --kills 1000` kills fits, the command line and `save` at random
moments, by SIGTERM or SIGKILL, and resumes them until they end. What they leave must equal what an
unbroken run leaves, bit for bit. Half of the moments are moments of time, half lie before a file
is opened, renamed or removed. Then two processes write the same name, for each kind of file, and
each kind of file is written to disks that are too small. One process imports torch; all others are
forks of it.
"""

import argparse
import functools
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz  # noqa: F401 - forks share what is imported here
import joblib  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import numpy as np
import pandas as pd
import torch
import torch._dynamo
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae.cli import main as command_line
from pyro_vae.cli import runs  # noqa: F401
from pyro_vae.data.files import read_tensors, write_tensors

Work = Callable[[Path], object]
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
REFUSED = 3  # exit code of a process that met a ValueError
CLEAR = re.compile(r"Another (process|fit) |exists")
SMALL = ["--max-epochs", "3", "--hidden", "16", "--latent", "2", "--num-samples", "40"]


# What is killed


def fit(folder: Path, *, size: int = 8, epochs: int = 16) -> None:
    x = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    vae = pv.VAE(
        (5,),
        pv.priors.Mixture(2, 2),
        pv.likelihoods.Bernoulli(),
        encoder=torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8)),
        decoder=pv.networks.MLP(size, size),
    )
    history = pv.fit(
        vae,
        x,
        validation=0.2,
        transform=pv.datasets.binarize,
        schedule=functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[5, 12]),
        lr=0.01,
        batch_size=20,
        warmup=epochs // 8,
        max_epochs=epochs,
        seed=0,
        device="cpu",
        progress=False,
        checkpoint=folder / "run",
        resume=True,
    )
    table = history.table.drop(columns="seconds").fillna(0.0).to_dict("list")
    write_tensors(folder / "end", vae.state_dict(), {"table": table, "best": history.best_epoch})


def command(folder: Path, *options: str) -> None:
    command_line(["fit", str(table(folder)), "--likelihood", "Normal", *SMALL,
                  "--out", str(folder / "run"), *options])  # fmt: skip


def table(folder: Path) -> Path:
    file = folder.parent / "table.csv"
    if not file.exists():
        values = np.random.default_rng(0).normal(size=(80, 4))
        pd.DataFrame(values, columns=list("abcd")).to_csv(file, index=False)
    return file


def programs() -> list[pv.VAE]:
    return [pv.VAE((6,), 2, pv.likelihoods.Bernoulli(), seed=seed) for seed in (0, 1)]


def save(folder: Path, *, times: int = 20) -> None:
    made = programs()
    for i in range(times):
        pv.save(made[i % 2], folder / "run", overwrite=True)


# What it must leave


def end_of_fit(folder: Path) -> Any:
    assert {p.name for p in folder.iterdir()} == {"run", "end"}, sorted(folder.iterdir())
    tensors, header = read_tensors(folder / "end")
    saved, told = read_tensors(folder / "run")
    for record in told["records"]:
        del record["seconds"]
    return [tensors, header, saved, told]


def end_of_command(folder: Path) -> Any:
    assert {p.name for p in folder.iterdir()} == {"run"}, sorted(folder.iterdir())
    run = folder / "run"
    files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*"))
    history = pd.read_csv(run / "history.csv").drop(columns="seconds").to_csv()
    posterior = arviz.from_netcdf(run / "posterior.nc")["posterior"]["z"].values.tolist()
    weights = pv.load(run).state_dict()
    return [files, history, (run / "evidence.csv").read_text(), posterior, weights]


def end_of_save(folder: Path) -> Any:
    return whole_copy(folder)


def whole_copy(folder: Path) -> Any:
    """After a kill at any moment there is the one program or the other."""
    if not any(folder.iterdir()):
        return None
    try:
        loaded = pv.load(folder / "run").state_dict()
    except FileNotFoundError:
        assert not (folder / ".run.replaced").exists()
        assert not (folder / "is there").exists(), "both copies are gone"
        return None
    (folder / "is there").touch()
    assert any(equal(loaded, program.state_dict()) for program in programs())
    return None


def equal(one: Any, other: Any) -> bool:
    match one, other:
        case dict(), dict():
            return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
        case list(), list():
            return len(one) == len(other) and all(map(equal, one, other))
        case torch.Tensor(), torch.Tensor():
            return torch.equal(one, other)
    return repr(one) == repr(other)  # of NaN too


# Processes


def fork(work: Callable[[], object], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}")
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def code_of(child: int) -> int:
    """The exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number: int, delay: float, folder: Path, sent: int, count: list[int]) -> None:
    """Ends this process at one of its next changes of files in a folder, or soon after it."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(args[0]).startswith(str(folder)):
            return
        if event == "open" and not (isinstance(args[1], str) and args[1][:1] in "wxa"):
            return
        count[0] += 1
        if count[0] == number and (not delay or os.fork() == 0):
            time.sleep(delay)
            os.kill(os.getppid() if delay else os.getpid(), sent)
            os._exit(0)

    sys.addaudithook(hook)


def attempt(work: Work, folder: Path, moment: random.Random, length: float, events: int) -> int:
    sent = moment.choice([signal.SIGTERM, signal.SIGKILL])
    number = moment.randint(1, events) if moment.random() < 0.6 else 0
    delay = moment.choice([0.0, moment.uniform(0.0, 0.01)])

    def run() -> None:
        if number:
            die_at(number, delay, folder, sent, [0])
        work(folder)

    child = fork(run, folder.with_suffix(".log"))
    if not number:
        time.sleep(moment.uniform(0.0, length))
        os.kill(child, sent)
    return code_of(child)


def unbroken(work: Work, folder: Path) -> tuple[float, int]:
    """Runs to the end; returns the time and the number of changes of files."""
    folder.mkdir()
    counted = folder.with_suffix(".events")

    def run() -> None:
        count = [0]
        die_at(0, 0.0, folder, 0, count)
        try:
            work(folder)
        finally:
            counted.write_text(str(count[0]))

    start = time.perf_counter()
    code = code_of(fork(run, folder.with_suffix(".log")))
    assert code == 0, folder.with_suffix(".log").read_text()
    return time.perf_counter() - start, int(counted.read_text())


def killed(name: str, kills: int, root: Path, moment: random.Random) -> str:
    """Kills one kind of work so many times; each run goes on until it ends."""
    work, check, again = KINDS[name]
    length, events = unbroken(work, root / f"{name}-whole")
    expected = check(root / f"{name}-whole")
    left, ended, inside = kills, 0, 0
    while left:
        folder = root / f"{name}-{ended}"
        folder.mkdir()
        first = True
        while True:
            todo = work if first else again(moment)
            code = attempt(todo, folder, moment, length, events) if left else code_of(
                fork(functools.partial(todo, folder), folder.with_suffix(".log"))
            )  # fmt: skip
            first = False
            if code == 0:
                break
            assert code in (-signal.SIGTERM, -signal.SIGKILL), (
                f"{name}: exit code {code}: {folder.with_suffix('.log').read_text()}"
            )
            left -= 1
            inside += any(".partial" in p.name or ".replaced" in p.name for p in folder.rglob("*"))
            if check is end_of_save:
                whole_copy(folder)
        assert equal(check(folder), expected), f"{name}: another end in {folder}"
        shutil.rmtree(folder)
        ended += 1
    return f"{name:26} {kills:5} kills, {inside:4} within a write; {ended:4} runs, all equal"


Again = Callable[[random.Random], Work]
KINDS: dict[str, tuple[Work, Callable[[Path], Any], Again]] = {
    "fit": (fit, end_of_fit, lambda moment: fit),
    "fit of large networks": (
        functools.partial(fit, size=1000, epochs=8),
        end_of_fit,
        lambda moment: functools.partial(fit, size=1000, epochs=8),
    ),
    "command line": (
        command,
        end_of_command,
        lambda moment: (
            lambda folder: command(folder, "--resume" if moment.random() < 0.8 else "--overwrite")
        ),
    ),
    "save(overwrite=True)": (save, end_of_save, lambda moment: save),
}
SHARES = {"fit": 0.4, "fit of large networks": 0.15, "command line": 0.25}


# Two writers of one name


def sample(folder: Path, ending: str, *, saved: Path) -> None:
    command_line(["sample", str(saved), "--out", str(folder / f"draws{ending}")])


def both(name: str, work: Work, check: Callable[[Path], object], root: Path, rounds: int) -> str:
    ended = 0
    for i in range(rounds):
        folder = root / f"two-{name.replace(' ', '-')}-{i}"
        folder.mkdir()
        logs = [folder.with_suffix(f".{j}.log") for j in range(3)]
        children = [fork(functools.partial(work, folder), log) for log in logs]
        codes = [code_of(child) for child in children]
        for code, log in zip(codes, logs, strict=True):
            said = log.read_text()
            refusal = code in (2, REFUSED) and CLEAR.search(said) and said.count("\n") <= 1
            assert code == 0 or refusal, f"{name}: exit code {code}: {said}"
        assert 0 in codes, f"{name}: none wrote"
        left = [p.name for p in folder.rglob("*") if re.search(r"partial|lock|replaced", p.name)]
        assert left == [], f"{name}: left {left}"
        check(folder)
        ended += codes.count(0)
    return f"{name:26} {rounds:5} times three writers: {ended} wrote, the others were refused"


def two_writers(root: Path, rounds: int) -> list[str]:
    saved = pv.save(programs()[0], root / "saved")
    cases: dict[str, tuple[Work, Callable[[Path], object]]] = {
        "save": (
            lambda folder: pv.save(programs()[0], folder / "run"),
            lambda folder: pv.load(folder / "run"),
        ),
        "save(overwrite=True)": (
            functools.partial(save, times=5),
            lambda folder: pv.load(folder / "run"),
        ),
        "checkpoint": (functools.partial(fit, epochs=5), end_of_fit),
        "run folder": (command, end_of_command),
    }
    for ending, read in ENDINGS.items():
        cases[ending] = (
            functools.partial(sample, ending=ending, saved=saved),
            lambda folder, ending=ending, read=read: read(folder / f"draws{ending}"),
        )
    return [both(name, *case, root, rounds) for name, case in cases.items()]


ENDINGS: dict[str, Callable[[Path], Any]] = {
    ".csv": pd.read_csv,
    ".npy": np.load,
    ".npz": lambda path: np.load(path)["x"],
    ".png": lambda path: __import__("matplotlib.image").image.imread(path),
}


# Disks that are too small


def small_disks(root: Path) -> list[str]:
    saved = pv.save(programs()[0], root / "kept")
    whole = root / "whole"
    whole.mkdir()
    assert code_of(fork(functools.partial(command, whole), root / "whole.log")) == 0
    works: dict[str, Work] = {
        "save": lambda folder: pv.save(programs()[1], folder / "run"),
        "save(overwrite=True)": lambda folder: pv.save(programs()[1], saved, overwrite=True),
        "checkpoint": functools.partial(fit, epochs=2),
        "run folder": command,
        "run folder, replaced": lambda folder: command(whole, "--overwrite"),
        **{end: functools.partial(sample, ending=end, saved=saved) for end in ENDINGS},
    }
    lines = []
    for name, work in works.items():
        full = 0
        for size in (0, 300, 8_000, 25_000, 60_000):
            folder = root / f"disk-{name.replace(' ', '-')}-{size}"
            folder.mkdir()
            log = root / "disk.log"
            code = code_of(fork(functools.partial(on_a_disk, size, work, folder, log), log))
            said = log.with_suffix(".said").read_text()
            assert code in (0, 2, REFUSED), f"{name}, {size}: exit code {code}: {said}"
            one_line = len(said.strip().splitlines()) == 1 and "Errno 27" in said
            assert code == 0 or one_line, f"{name}, {size}: {said}"
            left = {p.name for p in folder.rglob("*") if p.is_file()}
            assert code == 0 or left <= {"checkpoint.safetensors", "run"}, f"{name}: left {left}"
            pv.load(saved)
            end_of_command_kept(whole)
            full += code != 0
        lines.append(f"{name:26} {full:5} of 5 disks too small: one line each, the old kept")
    return lines


def on_a_disk(size: int, work: Work, folder: Path, log: Path) -> None:
    """The limit holds for the log too, so what is said of errors goes through a pipe."""
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        work(folder)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except OSError as error:
        sys.stderr.write(str(error))
        code = REFUSED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        sys.stderr.flush()
        sys.stdout.flush()
        os.close(writer)
        os.set_blocking(reader, False)
        said = os.read(reader, 2**16) if code else b""
        log.with_suffix(".said").write_bytes(said)
    raise SystemExit(code)


def end_of_command_kept(folder: Path) -> None:
    assert len(list((folder / "run").rglob("*.png"))) == 5
    pv.load(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20, help="of several writers")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock would be kept by a fork that was killed
    moment = random.Random(asked.seed)
    counts = {name: int(share * asked.kills) for name, share in SHARES.items()}
    counts["save(overwrite=True)"] = asked.kills - sum(counts.values())
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        unused = root / "unused"
        unused.mkdir()
        fit(unused, epochs=1)  # imports what the first fit imports
        try:
            for name, count in counts.items():
                start = time.perf_counter()
                line = killed(name, count, root, moment)
                print(f"{line}; {time.perf_counter() - start:.0f} s", flush=True)  # noqa: T201
            print("\n".join(two_writers(root, asked.rounds)), flush=True)  # noqa: T201
            print("\n".join(small_disks(root)), flush=True)  # noqa: T201
        except AssertionError as error:
            sys.exit(f"FAILED: {error}")


if __name__ == "__main__":
    main()
