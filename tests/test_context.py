"""Covariates and weights reach a program of one's own; cells that it masks are missing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics import active_units, compare, compare_elbos, race, to_arviz
from pyro_vae.evidence import linear_gaussian, log_evidence

ROWS = 30
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, generator=GENERATOR, dtype=torch.float64)
CONTEXT = torch.randn(ROWS, 2, generator=GENERATOR, dtype=torch.float64)
WEIGHTS = torch.rand(ROWS, generator=GENERATOR, dtype=torch.float64) + 0.5
BESIDE: dict[str, Any] = {"context": CONTEXT, "weights": WEIGHTS}


class Regression(nn.Module):
    """z ~ N(0, 1), x ~ N(z + c b, 1 / w), the guide exact: p(x) = N(c b, 1 + 1 / w)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def model(self, row: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            z = pyro.sample("z", dist.Normal(row["x"].new_zeros(()), 1.0))
            loc = z + row["context"] @ self.slope
            pyro.sample("x", dist.Normal(loc, row["weight"] ** -0.5), obs=row["x"])

    def guide(self, row: dict[str, Tensor]) -> None:
        weight = row["weight"]
        loc = weight * (row["x"] - row["context"] @ self.slope) / (1 + weight)
        with pyro.plate("data", len(row["x"])):
            pyro.sample("z", dist.Normal(loc, (1 + weight) ** -0.5))

    def exact(self) -> np.ndarray:
        marginal = dist.Normal(CONTEXT @ self.slope, (1 + 1 / WEIGHTS).sqrt())
        return marginal.log_prob(X).detach().numpy()


class Plain(Regression):
    """The same, but x is all of a row."""

    def _row(self, x: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        x = x["x"] if isinstance(x, dict) else x
        return {"x": x, "context": torch.ones(len(x), 2).to(x), "weight": torch.ones_like(x)}

    def model(self, row: Any) -> None:
        super().model(self._row(row))

    def guide(self, row: Any) -> None:
        super().guide(self._row(row))


def test_the_evidence_of_a_program_with_context_and_weights_is_exact() -> None:
    program = Regression()
    found = log_evidence(program, X, 10, seed=0, **BESIDE)
    np.testing.assert_allclose(found["log_evidence"], program.exact(), rtol=1e-10)
    row = {"x": X, "context": CONTEXT, "weight": WEIGHTS}
    np.testing.assert_array_equal(log_evidence(program, row, 10, seed=0)["elbo"], found["elbo"])


def test_frames_beside_x_keep_the_labels_of_rows() -> None:
    labels = [f"patient {i}" for i in range(ROWS)]
    context = pd.DataFrame(CONTEXT.numpy(), index=labels, columns=["age", "dose"])
    weights = pd.Series(WEIGHTS.numpy(), index=labels)
    found = log_evidence(Regression(), X, 10, context=context, weights=weights)
    assert found["datum"].to_numpy().tolist() == labels


def test_compare_passes_context_and_weights_to_every_program() -> None:
    program = Regression()
    table = compare({"right": program, "again": program}, X, 10, **BESIDE)
    np.testing.assert_allclose(table["log_evidence"], program.exact().mean(), rtol=1e-10)
    with pytest.raises(ValueError, match=r"0 or more.*\(program 'right'\)"):
        compare({"right": program}, X, 10, context=CONTEXT, weights=-WEIGHTS)


def test_to_arviz_of_a_program_with_context_and_weights() -> None:
    tree = to_arviz(Regression(), X, 10, seed=0, **BESIDE)
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)
    assert tree["posterior"]["z"].shape == (1, 10, ROWS)


def test_the_other_diagnostics_take_context_and_weights() -> None:
    program = Regression()
    assert active_units(program, X, 20, seed=0, **BESIDE).index.to_list() == ["z"]
    assert linear_gaussian(program, X, **BESIDE) is None
    elbos = {"ELBO": pv.elbos.Trace_ELBO()}
    assert len(compare_elbos(program, X, elbos, num_repeats=4, reference=16, **BESIDE).table) == 1


def test_race_passes_context_and_weights_to_its_trainings() -> None:
    elbos = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(2)}
    options: dict[str, Any] = {"budget": 1, "num_samples": 10, "device": "cpu", "held_out": 10}
    found = race(lambda seed: Regression(), X, elbos, [0], **options, **BESIDE)
    assert found.table.attrs["num_rows"] == 10
    assert found.table["log_evidence"].notna().all()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log_evidence": lambda program, x, **beside: log_evidence(program, x, 10, seed=0, **beside),
    "to_arviz": lambda program, x, **beside: to_arviz(program, x, 10, seed=0, **beside)[
        "posterior"
    ],
    "active_units": lambda program, x, **beside: active_units(program, x, seed=0, **beside),
    "compare": lambda program, x, **beside: compare({"a": program}, x, 10, seed=0, **beside),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_context_and_weights_the_numbers_are_those_of_plain_rows(name: str) -> None:
    function, program = FUNCTIONS[name], Plain()
    plain = function(program, X)
    assert function(program, {"x": X}).equals(plain)
    assert function(program, X, context=None, weights=None).equals(plain)
    assert function(program, X, context=CONTEXT, weights=WEIGHTS).equals(plain)


def test_a_vae_says_that_it_does_not_use_context_and_weights_yet() -> None:
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="VAE does not use context of a row yet: .* of your own"):
        log_evidence(vae, x, 10, context=torch.ones(5, 1))
    with pytest.raises(ValueError, match="VAE does not use context and weight of a row yet"):
        to_arviz(vae, x, 10, context=torch.ones(5, 1), weights=torch.ones(5))
    with pytest.raises(ValueError, match="VAE does not use weight of a row yet"):
        vae.model({"x": x, "weight": torch.ones(5)})


def test_a_vae_takes_x_in_a_dict() -> None:
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    x = torch.randn(5, 4)
    plain, in_dict = (log_evidence(vae, row, 10, seed=0) for row in (x, {"x": x}))
    assert in_dict.equals(plain)
    assert len(pv.fit(vae, {"x": x}, max_epochs=1, device="cpu")) == 1


def test_one_row_has_an_evidence() -> None:
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    frame = pd.DataFrame(torch.randn(5, 4).numpy(), index=list("abcde"), columns=list("wxyz"))
    one = log_evidence(vae, frame.loc["c"], 10, seed=0)
    assert one["datum"].to_numpy().tolist() == ["c"]
    assert one.equals(log_evidence(vae, frame.loc[["c"]], 10, seed=0))


CELLS = torch.randn(ROWS, 3, generator=GENERATOR)
SEEN = torch.rand(ROWS, 3, generator=GENERATOR) < 0.7


class Holes(nn.Module):
    """z ~ N(0, 1), x_d ~ N(z, 1), of which some cells are masked in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.loc = way, nn.Parameter(torch.zeros(()))

    def model(self, row: dict[str, Tensor]) -> None:
        x, seen = row["x"], row["seen"]
        if self.way == "counts":
            x = x.round().abs().long()
        with pyro.plate("data", len(x), dim=-1 if self.way != "plate" else -2):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            if self.way == "plate":
                with pyro.plate("cells", 3, dim=-1), poutine.mask(mask=seen):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            elif self.way == "rows":
                with poutine.mask(mask=seen[:, 0]):
                    pyro.sample("x", self._likelihood(z[..., None], seen), obs=x)
            else:
                pyro.sample("x", self._likelihood(z[..., None], seen), obs=x)

    def _likelihood(self, z: Tensor, seen: Tensor) -> Any:
        z = z.expand(*z.shape[:-1], 3)
        return {
            "under to_event": lambda: dist.Normal(z, 1.0).mask(seen).to_event(1),
            "over to_event": lambda: dist.Normal(z, 1.0).to_event(1).mask(seen[:, 0]),
            "all": lambda: dist.Normal(z, 1.0).to_event(1).mask(False),
            "rows": lambda: dist.Normal(z, 1.0).to_event(1),
            "none": lambda: dist.Normal(z, 1.0).to_event(1),
            "counts": lambda: dist.Poisson(z.exp()).mask(seen).to_event(1),
        }[self.way]()

    def guide(self, row: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(row["x"]), dim=-1 if self.way != "plate" else -2):
            loc = self.loc if self.way != "plate" else self.loc.reshape(1, 1)
            pyro.sample("z", dist.Normal(loc, 1.0))


MASKS: dict[str, Tensor] = {
    "plate": SEEN,
    "rows": SEEN[:, :1].expand(-1, 3),
    "under to_event": SEEN,
    "over to_event": SEEN[:, :1].expand(-1, 3),
    "all": torch.zeros_like(SEEN),
    "none": torch.ones_like(SEEN),
    "counts": SEEN,
}


@pytest.mark.parametrize("way", MASKS)
@pytest.mark.parametrize("max_elements", [100, 2**20])
def test_masked_cells_are_missing_in_observed_data(way: str, max_elements: int) -> None:
    row = {"x": CELLS, "seen": SEEN}
    tree = to_arviz(Holes(way), row, 5, seed=0, max_elements=max_elements)
    found = tree["observed_data"]["x"].to_numpy()
    data = CELLS.round().abs() if way == "counts" else CELLS
    np.testing.assert_array_equal(found, data.where(MASKS[way], torch.nan))
    assert not np.isnan(tree["posterior_predictive"]["x"]).any()
