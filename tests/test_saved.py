"""Files of every format since 3 load, and give the numbers that they gave when they were written.

`python tests/test_saved.py` wrote the folder `tests/saved/format_3`, which is never written again.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

SAVED = Path(__file__).parent / "saved"
FORMAT = "format_3"


def small(**members: object) -> pv.VAE:
    networks = {
        "encoder": pv.networks.MLP(4, activation=nn.ReLU),
        "decoder": pv.networks.MLP(4, activation=nn.ReLU),
    }
    asked = {"prior": 2, "likelihood": pv.likelihoods.Normal()} | networks | members
    return pv.VAE(3, **asked, seed=0)


PROGRAMS: dict[str, Callable[[], pv.VAE]] = {
    "normal": small,
    "mixture": lambda: small(
        prior=pv.priors.Mixture(3, 2), likelihood=pv.likelihoods.StudentT(df=pv.Shared(init=4.0))
    ),
    "vamp_prior": lambda: small(prior=pv.priors.VampPrior(4, 2)),
    "transported": lambda: small(prior=dist.Gamma(2.0, 1.0).expand([2]).to_event(1)),
    "counts": lambda: small(
        likelihood=pv.likelihoods.Binomial(total_count=torch.tensor([3, 4, 5]))
    ),
    "any_distribution": lambda: small(
        likelihood=pv.likelihoods.Family(dist.Gumbel, scale=pv.Shared(init=2.0)),
        posterior=pv.posteriors.LowRankMultivariateNormal(1),
    ),
    "linear": lambda: small(
        likelihood=pv.likelihoods.Normal(scale=pv.Shared(scalar=True)),
        encoder=nn.Identity(),
        decoder=nn.Identity(),
    ).double(),
}


def built(name: str) -> pv.VAE:
    torch.manual_seed(0)  # a mixture draws its start when it is made
    return PROGRAMS[name]()


def draws(program: pv.VAE) -> list[float]:
    return program.sample(2, seed=0).double().flatten().tolist()


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("folder", sorted(p.name for p in SAVED.iterdir()))
def test_a_saved_program_still_loads(folder: str, name: str) -> None:
    program = pv.load(SAVED / folder / name)
    assert repr(program) == repr(built(name))
    expected = json.loads((SAVED / folder / "draws.json").read_text())[name]
    torch.testing.assert_close(draws(program), expected, rtol=1e-5, atol=1e-5)


def main() -> None:
    folder = SAVED / FORMAT
    if folder.exists():
        sys.exit(f"{folder} exists: later versions must load it as it is.")
    for name in PROGRAMS:
        pv.save(built(name), folder / name)
    expected = {name: draws(built(name)) for name in PROGRAMS}
    (folder / "draws.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
