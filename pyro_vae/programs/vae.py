"""The variational autoencoder: a Pyro model (decoder) and guide (encoder), built of members."""

import copy
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to
from torch.nn.parameter import UninitializedBuffer

from .. import priors
from ..data.checks import checked_shape, is_size
from ..data.read import read
from ..data.rows import PLATE, Rows, floating_like
from ..data.source import Row
from ..distributions.family import Family
from ..distributions.links import base_of
from ..engine.running import (
    evaluating,
    kept_modes,
    parameters_are_local,
    seeded,
    unmoved_statistics,
)
from ..likelihoods import Likelihood
from ..networks.mlp import MLP
from ..posteriors import Normal, Posterior
from ..priors.prior import check_prior_shape

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Creates a variational autoencoder from a prior, a likelihood and a posterior.

    .. math:: p(x, z) = p(z)\, p(x \mid \mathrm{decoder}(z)), \qquad q(z \mid \mathrm{encoder}(x))

    `model` and `guide` are Pyro programs with the sites `"z"` and `"x"` in the plate `"data"`.
    Every member is copied: it is a specification, and two VAEs built of it share no weight. The
    latent size is the prior's, those of the layers between networks and distributions follow.

    References:
        Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114.

    Arguments:
        event_shape: The shape of one row of x, an int or a tuple.
        prior: p(z): a Pyro distribution, a member of `pyro_vae.priors`, a module whose `forward()`
            returns a distribution, or an int, the size of a standard normal.
        likelihood: p(x | z): a member of `pyro_vae.likelihoods`, or a class of Pyro distributions.
        posterior: q(z | x): a member of `pyro_vae.posteriors`, or a class of Pyro distributions.
        encoder: A network from rows (rows, \*event_shape) to features.
        decoder: A network from latents (rows, \*latent_shape) to features.
        seed: The seed of the initial weights; with `None` torch's generator runs on.

    Raises:
        ValueError: Where the members do not fit each other; the message says which.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((64,), 8, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> vae.sample(3, seed=0).shape
        torch.Size([3, 64])
    """

    _like: Tensor
    prior: Any
    likelihood: Any
    posterior: Any
    encoder: nn.Module
    decoder: nn.Module

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        prior: int | Distribution | nn.Module,
        likelihood: Likelihood | type[Distribution],
        posterior: Posterior | type[Distribution] | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(checked_shape(event_shape))
        with seeded(seed):
            self.prior = _as_prior(prior)
            self.likelihood = _as_family(likelihood, Likelihood, "likelihood")
            self.posterior = _as_family(
                Normal() if posterior is None else posterior, Posterior, "posterior"
            )
            self.encoder = _as_network(MLP(256, 256) if encoder is None else encoder, "encoder")
            self.decoder = _as_network(MLP(256, 256) if decoder is None else decoder, "decoder")
            with torch.autocast(_like_of(self.encoder, self.decoder).device.type, enabled=False):
                self._build()

    def _build(self) -> None:
        told: Any
        for told in (self.encoder, self.decoder, self.prior):
            if hasattr(told, "set_event_shape"):
                told.set_event_shape(tuple(self.event_shape))
        like = _like_of(self.encoder, self.decoder)
        features = _dry(self.encoder, like.new_zeros((2, *self.event_shape)), "encoder")
        self._takes_encode = "encode" in inspect.signature(self.prior.forward).parameters
        self.latent_shape = self._build_posterior(features)
        decoded = _dry(self.decoder, like.new_zeros((2, *self.latent_shape)), "decoder")
        _build_member(self.likelihood, self.event_shape, decoded)
        self._feature_shapes = (features.shape[1:], decoded.shape[1:])
        self.to(features)
        self.register_buffer("_like", features.new_zeros(()), persistent=False)
        with evaluating(self), torch.random.fork_rng(devices=()):
            _refused(self._check_members)

    def _build_posterior(self, features: Tensor) -> torch.Size:
        self._is_carried = False
        if self._takes_encode:
            shape = torch.Size(self.prior.event_shape)
            _build_member(self.posterior, shape, features)
            return shape
        prior = _refused(self.prior)
        if not isinstance(prior, Distribution):
            raise ValueError(
                f"Expected the prior's forward() to return a distribution; got {prior!r}."
            )
        check_prior_shape(prior)
        support: Any = prior.support
        if not _is_real(support) and not support.is_discrete:
            trial = _build_member(copy.deepcopy(self.posterior), prior.event_shape, features)
            self._is_carried = _is_real(_refused(trial, features).support)
        shape = prior.event_shape
        if self._is_carried:
            shape = _refused(biject_to, support).inverse_shape(shape)
        _build_member(self.posterior, shape, features)
        return prior.event_shape

    def _check_members(self) -> None:
        x = self._like.expand(2, *self.event_shape)
        posterior, prior = self.encode(x), self._prior()
        _check_placed(posterior, "posterior")
        _check_placed(prior, "prior")
        if posterior.event_shape != self.latent_shape:
            raise ValueError(
                f"Expected a posterior of event shape {tuple(self.latent_shape)}, the prior's; "
                f"got {tuple(posterior.event_shape)}."
            )
        if posterior.support.is_discrete != prior.support.is_discrete:
            raise ValueError(
                "Expected a prior and a posterior that are both discrete or both continuous; got "
                f"{self.prior} and {self.posterior}."
            )
        many = posterior.expand((64, 2))
        z = many.sample()
        if not prior.support.check(z).all():
            raise ValueError(
                f"Expected a posterior on the support of the prior, {prior.support}; got draws "
                f"outside it from {self.posterior}."
            )
        _check_covered(prior.expand((64, 2)).sample(), many.support, self.posterior)
        if not (many.log_prob(z) + prior.log_prob(z)).isfinite().all():
            raise ValueError(
                "Expected a prior and a posterior that have a density at the posterior's draws; "
                f"got infinite ones from {self.prior} and {self.posterior}."
            )
        likelihood = self.decode(z[0])
        if likelihood.event_shape != self.event_shape:
            raise ValueError(
                f"Expected a likelihood of event shape {tuple(self.event_shape)}; got "
                f"{tuple(likelihood.event_shape)} from {self.likelihood}."
            )
        _check_placed(likelihood, "likelihood")

    def model(self, x: Row | None = None, *, size: int | None = None) -> Tensor:
        r"""Draws z from the prior and x from the likelihood, or observes x.

        Arguments:
            x: Rows (rows, \*event_shape) to observe.
            size: Without x, how many rows to draw.

        Raises:
            ValueError: Where neither of them is given.
        """
        x = None if x is None else _x_of(x)
        self._state(self.prior, self.likelihood, self.decoder)
        if self._takes_encode:
            self._state(self.posterior, self.encoder)
        with pyro.plate(PLATE, _size(x, size), dim=-1):
            z = pyro.sample("z", self._prior())
            return pyro.sample("x", self.decode(z), obs=None if x is None else self._cast(x))

    def guide(self, x: Row | None = None, *, size: int | None = None) -> Tensor:
        r"""Draws z from the posterior given x.

        Arguments:
            x: Rows (rows, \*event_shape).
            size: As in the model; without x, z is drawn from the prior.

        Raises:
            ValueError: Where neither of them is given.
        """
        x = None if x is None else _x_of(x)
        self._state(self.posterior, self.encoder)
        with pyro.plate(PLATE, _size(x, size), dim=-1):
            return pyro.sample("z", self._prior() if x is None else self.encode(x))

    def _state(self, *modules: nn.Module) -> None:
        """States the parameters as Pyro sites, for SVI to collect, and leaves them in place."""
        if parameters_are_local():
            return
        for module in modules:
            for name, parameter in module.named_parameters():
                _param_site(
                    parameter, name=f"{type(self).__name__}-{id(self)}.{id(module)}.{name}"
                )

    def _prior(self) -> Any:
        if not self._takes_encode:
            return self.prior()
        with unmoved_statistics(self.encoder, self.posterior):
            return self.prior(self.encode)

    def encode(self, x: Row) -> Any:
        r"""Returns q(z | x).

        Arguments:
            x: Rows (..., \*event_shape).
        """
        features = _folded(
            self.encoder, self._cast(_x_of(x)), self.event_shape, self._feature_shapes[0]
        )
        posterior = self.posterior(features)
        if self._is_carried:
            transform = biject_to(self._prior().support).with_cache()
            return dist.TransformedDistribution(posterior, [transform])
        return posterior

    def decode(self, z: Tensor) -> Any:
        r"""Returns p(x | z).

        Arguments:
            z: Latents (..., \*latent_shape).
        """
        z = z.to(self._like.dtype)
        features = _folded(self.decoder, z, self.latent_shape, self._feature_shapes[1])
        return self.likelihood(features)

    def check(self, x: Any) -> None:
        r"""Refuses data that the model cannot have produced.

        Arguments:
            x: Rows (rows, \*event_shape).

        Raises:
            ValueError: Where the shape is another, or a value is NaN, infinite or outside the
                likelihood's support.
        """
        rows = read(x, self, check=False)
        shape = _x_of(rows.head(len(rows))).shape
        if shape[1:] != self.event_shape:
            raise ValueError(
                f"Expected rows of event shape {tuple(self.event_shape)}; got data of shape "
                f"{tuple(shape)}."
            )
        if hasattr(self.likelihood, "check"):
            rows.ask(lambda piece: self.likelihood.check(self._cast(piece.field("x"))), self)

    def sample(self, size: int, *, seed: int | None = None) -> Tensor:
        r"""Draws new rows from the prior predictive p(x).

        Arguments:
            size: How many.
            seed: The seed of the draws.

        Raises:
            ValueError: Where the size is not a positive integer.

        Returns:
            Rows (size, \*event_shape).
        """
        with evaluating(self), seeded(seed):
            return self.model(size=size)

    def reconstruct(
        self, x: Any, *, num_samples: int = 200, prob: float = 0.9, seed: int | None = None
    ) -> xr.Dataset:
        r"""Predicts replicates of rows from their posterior.

        .. math:: p(x' \mid x) = \int p(x' \mid z)\, q(z \mid x)\, dz

        Arguments:
            x: Rows (rows, \*event_shape): a tensor, an array, a frame.
            num_samples: The number of draws of x' for each row.
            prob: The probability of the central interval.
            seed: The seed of the draws.

        Raises:
            ValueError: Where x is refused by :meth:`check`, or an argument is out of range.

        Returns:
            A data set over `datum` and the columns of x, in the units of x: the `mean` of x', the
            bounds `lower` and `upper` of the interval, and their Monte Carlo standard errors
            `mcse`, `lower_mcse`, `upper_mcse`. That of a bound is half the distance between the
            draws in order one binomial standard deviation, sqrt(S p (1 - p)) with p the
            probability outside on one side, below and above its rank; where the draws end
            before, it is scaled up from those that there are.
        """
        if not (isinstance(num_samples, int) and num_samples > 1 and 0.0 < prob < 1.0):
            raise ValueError(
                f"Expected num_samples > 1 and 0 < prob < 1; got {num_samples} and {prob}."
            )
        rows = read(x, self, check=False)
        self.check(rows)
        shapes = (self.event_shape, self.latent_shape, *self._feature_shapes)
        size = max(1, _MAX_ELEMENTS // (num_samples * max(s.numel() for s in shapes)))
        with evaluating(self), seeded(seed):
            parts = [
                self._replicates(chunk.to_like(self), num_samples, prob)
                for chunk in rows.chunks(size)
            ]
        arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return rows.labelled(arrays, _ATTRIBUTES, num_samples=num_samples, prob=prob)

    def _replicates(self, rows: Rows, num_samples: int, prob: float) -> dict[str, Tensor]:
        z = self.encode(rows.field("x")).expand((num_samples, len(rows))).sample()
        draws = self.decode(z).sample().double()
        moments = {"mean": draws.mean(0), "mcse": draws.std(0) / num_samples**0.5}
        return {name: v.cpu() for name, v in (moments | _central(draws, prob)).items()}

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._like.dtype)

    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, by name; members as they are now."""
        members = ("prior", "likelihood", "posterior", "encoder", "decoder")
        return {"event_shape": tuple(self.event_shape)} | {m: getattr(self, m) for m in members}

    def extra_repr(self) -> str:
        """The shapes of x and z."""
        return f"event_shape={tuple(self.event_shape)}, latent_shape={tuple(self.latent_shape)}"


_MAX_ELEMENTS = 2**24

_ATTRIBUTES = {
    name: {"long_name": said, "units": "those of x"}
    for name, said in {
        "mean": "mean of the replicates of x",
        "mcse": "Monte Carlo standard error of mean",
        "lower": "lower bound of the central interval of the replicates of x",
        "lower_mcse": "Monte Carlo standard error of lower (from order statistics)",
        "upper": "upper bound of the central interval of the replicates of x",
        "upper_mcse": "Monte Carlo standard error of upper (from order statistics)",
    }.items()
}


def _x_of(row: Row) -> Tensor:
    """Takes x out of a row, which must hold nothing else."""
    if not isinstance(row, dict):
        return row
    if "x" not in row:
        raise ValueError(f"Expected rows of x for a VAE; got fields {sorted(row)}.")
    if unused := sorted(row.keys() - {"x"}):
        raise ValueError(
            f"A VAE does not use {' and '.join(unused)} of a row yet: pass x alone, or write a "
            "program of your own, whose model(row) and guide(row) can use them."
        )
    return row["x"]


def _own(parameter: nn.Parameter) -> Tensor:
    value: Any = parameter.view_as(parameter)
    value.unconstrained = weakref.ref(parameter)
    return value


_param_site = effectful(_own, type="param")


def _size(x: Tensor | None, size: int | None) -> int:
    if x is not None:
        return len(x)
    if size is None or not is_size(size):
        raise ValueError(f"Expected rows x, or a positive size to draw; got size={size!r}.")
    return size


def _folded(
    network: nn.Module, value: Tensor, event_shape: torch.Size, feature_shape: torch.Size
) -> Tensor:
    rows = value.shape[: value.ndim - len(event_shape)]
    if len(rows) == 1:
        return network(value)
    return network(value.reshape(-1, *event_shape)).reshape(rows + feature_shape)


def _central(draws: Tensor, prob: float) -> dict[str, Tensor]:
    """The draws that bound the central interval, as many below as above, and their errors."""
    size, share = len(draws), (1.0 - prob) / 2.0
    outside = min(max(round(share * (size + 1)) - 1, 0), (size - 1) // 2)
    step = max(1, round(math.sqrt(size * share * (1.0 - share))))
    inner, outer = min(outside + step, size - 1), max(outside - step, 0)
    scale = step / (inner - outer)
    from_below = draws.sort(0).values
    from_above = from_below.flip(0)
    return {
        "lower": from_below[outside],
        "lower_mcse": (from_below[inner] - from_below[outer]) * scale,
        "upper": from_above[outside],
        "upper_mcse": (from_above[outer] - from_above[inner]) * scale,
    }


def _as_prior(prior: Any) -> nn.Module:
    if isinstance(prior, bool) or isinstance(prior, type):
        raise ValueError(
            f"Expected a prior with its shape, as in StandardNormal(8); got {prior!r}."
        )
    if isinstance(prior, int):
        return priors.StandardNormal(prior)
    if isinstance(prior, Distribution):
        return priors.from_distribution(prior)
    if isinstance(prior, nn.Module):
        return _copied(prior)
    raise ValueError(f"Expected a distribution, a prior or a latent size; got {prior!r}.")


def _as_family(member: Any, family: type[Family], what: str) -> nn.Module:
    if inspect.isclass(member) and issubclass(member, Distribution):
        return family(member)
    if isinstance(member, nn.Module):
        return _copied(member)
    raise ValueError(
        f"Expected the {what} to be a member of pyro_vae.{family.__module__.split('.')[1]} or a "
        f"class of Pyro distributions; got {member!r}."
    )


def _as_network(network: Any, what: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise ValueError(f"Expected the {what} to be an nn.Module; got {network!r}.")
    return _copied(network)


def _copied(module: nn.Module) -> nn.Module:
    """A deep copy; lazy buffers, which refuse to be copied, are made anew."""
    lazy = [buffer for buffer in module.buffers() if isinstance(buffer, UninitializedBuffer)]
    make: Any = UninitializedBuffer
    memo = {id(b): make(device=b.device, dtype=b.dtype) for b in lazy}
    return copy.deepcopy(module, memo)


def _build_member(member: Any, shape: torch.Size, features: Tensor) -> Any:
    if hasattr(member, "build"):
        member.build(tuple(shape), features)
    return member


def _refused(call: Callable[..., Any], *args: Any) -> Any:
    """Calls what the members are made of, whose errors say that they do not fit each other."""
    try:
        return call(*args)
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"Expected members that fit each other; got {type(error).__name__}: {error}"
        ) from error


def _check_placed(distribution: Any, what: str) -> None:
    if not isinstance(distribution, TorchDistributionMixin):
        raise ValueError(
            f"Expected a {what} that returns a Pyro distribution; got {distribution} of "
            f"{type(distribution).__module__}: take it from pyro.distributions."
        )
    try:
        draws = distribution.expand((3, 2)).sample()
        distribution.expand((3, 2)).log_prob(draws)
        shape = tuple(draws.shape)
    except Exception as error:
        raise ValueError(
            f"Expected a {what} that stands in a plate, with an expand() that works; got "
            f"{distribution}: {type(error).__name__}: {error}"
        ) from error
    if shape != (3, 2, *distribution.event_shape):
        raise ValueError(
            f"Expected a {what} that stands in a plate, with draws of shape "
            f"{(3, 2, *distribution.event_shape)}; got {shape} from {distribution}."
        )


def _like_of(*networks: nn.Module) -> Tensor:
    return floating_like(nn.ModuleList(networks))


def _dry(network: nn.Module, inputs: Tensor, what: str) -> Tensor:
    try:
        with kept_modes(network), torch.no_grad():
            network.eval()
            features = network(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"Expected the {what} to take rows of shape {tuple(inputs.shape)}; got {error}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(inputs):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"Expected the {what} to map {len(inputs)} rows to features ({len(inputs)}, ...); got "
            f"{shape}."
        )
    return features


def _check_covered(z: Tensor, support: Any, posterior: nn.Module) -> None:
    """Refuses a posterior that cannot reach where the prior is: importance weights miss it."""
    if support.check(z).double().mean() < 0.9:
        raise ValueError(
            f"Expected a posterior that covers the support of the prior; got one on {support} "
            f"alone, from {posterior}: take one on the real line, which is carried over to the "
            "prior's support."
        )


def _is_real(support: Any) -> bool:
    return isinstance(base_of(support), type(constraints.real))
