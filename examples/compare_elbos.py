"""Eight estimators on one model of the digits: bias, noise and cost of their gradients.

A small VAE is fitted for a few epochs only, so that its gradients are not zero. The weights are
then fixed, and each estimator is evaluated many times.

    python examples/compare_elbos.py
"""

import argparse
from collections.abc import Sequence

import pyro_vae as pv

ELBOS = {
    "Trace_ELBO": pv.elbos.Trace_ELBO(),
    "TraceMeanField_ELBO": pv.elbos.TraceMeanField_ELBO(),
    "STL": pv.elbos.STL(),
    "IWAE": pv.elbos.IWAE(8),
    "DReG": pv.elbos.DReG(8),
    "PIWAE": pv.elbos.PIWAE(4, 2),
    "VIMCO": pv.elbos.VIMCO(8),
    "RWS": pv.elbos.RWS(8),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--num-samples", type=int, default=2000, help="draws of the reference")
    parser.add_argument("--num-repeats", type=int, default=50)
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="compare_elbos.png", help="file of the picture")
    args = parser.parse_args(argv)

    train, test = pv.datasets.load("digits").split(test=0.2, seed=args.seed)
    network = pv.networks.MLP(64)
    vae = pv.VAE(64, 4, pv.likelihoods.BetaBinomial(16), None, network, network, seed=args.seed)
    pv.fit(vae, train.x, max_epochs=args.max_epochs, seed=args.seed, device="cpu")

    comparison = pv.compare_elbos(
        vae,
        test.x[: args.rows],
        ELBOS,
        num_repeats=args.num_repeats,
        reference=args.num_samples,
        seed=args.seed,
    )
    print(comparison)
    picture = comparison.plot(args.num_particles, num_repeats=min(args.num_repeats, 20))
    picture.savefig(args.out, dpi=120)
    print(f"\npicture: {args.out}")


if __name__ == "__main__":
    main()
