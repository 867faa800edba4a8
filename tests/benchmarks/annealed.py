"""Annealing against closed forms, and Hamiltonian Monte Carlo against NUTS and other draws."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pyro.infer import MCMC, NUTS

import pyro_vae as pv
from pyro_vae.engine.running import evaluating, seeded

sys.path.append(str(Path(__file__).parents[1]))
from annealed_cases import GUIDES, against_exact  # noqa: E402

WITHIN = 0.99  # share of rows within 3 errors
LARGEST_R_HAT, MOST_SECONDS, ERRORS = 1.01, 60.0, 4.0
OF_ONE_MODE = 1.03  # R-hat of a chain alone, in a row whose chains are in several modes
MOST_SEVERAL = 5  # rows of 100
NUTS_ROWS = 3


def against_closed_forms(sizes: dict[int, int]) -> bool:
    """Linear Gaussian programs: rows within 3 errors, and bounds from both sides."""
    lines, inside, total = {}, 0.0, 0
    for size, rows in sizes.items():
        for guide in GUIDES:
            start = time.process_time()
            found = against_exact(size, guide, rows)
            error, mcse, upper = found["error"], found["mcse"], found["upper_error"]
            within = (error.abs() < 3 * mcse).double()
            inside, total = inside + float(within.sum()), total + rows
            lines[f"{size} latents, guide {guide}"] = {
                "within 3 errors": float(within.mean()),
                "rms / mcse": float((error.square().mean() / mcse.square().mean()).sqrt()),
                "mcse": float(mcse.mean()),
                "lower, in se": float(error.mean() / error.std() * rows**0.5),
                "upper, in se": float(upper.mean() / upper.std() * rows**0.5),
                "gap": float((upper - error).mean()),
                "cpu s": time.process_time() - start,
            }
    table = pd.DataFrame(lines).T
    print(table.round(4).to_string())
    print(f"{inside / total:.2%} of {total} rows within 3 errors; aim {WITHIN:.0%}")
    is_bracketed = (table["lower, in se"] < 3).all() and (table["upper, in se"] > -3).all()
    return inside / total >= WITHIN and bool(is_bracketed)


def of_digits(rows: int, nuts_draws: int) -> bool:
    """A fitted VAE of the digits: R-hat of many rows, and NUTS on a few."""
    digits = pv.datasets.load("digits")
    x = torch.as_tensor(np.asarray(digits.x), dtype=torch.float32)
    held_out = x[-rows:]
    vae = pv.VAE(64, 10, pv.likelihoods.Binomial(total_count=16), seed=0)
    pv.fit(vae, x[:-359], seed=0, progress=False)
    start = time.process_time()
    tree = pv.posterior(vae, held_out, "hmc", 1000, seed=0)
    seconds = time.process_time() - start
    stats = tree["vi_stats"]
    r_hat = stats.r_hat.to_numpy()
    print(
        f"\nHMC of {rows} rows: {seconds:.1f} cpu s (aim {MOST_SECONDS:.0f}); largest R-hat "
        f"{r_hat.max():.4f}, over {LARGEST_R_HAT} in {(r_hat > LARGEST_R_HAT).sum()} rows; "
        f"least bulk ESS {float(stats.ess_bulk.min()):.0f}"
    )
    several = np.flatnonzero(r_hat > LARGEST_R_HAT)
    alone = [_alone(tree["posterior"].z[:, :, row].to_numpy()) for row in several]
    for row, value in zip(several, alone, strict=True):
        joint = tree["sample_stats"].log_joint[:, :, row].to_numpy().mean(1)
        print(
            f"row {row}: {stats.note.to_numpy()[row]}; mean log p(x, z) of the chains "
            f"{joint.round(1)}, R-hat of the halves of one chain at most {value:.3f}"
        )
    drawn = tree["posterior"].z.to_numpy()
    drawn = drawn.reshape(-1, *drawn.shape[2:])
    table = pd.DataFrame({m: _beside(vae, held_out, drawn, m) for m in ("guide", "importance")})
    print(f"\nguide and refined draws against HMC, {rows} rows\n{table.T.round(3).to_string()}\n")
    is_nearer = table.loc["shift, sd", "importance"] < table.loc["shift, sd", "guide"]
    worst = max(
        _against_nuts(vae, held_out, drawn, stats, i, nuts_draws) for i in range(NUTS_ROWS)
    )
    print(f"largest distance {worst:.2f} standard errors; aim {ERRORS}")
    is_reported = all(value < OF_ONE_MODE for value in alone) and len(several) <= MOST_SEVERAL
    return seconds < MOST_SECONDS and is_reported and worst < ERRORS and bool(is_nearer)


def _beside(vae: pv.VAE, x: torch.Tensor, drawn: np.ndarray, method: str) -> dict[str, float]:
    """Means and standard deviations of draws beside those of HMC, (draws, rows, latents)."""
    start = time.process_time()
    tree = pv.posterior(vae, x, method, num_samples=4000, seed=0)
    seconds = time.process_time() - start
    found, stats = tree["posterior"].z[0].to_numpy(), tree["vi_stats"]
    shift = abs(found.mean(0) - drawn.mean(0)) / drawn.std(0)
    ratio = found.std(0) / drawn.std(0)
    return {
        "shift, sd": shift.mean(),
        "largest shift, sd": shift.max(),
        "ratio of sds": ratio.mean(),
        "least ratio": ratio.min(),
        "largest ratio": ratio.max(),
        "k over its limit": float((stats.pareto_k > stats.attrs["good_k"]).mean()),
        "cpu s": seconds,
    }


def _alone(draws: np.ndarray) -> float:
    """The largest R-hat of one chain alone, of draws of shape (chains, draws, latents)."""
    import arviz

    halves = [arviz.convert_to_dataset({"z": np.stack(np.split(c, 2))}) for c in draws]
    return max(float(arviz.rhat(half)["z"].max()) for half in halves)


def _against_nuts(
    vae: pv.VAE, x: torch.Tensor, drawn: np.ndarray, stats: object, row: int, draws: int
) -> float:
    """The largest distance of a mean or a standard deviation from NUTS, in standard errors."""
    import arviz

    start = time.process_time()
    with evaluating(vae), torch.enable_grad(), seeded(row):
        mcmc = MCMC(
            NUTS(vae.model), num_samples=draws, warmup_steps=draws // 4, disable_progbar=True
        )
        mcmc.run(x[row : row + 1])
    nuts = mcmc.get_samples()["z"][:, 0].numpy()
    seconds = time.process_time() - start
    ess = arviz.ess(arviz.convert_to_dataset({"z": nuts[None]}))["z"].to_numpy()
    own = float(stats["ess_bulk"][row])  # type: ignore[index]
    tail = float(stats["ess_tail"][row])  # type: ignore[index]
    sd = nuts.std(0)
    error = sd * np.sqrt(1 / own + 1 / ess)
    means = abs(nuts.mean(0) - drawn[:, row].mean(0)) / error
    squares = abs(np.log(drawn[:, row].std(0) / sd)) / np.sqrt(1 / min(own, tail) + 1 / ess)
    print(
        f"row {row}: NUTS {draws} draws in {seconds:.0f} cpu s, least ESS {ess.min():.0f}; means "
        f"{means.max():.2f}, sds {squares.max():.2f} standard errors from HMC at most"
    )
    return float(max(means.max(), squares.max()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    sizes = {2: 200, 8: 100} if is_quick else {2: 500, 8: 500, 32: 200}
    is_right = against_closed_forms(sizes)
    is_right &= of_digits(*((20, 400) if is_quick else (100, 4000)))
    sys.exit(not is_right)
