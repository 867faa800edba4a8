"""log p(x, z) and log q(z | x) of a program against sums by hand, in double precision."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import POSTERIORS, PRIORS
from programs import Grid, linear_gaussian
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.elbos.log_densities import Densities, log_densities, row_terms_of, structure

PARTICLES, ROWS = 5, 4


def normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64)
    standard = (value - loc) / scale
    return -0.5 * standard**2 - scale.log() - 0.5 * torch.tensor(2 * torch.pi).double().log()


def bernoulli(value: Tensor, logits: Tensor) -> Tensor:
    return value * logits - torch.nn.functional.softplus(logits)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == (PARTICLES, ROWS)
    torch.testing.assert_close(found.double(), expected.expand(PARTICLES, ROWS))


def test_of_a_vae() -> None:
    vae = pv.VAE((3,), 2, pv.likelihoods.Bernoulli(), seed=0).double()
    x = torch.randint(0, 2, (ROWS, 3)).double()
    found = log_densities(vae, x, PARTICLES)
    z = found.values["z"]
    assert z.shape == (PARTICLES, ROWS, 2)
    features = vae.encoder(x)
    heads = vae.posterior.heads
    loc, scale = (
        heads["loc"].linear(features),
        nn.functional.softplus(heads["scale"].linear(features)) + 1e-6,
    )
    logits = vae.likelihood.heads["logits"].linear(vae.decoder(z.reshape(-1, 2)))
    log_likelihood = bernoulli(x, logits.reshape(PARTICLES, ROWS, 3)).sum(-1)
    log_prior, log_q = normal(z, 0.0, 1.0).sum(-1), normal(z, loc, scale).sum(-1)
    close(found.model["z"], log_prior)
    close(found.model["x"], log_likelihood)
    close(found.guide["z"], log_q)
    close(found.log_joint, log_prior + log_likelihood)
    close(found.log_guide, log_q)
    close(found.log_weights, log_prior + log_likelihood - log_q)
    close(found.reconstruction, log_likelihood)
    close(found.kl, log_q - log_prior)


@pytest.mark.parametrize(
    ("role", "name"),
    [("prior", name) for name in PRIORS] + [("posterior", name) for name in POSTERIORS],
)
def test_of_every_prior_and_posterior(role: str, name: str) -> None:
    case = (PRIORS if role == "prior" else POSTERIORS)[name]
    asked = {"data": 3, "prior": 2, "likelihood": pv.likelihoods.Normal()}
    vae = pv.VAE(**asked | case.beside | {role: case.make()}).double()
    x = torch.randn(ROWS, 3, dtype=torch.float64)
    found = log_densities(vae, x, PARTICLES)
    z = found.values["z"]
    prior = poutine.trace(vae.model).get_trace(size=1).nodes["z"]["fn"]
    close(found.model["z"], prior.log_prob(z))
    close(found.model["x"], vae.decode(z).log_prob(x))
    close(found.guide["z"], vae.encode(x).log_prob(z))


def test_sums_are_in_double_precision() -> None:
    vae = pv.VAE((3,), 2, pv.likelihoods.Bernoulli(), seed=0)
    found = log_densities(vae, torch.ones(ROWS, 3), PARTICLES)
    for total in (found.log_joint, found.log_guide, found.log_weights, found.kl):
        assert total.dtype == torch.float64


def test_gradients_flow_through() -> None:
    vae = pv.VAE((3,), 2, pv.likelihoods.Bernoulli(), seed=0)
    log_densities(vae, torch.ones(ROWS, 3), PARTICLES).log_weights.sum().backward()
    assert all(p.grad is not None for p in vae.parameters())


class Everything(nn.Module):
    """Plates to both sides of the rows, masks, scales, a dict of fields, computed sites.

    Dims from the right: items (-1), data (-2), views (-3).
    """

    views, items = 2, 3

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.scale = scale

    def model(self, x: dict[str, Tensor]) -> None:
        rows = len(x["flag"])
        views = pyro.plate("views", self.views, dim=-3)
        items = pyro.plate("items", self.items, dim=-1)
        with poutine.scale(scale=self.scale), pyro.plate("data", rows, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z, event_dim=1)
            pyro.sample("flag", dist.Bernoulli(logits=z[..., 0]), obs=x["flag"][:, None])
            with items:
                w = pyro.sample("w", dist.Normal(z[..., 1], 2.0))
                mask = x["seen"]
                with poutine.mask(mask=mask):
                    pyro.sample("cells", dist.Normal(w, 0.5), obs=x["cells"])
            with views:
                score = z @ self.weight
                pyro.sample("views_of_x", dist.Normal(score, 1.5), obs=x["views"])

    def guide(self, x: dict[str, Tensor]) -> None:
        rows = len(x["flag"])
        with pyro.plate("data", rows, dim=-2):
            loc = torch.stack([x["flag"], x["views"].mean((0, 2))], -1)[:, None]
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))
            with pyro.plate("items", self.items, dim=-1):
                pyro.sample("w", dist.Normal(0.5 * x["cells"], 0.9))


def everything() -> dict[str, Tensor]:
    return {
        "flag": torch.randint(0, 2, (ROWS,)).double(),
        "cells": torch.randn(ROWS, Everything.items, dtype=torch.float64),
        "seen": torch.rand(ROWS, Everything.items) < 0.6,
        "views": torch.randn(Everything.views, ROWS, 1, dtype=torch.float64),
    }


class Turned(Everything):
    """The same, its fields by rows first."""

    def model(self, x: dict[str, Tensor]) -> None:
        super().model(turned(x))

    def guide(self, x: dict[str, Tensor]) -> None:
        super().guide(turned(x))


def turned(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**x, "views": x["views"].movedim(0, 1)}


def by_rows(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**x, "views": x["views"].movedim(1, 0)}


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_of_a_program_with_everything(scale: float) -> None:
    program, x = Turned(scale=scale), everything()
    found = log_densities(program, by_rows(x), PARTICLES)
    z, w = found.values["z"], found.values["w"]
    assert z.shape == (PARTICLES, ROWS, 2)
    assert w.shape == (PARTICLES, ROWS, Everything.items)
    close(found.model["z"], normal(z, 0.0, 1.0).sum(-1))
    close(found.model["flag"], bernoulli(x["flag"], z[..., 0]))
    close(found.model["w"], normal(w, z[..., 1:], 2.0).sum(-1))
    close(found.model["cells"], (normal(x["cells"], w, 0.5) * x["seen"]).sum(-1))
    score = z @ program.weight
    views = normal(x["views"][..., 0][:, None], score, 1.5).sum(0)
    close(found.model["views_of_x"], views)
    loc = torch.stack([x["flag"], x["views"].mean((0, 2))], -1)
    close(found.guide["z"], normal(z, loc, 0.7).sum(-1))
    close(found.guide["w"], normal(w, 0.5 * x["cells"], 0.9).sum(-1))
    observed = found.model["flag"] + found.model["cells"] + found.model["views_of_x"]
    close(found.reconstruction, observed)
    close(found.log_joint, observed + found.model["z"] + found.model["w"])
    close(found.kl, found.log_guide - found.model["z"] - found.model["w"])


def test_the_structure_of_a_program_with_everything() -> None:
    known = structure(Turned(scale=3.0), by_rows(everything()))
    assert (known.rows_dim, known.max_plate_nesting) == (-2, 3)
    assert (known.latents, known.global_latents) == (("z", "w"), ())
    assert known.observed == ("flag", "cells", "views_of_x")
    assert known.event_shapes["z"] == (2,)
    assert known.event_shapes["w"] == ()
    assert known.discrete == {"flag": True, "cells": False, "views_of_x": False}
    assert known.is_scaled
    assert not structure(Turned(), by_rows(everything())).is_scaled


def test_terms_of_rows_agree_with_the_densities() -> None:
    program, x = Turned(), by_rows(everything())
    torch.manual_seed(3)
    terms = row_terms_of(program.model, program.guide, x)
    assert terms.elbo.shape == (ROWS,)
    torch.manual_seed(3)
    found = log_densities(program, x, 1, known=structure(program, x))
    torch.testing.assert_close(terms.reconstruction, found.reconstruction[0])
    torch.testing.assert_close(terms.kl, found.kl[0])


def test_rows_left_of_columns() -> None:
    program = Grid()
    x = {"cells": torch.randn(ROWS, 3).double(), "flag": torch.ones(ROWS).double()}
    found = log_densities(program, x, PARTICLES)
    z = found.values["z"]
    assert z.shape == (PARTICLES, ROWS)
    close(found.model["z"], normal(z, 0.0, 1.0))
    close(found.model["flag"], bernoulli(x["flag"], z))
    close(found.model["cells"], normal(x["cells"], z[..., None], 1.0).sum(-1))
    close(found.guide["z"], normal(z, x["cells"].sum(1) / 4, 0.5))


def test_weights_at_the_exact_posterior_are_the_evidence() -> None:
    program, x = linear_gaussian(rows=ROWS)
    found = log_densities(program, x, PARTICLES)
    expected = torch.from_numpy(program.log_evidence(x))
    torch.testing.assert_close(found.log_weights, expected.expand(PARTICLES, ROWS))
    assert found.log_weights.std(0).max() < 1e-9


def test_one_row_and_one_particle() -> None:
    vae = pv.VAE((3,), 2, pv.likelihoods.Normal(), seed=0)
    found = log_densities(vae, torch.randn(1, 3), 1)
    assert found.log_weights.shape == (1, 1)
    assert found.values["z"].shape == (1, 1, 2)
    program = Turned()
    x = {name: value[:1] for name, value in by_rows(everything()).items()}
    found = log_densities(program, x, 2)
    assert found.log_weights.shape == (2, 1)
    assert found.values["w"].shape == (2, 1, Everything.items)


class OneItem(Turned):
    items = 1


def test_an_inner_plate_of_size_one() -> None:
    x = {**by_rows(everything()), "cells": torch.randn(ROWS, 1).double()}
    x["seen"] = torch.ones(ROWS, 1, dtype=torch.bool)
    found = log_densities(OneItem(), x, PARTICLES)
    assert found.values["w"].numel() == PARTICLES * ROWS
    close(
        found.guide["w"],
        normal(found.values["w"].reshape(PARTICLES, ROWS), 0.5 * x["cells"][:, 0], 0.9),
    )


class Subsampled(nn.Module):
    """A plate over 100 rows of which those at hand are some."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x, 1.0))


def test_the_scale_of_a_subsample_is_left_out() -> None:
    x = torch.randn(ROWS, dtype=torch.float64)
    assert structure(Subsampled(), x).is_scaled
    found = log_densities(Subsampled(), x, PARTICLES)
    z = found.values["z"]
    close(found.log_weights, normal(z, 0.0, 1.0) + normal(x, z, 1.0) - normal(z, x, 1.0))


class Regression(nn.Module):
    """Two latents that all rows share."""

    def model(self, x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(slope, 1.0))
            pyro.sample("x", dist.Normal(z, spread), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))


def test_global_latents_are_refused_by_name() -> None:
    x = torch.randn(ROWS)
    assert structure(Regression(), x).global_latents == ("slope", "spread")
    assert structure(Regression(), x).latents == ("z",)
    with pytest.raises(ValueError, match="plate 'data'.*got slope, spread outside it"):
        log_densities(Regression(), x, 2)
    terms = row_terms_of(Regression().model, Regression().guide, x)
    assert terms.global_kl.shape == ()
    assert terms.elbo.shape == (ROWS,)


class Changed(nn.Module):
    """A program whose parts are handed to it."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.guide = model, guide


def plated(name: str, site: str = "z", dim: int = -1) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        with pyro.plate(name, len(x), dim=dim):
            shape = [len(x)] + [1] * (-dim - 1)
            pyro.sample(site, dist.Normal(0.0, 1.0).expand(shape))

    return program


REFUSED: dict[str, tuple[Any, str]] = {
    "another plate": (Changed(plated("rows"), plated("rows")), r"plate named 'data'.*\['rows'\]"),
    "no plate": (
        Changed(*[lambda x: pyro.sample("z", dist.Normal(0.0, 1.0))] * 2),
        r"plate named 'data'.*got plates \[\]",
    ),
    "two dims": (Changed(plated("data"), plated("data", dim=-2)), "one plate named 'data'"),
    "another site": (
        Changed(plated("data", "a"), plated("data", "b")),
        r"latent sites of the model, \['a'\]; got \['b'\]",
    ),
    "no guide": (nn.Linear(1, 1), "nn.Module with the methods model.* got Linear"),
    "no module": (plated("data"), "got function"),
    "nothing": (None, "got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", [structure, lambda program, x: log_densities(program, x, 2)])
def test_what_is_no_program_is_refused(name: str, call: Callable[..., Any]) -> None:
    program, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(program, torch.randn(ROWS))


@pytest.fixture
def dropping() -> pv.VAE:
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    return pv.VAE((3,), 2, pv.likelihoods.Bernoulli(), encoder=encoder, seed=0)


def test_looking_at_a_program_leaves_no_trace(dropping: pv.VAE) -> None:
    rng, before = torch.get_rng_state(), {k: v.clone() for k, v in dropping.state_dict().items()}
    with poutine.trace() as seen:
        structure(dropping, torch.ones(ROWS, 3))
    assert not [site for site in seen.trace.nodes.values() if site["type"] == "sample"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert dropping.training
    assert all(torch.equal(before[k], v) for k, v in dropping.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_a_known_structure_saves_the_dry_run() -> None:
    vae = pv.VAE((3,), 2, pv.likelihoods.Bernoulli(), seed=0)
    x = torch.ones(ROWS, 3)
    known = structure(vae, x)
    calls: list[int] = []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    found: Densities = log_densities(vae, x, PARTICLES, known=known)
    assert calls == [1]
    assert found.model.keys() == {"z", "x"}
    assert found.guide.keys() == {"z"}


class Simple(nn.Module):
    """x ~ N(z, 1), with what each test adds."""

    def __init__(self, model_plate: str = "data", guide_plate: str = "data") -> None:
        super().__init__()
        self.plates = (model_plate, guide_plate)
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate(self.plates[0], len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate(self.plates[1], len(x)):
            pyro.sample("z", dist.Normal(self.loc + 0.5 * x, 0.5**0.5))


class WithFactor(Simple):
    def model(self, x: Tensor) -> None:
        pyro.factor("penalty", torch.tensor(-7.0))
        super().model(x)


class WithDeterministic(Simple):
    def guide(self, x: Tensor) -> None:
        pyro.deterministic("shift", self.loc)
        super().guide(x)


class WithAuxiliary(Simple):
    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = dist.Normal(self.loc + 0.5 * x, 0.5**0.5)
            u = pyro.sample("u", q, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))


def test_a_factor_outside_the_plate_is_refused_per_row() -> None:
    x = torch.randn(4)
    assert structure(WithFactor(), x).global_observed == ("penalty",)
    with pytest.raises(ValueError, match=r"Expected sites in the plate 'data'.*got penalty"):
        log_densities(WithFactor(), x, 3)


@pytest.mark.parametrize("plates", [("data", "rows"), ("rows", "data")])
def test_a_plate_of_the_model_or_the_guide_alone_is_refused(plates: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="Expected 'z' in the plate 'data' of both model and"):
        structure(Simple(*plates), torch.randn(4))


def test_auxiliary_and_deterministic_sites_of_a_guide() -> None:
    x = torch.randn(4)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    for program in (Simple(), WithDeterministic(), WithAuxiliary()):
        found = log_densities(program, x, 3)
        assert found.values.keys() == {"z"}
        weights = found.log_weights.float()
        torch.testing.assert_close(weights, exact.expand(3, 4), atol=1e-5, rtol=0)


def test_keywords_reach_the_programs() -> None:
    class Shifted(Simple):
        def model(self, x: Tensor, *, shift: float = 0.0) -> None:
            super().model(x + shift)

        def guide(self, x: Tensor, *, shift: float = 0.0) -> None:
            super().guide(x + shift)

    program, x = Shifted(), torch.randn(4)
    elbo = pv.elbos.Trace_ELBO()
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({}), elbo)
    assert svi.step(x, shift=1.0) == pytest.approx(
        -dist.Normal(0.0, 2.0**0.5).log_prob(x + 1.0).sum().item(), abs=1e-4
    )


def test_a_bound_of_each_row_needs_latents_of_each_row() -> None:
    elbo = pv.elbos.Trace_ELBO()
    assert elbo.per_row(Simple(), torch.randn(4)).value.shape == (4,)
    program = Regression()
    x = torch.randn(6)
    with pytest.raises(ValueError, match="Expected latent sites that have a value for each row"):
        elbo.per_row(program, x)
