"""Does `pv.calibrate` flag guides that are wrong, and pass exact ones, near given rows too?"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kstest
from torch import Tensor

import pyro_vae as pv

sys.path.append(str(Path(__file__).parents[1]))
from calibration_cases import GUIDES, Guide, exact_vae, near_data  # noqa: E402

CHECKS = ("SBC", "VSBC", "TARP")
POWER = 0.95
MUST_SEE = {"0.7": ("SBC", "TARP"), "1.4": ("SBC", "TARP"), "shift 0.3": ("SBC", "VSBC")}
BEYOND = 1.3  # the posterior mean of the first latent above which a guide is wrong
LEVEL = 0.01  # of the tests that p-values are uniform, all lines of a table together


def tables(program: Guide, x: Tensor | None, runs: int, **options: Any) -> list[pd.DataFrame]:
    return [
        pv.calibrate(program, x, seed=seed, progress=False, **options).table
        for seed in range(runs)
    ]


def shares(found: list[pd.DataFrame]) -> dict[str, float]:
    """The share of runs in which a check is flagged, and in which any is."""
    flagged = [{*table.loc[table["flagged"], "check"]} for table in found]
    by_check = {check: np.mean([check in checks for checks in flagged]) for check in CHECKS}
    return by_check | {"any": np.mean([bool(checks) for checks in flagged])}


def is_uniform(found: list[pd.DataFrame]) -> dict[str, Any]:
    """Tests that the p-values of an exact guide are uniform over runs, line by line."""
    p_values = np.array([table["p_value"] for table in found])
    smallest = min(kstest(line, "uniform").pvalue for line in p_values.T)
    limit = 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(found))
    is_rare = shares(found)["any"] <= limit
    return {"KS p": smallest, "passes": smallest > LEVEL / p_values.shape[1] and is_rare}


def lines_of(latents: int, exact_runs: int, wrong_runs: int) -> list[dict[str, Any]]:
    vae = exact_vae(latents)
    x, lines = near_data(vae), []

    def add(name: str, where: str, found: list[pd.DataFrame], **judged: Any) -> None:
        line = {"latents": latents, "guide": name, "rows": where, "runs": len(found)}
        lines.append(line | shares(found) | judged)
        print({k: v if isinstance(v, str) else round(float(v), 4) for k, v in lines[-1].items()})
        sys.stdout.flush()

    for name, options in GUIDES.items():
        found = tables(Guide(vae, **options), None, wrong_runs if options else exact_runs)
        seen = all(shares(found)[check] > POWER for check in MUST_SEE.get(name, ()))
        add(name, "all", found, **({"passes": seen} if options else is_uniform(found)))
    found = tables(Guide(vae), x, exact_runs)
    add("exact", "near x", found, **is_uniform(found))
    wrong = Guide(vae, factor=0.7, beyond=BEYOND)
    found = tables(wrong, x, wrong_runs)
    add("0.7 near x alone", "near x", found, passes=shares(found)["any"] > POWER)
    found = tables(wrong, x, wrong_runs, near=False)
    add("0.7 near x alone", "all", found, passes=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--quick", action="store_true", help="30 and 10 runs, 2 latents")
    asked = parser.parse_args()
    sizes, runs = ([2], (30, 10)) if asked.quick else (asked.latents, (200, 50))
    lines = [line for latents in sizes for line in lines_of(latents, *runs)]
    table = pd.DataFrame(lines)
    print(table.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    return int(not table["passes"].all())


if __name__ == "__main__":
    sys.exit(main())
