"""Whether compiled steps are the eager ones: every prior, likelihood, posterior and estimator.

For each member of the tests' tables, from one state and one noise: the relative error of the loss,
the largest error of a gradient (relative to the largest element of its tensor, or 1e-6 of the
loss), and the largest difference of a weight after 200 steps of Adam at 1e-3. At most 1e-5, 1e-5
and 1e-3; or the reason why it is refused. Where a gradient exceeds it, the error in float64 tells
sums that cancel from wrong ones. A compilation takes some 8 seconds: the table of all
takes a quarter of an hour.

    python tests/benchmarks/engines_agree.py --only prior posterior IWAE
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_engines import MEMBERS, member, outputs

from pyro_vae.engine.replay import Replayed, UntraceableError
from pyro_vae.training.svi import SVI, TERMS

STEPS, LR = 200, 1e-3
LIMITS = {"loss": 1e-5, "gradient": 1e-5, "weights": 1e-3}
CANCELLING = 1e-12  # what a gradient over its limit may be off by in float64


def relative(one: Tensor, other: Tensor, least: float) -> float:
    size = max(float(other.abs().max()), least)
    return float((one - other).abs().max()) / size


def first(name: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The errors of one compiled step."""
    svi, x = member(name)
    if dtype == torch.float64:
        svi.objective.double()
        x = x.double() if x.is_floating_point() else x
    svi.objective.infer_plate_nesting(x)
    replayed = Replayed(svi._step)
    with pyro.validation_enabled(False):  # some data are drawn from other latents
        replayed.graph(x).compile(replayed.tensors(x))
    ours, theirs = outputs(replayed, x), outputs(svi._step, x)
    assert ours[0] is not None
    assert theirs[0] is not None
    least = 1e-6 * abs(float(theirs[0]))
    pairs = zip(ours[TERMS:], theirs[TERMS:], strict=True)
    gradients = [relative(a, b, least) for a, b in pairs if a is not None and b is not None]
    return {"loss": relative(ours[0], theirs[0], 1e-12), "gradient": max(gradients)}


def after_steps(name: str) -> float:
    """The largest difference of a weight after some steps, compiled and eager."""
    weights = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(5)  # some priors draw where they start
        made, x = member(name)
        elbo = made.objective.elbo
        svi = SVI(*made.objective.pair, torch.optim.Adam, elbo, lr=LR, engine=engine)
        torch.manual_seed(11)
        with pyro.validation_enabled(False):
            for _ in range(STEPS):
                svi.step(x)
        weights.append([p.detach() for p in svi.parameters])
    return max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def row(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = first(name) | {"weights": after_steps(name)}
        if found["gradient"] > LIMITS["gradient"]:  # sums that cancel, or an error?
            found["gradient, float64"] = first(name, torch.float64)["gradient"]
    except (UntraceableError, ValueError) as error:
        return {"refused": str(error)[:70]}
    return found | {"refused": ""}


def is_over(found: dict[str, Any]) -> bool:
    """Whether a member that was not refused exceeds a limit, or has no number."""
    over = {name for name, limit in LIMITS.items() if not found.get(name, 0.0) <= limit}
    if found.get("gradient, float64", 1.0) <= CANCELLING:
        over.discard("gradient")
    return bool(over)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    table = {}
    for name in MEMBERS:
        if not asked.only or any(part in name for part in asked.only):
            table[name] = row(name)
            print(name, table[name], flush=True)
    frame = pd.DataFrame.from_dict(table, orient="index")
    print(frame.to_string(float_format=lambda value: f"{value:.1e}"))
    print("largest", frame[list(LIMITS)].max().to_dict(), "at most", LIMITS)
    wrong = [name for name, found in table.items() if is_over(found)]
    print("over their limits:", ", ".join(wrong) or "none")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
