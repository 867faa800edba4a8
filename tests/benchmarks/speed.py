"""What a step, an epoch, log p(x), memory and compiling cost, beside other systems.

Systems take turns of a tenth of a second in one process; what counts is the least of their rounds,
and on a shared machine the ratios. The VAE has one hidden layer and a Bernoulli likelihood.

- step: ms a step of every peer for three shapes; the ratios of ours to theirs, and what is asked
  for; and the floor: the matrix products of a step alone.
- fit: what `fit` takes over the bare step on a batch that lies ready, in percent: at most 5.
- epoch: seconds an epoch of rows the size of MNIST, binarised anew at each visit.
- evidence: the share of the best rate of float32 matrix products, at the decoder's own shapes,
  that log p(x) by 5000 samples reaches: at least 0.7; and a whole call of `log_evidence`.
- memory: what `log_evidence` takes over its data, by rows and samples, at a small model of 64
  pixels, each in a process of its own: a bound on memory does not grow with them.
- compile: seconds of the first step in a fresh process, without and with Inductor's cache.

    python tests/benchmarks/speed.py --rounds 20 --parts step,fit,epoch,evidence,memory,compile
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from peers import (
    EPOCHS,
    MNIST,
    PEERS,
    SHAPES,
    Call,
    Shape,
    bits,
    grey_levels,
    our_epochs,
    our_step,
    our_vae,
)
from torch import Tensor

import pyro_vae as pv
from pyro_vae.data.read import read
from pyro_vae.elbos.chunks import Plan, give_memory_back
from pyro_vae.elbos.drawing import WORTH_COMPILING, WORTH_TRACING, Drawing
from pyro_vae.elbos.log_densities import log_densities
from pyro_vae.engine.replay import at_precision
from pyro_vae.engine.running import evaluating, kept_generators
from pyro_vae.evidence.scoring import IN_CACHE

BLOCK = 0.12
WARM_UP = 3
TARGETS = {
    "NumPyro, jit": 1.0,
    "NumPyro, scan of 8": 1.0,
    "by hand": 0.6,
    "by hand, medium": 0.95,
    "pyro.infer.SVI": 0.4,
}
FIT_EPOCHS = 12
SAMPLES, SHARE = 5000, 0.7
SIZES = ((1000, 100), (10_000, 100), (100_000, 100), (100, 1000), (100, 5000), (100, 20_000))
SMALL = Shape(128, 64, 64, 4)
DISTRIBUTIONS = {
    "numpy": "numpy",
    "torch": "torch",
    "pyro": "pyro-ppl",
    "jax": "jax",
    "numpyro": "numpyro",
    "pythae": "pythae",
    "scvi": "scvi-tools",
}


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds a call: the least over rounds, in each of which every one has a block of calls."""
    numbers = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        numbers[name] = max(1, round(BLOCK / seconds_of(call, 2)))
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            least[name] = min(least[name], seconds_of(call, numbers[name]))
    return least


def seconds_of(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def products(shape: Shape) -> Call:
    """The matrix products of a step, forward and backward, into tensors that lie ready."""
    rows, pixels, hidden, latent = shape
    layers = [(pixels, hidden), *2 * [(hidden, latent)], (latent, hidden), (hidden, pixels)]
    pairs = []
    for i, (inputs, outputs) in enumerate(layers):
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        g = torch.randn(rows, outputs)
        pairs += [(x, w.t()), (g.t(), x)]
        if i > 0:  # the data need no gradient
            pairs.append((g, w))
    prepared = [(a, b, torch.empty(a.shape[0], b.shape[1])) for a, b in pairs]

    def multiply() -> None:
        for a, b, out in prepared:
            torch.mm(a, b, out=out)

    return multiply


def at_medium(call: Call) -> Call:
    def changed() -> Any:
        with at_precision("medium"):
            return call()

    return changed


def step_part(asked: argparse.Namespace) -> None:
    peers = {name: peer for name, peer in PEERS.items() if not peer.missing}
    table = {}
    for label, shape in SHAPES.items():
        calls = {name: peer.make(shape) for name, peer in peers.items()}
        calls["matrix products alone"] = products(shape)
        calls["matrix products alone, medium"] = at_medium(products(shape))
        taken = interleaved(calls, asked.rounds)
        steps = {name: peers[name].steps if name in peers else 1 for name in calls}
        table[label] = {name: 1e3 * s / steps[name] for name, s in taken.items()}
        say(f"step: {label} done")
    milliseconds = pd.DataFrame(table)
    say(f"ms a step\n{milliseconds.round(3).to_string()}")
    say(f"ours, as a part of theirs\n{ratios(milliseconds).round(3).to_string(na_rep='')}")


def ratios(milliseconds: pd.DataFrame) -> pd.DataFrame:
    references = [name for name in TARGETS if name in milliseconds.index]
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for label in milliseconds:
        for name in milliseconds.index:
            if name.startswith("pyro_vae"):
                of = milliseconds[label]
                lines[label, name] = {other: of[name] / of[other] for other in references}
    lines["", "at most"] = {name: TARGETS[name] for name in references}
    return pd.DataFrame(lines).T


def fit_part(asked: argparse.Namespace) -> None:
    """Fits and bare steps in turn; a fit's epochs that compile or trace are not the least."""
    shape = SHAPES[MNIST]
    steps = max(2, asked.fit_rows // shape.batch_size)  # no smaller last batch
    x = bits(shape, steps * shape.batch_size)
    table = {}
    for engine in ("traced", "compiled"):
        step = our_step(shape, engine)
        seconds_of(step, WARM_UP)
        bare, fitted = [], []
        for _ in range(max(2, asked.rounds // 3)):
            bare += [seconds_of(step, steps) for _ in range(FIT_EPOCHS)]
            seconds = our_epochs(x, shape, FIT_EPOCHS, engine=engine, transform=None)
            fitted += [s / steps for s in seconds]
        table[engine] = {
            "ms a bare step": 1e3 * min(bare),
            "ms a step of fit": 1e3 * min(fitted),
            "overhead, %": 100 * (min(fitted) / min(bare) - 1),
            "of medians, %": 100 * (median(fitted) / median(bare) - 1),
            "at most": 5.0,
        }
    say(f"fit, {len(x)} rows, {MNIST}\n{pd.DataFrame(table).T.round(3).to_string()}")


def epoch_part(asked: argparse.Namespace) -> None:
    shape = SHAPES[MNIST]
    grey = grey_levels(asked.rows, shape.pixels)
    peers = {name: peer for name, peer in EPOCHS.items() if not peer.missing}
    taken: dict[str, list[list[float]]] = {name: [] for name in peers}
    for turn in range(asked.turns):
        for name in sorted(peers, reverse=bool(turn % 2)):
            taken[name].append(peers[name].take(grey, shape, asked.epochs))
            say(f"epoch: {name}, turn {turn + 1} done")
    steps = -(-len(grey) // shape.batch_size)
    table = {}
    for name in peers:
        least = min(min(seconds) for seconds in taken[name])
        first = min(seconds[0] for seconds in taken[name])
        table[name] = {
            "s, first epoch": first,
            "s, least epoch": least,
            "ms a step": 1e3 * least / steps,
        }
    shown = pd.DataFrame(table).T
    shown["of by hand"] = shown["s, least epoch"] / shown["s, least epoch"].get(
        "by hand, index_select"
    )
    say(f"epoch, {len(grey)} rows, {MNIST}\n{shown.round(3).to_string()}")


def evidence_part(asked: argparse.Namespace) -> None:
    shape = SHAPES[MNIST]
    vae, x = our_vae(shape), bits(shape, asked.evidence_rows)
    with evaluating(vae):
        rows = read(x, vae)
        plan = Plan.of(vae, rows, SAMPLES, IN_CACHE)
        drawing, compiling = prepared_drawing(vae, x[: plan.rows_at_once], plan)

        def draw() -> dict[str, Tensor]:
            return drawing(x[: plan.rows_at_once], plan.draws_at_once)

        multiply = decoder_products(shape, plan)
        calls = {"matrix products": multiply, "matrix products, medium": at_medium(multiply)}
        calls |= {"densities": draw, "densities, medium": at_medium(draw)}
        taken = interleaved(calls, asked.rounds)
    drawn = plan.rows_at_once * plan.draws_at_once
    flops = 2 * drawn * shape.hidden * (shape.latent + shape.pixels)
    best = min(taken["matrix products"], taken["matrix products, medium"])
    table = pd.DataFrame({"ms": pd.Series(taken) * 1e3})
    table["GF/s"] = flops / 1e6 / table["ms"]
    table["share of the best"] = best * 1e3 / table["ms"]
    size = f"{plan.rows_at_once} row(s) x {plan.draws_at_once} draws"
    say(f"log p(x), a piece of {size}; at least {SHARE}\n{table.round(3).to_string()}")
    say(f"the first three pieces, traced and compiled among them, took {compiling:.1f} s more")
    whole_evidence(vae, x, plan, drawing, multiply, asked.rounds)


def prepared_drawing(vae: pv.VAE, x: Tensor, plan: Plan) -> tuple[Drawing, float]:
    """What draws a piece, compiled, and the seconds it took to have it compiled."""

    def log_weights(x: Any, count: int) -> dict[str, Tensor]:
        return {"log_weights": log_densities(vae, x, count, known=plan.structure).log_weights}

    drawing = Drawing(vae, log_weights, WORTH_TRACING, WORTH_COMPILING)

    def draw() -> Any:
        return drawing(x, plan.draws_at_once)

    first = 3 * seconds_of(draw, 3)
    return drawing, first - 3 * seconds_of(draw, 3)


def decoder_products(shape: Shape, plan: Plan) -> Call:
    size = plan.rows_at_once * plan.draws_at_once
    z, h = torch.randn(size, shape.latent), torch.randn(size, shape.hidden)
    hidden, logits = torch.empty(size, shape.hidden), torch.empty(size, shape.pixels)
    first, last = torch.randn(shape.hidden, shape.latent), torch.randn(shape.pixels, shape.hidden)

    def multiply() -> None:
        torch.mm(z, first.t(), out=hidden)
        torch.mm(h, last.t(), out=logits)

    return multiply


def whole_evidence(
    vae: pv.VAE, x: Tensor, plan: Plan, drawing: Drawing, multiply: Call, rounds: int
) -> None:
    """Whole calls of compiled code, each between two halves of its own matrix products."""
    pieces = len(x) // plan.rows_at_once * SAMPLES // plan.draws_at_once
    found = []
    with patch.object(Plan, "drawing", lambda *_: drawing):
        for _ in range(rounds + 1):
            before = seconds_of(multiply, pieces // 2)
            start = time.perf_counter()
            pv.log_evidence(vae, x, SAMPLES, seed=0)
            taken = time.perf_counter() - start
            best = pieces * (before + seconds_of(multiply, pieces // 2)) / 2
            found.append({"ms a row": 1e3 * taken / len(x), "share": best / taken})
    shown = pd.DataFrame(found[1:]).describe().loc[["25%", "50%", "75%"]]
    size = f"{len(x)} rows of {SAMPLES} samples, {rounds} calls"
    say(f"log_evidence, {size}; at least {SHARE}\n{shown.round(3).to_string()}")


def memory_part(asked: argparse.Namespace) -> None:
    lines = [child("memory", *size) for size in SIZES]
    shown = pd.DataFrame(lines).set_index(["rows", "samples"]).round(2)
    say(f"log_evidence, {SMALL.pixels}-{SMALL.hidden}-{SMALL.latent}\n{shown.to_string()}")


def memory_child(rows: str, samples: str) -> dict[str, float]:
    """The most that is resident during a call, less what was before it.

    The kernel's mark of this process alone is read: that of `getrusage` is handed on by the
    process that started this one.
    """
    vae = our_vae(SMALL)
    x = bits(SMALL, int(rows))
    pv.log_evidence(vae, x[:40], 4, max_elements=1, seed=0)  # imports all that tracing needs
    gc.collect()
    give_memory_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # lowers the mark to what is resident
    before, start = kib("VmRSS"), time.perf_counter()
    pv.log_evidence(vae, x, int(samples), seed=0)
    seconds = time.perf_counter() - start
    return {
        "rows": int(rows),
        "samples": int(samples),
        "MiB of data": x.nbytes / 2**20,
        "MiB more at the peak": (kib("VmHWM") - before) / 1024,
        "s": seconds,
    }


def kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def compile_part(asked: argparse.Namespace) -> None:
    lines = []
    for engine in ("traced", "compiled"):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("fresh", "kept"):
                found = child("compile", engine, cache=folder)
                lines.append({"engine": engine, "cache": cache} | found)
    shown = pd.DataFrame(lines).set_index(["engine", "cache"])
    say(f"seconds of the first steps of a process, {MNIST}\n{shown.round(4).to_string()}")


def compile_child(engine: str) -> dict[str, float]:
    step = our_step(SHAPES[MNIST], engine)
    return {
        "first step": seconds_of(step, 1),
        "second step": seconds_of(step, 1),
        "a later step": seconds_of(step, 20),
    }


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "memory": memory_child,
    "compile": compile_child,
}


def child(part: str, *given: Any, cache: str | None = None) -> dict[str, Any]:
    """Runs a part in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__]
    command += ["--threads", str(torch.get_num_threads()), "--child", part, *map(str, given)]
    place = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": cache}
    said = subprocess.run(
        command, env=os.environ | place, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(said.stdout.splitlines()[-1])


def machine() -> pd.Series:
    """Versions and the machine, as it is now."""
    found = {"pyro_vae": importlib.metadata.version("pyro-vae")}
    for module, name in DISTRIBUTIONS.items():
        is_there = importlib.util.find_spec(module) is not None
        found[name] = importlib.metadata.version(name) if is_there else "not installed"
    return pd.Series(
        {
            "Python": platform.python_version(),
            **found,
            "processor": processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads of torch": torch.get_num_threads(),
            "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        }
    )


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def say(text: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "step": step_part,
    "fit": fit_part,
    "epoch": epoch_part,
    "evidence": evidence_part,
    "memory": memory_part,
    "compile": compile_part,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fit-rows", type=int, default=5120)
    parser.add_argument("--rows", type=int, default=60_000, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="of a turn")
    parser.add_argument("--turns", type=int, default=2, help="of each system's epochs")
    parser.add_argument("--evidence-rows", type=int, default=128)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.parts = asked.parts.split(",")
    if unknown := sorted(set(asked.parts) - set(PARTS)):
        parser.error(f"expected parts out of {', '.join(PARTS)}; got {', '.join(unknown)}")
    return asked


def main() -> int:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    with kept_generators():
        if asked.child is not None:
            part, *given = asked.child
            print(json.dumps(CHILDREN[part](*given)))
            return 0
        say(f"the machine\n{machine().to_string()}")
        for name in asked.parts:
            PARTS[name](asked)
    say(f"load average at the end: {' '.join(f'{load:.2f}' for load in os.getloadavg())}")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
