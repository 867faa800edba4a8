"""The variational autoencoder: a Pyro model (decoder) and guide (encoder)."""

import weakref
from typing import Any

import pyro
import torch
import xarray as xr
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution

from ..data.checks import checked_shape, is_size, warn_user
from ..data.degenerate import degenerate_columns, warn_of
from ..data.read import read
from ..data.rows import PLATE, Rows
from ..data.source import Row
from ..distributions import Likelihood, Posterior, Prior
from ..distributions.links import base_of
from ..distributions.units import Units, factor_loadings, input_form
from ..engine.running import evaluating, parameters_are_local, public, seeded, unmoved_statistics
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

WIDE = 200  # elements of x, above which the default networks are wider
DEFAULT_UNITS = ((64, 64), (256, 256))
LEARNED_FROM = 2**24  # elements of x, from which units and starts are learned
MOST_COLUMNS = 500  # of factor analysis
DRAWS = 4096  # of the prior, to which the posterior is fitted at the start


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
        encoder: A network from rows (rows, \*event_shape) to features; by default `MLP(64, 64)`,
            or `MLP(256, 256)` if x has more than 200 elements.
        decoder: A network from latents (rows, \*latent_shape) to features, with the same default.
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

    standardizes = True
    _like: Tensor
    units: Units
    prior: Prior
    likelihood: Likelihood
    posterior: Posterior
    encoder: nn.Module
    decoder: nn.Module

    @public
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
            hidden = DEFAULT_UNITS[self.event_shape.numel() > WIDE]
            self.encoder = as_network(
                MLP(*hidden) if encoder is None else encoder, "encoder", x_shape
            )
            self.decoder = as_network(
                MLP(*hidden) if decoder is None else decoder, "decoder", x_shape
            )
            self.units = Units(x_shape)
            self.is_initialized = self.has_warned = False
            self.degenerate: dict[str, list[int]] = {}
            self.verdict: tuple[bool | None, str] | None = None
            self.fitted_columns: dict[str, list[list[str] | None]] = {}
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

        Warns:
            UserWarning: If the VAE observes rows and was never initialised, the first time.

        Returns:
            The values of x, shape (rows, \*event_shape).
        """
        x = None if x is None else _x_of(x, self.event_shape)
        if not (x is None or self.is_initialized or self.has_warned or parameters_are_local()):
            self.has_warned = True
            warn_user(
                "This VAE was never initialised: its weights are random, and it takes x in units "
                "of its own. Call vae.initialize(x) once before training, as pyro_vae.fit does."
            )
        self._state(self.prior, self.likelihood, self.decoder, self.posterior, self.encoder)
        with pyro.plate(PLATE, _size(x, size), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=None if x is None else self._observed(x))

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
        x = None if x is None else _x_of(x, self.event_shape)
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

    @public
    def initialize(self, x: Any, *, standardize: bool = True) -> "VAE":
        r"""Learns the units of the columns of x, and moves the weights to a good start.

        The density of real columns is standardised by their means and standard deviations, that
        of positive columns by their geometric means: p(x | z) stays a density over x in the units
        of the data. The encoder sees standardised values: of x itself, of log x if x is positive,
        of log1p x if x is a count. The start is the maximum likelihood of each column without
        latents, and the prior as the posterior. :func:`pyro_vae.fit` calls this on its training
        rows, unless it was called before. Units are learned from all rows if they have at most
        16 million values, else from rows at even distances.

        Arguments:
            x: Rows (rows, \*event_shape): a tensor, an array or a data frame.
            standardize: Whether to learn units. If not, the density and the encoder see x.

        Raises:
            ValueError: If the rows are refused by :meth:`check`, or if under a density every
                column is constant, or values are too large for a variance.

        Warns:
            DegenerateColumnsWarning: If columns under a density are constant, duplicated, exactly
                collinear, or of one value in more than a tenth of the rows.

        Returns:
            The VAE itself.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.VAE(2, 1, pv.likelihoods.Normal(), seed=0)
            >>> table = torch.tensor([[2001.0, 1e-3], [2003.0, 3e-3]], dtype=torch.float64)
            >>> vae.initialize(table).units.loc.tolist()
            [2002.0, 0.002]
        """
        rows = read(x, self)
        every = -(-len(rows) * self.event_shape.numel() // LEARNED_FROM)
        values = _x_of(rows.select(slice(None, None, every))).to(self._like.device)
        values = values.to(torch.promote_types(values.dtype, self._like.dtype))
        self.degenerate = {}
        if self.likelihood.units(values[:1].double()) is not None:
            flat = values.double().flatten(1)
            if len(huge := (~flat.square().sum(0).isfinite()).nonzero()):
                raise ValueError(
                    f"The values of column {rows.listed(huge.flatten().tolist())} are too large "
                    "for a variance in float64: divide them by a power of 10 first."
                )
            self.degenerate = degenerate_columns(flat)
            warn_of(self.degenerate, rows)
        modules = (self.likelihood, self.posterior, self.encoder, self.decoder)
        with evaluating(nn.ModuleList(modules)), torch.no_grad():
            self._learn(values.double(), standardize=standardize)
        self.is_initialized = True
        self.fitted_columns = rows.names()
        return self

    def _learn(self, x: Tensor, *, standardize: bool) -> None:
        found = self.likelihood.units(x) if standardize else None
        form = None
        if standardize and self.event_shape:
            form = input_form(base_of(self.likelihood.example().support), x)
        units, learned = self.units, x if found is None else (x - found[0]) / found[1]
        units.loc, units.scale = (None, None) if found is None else found
        units.least = self.likelihood.least_scale(learned)
        units.form = None
        units.learn_inputs(learned, form)
        self.follow_units()
        self.likelihood.initialize(learned, found)
        units.constants = self.likelihood.constants()
        columns, size = self.event_shape.numel(), self.latent_shape.numel()
        is_real = units.loc is not None and form == "x"
        if is_real and size < columns <= MOST_COLUMNS and len(self.event_shape) == 1:
            units.loadings, units.noise = factor_loadings(learned, size)
        with seeded(0):
            if self.prior.support is None:
                draws = torch.randn((DRAWS, *self.latent_shape), device=x.device)
            else:
                draws = self.prior().expand((DRAWS,)).sample()
            self.posterior.initialize(draws.double())

    @torch.no_grad()
    def baselines(self, x: Any) -> xr.Dataset:
        r"""Scores rows by models without a network, fitted to the rows that `initialize` saw.

        `independent_columns` is the likelihood without latents, each column at its maximum
        likelihood; `factor_analysis`, for real columns, has as many latents as the VAE. A VAE
        whose log p(x) is below either of them describes the rows worse than the simpler model.

        Arguments:
            x: Rows (rows, \*event_shape).

        Raises:
            ValueError: If the VAE is not initialised, or refuses the rows.

        Returns:
            log p(x) of each row under each model, in nats, over the dim `datum`.

        Example:
            >>> import pyro_vae as pv
            >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
            >>> vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0).initialize(x)
            >>> list(vae.baselines(x))
            ['independent_columns', 'factor_analysis']
        """
        if not self.is_initialized:
            raise ValueError("The VAE has no baselines yet: fit it, or call initialize(x) first.")
        rows = read(x, self)
        seen = self._observed(_x_of(rows.select(slice(None), self)))
        laws = {
            "independent_columns": self.units.independent_columns(
                self.likelihood, self._like.dtype
            ),
            "factor_analysis": self.units.factor_analysis(),
        }
        about = {"units": "nats"}
        scores = {
            name: ("datum", law.log_prob(seen).double().cpu().numpy(), about)
            for name, law in laws.items()
            if law is not None
        }
        return xr.Dataset(scores, {"datum": rows.labels})

    @torch.no_grad()
    def columns_at_bound(self) -> list[int]:
        """Returns the numbers of the columns whose learned scale is at its lower bound.

        The bound is the resolution of the data. A density that reaches it describes the rounding
        of these columns, and their log p(x) depends on the bound.
        """
        least, now = self.units.least, self.likelihood.constants()
        if least is None or "scale" not in now:
            return []
        close = now["scale"].double() < 1.05 * least
        return close.expand(self.event_shape).flatten().nonzero().flatten().tolist()

    def advice(self) -> str:
        """Returns what to do first if the model is worse than a simple one, after a fit."""
        if self.verdict is None:
            return "it was not trained by fit, or was loaded from a file; look at its training"
        converged, reason = self.verdict
        if converged is not True:
            return f"its fit has not converged ({reason}); train it for longer first"
        if "overfit" in reason:
            return f"its fit ended as {reason}; use more rows, a smaller network or weight_prior"
        return f"its fit has converged ({reason}); use another likelihood, or more latents"

    def follow_units(self) -> None:
        """Passes the units to the likelihood, after they were learned or read from a file."""
        self.likelihood.set_units(self.units.density_units, self.units.least)

    def _encode_pseudo_inputs(self, x: Tensor) -> Distribution:
        """Returns q(z | x) without updating the running statistics of normalisation layers.

        Pseudo-inputs are in standardised units.
        """
        with unmoved_statistics(self.encoder, self.posterior):
            return self._posterior_of(x)

    def encode(self, x: Row) -> Any:
        r"""Returns q(z | x), of batch shape (...) and event shape (\*latent_shape).

        Arguments:
            x: Rows (..., \*event_shape).
        """
        return self._posterior_of(self.units.inputs(_x_of(x)))

    def _posterior_of(self, inputs: Tensor) -> Any:
        seen = self._cast(inputs)
        features = _folded(self.encoder, seen, self.event_shape, self._feature_shapes[0])
        return self.posterior(features)

    def decode(self, z: Tensor) -> Any:
        r"""Returns p(x | z), of batch shape (...) and event shape (\*event_shape).

        Arguments:
            z: Latents (..., \*latent_shape).
        """
        z = z.to(self._like.dtype)
        features = _folded(self.decoder, z, self.latent_shape, self._feature_shapes[1])
        return self.units.density(self.likelihood(features), self._like.dtype)

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
            advice = ""
            if (shape[-1], *shape[1:-1]) == self.event_shape:
                advice = (
                    " The channels come first: move the last dim with torch.movedim(x, -1, 1)."
                )
            elif shape[1:].numel() == self.event_shape.numel():
                advice = f" Reshape the data to (rows, {', '.join(map(str, self.event_shape))})."
            raise ValueError(
                f"Expected rows of event shape {tuple(self.event_shape)}; got data of shape "
                f"{tuple(shape)}.{advice}"
            )

        def check_piece(piece: Rows) -> None:
            x = piece.field("x")
            has_units = self.likelihood.units(x[:1].double()) is not None
            self.likelihood.check(x if has_units else self._cast(x))

        rows.ask(check_piece, self)

    @public
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

    def _observed(self, x: Tensor) -> Tensor:
        """Rows as the density takes them: with all their digits if it standardises them."""
        return self._cast(x) if self.units.loc is None else x

    def network_weights(self) -> list[nn.Parameter]:
        """Returns the weights that have a prior in a fit.

        They are the matrices of the networks and of the layers behind them. Biases and `Shared`
        parameters are left out, and so is a layer behind an `nn.Identity`: it is the loading
        matrix of a linear model.
        """
        pairs = ((self.encoder, self.posterior), (self.decoder, self.likelihood))
        modules = [m for pair in pairs if not isinstance(pair[0], nn.Identity) for m in pair]
        named = [pair for module in modules for pair in module.named_parameters()]
        return [p for name, p in named if name.endswith("weight") and p.ndim > 1]

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
        shapes = f"event_shape={tuple(self.event_shape)}, latent_shape={tuple(self.latent_shape)}"
        density = "" if self.units.loc is None else ", columns in standardized units"
        seen = "" if self.units.form is None else f", encoder sees standardized {self.units.form}"
        return shapes + density + seen


def _x_of(row: Row, event_shape: torch.Size | None = None) -> Tensor:
    """Returns the field x of rows, which must have no other fields; one row becomes a batch."""
    if not isinstance(row, dict):
        return row[None] if row.shape == event_shape else row
    if "x" not in row:
        raise ValueError(f"Expected rows of x for a VAE; got fields {sorted(row)}.")
    if unused := sorted(row.keys() - {"x"}):
        raise ValueError(
            f"A VAE does not use {' and '.join(unused)} of a row yet: pass x alone, or write a "
            "program of your own, whose model(row) and guide(row) can use them."
        )
    return _x_of(row["x"], event_shape)


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
