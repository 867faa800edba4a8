"""What a step of IWAE(50) and DReG(50) costs, against the same step written by hand in PyTorch.

The 784-200-200-50 tanh VAE with a Bernoulli likelihood, minibatches of 128, fused Adam, one
thread. A step is that of `fit`: forward, backward, the optimiser and its guards. By hand the K
draws run in one pass too; DReG's is the usual one: log q of detached parameters, and a hook that
weighs the gradient in z once more.

Part 1: under the same noise in float64 both have the same loss and gradients, to 1e-9.
Part 2: the systems take turns of a few steps; the median over turns of the ratio of the processor
time they take, and its 95% interval from resampled turns. At most 1.15 is asked for.
Part 3: the most bytes of tensors live at once in a step, against K, and how linear that is.

    python tests/benchmarks/elbo_cost.py --turns 20 --steps 3
"""

import argparse
import gc
import json
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vae as pv
from pyro_vae.elbos import IWAE, DReG
from pyro_vae.engine.running import kept_generators, local_parameters

PIXELS, HIDDEN, LATENT, BATCH_SIZE, LR = 784, 200, 50, 128, 1e-3
LIMIT, AGREEMENT = 1.15, 1e-9
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
OURS = {"IWAE": IWAE, "DReG": DReG}
PARTICLES = (5, 10, 20, 40, 80)

Step = Callable[[Tensor], Any]


def make_vae(seed: int = 0) -> pv.VAE:
    return pv.VAE(
        PIXELS,
        LATENT,
        pv.likelihoods.Bernoulli(),
        encoder=pv.networks.MLP(HIDDEN, HIDDEN, activation=nn.Tanh),
        decoder=pv.networks.MLP(HIDDEN, HIDDEN, activation=nn.Tanh),
        seed=seed,
    )


class ByHand(nn.Module):
    """The same VAE in plain PyTorch, and its importance-weighted losses, summed over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.trunk(PIXELS)
        self.loc, self.scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.decoder = self.trunk(LATENT)
        self.logits = nn.Linear(HIDDEN, PIXELS)

    @staticmethod
    def trunk(inputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()
        )

    def loss(self, x: Tensor, particles: int, *, doubly: bool) -> Tensor:
        h = self.encoder(x)
        loc, scale = self.loc(h), F.softplus(self.scale(h)) + 1e-6
        z = loc + scale * torch.randn(particles, *loc.shape, dtype=loc.dtype)
        if doubly:
            loc, scale = loc.detach(), scale.detach()
        log_prior = -0.5 * z.square() - HALF_LOG_2PI
        log_q = -0.5 * ((z - loc) / scale).square() - scale.log() - HALF_LOG_2PI
        logits = self.logits(self.decoder(z))
        cross = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        log_weights = (log_prior - log_q).sum(-1) - cross.sum(-1)
        if not doubly:
            return -(log_weights.logsumexp(0) - math.log(particles)).sum()
        weights = log_weights.detach().softmax(0)
        z.register_hook(lambda gradient: gradient * weights[..., None])
        value = (log_weights.detach().logsumexp(0) - math.log(particles)).sum()
        surrogate = (weights * log_weights).sum()
        return -(surrogate + (value - surrogate).detach())


def linears(program: pv.VAE | ByHand) -> list[nn.Linear]:
    """The seven linear layers, in one order for both."""
    if isinstance(program, ByHand):
        heads = (program.loc, program.scale, program.logits)
    else:
        posterior, likelihood = program.posterior.heads, program.likelihood.heads
        heads = (posterior["loc"], posterior["scale"], likelihood["logits"])
    members = (program.encoder, *heads[:2], program.decoder, heads[2])
    return [layer for m in members for layer in m.modules() if isinstance(layer, nn.Linear)]


def by_hand(vae: pv.VAE) -> ByHand:
    network = ByHand().to(next(vae.parameters()).dtype)
    for mine, theirs in zip(linears(network), linears(vae), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return network


def gradients(program: pv.VAE | ByHand) -> list[Tensor]:
    return [p.grad for layer in linears(program) for p in layer.parameters()]


def disagreement(name: str, particles: int) -> float:
    """The largest difference of loss and gradients, relative to each one's largest number."""
    vae = make_vae().double()
    network = by_hand(vae)
    x = bits().double()
    losses = []
    for program in (vae, network):
        torch.manual_seed(1)
        if isinstance(program, ByHand):
            loss = program.loss(x, particles, doubly=name == "DReG")
        else:
            with pyro.validation_enabled(False), local_parameters(vae):
                elbo = OURS[name](particles, max_plate_nesting=1)
                loss = elbo.differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        losses.append(loss.detach())
    pairs = [losses[::-1], *zip(gradients(vae), gradients(network), strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def bits(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(BATCH_SIZE, PIXELS, generator=generator) < 0.2).float()


def our_step(name: str, particles: int, vae: pv.VAE) -> Step:
    elbo = OURS[name](particles, max_plate_nesting=1)
    svi = pv.svi.SVI(vae.model, vae.guide, torch.optim.Adam, elbo, lr=LR)

    def step(x: Tensor) -> None:
        svi.update(x)

    return step


def hand_step(name: str, particles: int, vae: pv.VAE) -> Step:
    network = by_hand(vae)
    adam = torch.optim.Adam(network.parameters(), lr=LR, fused=True)

    def step(x: Tensor) -> None:
        network.loss(x, particles, doubly=name == "DReG").backward()
        adam.step()
        adam.zero_grad()

    return step


def seconds(step: Step, x: Tensor, steps: int) -> float:
    start = time.process_time()
    for _ in range(steps):
        step(x)
    return (time.process_time() - start) / steps


def part_2(particles: int, turns: int, steps: int) -> pd.DataFrame:
    """Processor seconds a step, by turn; who goes first changes from turn to turn."""
    x, vae = bits(), make_vae()
    taken: dict[str, list[float]] = {}
    with pyro.validation_enabled(False), local_parameters(vae):
        systems = {}
        for name in OURS:
            systems[f"{name} by hand"] = hand_step(name, particles, vae)
            systems[name] = our_step(name, particles, vae)
        for step in systems.values():
            seconds(step, x, 2)
        for turn in range(turns):
            for name in sorted(systems, reverse=bool(turn % 2)):
                taken.setdefault(name, []).append(seconds(systems[name], x, steps))
    return pd.DataFrame(taken)


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    lines = {}
    for name in OURS:
        ratio = (table[name] / table[f"{name} by hand"]).to_numpy()
        resampled = np.median(generator.choice(ratio, (2000, len(ratio))), axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        quiet = table[name].min() / table[f"{name} by hand"].min()
        lines[name] = {
            "ms": 1e3 * table[name].median(),
            "ms by hand": 1e3 * table[f"{name} by hand"].median(),
            "ratio": np.median(ratio),
            "low": low,
            "high": high,
            "ratio of the fastest": quiet,
        }
    return pd.DataFrame(lines).T


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and self._key(tensor) not in given | self.seen.keys():
                self._count(tensor)
        self.peak = max(self.peak, self.live)
        return results

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.seen[key] = size
        self.live += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)


def peak_bytes(step: Step, x: Tensor) -> int:
    step(x)
    gc.collect()
    with LiveBytes() as counted:
        step(x)
    return counted.peak


def part_3() -> pd.DataFrame:
    """Peak bytes by K and system."""
    x, found = bits(), {}
    for name in OURS:
        for make, label in ((our_step, name), (hand_step, f"{name} by hand")):
            vae = make_vae()
            with pyro.validation_enabled(False), local_parameters(vae):
                found[label] = {k: peak_bytes(make(name, k, vae), x) for k in PARTICLES}
    return pd.DataFrame(found).rename_axis("K")


def linearity(table: pd.DataFrame) -> pd.DataFrame:
    """Bytes a draw between two K, over those between the first two: 1 where it is linear."""
    slopes = table.diff().div(table.index.to_series().diff(), axis=0).iloc[1:]
    line = {name: np.polyfit(table.index, table[name], 1) for name in table}
    fitted = pd.DataFrame({name: np.polyval(line[name], table.index) for name in table})
    off = (fitted.to_numpy() / table - 1).abs().max()
    said = (slopes / slopes.iloc[0]).T
    said.columns = [f"{a} to {b}" for a, b in zip(table.index[:-1], table.index[1:])]
    said.insert(0, "KiB a draw and row", [line[name][0] / 1024 / BATCH_SIZE for name in table])
    return said.assign(**{"farthest from a line": off})


def culprits(particles: int, rows: int = 18) -> str:
    """Where the time of a step goes, ours and by hand."""
    x, said = bits(), []
    for name in OURS:
        for make in (our_step, hand_step):
            vae = make_vae()
            with pyro.validation_enabled(False), local_parameters(vae):
                step = make(name, particles, vae)
                step(x)
                with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                    step(x)
            table = seen.key_averages(group_by_input_shape=True).table(
                sort_by="self_cpu_time_total", row_limit=rows, max_shapes_column_width=60
            )
            said.append(f"{name}, {make.__name__}\n{table}")
    return "\n".join(said)


def say(text: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=50)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--parts", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--profile", action="store_true", help="where the time goes, too")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"load average": os.getloadavg(), "torch": torch.__version__}
    passed = True
    with kept_generators():
        if 1 in asked.parts:
            found = {name: disagreement(name, asked.particles) for name in OURS}
            say(f"Part 1, loss and gradients differ by at most, relative: {found}")
            passed &= max(found.values()) <= AGREEMENT
            result["disagreement"] = found
        if 2 in asked.parts:
            table = ratios(part_2(asked.particles, asked.turns, asked.steps))
            say(f"Part 2, a step at K = {asked.particles}:\n{table.round(3).to_string()}")
            passed &= bool((table["ratio"] <= LIMIT).all())
            result["ratios"] = table.T.to_dict()
        if 3 in asked.parts:
            peaks = part_3()
            said = linearity(peaks)
            shown = f"{(peaks / 2**20).round(1).to_string()}\n{said.round(3).to_string()}"
            say(f"Part 3, peak MiB:\n{shown}")
            result["peak bytes"] = peaks.to_dict()
            result["linearity"] = said.T.to_dict()
        if asked.profile:
            say(culprits(asked.particles))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1, default=float))
    say("passed" if passed else "FAILED")
    return int(not passed)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
