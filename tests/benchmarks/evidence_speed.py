"""How fast is log p(x) by 5000 samples a row, and in how much memory, beside other packages?

One VAE, 784-200-50 with ReLU and a Bernoulli likelihood, takes a step of each of 79 batches. The
same weights are given to pythae, whose `get_nll` estimates log p(x), and to a model and a guide in
Pyro, whose `RenyiELBO` with alpha 0 does. All samples of a row in one call are Pyro's plain use;
the last line gives it the number of samples in a call that is fastest here. `RenyiELBO` sums
over rows before it averages over samples, so it takes one row a call.

Each system runs in processes of its own, in turn, on as many threads as the others. pyro_vae
scores all rows, and its time includes the tracing and the compiling; the peers are slower, score
the first rows, are warmed up before, and their time for all rows is scaled. The exit code is 1 if
pyro_vae is less than 5 times as fast as a peer that is installed, in seconds of the processor, if
it takes 2 GiB or more, or if the systems disagree on log p(x).

    PYRO_VAE_DATA=... python tests/benchmarks/evidence_speed.py
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from peers import Decoder, Encoder, Shape, kept_quiet, missing, pythae_vae
from speed import kib
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import datasets
from pyro_vae.engine.running import seeded

SHAPE, SAMPLES = Shape(128, 784, 200, 50), 5000
LEAST, MOST_GIB = 5.0, 2.0
IN_PARTS = 250  # samples of a call of RenyiELBO, the fastest of 100, 250, 500, 1000 and 5000
OURS = "pyro_vae"
LAYERS = {
    "encoder.layers.1": ("encoder", "hidden"),
    "posterior.heads.loc.linear": ("encoder", "loc"),
    "posterior.heads.scale.linear": ("encoder", "scale"),
    "decoder.layers.1": ("decoder", "hidden"),
    "likelihood.heads.logits.linear": ("decoder", "logits"),
}

Scored: TypeAlias = Callable[[Tensor], np.ndarray]


def our_vae() -> pv.VAE:
    layers = pv.networks.MLP(SHAPE.hidden, activation=nn.ReLU)
    likelihood = pv.likelihoods.Bernoulli()
    return pv.VAE(SHAPE.pixels, SHAPE.latent, likelihood, encoder=layers, decoder=layers, seed=0)


def networks_of(weights: dict[str, Tensor]) -> tuple[Encoder, Decoder]:
    """The networks of the peers, with the weights of our VAE."""
    networks = {"encoder": Encoder(SHAPE), "decoder": Decoder(SHAPE)}
    for ours, (network, theirs) in LAYERS.items():
        for name in ("weight", "bias"):
            target = networks[network].get_parameter(f"{theirs}.{name}")
            target.data.copy_(weights[f"{ours}.{name}"])
    return networks["encoder"], networks["decoder"]  # type: ignore[return-value]


def ours(weights: dict[str, Tensor]) -> Scored:
    vae = our_vae()
    vae.load_state_dict(weights)

    def score(x: Tensor) -> np.ndarray:
        found = pv.log_evidence(vae, x, SAMPLES, refine=False, seed=0, progress=False)
        return found["log_evidence"].to_numpy()

    return score


def pythae(weights: dict[str, Tensor]) -> Scored:
    with kept_quiet():
        vae = pythae_vae(SHAPE)
    vae.encoder.network, vae.decoder.network = networks_of(weights)

    def score(x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return np.array([vae.get_nll(row[None], n_samples=SAMPLES) for row in x])

    return score


def renyi(weights: dict[str, Tensor], at_once: int = SAMPLES) -> Scored:
    encoder, decoder = networks_of(weights)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), SHAPE.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    bound = pyro.infer.RenyiELBO(
        alpha=0, num_particles=at_once, max_plate_nesting=1, vectorize_particles=True
    )
    parts = SAMPLES // at_once

    def of_row(row: Tensor) -> float:
        values = [-bound.loss(model, guide, row[None]) for _ in range(parts)]
        return float(torch.tensor(values).logsumexp(0)) - math.log(parts)

    def score(x: Tensor) -> np.ndarray:
        with torch.no_grad(), pyro.validation_enabled(False):
            return np.array([of_row(row) for row in x])

    return score


SYSTEMS: dict[str, Callable[[dict[str, Tensor]], Scored]] = {
    OURS: ours,
    "pythae, get_nll": pythae,
    "Pyro, RenyiELBO": renyi,
    f"Pyro, RenyiELBO, {IN_PARTS} a call": lambda weights: renyi(weights, IN_PARTS),
}


def child(name: str, folder: Path, rows: int, threads: int) -> dict[str, Any]:
    """Runs one system in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, str(folder)]
    command += ["--rows", str(rows), "--threads", str(threads)]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def score(name: str, folder: Path, rows: int) -> dict[str, Any]:
    """The time of one system, and the most memory of its process, which the kernel records."""
    weights = torch.load(folder / "weights.pt")
    x = torch.from_numpy(np.load(folder / "rows.npy")[:rows]).float()
    scored = SYSTEMS[name](weights)
    before = kib("VmRSS")
    if name != OURS:
        scored(x[:2])
    start = time.perf_counter(), time.process_time()
    found = scored(x)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "rows": len(x),
        "rows/s": len(x) / seconds[0],
        "rows/s of CPU": len(x) / seconds[1],
        "GiB at most": kib("VmHWM") / 2**20,
        "GiB more": (kib("VmHWM") - before) / 2**20,
        "log p(x)": found.tolist(),
    }


def prepare(folder: Path, rows: int) -> None:
    """Takes a step of each batch, and stores its weights and the rows to be scored."""
    data = Path(os.environ.get("PYRO_VAE_DATA", "data")) / "mnist"
    train, test = (datasets.load(data / f"mnist_{part}.npz").x for part in ("train", "test"))
    with seeded(0):
        train, test = datasets.binarize(train[:10_112]), datasets.binarize(test[:rows])
        vae = our_vae()
        elbo, adam = pv.elbos.Trace_ELBO(), torch.optim.Adam
        svi = pv.svi.SVI(vae.model, vae.guide, adam, elbo, lr=1e-3, engine="traced")
        for x in train.flatten(1).split(SHAPE.batch_size):
            svi.step(x)  # fit would also set the logits of constant pixels, which no peer has
    torch.save(vae.state_dict(), folder / "weights.pt")
    np.save(folder / "rows.npy", test.flatten(1).numpy().astype(np.uint8))


def best(runs: list[dict[str, Any]], few: int) -> dict[str, float]:
    values = np.array(runs[0]["log p(x)"][:few])
    return {
        "rows": runs[0]["rows"],
        **{name: max(run[name] for run in runs) for name in ("rows/s", "rows/s of CPU")},
        **{name: max(run[name] for run in runs) for name in ("GiB at most", "GiB more")},
        "log p(x)": values.mean(),
        "se": values.std(ddof=1) / math.sqrt(few),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--peer-rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="2200 rows, 20 of the peers, a round")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.quick:
        asked.rows, asked.peer_rows, asked.rounds = 2200, 20, 1
    return asked


def main() -> int:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    if asked.child is not None:
        name, folder = asked.child
        print(json.dumps(score(name, Path(folder), asked.rows)))
        return 0
    names = [n for n in SYSTEMS if not (n.startswith("pythae") and missing(("pythae",)))]
    if len(names) < len(SYSTEMS):
        print("pythae is not installed, so it is not compared")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, asked.rows)
        for _ in range(asked.rounds):
            for name in names:
                rows = asked.rows if name == OURS else asked.peer_rows
                runs[name].append(child(name, folder, rows, asked.threads))
                print(name, {k: v for k, v in runs[name][-1].items() if k[0] != "l"}, flush=True)
    table = pd.DataFrame({name: best(found, asked.peer_rows) for name, found in runs.items()}).T
    table[f"s for {asked.rows} rows"] = asked.rows / table["rows/s"]
    for clock in ("rows/s", "rows/s of CPU"):
        table[f"ours / {clock}"] = table.loc[OURS, clock] / table[clock]
    print(table.T.round(3).to_string())
    ratios = table["ours / rows/s of CPU"].drop(OURS)
    distance = (table["log p(x)"] - table.loc[OURS, "log p(x)"]).abs().max()
    failed = [f"{name}: {ratio:.1f} times" for name, ratio in ratios.items() if ratio < LEAST]
    failed += [f"{distance:.2f} nats apart"] if distance > table["se"].max() else []
    is_large = table.loc[OURS, "GiB at most"] >= MOST_GIB
    failed += [f"{table.loc[OURS, 'GiB at most']:.2f} GiB"] if is_large else []
    print(f"missed: {'; '.join(failed)}" if failed else f"at least {LEAST} times as fast as each")
    return int(bool(failed))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
