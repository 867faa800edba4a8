"""Every argument of every public call, at bad values of its kind: one sentence, at once."""

import functools
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics import active_units
from pyro_vae.elbos import Estimator
from pyro_vae.evidence import bidirectional, linear_gaussian

ROWS, COLUMNS = 12, 4
NAN = float("nan")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, COLUMNS, generator=GENERATOR)
ELBOS = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(2)}


def vae(seed: int = 0) -> pv.VAE:
    return pv.VAE(COLUMNS, 2, pv.likelihoods.Normal(), None, pv.networks.MLP(4), seed=seed)


class Own(nn.Module):
    """A program of a user, with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.loc = fault, nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            if self.fault == "two plates":
                with pyro.plate("data", 2, dim=-2):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=x.sum(-1))
            elif self.fault == "raises":
                raise KeyError("height")
            elif self.fault != "observes nothing":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum(-1))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


class Returns(nn.Module):
    """A module that is no network."""

    def forward(self, x: Any = None) -> Any:
        return 3


def other_schedule(optimizer: Any) -> Any:
    elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return torch.optim.lr_scheduler.StepLR(elsewhere, 1)


WHOLE: list[Any] = [-1, 2.5, "10", NAN, True, 2**63, -(2**63), [10], np.float32(3.0), 1j]
COUNT = [0, None, *WHOLE]
DRAWS = [10**12, *COUNT]
FLAG: list[Any] = ["no", "yes", "", 0, 1, 2.0, None, NAN, [], np.int64(1)]
NUMBER: list[Any] = [0, -1.0, NAN, float("inf"), "1", True, [1.0], 1j]
WORD: list[Any] = ["no such word", "", None, 3, True, NAN, ["z"], b"auto"]
MODULE: list[Any] = [3, "vae", nn.Linear(COLUMNS, 2), pv.VAE, [], print]
FAULTS = [Own(fault) for fault in ("two plates", "observes nothing", "raises")]
PROGRAM = [None, vae().to("meta"), *FAULTS, *MODULE]
PATHS: list[Any] = [3, None, 2.5, []]

BAD: dict[str, list[Any]] = {
    "program": PROGRAM,
    "x": [
        *(3.0, "digits", {}, [], [[1.0], [1.0, 2.0]], object(), np.full((9, COLUMNS), "a")),
        *(X[:, :2], X[0, :2], X[:0], X[None], X * NAN, X / 0.0, X.to("meta"), X.to(torch.cfloat)),
        *({"y": X}, np.zeros((9, COLUMNS), "datetime64[s]"), pv.VAE, None),
    ],
    "context": ["a", 3.0, X[:3], X, {}],
    "weights": ["a", 3.0, torch.ones(3), -torch.ones(ROWS), torch.full((ROWS,), NAN), X],
    "num_samples": DRAWS,
    "num_rows": DRAWS,
    "num_repeats": DRAWS,
    "num_predictive": [value for value in DRAWS if value is not None],
    "size": DRAWS,
    "num_particles": DRAWS,
    "num_bounds": DRAWS,
    "num_simulations": DRAWS,
    "num_candidates": [value for value in DRAWS if value is not None],
    "near": FLAG,
    "refine": ["yes", "", 0, 1, 2.0, None, NAN, [], np.int64(1)],
    "max_elements": COUNT,
    "batch_size": COUNT,
    "max_steps": [value for value in COUNT if value is not None],
    "max_epochs": [value for value in COUNT if value is not None],
    "warmup": WHOLE,
    "seed": WHOLE,
    "lr": NUMBER,
    "max_seconds": NUMBER,
    "weight_prior": NUMBER,
    "max_grad_norm": NUMBER,
    "refit": FLAG,
    "bootstrap": FLAG,
    "separator": [3, None, [], ""],
    "decimal": [3, None, ";", ""],
    "index": [3, None, []],
    "columns": [3, None, [], "no such column", [3], ["a", "a"]],
    "drop": [3, None, "no such column", [3]],
    "threshold": [-1.0, NAN, "1", True, [1.0], None],
    "prob": [*NUMBER, 1.0, None],
    "progress": FLAG,
    "averaged": FLAG,
    "until_converged": FLAG,
    "resume": FLAG,
    "overwrite": FLAG,
    "header": FLAG,
    "standardize": FLAG,
    "vectorize_particles": FLAG,
    "scalar": FLAG,
    "validation": ["autom", "", 0, -1, 1.0, NAN, True, ROWS, 2**63, np.float32(1.5), X[:, :2]],
    "held_out": ["auto", 0, -1, 1.0, NAN, True, ROWS, None, 2**63, np.float32(1.5), X[:, :2]],
    "test": ["auto", 0, -1, 1.0, NAN, True, 2**63, None, np.float32(1.5), [0.2], X],
    "elbo": ["elbo", 3, pv.elbos.Trace_ELBO, pyro.infer.RenyiELBO(), nn.Linear(2, 2), []],
    "optimizer": [None, "adam", 3, nn.Linear, torch.optim.LBFGS, [], functools.partial(print)],
    "schedule": [other_schedule, 3, "step", torch.optim.lr_scheduler.StepLR, lambda o: None],
    "transform": [3, "log", X, lambda x: None, lambda x: x[:2], lambda x: x * NAN],
    "callbacks": [3, None, print, "save", [3], ["save"], [pv.Callback]],
    "engine": WORD,
    "precision": [value for value in WORD if value is not None],
    "device": ["meta", "gpu", "", 3.5, "cuda:99", [], True],
    "checkpoint": [3, 2.5, [], "."],
    "on_invalid": WORD,
    "method": WORD,
    "start": WORD,
    "chains": DRAWS,
    "num_temperatures": DRAWS,
    "site": [value for value in WORD if value is not None],
    "labels": [3, "a", [1, 2], X],
    "image_shape": [3, (2, 3), "a", (-2, -2), (2.0, 2.0), NAN],
    "programs": [None, 3, {}, [], vae(), {"a": 3}, {"a": nn.Linear(2, 2)}, {3: vae()}],
    "elbos": [None, 3, {}, [], {"a": 3}, {"a": pv.elbos.IWAE}, ELBOS["ELBO"]],
    "seeds": [None, 3, [], [1, 1], [-1], ["a"], [2.5], "ab", [2**63]],
    "budget": [0, -1, 2.5, "10", None, True, NAN, 2**63],
    "build": [None, 3, vae(), lambda seed: 3, lambda seed: vae(seed=torch.seed() % 2**62), "vae"],
    "after_each": [3, "print"],
    "reference": ["iwae", 3, -1, 2.5, True, X, np.full(ROWS, NAN), 10**12],
    "data": [0, -1, 2.5, "4", None, True, (), (0,), (2, -1), [2.5], 10**12, X],
    "prior": [0, -1, 2.5, "normal", None, True, dist.Normal, Returns(), 10**12, X],
    "likelihood": ["Normal", 3, None, pv.likelihoods.Normal, pv.posteriors.Normal(), [], X],
    "posterior": ["Normal", 3, pv.likelihoods.Normal(), Returns(), [], X],
    "encoder": ["MLP", 3, torch.relu, nn.Linear(2, 2), Returns(), [64], nn.Linear],
    "decoder": ["MLP", 3, torch.relu, nn.Linear(3, 2), Returns(), [64], nn.Linear],
    "model": [None, 3, "model", nn.Linear, []],
    "guide": [None, 3, "guide", nn.Linear, []],
    "plate": ["", None, 3, []],
    "optim": [None, "adam", 3, nn.Linear, torch.optim.LBFGS, []],
    "loss": ["elbo", 3, None, pv.elbos.Trace_ELBO, []],
    "total_steps": [value for value in COUNT if value is not None],
    "path": PATHS,
    "into": [3, "vae", nn.Linear, []],
    "name": ["digit", "table.xyz", "", *PATHS],
    "key": ["x", 3],
    "label": ["y", 3],
    "num_components": [0, -1, 2.5, "10", None, True, 10**12],
    "event_shape": [0, -1, 2.5, "4", None, True, (), (0,), (2, -1), 10**12, X],
    "component": [3, "Normal", nn.Linear(2, 2), []],
    "hidden": COUNT,
    "channels": COUNT,
    "num_partitions": DRAWS,
    "first_beta": [value for value in NUMBER if value != 0] + [0],
    "beta": ["1", NAN, -1.0, True, None, [1.0]],
    "alpha": ["1", NAN, True, None, [1.0]],
    "order": ["1", NAN, True, None, [1.0]],
    "weight": ["1", NAN, -1.0, True, None, [1.0]],
    "kernel": [3, "rbf", None],
    "max_plate_nesting": ["1", NAN, 1.5, -1, True, None],
    "shape": [0, -1, 2.5, "4", True, (), (0,), [2.5]],
    "nats": ["1", NAN, -1.0, True, None, [1.0]],
}

BAD["calibration_rows"] = BAD["x"]
BAD["cells"] = [value for value in BAD["prob"] if value is not None]

ASKED = {"program", "programs", "build", "x", "path"}
FREE = {
    "figure": "an object of matplotlib",
    "ax": "an object of matplotlib",
    "init": "checked when the family is built",
    "link": "checked when the family is built",
}

ROW = {"program": vae(), "x": X}
DIGITS = pv.datasets.load("digits")


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "fit": (pv.fit, ROW | {"max_epochs": 1}),
    "log_evidence": (pv.log_evidence, ROW),
    "linear_gaussian": (linear_gaussian, ROW),
    "embed": (pv.embed, ROW),
    "reconstruct": (pv.reconstruct, ROW),
    "sample": (pv.sample, {"program": vae(), "num_rows": 3}),
    "active_units": (active_units, ROW),
    "to_arviz": (pv.to_arviz, ROW),
    "gaps": (pv.gaps, ROW),
    "calibrate": (pv.calibrate, ROW | {"num_simulations": 20, "num_samples": 4}),
    "posterior": (pv.posterior, ROW),
    "bidirectional": (bidirectional, {"program": vae()}),
    "compare": (pv.compare, {"programs": {"a": vae(), "b": vae()}, "x": X}),
    "compare_elbos": (pv.compare_elbos, ROW | {"elbos": ELBOS}),
    "race": (pv.race, {"build": vae, "x": X, "elbos": ELBOS, "seeds": [0], "budget": 1}),
    "conformal": (pv.conformal, {"program": vae(), "calibration_rows": X}),
    "ensemble": (pv.ensemble, {"build": vae, "x": X, "seeds": [0], "max_epochs": 1}),
    "plots.reconstructions": (pv.plots.reconstructions, ROW),
    "plots.latents": (pv.plots.latents, ROW),
    "plots.prior_samples": (pv.plots.prior_samples, {"program": vae()}),
    "VAE": (pv.VAE, {"data": COLUMNS, "prior": 2, "likelihood": pv.likelihoods.Normal()}),
    "VAE.initialize": (vae().initialize, {"x": X}),
    "VAE.baselines": (vae().initialize(X).baselines, {"x": X}),
    "VAE.sample": (vae().sample, {"num_rows": 3}),
    "VAE.check": (vae().check, {"x": X}),
    "Program": (pv.Program, {"model": vae().model, "guide": vae().guide}),
    "SVI": (
        pv.svi.SVI,
        {"model": vae().model, "guide": vae().guide}
        | {"optim": torch.optim.Adam, "loss": pv.elbos.Trace_ELBO()},
    ),
    "per_row": (pv.elbos.Trace_ELBO().per_row, ROW),
    "save": (pv.save, {"program": vae(), "path": "vae"}),
    "load": (pv.load, {"path": "vae"}),
    "datasets.load": (pv.datasets.load, {"name": "digits"}),
    "Dataset.split": (DIGITS.split, {}),
    "Shared": (pv.Shared, {}),
    "MixturePrior": (pv.priors.Mixture, {"num_components": 3, "event_shape": 2}),
    "VampPrior": (pv.priors.VampPrior, {"num_components": 3, "event_shape": 2}),
    "StandardNormal": (pv.priors.StandardNormal, {"event_shape": 2}),
    "MLP": (lambda hidden: pv.networks.MLP(hidden), {"hidden": 4}),
    "Convolution": (lambda channels: pv.networks.Convolution(channels), {"channels": 4}),
    "Deconvolution": (lambda channels: pv.networks.Deconvolution(channels), {"channels": 4}),
}

KNOBS = {  # of estimators, whose constructors need them
    "BetaELBO": {"beta": 2.0},
    "MIWAE": {"num_bounds": 2, "num_particles": 2},
    "PIWAE": {"num_bounds": 2, "num_particles": 2},
    "CIWAE": {"num_particles": 2, "beta": 0.5},
    "Renyi": {"num_particles": 2, "alpha": 0.5},
    "FreeBits": {"nats": 0.5},
    "MMD": {"weight": 1.0},
    "TotalCorrelation": {"beta": 2.0},
    **dict.fromkeys(("IWAE", "RWS", "VIMCO", "DReG", "CUBO", "TVO"), {"num_particles": 2}),
}
for name, cls in vars(pv.elbos).items():
    if inspect.isclass(cls) and issubclass(cls, Estimator) and not inspect.isabstract(cls):
        CALLS[f"elbos.{name}"] = (cls, KNOBS.get(name, {}))


def bad_values(call: str, name: str) -> list[Any]:
    return [value for value in BAD.get(name, []) if not is_right(call, name, value)]


def is_right(call: str, name: str, value: Any) -> bool:
    """Whether a value that is bad elsewhere is good in this call."""
    match call, name, value:
        case (
            ("elbos.TotalCorrelation", "num_rows", None | 1000000000000)
            | ("elbos.BetaELBO", "elbo", None)
            | ("log_evidence", "num_samples", None)
            | ("sample" | "bidirectional" | "plots.prior_samples" | "calibrate", "x", None)
            | ("plots.prior_samples", "size", None)
            | ("plots.prior_samples", "data", None | Tensor())
            | ("datasets.load", "header" | "separator" | "decimal" | "index", None)
            | ("datasets.load", "columns" | "drop", None)
            | ("per_row", "program", Own(fault="observes nothing"))
            | ("SVI", "lr", 0)
            | ("ensemble", "seeds", 3)
            | ("save", "program", Own() | nn.Linear())
            | ("linear_gaussian", "program", Own())
            | ("VampPrior", "data", _)
            | ("compare", "programs", {3: _})
            | ("Shared", "shape", ())
        ):
            return True
    return False


CASES = [
    (call, name)
    for call, (function, _) in CALLS.items()
    for name in inspect.signature(function).parameters
    if bad_values(call, name)
]


def complaint(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """What is wrong with the answer to a bad argument; nothing if it is one sentence at once."""
    generator, start = torch.get_rng_state(), time.perf_counter()
    try:
        function(**arguments)
    except ValueError as error:
        said = str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    if not said[:1].isupper() or "\n" in said or not said.endswith((".", ")")):
        return f"no sentence: {said}"
    if time.perf_counter() - start > 2.0:
        return f"late: {said}"
    return "" if torch.equal(torch.get_rng_state(), generator) else f"drew before: {said}"


@pytest.mark.parametrize(("call", "name"), CASES)
def test_a_bad_argument_is_refused_in_one_sentence(
    call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, valid = CALLS[call]
    weights = [value.clone() for value in ROW["program"].state_dict().values()]
    answers = {
        f"{place}: {' '.join(repr(value).split())[:40]}": complaint(
            function, valid | {name: value}
        )
        for place, value in enumerate(bad_values(call, name))
    }
    assert {value: answer for value, answer in answers.items() if answer} == {}
    after = ROW["program"].state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_every_public_call_and_every_argument() -> None:
    tables = [pv, pv.plots, pv.evidence, pv.diagnostics, pv.datasets]
    functions = {
        function
        for table in tables
        for name, function in vars(table).items()
        if inspect.isfunction(function) and not name.startswith("_")
        if {"program", "programs", "build", "x", "path"}
        & {*inspect.signature(function).parameters}
        if function.__module__.startswith("pyro_vae") and name != "plain_file"
    }
    assert functions - {function for function, _ in CALLS.values()} <= {pv.datasets.binarize}
    named = {
        name
        for function, _ in CALLS.values()
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert named - BAD.keys() == FREE.keys()
    assert sum(len(bad_values(*case)) for case in CASES) >= 2000


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_argument_is_named_by_python(call: str) -> None:
    function, valid = CALLS[call]
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name in valid:
            with pytest.raises(TypeError, match=name):
                function(**{k: v for k, v in valid.items() if k != name})
