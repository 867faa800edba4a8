"""Units: densities of columns in the units of the data, computed on standardised values."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

__all__ = ["IN_UNITS", "Affine", "InUnits", "Units", "column_units", "input_form", "resolution"]

Convert: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

LEAST_SPREAD = 1e-3  # of a column's standard deviation: the least scale of a density
FAINT = 0.1  # of the root mean square of the columns: the least scale of an encoder's input
FLAT = 1e-12  # a column whose standard deviation is below this share of its size is constant


class Affine(TorchDistribution):  # type: ignore[misc]
    r"""Creates the distribution of loc + scale * u, where u has a given distribution.

    .. math:: \log p(x) = \log p_u\left((x - m) / s\right) - \sum_j \log s_j

    The standardised values are computed in float64 and then take the dtype of the base
    distribution, so that no digit of x is lost at large offsets. Draws are in float64.

    Arguments:
        base: The distribution of u, with event shape (*event).
        loc: The location m of each element, shape (*event), float64.
        scale: The scale s > 0 of each element, shape (*event), float64.
        dtype: The dtype in which the base distribution computes.

    Example:
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> year, price = 2000.0, 1e6
        >>> law = Affine(
        ...     base,
        ...     torch.tensor([year, price], dtype=torch.float64),
        ...     torch.tensor([10.0, 1e5], dtype=torch.float64),
        ... )
        >>> law.mean.tolist(), law.stddev.tolist()
        ([2000.0, 1000000.0], [10.0, 100000.0])
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(
        self,
        base: Any,
        loc: Tensor,
        scale: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.base, self.loc, self.scale, self.dtype = base, loc, scale, dtype
        self.has_rsample = bool(base.has_rsample)
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def _like(self, base: Any) -> "Affine":
        return Affine(base, self.loc, self.scale, self.dtype, validate_args=False)

    @property
    def support(self) -> Constraint:
        """The support of the base: the map keeps the real line and the positive numbers."""
        support: Constraint = self.base.support
        return support

    @property
    def base_dist(self) -> "Affine":
        """The distribution of single elements, as of `torch.distributions.Independent`."""
        return self._like(self.base.base_dist)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Affine":
        """Returns the distribution with another batch shape.

        Arguments:
            batch_shape: The batch shape.
        """
        return self._like(self.base.expand(batch_shape))

    def _standardized(self, x: Tensor) -> Tensor:
        return ((x.double() - self.loc) / self.scale).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) in nats, in the dtype of the base distribution.

        Arguments:
            value: Values in the units of the data, shape (..., *event).
        """
        scores: Tensor = self.base.log_prob(self._standardized(value))
        return scores - self._log_volume(scores)

    def _log_volume(self, scores: Tensor) -> Tensor:
        logs = self.scale.log()
        return (logs if not self.event_shape else logs.sum()).to(scores.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws values in the units of the data.

        Arguments:
            sample_shape: The dims of the draws, before the batch dims.
        """
        with torch.no_grad():
            return self._in_data(self.base.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws values that can be differentiated.

        Arguments:
            sample_shape: The dims of the draws, before the batch dims.
        """
        return self._in_data(self.base.rsample(torch.Size(sample_shape)))

    def _in_data(self, u: Tensor) -> Tensor:
        return self.loc + self.scale * u.double()

    @property
    def mean(self) -> Tensor:
        """The mean, NaN if there is none."""
        return self._in_data(self.base.mean)

    @property
    def variance(self) -> Tensor:
        """The variance of each element."""
        return self.scale.square() * self.base.variance.double()

    def cdf(self, value: Tensor) -> Tensor:
        """Returns the distribution function of single elements.

        Arguments:
            value: Values in the units of the data.
        """
        cdf: Tensor = self.base.cdf(self._standardized(value))
        return cdf

    def icdf(self, value: Tensor) -> Tensor:
        """Returns the quantiles of single elements, in the units of the data.

        Arguments:
            value: Probabilities.
        """
        return self._in_data(self.base.icdf(value))


class InUnits(NamedTuple):
    """How a distribution changes with the units of x.

    Arguments:
        has_location: Whether x may be moved, or only scaled.
        parameters: For each parameter that has units, a function of its value in the units of
            the data, of loc and of scale, that returns the value for (x - loc) / scale.
        bounded: The parameter that a flexible decoder could shrink to 0, if any, which is
            bounded by the resolution of the data.
    """

    has_location: bool
    parameters: Mapping[str, Convert]
    bounded: str | None = None


def _moved(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (value - loc) / scale


def _divided(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return value / scale


def _multiplied(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return value * scale


def _log_moved(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return value - scale.log()


LOCATION_SCALE = InUnits(
    has_location=True, parameters={"loc": _moved, "scale": _divided}, bounded="scale"
)

IN_UNITS: dict[Any, InUnits] = {
    dist.Exponential: InUnits(has_location=False, parameters={"rate": _multiplied}),
    dist.Gamma: InUnits(has_location=False, parameters={"rate": _multiplied}),
    dist.Laplace: InUnits(
        has_location=True, parameters={"loc": _moved, "scale": _divided}, bounded="scale"
    ),
    dist.LogNormal: InUnits(has_location=False, parameters={"loc": _log_moved}, bounded="scale"),
    dist.Normal: InUnits(
        has_location=True, parameters={"loc": _moved, "scale": _divided}, bounded="scale"
    ),
    dist.StudentT: InUnits(
        has_location=True, parameters={"loc": _moved, "scale": _divided}, bounded="scale"
    ),
}


def column_units(x: Tensor, *, has_location: bool) -> tuple[Tensor, Tensor]:
    """Returns the location and the scale of each column, in float64.

    They are the mean and the standard deviation, or 0 and the geometric mean of columns that are
    only scaled. A constant column has the scale of its own size, or 1.

    Arguments:
        x: Values (rows, *event), finite.
        has_location: Whether columns are moved.
    """
    x = x.double()
    if not has_location:
        return torch.zeros_like(x[0]), x.log().mean(0).exp()
    loc = x.mean(0)
    scale = (x - loc).square().mean(0).sqrt()
    size = x.abs().amax(0)
    flat = scale <= FLAT * size
    return loc, torch.where(flat, torch.where(size > 0.0, size, torch.ones_like(size)), scale)


def resolution(u: Tensor) -> Tensor:
    """Returns the least scale that a density may have on each column.

    It is half the smallest gap between distinct values, at least 1e-3 standard deviations and at
    most half of one. A density that is narrower would score the rounding of the data.

    Arguments:
        u: Values (rows, *event).
    """
    spread = u.std(0, correction=0)
    ordered = u.sort(0).values
    gaps = ordered.diff(dim=0)
    gaps = torch.where(gaps > FLAT * ordered[1:].abs(), gaps, math.inf)
    smallest = gaps.amin(0) if len(gaps) else torch.full_like(spread, math.inf)
    return torch.maximum(torch.minimum(smallest, spread) / 2.0, LEAST_SPREAD * spread)


def input_form(support: Any, x: Tensor) -> str | None:
    """Returns what an encoder should see of x, a form of :class:`Units`.

    Arguments:
        support: The support of the likelihood, without event dims.
        x: Values (rows, *event).

    Returns:
        `"log1p x"` of counts without a bound, `"log x"` of positive numbers, `"x"` of other
        numbers, or `None` if x is binary, a vector with a constraint, or an angle.
    """
    kinds: dict[type, str | None] = {
        type(constraints.boolean): None,
        type(constraints.nonnegative_integer): "log1p x",
        type(constraints.integer_interval(0, 1)): "x",
        type(constraints.real): "x",
        type(constraints.interval(0.0, 1.0)): "x",
        type(constraints.greater_than(0.0)): "log x",
        type(constraints.nonnegative): "log x",
    }
    form = kinds.get(type(support))
    return "x" if form == "log x" and x.amin() <= 0.0 else form


class Units(nn.Module):
    r"""The units of the columns of x: how a density and an encoder see them.

    Arguments:
        event_shape: The shape of one row of x.

    Attributes:
        loc: The location of each column in the density, shape (*event), float64; `None` if the
            density is in the units of the data.
        scale: The scale of each column in the density.
        least: The least scale that the density of each standardised column may have, if any.
        input_loc: The location of what the encoder sees, after `form`.
        input_scale: The scale of what the encoder sees.
        form: What the encoder sees: standardised `"x"`, `"log x"` or `"log1p x"`; `None` if it
            sees x itself.
    """

    loc: Tensor | None
    scale: Tensor | None
    least: Tensor | None
    input_loc: Tensor | None
    input_scale: Tensor | None

    FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
        "x": lambda x: x,
        "log x": torch.log,
        "log1p x": torch.log1p,
    }

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.form: str | None = None
        for name in ("loc", "scale", "least", "input_loc", "input_scale"):
            self.register_buffer(name, None)

    def allocate(self, names: Iterable[str], form: str | None) -> None:
        """Makes buffers, which the state of a file then fills.

        Arguments:
            names: Their names.
            form: What the encoder sees.
        """
        self.form = form
        for name in names:
            setattr(self, name, torch.zeros(self.event_shape, dtype=torch.float64))

    def state_names(self) -> list[str]:
        """Returns the names of all buffers, also of those that are not learned."""
        return list(self._buffers)

    @property
    def density_units(self) -> tuple[Tensor, Tensor] | None:
        """The location and scale of the density, if it has units."""
        return None if self.loc is None or self.scale is None else (self.loc, self.scale)

    def learn_inputs(self, x: Tensor, form: str | None) -> None:
        """Learns the location and scale of what the encoder sees.

        If the density has no units, the scale of a column is at least a tenth of the root mean
        square of all, so that columns that are nearly constant, as at the edge of an image, are
        not blown up.

        Arguments:
            x: Rows (rows, *event), in float64.
            form: What the encoder sees.
        """
        self.form = form
        if form is None:
            return
        loc, scale = column_units(self.FORMS[form](x), has_location=True)
        if self.loc is None:
            scale = torch.maximum(scale, FAINT * scale.square().mean().sqrt())
        self.input_loc, self.input_scale = loc, scale

    def inputs(self, x: Tensor) -> Tensor:
        """Returns what the encoder sees of rows; float64 if it is standardised.

        Arguments:
            x: Rows (..., *event).
        """
        if self.form is None or self.input_loc is None or self.input_scale is None:
            return x
        return (self.FORMS[self.form](x.double()) - self.input_loc) / self.input_scale

    def density(self, base: Any, dtype: torch.dtype) -> Any:
        """Returns a density over x in the units of the data.

        Arguments:
            base: The density of the standardised values.
            dtype: The dtype in which it computes.
        """
        if self.loc is None or self.scale is None:
            return base
        return Affine(base, self.loc, self.scale, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves the buffers to another device, and keeps them in float64."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self
