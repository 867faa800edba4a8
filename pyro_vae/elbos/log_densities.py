"""log p(x, z) and log q(z | x) of a program, per particle and per row, from Pyro's traces."""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..data.read import read
from ..data.rows import PLATE
from ..data.source import Row
from ..distributions.links import base_of
from ..engine.running import Site, evaluating, seeded

__all__ = [
    "PROGRAM_ERRORS",
    "Args",
    "Densities",
    "Kwargs",
    "Particles",
    "Program",
    "RowTerms",
    "Site",
    "Structure",
    "check_particles",
    "faults_named",
    "densities",
    "draw",
    "is_one_scale",
    "is_point_mass",
    "latent_sites",
    "log_densities",
    "plate_nesting",
    "prior_densities",
    "programs_of",
    "refuse_shared",
    "row_terms",
    "row_terms_of",
    "structure",
    "sum_to_rows",
    "unreparameterised",
]

Program: TypeAlias = Callable[..., Any]
Args: TypeAlias = tuple[object, ...]
Kwargs: TypeAlias = Mapping[str, object]
Scale: TypeAlias = Tensor | float

PROGRAM_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError)

_PARTICLES = "_particles"


@dataclass(frozen=True, eq=False)
class Structure:
    """The sites and plates of a program, recorded by a dry run on two rows.

    Arguments:
        rows_dim: The dim of the plate `"data"`, negative.
        max_plate_nesting: The number of dims that plates take, counted from the right.
        latents: The latent sites that have a value for each row.
        is_ordered: Whether the guide draws the latent sites in the order of the model.
        global_latents: The latent sites outside the plate `"data"`.
        global_observed: The observed sites outside the plate `"data"`, such as those of
            `pyro.factor`.
        observed: The observed sites in the plate `"data"`.
        event_shapes: The event shape of each site.
        discrete: Whether each observed site has a mass function rather than a density.
        is_scaled: Whether a site of the rows has a scale, such as that of `poutine.scale`.
        is_subsampled: Whether the plate `"data"` is a subsample, which scales the rows by N / B.
        unreparameterised: The latent sites that the guide draws without `rsample`.
        constrained: The latent sites whose prior lies on a part of the real numbers; none if the
            guide draws auxiliary sites, which have no prior.
    """

    rows_dim: int
    max_plate_nesting: int
    latents: tuple[str, ...]
    is_ordered: bool
    global_latents: tuple[str, ...]
    global_observed: tuple[str, ...]
    observed: tuple[str, ...]
    event_shapes: dict[str, torch.Size]
    discrete: dict[str, bool]
    is_scaled: bool
    is_subsampled: bool
    unreparameterised: tuple[str, ...]
    constrained: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Densities:
    r"""Log-densities of every site of a program, per particle and row.

    Arguments:
        model: For each site of the model log p, shape (num_particles, rows), in nats.
        guide: For each latent site log q, shape (num_particles, rows), in nats.
        values: For each latent site its draws, shape (num_particles, rows, \*event_shape).
    """

    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    values: dict[str, Tensor]

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), shape (num_particles, rows), summed over sites in float64."""
        return _sum_sites(self.model)

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x), shape (num_particles, rows), summed over sites in float64."""
        return _sum_sites(self.guide) if self.guide else torch.zeros_like(self.log_joint)

    @property
    def log_prior(self) -> Tensor:
        """log p(z), shape (num_particles, rows), summed over latent sites in float64."""
        return _sum_sites({k: v for k, v in self.model.items() if k in self.guide})

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), shape (num_particles, rows), in float64."""
        return self.log_joint - self.log_guide

    @property
    def reconstruction(self) -> Tensor:
        """log p(x | z), shape (num_particles, rows), summed over observed sites in float64."""
        return _sum_sites({k: v for k, v in self.model.items() if k not in self.guide})

    @property
    def kl(self) -> Tensor:
        """log q(z | x) - log p(z), whose mean is the KL divergence, (num_particles, rows)."""
        return self.reconstruction - self.log_weights

    def tempered(self, kl_weight: Tensor | float) -> Tensor:
        r"""Returns the log-weights with a weight on the KL terms, (num_particles, rows).

        .. math:: \log p(x \mid z) + \beta\, (\log p(z) - \log q(z \mid x))

        Arguments:
            kl_weight: The weight :math:`\beta`, shape ().
        """
        if is_one_scale(kl_weight, 1.0):
            return self.log_weights
        return self.reconstruction - kl_weight * self.kl

    def tempered_joint(self, kl_weight: Tensor | float) -> Tensor:
        """Returns log p(x | z) + weight * log p(z), (num_particles, rows).

        Arguments:
            kl_weight: The weight, shape ().
        """
        if is_one_scale(kl_weight, 1.0):
            return self.log_joint
        reconstruction = self.reconstruction
        return reconstruction + kl_weight * (self.log_joint - reconstruction)


def programs_of(program: nn.Module) -> tuple[Program, Program]:
    """Returns the model and the guide of a module.

    Arguments:
        program: The module.

    Raises:
        ValueError: If it is not a module, lacks one of these methods, or is on the meta device.
    """
    model, guide = getattr(program, "model", None), getattr(program, "guide", None)
    if not isinstance(program, nn.Module) or not callable(model) or not callable(guide):
        raise ValueError(
            "Expected a program: an nn.Module with the methods model(x) and guide(x); got "
            f"{type(program).__name__}."
        )
    if any(parameter.is_meta for parameter in program.parameters()):
        raise ValueError(
            "The program is on the meta device, which holds no numbers: build it on another "
            "device, or call program.to_empty(device=...) and load its weights."
        )
    return model, guide


@contextlib.contextmanager
def faults_named(rows: str) -> Iterator[None]:
    """Turns an error inside a user's program into one sentence.

    Arguments:
        rows: The rows on which it ran, in words.

    Raises:
        ValueError: If the program fails.
    """
    try:
        yield
    except (RuntimeError, TypeError, LookupError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"The model or the guide fails on {rows}: {reason}.") from error


def structure(program: nn.Module, x: Row) -> Structure:
    """Finds the sites and plates of a program by running it on two rows.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, whose sites of each
            row are in a plate named `"data"`.
        x: A tensor of shape (rows, *event), or a dict of such tensors.

    Raises:
        ValueError: If it is not such a program. The message names the defect.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> structure(vae, torch.ones(3, 4)).latents
        ('z',)
    """
    pair = programs_of(program)
    few = read(x, program, check=False).head(2, program)
    with faults_named("two rows of the data"), poutine.block(), evaluating(program), seeded(0):
        guide, model = _traces(*pair, (few,))
    frames = [f for trace in (model, guide) for _, s in _samples(trace) for f in _frames(s)]
    dims = {frame.dim for frame in frames if frame.name == PLATE}
    if len(dims) != 1:
        raise ValueError(
            f"Expected one plate named {PLATE!r} over the rows in model and guide; got plates "
            f"{sorted({frame.name for frame in frames})}: pyro_vae.Program(model, guide, "
            "plate=...) takes a plate of another name."
        )
    _check_match(model, guide)
    latent = [name for name, site in _samples(model) if not site["is_observed"]]
    sites = dict(_samples(model))
    observed = [name for name in sites if name not in latent and not _is_computed(sites[name])]
    if not observed:
        raise ValueError(
            "The model observes nothing: give the rows to a site, as in pyro.sample('x', "
            "distribution, obs=x)."
        )
    has_all = all(name in sites for name, _ in latent_sites(guide))  # no auxiliary draws
    return Structure(
        rows_dim=dims.pop(),
        max_plate_nesting=-min(frame.dim for frame in frames),
        latents=tuple(name for name in latent if _in_rows(sites[name])),
        is_ordered=latent == [name for name, _ in latent_sites(guide) if name in sites],
        global_latents=tuple(name for name in latent if not _in_rows(sites[name])),
        global_observed=tuple(name for name in observed if not _in_rows(sites[name])),
        observed=tuple(name for name in observed if _in_rows(sites[name])),
        event_shapes={name: torch.Size(site["fn"].event_shape) for name, site in sites.items()},
        discrete={name: _is_discrete(sites[name]) for name in observed},
        is_scaled=any(_in_rows(s) and not is_one_scale(s["scale"], 1.0) for s in sites.values()),
        is_subsampled=any(f.name == PLATE and f.full_size not in (None, f.size) for f in frames),
        unreparameterised=unreparameterised(guide),
        constrained=tuple(n for n in latent if has_all and _is_constrained(sites[n])),
    )


def check_particles(program: nn.Module, x: Row, known: Structure) -> None:
    """Checks that a program can run with several draws of each row, by two draws of three rows.

    A tensor of the rows, such as a covariate, has no dim for the draws. A program that joins it
    to a latent, of shape (draws, rows, *event), runs with one draw of each row and fails with
    several.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: A tensor of shape (rows, *event), or a dict of such tensors.
        known: The sites and plates of the program.

    Raises:
        ValueError: If the program fails. The message gives the reason, and a line that corrects
            it.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> check_particles(vae, torch.ones(3, 4), structure(vae, torch.ones(3, 4)))
    """
    model, guide = programs_of(program)
    rows = read(x, program, check=False)
    few = rows.select(torch.arange(3, device=rows.device) % len(rows), program)
    particles = pyro.plate(_PARTICLES, 2, dim=-known.max_plate_nesting - 1)
    try:
        with poutine.block(), evaluating(program), seeded(0):
            if known.global_latents or known.global_observed:
                _traces(particles(model), particles(guide), (few,))
            else:
                densities(model, guide, (few,), 2, known)
    except PROGRAM_ERRORS as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        named = {f"x[{k!r}]": v for k, v in few.items()} if isinstance(few, dict) else {"x": few}
        name = next((name for name in named if name != "x['x']"), next(iter(named)))
        latent = (*known.latents, *known.global_latents, "z")[0]
        events = len(known.event_shapes.get(latent, (1,)))
        dims = f"*{latent}.shape[:-{events}]" if events else f"*{latent}.shape"
        expanded = f"{name}.expand({', '.join([dims, *['-1'] * (named[name].ndim - 1)])})"
        raise ValueError(
            "The program fails with several draws of each row, where a latent has shape (draws, "
            f"rows, *event): {reason}. Expand each tensor of the rows to the draws before it is "
            f"joined to a latent, for example {expanded}."
        ) from error


def log_densities(
    program: nn.Module, x: Row, num_particles: int, *, known: Structure | None = None
) -> Densities:
    r"""Draws z from the guide and evaluates its density under model and guide.

    .. math:: z_{sn} \sim q(z \mid x_n), \qquad \log p(x_n, z_{sn}), \quad \log q(z_{sn} \mid x_n)

    Scales (`poutine.scale`, a subsampling plate) are left out, since they belong to an objective
    and not to a density. Masks apply. The numbers stay on the device.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: A tensor of shape (rows, *event), or a dict of such tensors.
        num_particles: The number of draws for each row.
        known: The result of :func:`structure`, if it was computed before.

    Raises:
        ValueError: If the program has sites outside the plate `"data"`, since these have no value
            for each row.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> log_densities(vae, torch.ones(3, 4), 5).log_weights.shape
        torch.Size([5, 3])
    """
    known = structure(program, x) if known is None else known
    return densities(*programs_of(program), (x,), num_particles, known)


def prior_densities(
    program: nn.Module, x: Row, num_particles: int, *, known: Structure
) -> Densities:
    r"""Draws z from the prior and evaluates its density under model and guide.

    .. math:: z_{sn} \sim p(z), \qquad \log p(x_n, z_{sn}), \quad \log q(z_{sn} \mid x_n)

    log q is -inf where the guide has no density, as at the edge of its support.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, whose latent sites are
            the same.
        x: A tensor of shape (rows, *event), or a dict of such tensors.
        num_particles: The number of draws for each row.
        known: The result of :func:`structure`.

    Raises:
        ValueError: If the program has sites outside the plate `"data"`.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> x = torch.ones(3, 4)
        >>> prior_densities(vae, x, 5, known=structure(vae, x)).log_weights.shape
        torch.Size([5, 3])
    """
    refuse_shared(known.global_latents + known.global_observed)
    model, guide = programs_of(program)
    drawn = draw(guide, model, (x,), {}, num_particles, known.max_plate_nesting).densities()
    log_guide = {
        name: torch.where(log_prob.isnan(), -math.inf, log_prob)
        for name, log_prob in drawn.model.items()
    }
    return Densities(drawn.guide, log_guide, drawn.values)


def densities(
    model: Program,
    guide: Program,
    args: Args,
    num_particles: int,
    known: Structure,
) -> Densities:
    """Computes :func:`log_densities` of a pair of Pyro programs.

    Arguments:
        model: The model.
        guide: The guide.
        args: Their arguments.
        num_particles: The number of draws for each row.
        known: Their sites and plates.

    Raises:
        ValueError: If there are sites outside the plate `"data"`.
    """
    refuse_shared(known.global_latents + known.global_observed)
    return draw(model, guide, args, {}, num_particles, known.max_plate_nesting).densities()


@dataclass(frozen=True, eq=False)
class Particles:
    r"""Draws of the latents of each row, and the traces of guide and model at these draws.

    Arguments:
        model: The trace of the model.
        guide: The trace of the guide.
        num_particles: The number of draws K of each row.
        dim: The dim of the draws, negative, left of every plate.
        rows_dim: The dim of the plate `"data"`, negative.
        num_rows: The number of rows.
    """

    model: Trace
    guide: Trace
    num_particles: int
    dim: int
    rows_dim: int
    num_rows: int

    def densities(self) -> Densities:
        """Returns the log-densities of every site, without scales, per particle and row."""
        model = {name: self._log_prob(site) for name, site in _samples(self.model)}
        sites = [(n, s) for n, s in _samples(self.guide) if not _is_computed(s)]
        guide = {name: self._log_prob(site) for name, site in sites}
        values: dict[str, Tensor] = {}
        for name, site in latent_sites(self.guide):
            if name not in self.model.nodes:
                continue
            values[name] = self.by_row(site["value"], len(site["fn"].event_shape), site)
        return Densities(model, guide, values)

    def by_row(self, value: Tensor, events: int, site: Site) -> Tensor:
        """Moves draws and rows to the front: (num_particles, rows, *plates, *event).

        Arguments:
            value: Values over the plates of a site.
            events: The number of their event dims.
            site: The site.
        """
        batch = value.shape[: value.ndim - events]
        value = value.reshape((1,) * (-self.dim - len(batch)) + value.shape)
        inner = {frame.dim for frame in _frames(site)} - {self.rows_dim, self.dim}
        sizes = [value.shape[dim - events] for dim in sorted(inner)]
        rest = (*sizes, *value.shape[value.ndim - events :])
        value = value.movedim(self.rows_dim - events, 1)
        value = value.reshape(*value.shape[:2], *rest)
        return value.expand(self.num_particles, self.num_rows, *rest)

    def scale(self) -> Scale:
        """Returns the scale that all sites have in common, such as N / B of a subsample.

        Raises:
            ValueError: If the sites have different scales.
        """
        sites = [s for t in (self.model, self.guide) for _, s in _samples(t)]
        scales: list[Scale] = [site["scale"] for site in sites if not _is_computed(site)]
        first = scales[0]
        if isinstance(first, Tensor) and first.ndim:
            raise ValueError(
                "Expected one scale for all rows; got a poutine.scale of shape "
                f"{tuple(first.shape)}. Trace_ELBO accepts it."
            )
        if not all(is_one_scale(scale, first) for scale in scales):
            raise ValueError(
                "Expected one scale (a number) for all sites of the rows; got different scales, "
                "from a poutine.scale around some of them, or with a tensor. For a weight on the "
                "KL terms use BetaELBO, or fit's warmup."
            )
        return first

    def spread(self, values: Tensor, site: Site) -> Tensor:
        """Reshapes values of shape (num_particles, rows) to broadcast with the draws of a site.

        Arguments:
            values: The values, shape (num_particles, rows).
            site: The site.
        """
        shape = [1] * site["value"].ndim
        events = len(site["fn"].event_shape)
        shape[self.dim - events] = len(values)
        shape[self.rows_dim - events] = self.num_rows
        return values.reshape(shape)

    def _log_prob(self, site: Site) -> Tensor:
        raw = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return self.to_rows(scale_and_mask(raw, mask=site["mask"]))

    def to_rows(self, log_prob: Tensor) -> Tensor:
        """Sums over all dims but particles and rows. The result has shape (num_particles, rows).

        Arguments:
            log_prob: The log-probability of a site, over its plates.
        """
        log_prob = log_prob.reshape((1,) * (-self.dim - log_prob.ndim) + log_prob.shape)
        inner = [d for d in range(self.dim + 1, 0) if d != self.rows_dim]
        if inner:
            log_prob = log_prob.sum(inner)
        return log_prob.reshape(log_prob.shape[0], -1).expand(self.num_particles, self.num_rows)


def draw(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    num_particles: int,
    max_plate_nesting: int,
    handler: contextlib.AbstractContextManager[object] | None = None,
) -> Particles:
    """Draws z from the guide, in one pass, and runs the model at the draws.

    Arguments:
        model: The model.
        guide: The guide.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        num_particles: The number of draws for each row.
        max_plate_nesting: The number of dims that plates take, counted from the right.
        handler: An effect handler of Pyro for the guide. It acts on each draw before the trace
            records the draw.

    Raises:
        ValueError: If there are sites outside the plate `"data"`, or the guide does not draw a
            latent site of the model.
    """
    dim = -max_plate_nesting - 1
    particles = pyro.plate(_PARTICLES, num_particles, dim=dim)
    guide_trace, model_trace = _traces(particles(model), particles(guide), args, kwargs, handler)
    guided, modelled = dict(_samples(guide_trace)), dict(_samples(model_trace))
    sites = {**guided, **modelled}
    refuse_shared([n for n, s in sites.items() if not _in_rows(s) and not _is_computed(s)])
    latent = [name for name, site in modelled.items() if not site["is_observed"]]
    missing = [name for name in latent if name not in guide_trace.nodes]
    if missing:
        raise ValueError(
            f"Expected the guide to draw the latent sites of the model, {latent}; got none for "
            f"{', '.join(missing)}."
        )
    stacks = [frame for site in modelled.values() for frame in site["cond_indep_stack"]]
    frames = [frame for frame in stacks if frame.name == PLATE]
    rows_dim, num_rows = frames[0].dim, max(frame.size for frame in frames)
    return Particles(model_trace, guide_trace, num_particles, dim, rows_dim, num_rows)


def latent_sites(guide: Trace) -> list[tuple[str, Site]]:
    """Returns the sites that a guide draws, by name.

    Arguments:
        guide: Its trace.
    """
    return [(n, s) for n, s in _samples(guide) if not s["is_observed"] and not _is_computed(s)]


def unreparameterised(guide: Trace) -> tuple[str, ...]:
    """Names the sites that a guide draws without `rsample`.

    Arguments:
        guide: Its trace.
    """
    sites = latent_sites(guide)
    return tuple(name for name, site in sites if not site["fn"].has_rsample)


def refuse_shared(sites: Sequence[str]) -> None:
    """Refuses sites outside the plate of the rows, for what has one value for each row.

    Arguments:
        sites: Their names.

    Raises:
        ValueError: If there are any.
    """
    if sites:
        raise ValueError(
            f"Expected sites in the plate {PLATE!r}, one value for each row; got "
            f"{', '.join(sites)} outside it."
        )


def is_point_mass(site: Site) -> bool:
    """Whether the distribution of a site is a point mass, transformed or not.

    Arguments:
        site: The site.
    """
    distribution = site["fn"]
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)


class RowTerms(NamedTuple):
    """The two terms of the ELBO of each row, without scales and weights.

    Arguments:
        reconstruction: log p(x | z) of each row, shape (rows,), in nats.
        kl: log q(z | x) - log p(z) of each row, shape (rows,), in nats.
        global_kl: log q(z) - log p(z) of the global sites, shape (), in nats; `None` if there are
            none.
    """

    reconstruction: Tensor
    kl: Tensor
    global_kl: Tensor | None

    @property
    def elbo(self) -> Tensor:
        """The ELBO of each row, without the KL terms of global sites, shape (rows,)."""
        return self.reconstruction - self.kl


def row_terms(
    model_trace: Trace,
    guide_trace: Trace,
    num_particles: int = 1,
    divergences: Mapping[str, Tensor] = MappingProxyType({}),
) -> RowTerms:
    """Computes the terms of the ELBO from two traces with log-probabilities.

    Arguments:
        model_trace: The trace of the model.
        guide_trace: The trace of the guide.
        num_particles: The number of particles in the traces. The terms are means over particles.
        divergences: The KL divergence of each site that has one in closed form, in nats, over the
            plates of the site.
    """
    parts: dict[str, Tensor] = {}
    for sign, trace in ((1.0, guide_trace), (-1.0, model_trace)):
        for name, site in _samples(trace):
            if _is_computed(site) or (name in divergences and trace is model_trace):
                continue
            log_prob = divergences.get(name, site["unscaled_log_prob"])
            log_prob = scale_and_mask(log_prob, mask=site["mask"])
            if not _in_rows(site):
                name, value = "global_kl", sign * log_prob.sum()
            elif trace is model_trace and site["is_observed"]:
                name, value = "reconstruction", sum_to_rows(log_prob, site)
            else:
                name, value = "kl", sign * sum_to_rows(log_prob, site)
            parts[name] = parts.get(name, 0.0) + value / num_particles
    global_kl = parts.pop("global_kl", None)
    zero = torch.zeros_like(next(iter(parts.values())))
    return RowTerms(parts.get("reconstruction", zero), parts.get("kl", zero), global_kl)


def plate_nesting(model: Program, guide: Program, *args: object, **kwargs: object) -> int:
    """Returns the number of dims that the plates of two programs take, counted from the right.

    Arguments:
        model: The model.
        guide: The guide.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
    """
    with poutine.block():
        traces = _traces(model, guide, args, kwargs)
    frames = [f for trace in traces for _, site in _samples(trace) for f in _frames(site)]
    return -min((frame.dim for frame in frames), default=0)


def row_terms_of(model: Program, guide: Program, *args: object, **kwargs: object) -> RowTerms:
    """Returns the terms of the ELBO of each row at one draw from the guide.

    Arguments:
        model: The model.
        guide: The guide.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
    """
    guide_trace, model_trace = _traces(model, guide, args, kwargs)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return row_terms(model_trace, guide_trace)


def sum_to_rows(log_prob: Tensor, site: Site) -> Tensor:
    """Sums a log-probability of a site over all dims but that of the rows, shape (rows,).

    Arguments:
        log_prob: The log-probability, over the plates of the site, in nats.
        site: The site, in the plate `"data"`.
    """
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == PLATE)
    return log_prob.movedim(dim, 0).flatten(1).sum(1) if log_prob.ndim > 1 else log_prob


def _traces(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs = MappingProxyType({}),
    handler: contextlib.AbstractContextManager[object] | None = None,
) -> tuple[Trace, Trace]:
    with contextlib.nullcontext() if handler is None else handler:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)


def _samples(trace: Trace) -> list[tuple[str, Site]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def _sum_sites(sites: dict[str, Tensor]) -> Tensor:
    return functools.reduce(operator.add, (log_prob.double() for log_prob in sites.values()))


def _check_match(model: Trace, guide: Trace) -> None:
    """Checks that model and guide have the same latent sites, in the same plates."""
    guided = dict(_samples(guide))
    for name, site in _samples(model):
        if name in guided and _in_rows(site) != _in_rows(guided[name]):
            inside, outside = ("model", "guide") if _in_rows(site) else ("guide", "model")
            raise ValueError(
                f"Expected {name!r} in the plate {PLATE!r} of both model and guide, or of neither;"
                f" got it inside in the {inside} and outside in the {outside}."
            )
    latent = {name for name, site in _samples(model) if not site["is_observed"]}
    drawn = {
        name
        for name, site in guided.items()
        if not site["is_observed"] and not site["infer"].get("is_auxiliary", False)
    }
    if latent != drawn:
        raise ValueError(
            f"Expected the guide to draw the latent sites of the model, {sorted(latent)}; got "
            f"{sorted(drawn)}."
        )


def _is_discrete(site: Site) -> bool:
    try:
        return bool(site["fn"].support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def _is_constrained(site: Site) -> bool:
    """Whether the support is continuous and not the whole real line."""
    try:
        support = base_of(site["fn"].support)
    except (NotImplementedError, AttributeError):
        return False
    return not support.is_discrete and not isinstance(support, type(constraints.real))


def _frames(site: Site) -> list[Site]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _in_rows(site: Site) -> bool:
    return any(frame.name == PLATE for frame in site["cond_indep_stack"])


def _is_computed(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic", False))


def is_one_scale(scale: Scale, other: Scale) -> bool:
    """Whether two scales are certainly equal. Tensors are compared by identity, not by value.

    Arguments:
        scale: A number or a tensor.
        other: Another.
    """
    match scale, other:
        case (Tensor(), _) | (_, Tensor()):
            return scale is other
        case _:
            return scale == other
