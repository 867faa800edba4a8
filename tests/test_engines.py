"""The engines agree: one state and one noise give one loss, one gradient, one fit."""

import functools
import gc
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import cases
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from cases import Case
from elbo_cases import ESTIMATORS
from pyro import poutine
from small_vae import PLAIN, X, assert_same, small, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.distributions import densities as scoring
from pyro_vae.engine import replay as engines
from pyro_vae.engine.replay import Replayed, UntraceableError
from pyro_vae.training.svi import SVI

MLP = pv.networks.MLP
BRANCHES = "depends on the value of a tensor"
REFUSED = {
    "NanMaskedNormal": BRANCHES,
    "NanMaskedMultivariateNormal": BRANCHES,
    "Stable": BRANCHES,
    "SineBivariateVonMises": BRANCHES,
    "TraceEnum_ELBO": BRANCHES,
}
UNPLACED = ("LKJ", "SoftAsymmetricLaplace")


def vae(event_shape: Any, likelihood: Any, prior: Any = 2, posterior: Any = None) -> pv.VAE:
    return pv.VAE(event_shape, prior, likelihood, posterior, MLP(5), MLP(5), seed=0)


def of_distribution(case: Case) -> pv.VAE:
    return vae(case.event_shape, case.make())


def of_prior(case: Case) -> pv.VAE:
    return vae((3,), pv.likelihoods.Normal(), case.make())


def of_posterior(case: Case) -> pv.VAE:
    return vae((3,), pv.likelihoods.Normal(), case.beside.get("prior", 2), case.make())


def of_estimator(make: Callable[[], Any]) -> pv.VAE:
    return vae((3,), pv.likelihoods.Normal())


MEMBERS: dict[str, tuple[Callable[[Any], pv.VAE], Any]] = (
    {n: (of_distribution, c) for n, c in cases.DISTRIBUTIONS.items() if n not in UNPLACED}
    | {f"likelihood {n}": (of_distribution, c) for n, c in cases.LIKELIHOODS.items()}
    | {f"prior {n}": (of_prior, case) for n, case in cases.PRIORS.items()}
    | {f"posterior {n}": (of_posterior, case) for n, case in cases.POSTERIORS.items()}
    | {name: (of_estimator, make) for name, make in ESTIMATORS.items()}
)


MOVING_SUPPORT = {"AffineBeta", "GeneralizedPareto", "RelaxedOneHotCategoricalStraightThrough"}


def member(name: str) -> tuple[SVI, Tensor]:
    build, case = MEMBERS[name]
    program = build(case)
    elbo = case() if build is of_estimator else pv.elbos.Trace_ELBO()
    with torch.no_grad():
        x = program.sample(4, seed=5).clone()
        if name in MOVING_SUPPORT:  # a mean lies within it, wherever the latents are
            x = program.sample(400, seed=5).mean(0).expand_as(x).clone()
    return SVI(program.model, program.guide, torch.optim.Adam, elbo), x


def outputs(call: Callable[..., Any], x: Tensor) -> tuple[Tensor | None, ...]:
    torch.manual_seed(7)
    with pyro.validation_enabled(False):
        return call(x)


@pytest.mark.parametrize("name", MEMBERS)
def test_loss_and_gradient_of_the_graph_are_those_of_the_program(name: str) -> None:
    svi, x = member(name)
    svi.objective.infer_plate_nesting(x)
    replayed = Replayed(svi._step)
    if name in REFUSED:
        with pytest.raises(UntraceableError, match=REFUSED[name]):
            outputs(replayed, x)
        return
    outputs(replayed, x)
    ours, theirs = outputs(replayed, x), outputs(svi._step, x)
    assert [one is None for one in ours] == [other is None for other in theirs]
    assert theirs[0] is not None
    assert bool(theirs[0].isfinite())
    for one, other in zip(ours, theirs):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def stepped(engine: str, program: Any = None, steps: int = 5, **options: Any) -> Any:
    """The losses and weights after some steps, and the SVI that took them."""
    program = small() if program is None else program
    elbo = options.pop("elbo", None) or pv.elbos.Trace_ELBO()
    xs = options.pop("xs", [X])
    optimizer = options.pop("optimizer", torch.optim.Adam)
    svi = SVI(program.model, program.guide, optimizer, elbo, lr=0.01, engine=engine, **options)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [svi.step(xs[i % len(xs)]).item() for i in range(steps)]
    return losses, weights(program), svi


def assert_alike(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert_same(one[1], other[1])


class Dropping(nn.Module):
    """A network with all that a graph could get wrong: dropout, running means, a buffer anew."""

    def __init__(self, units: int) -> None:
        super().__init__()
        torch.manual_seed(units)
        self.layers = nn.Sequential(
            nn.Linear(units, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)
        )
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.layers(x) + self.mean


class Masked(nn.Module):
    """A program of one's own with a mask, a scale, latents of two kinds and a plain tensor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Linear(6, 4)
        self.out = nn.Linear(2, 6)
        self.offset = torch.zeros(6)

    def model(self, x: Tensor) -> None:
        pyro.module("out", self.out)
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=x[:, 0] > 0), poutine.scale(scale=0.5):
                seen = dist.Normal(self.out(z) + self.offset, 0.1 + noise).to_event(1)
                pyro.sample("x", seen, obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("net", self.net)
        pyro.sample("noise", dist.LogNormal(self.net.bias[0], 0.3))
        with pyro.plate("data", len(x)):
            loc, log_scale = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "dropout, batch norm, a buffer assigned anew": lambda: small(
        encoder=Dropping(6), decoder=Dropping(2)
    ),
    "a mask, a scale and a latent that rows share": Masked,
    "full covariance": lambda: small(posterior=pv.posteriors.MultivariateNormal()),
    "vamp": lambda: small(prior=pv.priors.VampPrior(5, 2)),
}


@pytest.mark.param_store
@pytest.mark.parametrize("name", PROGRAMS)
def test_traced_steps_are_the_eager_ones_bit_for_bit(name: str) -> None:
    xs = [X, X[:17], X[:17]]
    both = [stepped(e, PROGRAMS[name](), steps=7, xs=xs) for e in ("eager", "traced")]
    assert_alike(*both)
    assert both[1][2].engine == "traced"


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "AMSGrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "Adam, plain": functools.partial(torch.optim.Adam, foreach=False),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_stepped_as_it_steps_itself(name: str) -> None:
    """Ours against torch's own `step` on the gradients of the same losses."""
    _, ours, svi = stepped("traced", optimizer=OPTIMIZERS[name])
    program = small()
    build = OPTIMIZERS[name]
    theirs = (
        build(program.parameters(), lr=0.01, fused=svi.optimizer.defaults.get("fused", None))
        if "fused" in svi.optimizer.defaults
        else build(program.parameters(), lr=0.01)
    )
    objective = pv.elbos.Trace_ELBO()(program.model, program.guide)
    torch.manual_seed(1)
    with pyro.validation_enabled(False):
        for _ in range(5):
            theirs.zero_grad()
            objective(X).backward()
            theirs.step()
    assert_same(ours, weights(program))
    states = [o.state_dict()["state"] for o in (svi.optimizer, theirs)]
    for one, other in zip(states[0].values(), states[1].values()):
        assert_same(*({k: v for k, v in s.items() if v is not None} for s in (one, other)))


def test_clipping_is_torchs() -> None:
    assert_alike(*(stepped(e, max_grad_norm=0.01) for e in ("eager", "traced")))
    program = small()
    theirs = torch.optim.SGD(program.parameters(), lr=0.01)
    objective = pv.elbos.Trace_ELBO()(program.model, program.guide)
    torch.manual_seed(1)
    for _ in range(5):
        theirs.zero_grad()
        objective(X).backward()
        nn.utils.clip_grad_norm_(program.parameters(), 0.01 * len(X))
        theirs.step()
    ours = stepped("traced", max_grad_norm=0.01, optimizer=torch.optim.SGD)[1]
    for name, value in weights(program).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)


def test_a_schedule_and_a_warm_up_are_read_at_every_step() -> None:
    def beta(step: int) -> float:
        return 0.1 * step

    for engine in ("eager", "traced"):
        losses = []
        for which in (beta, 0.1):
            elbo = pv.elbos.BetaELBO(beta=which, elbo=pv.elbos.TraceMeanField_ELBO())
            losses.append(stepped(engine, elbo=elbo, steps=4)[0])
        assert losses[0][1] == pytest.approx(_replayed_first(0.1), rel=0.2)
        assert losses[0][0] < losses[1][0]
    both = [
        stepped(e, elbo=pv.elbos.BetaELBO(beta=beta, elbo=pv.elbos.DReG(3)), steps=6)
        for e in ("eager", "traced")
    ]
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-6)
    assert both[0][2].objective.elbo.steps == both[1][2].objective.elbo.steps == 6
    fits = []
    for engine in ("eager", "traced"):
        program = small()
        history = pv.fit(
            program, X, engine=engine, max_epochs=3, warmup=2, batch_size=16, seed=0, device="cpu"
        )
        fits.append(
            (
                history.table.drop(columns="seconds").fillna(0.0).to_numpy().tolist(),
                weights(program),
            )
        )
    assert_alike(*fits)


def _replayed_first(beta: float) -> float:
    elbo = pv.elbos.BetaELBO(beta=beta, elbo=pv.elbos.TraceMeanField_ELBO())
    return float(stepped("eager", elbo=elbo, steps=2)[0][1])


def test_modes_frozen_weights_and_plain_tensors_are_seen() -> None:
    program = Masked()
    svi = SVI(
        program.model,
        program.guide,
        torch.optim.SGD,
        pv.elbos.Trace_ELBO(),
        lr=1e-3,
        engine="traced",
    )
    svi.step(X)
    before = svi.step(X)
    with torch.no_grad():
        program.offset.fill_(50.0)
    assert svi.step(X) > before + 100.0
    freezing = small()
    _, _, svi = stepped("traced", freezing)
    frozen, other = freezing.encoder.layers[1].weight, freezing.decoder.layers[1].weight
    kept = frozen.requires_grad_(False).clone(), other.clone()
    svi.step(X)
    assert (torch.equal(frozen, kept[0]), torch.equal(other, kept[1])) == (True, False)
    dropping = small(encoder=Dropping(6), decoder=Dropping(2))
    svi = SVI(
        dropping.model,
        dropping.guide,
        torch.optim.SGD,
        pv.elbos.Trace_ELBO(),
        lr=0.0,
        engine="traced",
    )
    dropping.eval()
    mean = dropping.encoder.layers[1].running_mean.clone()
    svi.step(X)
    assert torch.equal(dropping.encoder.layers[1].running_mean, mean)
    dropping.train()
    svi.step(X)
    assert not torch.equal(dropping.encoder.layers[1].running_mean, mean)


def test_handlers_outside_are_seen() -> None:
    _, _, svi = stepped("traced", steps=1)
    torch.manual_seed(3)
    plain = svi.step(X)
    torch.manual_seed(3)
    with poutine.scale(scale=2.0):
        scaled = svi.update(X).loss
    assert scaled > 1.9 * plain


class Branching(nn.Module):
    """A program that looks at a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z if z.mean() > 0 else -z, 1.0), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


class Counting(Branching):
    """A program that anneals itself, by a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def model(self, x: Tensor) -> None:
        self.calls += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=min(1.0, self.calls / 100)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


class Ticking(Branching):
    """A program that counts in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(())

    def model(self, x: Tensor) -> None:
        self.calls += 1.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.calls, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


UNTRACEABLE = {
    "ticking": (Ticking, "no buffer"),
    "branching": (Branching, BRANCHES),
    "counting": (Counting, "Counting.calls"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_cannot_be_traced_runs_eagerly_with_one_warning(name: str) -> None:
    make, why = UNTRACEABLE[name]
    program = make()
    svi = SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine="auto")
    with pytest.warns(UserWarning, match=f"eagerly.*{why}") as told:
        both = svi.step(X), svi.step(X)
    assert len(told) == 1
    assert both[0] != both[1]
    assert (svi.engine, why in svi.why) == ("eager", True)
    program = make()
    svi = SVI(
        program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine="traced"
    )
    with pytest.raises(ValueError, match=f"'traced' cannot run.*{why}"):
        svi.step(X)


CALLS = 0


class Late(nn.Module):
    """A module whose results change at its hundredth call."""

    kept: Any = None

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept = kept

    def count(self) -> float:
        self.kept = (self.kept or 0) + 1
        return float(self.kept)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x if self.count() < 100 else -x,)


class InAList(Late):
    def count(self) -> float:
        self.kept["calls"].append(1)
        return len(self.kept["calls"])


class ByAFunction(Late):
    def count(self) -> float:
        return float(self.kept())


class ByAnIterator(Late):
    def count(self) -> float:
        return float(next(self.kept))


class InTheClass(Late):
    def count(self) -> float:
        type(self).kept = (type(self).kept or 0) + 1
        return float(type(self).kept)


class InAGlobal(Late):
    def count(self) -> float:
        global CALLS
        CALLS += 1
        return CALLS


class InADefault(Late):
    def count(self, calls: list[int] = []) -> float:  # noqa: B006
        calls.append(1)
        return len(calls)


class InAnArray(Late):
    def count(self) -> float:
        self.kept[0] += 1
        return float(self.kept[0])


class InATensor(Late):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.kept = self.kept + 1
        return (torch.where(self.kept < 100, x, -x),)


class AtRandom(Late):
    def count(self) -> float:
        return 200 * self.kept() ** 50


def closure() -> Callable[[], int]:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def endless() -> Iterator[int]:
    calls = 0
    while True:
        calls += 1
        yield calls


LATE: dict[str, Callable[[], Late]] = {
    "an attribute": Late,
    "a list in a dict": lambda: InAList({"calls": []}),
    "a closure": lambda: ByAFunction(closure()),
    "an object": lambda: ByAFunction(Late().count),
    "a partial": lambda: ByAFunction(functools.partial(closure())),
    "a hidden module": lambda: ByAFunction([Late()][0].count),
    "an iterator": lambda: ByAnIterator(iter(range(1000))),
    "a generator": lambda: ByAnIterator(endless()),
    "a class": InTheClass,
    "a global": InAGlobal,
    "a default": InADefault,
    "an array": lambda: InAnArray(np.zeros(2)),
    "a tensor": lambda: InATensor(torch.zeros(())),
    "random": lambda: AtRandom(random.random),
    "a generator of random": lambda: AtRandom(random.Random(0).random),
    "numpy.random": lambda: AtRandom(np.random.rand),
    "a generator of numpy": lambda: AtRandom(np.random.default_rng(0).random),
}


@pytest.mark.parametrize("name", LATE)
def test_what_counts_its_calls_is_not_traced(name: str) -> None:
    module = LATE[name]()
    replayed = Replayed(module)
    with pytest.raises(UntraceableError, match="a call changes Python values"):
        replayed(torch.ones(3))


class Caching(Late):
    """A module that keeps its last result, and a table that its first call makes."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if self.kept is None:
            self.kept = {"table": [1.0, 2.0], "lock": threading.Lock()}
        self.last = x * self.kept["table"][1]
        return (self.last,)


def test_what_a_module_keeps_for_itself_is_traced() -> None:
    replayed = Replayed(Caching())
    for number in (1.0, 3.0):
        assert float(replayed(torch.tensor(number))[0]) == 2.0 * number


class Annealed(Branching):
    """A program whose noise grows after 300 calls."""

    calls = 0

    def model(self, x: Tensor) -> None:
        self.calls += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 if self.calls < 300 else 9.0), obs=x[:, 0])


def test_a_fit_of_a_program_that_counts_its_calls_is_the_eager_one() -> None:
    options: dict[str, Any] = {**PLAIN, "max_epochs": 400, "seed": 0, "progress": False}
    with pytest.warns(UserWarning, match=r"Annealed\.calls"):
        found = pv.fit(Annealed(), X, **options)
    expected = pv.fit(Annealed(), X, engine="eager", **options)
    assert found.engine == "eager"
    one, other = (float(history.table["elbo"].iloc[-1]) for history in (found, expected))
    assert one == pytest.approx(other, abs=1e-3)


def test_pyros_own_elbos_run_eagerly_and_nobody_is_warned() -> None:
    for elbo in (
        pyro.infer.Trace_ELBO(),
        pv.elbos.TraceEnum_ELBO(strict_enumeration_warning=False),
    ):
        _, _, svi = stepped("auto", elbo=elbo)
        assert (svi.engine, "reads numbers" in svi.why) == ("eager", True)


def test_too_many_ways_to_call_it_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MOST_GRAPHS", 3)
    program = small()
    svi = SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine="auto")
    with pytest.warns(UserWarning, match="in more than 3 ways"):
        losses = [svi.step(X[:rows]) for rows in range(2, 8)]
    assert torch.stack(losses).isfinite().all()


def test_no_state_of_the_world_is_touched() -> None:
    before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    store = dict(pyro.get_param_store())
    program = small()
    svi = SVI(
        program.model,
        program.guide,
        torch.optim.Adam,
        pv.elbos.Trace_ELBO(),
        engine="traced",
        precision="medium",
    )
    svi._replayed = Replayed(svi._step)
    svi._replayed.graph(X, static=1.0)
    assert torch.equal(before[0], torch.get_rng_state())
    svi.step(X)
    assert torch.get_float32_matmul_precision() == before[1]
    assert dict(pyro.get_param_store()) == store
    assert pyro.settings.get("validate_poutine")
    assert all(p.grad is None for p in program.parameters())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("engine", "compield", "perhaps 'compiled'"),
        ("engine", None, "one of auto, eager"),
        ("precision", "hihg", "perhaps 'high'"),
        ("precision", 32, "one of highest"),
    ],
)
def test_wrong_names_are_refused(option: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pv.fit(small(), X, **{option: value})


def test_a_cuda_graph_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        stepped("cudagraph")


@pytest.mark.param_store
def test_half_precision_is_near_and_stays_in_the_networks() -> None:
    full, half = (stepped("eager", precision=p) for p in (None, "bf16"))
    assert half[0][0] == pytest.approx(full[0][0], rel=0.01)
    assert half[0][0] != full[0][0]
    assert half[0] == pytest.approx(full[0], rel=0.1)
    assert_alike(half, stepped("traced", precision="bf16"))
    densities: list[torch.dtype] = []

    class Noting(pv.elbos.Trace_ELBO):
        def _of_traces(self, *traces: Any) -> Any:
            densities.extend(
                site[key].dtype
                for trace in traces
                for site in trace.nodes.values()
                if site["type"] == "sample"
                for key in ("value", "log_prob")
            )
            return super()._of_traces(*traces)

    stepped("eager", precision="bf16", elbo=Noting(), steps=1)
    assert set(densities) == {torch.float32}
    with pytest.raises(ValueError, match=r"site 'z' in float32.*bfloat16.*\.float\(\)"):
        stepped("eager", Masked(), precision="bf16")


class Recorded(engines.Captured):
    """A stand-in for a CUDA graph: operations are noted once, and redone into the same memory."""

    @staticmethod
    def is_possible(device: torch.device) -> bool:
        return True

    def __init__(self, function: Callable[[], Any], state: list[Tensor], warm_up: int = 3) -> None:
        before = [(tensor, tensor.clone()) for tensor in state]
        generator = torch.get_rng_state()
        for _ in range(warm_up):
            function()
        self.noted = _Noted()
        with self.noted, torch.no_grad():
            self.outputs = function()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        torch.set_rng_state(generator)

    @torch.no_grad()
    def replay(self) -> Any:
        for func, args, kwargs, found in self.noted.operations:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(found), _tensors(again)):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.outputs


class _Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, found))
        return found


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for part in found:
            yield from _tensors(part)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
def test_a_captured_step_is_the_traced_one(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "Captured", Recorded)
    options = {"optimizer": OPTIMIZERS[optimizer], "steps": 9, "xs": [X, X + 0.0, X[:20]]}
    programs = [small(encoder=Dropping(6)) for _ in range(2)]
    both = [stepped(e, p, **options) for e, p in zip(("traced", "cudagraph"), programs)]
    assert_alike(*both)
    captured = both[1][2]
    assert len(captured._captures) == 2
    assert all(isinstance(group["lr"], float) for group in captured.optimizer.param_groups)


def test_a_captured_step_follows_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "Captured", Recorded)
    program = small()
    svi = SVI(
        program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine="cudagraph"
    )
    for _ in range(3):
        svi.step(X)
    svi.optimizer.param_groups[0]["lr"] = 0.0
    before = weights(program)
    svi.step(X)
    assert_same(before, weights(program))


def test_what_cannot_be_captured_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Recorded):
        def __init__(self, function: Callable[[], Any], state: list[Tensor]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engines, "Captured", Refusing)
    losses, _, svi = stepped("auto")
    assert (svi.engine, "not permitted" in svi.why) == ("traced", True)
    assert losses == stepped("traced")[0]
    with pytest.raises(ValueError, match="cannot be captured.*not permitted"):
        stepped("cudagraph")


def test_a_fit_by_captured_steps_is_the_traced_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "Captured", Recorded)
    found = []
    monkeypatch.setattr("pyro_vae.training.svi.WORTH_TRACING", 0)
    for engine in ("traced", "cudagraph", "auto"):
        program = small()
        history = pv.fit(
            program,
            X,
            engine=engine,
            max_epochs=3,
            batch_size=16,
            seed=0,
            device="cpu",
            validation=0.2,
            schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        )
        found.append(
            (
                history.table.drop(columns="seconds").fillna(0.0).to_numpy().tolist(),
                weights(program),
            )
        )
        assert history.engine == ("traced" if engine == "traced" else "cudagraph")
    assert_alike(found[0], found[1])
    assert_alike(found[0], found[2])


def test_compiled_steps_are_the_eager_ones_but_for_rounding() -> None:
    programs = [small(encoder=Dropping(6)) for _ in range(2)]
    eager, compiled = (
        stepped(e, p, steps=30, max_grad_norm=1.0) for e, p in zip(("eager", "compiled"), programs)
    )
    assert compiled[2].engine == "compiled"
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    for name, value in eager[1].items():
        torch.testing.assert_close(compiled[1][name], value, rtol=1e-3, atol=1e-3)


def test_auto_compiles_what_repays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(engines.Graph, "compile", lambda self, tensors: compiled.append(self.size))
    few, many = (stepped("auto", total_steps=n)[2] for n in (1000, 10**6))
    assert (few.engine, many.engine) == ("traced", "compiled")
    assert len(compiled) == 1
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["pyro_vae.training.loop"], "is_watched", lambda: True)
        pv.fit(small(), X, max_epochs=2, engine="compiled", device="cpu")
    assert "compiling a step" in capsys.readouterr().err
    assert "in 1000 steps" in few.why
    assert stepped("auto")[2].engine == "traced"
    short = stepped("auto", total_steps=10**6, max_seconds=30.0)[2]
    assert (short.engine, "limit of 30 s" in short.why) == ("traced", True)
    assert stepped("auto", total_steps=100)[2].why == "tracing takes longer than 100 steps"
    history = pv.fit(small(), X, max_epochs=2, device="cpu")
    assert (history.engine, history.why) == ("eager", "tracing takes longer than 2 steps")
    history = pv.fit(small(), X, max_epochs=60, batch_size=13, device="cpu")
    assert history.engine == "traced"
    assert "and saves" in history.why


def test_without_a_compiler_auto_runs_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, tensors: Any) -> None:
        raise UntraceableError("Inductor refuses its graph: no compiler")

    monkeypatch.setattr(engines.Graph, "compile", refuse)
    svi = stepped("auto", total_steps=10**6)[2]
    assert (svi.engine, "no compiler" in svi.why) == ("traced", True)
    with pytest.raises(ValueError, match="no compiler"):
        stepped("compiled")


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_bad_steps_change_nothing(engine: str) -> None:
    program = small(encoder=Dropping(6))
    svi = SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine=engine)
    with pyro.validation_enabled(False):
        svi.step(X)
        before = weights(program)
        svi.step(X * torch.nan)
        svi.step(X)
    assert (svi.is_bad, svi.good) == (1.0, 1.0)
    assert_same(before, weights(program))


class Classed(Branching):
    """A program with classes in words of zeros and ones."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            words = nn.functional.one_hot(x[:, 0].long(), num_classes=2)
            loc = words.to(x.dtype) @ torch.stack([self.loc, -self.loc])
            pyro.sample("z", dist.Normal(loc, 1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def test_classes_in_one_hot_words_are_traced() -> None:
    assert_alike(*(stepped(engine, Classed()) for engine in ("eager", "traced")))


def vi_stats(tree: Any) -> Any:
    """Of ArviZ 0.23 a data set, of 1.x the node of a tree."""
    group = tree["vi_stats"]
    return group.to_dataset() if hasattr(group, "to_dataset") else group


EVALUATIONS: dict[str, Callable[..., Any]] = {
    "log_evidence": lambda p, x: pv.log_evidence(p, x, 40, max_elements=200, seed=0),
    "to_arviz": lambda p, x: vi_stats(pv.to_arviz(p, x, 40, max_elements=200, seed=0)),
    "active_units": lambda p, x: pv.diagnostics.active_units(p, x, max_elements=200, seed=0),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_is_the_same_by_every_engine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = small(encoder=Dropping(6))
    found = {}
    ran: list[engines.Graph] = []
    run = engines.Graph.__call__
    monkeypatch.setattr(engines.Graph, "__call__", lambda g, *args: ran.append(g) or run(g, *args))
    for engine, worth in {"eager": 10**9, "traced": 0}.items():
        monkeypatch.setattr("pyro_vae.elbos.drawing.WORTH_TRACING", worth)
        found[engine] = EVALUATIONS[name](program, X)
        assert bool(ran) == (engine == "traced")
    tables = [
        f if name == "active_units" else f.to_dataframe().drop(columns="name", errors="ignore")
        for f in found.values()
    ]
    assert tables[0].equals(tables[1])


def test_compiled_evidence_is_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    program = small(encoder=Dropping(6))
    eager = pv.log_evidence(program, X, 40, max_elements=2000, seed=0)
    monkeypatch.setattr("pyro_vae.elbos.drawing.WORTH_TRACING", 0)
    monkeypatch.setattr("pyro_vae.elbos.drawing.WORTH_COMPILING", 0)
    compiled = pv.log_evidence(program, X, 40, max_elements=2000, seed=0)
    for name in ("log_evidence", "elbo", "mcse"):
        torch.testing.assert_close(
            torch.tensor(compiled[name].values),
            torch.tensor(eager[name].values),
            rtol=1e-4,
            atol=1e-5,
        )


def test_compiled_erfinv_is_right_to_rounding_over_its_whole_range() -> None:
    steps = torch.arange(2.0**12)
    near = (
        torch.tensor(-(2.0**-24)) * steps + 1.0,
        torch.linspace(-1.0, 1.0, 2**16),
        1e-9 * steps,
    )
    x = torch.cat([*near, -near[0], torch.tensor([0.0, 1.5, -1.5, torch.nan])])
    expected = torch.erfinv(x.double())
    torch.testing.assert_close(
        engines._erfinv(x).double(), expected, rtol=4e-7, atol=0.0, equal_nan=True
    )
    assert engines._FUSIBLE[torch.ops.aten.erfinv.default](x.double()) is NotImplemented


def test_fast_products_are_no_coarser_than_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = one.double() @ other.double()
    with engines.at_precision(engines.fast_precision(torch.device("cpu"))):
        error = (one @ other).double() - exact
    assert float(error.abs().max() / exact.abs().max()) < 2e-6  # 2e-3 in bfloat16


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "amx_tile": False}, "medium"),
        ({"cpu_name": "AMD EPYC", "amx_tile": True}, None),
        ({"cpu_name": "Intel(R) Xeon(R)", "amx_tile": False}, None),
        ({}, None),
    ],
)
def test_evidence_has_fast_products_where_they_are_exact(
    features: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    used: set[str] = set()

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            used.add(torch.get_float32_matmul_precision())
            return super().forward(x)

    assert engines.fast_precision(torch.device("cuda")) is None
    before = torch.get_float32_matmul_precision()
    program = small(encoder=nn.Sequential(Watched(X.shape[1], 5)))
    pv.log_evidence(program, X, 40, seed=0, refine=False, progress=False)
    assert used >= {before if expected is None else expected}
    assert torch.get_float32_matmul_precision() == before


def test_evidence_without_a_compiler_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, tensors: Any) -> None:
        raise UntraceableError("Inductor refuses its graph: no compiler")

    program = small()
    options: dict[str, Any] = {"max_elements": 200, "refine": False, "seed": 0}
    eager = pv.log_evidence(program, X, 40, **options)
    monkeypatch.setattr(engines.Graph, "compile", refuse)
    for name in ("WORTH_TRACING", "WORTH_COMPILING"):
        monkeypatch.setattr(f"pyro_vae.elbos.drawing.{name}", 0)
    traced = pv.log_evidence(program, X, 40, **options)
    assert traced.identical(eager)


@pytest.mark.parametrize("value", [-1, "many", float("nan")])
@pytest.mark.parametrize("option", ["total_steps", "max_seconds", "lr", "max_grad_norm"])
def test_numbers_out_of_range_are_refused(option: str, value: Any) -> None:
    program = small()
    with pytest.raises(ValueError, match=f"Expected {option} to be"):
        SVI(
            program.model,
            program.guide,
            torch.optim.Adam,
            pv.elbos.Trace_ELBO(),
            **{option: value},
        )


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize(
    ("x", "said"),
    [
        pytest.param(X + 0.5, "within the support", id="outside the support"),
        pytest.param(X[:, :-1], "cannot be multiplied", id="too narrow"),
        pytest.param(X[:0], "size cannot be zero", id="empty"),
        pytest.param(X * torch.nan, "constraint Real", id="NaN"),
    ],
)
def test_a_programs_own_errors_are_raised_by_every_engine(
    x: Tensor, said: str, engine: str
) -> None:
    program = small()
    svi = SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine=engine)
    before = weights(program)
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError), match=said):
        svi.step(x)
    assert_same(before, weights(program))


def test_a_program_that_cannot_be_traced_is_evaluated_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyro_vae.elbos.drawing.WORTH_TRACING", 0)
    evidence = pv.log_evidence(Branching(), X, 40, max_elements=50, seed=0)
    assert bool(evidence["log_evidence"].notnull().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (16,), (37,), (5, 9)])
def test_bernoulli_events_are_scored_alike_with_and_without_a_gradient(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    program = pv.VAE(shape, 2, pv.likelihoods.Bernoulli(), seed=0).to(dtype)
    scale = 40.0 if dtype == torch.float64 else 10.0
    z, x = scale * torch.randn(7, 4, 2, dtype=dtype), (torch.rand(4, *shape) < 0.5).to(dtype)
    with torch.no_grad():
        found = program.decode(z).log_prob(x)
    expected = program.decode(z).log_prob(x)
    torch.testing.assert_close(found, expected.detach())
    bits = dist.Bernoulli(logits=program.decode(z[0]).base_dist.logits, validate_args=True)
    with torch.no_grad(), pytest.raises(ValueError, match="support"):
        scoring.to_event(scoring.Bernoulli(logits=bits.logits, validate_args=True), 1).log_prob(
            x + 0.5
        )


@pytest.mark.parametrize("name", ["Trace_ELBO", "IWAE", "BetaELBO of DReG", "MMD"])
def test_many_repeats_of_per_row_are_traced_and_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = small(encoder=Dropping(6))
    found = []
    for worth in (10**9, 5):
        monkeypatch.setattr("pyro_vae.elbos.estimator.WORTH_TRACING", worth)
        elbo = ESTIMATORS[name]()
        torch.manual_seed(0)
        found.append(elbo.per_row(program, X, num_repeats=5))
    assert torch.equal(found[0].value, found[1].value)
    assert torch.equal(found[0].mcse, found[1].mcse)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_nothing_outlives_its_svi(engine: str) -> None:
    losses, _, svi = stepped(engine, program := small(), elbo=pv.elbos.DReG(3))
    kept = [weakref.ref(held) for held in (svi._step, svi.optimizer, program)]
    del svi, program
    gc.collect()
    assert losses
    assert [held() for held in kept] == [None, None, None]


@pytest.mark.parametrize("engine", ["eager", "traced", "compiled"])
def test_steps_leave_no_tensor_behind(engine: str) -> None:
    """Tensors that live after 40 steps are as many as after 20."""
    _, _, svi = stepped(engine, elbo=pv.elbos.IWAE(3))
    alive = []
    for _ in range(2):
        for _ in range(20):
            svi.step(X)
        gc.collect()
        alive.append(sum(type(held) is Tensor for held in gc.get_objects()))
    assert alive[0] == alive[1]


class Interrupting(Branching):
    """A program during which Ctrl-C is pressed, in the call that is asked for."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def model(self, x: Tensor) -> None:
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_while_it_is_traced_leaves_all_as_it_was(at: int) -> None:
    program = Interrupting(at)
    loc, before = program.loc, weights(program)
    svi = SVI(
        program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine="traced"
    )
    generator = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        svi.step(X)
    assert program.loc is loc
    assert_same(weights(program), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert pyro.settings.get("validate_poutine")
    assert not svi.optimizer.state
    assert_alike((svi.step(X).item(), weights(program)), _first_step(Interrupting(0), generator))


def _first_step(program: nn.Module, generator: Tensor) -> tuple[float, dict[str, Tensor]]:
    torch.set_rng_state(generator)
    svi = SVI(program.model, program.guide, torch.optim.Adam, pv.elbos.Trace_ELBO())
    return svi.step(X).item(), weights(program)
