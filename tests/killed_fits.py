"""Fits a model with a checkpoint, killed at random moments and resumed: run by test_checkpoint.py.

One process imports torch; each attempt is a fork of it, so that a kill costs no import.
"""

import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # what the first step of an optimiser imports

import pyro_vae as pv
from pyro_vae.data.files import write_tensors

PARTIAL = ".run.partial"


def run(folder: Path) -> None:
    x = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    vae = pv.VAE(
        (5,),
        pv.priors.Mixture(2, 2),
        pv.likelihoods.Bernoulli(),
        encoder=torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8)),
        decoder=pv.networks.MLP(8),
    )
    history = pv.fit(
        vae,
        x,
        validation=0.2,
        transform=pv.datasets.binarize,
        schedule=functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[15, 40]),
        lr=0.01,
        batch_size=20,
        warmup=10,
        max_epochs=80,
        max_grad_norm=1.0,
        seed=0,
        device="cpu",
        progress=False,
        checkpoint=folder / "run",
        resume=True,
    )
    said = {
        "table": history.table.drop(columns="seconds").fillna(0.0).to_dict("list"),
        "best_epoch": history.best_epoch,
        "stopped": history.stopped,
    }
    write_tensors(folder / "end", vae.state_dict(), said)


def attempt(folder: Path, moment: random.Random | None = None, longest: float = 0.0) -> bool:
    """Forks a run, kills it at a random moment, and says whether it came to its end before.

    Half of the moments are moments of time; the others lie within the write of a checkpoint.
    """
    in_writing = moment is not None and moment.random() < 0.5
    (folder / PARTIAL).unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            torch.manual_seed(0)
            if in_writing:
                die_in_a_write(moment)
            run(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if moment is not None and not in_writing:
        time.sleep(moment.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if moment is not None:
        moment.random()
    if os.WIFSIGNALED(status):
        return False
    if status:
        sys.exit("a run failed")
    return True


def die_in_a_write(moment: random.Random) -> None:
    """Has one of the next writes end by SIGKILL with a part of the file written."""
    write, left, part = Path.write_bytes, [moment.randrange(1, 8)], moment.random()

    def write_bytes(path: Path, content: bytes) -> int:
        left[0] -= 1
        if left[0]:
            return write(path, content)
        write(path, content[: int(part * len(content))])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    Path.write_bytes = write_bytes  # type: ignore[assignment,method-assign]


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    moment = random.Random(0)
    start = time.perf_counter()
    attempt(folder / "unbroken")
    longest = 2.5 * (time.perf_counter() - start) / kills
    left, runs, in_writing = kills, 0, 0
    while left:
        runs += 1
        broken = folder / f"broken{runs}"
        while not attempt(broken, moment if left else None, longest):
            left -= 1
            in_writing += (broken / PARTIAL).exists()
    sys.stdout.write(json.dumps({"runs": runs, "in writing": in_writing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
