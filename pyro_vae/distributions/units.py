"""Units: densities of columns in the units of the data, computed on standardised values."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

__all__ = [
    "factor_loadings",
    "IN_UNITS",
    "Affine",
    "InUnits",
    "Units",
    "column_units",
    "input_form",
    "resolution",
]

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
        logs = self.scale.log() if not self.event_shape else self.scale.log().sum()
        return scores - logs.to(scores.dtype)

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
    dist.Laplace: LOCATION_SCALE,
    dist.LogNormal: InUnits(has_location=False, parameters={"loc": _log_moved}, bounded="scale"),
    dist.Normal: LOCATION_SCALE,
    dist.StudentT: LOCATION_SCALE,
}


def column_units(x: Tensor, *, has_location: bool) -> tuple[Tensor, Tensor]:
    """Returns the location and the scale of each column, in float64.

    They are the mean and the standard deviation. Columns that are only scaled have location 0
    and the power of 2 next to their geometric mean (of the values above 0), by which a division
    is exact. A constant column has the scale of its own size, or 1.

    Arguments:
        x: Values (rows, *event), finite.
        has_location: Whether columns are moved.
    """
    x = x.double()
    if not has_location:
        logs = x.where(x > 0.0, math.nan).log2().nanmean(0).nan_to_num()
        return torch.zeros_like(x[0]), logs.round().exp2()
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


BUFFERS = ("loc", "scale", "least", "input_loc", "input_scale", "loadings", "noise")
CONSTANT = "constant_"


def factor_loadings(u: Tensor, size: int) -> tuple[Tensor, Tensor]:
    r"""Fits factor analysis by maximum likelihood, and returns its loadings and its noise.

    .. math:: u = m + W z + \epsilon, \quad z \sim N(0, I), \;
        \epsilon \sim N(0, \mathrm{diag}(\psi))

    The fit is scikit-learn's. It needs the covariance alone, so it gets a few rows that have it.

    Arguments:
        u: Standardised rows (rows, columns), in float64.
        size: The number of factors, less than the number of columns.

    Returns:
        The loadings (columns, size), and the variances (columns,), at least 1e-6.
    """
    from sklearn.decomposition import FactorAnalysis

    root = torch.linalg.qr((u - u.mean(0)) / math.sqrt(len(u)), mode="r").R
    few = torch.cat([root, -root]) * math.sqrt(len(root))
    fitted = FactorAnalysis(size, tol=1e-6, max_iter=1000, svd_method="lapack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a maximum to many digits after 1000 steps
        fitted.fit(few.cpu().numpy())
    noise = torch.as_tensor(fitted.noise_variance_).clamp_min(LEAST_SPREAD**2)
    return torch.as_tensor(fitted.components_.T.copy()).to(u), noise.to(u)


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
        loadings: The loadings of factor analysis on the standardised columns, if they are real.
        noise: The variances of its noise.
        form: What the encoder sees: standardised `"x"`, `"log x"` or `"log1p x"`; `None` if it
            sees what the density sees.
    """

    loc: Tensor | None
    scale: Tensor | None
    least: Tensor | None
    input_loc: Tensor | None
    input_scale: Tensor | None

    loadings: Tensor | None
    noise: Tensor | None

    FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
        "x": lambda x: x,
        "log x": torch.log,
        "log1p x": torch.log1p,
    }

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.form: str | None = None
        for name in BUFFERS:
            self.register_buffer(name, None)

    def allocate(self, state: Mapping[str, Tensor], form: str | None) -> None:
        """Makes the buffers that a state has, which it then fills.

        Arguments:
            state: The tensors of the buffers, by name.
            form: What the encoder sees.

        Raises:
            ValueError: If a name is not that of a buffer.
        """
        self.form = form
        for name, tensor in state.items():
            if name not in BUFFERS and not name.removeprefix(CONSTANT).isidentifier():
                raise ValueError(f"Expected units named {BUFFERS}; got {name!r}.")
            self.register_buffer(name, torch.zeros_like(tensor))

    @property
    def constants(self) -> dict[str, Tensor]:
        """The parameters of the likelihood without latents, as they were at the start."""
        found = {
            k: b for k, b in self._buffers.items() if k.startswith(CONSTANT) and b is not None
        }
        return {name.removeprefix(CONSTANT): buffer for name, buffer in found.items()}

    @constants.setter
    def constants(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.register_buffer(f"{CONSTANT}{name}", value.detach().clone())

    @property
    def density_units(self) -> tuple[Tensor, Tensor] | None:
        """The location and scale of the density, if it has units."""
        return None if self.loc is None or self.scale is None else (self.loc, self.scale)

    def learn_inputs(self, u: Tensor, form: str | None) -> None:
        """Learns the location and scale of what the encoder sees.

        The scale of a column is at least a tenth of the root mean square of all, so that columns
        that are nearly constant, as at the edge of an image, are not blown up. Real columns whose
        density has units are standardised already.

        Arguments:
            u: Rows (rows, *event), in the units of the density, in float64.
            form: What the encoder sees.
        """
        if form is None or (form == "x" and self.loc is not None):
            return
        self.form = form
        loc, scale = column_units(self.FORMS[form](u), has_location=True)
        self.input_loc = loc
        self.input_scale = torch.maximum(scale, FAINT * scale.square().mean().sqrt())

    def inputs(self, x: Tensor) -> Tensor:
        """Returns what the encoder sees of rows; float64 if it is standardised.

        Arguments:
            x: Rows (..., *event).
        """
        if self.loc is not None and self.scale is not None:
            x = (x.double() - self.loc) / self.scale
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

    def independent_columns(self, likelihood: Any, dtype: torch.dtype) -> Any:
        """Returns p(x) without latents: each column at its maximum likelihood; `None` if unknown.

        Arguments:
            likelihood: The likelihood whose parameters were learned.
            dtype: The dtype in which it computes.
        """
        constants = self.constants
        return self.density(likelihood.at(constants), dtype) if constants else None

    def factor_analysis(self) -> Any:
        """Returns p(x) of factor analysis with as many latents; `None` if it was not learned."""
        if self.loadings is None or self.noise is None:
            return None
        zeros = torch.zeros_like(self.noise)
        base = dist.LowRankMultivariateNormal(zeros, self.loadings, self.noise)
        return self.density(base, torch.float64)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves the buffers to another device, and keeps them in float64."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self
