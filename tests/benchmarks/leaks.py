"""Whether memory grows with steps or with fits: each engine, on a VAE of the size of a table.

The resident memory is read after the first tenth of the steps, and after the last one; of the
fits, at half of them and after the last.

    python tests/benchmarks/leaks.py --steps 100000 --fits 200
"""

import argparse
import gc
import os
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from peers import SHAPES, TABLE, Call, our_step

import pyro_vae as pv
from pyro_vae.engine.running import kept_generators

ENGINES = ("eager", "traced", "compiled")
MOST = 4.0  # KiB a fit


def resident() -> float:
    """KiB of memory that this process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def take(step: Call, number: int) -> None:
    for _ in range(number):
        step()


def growth(engine: str, steps: int) -> dict[str, float]:
    step, early = our_step(SHAPES[TABLE], engine), max(1, steps // 10)
    take(step, early)
    before, start = resident(), time.perf_counter()
    take(step, steps - early)
    seconds, after = time.perf_counter() - start, resident()
    return {
        f"MiB after {early}": before / 1024,
        f"MiB after {steps}": after / 1024,
        "KiB a 1000 steps": 1000 * (after - before) / (steps - early),
        "ms a step": 1e3 * seconds / (steps - early),
    }


def growth_of_fits(engine: str, fits: int) -> float:
    """KiB that a fit leaves, over the second half of the fits."""
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))

    def fit() -> None:
        vae = pv.VAE(8, 2, pv.likelihoods.Normal(), None, pv.networks.MLP(8), seed=0)
        options = {"max_epochs": 2, "warmup": 0, "device": "cpu", "seed": 0, "progress": False}
        pv.fit(vae, x, engine=engine, **options)

    take(fit, fits - fits // 2)
    before = resident()
    take(fit, fits // 2)
    return (resident() - before) / (fits // 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    if min(asked.steps, asked.fits) < 2:
        parser.error(f"expected two or more; got {asked.steps} steps and {asked.fits} fits")
    torch.set_num_threads(asked.threads)
    with kept_generators():
        table = {engine: growth(engine, asked.steps) for engine in asked.engines}
    print(f"{TABLE}\n{pd.DataFrame(table).T.round(3).to_string()}")
    left = {e: growth_of_fits(e, asked.fits) for e in asked.engines if e != "compiled"}
    print(pd.Series(left, name="KiB a fit").round(1).to_string())
    return int(max(left.values(), default=0.0) > MOST)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
