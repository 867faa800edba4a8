"""The variational autoencoder: a Pyro model (decoder) and guide (encoder)."""

import weakref
from typing import Any

import pyro
import torch
import xarray as xr
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution

from ..data.checks import checked_shape, is_size
from ..data.read import read
from ..data.rows import PLATE
from ..data.source import Row
from ..distributions import Likelihood, Posterior, Prior
from ..engine.running import evaluating, parameters_are_local, seeded, unmoved_statistics
from ..networks import MLP
from ..posteriors import Normal
from ..prediction.reconstruct import reconstruct
from ..prediction.sample import sample_sites
from .building import (
    as_likelihood,
    as_network,
    as_posterior,
    as_prior,
    built_posterior,
    check_latents,
    check_likelihood,
    features_of,
    fitting,
    like_of,
)

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Creates a variational autoencoder from a prior, a likelihood and a posterior.

    .. math:: p(x, z) = p(z)\, p(x \mid \mathrm{decoder}(z)), \qquad q(z \mid \mathrm{encoder}(x))

    `model` and `guide` are Pyro programs with the sites `"z"` and `"x"` in the plate `"data"`.
    The VAE copies its members (the prior, likelihood, posterior and networks), so two VAEs that
    are made of the same members share no weights. The prior determines the latent size. The sizes
    of the layers between networks and distributions are inferred.

    References:
        Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114.

    Arguments:
        data: The shape of one row of x, an int or a tuple.
        prior: p(z): a Pyro distribution, a member of `pyro_vae.priors`, a module whose `forward()`
            returns a distribution, or an int, the size of a standard normal.
        likelihood: p(x | z): a member of `pyro_vae.likelihoods`, a class of Pyro distributions, or
            a module whose `forward(features)` returns a distribution.
        posterior: q(z | x): a member of `pyro_vae.posteriors`, a class of Pyro distributions, or
            a module as for the likelihood; `Normal()` by default.
        encoder: A network from rows (rows, \*event_shape) to features; `MLP(256, 256)` by default.
        decoder: A network from latents (rows, \*latent_shape) to features; `MLP(256, 256)` by
            default.
        context: Covariates are not supported yet: only `None` is accepted.
        seed: The seed of the initial weights; if `None`, torch's global generator is used.

    Raises:
        ValueError: If an argument cannot take its role, or the shapes or supports of the members
            do not fit each other.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 8, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> vae.sample(3, seed=0).shape
        torch.Size([3, 64])
    """

    _like: Tensor
    prior: Prior
    likelihood: Likelihood
    posterior: Posterior
    encoder: nn.Module
    decoder: nn.Module

    def __init__(
        self,
        data: int | tuple[int, ...],
        prior: int | Distribution | nn.Module,
        likelihood: nn.Module | type[Distribution] | None = None,
        posterior: nn.Module | type[Distribution] | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        *,
        context: None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(checked_shape(data))
        if likelihood is None:
            raise ValueError(
                "Expected a likelihood, as in pyro_vae.likelihoods.Normal(); got None."
            )
        if context is not None:
            raise ValueError(
                "A VAE does not take covariates yet. Write a program with model(row) and "
                "guide(row) that reads row['context'], and pass context= to the functions."
            )
        with seeded(seed):
            self.prior = as_prior(prior)
            self.likelihood = as_likelihood(likelihood)
            self.posterior = as_posterior(Normal() if posterior is None else posterior)
            x_shape = tuple(self.event_shape)
            self.encoder = as_network(
                MLP(256, 256) if encoder is None else encoder, "encoder", x_shape
            )
            self.decoder = as_network(
                MLP(256, 256) if decoder is None else decoder, "decoder", x_shape
            )
            with torch.autocast(like_of(self.encoder, self.decoder).device.type, enabled=False):
                self._build()

    def _build(self) -> None:
        like = like_of(self.encoder, self.decoder)
        self.prior.connect(tuple(self.event_shape), self._encode_pseudo_inputs)
        features = features_of(self.encoder, self.event_shape, like, "encoder")
        self.posterior = built_posterior(self.posterior, self.prior, features)
        self.latent_shape = torch.Size(self.prior.event_shape)
        decoded = features_of(self.decoder, self.latent_shape, like, "decoder")
        self.likelihood.build(tuple(self.event_shape), decoded)
        self._feature_shapes = (features.shape[1:], decoded.shape[1:])
        self.to(features)
        self.register_buffer("_like", features.new_zeros(()), persistent=False)
        with evaluating(self), torch.random.fork_rng(devices=()):
            fitting(self._check_members)

    def _check_members(self) -> None:
        posterior = self.encode(self._like.expand(2, *self.event_shape))
        members = f"{self.prior.specification} and {self.posterior.specification}"
        z = check_latents(posterior, self.prior(), members)
        check_likelihood(self.decode(z), self.event_shape, self.likelihood)

    def model(self, x: Row | None = None, *, size: int | None = None) -> Tensor:
        r"""Draws z from the prior and x from the likelihood, or observes x.

        Arguments:
            x: Rows (rows, \*event_shape) to observe; `None` to draw them.
            size: The number of rows to draw if x is `None`.

        Raises:
            ValueError: If x is `None` and `size` is not a positive integer, or if a row has other
                fields than x.

        Returns:
            The values of x, shape (rows, \*event_shape).
        """
        x = None if x is None else _x_of(x)
        self._state(self.prior, self.likelihood, self.decoder, self.posterior, self.encoder)
        with pyro.plate(PLATE, _size(x, size), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=None if x is None else self._cast(x))

    def guide(self, x: Row | None = None, *, size: int | None = None) -> Tensor:
        r"""Draws z from the posterior given x.

        Arguments:
            x: Rows (rows, \*event_shape); `None` to draw z from the prior.
            size: The number of rows to draw if x is `None`.

        Raises:
            ValueError: If x is `None` and `size` is not a positive integer, or if a row has other
                fields than x.

        Returns:
            The values of z, shape (rows, \*latent_shape).
        """
        x = None if x is None else _x_of(x)
        self._state(self.posterior, self.encoder)
        with pyro.plate(PLATE, _size(x, size), dim=-1):
            return pyro.sample("z", self.prior() if x is None else self.encode(x))

    def _state(self, *modules: nn.Module) -> None:
        """Makes each parameter a Pyro site, so that `pyro.infer.SVI` trains it in place."""
        if parameters_are_local():
            return
        for module in modules:
            for name, parameter in module.named_parameters():
                _param_site(
                    parameter, name=f"{type(self).__name__}-{id(self)}.{id(module)}.{name}"
                )

    def _encode_pseudo_inputs(self, x: Tensor) -> Distribution:
        """Returns q(z | x) without updating the running statistics of normalisation layers."""
        with unmoved_statistics(self.encoder, self.posterior):
            return self.encode(x)

    def encode(self, x: Row) -> Any:
        r"""Returns q(z | x), of batch shape (...) and event shape (\*latent_shape).

        Arguments:
            x: Rows (..., \*event_shape).
        """
        x = self._cast(_x_of(x))
        features = _folded(self.encoder, x, self.event_shape, self._feature_shapes[0])
        return self.posterior(features)

    def decode(self, z: Tensor) -> Any:
        r"""Returns p(x | z), of batch shape (...) and event shape (\*event_shape).

        Arguments:
            z: Latents (..., \*latent_shape).
        """
        z = z.to(self._like.dtype)
        features = _folded(self.decoder, z, self.latent_shape, self._feature_shapes[1])
        return self.likelihood(features)

    def check(self, x: Any) -> None:
        r"""Refuses data that the model cannot produce.

        Arguments:
            x: Rows (rows, \*event_shape).

        Raises:
            ValueError: If the rows have another shape than `event_shape`, or a value is NaN,
                infinite or outside the likelihood's support.
        """
        rows = read(x, self, check=False)
        shape = _x_of(rows.head(len(rows))).shape
        if shape[1:] != self.event_shape:
            raise ValueError(
                f"Expected rows of event shape {tuple(self.event_shape)}; got data of shape "
                f"{tuple(shape)}."
            )
        rows.ask(lambda piece: self.likelihood.check(self._cast(piece.field("x"))), self)

    def sample(self, num_rows: int, *, seed: int | None = None) -> Tensor:
        r"""Draws new rows from the prior predictive p(x), (num_rows, \*event_shape).

        Arguments:
            num_rows: The number of rows.
            seed: The seed of the draws; if `None`, torch's global generator is used.

        Raises:
            ValueError: If `num_rows` is not a positive integer.
        """
        return sample_sites(self, num_rows, x=None, seed=seed)["x"]

    def reconstruct(self, x: Any, **options: Any) -> xr.Dataset:
        """Predicts replicates of rows from their posterior, as :func:`pyro_vae.reconstruct` does.

        Arguments:
            x: Rows: a tensor, an array or a data frame.
            options: Keyword arguments of :func:`pyro_vae.reconstruct`.

        Returns:
            The dataset that :func:`pyro_vae.reconstruct` returns.
        """
        return reconstruct(self, x, **options)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._like.dtype)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the constructor, with the members in their present state."""
        members = {
            "likelihood": self.likelihood.specification,
            "posterior": self.posterior.specification,
            "encoder": self.encoder,
            "decoder": self.decoder,
        }
        return (tuple(self.event_shape), self.prior.specification), members

    def extra_repr(self) -> str:
        """The shapes of x and z."""
        return f"event_shape={tuple(self.event_shape)}, latent_shape={tuple(self.latent_shape)}"


def _x_of(row: Row) -> Tensor:
    """Returns the field x of a row, which must have no other fields."""
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
