"""Are log-densities in float32 right at any parameters and data, and what does that cost?

For each density that a named member uses: the largest error of log p and of its derivatives over
the points of `density_cases.py`, in nats (in nats per 1000 nats where log p is larger), beside
those of torch's own class. No error may exceed 1e-3. `--cells` prints one line for each value of
the parameters. The last columns are the time of a density and its gradient, for 128 rows of 784
columns and 1 or 10 draws, in nanoseconds an element; they have no threshold.

    python tests/benchmarks/densities.py
    python tests/benchmarks/densities.py --cells --only Poisson
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from density_cases import LAWS, Errors, errors_of

from pyro_vae.distributions.densities import scored

LIMIT = 1e-3
ROWS, COLUMNS, REPEATS = 128, 784, 7
SHARED = {"Normal": "scale", "Laplace": "scale", "LogNormal": "scale", "Gamma": "concentration"}


def as_it_is(kind: Any) -> Any:
    return kind


def worst(errors: Errors) -> tuple[float, float]:
    return float(errors.error.max()), max(float(slope.max()) for slope in errors.slopes.values())


def cells(name: str) -> pd.DataFrame:
    """The largest errors of each value of the parameters, over the data."""
    ours, torchs = errors_of(name), errors_of(name, as_it_is)
    table = pd.DataFrame(ours.points)
    parameters = [column for column in table if not column.startswith("value")]
    table["log p"], table["error"], table["torch's"] = ours.log_prob, ours.error, torchs.error
    for key, slope in ours.slopes.items():
        table[f"d {key}"] = slope
    worst_of = {c: "max" for c in table if c not in parameters and not c.startswith("value")}
    return table.groupby(parameters, sort=False).agg(worst_of).reset_index()


def nanoseconds(name: str, mended: Callable[[Any], Any], draws: int) -> float:
    """The time of log p and its gradient, by element, with shared and fixed parameters as such."""
    kind, law = LAWS[name]
    point = list(law.points())[len(list(law.points())) // 2]
    shared = {SHARED.get(name, ""), "total_count"} | (
        {"df", "scale"} if name == "StudentT" else set()
    )
    sizes = {key: (COLUMNS,) if key in shared else (draws, ROWS, COLUMNS) for key in point}
    tensors = {
        key: torch.full((ROWS, COLUMNS) if key.startswith("value") else sizes[key], number)
        for key, number in point.items()
    }
    for key, tensor in tensors.items():
        tensor.requires_grad_(not key.startswith("value") and key not in law.fixed)
    values = [tensor for key, tensor in tensors.items() if key.startswith("value")]
    value = values[0] if len(values) == 1 else torch.stack(values, -1)
    parameters: dict[str, Tensor] = {k: v for k, v in tensors.items() if not k.startswith("value")}
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        law.make(mended(kind), **parameters).log_prob(value).sum().backward()
        best = min(best, time.perf_counter() - start)
    return 1e9 * best / (draws * ROWS * COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(LAWS), default=list(LAWS))
    parser.add_argument("--cells", action="store_true", help="print each value of the parameters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines, is_right = [], True
    for name in arguments.only:
        if arguments.cells:
            print(f"\n{name}\n{cells(name).to_string(index=False, float_format='{:.3g}'.format)}")
        ours, torchs = worst(errors_of(name)), worst(errors_of(name, as_it_is))
        is_right = is_right and max(ours) < LIMIT
        times = [
            nanoseconds(name, kind, draws) for draws in (1, 10) for kind in (scored, as_it_is)
        ]
        lines.append([name, len(list(LAWS[name][1].points())), *ours, *torchs, *times])
    columns = ["density", "points", "error", "of slopes", "torch's", "of slopes"]
    table = pd.DataFrame(lines, columns=[*columns, "ns, 1 draw", "torch's", "ns, 10", "torch's"])
    print(table.to_string(index=False, float_format="{:.3g}".format))
    if not is_right:
        print(f"An error exceeds {LIMIT} nats.")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
