"""Does `compare` find the number of latents, and are two guides of one model equal?"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import pyro_vae as pv

sys.path.append(str(Path(__file__).parents[1]))
from programs import LinearGaussian  # noqa: E402

TRUE = 3
SIZES = range(1, 6)
SHARE = 0.95  # 19 of 20


def data(seed: int, columns: int = 10, rows: int = 500) -> tuple[Tensor, Tensor]:
    """Rows of probabilistic PCA with 3 latents: to fit models to, and held out from these fits."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, TRUE, generator=generator, dtype=torch.float64)
    z = torch.randn(2 * rows, TRUE, generator=generator, dtype=torch.float64)
    noise = torch.randn(2 * rows, columns, generator=generator, dtype=torch.float64)
    return (z @ weight.T + 0.7 * noise).split(rows)


def fitted(x: Tensor, latents: int, factor: float = 1.0) -> LinearGaussian:
    """The maximum likelihood (Tipping & Bishop, 1999); the guide is the posterior times factor."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    variance = values[:-latents].mean()
    weight = vectors[:, -latents:] * (values[-latents:] - variance).sqrt()
    return LinearGaussian(weight, noise=float(variance.sqrt()), factor=factor)


def ranking(
    programs: dict[str, LinearGaussian], x: Tensor, seed: int, num_samples: int = 1000
) -> pd.DataFrame:
    """The ranking of programs, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pv.compare(programs, x, num_samples, seed=seed, progress=False)


def number_of_latents(seed: int, factor: float = 1.0, num_samples: int = 1000) -> dict[str, float]:
    """Whether the smallest model within error, and the best one, have the true number."""
    train, test = data(seed)
    programs = {str(size): fitted(train, size, factor) for size in SIZES}
    table = ranking(programs, test, seed, num_samples)
    within = table.index[table["within_error"]].astype(int)
    return {"smallest": within.min() == TRUE, "best": table.index[0] == str(TRUE)}


def two_guides(seed: int, factor: float = 0.5, rows: int = 500) -> dict[str, float]:
    """Whether a model with its exact posterior and with another guide are equal within error."""
    train, test = data(seed, rows=rows)
    programs = {"exact": fitted(train, TRUE), "other": fitted(train, TRUE, factor)}
    table = ranking(programs, test, seed)
    last = table.iloc[-1]
    return {
        "equal": table["within_error"].all(),
        "in errors": last["difference"] / last["difference_se"],
        "difference": last["difference"],
        "marked": table["pareto_k_over"]["other"],
    }


def far_from_zero(seed: int) -> dict[str, float]:
    """Whether log p(x) of about -900 and +900 gives weights as in any other units, and no warning.

    A change of units by a factor c adds the same number to log p(x) of every row.
    """
    train, test = data(seed, columns=60, rows=300)
    weights = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shift in (-900.0, 0.0, 900.0):
            programs = {str(size): fitted(train, size) for size in SIZES}
            level = programs[str(TRUE)].log_evidence(test).mean()
            unit = float(np.exp((level - shift) / 60))
            programs = {str(size): fitted(unit * train, size) for size in SIZES}
            table = pv.compare(programs, unit * test, 10, seed=seed, progress=False)
            assert abs(table["log_evidence"].max() - shift) < 50
            weights.append(table["weight"].reindex(list(programs)).to_numpy())
    is_same = np.allclose(weights[0], weights[1], atol=0.01)
    return {"same weights": is_same and np.allclose(weights[2], weights[1], atol=0.01)} | {
        "largest weight": weights[0].max()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Five seeds a line.")
    seeds = range(5 if parser.parse_args().quick else 20)
    lines = {
        "number of latents, exact guides": number_of_latents,
        "number of latents, guides half as wide": lambda seed: number_of_latents(seed, 0.5),
        "two guides, exact and 0.8 times as wide": lambda seed: two_guides(seed, 0.8),
        "two guides, exact and half as wide": two_guides,
        "log p(x) of -900, 0 and 900": far_from_zero,
    }
    is_missed = False
    for label, line in lines.items():
        start = time.perf_counter()
        found = pd.DataFrame([line(seed) for seed in seeds]).astype(float)
        share = found.iloc[:, 0].mean()
        is_missed |= share < SHARE
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.mean().items())
        print(f"{label}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"Expected the first number of each line to be at least {SHARE}.")
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
