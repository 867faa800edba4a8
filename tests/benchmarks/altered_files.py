"""Altered files of every kind that is read: loaded, or refused by one ValueError.

`python tests/benchmarks/altered_files.py --files 10000` alters bytes at random, and entries and
tensors of files that it signs again. Whatever is refused leaves the program as it was. Memory and
time are bounded, and no file ends the process: each kind is read by a process of its own.
"""

import argparse
import copy
import gzip
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.cli import main as command_line
from pyro_vae.data import files
from pyro_vae.data.files import read_json, read_tensors, write_json, write_tensors
from pyro_vae.programs.saving import _digest

MEMORY = 600  # MB
SECONDS = 30
VALUES = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**30, 10**400, -0.5, 1e308, math.nan, math.inf,
    "", "a", "x" * 300, "../../etc/passwd", "os.system", "float64", [], [[]], {}, {"a": 1},
    [1, 2, 3], ["a"], {"tensor": "value.0"}, {"member": "VAE"}, {"distribution": "Normal"},
]  # fmt: skip
X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


def program() -> pv.VAE:
    likelihood = pv.likelihoods.StudentT(df=torch.tensor([3.0, 4.0, 5.0]))
    networks = {"encoder": pv.networks.MLP(4), "decoder": pv.networks.MLP(4)}
    return pv.VAE(3, pv.priors.Mixture(2, 2), likelihood, **networks, seed=0)


def fit(vae: pv.VAE, path: Path, *, epochs: int, resume: bool) -> pv.History:
    return pv.fit(
        vae, X, validation=0.2, warmup=1, max_epochs=epochs, batch_size=16, seed=0, device="cpu",
        progress=False, checkpoint=path, resume=resume, until_converged=False,
        schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    )  # fmt: skip


# Alterations


def bytes_of(content: bytes, r: random.Random) -> bytes:
    at, size = r.randrange(len(content)), r.choice([1, 1, 2, 8, 100])
    piece = content[at : at + size]
    match r.randrange(7):
        case 0 | 1:
            changed = bytearray(content)
            for _ in range(size):
                changed[r.randrange(len(content))] ^= 1 << r.randrange(8)
            return bytes(changed)
        case 2:
            return content[:at]
        case 3:
            return content[:at] + content[at + size :]
        case 4:
            return content[:at] + r.randbytes(size) + content[at:]
        case 5:
            return (
                content[:at] + r.choice([b"\0", b"\xff", b"9"]) * len(piece) + content[at + size :]
            )
    return content[:at] + piece + content[at:]


def entry_of(content: Any, r: random.Random) -> Any:
    """Replaces, removes or adds one entry of a JSON value."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(content)
    holder, key = r.choice(places)
    match r.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}a"] = holder.pop(key)
        case 1 | 2:
            other, name = r.choice(places)
            holder[key] = copy.deepcopy(other[name])
        case _:
            holder[key] = copy.deepcopy(r.choice(VALUES))
    return content


def tensor_of(tensors: dict[str, Tensor], r: random.Random) -> dict[str, Tensor]:
    """Changes the name, the shape, the dtype or the values of one tensor."""
    tensors = dict(tensors)
    name = r.choice(sorted(tensors))
    tensor = tensors[name]
    match r.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[f"{name}a"] = tensors.pop(name)
        case 2:
            tensors[name] = tensor.flatten()[:-1]
        case 3:
            tensors[name] = tensor[None]
        case 4:
            dtypes = [torch.float64, torch.int64, torch.bool, torch.float16, torch.uint8]
            tensors[name] = tensor.to(r.choice(dtypes))
        case 5:
            tensors[name] = torch.zeros(r.choice([(), (0,), (1,), (3, 1), (10_000,)]))
        case 6:
            tensors[name] = tensors[r.choice(sorted(tensors))]
    return tensors


# Files


def folder_bytes(folder: Path, r: random.Random) -> None:
    file = folder / r.choice(["spec.json", "weights.safetensors"])
    file.write_bytes(bytes_of(file.read_bytes(), r))


def folder_signed(folder: Path, r: random.Random) -> None:
    spec, weights = read_json(folder / "spec.json"), folder / "weights.safetensors"
    if r.random() < 0.6:
        spec = entry_of(spec, r)
    else:
        tensors, header = read_tensors(weights)
        write_tensors(weights, tensor_of(tensors, r), header)
    sign(folder, spec)


def sign(folder: Path, spec: dict[str, Any]) -> None:
    if isinstance(spec.get("sha256"), dict):
        for name in spec["sha256"]:
            if (folder / str(name)).is_file():
                spec["sha256"][name] = files.sha256(folder / name)
        spec["sha256"].pop("spec.json", None)
        spec["sha256"]["spec.json"] = _digest(spec)
    write_json(folder / "spec.json", spec)


def settings_signed(folder: Path, r: random.Random) -> None:
    write_json(folder / "fit.json", entry_of(read_json(folder / "fit.json"), r))
    sign(folder, read_json(folder / "spec.json"))


def checkpoint_bytes(path: Path, r: random.Random) -> None:
    path.write_bytes(bytes_of(path.read_bytes(), r))


def checkpoint_signed(path: Path, r: random.Random) -> None:
    tensors, header = read_tensors(path)
    if r.random() < 0.5:
        header = entry_of(header, r)
    else:
        tensors = tensor_of(tensors, r)
    write_tensors(path, tensors, header)


def data_file(path: Path, r: random.Random) -> None:
    content = path.read_bytes()
    if path.name.endswith(".gz") and r.random() < 0.5:
        path.write_bytes(gzip.compress(bytes_of(gzip.decompress(content), r)))
    elif path.suffix in (".npy", ".npz") and r.random() < 0.3:
        path.write_bytes(lying(path, r))
    else:
        path.write_bytes(bytes_of(content, r))


def lying(path: Path, r: random.Random) -> bytes:
    """An array whose header promises another shape."""
    made = io.BytesIO()
    shape = (r.choice([0, 1, 2**31, 10**12, 10**30, -1]), r.choice([1, 3, 10**6]))
    header = {"descr": r.choice(["<f4", "<f8", "|O", "<M8[ns]", "<U9"]), "fortran_order": False}
    np.lib.format.write_array_header_1_0(made, header | {"shape": shape})
    content = made.getvalue() + X.numpy().tobytes()
    if path.suffix == ".npy":
        return content
    archive = io.BytesIO()
    with __import__("zipfile").ZipFile(archive, "w") as file:
        file.writestr("x.npy", content)
    return archive.getvalue()


# What reads them


def read_folder(folder: Path, r: random.Random) -> dict[str, Any]:
    into = program() if r.random() < 0.5 else None
    before = None if into is None else state_of(into)
    try:
        loaded = pv.load(folder, into=into)
    except (ValueError, OSError):
        assert into is None or same(state_of(into), before), "the program has changed"
        raise
    return {"draws": loaded.sample(2, seed=0), **loaded.state_dict()}


def read_checkpoint(path: Path, r: random.Random) -> dict[str, Any]:
    vae = program()
    before = state_of(vae)
    try:
        fit(vae, path, epochs=3, resume=True)
    except ValueError:
        assert same(state_of(vae), before), "the program has changed"
        raise
    return state_of(vae)


def read_run(folder: Path, r: random.Random) -> None:
    table = str(folder.parent / "x.csv")
    few = ["--num-samples", "8"]
    command = r.choice([["evaluate", str(folder), table, *few], ["sample", str(folder)]])
    try:
        command_line(command)
    except SystemExit as left:
        if left.code == 2:
            raise ValueError from left
        if left.code:
            raise


def read_data(path: Path, r: random.Random) -> None:
    pv.datasets.load(path)


def state_of(vae: pv.VAE) -> dict[str, Any]:
    about = [vae.is_initialized, vae.units.form, vae.training, vae.degenerate]
    return {"about": about, **{k: v.clone() for k, v in vae.state_dict().items()}}


def same(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    pairs = [(one[k], (other or {}).get(k)) for k in one]
    return one.keys() == (other or {}).keys() and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs
    )


def write_all(root: Path) -> None:
    vae = program()
    fit(vae, root / "checkpoint", epochs=2, resume=False)
    pv.save(vae, root / "saved")
    x = X.numpy()
    pd.DataFrame(x, columns=list("abc")).to_csv(root / "x.csv", index=False)
    pd.DataFrame(x, columns=list("abc")).to_csv(root / "x.csv.gz", index=False)
    pd.DataFrame(x, columns=list("abc")).to_parquet(root / "x.parquet")
    np.save(root / "x.npy", x)
    np.savez_compressed(root / "x.npz", x=x)
    idx = b"\0\0\x0d\x02" + np.array(x.shape, ">u4").tobytes() + x.astype(">f4").tobytes()
    (root / "x-idx2-float").write_bytes(idx)
    (root / "x-idx2-float.gz").write_bytes(gzip.compress(idx))
    shutil.copytree(root / "saved", root / "run")
    settings = {"data": str(root / "x.csv"), "key": None, "transform": None}
    record = {"settings": settings, "columns": ["a", "b", "c"], "held_out_rows": [1, 2]}
    write_json(root / "run" / "fit.json", record)
    spec = read_json(root / "run" / "spec.json")
    spec["sha256"]["fit.json"] = ""
    sign(root / "run", spec)


Alter = Callable[[Path, random.Random], None]
Read = Callable[[Path, random.Random], Any]
KINDS: dict[str, tuple[str, Alter, Read, float]] = {
    "program": ("saved", folder_bytes, read_folder, 0.15),
    "program, signed again": ("saved", folder_signed, read_folder, 0.2),
    "checkpoint": ("checkpoint", checkpoint_bytes, read_checkpoint, 0.1),
    "checkpoint, signed again": ("checkpoint", checkpoint_signed, read_checkpoint, 0.2),
    "run folder, signed again": ("run", settings_signed, read_run, 0.05),
    **{
        f"data, {name}": (name, data_file, read_data, 0.3 / 7)
        for name in (
            "x.csv", "x.csv.gz", "x.parquet", "x.npy", "x.npz", "x-idx2-float", "x-idx2-float.gz"
        )
    },
}  # fmt: skip


def alter_all(name: str, count: int, root: Path, seed: int) -> str:
    """Alters and reads so many files of one kind, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        with os.fdopen(writer, "w") as out:
            out.write(json.dumps(altered(name, count, root, seed)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as source:
        said = source.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or not said:
        return f"{name}: the process ended with {code}"
    found = json.loads(said)
    wrong = [*found["wrong"]]
    if found["memory"] > MEMORY:
        wrong.append(f"{found['memory']:.0f} MB of memory")
    print(  # noqa: T201
        f"{name:26} {count:6} files: {found['loaded']:5} loaded, {found['refused']:5} refused, "
        f"{len(wrong):3} wrong; {found['memory']:4.0f} MB, {found['seconds']:.0f} s",
        flush=True,
    )
    return "\n".join(f"{name}: {text}" for text in wrong)


def altered(name: str, count: int, root: Path, seed: int) -> dict[str, Any]:
    source, alter, read, _ = KINDS[name]
    before, start = peak(), time.perf_counter()
    found: dict[str, Any] = {"loaded": 0, "refused": 0, "wrong": []}
    expected: Any = None
    target = root / "work" / name / source
    target.parent.mkdir(parents=True)
    shutil.copy(root / "x.csv", target.parent / "x.csv")
    for i in range(count):
        r = random.Random(f"{seed} {name} {i}")
        if target.is_dir():
            shutil.rmtree(target)
        copied = shutil.copytree if (root / source).is_dir() else shutil.copyfile
        copied(root / source, target)
        if i:  # the first file is as it was written
            alter(target, r)
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = read(target, r)
            expected = expected if i else result
            has_digest = source in ("saved", "checkpoint") and "signed" not in name
            assert not has_digest or same(result, expected), "loaded another program"
            found["loaded"] += 1
        except (ValueError, FloatingPointError, OSError) as error:
            found["refused"] += 1
            if not i or "\n" in str(error).strip():
                found["wrong"].append(f"{i}: {error}")
        except BaseException:
            found["wrong"].append(f"{i}: {traceback.format_exc(limit=-3)}")
        signal.alarm(0)
    return found | {"memory": peak() - before, "seconds": time.perf_counter() - start}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stopped(*_: object) -> None:
    raise TimeoutError(f"no answer in {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stopped)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        write_all(root)
        kinds = {name: kind for name, kind in KINDS.items() if asked.kind in name}
        wrong = [
            alter_all(name, math.ceil(share * asked.files), root, asked.seed)
            for name, (*_, share) in kinds.items()
        ]
    if any(wrong):
        sys.exit("\n".join(["FAILED", *filter(None, wrong)]))


if __name__ == "__main__":
    main()
