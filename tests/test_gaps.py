"""The approximation and the amortisation gap, against programs where both are known."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from own_programs import Mixture, SharedLevel, TwoLevels
from programs import LinearGaussian, linear_gaussian
from small_vae import small
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics.gaps import Gaps
from pyro_vae.elbos.log_densities import structure
from pyro_vae.evidence.unconstrained import Space

QUIET: dict[str, Any] = {"seed": 0, "progress": False}


class MeanField(LinearGaussian):
    """Independent latents, the best for each row but for a shift and a factor on the scale."""

    def __init__(self, weight: Tensor, *, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__(weight, factor=factor)
        self.shift = shift

    def guide(self, x: Tensor) -> None:
        mean, covariance = self.posterior(x)
        scale = torch.linalg.inv(covariance).diagonal().rsqrt() * self.factor
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean + self.shift, scale).to_event(1))

    def known(self, x: Tensor) -> tuple[float, float]:
        """The approximation and the amortisation gap, the same for every row."""
        with torch.no_grad():
            precision = torch.linalg.inv(self.posterior(x)[1])
            approximation = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
            size, shift = len(precision), torch.full((len(precision),), self.shift).double()
            squares = self.factor**2 - 1.0 - 2.0 * np.log(self.factor)
            amortisation = 0.5 * (size * squares + shift @ precision @ shift)
        return float(approximation), float(amortisation)


class Untrained(MeanField):
    """The encoder is frozen where it began: the same q for all rows."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).to(x), 0.5).to_event(1))


def mean_field(rows: int = 40, **options: float) -> tuple[MeanField, Tensor]:
    """Latents that are correlated by 0.8 or so in the posterior, and rows of the model."""
    generator = torch.Generator().manual_seed(0)
    normal: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    one, other = torch.randn(2, 5, **normal)
    program = MeanField(torch.stack([one, 0.8 * one + 0.6 * other], 1), **options)
    noise = program.noise * torch.randn(rows, 5, **normal)
    return program, torch.randn(rows, 2, **normal) @ program.weight.detach().T + noise


def assert_right(found: Gaps, approximation: float, amortisation: float) -> None:
    """Both parts are within their errors, which are those of the rows, and so are the means."""
    for name, expected in (("approximation", approximation), ("amortisation", amortisation)):
        error = found[name].to_numpy() - expected
        mcse = found[f"{name}_mcse"].to_numpy()
        z = error / (mcse + 0.003)  # the last step of the best q is not its limit
        assert (np.abs(z) < 3.5).mean() >= 0.97, name
        assert (np.abs(z) < 5.0).all(), name
        assert abs(error.mean()) < 4.0 * found.summary().loc[name, "mcse"] + 0.003, name
        assert mcse.max() < 0.2 * max(1.0, approximation + amortisation), name


OFF: dict[str, dict[str, float]] = {
    "the best": {},
    "shifted": {"shift": 0.3},
    "narrow": {"factor": 0.5},
    "wide and shifted": {"factor": 1.5, "shift": -0.2},
}


@pytest.mark.parametrize("name", OFF)
def test_a_mean_field_guide_of_known_gaps(name: str) -> None:
    program, x = mean_field(**OFF[name])
    found = pv.gaps(program, x, **QUIET)
    assert found.attrs["family"] == "independent normal latents"
    approximation, amortisation = program.known(x)
    assert 0.2 < approximation < 1.0
    assert_right(found, approximation, amortisation)
    total = found["log_evidence"] - found["elbo"]
    np.testing.assert_allclose(found["approximation"] + found["amortisation"], total, atol=1e-9)
    exact = program.log_evidence(x)
    np.testing.assert_allclose(found["log_evidence"], exact, atol=0.15)
    np.testing.assert_allclose(found["refined_elbo"], exact - approximation, atol=0.15)


def test_errors_are_those_of_rows_of_equal_gaps() -> None:
    program, x = mean_field(rows=100, shift=0.1)
    known = dict(zip(("approximation", "amortisation"), program.known(x)))
    found = pv.gaps(program, x, 400, seed=3, progress=False)
    for name, expected in known.items():
        z = (found[name] - expected) / found[f"{name}_mcse"]
        assert 0.75 < np.sqrt(np.square(z).mean()) < 1.3, name


def test_an_untrained_encoder_widens_the_gap_of_amortisation_alone() -> None:
    trained, x = mean_field(rows=30)
    program = Untrained(trained.weight.detach())
    one, other = (pv.gaps(p, x, **QUIET) for p in (trained, program))
    error = np.hypot(one["approximation_mcse"], other["approximation_mcse"])
    assert (np.abs(one["approximation"] - other["approximation"]) < 4 * error + 0.003).all()
    assert_right(one, program.known(x)[0], 0.0)
    exact = program.log_evidence(x) - program.known(x)[0]
    np.testing.assert_allclose(other["refined_elbo"], exact, atol=0.15)  # far rows too
    with torch.no_grad():
        mean, covariance = program.posterior(x)
        posterior = torch.distributions.MultivariateNormal(mean, covariance)
        q = torch.distributions.MultivariateNormal(
            torch.zeros_like(mean), 0.25 * torch.eye(2).double()
        )
        kl = torch.distributions.kl_divergence(q, posterior).numpy()
    z = (other["amortisation"] - (kl - program.known(x)[0])) / other["amortisation_mcse"]
    assert (np.abs(z) < 4).all()
    assert (other["amortisation"] > one["amortisation"]).all()
    assert "a larger encoder, or longer training, by up to" in other.advice()


def test_a_guide_of_any_covariance_has_no_gap_of_approximation() -> None:
    program, x = linear_gaussian(rows=40, factor=0.6)
    found = pv.gaps(program, x, **QUIET)
    assert found.attrs["family"] == "a normal distribution"
    assert_right(found, 0.0, program.kl())
    exact, x = linear_gaussian(rows=3)
    best = pv.gaps(exact, x, **QUIET)
    assert float(np.abs(best["approximation"]).max()) < 0.01
    assert float(np.abs(best["amortisation"]).max()) < 0.01
    assert best.advice() == (
        "The ELBO is within 0.1 nats per row of log p(x), as far as it can be seen."
    )


class OneEach(nn.Module):
    """A site of a named kind in the guide, for the family that the guide is taken to be."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.zero = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Normal(self.zero.expand(2), 1.0).to_event(1)
            if self.kind == "LogNormal":
                prior = dist.LogNormal(self.zero.expand(2), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        zero = self.zero + 0.0 * x
        made: dict[str, Any] = {
            "Normal": lambda: dist.Normal(zero, 1.0).to_event(1),
            "LogNormal": lambda: dist.LogNormal(zero, 1.0).to_event(1),
            "MultivariateNormal": lambda: dist.MultivariateNormal(zero, torch.eye(2)),
            "flow": lambda: dist.TransformedDistribution(
                dist.Normal(zero, 1.0).to_event(1),
                [dist.transforms.LowerCholeskyAffine(self.zero.expand(2), torch.eye(2))],
            ),
        }
        with pyro.plate("data", len(x)):
            pyro.sample("z", made[self.kind]())


FAMILIES = {"Normal": True, "LogNormal": True, "MultivariateNormal": False, "flow": False}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_family_is_that_of_the_guide(kind: str) -> None:
    program, x = OneEach(kind), torch.rand(2, 2) + 0.1
    space = Space.of(program, structure(program, x), x)
    assert space.is_mean_field(x) == FAMILIES[kind]


def test_latents_of_several_sites_have_any_covariance() -> None:
    program, x = TwoLevels(), torch.zeros(2, 2)
    assert not Space.of(program, structure(program, x), x).is_mean_field(x)


def made(approximation: float, amortisation: float, family: str) -> Gaps:
    """Gaps of four rows with small errors."""
    values = {"approximation": approximation, "amortisation": amortisation}
    variables: dict[str, Any] = {}
    for name, value in values.items():
        variables[name] = ("datum", np.full(4, value))
        variables[f"{name}_mcse"] = ("datum", np.full(4, 0.02))
    return Gaps(variables, attrs={"family": family, "note": "error unknown in 1 of 4 rows"})


ADVICE = {
    (0.05, 0.05, "a normal distribution"): "The ELBO is within 0.1 nats per row of log p(x)",
    (1.5, 0.0, "independent normal latents"): "richer posterior than independent normal latents, "
    "such as MultivariateNormal, by up to 1.50 nats per row.",
    (1.5, 0.0, "a normal distribution"): "richer posterior than a normal distribution, such as a "
    "flow, by up to 1.50",
    (
        0.0,
        2.0,
        "a normal distribution",
    ): "from a larger encoder, or longer training, by up to 2.00",
    (1.0, 2.0, "a normal distribution"): "training, by up to 2.00 nats per row; and from a richer",
    (2.0, 1.0, "a normal distribution"): "by up to 2.00 nats per row; and from a larger encoder",
}


@pytest.mark.parametrize("case", ADVICE)
def test_the_advice_is_a_sentence(case: tuple[float, float, str]) -> None:
    found = made(*case)
    assert re.search(re.escape(ADVICE[case]), found.advice())
    assert found.advice().endswith(".")


def test_the_summary_averages_the_rows() -> None:
    found = made(1.5, 0.2, "a normal distribution")
    table = found.summary()
    assert table.columns.to_list() == ["mean", "se", "mcse", "note"]
    assert table["mean"].to_list() == pytest.approx([1.5, 0.2])
    assert table["mcse"].to_list() == pytest.approx([0.01, 0.01])
    assert table["note"].to_list() == ["error unknown in 1 of 4 rows", ""]


def test_a_seed_fixes_the_result_its_labels_are_those_of_the_rows() -> None:
    program, x = mean_field(rows=2, shift=0.3)
    program.train()
    frame = pd.DataFrame(x.numpy(), index=["a", "b"])
    state, before = torch.get_rng_state(), program.weight.detach().clone()
    one, two = (pv.gaps(program, frame, 100, **QUIET) for _ in range(2))
    assert one.equals(two)
    assert one["datum"].to_numpy().tolist() == ["a", "b"]
    assert all({"units", "long_name"} <= one[name].attrs.keys() for name in one)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(program.weight.detach(), before)
    assert program.weight.grad is None
    assert program.training


def test_the_picture_has_a_curve_for_each_gap() -> None:
    found = pv.gaps(small(), torch.ones(5, 6), 100, **QUIET)
    figure = found.plot()
    axes = figure.subplots()
    assert found.plot(ax=axes) is figure
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["approximation", "amortisation"]
    assert "nats" in axes.get_xlabel()
    assert axes.get_title() == "What the ELBO loses, 5 rows"
    with pytest.raises(ValueError, match="Expected the variables"):
        pv.plots.gaps(found[["elbo"]])


REFUSED: dict[str, tuple[Any, str]] = {
    "discrete latents": (lambda: pv.gaps(Mixture(), torch.zeros(3)), "continuous.*got k"),
    "a shared latent": (lambda: pv.gaps(SharedLevel(), torch.zeros(3)), "m"),
    "a point mass": (
        lambda: pv.gaps(small(posterior=pv.posteriors.Delta()), torch.ones(3, 6)),
        "point masses",
    ),
    "few draws": (lambda: pv.gaps(small(), torch.ones(3, 6), 99), "num_samples.*at least 100"),
    "no rows": (lambda: pv.gaps(small(), torch.ones(0, 6)), "at least one row"),
    "no program": (lambda: pv.gaps(nn.Linear(6, 2), torch.ones(3, 6)), "Expected a program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gaps_is_refused(name: str) -> None:
    call, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        call()
