"""Estimators raced on dynamically binarised MNIST: log p(x) of test rows, and the seconds.

The 784-200-200-50 tanh VAE, Adam 1e-3, minibatches of 128, on the CPU. The test rows are
binarised once; log p(x) is estimated by 1000 draws of each. Part 1 is one draw of z a row, 20
epochs, 3 seeds; part 5 five draws, 20 epochs, 1 seed; part 50 fifty draws, 5 epochs, 1 seed.
(PIWAE(2, 3) has six draws: five make no two bounds.) After each training the file of results is
written anew, with all that is finished, and parts that it had before.

    PYRO_VAE_DATA=... python tests/benchmarks/race_mnist.py --parts 1 50 5 --json race.json
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.data import datasets
from pyro_vae.diagnostics.race import Race, race
from pyro_vae.elbos import CIWAE, IWAE, PIWAE, STL, DReG, Trace_ELBO, TraceMeanField_ELBO
from pyro_vae.engine.running import seeded

EVALUATION_SEED = 1234


class Part(NamedTuple):
    elbos: dict[str, Any]
    epochs: int
    seeds: int


PARTS = {
    1: Part(
        {"Trace_ELBO": Trace_ELBO(), "MeanField": TraceMeanField_ELBO(), "STL": STL(1)}, 20, 3
    ),
    5: Part(
        {str(e): e for e in (IWAE(5), DReG(5), STL(5), PIWAE(2, 3), CIWAE(5, beta=0.05))}, 20, 1
    ),
    50: Part(
        {"MeanField": TraceMeanField_ELBO()}
        | {str(e): e for e in (IWAE(50), DReG(50), PIWAE(5, 10), CIWAE(50, beta=0.05))},
        5,
        1,
    ),
}


def build(seed: int) -> pv.VAE:
    return pv.VAE(
        784,
        50,
        pv.likelihoods.Bernoulli(),
        encoder=pv.networks.MLP(200, 200, activation=nn.Tanh),
        decoder=pv.networks.MLP(200, 200, activation=nn.Tanh),
        seed=seed,
    )


def said(found: Race) -> dict[str, Any]:
    runs = found.runs.reset_index().to_dict("records")
    table = found.table.reset_index().to_dict("records")
    attrs = {k: v for k, v in found.table.attrs.items()}
    return {"stopped": found.stopped, "table": table, "runs": runs, "attrs": attrs}


def conditions() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average": os.getloadavg(),
    }


def say(text: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def shown(found: Race) -> str:
    """The table, each number with its standard error."""
    table = found.table.dropna(subset="log_evidence")
    pairs = {
        "-log p(x)": [f"{-v:.2f} +- {e:.2f}" for v, e in zip(table.log_evidence, table.se)],
        "difference in log p(x)": [
            f"{v:+.2f} +- {e:.2f}" for v, e in zip(table.difference, table.difference_se)
        ],
        "ELBO": [f"{v:.2f}" for v in table.elbo],
        "seconds": [f"{v:.0f}" for v in table.seconds],
        "epochs": [f"{v:g}" for v in table.epochs],
        "k over": [f"{v:.1%}" for v in table.pareto_k_over],
    }
    width = max(map(len, table.index), default=0)
    lines = ["  ".join([" " * width, *(f"{name:>22}" for name in pairs)])]
    for i, name in enumerate(table.index):
        lines.append(
            "  ".join([f"{name:{width}}", *(f"{column[i]:>22}" for column in pairs.values())])
        )
    return "\n".join([*lines, table.attrs["remark"]])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--epochs", type=int, help="in place of a part's own")
    parser.add_argument("--seeds", type=int, help="in place of a part's own")
    parser.add_argument("--rows", type=int, default=1000, help="the first ones of the test rows")
    parser.add_argument("--train-rows", type=int, help="the first ones; by default all")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path("race.json"))
    parser.add_argument("--data", type=Path, default=os.environ.get("PYRO_VAE_DATA"))
    asked = parser.parse_args()
    if asked.data is None:
        parser.error("PYRO_VAE_DATA is unset: it names the folder of real data")
    return asked


def main() -> int:
    asked = arguments()
    torch.set_num_threads(1)
    folder = Path(asked.data) / "mnist"
    train, test = (datasets.load(folder / f"mnist_{part}.npz").x for part in ("train", "test"))
    with seeded(EVALUATION_SEED):
        held_out = datasets.binarize(test)[: asked.rows]
    known = json.loads(asked.json.read_text())["parts"] if asked.json.exists() else {}
    result: dict[str, Any] = {"start": conditions(), "parts": known}

    def write(part: int, found: Race) -> None:
        result["parts"][str(part)] = said(found)
        result["end"] = conditions()
        asked.json.write_text(json.dumps(result, indent=1, default=float))

    for part in asked.parts:
        elbos, epochs, seeds = PARTS[part]

        def after_each(found: Race, part: int = part) -> None:
            write(part, found)
            say(f"part {part}\n{found.runs.tail(1).to_string()}")

        found = race(
            build,
            train[: asked.train_rows],
            elbos,
            range(asked.seeds or seeds),
            asked.epochs or epochs,
            held_out=held_out,
            num_samples=asked.samples,
            transform=datasets.binarize,
            device="cpu",
            seed=EVALUATION_SEED,
            after_each=after_each,
        )
        write(part, found)
        say(f"part {part}, {found.stopped}, {len(held_out)} test rows\n{shown(found)}")
        if found.stopped == "interrupted":
            return 1
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
