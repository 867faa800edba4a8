"""Families: any Pyro distribution, its parameters computed from features by its constraints."""

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

from ..data.checks import is_size, perhaps, short
from .densities import scored, to_event
from .links import Link, link_of

__all__ = ["ALTERNATIVES", "Family", "Predicted", "Shared", "Word"]


@dataclass(frozen=True, eq=False)
class Predicted:
    r"""Says that a parameter is computed from the features of each row, by a linear layer.

    .. math:: \theta(h) = g^{-1}(W h + b)

    Arguments:
        shape: The parameter's size where the shape of x does not tell it (the number of
            categories, the rank of a factor): an int or a tuple.
        link: The name of the link (`"identity"`, `"log"`, `"logit"`, `"softplus"`) or a
            transform; by default the one of the parameter's constraint.

    Raises:
        ValueError: Where a size is not a positive integer.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.Categorical, logits=Predicted(shape=10))
        Family(Categorical, logits=Predicted(shape=10))
    """

    shape: int | tuple[int, ...] | None = None
    link: Link | None = None

    def __post_init__(self) -> None:
        _check_named(self.shape)

    def __repr__(self) -> str:
        return _call("Predicted", shape=self.shape, link=self.link)


@dataclass(frozen=True, eq=False)
class Shared:
    """Says that a parameter is learned, and the same for every row.

    Arguments:
        init: Where it starts, as a value of the parameter itself.
        scalar: Whether one number serves all elements of the event; else each has its own.
        shape: The parameter's size where the shape of x does not tell it.
        link: The name of the link or a transform; by default the one of its constraint.

    Raises:
        ValueError: Where a size is not a positive integer.

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
        _check_named(self.shape)

    def __repr__(self) -> str:
        scalar = True if self.scalar else None
        return _call("Shared", init=self.init, scalar=scalar, shape=self.shape, link=self.link)


Word: TypeAlias = Predicted | Shared | float | int | bool | str | Tensor | None

ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
)


class Family(nn.Module):
    r"""Creates a family of distributions, one for each row of features.

    .. math:: p(y \mid h) = D(y;\ \theta_1(h), \theta_2(h), \dots)

    Each parameter of the Pyro distribution :math:`D` is written as in a GLM: nothing or
    :class:`Predicted` where it is computed from the features, :class:`Shared` where it is learned
    and the same for every row, a number or tensor where it is fixed, `None` where it is left out.
    Shapes and links follow from the distribution's own `arg_constraints`. A family is a
    specification until it is built for an event shape.

    To add one, subclass it with an `__init__` whose arguments are the distribution's parameters
    by their names, and hand them on.

    Arguments:
        distribution: A class of Pyro distributions.
        parameters: A word on each of its parameters.

    Raises:
        ValueError: Where a word is on something that is not a parameter, or a count is not given.

    Example:
        >>> import pyro.distributions as dist
        >>> family = Family(dist.StudentT, df=4.0, scale=Shared())
        >>> features = torch.randn(5, 16)
        >>> y = family.build((3,), features)(features)
        >>> y.batch_shape, y.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    default: type[Predicted] | type[Shared] = Predicted
    _like: Tensor
    event_shape: torch.Size
    feature_shape: torch.Size | None = None

    def __init__(self, distribution: type[Distribution], /, **parameters: Word) -> None:
        super().__init__()
        self.distribution: Any = _checked_class(distribution)
        self.words = parameters
        _check_words(distribution, self.constraints, parameters)
        self.is_built = False

    @property
    def constraints(self) -> dict[str, Constraint]:
        """Where the values of each parameter must lie, as the distribution says."""
        found = getattr(self.distribution, "arg_constraints", {})
        return dict(found) if isinstance(found, Mapping) else {}

    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, by name."""
        own = {"distribution": self.distribution} if _takes_class(type(self)) else {}
        return own | self.words

    def build(
        self, event_shape: tuple[int, ...], features: Tensor | None = None, *, extra: Any = ()
    ) -> Self:
        """Makes the layers and parameters for an event shape.

        Arguments:
            event_shape: The shape of one draw, (*event).
            features: An example of the features, (rows, units) or (rows, channels, *sizes) with
                the event's trailing sizes; `None` where nothing is predicted.
            extra: Dims before the event, of a mixture's components, say.

        Raises:
            ValueError: Where a parameter's shape cannot be told, or the features' do not fit.
        """
        self.event_shape = torch.Size(event_shape)
        self.extra = torch.Size(extra)
        self.feature_shape = None if features is None else features.shape[1:]
        like = torch.empty(0, dtype=self._fixed_dtype()) if features is None else features
        self.register_buffer("_like", like.new_zeros(()), persistent=False)
        self.heads = nn.ModuleDict()
        self.shared = nn.ParameterDict()
        self.links: dict[str, Any] = {}
        self.shapes: dict[str, torch.Size] = {}
        for name, word in self._complete_words().items():
            self._build_parameter(name, word, features)
        self.is_built = True
        return self

    def _fixed_dtype(self) -> torch.dtype:
        """The widest of torch's default and the fixed tensors, which so keep their values."""
        dtype = torch.get_default_dtype()
        for word in self.words.values():
            if isinstance(word, Tensor) and word.is_floating_point():
                dtype = torch.promote_types(dtype, word.dtype)
        return dtype

    def _complete_words(self) -> dict[str, Word]:
        left_out = {
            other
            for group in ALTERNATIVES
            for other in _others(group, self.words, self.constraints)
        }
        names = [name for name in self.constraints if name not in left_out]
        unsaid: dict[str, Word] = {
            name: self.default() for name in names if name not in self.words
        }
        return unsaid | {k: v for k, v in self.words.items() if v is not None}

    def _build_parameter(self, name: str, word: Word, features: Tensor | None) -> None:
        if isinstance(word, Tensor):
            dtype = self._like.dtype if word.is_floating_point() else word.dtype
            fixed = word.detach().to(self._like.device, dtype, copy=True)
            self.register_buffer(f"fixed_{name}", fixed)
        if not isinstance(word, Predicted | Shared):
            return
        constraint = self.constraints.get(name, constraints.real)
        self.links[name] = link_of(constraint, word.link)
        self.shapes[name] = self._parameter_shape(name, word, constraint)
        shape = self._free_shape(name, word)
        if isinstance(word, Shared):
            free = _event_dim(constraint) > self._support_dim() and not _is_square(constraint)
            spread = 0.1 if free and not word.scalar else 0.0
            self.shared[name] = _shared(name, word, shape, self.links[name], self._like, spread)
        else:
            self.heads[name] = _Head(name, shape, self._event(), features)

    def _event(self) -> torch.Size:
        return self.extra + self.event_shape

    def _parameter_shape(self, name: str, word: Predicted | Shared, constraint: Any) -> torch.Size:
        event, n, m = self._event(), self._support_dim(), _event_dim(constraint)
        batch, own = event[: len(event) - n], event[len(event) - n :]
        if word.shape is not None:
            named = (word.shape,) if isinstance(word.shape, int) else tuple(word.shape)
            return (event if m > n else batch) + torch.Size(named)
        if m <= n:
            return batch + own[:m]
        if n > 0 and _is_square(constraint):
            return event + event[-1:]
        raise ValueError(
            f"Expected the size of {name} of {self.distribution.__name__} to be named, as in "
            f"{name}=Predicted(shape=...); got an event of shape {tuple(self.event_shape)} alone."
        )

    def _free_shape(self, name: str, word: Predicted | Shared) -> torch.Size:
        """The shape of the unconstrained values behind a parameter."""
        link = self.links[name]
        if not isinstance(word, Shared) or not word.scalar:
            return torch.Size(link.inverse_shape(self.shapes[name]))
        if link.domain.event_dim > 0:
            raise ValueError(f"Expected {name} to have elements of its own; got {word!r}.")
        return torch.Size()

    def _support_dim(self) -> int:
        try:
            dim = self.distribution.support.event_dim
        except (NotImplementedError, AttributeError):
            dim = 0
        if dim > len(self.event_shape):
            raise ValueError(
                f"Expected an event shape of at least {dim} dims for "
                f"{self.distribution.__name__}; got {tuple(self.event_shape)}."
            )
        return dim

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Maps features of shape (*rows, *feature_shape) to a distribution over (*rows)."""
        if not self.is_built:
            raise ValueError(f"Expected a family that was built; got the specification {self}.")
        rows = torch.Size() if features is None else _rows_of(features, self.feature_shape)
        base = scored(self.distribution)(**self._values(features))
        wanted = rows + self._event()[: len(self._event()) - len(base.event_shape)]
        if base.batch_shape != wanted:
            base = base.expand(wanted)
        return to_event(base, len(self.event_shape) - len(base.event_shape))

    def _values(self, features: Tensor | None) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, head in self.heads.items():
            values[name] = self.links[name](head(features).to(self._like.dtype))
        for name, parameter in self.shared.items():
            values[name] = self.links[name](parameter).expand(self.shapes[name])
        for name, word in self.words.items():
            if word is not None and name not in values:
                values[name] = self._fixed(name, word)
        return values

    def _fixed(self, name: str, word: Word) -> Any:
        if isinstance(word, Tensor):
            return getattr(self, f"fixed_{name}")
        if isinstance(word, float) or (isinstance(word, int) and name in self.constraints):
            return torch.full_like(self._like, float(word))
        return word

    def extra_repr(self) -> str:
        """The words, as they were written."""
        named = [self.distribution.__name__] if _takes_class(type(self)) else []
        return ", ".join(named + [f"{name}={short(word)}" for name, word in self.words.items()])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class _Head(nn.Module):
    """A linear layer from features to one parameter; pointwise over trailing sizes."""

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
                f"{', '.join(map(str, sizes))}): end the network with nn.Flatten()."
            )
        self.lead = event[: len(event) - len(sizes)]
        self.tail = shape[len(event) :] if sizes else torch.Size()
        if sizes and shape[: len(event)] != event:
            raise ValueError(
                f"Expected a parameter {name} that has the shape of the event to be predicted "
                f"pointwise; got shape {tuple(shape)}: end the network with nn.Flatten()."
            )
        outputs = math.prod(self.lead + self.tail) if sizes else math.prod(shape)
        self.linear = nn.Linear(units, outputs, dtype=features.dtype, device=features.device)

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


def _checked_class(distribution: Any) -> type[Distribution]:
    if not (inspect.isclass(distribution) and issubclass(distribution, Distribution)):
        raise ValueError(f"Expected a class of pyro.distributions; got {distribution!r}.")
    is_torchs = distribution.__module__.startswith("torch.")
    return getattr(dist, distribution.__name__, distribution) if is_torchs else distribution


def _signature(distribution: type[Distribution]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(distribution.__init__).parameters)
    return {k: v for k, v in parameters.items() if k not in ("self", "validate_args")}


def _check_words(
    distribution: type[Distribution], known: dict[str, Any], words: Mapping[str, Word]
) -> None:
    signature = _signature(distribution)
    for name, word in words.items():
        if name not in signature and name not in known:
            hint = perhaps(name, [*signature, *known])
            raise ValueError(
                f"Expected parameters of {distribution.__name__} out of {sorted(signature)}"
                f"{hint}; got {name!r}."
            )
        if not isinstance(word, Predicted | Shared | int | float | str | Tensor | None):
            raise ValueError(
                f"Expected {name} to be Predicted(), Shared(), a number or a tensor; got {word!r}."
            )
        if name in known and isinstance(word, int | float | Tensor):
            _check_fixed(name, word, known[name])
    for name, parameter in signature.items():
        if name not in words and _must_be_given(name, parameter, known):
            raise ValueError(
                f"Expected {name} of {distribution.__name__} to be given, as in "
                f"{name}=...; got nothing."
            )


def _check_fixed(name: str, word: float | Tensor, constraint: Any) -> None:
    value = torch.as_tensor(word)
    if constraints.is_dependent(constraint) or value.ndim < constraint.event_dim:
        return
    if not constraint.check(value).all():
        raise ValueError(f"Expected {name} to lie in {constraint}; got {short(word)}.")


def _check_named(shape: Any) -> None:
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    if shape is not None and not all(map(is_size, sizes)):
        raise ValueError(f"Expected a size, or a tuple of sizes; got shape={shape!r}.")


def _must_be_given(name: str, parameter: inspect.Parameter, known: dict[str, Any]) -> bool:
    if name in known and not constraints.is_dependent(known[name]):
        return bool(known[name].is_discrete)
    return parameter.default is inspect.Parameter.empty or name == "total_count"


def _others(
    group: tuple[str, ...], words: Mapping[str, Word], known: dict[str, Any]
) -> tuple[str, ...]:
    present = [name for name in group if name in known]
    said = [name for name in present if words.get(name) is not None]
    kept = said[0] if said else present[0] if present else None
    return tuple(name for name in present if name != kept)


def _event_dim(constraint: Any) -> int:
    try:
        return constraint.event_dim
    except NotImplementedError:
        return 0


def _is_square(constraint: Any) -> bool:
    square = (
        constraints.lower_cholesky,
        constraints.lower_triangular,
        constraints.positive_definite,
        constraints.corr_cholesky,
    )
    return constraint in square


def _shared(
    name: str, word: Shared, shape: torch.Size, link: Any, like: Tensor, spread: float
) -> nn.Parameter:
    if word.init is None:
        return nn.Parameter(spread * torch.randn(shape, dtype=like.dtype, device=like.device))
    init = torch.as_tensor(word.init, dtype=like.dtype, device=like.device)
    value_shape = torch.Size(link.forward_shape(shape))
    try:
        start = link.inv(init.expand(value_shape)).clone()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"Expected init of {name} to expand to shape {tuple(value_shape)}; got {word.init!r}."
        ) from error
    if not torch.isclose(link(start), init, rtol=1e-3, atol=1e-7).all():
        raise ValueError(f"Expected init of {name} inside its support; got {word.init!r}.")
    return nn.Parameter(start)


def _rows_of(features: Tensor, feature_shape: torch.Size | None) -> torch.Size:
    if feature_shape is None:
        return torch.Size()
    return features.shape[: features.ndim - len(feature_shape)]


def _takes_class(family: type[Family]) -> bool:
    return "distribution" in inspect.signature(family.__init__).parameters


def _call(name: str, **arguments: Any) -> str:
    said = ", ".join(f"{k}={short(v)}" for k, v in arguments.items() if v is not None)
    return f"{name}({said})"
