"""Fits the digits with four likelihoods, and ranks the fits with `compare`.

Each pixel is a count from 0 to 16. Binomial: 16 independent trials. BetaBinomial: 16 correlated
trials. Poisson: counts without an upper bound. Categorical: 17 classes without an order.

    python examples/swap_the_likelihood.py
"""

import argparse
from collections.abc import Sequence

import pyro_vae as pv

LIKELIHOODS = {
    "binomial": pv.likelihoods.Binomial(total_count=16),
    "beta-binomial": pv.likelihoods.BetaBinomial(total_count=16),
    "poisson": pv.likelihoods.Poisson(),
    "categorical": pv.likelihoods.Categorical(17),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    train, test = pv.datasets.load("digits").split(test=0.2, seed=args.seed)

    fitted = {}
    for name, likelihood in LIKELIHOODS.items():
        vae = pv.VAE(64, 8, likelihood, seed=args.seed)
        pv.fit(vae, train.x, validation=0.1, max_epochs=args.max_epochs, seed=args.seed)
        fitted[name] = vae

    table = pv.compare(fitted, test.x, args.num_samples, seed=args.seed)
    print(table.round(2).to_string())
    print(table.attrs["remark"])


if __name__ == "__main__":
    main()
