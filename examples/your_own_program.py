"""Fits and compares your own Pyro program: any module with a `model` and a `guide`.

The model is conditional on the class y of a digit; z describes the remaining variation, its style.

    p(z) = N(0, I),    p(x | z, y) = Binomial(16, sigmoid(f(z, y)))

There are two requirements: the sites of each row are in a plate named "data", and the parameters
belong to the module. `x` is a tensor, or a dict of tensors with the same number of rows.

    python examples/your_own_program.py
"""

import argparse
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import pyro_vae as pv


class Conditional(nn.Module):
    """A VAE of the digits. Without `uses_class`, the networks see zeros instead of the class."""

    def __init__(self, latent_dim: int = 6, *, uses_class: bool = True) -> None:
        super().__init__()
        self.latent_dim, self.uses_class = latent_dim, uses_class
        self.encoder = nn.Sequential(nn.Linear(74, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim + 10, 256), nn.SiLU(), nn.Linear(256, 64)
        )

    def label(self, data: dict[str, Tensor]) -> Tensor:
        return one_hot(data["label"].long(), 10).float() * self.uses_class

    def model(self, data: dict[str, Tensor]) -> None:
        label = self.label(data)
        with pyro.plate("data", len(label)):
            z = pyro.sample("z", dist.Normal(label.new_zeros(self.latent_dim), 1.0).to_event(1))
            label = label.expand(*z.shape[:-1], 10)  # z may have a dim of particles on the left
            logits = self.decoder(torch.cat([z, label], -1))
            pyro.sample("x", dist.Binomial(16, logits=logits).to_event(1), obs=data["x"])

    def guide(self, data: dict[str, Tensor]) -> None:
        inputs = torch.cat([data["x"] / 16, self.label(data)], -1)
        with pyro.plate("data", len(inputs)):
            loc, log_scale = self.encoder(inputs).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.clamp(-10, 10).exp()).to_event(1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    digits = pv.datasets.load("digits")
    train, test = (
        {"x": part.x.float(), "label": part.y} for part in digits.split(test=0.2, seed=args.seed)
    )

    fitted = {}
    for name, uses_class in {"conditional": True, "plain": False}.items():
        torch.manual_seed(args.seed)
        program = Conditional(uses_class=uses_class)
        pv.fit(program, train, validation=0.1, max_epochs=args.max_epochs, seed=args.seed)
        fitted[name] = program

    evidence = pv.log_evidence(fitted["conditional"], test, args.num_samples, seed=args.seed)
    print(evidence.summary().round(3), "\n")

    few = {name: values[:5] for name, values in test.items()}
    print(pv.to_arviz(fitted["conditional"], few, args.num_samples, seed=args.seed)["posterior"])

    table = pv.compare(fitted, test, args.num_samples, seed=args.seed)
    print("\nDoes the class improve log p(x)?")
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
