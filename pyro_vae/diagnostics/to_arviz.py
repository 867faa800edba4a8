"""Draws from a program in the format of ArviZ."""

from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..data.checks import checked_choice, checked_draws
from ..data.read import read
from ..data.rows import Rows, floating_like
from ..data.source import Row
from ..elbos.chunks import (
    MAX_ELEMENTS,
    Plan,
    data_sites,
    give_memory_back,
    point_masses,
)
from ..elbos.drawing import densities_of, parts_of
from ..elbos.log_densities import (
    Densities,
    Program,
    Structure,
    densities,
    programs_of,
    structure,
)
from ..engine.running import Site, evaluating, public, seeded
from ..evidence.evidence import estimates, labelled
from ..evidence.hmc import Draws, hmc, space_of
from ..evidence.pareto_k import notes
from ..evidence.resampled import Resampled, resampled
from ..evidence.unconstrained import Space
from .observed import observed_cells
from .shared_latents import shared_draws

__all__ = ["METHODS", "elpd_data", "to_arviz"]

Groups: TypeAlias = dict[str, dict[str, np.ndarray]]

MAX_PREDICTIVE = 100
SHARED_NOTE = (
    "Independent draws from the guide: R-hat and ESS say nothing about its fit. All rows share "
    "{sites}, so that log p(x) of a row is not estimated: log_weight is that of all rows together."
)
NOTE = (
    "Independent draws from the guide q(z | x): R-hat and ESS say nothing about its fit; see "
    "pareto_k in vi_stats."
)
METHODS = ("guide", "importance", "hmc")
LARGEST_R_HAT = 1.01
HMC_NOTE = (
    "Draws from the posterior p(z | x) by Hamiltonian Monte Carlo: see r_hat and the effective "
    "sample sizes in vi_stats."
)
IMPORTANCE_NOTE = (
    "Draws from the posterior p(z | x) by importance resampling: see pareto_k in vi_stats. "
    "R-hat and ESS say nothing about them."
)
CHAINS_DISAGREE = "chains disagree: several modes, or too few draws"
HMC_ATTRIBUTES = {
    "r_hat": ("largest rank-normalised split R-hat over the latents", "1"),
    "ess_bulk": ("smallest bulk effective sample size over the latents", "draws"),
    "ess_tail": ("smallest tail effective sample size over the latents", "draws"),
    "acceptance_rate": ("mean probability of acceptance of a trajectory", "1"),
    "step_size": ("step size of a trajectory", "standard deviations"),
    "num_steps": ("number of steps of a trajectory", "1"),
}


@public
def to_arviz(
    program: nn.Module,
    x: Any,
    num_samples: int = 500,
    *,
    method: str = "guide",
    chains: int = 4,
    context: Any = None,
    weights: Any = None,
    num_predictive: int | None = None,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Any:
    """Draws from a program, trained or not, in the form that ArviZ reads.

    Each row of x is a `datum`. The other dims of a site are `{site}_dim_{i}`; those of x have the
    names of its columns as coordinates. There is no `log_likelihood`: if each row has a latent of
    its own, `arviz.loo` would treat log p(x | z) as log p(x). Compare models by `compare`.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such arrays.
        num_samples: The number of draws from the guide, or of each chain, 4 or more.
        method: `"guide"` draws from the guide; `"importance"` and `"hmc"` draw from the posterior,
            as :func:`pyro_vae.posterior` describes.
        chains: The number of chains of Hamiltonian Monte Carlo for each row.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        num_predictive: The number of draws from the guide, and from the prior, at which data are
            drawn. By default as many as fit in `max_elements`, at most 100.
        max_elements: The largest number of elements of a tensor, approximately.
        seed: The seed of the draws. `None` continues torch's generator from its state.
        progress: Whether to show the progress of Hamiltonian Monte Carlo.

    Returns:
        An `InferenceData` under ArviZ 0.23, a `DataTree` under 1.x, with the groups `posterior`
        (draws from the guide, one chain), `posterior_predictive` (data at the first
        `num_predictive` of them), `prior` and `prior_predictive` (`num_predictive` draws each),
        `observed_data` (NaN in cells that the program masks), `sample_stats` (log_weight, log_q,
        log_joint, in nats) and `vi_stats` (the result of `log_evidence` for each row, from these
        draws). If the guide has point masses, `vi_stats` is NaN but for `elbo`. Latents that all
        rows share have no dim `datum`; the log-densities in `sample_stats` are then those of all
        rows together, and there is no `vi_stats`. With `method="hmc"` the posterior has as many
        chains as asked for, and `vi_stats` holds for each row the largest `r_hat` over its latents
        and the smallest `ess_bulk` and `ess_tail`.

    Raises:
        ValueError: If `program` is not such a module, the data do not fit it, a size is out of
            its range, or Hamiltonian Monte Carlo cannot move its latents.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> tree = to_arviz(vae, torch.ones(3, 64), 10, seed=0)
        >>> tree["posterior"]["z"].dims
        ('chain', 'draw', 'datum', 'z_dim_0')
    """
    num_samples = checked_draws("num_samples", num_samples, least=4)
    method = checked_choice("method", method, METHODS)
    chains = checked_draws("chains", chains)
    chains = chains if method == "hmc" else 1
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    with evaluating(program):
        known = structure(program, rows.head(2, program))
    if method == "guide" and (known.global_latents or known.global_observed):
        options = num_samples, num_predictive, max_elements, seed
        return _shared_tree(program, rows, known, *options)
    total = num_samples * chains
    with seeded(seed), evaluating(program):
        drawn: Draws | Resampled | None = None
        if method == "hmc":
            drawn = hmc(program, rows, num_samples, chains, progress=progress)
        elif method == "importance":
            drawn = resampled(program, rows, num_samples, seed, progress=progress)
        given = None if drawn is None else _Given(space_of(program, rows)[0])
        plan = Plan.of(program, rows, total, max_elements)
        run = _Run(program, plan, total, given)
        points = point_masses(program, rows)
        pieces = [run.observed(rows.select(piece, program)) for piece in plan.pieces()]
        observed = _joined(pieces, axis=0)
        num_predictive = _num_predictive(num_predictive, total, observed, max_elements)
        num_predictive = max(1, num_predictive // chains) * chains
        parts = []
        for piece in plan.pieces():
            if given is not None and drawn is not None:
                given.points = drawn.u[:, :, piece].transpose(0, 1).flatten(0, 1)
            row = rows.select(piece, program)
            parts.append(run.draws(row, plan, total, num_predictive))
        draws = _joined(parts, axis=1)
    groups = {
        name: _dataset(found, rows, 1 if name.startswith("prior") else chains)
        for name, found in draws.items()
    }
    groups["observed_data"] = _dataset(observed["observed_data"], rows, 0)
    scores = estimates(draws["sample_stats"]["log_weight"])
    if points:
        unknown = np.full(len(rows), np.nan)
        scores = {name: v if name == "elbo" else unknown for name, v in scores.items()}
    of_guide = Resampled(torch.empty(0), scores, num_samples)
    found, note = _row_stats(drawn or of_guide, groups["posterior"], rows.labels, seed)
    groups["vi_stats"] = found
    return _wrapped(groups, NOTE if drawn is None else note)


def _row_stats(
    drawn: Draws | Resampled, posterior: xr.Dataset, labels: np.ndarray, seed: int | None
) -> tuple[xr.Dataset, str]:
    """What the draws of each row say of themselves, over `datum`, and a note on them."""
    if isinstance(drawn, Draws):
        return _chain_stats(posterior, drawn, labels), HMC_NOTE
    found = labelled(drawn.scores, labels, drawn.num_weighted, seed)
    found.coords["note"] = ("datum", notes(drawn.scores["pareto_k"], found.attrs["good_k"]))
    of_guide = ["elbo", "elbo_mcse", "pareto_k_guide"] if drawn.u.numel() else []
    return found.drop_vars(of_guide), IMPORTANCE_NOTE


def _chain_stats(posterior: xr.Dataset, drawn: Draws, labels: np.ndarray) -> xr.Dataset:
    """What the chains of each row say of themselves, over `datum`."""
    import arviz

    def by_row(found: Any) -> np.ndarray:
        arrays = [found[name].to_numpy().reshape(len(labels), -1) for name in posterior.data_vars]
        return np.concatenate(arrays, axis=1)

    values = {
        "r_hat": by_row(arviz.rhat(posterior)).max(axis=1),
        "ess_bulk": by_row(arviz.ess(posterior, method="bulk")).min(axis=1),
        "ess_tail": by_row(arviz.ess(posterior, method="tail")).min(axis=1),
        "acceptance_rate": drawn.acceptance_rate,
        "step_size": drawn.step_size,
        "num_steps": drawn.num_steps,
    }
    variables = {
        name: ("datum", values[name], {"long_name": words, "units": units})
        for name, (words, units) in HMC_ATTRIBUTES.items()
    }
    notes = np.where(values["r_hat"] > LARGEST_R_HAT, CHAINS_DISAGREE, "")
    coords = {"datum": labels, "note": ("datum", notes)}
    return xr.Dataset(variables, coords, {"largest_r_hat": LARGEST_R_HAT})


def _shared_tree(
    program: nn.Module,
    rows: Rows,
    known: Structure,
    num_samples: int,
    num_predictive: int | None,
    max_elements: int,
    seed: int | None,
) -> Any:
    """The tree of a program with sites that all rows share."""
    row = rows.to_like(program).head(len(rows))
    with evaluating(program), seeded(seed):
        with seeded(0):
            nodes = poutine.trace(programs_of(program)[0]).get_trace(row).nodes
        values = {name: observed_cells(nodes[name], known) for name in data_sites(known)}
        observed = {name: value.cpu().numpy() for name, value in values.items()}
        num_predictive = _num_predictive(
            num_predictive, num_samples, {"observed_data": observed}, max_elements
        )
        draws = shared_draws(program, rows, known, num_samples, num_predictive)
    shared = known.global_latents
    groups = {name: _dataset(found, rows, 1, shared) for name, found in draws.items()}
    groups["observed_data"] = _dataset(observed, rows, 0)
    return _wrapped(groups, SHARED_NOTE.format(sites=", ".join(shared + known.global_observed)))


def _num_predictive(
    asked: int | None, num_samples: int, observed: Groups, max_elements: int
) -> int:
    if asked is not None:
        return min(checked_draws("num_predictive", asked), num_samples)
    elements = max((values.size for values in observed["observed_data"].values()), default=1)
    return max(1, min(num_samples, MAX_PREDICTIVE, max_elements // elements))


class _Given(Messenger):  # type: ignore[misc]
    """Effect handler that sets the latents of the guide to given draws, part after part."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space, self.points = space, torch.empty(0)
        self.values: dict[str, Tensor] = {}

    def take(self, x: Row, count: int) -> None:
        """Takes the next draws."""
        u, self.points = self.points[:count], self.points[count:]
        self.values = self.space(x, u.to(floating_like(self.space.program))).values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        value, events = self.values[msg["name"]], len(msg["fn"].event_shape)
        sizes = {frame.dim: frame.size for frame in msg["cond_indep_stack"] if frame.vectorized}
        rows_dim = self.space.known.rows_dim
        rest = [sizes.get(d, 1) for d in range(min(sizes) + 1, 0) if d != rows_dim]
        event = value.shape[value.ndim - events :]
        value = value.reshape(*value.shape[:2], *rest, *event)
        msg["value"], msg["done"] = value.movedim(1, rows_dim - events), True


class _Run:
    """Draws from the guide, or given draws, and from the model with its observed sites free."""

    def __init__(
        self, program: nn.Module, plan: Plan, num_samples: int, given: _Given | None = None
    ) -> None:
        self.known = plan.structure
        self.data_sites = data_sites(self.known)
        self.model, guide = programs_of(program)
        guide = guide if given is None else given(guide)
        free = poutine.uncondition(self.model)

        def guide_then_model(x: Row) -> None:
            """Samples the latent sites from the guide, then the observed ones given these."""
            with poutine.trace() as guided:
                guide(x)
            with poutine.block(hide_fn=is_known):
                poutine.replay(free, trace=guided.trace)(x)

        def is_known(site: Site) -> bool:
            return site["type"] == "sample" and site["name"] not in self.data_sites

        def drawing(model: Program, guide: Program, given: _Given | None) -> Any:
            def run(x: Row, count: int) -> dict[str, Tensor]:
                if given is not None:
                    given.take(x, count)
                return parts_of(densities(model, guide, (x,), count, self.known))

            return plan.drawing(program, run, num_samples) if given is None else run

        self.drawn = drawing(self.model, guide, given)
        self.predicted = drawing(self.model, guide_then_model, given)
        self.prior = drawing(free, free, None)

    def draws(self, x: Row, plan: Plan, num_samples: int, num_predictive: int) -> Groups:
        first, rest = plan.parts(num_predictive), plan.parts(num_samples - num_predictive)
        posterior = [densities_of(self.predicted(x, n)) for n in first]
        posterior += [densities_of(self.drawn(x, n)) for n in rest]
        prior = [densities_of(self.prior(x, n)) for n in first]
        give_memory_back()
        log_joint = _stacked([part.log_joint for part in posterior])
        guided = [[part.guide[name].double() for name in self.known.latents] for part in posterior]
        log_q = _stacked([torch.stack(sites).sum(0) for sites in guided])
        stats = {"log_weight": log_joint - log_q, "log_q": log_q, "log_joint": log_joint}
        return {
            "posterior": _values(posterior, self.known.latents),
            "posterior_predictive": _values(posterior, self.data_sites),
            "prior": _values(prior, self.known.latents),
            "prior_predictive": _values(prior, self.data_sites),
            "sample_stats": stats,
        }

    def observed(self, x: Row) -> Groups:
        trace = poutine.trace(self.model).get_trace(x)
        values = {name: observed_cells(trace.nodes[name], self.known) for name in self.data_sites}
        return {"observed_data": {name: v.cpu().numpy() for name, v in values.items()}}


def _values(parts: list[Densities], sites: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {
        name: _stacked([part.values[name] for part in parts if name in part.values])
        for name in sites
    }


def _stacked(parts: list[Tensor]) -> np.ndarray:
    return torch.cat([part.cpu() for part in parts]).numpy()


def _joined(pieces: list[Groups], axis: int) -> Groups:
    def join(group: str, name: str) -> np.ndarray:
        return np.concatenate([piece[group][name] for piece in pieces], axis=axis)

    return {
        group: {name: join(group, name) for name in values} for group, values in pieces[0].items()
    }


def _dataset(
    values: dict[str, np.ndarray], rows: Rows, chains: int, shared: tuple[str, ...] = ()
) -> xr.Dataset:
    """Labels values whose first dim are draws, those of several chains in turn; 0 for data."""
    coords: dict[str, np.ndarray] = {"datum": rows.labels}
    variables = {}
    for name, value in values.items():
        array = value
        if chains:
            array = value.reshape(-1, chains, *value.shape[1:]).swapaxes(0, 1)
        leading: tuple[str, ...] = ("chain", "draw", "datum") if chains else ("datum",)
        if name in shared or array.ndim < len(leading):
            leading = leading[:-1]
        own = rows.coords(name, array.shape[len(leading) :])
        variables[name] = ((*leading, *own), array)
        coords |= own
        coords |= {
            dim: np.arange(n)
            for dim, n in zip(leading, array.shape, strict=False)
            if dim in ("chain", "draw")
        }
    return xr.Dataset(variables, coords)


def _wrapped(groups: dict[str, xr.Dataset], note: str) -> Any:
    import arviz

    for dataset in groups.values():
        dataset.attrs["inference_library"] = "pyro_vae"
    groups["posterior"].attrs["note"] = note

    if int(arviz.__version__.split(".")[0]) >= 1:
        return xr.DataTree.from_dict(groups)
    container: Any = arviz.InferenceData
    return container(**groups)


def elpd_data(evidence: xr.Dataset, num_samples: int, good_k: float) -> Any:
    """Returns log p(x) of held-out rows as the `ELPDData` of the installed version of ArviZ.

    Arguments:
        evidence: `log_evidence` and `pareto_k` over `datum`, in nats.
        num_samples: The number of draws of each row.
        good_k: The largest Pareto k at which log p(x) is reliable.
    """
    import arviz

    scores, k = evidence["log_evidence"], evidence["pareto_k"]
    values: dict[str, Any] = {
        "elpd": float(scores.sum()),
        "se": float(np.sqrt(scores.size) * scores.std()),
        "p": np.nan,
        "n_samples": num_samples,
        "n_data_points": scores.size,
        "warning": bool((k > good_k).any()),
        "elpd_i": scores,
        "pareto_k": k,
        "scale": "log",
        "good_k": good_k,
    }
    kind: Any = arviz.ELPDData
    if int(arviz.__version__.split(".")[0]) < 1:
        own = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        return kind(list(values.values()), index=[own.get(name, name) for name in values])
    if "kind" in {field.name for field in fields(kind)}:  # ArviZ 1.2 and earlier
        values["kind"] = "held_out"
    return kind(**values)
