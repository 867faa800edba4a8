"""No step of a fit asks the device for a number, or sends it one.

What would make a GPU wait shows on the CPU too: reading a scalar, finding indices, and making a
tensor of a Python number (`torch.tensor`, which on a GPU is a copy that waits).
"""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import ESTIMATORS
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.engine.running import local_parameters

WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "equal")
WAITS += ("_linalg_check_errors",)


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").split(".")[0]
        is_empty = name == "lift_fresh" and args[0].numel() == 0
        assert is_empty or name not in WAITS, f"{name} makes a GPU wait"
        return func(*args, **(kwargs or {}))


COUNTS = torch.arange(60.0).reshape(10, 6) % 5
CASES = {
    "binomial": (COUNTS, 2, pv.likelihoods.Binomial(total_count=16), None),
    "beta-binomial": (COUNTS, 2, pv.likelihoods.BetaBinomial(total_count=16), None),
    "negative binomial": (COUNTS, 2, pv.likelihoods.NegativeBinomial(), None),
    "poisson": (COUNTS, 2, pv.likelihoods.Poisson(), None),
    "categorical": (COUNTS, 2, pv.likelihoods.Categorical(5), None),
    "student-t": (COUNTS, 2, pv.likelihoods.StudentT(df=4.0), None),
    "bernoulli": (COUNTS % 2, 2, pv.likelihoods.Bernoulli(), None),
    "mixture": (COUNTS, pv.priors.Mixture(3, 2), pv.likelihoods.Normal(), None),
    "vamp": (COUNTS, pv.priors.VampPrior(3, 2), pv.likelihoods.Normal(), None),
    "fixed": (
        COUNTS,
        dist.StudentT(4.0, 0.0, 1.0).expand([2]).to_event(1),
        pv.likelihoods.Normal(),
        None,
    ),
    "fixed covariance": (
        COUNTS,
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5),
        pv.likelihoods.Normal(),
        None,
    ),
    "full covariance": (
        COUNTS,
        2,
        pv.likelihoods.Normal(),
        pv.posteriors.MultivariateNormal(),
    ),
    "low rank": (
        COUNTS,
        3,
        pv.likelihoods.Normal(),
        pv.posteriors.LowRankMultivariateNormal(1),
    ),
    "delta": (COUNTS, 2, pv.likelihoods.Normal(), pv.posteriors.Delta()),
}


CHI2 = "torch's StudentT makes a Chi2 of the Python number 0.5 each time"
CHOLESKY = "torch's LowRankMultivariateNormal factorises when it is made, and asks if it went well"
WAITING = {"student-t": CHI2, "fixed": CHI2, "low rank": CHOLESKY}


def cases() -> list[Any]:
    marks = {name: pytest.mark.xfail(strict=True, reason=why) for name, why in WAITING.items()}
    return [pytest.param(name, marks=marks.get(name, ())) for name in CASES]


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_step_makes_no_device_wait(name: str, particles: int, optimizer: type) -> None:
    x, prior, likelihood, posterior = CASES[name]
    vae = pv.VAE((6,), prior, likelihood, posterior)
    elbo = pv.elbos.Trace_ELBO(num_particles=particles)
    svi = pv.svi.SVI(vae.model, vae.guide, optimizer, elbo, max_grad_norm=1.0)
    with pyro.validation_enabled(False), local_parameters(vae):
        svi.update(x)
        with NoWaiting():
            svi.update(x)


ENUMERATION = "Pyro's sums over values look for probabilities of 0"
WAITING_ELBOS: dict[str, str] = {"TraceEnum_ELBO": ENUMERATION}


def elbos() -> list[Any]:
    mark = pytest.mark.xfail
    return [
        pytest.param(name, marks=mark(strict=True, reason=WAITING_ELBOS[name]))
        if name in WAITING_ELBOS
        else name
        for name in ESTIMATORS
    ]


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("name", elbos())
def test_no_estimator_makes_a_device_wait(name: str, is_warm: bool) -> None:
    """Not with a weight on the KL terms that is a tensor on the device either."""
    vae, elbo = pv.VAE((6,), 2, pv.likelihoods.Normal()), ESTIMATORS[name]()
    svi = pv.svi.SVI(vae.model, vae.guide, torch.optim.Adam, elbo)
    if is_warm and elbo.takes_kl_weight:
        svi.objective.weigh_kl(torch.full((), 0.3))
    with pyro.validation_enabled(False), local_parameters(vae):
        svi.update(COUNTS)
        with NoWaiting():
            svi.update(COUNTS)


def test_pyros_own_trace_elbo_waits() -> None:
    vae = pv.VAE((6,), 2, pv.likelihoods.Normal())
    loss = pyro.infer.Trace_ELBO()
    with (
        pyro.validation_enabled(False),
        pytest.raises(AssertionError, match="_local_scalar_dense"),
        NoWaiting(),
    ):
        loss.differentiable_loss(vae.model, vae.guide, COUNTS)
