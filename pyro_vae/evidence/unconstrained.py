"""The continuous latents of a program as one vector of unconstrained numbers for each row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import VonMises, biject_to

from ..data.rows import PLATE
from ..data.source import Row
from ..distributions.links import base_of
from ..elbos.log_densities import Particles, Program, Structure, latent_sites, programs_of
from ..engine.running import Site

__all__ = ["Point", "Space"]

EDGE = 80.0  # the unconstrained number of a value that rounding put on the edge of its support


@dataclass(frozen=True, eq=False)
class Point:
    """Log-densities at points of the unconstrained space, each of shape (draws, rows), in nats.

    Arguments:
        log_prior: log p(u): log p(z) and the logarithm of the Jacobian of z(u).
        log_likelihood: log p(x | z).
        log_left: log p - log q of the sites that the guide draws, given u; 0 if there are none.
        values: The value of each latent site, shape (draws, rows, *event).
    """

    log_prior: Tensor
    log_likelihood: Tensor
    log_left: Tensor
    values: dict[str, Tensor]

    @property
    def log_joint(self) -> Tensor:
        """log p(x, u), less log q of the sites that the guide draws."""
        return self.log_prior + self.log_likelihood + self.log_left


@dataclass(frozen=True, eq=False)
class Space:
    r"""The space of u, where each continuous latent site is :math:`z = T(u)` with a bijection T.

    .. math:: p(u) = p(z) \, |\det \partial z / \partial u|, \qquad u \in \mathbb{R}^D

    T is `torch.distributions.biject_to` of the support of the site under the model. Discrete
    sites, and directions and angles, which have no such T, are left to the guide: it draws them
    given the others. Sites whose support varies by row then are left to it too.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        known: Its sites and plates.
        shapes: The shape of u of one row for each continuous latent site.
        supports: The support of each of these sites.
        left: The latent sites that are left to the guide.
    """

    program: nn.Module
    known: Structure
    shapes: Mapping[str, torch.Size]
    supports: Mapping[str, Any]
    left: tuple[str, ...]

    @classmethod
    def of(cls, program: nn.Module, known: Structure, few: Row) -> "Space":
        """Finds the space of a program by a dry run.

        Arguments:
            program: The program.
            known: Its sites and plates.
            few: Two rows.
        """
        with poutine.block():
            trace: Any = poutine.trace(programs_of(program)[0]).get_trace(few)
        sites = {name: trace.nodes[name] for name in known.latents}
        left = tuple(name for name, site in sites.items() if not _has_bijection(site))
        if left:
            left = tuple(n for n, s in sites.items() if n in left or _varies(s["fn"].support))
        shapes = {}
        for name, site in sites.items():
            if name not in left:
                fn, inner = site["fn"], _inner_dims(site, known)
                shape = biject_to(fn.support).inverse_shape(fn.shape())
                events = len(shape) - len(fn.batch_shape)
                batch = [fn.batch_shape[dim] for dim in inner]
                shapes[name] = torch.Size([*batch, *shape[len(shape) - events :]])
        supports = {name: sites[name]["fn"].support for name in shapes}
        return cls(program, known, shapes, supports, left)

    @property
    def size(self) -> int:
        """D, the number of unconstrained numbers of each row."""
        return sum(shape.numel() for shape in self.shapes.values())

    def is_mean_field(self, few: Row) -> bool:
        """Returns whether the guide draws one site, whose elements are independent given x.

        Arguments:
            few: Two rows.
        """
        with poutine.block():
            trace: Any = poutine.trace(programs_of(self.program)[1]).get_trace(few)
        trace = prune_subsample_sites(trace)
        if len(self.shapes) != 1 or len(latent_sites(trace)) != 1:
            return False
        core = trace.nodes[next(iter(self.shapes))]["fn"]
        while hasattr(core, "base_dist"):
            if any(transform.domain.event_dim for transform in getattr(core, "transforms", ())):
                return False
            core = core.base_dist
        return not core.event_shape

    def __call__(self, row: Row, u: Tensor) -> Point:
        """Evaluates the program at points.

        Arguments:
            row: The rows.
            u: The points, shape (draws, rows, D).
        """
        model, guide = programs_of(self.program)
        dim = -self.known.max_plate_nesting - 1
        particles = pyro.plate("_particles", len(u), dim=dim)
        placed = _Placed(self, u, dim)
        if self.left:
            with placed:
                guided = poutine.trace(particles(guide)).get_trace(row)
            modelled = poutine.trace(poutine.replay(particles(model), trace=guided)).get_trace(row)
        else:
            guided = Trace()
            with placed:
                modelled = poutine.trace(particles(model)).get_trace(row)
        traces = prune_subsample_sites(modelled), prune_subsample_sites(guided)
        found = Particles(*traces, len(u), dim, self.known.rows_dim, u.shape[1])
        terms = found.densities()
        sums = {
            "prior": [found.to_rows(jacobian) for jacobian in placed.jacobians.values()],
            "left": [-terms.guide[name] for name in self.left],
            "likelihood": [],
        }
        values: dict[str, Tensor] = {}
        for name, log_prob in terms.model.items():
            kind = (
                "prior" if name in self.shapes else "left" if name in self.left else "likelihood"
            )
            sums[kind].append(log_prob)
            if kind != "likelihood":
                site: Site = modelled.nodes[name]
                values[name] = found.by_row(site["value"], len(site["fn"].event_shape), site)
        zero = u.new_zeros(u.shape[:2], dtype=torch.float64)
        prior, left, likelihood = (
            sum((term.double() for term in parts), zero) for parts in sums.values()
        )
        return Point(prior, likelihood, left, values)

    def from_guide(self, row: Row, count: int) -> Tensor:
        """Draws from the guide, as points of shape (draws, rows, D).

        Arguments:
            row: The rows.
            count: The number of draws of each row.
        """
        model, guide = programs_of(self.program)
        particles = pyro.plate("_particles", count, dim=-self.known.max_plate_nesting - 1)
        drawn = poutine.trace(particles(guide)).get_trace(row)
        return self._points(poutine.replay(particles(model), trace=drawn), row, count)

    def from_prior(self, row: Row, count: int) -> Tensor:
        """Draws from the prior, as points of shape (draws, rows, D).

        Arguments:
            row: The rows.
            count: The number of draws of each row.
        """
        model, dim = programs_of(self.program)[0], -self.known.max_plate_nesting - 1
        return self._points(pyro.plate("_particles", count, dim=dim)(model), row, count)

    def _points(self, model: Program, row: Row, count: int) -> Tensor:
        trace: Any = poutine.trace(model).get_trace(row)
        dim = -self.known.max_plate_nesting - 1
        rows = max(
            frame.size
            for name in self.shapes
            for frame in trace.nodes[name]["cond_indep_stack"]
            if frame.name == PLATE
        )
        found = Particles(trace, Trace(), count, dim, self.known.rows_dim, rows)
        parts = []
        for name, shape in self.shapes.items():
            site = trace.nodes[name]
            transform = biject_to(site["fn"].support)
            u = transform.inv(site["value"]).nan_to_num(math.nan, EDGE, -EDGE)
            events = u.ndim - (site["value"].ndim - len(site["fn"].event_shape))
            parts.append(found.by_row(u, events, site).reshape(count, rows, shape.numel()))
        return torch.cat(parts, dim=-1)


class _Placed(Messenger):  # type: ignore[misc]
    """Effect handler that sets latent sites to given points of the unconstrained space."""

    def __init__(self, space: Space, u: Tensor, dim: int) -> None:
        super().__init__()
        self.space, self.dim = space, dim
        sizes = [shape.numel() for shape in space.shapes.values()]
        self.parts = dict(zip(space.shapes, u.split(sizes, dim=-1), strict=True))
        self.jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if name not in self.parts or msg["is_observed"]:
            return
        fn, shape, part = msg["fn"], self.space.shapes[name], self.parts[name]
        transform = biject_to(self.space.supports[name] if self.space.left else fn.support)
        wanted = transform.inverse_shape(fn.shape())
        events = len(wanted) - len(fn.batch_shape)
        sizes = dict(zip(_inner_dims(msg, self.space.known, self.dim), shape, strict=False))
        rows_dim = self.space.known.rows_dim
        rest = [sizes.get(dim, 1) for dim in range(self.dim + 1, 0) if dim != rows_dim]
        u = part.reshape(*part.shape[:2], *rest, *wanted[len(wanted) - events :])
        u = u.movedim(1, rows_dim - events)
        value = transform(u)
        jacobian = transform.log_abs_det_jacobian(u, value)
        extra = jacobian.ndim - (value.ndim - len(fn.event_shape))
        self.jacobians[name] = jacobian.flatten(-extra).sum(-1) if extra else jacobian
        msg["value"], msg["done"] = value, True


def _has_bijection(site: Site) -> bool:
    """Whether the values are those of a bijection from the real numbers."""
    try:
        support = site["fn"].support
        biject_to(support)
    except (NotImplementedError, AttributeError):
        return False
    core = site["fn"]
    while hasattr(core, "base_dist"):
        core = core.base_dist
    is_angle = isinstance(core, VonMises) and isinstance(base_of(support), type(constraints.real))
    return not base_of(support).is_discrete and not is_angle


def _varies(support: Any) -> bool:
    """Whether a bound is a tensor of several numbers, so that it may depend on other sites."""
    bounds = vars(base_of(support)).values()
    return any(bound.numel() > 1 for bound in bounds if isinstance(bound, Tensor))


def _inner_dims(site: Site, known: Structure, particles: int = 0) -> list[int]:
    """The dims of the plates of a site, other than the rows and the draws."""
    dims = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    return sorted(dims - {known.rows_dim, particles})
