"""Binarised MNIST: pyro_vae, a PyTorch loop written by hand, and plain pyro.infer.SVI.

The 784-200-200-50 tanh VAE under dynamic binarisation, Adam 1e-3, minibatches of 128, on the CPU.
All three optimise the ELBO at one draw of z from the same weights, batches and noise.

Part 1: over 200 steps the losses agree to 1e-5, relative.
Part 2: after the epochs the mean test -log p(x) of paired seeds differs by at most 0.4 nats; and
the seconds of an epoch of each, the systems in turn within each seed.

    PYRO_VAE_DATA=... python tests/benchmarks/mnist.py --epochs 20 --seeds 3
"""

import argparse
import copy
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyro
import pyro.infer
import pyro.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import datasets
from pyro_vae.engine.running import kept_generators, seeded
from pyro_vae.evidence import log_evidence
from pyro_vae.training.history import History
from pyro_vae.training.svi import SVI

BATCH_SIZE, LR = 128, 1e-3
STEPS, LOSS_LIMIT, EVIDENCE_LIMIT = 200, 1e-5, 0.4
EVALUATION_SEED = 1234


def make_vae(pixels: int, seed: int) -> pv.VAE:
    with seeded(seed):
        vae = pv.VAE(
            pixels,
            50,
            pv.likelihoods.Bernoulli(),
            encoder=pv.networks.MLP(200, 200, activation=nn.Tanh),
            decoder=pv.networks.MLP(200, 200, activation=nn.Tanh),
        )
    vae.is_initialized = True  # all start at torch's own initial weights
    return vae


class ByHand(nn.Module):
    """The same VAE in plain PyTorch: nothing of pyro_vae or Pyro is used."""

    def __init__(self, pixels: int, hidden: int = 200, latent: int = 50) -> None:
        super().__init__()
        self.encoder = self.trunk(pixels, hidden)
        self.loc, self.scale = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = self.trunk(latent, hidden)
        self.logits = nn.Linear(hidden, pixels)

    @staticmethod
    def trunk(inputs: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Minus log p(x | z) + log p(z) - log q(z | x) at one z, summed over rows."""
        h = self.encoder(x)
        loc, scale = self.loc(h), F.softplus(self.scale(h)) + 1e-6
        eps = torch.randn_like(loc)
        z = loc + scale * eps
        half_log_2pi = 0.5 * math.log(2 * math.pi)
        log_p = (-0.5 * z.square() - half_log_2pi).sum()
        log_q = (-0.5 * eps.square() - scale.log() - half_log_2pi).sum()
        logits = self.logits(self.decoder(z))
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") - log_p + log_q


def linears(program: pv.VAE | ByHand) -> list[nn.Linear]:
    """The seven linear layers, in one order for both."""
    if isinstance(program, ByHand):
        heads = (program.loc, program.scale, program.logits)
    else:
        posterior, likelihood = program.posterior.heads, program.likelihood.heads
        heads = (posterior["loc"], posterior["scale"], likelihood["logits"])
    members = (program.encoder, *heads[:2], program.decoder, heads[2])
    return [layer for m in members for layer in m.modules() if isinstance(layer, nn.Linear)]


def copy_weights(source: pv.VAE | ByHand, target: pv.VAE | ByHand) -> None:
    for mine, theirs in zip(linears(target), linears(source), strict=True):
        mine.load_state_dict(theirs.state_dict())


@dataclass
class Run:
    """What a system did: the VAE with its weights, each step's loss and start, epochs' seconds."""

    vae: pv.VAE
    losses: list[Any] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def per_step(self) -> np.ndarray:
        return np.array([float(loss) for loss in self.losses])

    def took(self) -> str:
        return f"{np.median(self.seconds):.2f} s an epoch, {self.quiet():.2f} ms a quiet step"

    def quiet(self) -> float:
        """Milliseconds of a step: the first decile, as other processes share the machine."""
        return float(1e3 * np.quantile(np.diff(self.starts), 0.1))


Runs: TypeAlias = dict[str, Run]


class Recorded:
    """Keeps the loss of every step of a fit, on the device, and when it began."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.starts: list[float] = []

    def __enter__(self) -> "Recorded":
        self.update = update = SVI.update

        def recorded(svi: SVI, *args: Any, **kwargs: Any) -> Any:
            self.starts.append(time.perf_counter())
            estimate = update(svi, *args, **kwargs)
            self.losses.append(estimate.loss.detach())
            return estimate

        SVI.update = recorded  # type: ignore[method-assign]
        return self

    def __exit__(self, *raised: object) -> None:
        SVI.update = self.update  # type: ignore[method-assign]


def fit_ours(vae: pv.VAE, grey: Tensor, epochs: int, seed: int) -> Run:
    with Recorded() as steps:
        history = _fitted(vae, grey, epochs, seed)
    return Run(vae, steps.losses, steps.starts, history.table["seconds"].tolist())


def _fitted(vae: pv.VAE, grey: Tensor, epochs: int, seed: int) -> History:
    return pv.fit(
        vae,
        grey,
        lr=LR,
        batch_size=BATCH_SIZE,
        max_epochs=epochs,
        validation=None,
        max_steps=None,
        warmup=0,
        weight_prior=None,
        averaged=False,
        until_converged=False,
        max_grad_norm=None,
        transform=datasets.binarize,
        device="cpu",
        seed=seed,
        progress=False,
    )


def batches(grey: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """One epoch: a permutation, then for each minibatch the binarisation; the step draws eps."""
    for index in torch.randperm(len(grey)).split(BATCH_SIZE):
        levels = grey[index]
        yield (torch.rand(levels.shape) < levels).to(dtype)


def fit_loop(run: Run, step: Callable[[Tensor], Any], grey: Tensor, epochs: int) -> Run:
    levels = grey / 255 if grey.dtype == torch.uint8 else grey
    dtype = next(run.vae.parameters()).dtype
    for _ in range(epochs):
        start = time.perf_counter()
        for batch in batches(levels, dtype):
            run.starts.append(time.perf_counter())
            run.losses.append(step(batch))
        run.seconds.append(time.perf_counter() - start)
    return run


def fit_by_hand(vae: pv.VAE, grey: Tensor, epochs: int, seed: int) -> Run:
    network = ByHand(vae.event_shape.numel()).to(next(vae.parameters()).dtype)
    copy_weights(vae, network)
    adam = torch.optim.Adam(network.parameters(), lr=LR, fused=True)

    def step(x: Tensor) -> Tensor:
        loss = network(x)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.detach()

    torch.manual_seed(seed)
    run = fit_loop(Run(vae), step, grey, epochs)
    copy_weights(network, vae)
    return run


def fit_pyro(vae: pv.VAE, grey: Tensor, epochs: int, seed: int) -> Run:
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        optim = pyro.optim.Adam({"lr": LR})
        svi = pyro.infer.SVI(vae.model, vae.guide, optim, pyro.infer.Trace_ELBO())
        torch.manual_seed(seed)
        return fit_loop(Run(vae), svi.step, grey, epochs)


SYSTEMS: dict[str, Callable[[pv.VAE, Tensor, int, int], Run]] = {
    "pyro_vae": fit_ours,
    "PyTorch by hand": fit_by_hand,
    "pyro.infer.SVI": fit_pyro,
}


def losses(grey: Tensor, dtype: torch.dtype, *, steps: int, seed: int = 0) -> pd.DataFrame:
    """The first losses of each system, from the same weights and generator state."""
    vae = make_vae(grey.shape[1], seed).to(dtype)
    epochs = math.ceil(steps / math.ceil(len(grey) / BATCH_SIZE))
    with kept_generators():
        runs = {name: fit(copy.deepcopy(vae), grey, epochs, seed) for name, fit in SYSTEMS.items()}
    return pd.DataFrame({name: run.per_step()[:steps] for name, run in runs.items()})


def drifts(table: pd.DataFrame) -> pd.DataFrame:
    """How far losses lie from those of the loop by hand, relative to these."""
    by_hand = table["PyTorch by hand"]
    rest = table.drop(columns="PyTorch by hand")
    return rest.sub(by_hand, axis=0).abs().div(by_hand.abs(), axis=0)


def part_1(grey: Tensor) -> pd.DataFrame:
    """200 steps in two epochs, so that a second permutation and a short last batch are in them."""
    rows = grey[: STEPS // 2 * BATCH_SIZE - 28]
    found = {}
    for dtype in (torch.float32, torch.float64):
        drift = drifts(losses(rows, dtype, steps=STEPS))
        for name in drift:
            quarters = np.split(drift[name].to_numpy(), 4)
            worst = {f"steps to {50 * (i + 1)}": q.max() for i, q in enumerate(quarters)}
            found[str(dtype).removeprefix("torch."), name] = worst
    return pd.DataFrame(found).T


def trained(grey: Tensor, epochs: int, seed: int) -> Runs:
    """Each system from one start; which of them goes first changes from seed to seed."""
    vae, turn = make_vae(grey.shape[1], seed), seed % len(SYSTEMS)
    order = list(itertools.islice(itertools.cycle(SYSTEMS), turn, turn + len(SYSTEMS)))
    runs = {}
    for name in order:
        runs[name] = SYSTEMS[name](copy.deepcopy(vae), grey, epochs, seed)
        say(f"seed {seed}: {name}, {runs[name].took()}")
    return runs


def negative_evidence(vae: pv.VAE, x: Tensor, num_samples: int) -> np.ndarray:
    evidence = log_evidence(vae, x, num_samples, seed=EVALUATION_SEED)
    return -evidence["log_evidence"].to_numpy()


def part_2(grey: Tensor, x: Tensor, asked: argparse.Namespace) -> tuple[np.ndarray, list[Runs]]:
    """The runs of each seed, and -log p(x) by seed, system and row."""
    values, runs = [], []
    for seed in range(asked.seeds):
        runs.append(trained(grey, asked.epochs, seed))
        values.append(
            [negative_evidence(runs[-1][name].vae, x, asked.num_samples) for name in SYSTEMS]
        )
        means = pd.Series(np.mean(values[-1], axis=-1), index=list(SYSTEMS))
        say(f"seed {seed}: -log p(x) on {len(x)} rows\n{means.to_string()}")
    return np.array(values), runs


def table_of(values: np.ndarray, runs: list[Runs]) -> pd.DataFrame:
    """One line a system; differences are from the loop by hand, in pairs of seeds and rows."""
    lines = {}
    reference = list(SYSTEMS).index("PyTorch by hand")
    for i, name in enumerate(SYSTEMS):
        difference = values[:, i] - values[:, reference]
        seconds = np.concatenate([by_name[name].seconds for by_name in runs])
        lines[name] = {
            "-log p(x)": values[:, i].mean(),
            "s.e. rows": standard_error(values[:, i].mean(0)),
            **{f"seed {s}": v for s, v in enumerate(values[:, i].mean(1))},
            "difference": difference.mean(),
            "largest difference of a seed": np.abs(difference.mean(1)).max(),
            "s.e. paired rows": standard_error(difference.mean(0)),
            "s.e. paired seeds": standard_error(difference.mean(1)),
            "s/epoch median": np.median(seconds),
            "s/epoch least": seconds.min(),
            "ms/step quiet": np.median([by_name[name].quiet() for by_name in runs]),
        }
    return pd.DataFrame(lines).T


def standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def farthest(values: np.ndarray) -> float:
    """The largest difference between the means of pyro_vae and another system, over seeds."""
    means = values.mean((0, 2))
    return float(np.abs(means - means[list(SYSTEMS).index("pyro_vae")]).max())


def say(text: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def conditions(asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "asked": {k: str(v) if isinstance(v, Path) else v for k, v in vars(asked).items()},
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average": os.getloadavg(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-rows", type=int, nargs="+", default=[1000], help="the first ones")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", type=int, choices=(1, 2), help="by default both")
    parser.add_argument("--output", type=Path, default=Path("mnist.json"))
    parser.add_argument("--data", type=Path, default=os.environ.get("PYRO_VAE_DATA"))
    asked = parser.parse_args()
    if asked.data is None:
        parser.error("PYRO_VAE_DATA is unset: it names the folder of real data")
    return asked


def report_1(grey: Tensor) -> tuple[bool, dict[str, Any]]:
    drift = part_1(grey)
    say(f"Part 1, largest relative difference of a loss from the loop by hand:\n{drift}")
    passed = bool(drift.xs("pyro_vae", level=1).max(axis=None) <= LOSS_LIMIT)
    return passed, {"part 1": {" ".join(key): dict(line) for key, line in drift.iterrows()}}


def report_2(grey: Tensor, rows: Tensor, asked: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    with seeded(EVALUATION_SEED):
        x = datasets.binarize(rows)[: max(asked.test_rows)]
    values, runs = part_2(grey, x, asked)
    passed, result = True, {}
    for count in asked.test_rows:
        table = table_of(values[..., :count], runs).T
        say(f"Part 2, the first {count} test rows:\n{table.round(5).to_string()}")
        passed &= farthest(values[..., :count]) <= EVIDENCE_LIMIT
        result[f"part 2, {count} rows"] = table.to_dict()
    seconds = {name: [by_name[name].seconds for by_name in runs] for name in SYSTEMS}
    return passed, result | {"seconds of each epoch, by seed": seconds}


def main() -> int:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    folder = Path(asked.data) / "mnist"
    train, test = (datasets.load(folder / f"mnist_{part}.npz").x for part in ("train", "test"))
    result: dict[str, Any] = {"start": conditions(asked)}
    outcomes = [] if asked.part == 2 else [report_1(train)]
    outcomes += [] if asked.part == 1 else [report_2(train, test, asked)]
    for _, found in outcomes:
        result |= found
    passed = all(good for good, _ in outcomes)
    result |= {"end": conditions(asked), "passed": passed}
    asked.output.write_text(json.dumps(result, indent=1, default=float))
    say(f"{'passed' if passed else 'FAILED'}; written to {asked.output}")
    return int(not passed)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
