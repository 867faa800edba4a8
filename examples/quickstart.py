"""Fits a VAE to handwritten digits, and measures how reliable the fit is.

python examples/quickstart.py
"""

import argparse
from collections.abc import Sequence

import pyro.distributions as dist

import pyro_vae as pv


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the model")
    args = parser.parse_args(argv)

    data = pv.datasets.load("digits")  # 1797 images of 8 x 8 counts, 0 to 16
    train, test = data.split(test=0.2, seed=args.seed)

    vae = pv.VAE(
        data=64,
        prior=dist.Normal(0.0, 1.0).expand([8]).to_event(1),
        likelihood=pv.likelihoods.Binomial(total_count=16),
        posterior=pv.posteriors.Normal(),
        encoder=pv.networks.MLP(256, 256),
        decoder=pv.networks.MLP(256, 256),
        seed=args.seed,
    )
    history = pv.fit(
        vae, train.x, validation=0.1, batch_size=64, max_epochs=args.max_epochs, seed=args.seed
    )
    print(f"Training stopped after {len(history)} epochs.")
    print(f"The weights are those of epoch {history.best_epoch}.\n")

    evidence = pv.log_evidence(vae, test.x, args.num_samples, seed=args.seed)
    print(evidence.summary().round(3), "\n")

    rows = vae.reconstruct(test.x[:3], seed=args.seed)
    print(rows, "\n")

    if args.out:
        pv.save(vae, args.out)
        print(f"Saved in {args.out}. Load it with pyro_vae.load({args.out!r})")


if __name__ == "__main__":
    main()
