"""Is log p(x) right within its error, for good and bad guides?

`linear` compares `log_evidence` with the exact value on linear Gaussian programs whose guide is
exact, half as wide, or shifted: the share of unmarked rows within 3 reported errors, and over many
seeds the ratio of the true root mean square error to the reported one. `quadrature` does so for
fitted models with one or two latents, against an integral. `models` fits four models of images and
prints the share of rows whose Pareto k stays over its limit, and the time beside that of the guide
alone. The exit code is 1 if a line misses its threshold.
"""

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import datasets
from pyro_vae.engine.running import seeded

sys.path.append(str(Path(__file__).parents[1]))
from programs import LinearGaussian  # noqa: E402
from quadrature import grid, square  # noqa: E402

DATA = Path(os.environ.get("PYRO_VAE_DATA", "data"))
LATENTS, NOISE = (2, 8, 32), 0.5
GUIDES = {"exact": (1.0, 0.0), "half as wide": (0.5, 0.0), "shifted": (1.0, 0.5)}


class Wrong(LinearGaussian):
    """A linear Gaussian program whose guide has a factor on its scale, and a shift in its s.d."""

    def __init__(self, weight: Tensor, factor: float, shift: float) -> None:
        super().__init__(weight, factor=factor)
        self.shift = shift

    def guide(self, x: Tensor) -> None:
        mean, covariance = self.posterior(x)
        mean = mean + self.shift * covariance.diagonal().sqrt()
        scale_tril = torch.linalg.cholesky(covariance) * self.factor
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale_tril))


def linear(latents: int, guide: str, rows: int) -> tuple[Wrong, Tensor]:
    """A program and rows drawn from it."""
    generator = torch.Generator().manual_seed(latents)
    normal: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    program = Wrong(torch.randn(latents + 4, latents, **normal), *GUIDES[guide])
    noise = NOISE * torch.randn(rows, latents + 4, **normal)
    x = torch.randn(rows, latents, **normal) @ program.weight.T + noise
    return program, x.detach()


def errors(
    program: nn.Module, x: Tensor, exact: np.ndarray, seed: int, **options: Any
) -> pd.DataFrame:
    """The error of log p(x), the reported one, k and whether k is over its limit, a line a row."""
    found = pv.log_evidence(program, x, seed=seed, progress=False, **options)
    k = found["pareto_k"].to_numpy()
    return pd.DataFrame(
        {
            "error": found["log_evidence"].to_numpy() - exact,
            "mcse": found["mcse"].to_numpy(),
            "k": k,
            "is_marked": ~(k <= found.attrs["good_k"]),
            "refined": found["refined"].to_numpy(),
        }
    )


def judged(lines: pd.DataFrame) -> dict[str, float]:
    """What the acceptance asks of the rows of all repeats."""
    good = lines[~lines.is_marked]
    near, far = (good.error.abs() <= 3 * good.mcse + 1e-6), good[good.k >= 0.5]
    sure = good[good.k < 0.5]

    def ratio(part: pd.DataFrame) -> float:
        if len(part) < 100 or part.mcse.max() < 1e-6:  # pairs of independent rows are too few
            return math.nan
        return math.sqrt(part.error.pow(2).mean() / part.mcse.pow(2).mean())

    return {
        "refined": lines.refined.mean(),
        "marked": lines.is_marked.mean(),
        "within 3": near.mean(),
        "ratio, k < 0.5": ratio(sure),
        "ratio, k to the limit": ratio(far),
        "largest error": good.error.abs().max(),
    }


def holds(line: pd.Series) -> bool:
    low, high = line["ratio, k < 0.5"], line["ratio, k to the limit"]
    is_right = line["within 3"] >= 0.99
    return bool(is_right and not (low < 0.9 or low > 1.1) and not (high < 0.7 or high > 1.3))


def one_linear(job: tuple[int, str, int, int]) -> pd.DataFrame:
    torch.set_num_threads(1)
    latents, guide, rows, seed = job
    program, x = linear(latents, guide, rows)
    return errors(program, x, program.log_evidence(x), seed).assign(latents=latents, guide=guide)


def of_linear(*, quick: bool) -> bool:
    """Acceptance 1."""
    repeats, rows = (4, 40) if quick else (200, 20)
    jobs = [(d, g, rows, seed) for d in LATENTS for g in GUIDES for seed in range(repeats)]
    found = pd.concat(run(one_linear, jobs))
    lines = pd.DataFrame(
        {key: judged(part) for key, part in found.groupby(["latents", "guide"])}
    ).T
    print(lines.round(4).to_string())
    pooled = judged(found[found.guide != "exact"])
    print({name: round(value, 4) for name, value in pooled.items()})
    exact = lines.xs("exact", level=1)
    is_exact = bool((exact["largest error"] < 1e-6).all())
    return is_exact and holds(pd.Series(pooled)) and bool((lines["within 3"] >= 0.99).all())


def run(function: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, jobs, chunksize=max(1, len(jobs) // 40)))


ONE, TWO = torch.ones(1), torch.ones(2)
PRIORS: dict[str, tuple[Any, str]] = {
    "normal, 1": (1, "Bernoulli"),
    "normal, 2": (2, "Poisson"),
    "HalfNormal, 1": (dist.HalfNormal(ONE).to_event(1), "Poisson"),
    "HalfNormal, 2": (dist.HalfNormal(TWO).to_event(1), "Normal"),
    "Gamma, 1": (dist.Gamma(2.0 * ONE, 1.0).to_event(1), "Bernoulli"),
    "Gamma, 2": (dist.Gamma(2.0 * TWO, 1.0).to_event(1), "Poisson"),
}


def integral(vae: pv.VAE, x: Tensor, size: int = 301) -> np.ndarray:
    """log p(x) of each row by quadrature over one or two latents, in float64."""
    vae = vae.double().eval()
    prior = vae.prior()
    line = grid(prior.support, 2001 if prior.event_shape == (1,) else size)
    points, weights = line.points.clamp(-50.0, 50.0)[:, None], line.weights
    if prior.event_shape == (2,):
        points, weights = (part.flatten(0, 1) for part in square(line))
        points = points.clamp(-50.0, 50.0)
    found = []
    with torch.no_grad(), warnings.catch_warnings():
        log_prior = prior.log_prob(points).nan_to_num(-math.inf)[:, None]
        weight = weights.reshape(-1, 1).log()
        likelihood = vae.decode(points[:, None])
        for row in x.double():
            log_joint = likelihood.log_prob(row) + log_prior + weight
            found.append(torch.logsumexp(log_joint.nan_to_num(-math.inf), 0))
    vae.float()
    return torch.cat(found).numpy()


def one_integral(job: tuple[str, int], max_steps: int = 1000) -> pd.DataFrame:
    torch.set_num_threads(1)
    name, seeds = job
    prior, likelihood = PRIORS[name]
    size = prior if isinstance(prior, int) else prior.event_shape[0]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, size, generator=generator).abs()
    predictor = z @ torch.randn(size, 5, generator=generator)
    noise = torch.randn(400, 5, generator=generator)
    x = {
        "Bernoulli": lambda: (predictor + noise > 0.5).float(),
        "Poisson": lambda: torch.poisson((0.5 * predictor).exp(), generator=generator),
        "Normal": lambda: predictor + 0.5 * noise,
    }[likelihood]()
    vae = pv.VAE(5, prior, getattr(pv.likelihoods, likelihood)(), seed=0)
    pv.fit(vae, x[:300], seed=0, max_steps=max_steps, device="cpu", progress=False)
    exact = integral(vae, x[300:])
    parts = [errors(vae, x[300:], exact, seed) for seed in range(seeds)]
    return pd.concat(parts).assign(model=f"{likelihood}, {name}")


def of_quadrature(*, quick: bool) -> bool:
    """Acceptance 2, the first part."""
    jobs = [(name, 2 if quick else 20) for name in PRIORS]
    found = pd.concat(run(one_integral, jobs))
    lines = pd.DataFrame({key: judged(part) for key, part in found.groupby("model")}).T
    print(lines.round(4).to_string())
    pooled = judged(found)
    print({name: round(value, 4) for name, value in pooled.items()})
    return holds(pd.Series(pooled)) and bool((lines["within 3"] >= 0.99).all())


def digits() -> tuple[Tensor, Tensor]:
    x = torch.tensor(load_digits().data).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[359:]], x[order[:359]]


def mnist() -> tuple[Tensor, Tensor]:
    parts = (datasets.load(DATA / "mnist" / f"mnist_{p}.npz").x for p in ("train", "test"))
    train, test = (torch.as_tensor(part) for part in parts)
    with seeded(0):
        return train, datasets.binarize(test[:200])


MODELS: dict[str, tuple[Callable[[], Any], Any, Any, int, float]] = {
    "digits, Binomial, Normal, 10": (
        digits,
        pv.likelihoods.Binomial(total_count=16),
        pv.posteriors.Normal(),
        10,
        0.05,
    ),
    "digits, BetaBinomial, MultivariateNormal, 10": (
        digits,
        pv.likelihoods.BetaBinomial(total_count=16),
        pv.posteriors.MultivariateNormal(),
        10,
        0.03,
    ),
    "digits, BetaBinomial, MultivariateNormal, 6": (
        digits,
        pv.likelihoods.BetaBinomial(total_count=16),
        pv.posteriors.MultivariateNormal(),
        6,
        0.03,
    ),
    "MNIST, Bernoulli, Normal, 50": (
        mnist,
        pv.likelihoods.Bernoulli(),
        pv.posteriors.Normal(),
        50,
        0.10,
    ),
}


def one_model(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    load, likelihood, posterior, latents, limit = MODELS[name]
    train, test = load()
    options: dict[str, Any] = {}
    networks: dict[str, Any] = {}
    if load is mnist:
        options = {"transform": datasets.binarize, "max_epochs": 8, "lr": 1e-3, "validation": None}
        networks = {k: pv.networks.MLP(200, activation=nn.Tanh) for k in ("encoder", "decoder")}
    vae = pv.VAE(train.shape[1], latents, likelihood, posterior, seed=0, **networks)
    pv.fit(vae, train, seed=0, device="cpu", progress=False, **options)
    line: dict[str, Any] = {"model": name, "rows": len(test), "limit": limit}
    for label, refine in (("guide", False), ("refined", "auto")):
        start = time.process_time()
        found = pv.log_evidence(vae, test, seed=0, refine=refine, progress=False)
        seconds = time.process_time() - start
        over = float(found.is_over().mean())
        line |= {f"log p, {label}": float(found["log_evidence"].mean())}
        line |= {f"over, {label}": over, f"seconds, {label}": seconds}
    many = pv.log_evidence(vae, test[:50], 100_000, seed=1, refine=False, progress=False)
    few = found.isel(datum=slice(50))
    line["50 rows, refined"] = float(few["log_evidence"].mean())
    line["50 rows, 10^5 draws of the guide"] = float(many["log_evidence"].mean())
    ais = pv.log_evidence(vae, test[:50], method="ais", seed=2, progress=False)
    line["50 rows, AIS"] = float(ais["log_evidence"].mean())
    line["AIS mcse"] = float(np.sqrt(np.square(ais["mcse"]).sum()) / 50)
    return line


def of_models(*, quick: bool) -> bool:
    """Acceptance 2, the second part."""
    names = [name for name in MODELS if not (quick and "MNIST" in name)]
    lines = pd.DataFrame(run(one_model, names)).set_index("model")
    print(lines.T.round(3).to_string())
    return bool((lines["over, refined"] <= lines["limit"]).all())


PARTS = {"linear": of_linear, "quadrature": of_quadrature, "models": of_models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {[*PARTS]}")
    parser.add_argument("--quick", action="store_true", help="a few seeds")
    args = parser.parse_args()
    passed = {}
    for name in args.parts or PARTS:
        print(f"\n{name}")
        passed[name] = PARTS[name](quick=args.quick)
    print("\n" + ", ".join(f"{k}: {'holds' if v else 'FAILS'}" for k, v in passed.items()))
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
