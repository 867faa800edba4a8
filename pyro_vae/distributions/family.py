"""Families: Pyro distributions whose parameters are predicted from features, learned or fixed."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from ..data.checks import checked_flag, is_size, perhaps, short
from .conditional import Arguments, ConditionalDistribution
from .densities import scored, to_event
from .links import Link, link_of
from .starts import STARTS
from .units import IN_UNITS, column_units, resolution

__all__ = ["ALTERNATIVES", "Family", "Predicted", "Shared", "ParameterSpec"]


@dataclass(frozen=True, eq=False)
class Predicted:
    r"""A parameter that a linear layer computes from the features of each row.

    .. math:: \theta(h) = g^{-1}(W h + b)

    Arguments:
        shape: The parameter's size if the shape of x does not determine it (the number of
            categories, the rank of a factor): an int or a tuple.
        link: The name of the link (`"identity"`, `"log"`, `"logit"`, `"softplus"`) or a
            transform; by default the link that fits the parameter's constraint.

    Raises:
        ValueError: If a size is not a positive integer.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.Categorical, logits=Predicted(shape=10))
        Family(Categorical, logits=Predicted(shape=10))
    """

    shape: int | tuple[int, ...] | None = None
    link: Link | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            _sizes(self.shape)

    def __repr__(self) -> str:
        return _call("Predicted", shape=self.shape, link=self.link)


@dataclass(frozen=True, eq=False)
class Shared:
    """A parameter that is learned, and has the same value in every row.

    Arguments:
        init: The initial value, on the scale of the parameter itself; by default the value at
            which the link is at 0, or near it.
        scalar: Whether all elements of the event share one number. If not, each has its own.
        shape: The parameter's size if the shape of x does not determine it.
        link: The name of the link or a transform; by default the link that fits the constraint.

    Raises:
        ValueError: If a size is not a positive integer.

    Example:
        >>> import pyro.distributions as dist
        >>> features = torch.randn(2, 4)
        >>> family = Family(dist.Normal, scale=Shared(init=0.5)).build((3,), features)
        >>> family(features).base_dist.scale[0].tolist()
        [0.5, 0.5, 0.5]
    """

    init: float | Tensor | None = None
    scalar: bool = False
    shape: int | tuple[int, ...] | None = None
    link: Link | None = None

    def __post_init__(self) -> None:
        checked_flag("scalar", self.scalar)
        if self.shape is not None:
            _sizes(self.shape)

    def __repr__(self) -> str:
        scalar = True if self.scalar else None
        return _call("Shared", init=self.init, scalar=scalar, shape=self.shape, link=self.link)


ParameterSpec: TypeAlias = Predicted | Shared | float | int | bool | str | Tensor | None

HEAD_WEIGHTS = 0.5  # the start is a saddle of the ELBO, at which smaller weights keep latents dead
FEW_ROWS = 1000

ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
)


class Family(ConditionalDistribution):
    r"""Creates a family of distributions, one for each row of features.

    .. math:: p(y \mid h) = D(y;\ \theta_1(h), \theta_2(h), \dots)

    Each parameter of the Pyro distribution :math:`D` is written as in a GLM. :class:`Predicted`
    computes it from the features, and is the default. :class:`Shared` learns one value for all
    rows. A number or a tensor fixes it, and `None` omits it, so that Pyro's default applies.
    Shapes and links follow from the distribution's `arg_constraints`. A family has no layers until
    `build` is called with an event shape.

    To add a named family, subclass `Family` and its role, for example :class:`Likelihood`. Write
    an `__init__` whose arguments are the distribution's parameters, and pass them on by name.

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: How each parameter is obtained: `Predicted()`, `Shared()` or a fixed value.

    Raises:
        ValueError: If the distribution has no parameter of that name, a parameter without a
            default is missing, or a fixed value violates the constraint of its parameter.

    Example:
        >>> import pyro.distributions as dist
        >>> family = Family(dist.StudentT, df=4.0, scale=Shared())
        >>> features = torch.randn(5, 16)
        >>> y = family.build((3,), features)(features)
        >>> y.batch_shape, y.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    default: type[Predicted] | type[Shared] = Predicted
    event_shape: torch.Size
    least: Tensor | None
    _like: Tensor

    def __init__(self, distribution: type[Distribution], /, **parameters: ParameterSpec) -> None:
        super().__init__()
        if not (inspect.isclass(distribution) and issubclass(distribution, Distribution)):
            raise ValueError(f"Expected a class of pyro.distributions; got {distribution!r}.")
        name, is_torchs = distribution.__name__, distribution.__module__.startswith("torch.")
        self.distribution: Any = getattr(dist, name, distribution) if is_torchs else distribution
        self.specs = parameters
        self.is_built = False
        known, parts = self.constraints, inspect.signature(distribution.__init__).parameters
        signature = {k: v for k, v in parts.items() if k not in ("self", "validate_args")}
        absolute = {k: v for k, v in known.items() if not constraints.is_dependent(v)}
        for word, spec in parameters.items():
            if word not in signature and word not in known:
                raise ValueError(
                    f"Expected parameters of {name}, one of {sorted(signature)}"
                    f"{perhaps(word, [*signature, *known])}; got {word!r}."
                )
            match spec:
                case int() | float() | Tensor() if word in absolute:
                    value, constraint = torch.as_tensor(spec), absolute[word]
                    if value.ndim >= constraint.event_dim and not constraint.check(value).all():
                        raise ValueError(
                            f"Expected {word} to lie in {constraint}; got {short(spec)}."
                        )
                case str() if word in known:
                    words = {"shared": "pv.Shared()", "predicted": "pv.Predicted()"}
                    meant = words.get(spec.lower(), "pv.Shared(), pv.Predicted() or a number")
                    raise ValueError(f"Write {word}={meant} in place of {word}={spec!r}.")
                case Predicted() | Shared() | int() | float() | str() | Tensor() | None:
                    pass
                case _:
                    raise ValueError(
                        f"Expected {word} to be pv.Predicted(), pv.Shared(), a number or a "
                        f"tensor; got {short(spec)}."
                    )
        for word, parameter in signature.items():
            has_default = parameter.default is not parameter.empty and word != "total_count"
            if word in absolute:
                has_default = not absolute[word].is_discrete
            if not has_default and word not in parameters:
                raise ValueError(
                    f"The parameter {word} of {name} is missing: pass it by name, as {word}=..."
                )

    @property
    def constraints(self) -> dict[str, Constraint]:
        """The constraint of each parameter, as the distribution declares it."""
        found = getattr(self.distribution, "arg_constraints", {})
        return dict(found) if isinstance(found, Mapping) else {}

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, positional and by name."""
        names_its_own = type(self).__init__ is not Family.__init__
        return (() if names_its_own else (self.distribution,)), dict(self.specs)

    def build(
        self, event_shape: tuple[int, ...], features: Tensor | None = None, *, extra: Any = ()
    ) -> Self:
        """Makes the layers and parameters for an event shape.

        Arguments:
            event_shape: The shape of one draw, (*event).
            features: An example of the features, (rows, units) or (rows, channels, *sizes) with
                the event's trailing sizes; `None` if nothing is predicted.
            extra: Dims before the event, such as those of the components of a mixture.

        Raises:
            ValueError: If the event shape does not determine the size of a parameter, or the
                features do not fit.

        Returns:
            The family itself.
        """
        self.event_shape = torch.Size(event_shape)
        self.extra = torch.Size(extra)
        self.feature_shape = None if features is None else features.shape[1:]
        dtype = torch.get_default_dtype()  # the widest of all, so that no fixed value is rounded
        for spec in self.specs.values():
            match spec:
                case Tensor(dtype=own) if own.is_floating_point:
                    dtype = torch.promote_types(dtype, own)
        like = torch.empty(0, dtype=dtype) if features is None else features
        self.register_buffer("_like", like.new_zeros(()), persistent=False)
        self.register_buffer("least", None, persistent=False)
        self.in_units: dict[str, Tensor] = {}
        self.heads = nn.ModuleDict()
        self.shared = nn.ParameterDict()
        self.links: dict[str, Any] = {}
        self.shapes: dict[str, torch.Size] = {}
        left_out = set(self.specs)
        for group in ALTERNATIVES:
            present = [name for name in group if name in self.constraints]
            given = [name for name in present if self.specs.get(name) is not None]
            left_out |= set(present) - set((given or present)[:1])
        defaults = {name: self.default() for name in self.constraints if name not in left_out}
        for name, spec in (defaults | self.specs).items():
            match spec:
                case Tensor():
                    dtype = self._like.dtype if spec.is_floating_point() else spec.dtype
                    fixed = spec.detach().to(self._like.device, dtype, copy=True)
                    self.register_buffer(f"fixed_{name}", fixed)
                case Predicted() | Shared():
                    self._build_parameter(name, spec, features)
        self.is_built = True
        return self

    def _build_parameter(
        self, name: str, spec: Predicted | Shared, features: Tensor | None
    ) -> None:
        """Makes the layer that predicts a parameter, or its learned value."""
        constraint: Any = self.constraints.get(name, constraints.real)
        link = self.links[name] = link_of(constraint, spec.link)
        event, dim = self.extra + self.event_shape, _event_dim(self.distribution.support)
        if dim > len(self.event_shape):
            raise ValueError(
                f"Expected an event shape of at least {dim} dims for "
                f"{self.distribution.__name__}; got {tuple(self.event_shape)}."
            )
        own_dim, batch_dim = _event_dim(constraint), len(event) - dim
        is_square = constraint in (
            constraints.lower_cholesky,
            constraints.lower_triangular,
            constraints.positive_definite,
            constraints.corr_cholesky,
        )
        if spec.shape is not None:
            lead = event if own_dim > dim else event[:batch_dim]
            shape = lead + torch.Size(_sizes(spec.shape))
        elif own_dim <= dim:
            shape = event[: batch_dim + own_dim]
        elif dim > 0 and is_square:
            shape = event + event[-1:]
        else:
            raise ValueError(
                f"The event shape {tuple(self.event_shape)} does not determine the size of {name} "
                f"of {self.distribution.__name__}: pass it, as in {name}=Predicted(shape=...)."
            )
        self.shapes[name] = shape
        match spec:
            case Predicted():
                free_shape = torch.Size(link.inverse_shape(shape))
                self.heads[name] = _Head(name, free_shape, event, features)
            case Shared():
                spread = 0.1 if own_dim > dim and not is_square else 0.0
                self.shared[name] = _shared(name, spec, shape, link, self._like, spread)

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Maps features to a distribution of batch shape (*rows) and event shape (*event).

        Arguments:
            features: Features (*rows, *feature_shape); `None` if nothing is predicted.

        Raises:
            ValueError: If the family is not built yet.
        """
        if not self.is_built:
            raise ValueError(f"{self} has no layers yet: call build(event_shape, features) first.")
        rows = torch.Size()
        if features is not None and self.feature_shape is not None:
            rows = features.shape[: features.ndim - len(self.feature_shape)]
        return self._distribution(self._values(features), rows)

    def _distribution(self, values: dict[str, Any], rows: torch.Size) -> Distribution:
        base, event = scored(self.distribution)(**values), self.extra + self.event_shape
        wanted = rows + event[: len(event) - len(base.event_shape)]
        if base.batch_shape != wanted:
            base = base.expand(wanted)
        return to_event(base, len(self.event_shape) - len(base.event_shape))

    def _values(self, features: Tensor | None) -> dict[str, Any]:
        values = self._fixed_values()
        for name, head in self.heads.items():
            values[name] = self.links[name](head(features).to(self._like.dtype))
        for name, parameter in self.shared.items():
            values[name] = self.links[name](parameter).expand(self.shapes[name])
        if self.least is not None:
            bounded = IN_UNITS[self.distribution].bounded
            if bounded in self.links:
                values[bounded] = values[bounded] + self.least
        return values

    def _fixed_values(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, spec in self.specs.items():
            match spec:
                case int() | float() | Tensor() if name in self.in_units:
                    values[name] = self.in_units[name].to(self._like)
                case Tensor():
                    values[name] = getattr(self, f"fixed_{name}")
                case int() if name not in self.constraints:
                    values[name] = spec
                case int() | float():
                    values[name] = torch.full_like(self._like, float(spec))
                case str():
                    values[name] = spec
        return values

    def units(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the location and scale by which the density is standardised, in float64.

        The units are one number for all columns if a parameter with units is one number.

        Arguments:
            x: Values (rows, *event).

        Returns:
            Two tensors of shape (*event), or `None` if the distribution has no units that this
            package knows.
        """
        known = IN_UNITS.get(self.distribution)
        if known is None:
            return None
        loc, scale = column_units(x, has_location=known.has_location)
        one = {k for k, v in self.specs.items() if isinstance(v, Shared) and v.scalar}
        if one & known.parameters.keys():
            mean = scale.square().mean().sqrt() if known.has_location else scale.log().mean().exp()
            scale = mean.expand_as(scale).clone()
        if "loc" in one and "loc" in known.parameters:
            loc = loc.mean().expand_as(loc).clone()
        return loc, scale

    def least_scale(self, y: Tensor) -> Tensor | None:
        """Returns the least scale that the density of each column may have, if it has a scale.

        Arguments:
            y: Standardised values (rows, *event), in float64.
        """
        known = IN_UNITS.get(self.distribution)
        if known is None or known.bounded is None:
            return None
        least = resolution(y.log() if self.distribution is dist.LogNormal else y)
        spec = self.specs.get(known.bounded)
        is_one = isinstance(spec, Shared) and spec.scalar
        return least.amin().expand_as(least).clone() if is_one else least

    def set_units(self, units: tuple[Tensor, Tensor] | None, least: Tensor | None) -> None:
        """Takes fixed parameters as in the units of the data, and bounds the scale.

        Arguments:
            units: The location and scale by which x is standardised, each of shape (*event).
            least: The least scale of each standardised column, shape (*event).
        """
        self.in_units = {}
        self.least = None if least is None else least.to(self._like)
        if units is None:
            return
        for name, convert in IN_UNITS[self.distribution].parameters.items():
            spec = self.specs.get(name)
            if isinstance(spec, int | float | Tensor):
                value = torch.as_tensor(spec, dtype=torch.float64, device=units[0].device)
                self.in_units[name] = convert(value, *units)

    def initialize(self, y: Tensor, units: tuple[Tensor, Tensor] | None = None) -> None:
        """Starts at the maximum likelihood of values without features, column by column.

        `Shared` parameters and the biases of the heads get it through the inverse of their links;
        the weights of the heads are multiplied by 0.5. Initial values that a user wrote are kept.
        A distribution without a known maximum is fitted by L-BFGS.

        Arguments:
            y: Values (rows, *event), standardised, in float64.
            units: The location and scale by which they are standardised.
        """
        with torch.no_grad():
            for head in self._heads():
                head.linear.weight.mul_(HEAD_WEIGHTS)
        given = self._given(units)
        if self.distribution not in STARTS:
            self._fit_constants(y)
            return
        for name, value in STARTS[self.distribution](y.double(), given).items():
            if name not in given:
                self._start(name, value)

    def _given(self, units: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """The parameters that a user fixed or gave an initial value, in the units of training."""
        given: dict[str, Tensor] = {}
        known = IN_UNITS.get(self.distribution)
        for name, spec in self.specs.items():
            value = spec.init if isinstance(spec, Shared) else spec
            if isinstance(value, str | bool | Predicted) or value is None:
                continue
            given[name] = torch.as_tensor(value).to(self._like.device, torch.float64)
            if units is not None and known is not None and name in known.parameters:
                given[name] = known.parameters[name](given[name], *units)
            if isinstance(spec, Shared):
                self._start(name, given[name])
        for shape in (self.shapes[name] for name in ("logits", "probs") if name in self.shapes):
            given["num_categories"] = torch.tensor(shape[-1] if shape else 1)
        return given

    @torch.no_grad()
    def _start(self, name: str, value: Tensor) -> None:
        """Moves a parameter without features to a value, as near as its link allows."""
        if name not in self.links:
            return
        known, spec = IN_UNITS.get(self.distribution), self.specs.get(name)
        value, is_scale = value.expand(self.shapes[name]), known and name == known.bounded
        if isinstance(spec, Shared) and spec.scalar:
            value = value.square().mean().sqrt() if is_scale else value.mean()
        if self.least is not None and is_scale:
            least = self.least.double()
            least = least if value.shape else least.amin()
            value = torch.maximum(value - least, 1e-3 * least)
        free = self.links[name].inv(value.to(self._like))
        if not free.isfinite().all():
            return
        if name in self.shared:
            self.shared[name].copy_(free)
        else:
            head: Any = self.heads[name]
            head.start(free)

    @torch.no_grad()
    def constants(self) -> dict[str, Tensor]:
        """Returns the parameters at features of 0, each of its own shape."""
        features = None
        if self.feature_shape is not None:
            features = self._like.new_zeros((1, *self.feature_shape))
        values = self._values(features)
        return {name: values[name].reshape(self.shapes[name]) for name in self.links}

    def at(self, constants: Mapping[str, Tensor]) -> Distribution:
        """Returns the distribution of given parameters, without features.

        Arguments:
            constants: The result of :meth:`constants`.
        """
        return self._distribution(self._fixed_values() | dict(constants), torch.Size())

    def _heads(self) -> "list[_Head]":
        return [head for head in self.heads.values() if isinstance(head, _Head)]

    def _fit_constants(self, y: Tensor) -> None:
        """Fits biases and shared parameters at features of 0 by L-BFGS; keeps them if it fails."""
        trained = [*self.shared.values(), *(head.linear.bias for head in self._heads())]
        before = [parameter.detach().clone() for parameter in trained]
        like, shape = self._like, self.feature_shape
        few = y[:: math.ceil(len(y) / FEW_ROWS)].to(like)
        features = None if shape is None else like.new_zeros((1, *shape))
        optimizer = torch.optim.LBFGS(trained, max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            scored_loss = -self(features).expand((len(few),)).log_prob(few).mean()
            scored_loss.backward()
            return scored_loss

        with torch.enable_grad():
            try:
                start, _ = float(loss().detach()), optimizer.step(loss)
                has_gained = float(loss().detach()) <= start
            except (RuntimeError, ValueError, NotImplementedError):
                has_gained = False
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.grad = None
                if not (has_gained and parameter.isfinite().all()):
                    parameter.copy_(value)

    def _title(self) -> str:
        name: str = self.distribution.__name__
        return name


class _Head(nn.Module):
    """A linear layer from features to one parameter, pixel by pixel if features are images."""

    def __init__(
        self, name: str, shape: torch.Size, event: torch.Size, features: Tensor | None
    ) -> None:
        super().__init__()
        if features is None:
            raise ValueError(
                f"Expected {name} to be Shared or fixed, as there are no features to predict it "
                "from; got Predicted()."
            )
        self.shape = shape
        units, *sizes = features.shape[1:]
        self.sizes = torch.Size(sizes)
        if sizes and event[-len(sizes) :] != self.sizes:
            raise ValueError(
                f"Expected features of shape (rows, units), or (rows, channels, *sizes) with the "
                f"trailing sizes of the event {tuple(event)}; got (rows, {units}, "
                f"{', '.join(map(str, sizes))}). End the network with nn.Flatten()."
            )
        self.lead = event[: len(event) - len(sizes)]
        self.tail = shape[len(event) :] if sizes else torch.Size()
        if sizes and shape[: len(event)] != event:
            raise ValueError(
                f"Features with trailing sizes predict a parameter pixel by pixel, so the shape "
                f"of {name} must begin with {tuple(event)}; got {tuple(shape)}. End the network "
                "with nn.Flatten()."
            )
        outputs = math.prod(self.lead + self.tail) if sizes else math.prod(shape)
        self.linear = nn.Linear(units, outputs, dtype=features.dtype, device=features.device)

    def start(self, free: Tensor) -> None:
        """Sets the bias; over the sizes of an image it is the mean of their values."""
        first, last = len(self.lead), len(self.lead) + len(self.sizes)
        over = tuple(range(first, last))
        self.linear.bias.copy_((free.mean(over) if over else free).flatten())

    def forward(self, features: Tensor) -> Tensor:
        if not self.sizes:
            return self.linear(features).reshape(features.shape[:-1] + self.shape)
        spatial = len(self.sizes)
        rows = features.shape[: features.ndim - spatial - 1]
        out = self.linear(features.movedim(-spatial - 1, -1))
        out = out.reshape(rows + self.sizes + self.lead + self.tail)
        first, lead = len(rows), len(self.lead)
        return out.movedim(
            tuple(range(first + spatial, first + spatial + lead)),
            tuple(range(first, first + lead)),
        )


def _sizes(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a shape, which the user writes as an int or as a tuple."""
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not all(map(is_size, sizes)):
        raise ValueError(f"Expected a positive integer or a tuple of them; got shape={shape!r}.")
    return sizes


def _event_dim(constraint: Any) -> int:
    """The number of event dims of a constraint, 0 if it does not declare them."""
    try:
        return constraint.event_dim
    except (NotImplementedError, AttributeError):
        return 0


def _shared(
    name: str, spec: Shared, shape: torch.Size, link: Any, like: Tensor, spread: float
) -> nn.Parameter:
    """The unconstrained value of a shared parameter of a shape: as specified, or near 0."""
    if not spec.scalar:
        free_shape = torch.Size(link.inverse_shape(shape))
    elif link.domain.event_dim == 0:
        free_shape, spread = torch.Size(), 0.0
    else:
        raise ValueError(
            f"{name} is a vector or a matrix, so it cannot be one number: remove scalar=True "
            f"from {spec!r}."
        )
    if spec.init is None:
        return nn.Parameter(spread * torch.randn(free_shape, dtype=like.dtype, device=like.device))
    init = torch.as_tensor(spec.init, dtype=like.dtype, device=like.device)
    value_shape = torch.Size(link.forward_shape(free_shape))
    try:
        start = link.inv(init.expand(value_shape)).clone()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"Expected init of {name} to expand to shape {tuple(value_shape)}; got {spec.init!r}."
        ) from error
    if not torch.isclose(link(start), init, rtol=1e-3, atol=1e-7).all():
        raise ValueError(f"Expected init of {name} inside its support; got {spec.init!r}.")
    return nn.Parameter(start)


def _call(name: str, **arguments: Any) -> str:
    shown = ", ".join(f"{k}={short(v)}" for k, v in arguments.items() if v is not None)
    return f"{name}({shown})"
