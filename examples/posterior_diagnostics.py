"""Diagnostics of a fit with ArviZ: `to_arviz` returns a tree that the functions of ArviZ read.

The code runs with ArviZ 0.23 and 1.x. The draws are independent draws from q(z | x), so R-hat and
effective sample size do not measure the quality of the fit. Pareto k does, for each row.

    python examples/posterior_diagnostics.py
"""

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyro_vae as pv


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    data = pv.datasets.load("wine")  # a table: 178 wines, 13 columns with names
    table = (data.x - data.x.mean()) / data.x.std()
    vae = pv.VAE(13, 2, pv.likelihoods.Normal(), encoder=pv.networks.MLP(64), seed=args.seed)
    pv.fit(vae, table, validation=0.1, max_epochs=args.max_epochs, seed=args.seed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 warns of changes in 1.0
        import arviz as az

    wines = table.iloc[:5]
    tree = pv.to_arviz(vae, wines, args.num_samples, seed=args.seed)

    print("Posterior of the latents of five wines:")
    print(az.summary(tree, var_names=["z"], kind="stats"), "\n")

    print("Reliability of importance sampling with the guide:")
    stats = tree["vi_stats"]
    print(f"Pareto k {stats['pareto_k'].values.round(2)}, limit {stats.attrs['good_k']:.2f}\n")

    print("Posterior predictive checks, by column:")
    replicates, observed = tree["posterior_predictive"]["x"], tree["observed_data"]["x"]
    exceeds = (replicates > observed).mean(("chain", "draw"))
    print(exceeds.mean("datum").round(2).to_pandas().rename("P(x' > x)"), "\n")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wine.nc"
        tree.to_netcdf(file)
        tree = az.from_netcdf(file)
        print(f"The tree after writing and reading a file: {type(tree).__name__}")


if __name__ == "__main__":
    main()
