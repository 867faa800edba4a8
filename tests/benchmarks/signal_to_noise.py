"""The signal-to-noise ratio of gradients against K, and its slope, at the state of the example.

Linear-Gaussian model and guide of Rainforth et al. (2018), 5 dims, gradients of one row (another
for each seed) of 1024, every parameter moved from their optimum by N(0, 0.02^2), float64. The
ratio is the median over parameters of |mean| / s.d., the mean over perturbation seeds.

Slopes of log SNR on log K are fitted by least squares to the mean over seeds, at the K where it
stands three times above the noise floor of its repeats; the error is the jackknife's over seeds.
"large K" is the slope of the last four of those K. PIWAE's encoder is that of MIWAE(8, K / 8).

Targets: IWAE's decoder 0.5 +- 0.1, DReG's encoder above 0, IWAE's encoder falling, at large K
nearer to -0.5 than to 0.

    OMP_NUM_THREADS=1 python tests/benchmarks/signal_to_noise.py
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import pyro_vae as pv

EXAMPLE = Path(__file__).parents[2] / "examples" / "signal_to_noise.py"
ABOVE_FLOOR, AT_THE_END = 3.0, 4
ESTIMATORS: dict[str, tuple[Callable[[int], pv.elbos.Estimator], list[int]]] = {
    "IWAE(K)": (pv.elbos.IWAE, [2**i for i in range(9)]),
    "DReG(K)": (pv.elbos.DReG, [4**i for i in range(5)]),
    "STL(K)": (pv.elbos.STL, [4**i for i in range(4)]),
    "PIWAE(8, K / 8)": (lambda K: pv.elbos.PIWAE(8, K // 8), [8, 32, 128]),
}


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("signal_to_noise_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def curves(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """The ratio of each estimator and part, lines K, columns seeds."""
    groups = table["snr"].groupby(["estimator", "part"], sort=False)
    return {
        name: values.droplevel(["estimator", "part"]).unstack("seed").sort_index()
        for name, values in groups
    }


def slope(curve: pd.DataFrame) -> tuple[float, float]:
    """The slope of the mean over seeds, and its jackknife standard error."""
    without = np.array([_slope(curve.drop(columns=seed)) for seed in curve])
    count = len(without)
    return _slope(curve), ((count - 1) / count * ((without - without.mean()) ** 2).sum()) ** 0.5


def _slope(curve: pd.DataFrame) -> float:
    if len(curve) < 2:
        return np.nan
    return float(np.polyfit(np.log(curve.index), np.log(curve.mean(axis=1)), 1)[0])


def table_of(by_name: dict[tuple[str, str], pd.DataFrame], floor: float) -> pd.DataFrame:
    lines = {}
    for (name, part), curve in by_name.items():
        for K, values in curve.iterrows():
            error = values.std(ddof=1) / len(values) ** 0.5
            lines[name, part, K] = {"snr": values.mean(), "se": error, "floor": floor}
    return pd.DataFrame(lines).T.rename_axis(["estimator", "part", "K"])


def slopes_of(by_name: dict[tuple[str, str], pd.DataFrame], floor: float) -> pd.DataFrame:
    lines = {}
    for name, curve in by_name.items():
        kept = curve[curve.mean(axis=1) > ABOVE_FLOOR * floor]
        end = kept.iloc[-AT_THE_END:]
        (every, every_se), (last, last_se) = slope(kept), slope(end)
        lines[name] = {
            "slope": every,
            "slope_se": every_se,
            "K": extent(kept),
            "large K": last,
            "large K_se": last_se,
            "at K": extent(end),
        }
    return pd.DataFrame(lines).T.rename_axis(["estimator", "part"])


def extent(curve: pd.DataFrame) -> str:
    return f"{curve.index[0]} to {curve.index[-1]}" if len(curve) else "none"


def failures(slopes: pd.DataFrame) -> list[str]:
    decoder, encoder = slopes.loc[("IWAE(K)", "decoder")], slopes.loc[("IWAE(K)", "encoder")]
    targets = {
        "IWAE's decoder: slope 0.5 +- 0.1": abs(decoder["slope"] - 0.5) <= 0.1,
        "DReG's encoder: slope above 0": slopes.loc[("DReG(K)", "encoder"), "slope"] > 0,
        "IWAE's encoder: falling": encoder["slope"] + 2 * encoder["slope_se"] < 0,
        "IWAE's encoder: toward -0.5 at large K": abs(encoder["large K"] + 0.5) < 0.25,
    }
    return [target for target, reached in targets.items() if not reached]


def say(text: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-repeats", type=int, default=100_000)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=5)
    parser.add_argument("--distance", type=float, default=0.02, help="s.d. of the perturbation")
    parser.add_argument("--output", type=Path, default=Path("signal_to_noise.csv"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    example, start = load_example(), time.process_time()
    options = {"num_repeats": asked.num_repeats, "dim": asked.dim, "distance": asked.distance}
    tables = []
    for seed in range(asked.num_seeds):
        for name, (make, num_particles) in ESTIMATORS.items():
            tables.append(example.signal_to_noise({name: make}, num_particles, [seed], **options))
        pd.concat(tables).to_csv(asked.output)
        say(f"seed {seed}: {time.process_time() - start:.0f} s of CPU so far")
    by_name, floor = curves(pd.concat(tables)), example.floor(asked.num_repeats)
    slopes = slopes_of(by_name, floor)
    say(f"{vars(asked)}, torch {torch.__version__}")
    print(table_of(by_name, floor).to_string(float_format="{:.4f}".format))
    print(slopes.to_string(float_format="{:.3f}".format))
    missed = failures(slopes)
    say("passed" if not missed else f"FAILED: {missed}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
