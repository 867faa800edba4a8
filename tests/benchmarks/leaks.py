"""Whether memory grows while steps are taken: each engine, on a VAE of the size of a table.

The resident memory is read after the first tenth of the steps, and after the last one.

    python tests/benchmarks/leaks.py --steps 100000
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

from pyro_vae.engine.running import kept_generators

ENGINES = ("eager", "traced", "compiled")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    if asked.steps < 2:
        parser.error(f"expected two steps or more; got {asked.steps}")
    torch.set_num_threads(asked.threads)
    with kept_generators():
        table = {engine: growth(engine, asked.steps) for engine in asked.engines}
    print(f"{TABLE}\n{pd.DataFrame(table).T.round(3).to_string()}")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
