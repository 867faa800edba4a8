"""Fits the digits with four priors (normal, Student t, mixture, VampPrior), and ranks the fits.

python examples/swap_the_prior.py
"""

import argparse
from collections.abc import Sequence

import pyro.distributions as dist

import pyro_vae as pv


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    train, test = pv.datasets.load("digits").split(test=0.2, seed=args.seed)

    priors = {
        "standard normal": pv.priors.StandardNormal(8),
        "student t": dist.StudentT(4.0, 0.0, 1.0).expand([8]).to_event(1),
        "mixture of 10": pv.priors.Mixture(10, 8),
        "vamp, 50 rows": pv.priors.VampPrior(50, 8, data=train.x),
    }

    fitted = {}
    for name, prior in priors.items():
        vae = pv.VAE(64, prior, pv.likelihoods.BetaBinomial(total_count=16), seed=args.seed)
        pv.fit(vae, train.x, validation=0.1, max_epochs=args.max_epochs, seed=args.seed)
        fitted[name] = vae

    table = pv.compare(fitted, test.x, args.num_samples, seed=args.seed)
    print(table.round(2).to_string())
    print(table.attrs["remark"])


if __name__ == "__main__":
    main()
