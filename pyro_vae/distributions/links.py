"""Links: maps from the unconstrained output of a network to a parameter."""

from typing import Any, TypeAlias

import pyro.distributions.constraints as constraints
import torch
import torch.nn.functional as F
from pyro.distributions import transforms
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, Transform

from ..data.checks import perhaps

__all__ = ["Link", "SMALLEST", "base_of", "link_of", "named_links"]

Link: TypeAlias = str | Transform

SMALLEST = 1e-6


class _Bounded(Transform):
    """A map without parameters, which equals every other map of its class."""

    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self))

    __hash__ = Transform.__hash__


class _BoundedExp(_Bounded):
    """exp of a value clamped to +- 30, so that float32 gives neither 0 nor inf.

    Gradients ignore the clamp (straight-through), so that training can move a value back inside.
    """

    domain = constraints.real
    codomain = constraints.positive
    sign = +1

    def _call(self, x: Tensor) -> Tensor:
        return _bounded(x).exp()

    def _inverse(self, y: Tensor) -> Tensor:
        return y.log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return _bounded(x)


def _bounded(x: Tensor) -> Tensor:
    return x.detach().clamp(-30.0, 30.0) + (x - x.detach())


class _BoundedSoftplus(_Bounded):
    """softplus(x) + 1e-6."""

    domain = constraints.real
    codomain = constraints.positive
    sign = +1

    def _call(self, x: Tensor) -> Tensor:
        return F.softplus(x) + SMALLEST

    def _inverse(self, y: Tensor) -> Tensor:
        above = (y - SMALLEST).clamp_min(torch.finfo(y.dtype).tiny)
        return above + torch.log(-torch.expm1(-above))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return F.logsigmoid(x)


class _BoundedCholesky(_Bounded):
    """A lower triangle of D (D + 1) / 2 entries, row by row, its diagonal softplus(x) + 1e-6."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    diagonal = _BoundedSoftplus()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        size = round(((8 * shape[-1] + 1) ** 0.5 - 1) / 2)
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _call(self, x: Tensor) -> Tensor:
        shape = self.forward_shape(x.shape)
        flat = x.new_zeros((*shape[:-2], shape[-1] ** 2))
        tril = flat.index_copy(-1, _triangle(shape[-1], x.device), x).reshape(shape)
        return tril.tril(-1) + self.diagonal(tril.diagonal(dim1=-2, dim2=-1)).diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        free = y.tril(-1) + self.diagonal.inv(y.diagonal(dim1=-2, dim2=-1)).diag_embed()
        return free.flatten(-2).index_select(-1, _triangle(y.shape[-1], y.device))


def _triangle(size: int, device: torch.device) -> Tensor:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows * size + columns


def named_links() -> dict[str, Transform]:
    """Returns the links by name.

    The names are those of a GLM: `"log"` means log(parameter) = output. Only `"softplus"` is named
    after the inverse link: parameter = softplus(output) + 1e-6.

    Example:
        >>> sorted(named_links())
        ['identity', 'log', 'logit', 'softplus']
    """
    return {
        "identity": transforms.identity_transform,
        "log": _BoundedExp(),
        "logit": transforms.SigmoidTransform(),
        "softplus": _BoundedSoftplus(),
    }


def link_of(constraint: Constraint, link: Link | None = None) -> Transform:
    """Returns the map from unconstrained values to a constraint.

    The map is `transform_to(constraint)`, except for positive values and the diagonals of lower
    triangles. Those are softplus(x) + 1e-6, because exp overflows in untrained networks.

    Arguments:
        constraint: The constraint of the values.
        link: The name of a link, or a transform, to use instead.

    Raises:
        ValueError: If no link has that name, or no transform maps to the constraint.
    """
    if isinstance(link, str):
        links = named_links()
        if link not in links:
            raise ValueError(
                f"Expected link to be one of {sorted(links)}{perhaps(link, links)}; got {link!r}."
            )
        return links[link]
    if link is not None:
        return link
    if constraints.is_dependent(constraint):
        return transforms.identity_transform
    base, softplus = base_of(constraint), _BoundedSoftplus()
    if base in (constraints.lower_cholesky, constraints.lower_triangular):
        return _BoundedCholesky()
    match base:
        case (
            constraints.greater_than(lower_bound=low)
            | constraints.greater_than_eq(lower_bound=low)
        ):
            if not isinstance(low, Tensor) and low == 0:
                return softplus
            return ComposeTransform([softplus, transforms.AffineTransform(low, 1.0)])
        case constraints.half_open_interval(lower_bound=low, upper_bound=high):
            base = constraints.interval(low, high)
    try:
        return transform_to(base)
    except NotImplementedError as error:
        raise ValueError(
            f"The constraint {base} has no default link: pass Predicted(link=...)."
        ) from error


def base_of(constraint: Any) -> Any:
    """Returns a constraint without the event dims that `Independent` adds.

    Arguments:
        constraint: A constraint, wrapped by `Independent` any number of times.

    Example:
        >>> base_of(constraints.independent(constraints.positive, 2))
        GreaterThan(lower_bound=0.0)
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint
