"""Whether Ctrl-C is answered within two seconds at any moment of a compilation.

Processes start a compiled fit with an empty cache, and are interrupted after some seconds.

    python tests/benchmarks/interrupted_compiles.py --after 0.1 1 3 6 9
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time

import pandas as pd

LIMIT = 2.0  # seconds

PROGRAM = """
import torch, pyro_vae as pv
from pyro_vae.engine.replay import Graph
compile = Graph.compile
def noted(graph, tensors):
    print("compiling", flush=True)
    compile(graph, tensors)
    print("compiled", flush=True)
Graph.compile = noted
x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
vae = pv.VAE(8, 2, pv.likelihoods.Normal(), seed=0)
history = pv.fit(vae, x, max_epochs=400, engine="compiled", device="cpu", seed=0)
print(history.stopped, len(history), flush=True)
"""


def interrupted(after: float) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as cache:
        fit = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        )
        assert fit.stdout is not None
        fit.stdout.readline()
        time.sleep(after)
        start = time.perf_counter()
        fit.send_signal(signal.SIGINT)
        answer = fit.stdout.readline().strip()
        seconds = time.perf_counter() - start
        fit.communicate()
    return {"after": after, "answered in": seconds, "answer": answer}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--after", type=float, nargs="+", default=[0.1, 1.0, 3.0, 6.0, 9.0])
    asked = parser.parse_args()
    table = pd.DataFrame([interrupted(after) for after in asked.after])
    print(table.round(2).to_string(index=False))
    is_right = table["answer"].str.startswith("interrupted") & (table["answered in"] < LIMIT)
    return 0 if is_right.all() else 1


if __name__ == "__main__":
    sys.exit(main())
