"""Default fits of raw tables: are they as good as simple models, and have they converged?

`python tests/benchmarks/defaults.py tables` prints a line for each table and likelihood, the
mean held-out log p(x) beside that of independent columns, probabilistic PCA and factor analysis,
and exits 1 if a line fails. `scales` does so for made tables whose columns have scales from 1e-8
to 1e12, `counts` for counts, `pyro` for a table that Pyro's own SVI trains after `initialize`.
`converged` trains fits that were called converged three times as long, `nested` compares nested
models, and `latents` counts active units. Each fit is a default call, in the units of the table.
"""

import argparse
import gzip
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import scipy.sparse
import torch
from sklearn import datasets
from sklearn.decomposition import PCA, FactorAnalysis

import pyro_vae as pv

DATA = Path(os.environ.get("PYRO_VAE_DATA", "data"))
SPLITS, SEEDS, LATENTS, NUM_SAMPLES = 3, 2, 2, 500
TOLERANCE = 0.1  # nats per row, by which three times as many steps may change a converged fit
SLACK = 0.3  # nats per row below the simple models


def of_file(name: str, kinds: tuple[str, ...]) -> np.ndarray:
    """The complete rows of a table of HI-VAE, and the columns of some kinds."""
    with gzip.open(DATA / "tabular" / name / "data.csv.gz") as file:
        table = np.genfromtxt(file, delimiter=",")
    types = pd.read_csv(DATA / "tabular" / name / "data_types.csv")["type"]
    table = table[:, [kind in kinds for kind in types]]
    return table[~np.isnan(table).any(1)]


def made(rows: int = 1000, seed: int = 0) -> np.ndarray:
    """Two latents, seven columns: a year, one of 1e6, one of 1e-3, and others."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, 2))
    bent = [np.tanh(2.0 * z[:, :1]), z[:, :1] * z[:, 1:]]
    columns = np.hstack([z, *bent, z @ rng.normal(size=(2, 3))])
    columns += 0.3 * rng.normal(size=columns.shape)
    columns -= columns.min(0) - 0.5
    return columns * [10.0, 1e6, 1e-3, 1.0, 1e-6, 100.0, 1.0] + [2000.0, 0, 0, 0, 0, 0, 0]


TABLES: dict[str, Callable[[], np.ndarray]] = {
    "wine": lambda: datasets.load_wine().data,
    "breast cancer": lambda: datasets.load_breast_cancer().data,
    "diabetes": lambda: datasets.load_diabetes(scaled=False).data,
    "Adult": lambda: of_file("Adult", ("count", "pos"))[:4000],
    "Breast": lambda: of_file("Breast", ("cat", "ordinal", "count"))[:, :9],
    "made": made,
}


def likelihoods_of(x: np.ndarray) -> list[str]:
    return ["Normal", "StudentT"] + (["Gamma", "LogNormal"] if (x > 0.0).all() else [])


def split(x: np.ndarray, seed: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(x))
    held_out = int(share * len(x))
    return x[order[held_out:]], x[order[:held_out]]


def simple_models(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Mean held-out log p(x) of two models of standardised columns, in the units of the data."""
    mean, scale = train.mean(0), train.std(0)
    u, v, volume = (train - mean) / scale, (test - mean) / scale, np.log(scale).sum()
    return {
        "PPCA": PCA(LATENTS).fit(u).score(v) - volume,
        "FA": FactorAnalysis(LATENTS, tol=1e-6, max_iter=5000).fit(u).score(v) - volume,
    }


def fitted(x: np.ndarray, likelihood: str, seed: int, **options: Any) -> tuple[pv.VAE, Any]:
    vae = pv.VAE(x.shape[1], LATENTS, getattr(pv.likelihoods, likelihood)(), seed=seed)
    return vae, pv.fit(vae, x, seed=seed, device="cpu", progress=False, **options)


def log_p(vae: pv.VAE, x: np.ndarray) -> float:
    found = pv.log_evidence(vae, x, num_samples=NUM_SAMPLES, seed=0, progress=False)
    return float(found.log_evidence.mean())


def one_fit(job: tuple[str, str, int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, likelihood, part, seed = job
    train, test = split(TABLES[name](), part)
    start = time.perf_counter()
    vae, history = fitted(train, likelihood, seed)
    seconds = time.perf_counter() - start
    independent = float(vae.baselines(test).independent_columns.mean())
    best, last = history.table.validation_elbo.max(), history.table.validation_elbo
    return {
        "table": name,
        "likelihood": likelihood,
        "split": part,
        "VAE": log_p(vae, test),
        "independent": independent,
        **simple_models(train, test),
        "converged": history.converged,
        "limit": history.stopped == "max_steps",
        "lost": best - last[history.best_epoch],
        "seconds": seconds,
    }


def run(function: Callable[[Any], dict[str, Any]], jobs: list[Any]) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def tables(*, quick: bool) -> bool:
    """Acceptance 1: at least the simple models less 0.3 nats, and above FA in most."""
    parts, seeds = (1, 1) if quick else (SPLITS, SEEDS)
    jobs = [
        (name, likelihood, part, seed)
        for name, load in TABLES.items()
        for likelihood in likelihoods_of(load())
        for part in range(parts)
        for seed in range(seeds)
    ]
    found = pd.DataFrame(run(one_fit, jobs))
    numbers = ["VAE", "independent", "PPCA", "FA", "limit", "lost", "seconds"]
    lines = found.groupby(["table", "likelihood"], sort=False)[numbers].mean()
    lines["holds"] = lines.VAE >= lines[["independent", "PPCA"]].max(axis=1) - SLACK
    lines["above FA"] = lines.VAE > lines.FA
    print(lines.round(2).to_string())
    at_limit = found.groupby("table").limit.mean()
    print(f"\nfits that end at the limit, by table: {at_limit.round(2).to_dict()}")
    is_half = (at_limit > 0.5).sum() <= len(at_limit) / 2
    is_kept = bool((found.lost < SLACK).all())
    return bool(lines.holds.all() and lines["above FA"].mean() > 0.5 and is_half and is_kept)


def of_scales(seed: int) -> np.ndarray:
    """600 rows of a made table, its columns moved and scaled by 1e-8 to 1e12."""
    rng = np.random.default_rng(1000 + seed)
    columns = int(rng.integers(4, 9))
    z = rng.normal(size=(600, 2))
    bent = np.tanh(2.0 * z @ rng.normal(size=(2, columns))) + z @ rng.normal(size=(2, columns))
    x = bent + rng.uniform(0.2, 0.6, columns) * rng.normal(size=bent.shape)
    return 10.0 ** rng.uniform(-8, 12, columns) * (x + rng.choice([0.0, 10.0, 1e4], columns))


def one_of_scales(job: tuple[int, str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    seed, likelihood = job
    train, test = split(of_scales(seed), seed)
    vae, history = fitted(train, likelihood, seed)
    simple = {"independent": float(vae.baselines(test).independent_columns.mean())}
    simple |= simple_models(train, test)
    return {"table": seed, "likelihood": likelihood, "VAE": log_p(vae, test), **simple}


def scales(*, quick: bool) -> bool:
    """Acceptance 1 on tables whose columns have scales from 1e-8 to 1e12."""
    jobs = [(seed, name) for seed in range(2 if quick else 20) for name in ("Normal", "StudentT")]
    found = pd.DataFrame(run(one_of_scales, jobs))
    found["holds"] = found.VAE >= found[["independent", "PPCA"]].max(axis=1) - SLACK
    found["above FA"] = found.VAE > found.FA
    print(found.round(2).to_string(index=False))
    return bool(found.holds.all() and found["above FA"].mean() > 0.5)


def most_expressed(x: np.ndarray, genes: int) -> np.ndarray:
    return x[:, np.sort(np.argsort(-x.mean(0))[:genes])].astype(float)


def zeisel() -> np.ndarray:
    with np.load(DATA / "single_cell" / "zeisel_subset_1464.npz") as file:
        return most_expressed(file["counts"], 200)


def bladder() -> np.ndarray:
    with np.load(DATA / "single_cell" / "mouse_bladder_2100.npz") as file:
        parts = (file["data"], file["indices"], file["indptr"])
        cells = scipy.sparse.csr_matrix(parts, shape=tuple(file["shape"]))
    return most_expressed(cells.toarray(), 100)


COUNTS: dict[str, tuple[Callable[[], np.ndarray], Any, int, float]] = {
    "zeisel": (zeisel, pv.likelihoods.NegativeBinomial(), 4, -418.0),
    "mouse bladder": (bladder, pv.likelihoods.NegativeBinomial(), 4, -201.2),
    "digits": (
        lambda: datasets.load_digits().data,
        pv.likelihoods.Binomial(total_count=16),
        8,
        -90.7,
    ),
    "digits, overdispersed": (
        lambda: datasets.load_digits().data,
        pv.likelihoods.BetaBinomial(total_count=16),
        8,
        -85.7,
    ),
}


def one_of_counts(job: tuple[str, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, seed = job
    load, likelihood, latents, wanted = COUNTS[name]
    train, test = split(load(), 0, 0.2005 if name == "zeisel" else 0.2)
    start = time.perf_counter()
    vae = pv.VAE(train.shape[1], latents, likelihood, seed=seed)
    history = pv.fit(vae, train, seed=seed, device="cpu", progress=False)
    seconds = time.perf_counter() - start
    independent = float(vae.baselines(test).independent_columns.mean())
    found = log_p(vae, test)
    return {
        "data": name,
        "rows": len(train),
        "independent": independent,
        "VAE": found,
        "prototype": wanted,
        "converged": history.converged,
        "seconds": seconds,
    }


def counts(*, quick: bool) -> bool:
    """Acceptance 1 on counts: at least the figures of the prototype, in the mean over seeds."""
    jobs = [(name, seed) for name in COUNTS for seed in range(1 if quick else 4)]
    found = pd.DataFrame(run(one_of_counts, jobs))
    print(found.round(2).to_string(index=False))
    lines = found.groupby("data")[["VAE", "prototype"]].mean()
    return bool((lines.VAE >= lines.prototype).all())


def pyros_own(*, quick: bool) -> bool:  # noqa: ARG001
    """Acceptance 1 for Pyro's own SVI, which trains a raw table after `initialize`."""
    train, test = split(made(), 0)
    vae = pv.VAE(train.shape[1], LATENTS, pv.likelihoods.Normal(), seed=0).initialize(train)
    optimizer, elbo = pyro.optim.Adam({"lr": 5e-3}), pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(vae.model, vae.guide, optimizer, elbo)
    rows = torch.as_tensor(train)
    pyro.set_rng_seed(0)
    for _ in range(300):
        for index in torch.randperm(len(rows)).split(128):
            svi.step(rows[index])
    found, simple = log_p(vae, test), simple_models(train, test)
    print({"VAE": round(found, 2)} | {name: round(value, 2) for name, value in simple.items()})
    return found >= simple["PPCA"] - SLACK


def one_converged(job: tuple[str, str, int, int]) -> dict[str, Any] | None:
    """The change of held-out log p(x) of a fit called converged, trained three times as long."""
    torch.set_num_threads(1)
    name, likelihood, part, seed = job
    train, test = split(TABLES[name](), part)
    vae, history = fitted(train, likelihood, seed)
    if history.converged is not True:
        return None
    batches = -(-(len(train) - int(0.1 * len(train))) // 128)
    steps = 3 * len(history) * batches
    longer, _ = fitted(train, likelihood, seed, max_steps=steps, until_converged=False)
    before, after = (pv.log_evidence(v, test, NUM_SAMPLES, seed=0) for v in (vae, longer))
    change = (after.log_evidence - before.log_evidence).to_numpy()
    return {
        "table": name,
        "likelihood": likelihood,
        "split": part,
        "steps": steps // 3,
        "change": change.mean(),
        "error": change.std(ddof=1) / np.sqrt(len(change)),
        "reason": history.reason,
    }


def converged(*, quick: bool) -> bool:
    """Acceptance 3: 19 of 20 converged fits change by under 0.1 nats in three times the steps."""
    jobs = [
        (name, likelihood, part, part)
        for part in range(1 if quick else 8)
        for name, load in TABLES.items()
        for likelihood in likelihoods_of(load())
    ]
    lines: list[dict[str, Any]] = []
    for line in run(one_converged, jobs[: 6 if quick else None]):
        lines += [line] if line is not None else []
        if len(lines) == 20:
            break
    found = pd.DataFrame(lines)
    found["holds"] = found.change.abs() < TOLERANCE
    print(found.round(3).to_string(index=False))
    return bool(found.holds.mean() >= 0.95)


def latent_rows(rows: int, latents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictors of 6 columns from so many latents, and their noise-free part."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(100 + seed).normal(size=(latents, 6))
    return rng.normal(size=(rows, latents)) @ weights, rng.normal(size=(rows, 6))


def drawn(kind: str, seed: int) -> np.ndarray:
    """3000 rows of data: from the smaller model of a pair, or from the larger one."""
    rng = np.random.default_rng(200 + seed)
    predictor, noise = latent_rows(3000, 4 if kind == "4 latents" else 2, seed)
    rate = np.exp(1.5 + 0.4 * predictor / np.sqrt(2))
    share = 1.0 / (1.0 + np.exp(-0.7 * predictor))
    data: dict[str, Callable[[], np.ndarray]] = {
        "Normal": lambda: 50.0 + 10.0 * (predictor + noise),
        "2 latents": lambda: 50.0 + 10.0 * (predictor + 0.5 * noise),
        "4 latents": lambda: 50.0 + 10.0 * (predictor + 0.5 * noise),
        "StudentT": lambda: 50.0 + 10.0 * (predictor + rng.standard_t(3.0, size=noise.shape)),
        "Poisson": lambda: rng.poisson(rate).astype(float),
        "NegativeBinomial": lambda: rng.negative_binomial(4.0, 4.0 / (4.0 + rate)).astype(float),
        "Binomial": lambda: rng.binomial(20, share).astype(float),
        "BetaBinomial": lambda: rng.binomial(
            20, rng.beta(5.0 * share + 0.1, 5.0 * (1.0 - share) + 0.1)
        ).astype(float),
    }
    return data[kind]()


PAIRS = {
    "StudentT": "Normal",
    "NegativeBinomial": "Poisson",
    "BetaBinomial": "Binomial",
    "4 latents": "2 latents",
}


def model_of(name: str, seed: int) -> pv.VAE:
    if name.endswith("latents"):
        return pv.VAE(6, int(name[0]), pv.likelihoods.Normal(), seed=seed)
    options = {"total_count": 20} if name in {"Binomial", "BetaBinomial"} else {}
    return pv.VAE(6, LATENTS, getattr(pv.likelihoods, name)(**options), seed=seed)


def one_pair(job: tuple[str, str, int]) -> dict[str, Any]:
    """The paired difference of the larger from the smaller model, on 2000 rows held out."""
    torch.set_num_threads(1)
    larger, source, seed = job
    x = drawn(source, seed)
    scores = []
    for name in (PAIRS[larger], larger):
        vae = model_of(name, seed)
        pv.fit(vae, x[:1000], seed=seed, device="cpu", progress=False)
        found = pv.log_evidence(vae, x[1000:], num_samples=NUM_SAMPLES, seed=0, progress=False)
        scores.append(found.log_evidence.to_numpy())
    difference = scores[1] - scores[0]
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return {"larger": larger, "data": source, "difference": difference.mean(), "error": error}


def nested(*, quick: bool) -> bool:
    """Acceptance 2: a larger model is level on data of the smaller, and found on its own."""
    jobs = [
        (larger, source, seed)
        for larger, smaller in PAIRS.items()
        for source in (smaller, larger)
        for seed in range(2 if quick else 20)
    ]
    found = pd.DataFrame(run(one_pair, jobs))
    found["is own"] = found.larger == found.data
    found["small"] = found.difference.abs() < 0.1
    found["level"] = found.difference.abs() < np.maximum(2.0 * found.error, 0.05)
    found["found"] = found.difference > 2.0 * found.error
    columns = ["difference", "error", "small", "level", "found"]
    lines = found.groupby(["larger", "is own"])[columns].mean()
    print(lines.round(3).to_string())
    print(found[~found["is own"] & ~found.small].round(3).to_string(index=False))
    of_smaller, own = lines.xs(False, level=1), lines.xs(True, level=1)
    is_level = (of_smaller.small == 1.0).all() and (of_smaller.level >= 0.9).all()
    return bool(is_level and (own.found >= 0.95).all())


def one_of_latents(seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    predictor, noise = latent_rows(1000, 3, seed)
    x = 1e3 * (predictor + 0.5 * noise)
    vae = pv.VAE(6, 3, pv.likelihoods.Normal(), seed=seed)
    pv.fit(vae, x, seed=seed, device="cpu", progress=False)
    active = pv.diagnostics.active_units(vae, x, seed=0).active
    return {"seed": seed, "active": int(active.sum())}


def latents(*, quick: bool) -> bool:
    """Acceptance 4: of 3 true latents 3 are active in 19 of 20 default fits."""
    found = pd.DataFrame(run(one_of_latents, list(range(4 if quick else 20))))
    print(f"active units of 3: {found.active.value_counts().to_dict()}")
    return bool((found.active == 3).mean() >= 0.95)


PARTS: dict[str, Callable[..., bool]] = {
    "tables": tables,
    "scales": scales,
    "counts": counts,
    "pyro": pyros_own,
    "converged": converged,
    "nested": nested,
    "latents": latents,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {[*PARTS]}")
    parser.add_argument("--quick", action="store_true", help="one split and one seed")
    args = parser.parse_args()
    passed = {}
    for name in args.parts or PARTS:
        print(f"\n{name}")
        passed[name] = PARTS[name](quick=args.quick)
    print("\n" + ", ".join(f"{k}: {'holds' if v else 'FAILS'}" for k, v in passed.items()))
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
