"""log p(x, z) and log q(z | x) of a program, per particle and per row, from Pyro's traces."""

import contextlib
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ..data.read import read
from ..data.rows import PLATE, Data
from ..engine.running import evaluating, seeded

__all__ = [
    "PROGRAM_ERRORS",
    "Densities",
    "Particles",
    "Program",
    "RowTerms",
    "Structure",
    "check_particles",
    "densities",
    "draw",
    "is_one_scale",
    "latent_sites",
    "log_densities",
    "plate_nesting",
    "programs_of",
    "row_terms",
    "row_terms_of",
    "structure",
    "sum_to_rows",
]

Program: TypeAlias = Callable[..., Any]

PROGRAM_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError)

_PARTICLES = "_particles"


@dataclass(frozen=True, eq=False)
class Structure:
    """What a program is made of, as a dry run on two rows shows it.

    Arguments:
        rows_dim: The dim of the plate `"data"`, negative.
        max_plate_nesting: The number of dims that plates take, from the right.
        latents: The latent sites that have a value for each row.
        is_ordered: Whether the guide draws the latent sites in the order of the model.
        global_latents: The latent sites outside the plate `"data"`.
        global_observed: The observed sites (a `pyro.factor`, say) outside it.
        observed: The observed sites.
        event_shapes: The event shape of each site.
        discrete: Whether each observed site has a mass function, not a density.
        is_scaled: Whether the program scales a site of the rows (by `poutine.scale`, say).
        is_subsampled: Whether its plate `"data"` is a subsample, which scales the rows by N / B.
        unreparameterised: The latent sites that the guide draws without an `rsample`.
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
        return _total(self.model)

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x), shape (num_particles, rows), summed over sites in float64."""
        return _total(self.guide) if self.guide else torch.zeros_like(self.log_joint)

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), shape (num_particles, rows), in float64."""
        return self.log_joint - self.log_guide

    @property
    def reconstruction(self) -> Tensor:
        """log p(x | z), shape (num_particles, rows), summed over observed sites in float64."""
        return _total({k: v for k, v in self.model.items() if k not in self.guide})

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
        if not isinstance(kl_weight, Tensor) and kl_weight == 1.0:
            return self.log_weights
        return self.reconstruction - kl_weight * self.kl

    def tempered_joint(self, kl_weight: Tensor | float) -> Tensor:
        """Returns log p(x | z) + weight * log p(z), (num_particles, rows).

        Arguments:
            kl_weight: The weight, shape ().
        """
        if not isinstance(kl_weight, Tensor) and kl_weight == 1.0:
            return self.log_joint
        reconstruction = self.reconstruction
        return reconstruction + kl_weight * (self.log_joint - reconstruction)


def programs_of(program: nn.Module) -> tuple[Program, Program]:
    """Returns the model and the guide of a module.

    Arguments:
        program: The module.

    Raises:
        ValueError: Where it is no module, or has no such methods.
    """
    model, guide = getattr(program, "model", None), getattr(program, "guide", None)
    if not isinstance(program, nn.Module) or not callable(model) or not callable(guide):
        raise ValueError(
            "Expected a program: an nn.Module with the methods model(x) and guide(x); got "
            f"{type(program).__name__}."
        )
    return model, guide


def structure(program: nn.Module, x: Data) -> Structure:
    """Reads off a program what it is made of, by running it on two rows.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, whose sites of each
            row stand in a plate named `"data"`.
        x: A tensor of shape (rows, *event), or a dict of them.

    Raises:
        ValueError: Where it is no such program: the message says what is amiss.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> structure(vae, torch.ones(3, 4)).latents
        ('z',)
    """
    pair = programs_of(program)
    few = read(x, program, check=False).head(2, program)
    with poutine.block(), evaluating(program), seeded(0):
        guide, model = _traces(*pair, (few,))
    return _structure_of(model, guide)


def check_particles(program: nn.Module, x: Data, known: Structure) -> None:
    """Runs a program with two draws of each of three rows, as what draws many of each row does.

    A tensor of the rows, such as a covariate, has no dim for the draws. A program that joins it
    to a latent, of shape (draws, rows, *event), runs with one draw of each row and fails with
    several.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: A tensor of shape (rows, *event), or a dict of such tensors.
        known: The sites and plates of the program.

    Raises:
        ValueError: If the program fails. The message says why, and which line to write.

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
        raise ValueError(
            "The program fails with several draws of each row, where a latent has shape (draws, "
            f"rows, *event): {reason}. Expand each tensor of the rows to the draws before it is "
            f"joined to a latent, for example {_expanded(few, known)}."
        ) from error


def _expanded(x: Data, known: Structure) -> str:
    """The line that gives a tensor of the rows the dims of the draws, as Python code."""
    named = {f"x[{k!r}]": v for k, v in x.items()} if isinstance(x, dict) else {"x": x}
    name = next((name for name in named if name != "x['x']"), next(iter(named)))
    latent = (*known.latents, *known.global_latents, "z")[0]
    events = len(known.event_shapes.get(latent, (1,)))
    dims = f"{latent}.shape[:-{events}]" if events else f"{latent}.shape"
    return f"{name}.expand({', '.join(['*' + dims, *['-1'] * (named[name].ndim - 1)])})"


def log_densities(
    program: nn.Module, x: Data, num_particles: int, *, known: Structure | None = None
) -> Densities:
    r"""Draws z from the guide and scores it under model and guide.

    .. math:: z_{sn} \sim q(z \mid x_n), \qquad \log p(x_n, z_{sn}), \quad \log q(z_{sn} \mid x_n)

    Scales (`poutine.scale`, a subsampling plate) are left out: they belong to an objective, not
    to a density. Masks are kept. Numbers stay on the device.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        x: A tensor of shape (rows, *event), or a dict of them.
        num_particles: The number of draws for each row.
        known: What the program is made of, where that is known already.

    Raises:
        ValueError: Where the program has latent sites outside the plate `"data"`, as these have
            no value for each row.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> log_densities(vae, torch.ones(3, 4), 5).log_weights.shape
        torch.Size([5, 3])
    """
    known = structure(program, x) if known is None else known
    return densities(*programs_of(program), (x,), num_particles, known)


def densities(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    num_particles: int,
    known: Structure,
) -> Densities:
    """Does the work of :func:`log_densities` for a pair of Pyro programs.

    Arguments:
        model: The model.
        guide: The guide.
        args: Their arguments.
        num_particles: The number of draws for each row.
        known: What the two are made of.

    Raises:
        ValueError: Where there are latent sites outside the plate `"data"`.
    """
    return draw(model, guide, args, {}, num_particles, known.max_plate_nesting).densities()


@dataclass(frozen=True, eq=False)
class Particles:
    r"""Draws of the latents of each row, and the traces of the guide and of the model at them.

    Arguments:
        model: The trace of the model.
        guide: The trace of the guide.
        num_particles: The number of draws K of each row.
        dim: The dim of the draws, negative, left of every plate.
        rows_dim: The dim of the plate `"data"`, negative.
        num_rows: How many rows it has.
    """

    model: Trace
    guide: Trace
    num_particles: int
    dim: int
    rows_dim: int
    num_rows: int

    def densities(self) -> Densities:
        """The log-densities of every site, without scales, per particle and row."""
        drawn = [name for name, _ in latent_sites(self.guide) if name in self.model.nodes]
        return Densities(
            {name: self._log_prob(site) for name, site in _samples(self.model)},
            {n: self._log_prob(s) for n, s in _samples(self.guide) if not _is_computed(s)},
            {name: self._value(self.guide.nodes[name]) for name in drawn},
        )

    def scale(self) -> Any:
        """The scale that all sites of the rows share, N / B under a subsampling plate, say.

        Raises:
            ValueError: Where they have different ones.
        """
        sites = [s for t in (self.model, self.guide) for _, s in _samples(t)]
        scales = [site["scale"] for site in sites if not _is_computed(site)]
        if isinstance(scales[0], Tensor) and scales[0].ndim:
            raise ValueError(
                "Expected one scale for all rows; got a poutine.scale of shape "
                f"{tuple(scales[0].shape)}: Trace_ELBO takes it."
            )
        if not all(is_one_scale(scale, scales[0]) for scale in scales):
            raise ValueError(
                "Expected one scale (a number) for all sites of the rows; got "
                "different ones, from a poutine.scale around some of them or of a tensor: a "
                "weight on the KL terms is BetaELBO's, or fit's warmup."
            )
        return scales[0]

    def spread(self, values: Tensor, site: Any) -> Tensor:
        """Brings numbers (num_particles, rows) to dims that broadcast with a site's draws.

        Arguments:
            values: The numbers.
            site: The site.
        """
        shape = [1] * site["value"].ndim
        events = len(site["fn"].event_shape)
        shape[self.dim - events] = len(values)
        shape[self.rows_dim - events] = self.num_rows
        return values.reshape(shape)

    def _log_prob(self, site: Any) -> Tensor:
        raw = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return self.to_rows(scale_and_mask(raw, mask=site["mask"]))

    def to_rows(self, log_prob: Tensor) -> Tensor:
        """Sums over all dims but those of particles and rows, (num_particles, rows).

        Arguments:
            log_prob: The log-probability of a site, over its plates.
        """
        log_prob = log_prob.reshape((1,) * (-self.dim - log_prob.ndim) + log_prob.shape)
        inner = [d for d in range(self.dim + 1, 0) if d != self.rows_dim]
        if inner:
            log_prob = log_prob.sum(inner)
        return log_prob.reshape(log_prob.shape[0], -1).expand(self.num_particles, self.num_rows)

    def _value(self, site: Any) -> Tensor:
        value, events = site["value"], len(site["fn"].event_shape)
        batch = value.shape[: value.ndim - events]
        value = value.reshape((1,) * (-self.dim - len(batch)) + value.shape)
        inner = {frame.dim for frame in _frames(site)} - {self.rows_dim, self.dim}
        sizes = [value.shape[dim - events] for dim in sorted(inner)]
        rest = (*sizes, *value.shape[value.ndim - events :])
        value = value.movedim(self.rows_dim - events, 1)
        value = value.reshape(*value.shape[:2], *rest)
        return value.expand(self.num_particles, self.num_rows, *rest)


def draw(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_particles: int,
    max_plate_nesting: int,
    handler: Any = None,
) -> Particles:
    """Draws z from the guide, in one pass, and runs the model at the draws.

    Arguments:
        model: The model.
        guide: The guide.
        args: Their positional arguments.
        kwargs: The same, by name.
        num_particles: The number of draws for each row.
        max_plate_nesting: The number of dims that plates take, from the right.
        handler: A handler of Pyro's to run the guide under, which sees a draw before its trace.

    Raises:
        ValueError: Where there are sites outside the plate `"data"`, or latent ones of the model
            that the guide does not draw.
    """
    particles = pyro.plate(_PARTICLES, num_particles, dim=-max_plate_nesting - 1)
    guide_trace, model_trace = _traces(particles(model), particles(guide), args, kwargs, handler)
    _check_in_rows(model_trace, guide_trace)
    _check_drawn(model_trace, guide_trace)
    frames = [
        frame
        for _, site in _samples(model_trace)
        for frame in site["cond_indep_stack"]
        if frame.name == PLATE
    ]
    rows_dim, num_rows = frames[0].dim, max(frame.size for frame in frames)
    dim = -max_plate_nesting - 1
    return Particles(model_trace, guide_trace, num_particles, dim, rows_dim, num_rows)


def _check_in_rows(model: Trace, guide: Trace) -> None:
    sites = {**dict(_samples(guide)), **dict(_samples(model))}
    outside = [n for n, site in sites.items() if not _in_rows(site) and not _is_computed(site)]
    if outside:
        raise ValueError(
            f"Expected sites in the plate {PLATE!r}, one value for each row; got "
            f"{', '.join(outside)} outside it."
        )


def _check_drawn(model: Trace, guide: Trace) -> None:
    latent = [n for n, s in _samples(model) if not s["is_observed"]]
    missing = [name for name in latent if name not in guide.nodes]
    if missing:
        raise ValueError(
            f"Expected the guide to draw the latent sites of the model, {latent}; got none for "
            f"{', '.join(missing)}."
        )


def latent_sites(guide: Trace) -> list[tuple[str, Any]]:
    """Returns the sites that a guide draws, by name.

    Arguments:
        guide: Its trace.
    """
    return [(n, s) for n, s in _samples(guide) if not s["is_observed"] and not _is_computed(s)]


def _unreparameterised(guide: Trace) -> tuple[str, ...]:
    sites = latent_sites(guide)
    return tuple(name for name, site in sites if not getattr(site["fn"], "has_rsample", False))


class RowTerms(NamedTuple):
    """The two terms of the ELBO of each row, without the scales of an objective.

    Arguments:
        reconstruction: log p(x | z) of each row, shape (rows,), in nats.
        kl: log q(z | x) - log p(z) of each row, shape (rows,), in nats.
        global_kl: The same of the sites that all rows share, shape (), where there are any.
    """

    reconstruction: Tensor
    kl: Tensor
    global_kl: Tensor | None

    @property
    def elbo(self) -> Tensor:
        """The ELBO of each row but for the latents that all share, shape (rows,)."""
        return self.reconstruction - self.kl


def row_terms(
    model_trace: Trace,
    guide_trace: Trace,
    num_particles: int = 1,
    divergences: Mapping[str, Tensor] = MappingProxyType({}),
) -> RowTerms:
    """Reads the ELBO's terms off two traces whose log-probabilities are computed.

    Arguments:
        model_trace: The trace of the model.
        guide_trace: The trace of the guide.
        num_particles: How many particles stand in the traces: terms are their mean.
        divergences: By site the KL divergence, over the site's plates, where it is known.
    """
    parts: dict[str, Any] = dict.fromkeys(RowTerms._fields, 0.0)
    for sign, trace in ((1.0, guide_trace), (-1.0, model_trace)):
        for name, site in _samples(trace):
            if _is_computed(site) or (name in divergences and trace is model_trace):
                continue
            log_prob = divergences.get(name, site["unscaled_log_prob"])
            log_prob = scale_and_mask(log_prob, mask=site["mask"])
            if not _in_rows(site):
                parts["global_kl"] += sign * log_prob.sum() / num_particles
            elif trace is model_trace and site["is_observed"]:
                parts["reconstruction"] += sum_to_rows(log_prob, site) / num_particles
            else:
                parts["kl"] += sign * sum_to_rows(log_prob, site) / num_particles
    like = next(value for value in parts.values() if isinstance(value, Tensor))
    if not isinstance(parts["global_kl"], Tensor):
        parts["global_kl"] = None
    zero = like.new_zeros(())
    return RowTerms(**{k: zero if isinstance(v, float) else v for k, v in parts.items()})


def plate_nesting(model: Program, guide: Program, *args: Any, **kwargs: Any) -> int:
    """Returns the number of dims that the plates of two programs take, from the right.

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


def row_terms_of(model: Program, guide: Program, *args: Any, **kwargs: Any) -> RowTerms:
    """Returns the ELBO's terms of each row at one draw from the guide.

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


def sum_to_rows(log_prob: Tensor, site: Any) -> Tensor:
    """Sums a log-probability of a site over all dims but its rows', shape (rows,).

    Arguments:
        log_prob: Numbers over the plates of the site.
        site: The site, in the plate `"data"`.
    """
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == PLATE)
    return log_prob.movedim(dim, 0).flatten(1).sum(1) if log_prob.ndim > 1 else log_prob


def _traces(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    handler: Any = None,
) -> tuple[Trace, Trace]:
    with contextlib.nullcontext() if handler is None else handler:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)


def _samples(trace: Trace) -> list[tuple[str, Any]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def _total(sites: dict[str, Tensor]) -> Tensor:
    return functools.reduce(operator.add, (log_prob.double() for log_prob in sites.values()))


def _structure_of(model: Trace, guide: Trace) -> Structure:
    frames = [f for trace in (model, guide) for _, s in _samples(trace) for f in _frames(s)]
    dims = {frame.dim for frame in frames if frame.name == PLATE}
    if len(dims) != 1:
        raise ValueError(
            f"Expected one plate named {PLATE!r} over the rows in model and guide; got plates "
            f"{sorted({frame.name for frame in frames})}."
        )
    _check_plates(model, guide)
    latent = [name for name, site in _samples(model) if not site["is_observed"]]
    _check_match(latent, [name for name, site in _samples(guide) if _is_drawn(site)])
    sites = dict(_samples(model))
    observed = [name for name in sites if name not in latent and not _is_computed(sites[name])]
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
        is_scaled=any(_in_rows(s) and not _is_one(s["scale"]) for s in sites.values()),
        is_subsampled=any(f.name == PLATE and f.full_size not in (None, f.size) for f in frames),
        unreparameterised=_unreparameterised(guide),
    )


def _check_plates(model: Trace, guide: Trace) -> None:
    guided = dict(_samples(guide))
    for name, site in _samples(model):
        if name in guided and _in_rows(site) != _in_rows(guided[name]):
            inside, outside = ("model", "guide") if _in_rows(site) else ("guide", "model")
            raise ValueError(
                f"Expected {name!r} to stand in the plate {PLATE!r} of model and guide alike; got "
                f"it inside in the {inside} and outside in the {outside}."
            )


def _check_match(latent: list[str], guided: list[str]) -> None:
    if set(latent) != set(guided):
        raise ValueError(
            f"Expected the guide to draw the latent sites of the model, {sorted(latent)}; got "
            f"{sorted(guided)}."
        )


def _is_drawn(site: Any) -> bool:
    return not site["is_observed"] and not site["infer"].get("is_auxiliary", False)


def _is_discrete(site: Any) -> bool:
    try:
        return bool(site["fn"].support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def _frames(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _in_rows(site: Any) -> bool:
    return any(frame.name == PLATE for frame in site["cond_indep_stack"])


def _is_computed(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic", False))


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def is_one_scale(scale: Any, other: Any) -> bool:
    """Whether two scales are known to be one, without asking a device for a tensor's value.

    Arguments:
        scale: A number or a tensor.
        other: Another.
    """
    return (
        scale is other
        or not isinstance(scale, Tensor)
        and not isinstance(other, Tensor)
        and scale == other
    )
