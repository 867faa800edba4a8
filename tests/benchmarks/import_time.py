"""What `import pyro_vae` takes, against `import pyro, arviz`: at most 1.3 times is wanted.

Each import runs in a process of its own, the two in turn; the first round warms the disk, of the
others the median counts.

    python tests/benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATEMENTS = ("import pyro, arviz", "import pyro_vae")
LIMIT = 1.3


def seconds(statement: str) -> float:
    program = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    return float(subprocess.check_output(command, cwd=ROOT, text=True))


def medians(rounds: int) -> dict[str, float]:
    times = [[seconds(statement) for statement in STATEMENTS] for _ in range(rounds + 1)][1:]
    return {
        statement: statistics.median(column)
        for statement, column in zip(STATEMENTS, zip(*times, strict=True), strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    took = medians(parser.parse_args().rounds)
    for statement, median in took.items():
        print(f"{statement:20} {median:6.2f} s")
    ratio = took[STATEMENTS[1]] / took[STATEMENTS[0]]
    print(f"{'ratio':20} {ratio:6.2f} (limit {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
