"""Building a VAE from members, which are copied, sized, connected and checked."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.nn.parameter import UninitializedBuffer

from .. import likelihoods, posteriors, priors
from ..data.checks import short
from ..data.rows import floating_like
from ..distributions import ConditionalDistribution, Likelihood, Posterior, Prior
from ..distributions.links import base_of
from ..distributions.own import OwnLikelihood, OwnPosterior, OwnPrior
from ..engine.running import kept_modes
from ..networks import Network
from ..posteriors.transported import Transported
from ..priors.from_distribution import check_prior_shape

__all__ = [
    "as_likelihood",
    "as_network",
    "as_posterior",
    "as_prior",
    "built_posterior",
    "check_latents",
    "check_likelihood",
    "features_of",
    "fitting",
    "like_of",
]

T = TypeVar("T")
Member = TypeVar("Member", bound=nn.Module)


def as_prior(prior: Any) -> Prior:
    """Returns the user's prior as a member, which is a copy.

    Arguments:
        prior: A member, a distribution, a module whose `forward()` returns a distribution, or the
            size of a standard normal.

    Raises:
        ValueError: If it is something else, or a member of another role.
    """
    match prior:
        case bool() | type():
            raise ValueError(
                f"Expected a prior with its shape, as in StandardNormal(8); got {short(prior)}."
            )
        case int():
            return priors.StandardNormal(prior)
        case Distribution():
            return priors.from_distribution(prior)
    return _in_role(prior, Prior, lambda module: fitting(OwnPrior, module))


def as_likelihood(likelihood: Any) -> Likelihood:
    """Returns the user's likelihood as a member, which is a copy.

    Arguments:
        likelihood: A member, a class of Pyro distributions, or a module whose `forward(features)`
            returns a distribution.

    Raises:
        ValueError: If it is something else, or a member of another role.
    """
    if isinstance(likelihood, type) and issubclass(likelihood, Distribution):
        return likelihoods.Family(likelihood)
    return _in_role(likelihood, Likelihood, OwnLikelihood)


def as_posterior(posterior: Any) -> Posterior:
    """Returns the user's posterior as a member, which is a copy.

    Arguments:
        posterior: As for :func:`as_likelihood`.

    Raises:
        ValueError: If it is something else, or a member of another role.
    """
    if isinstance(posterior, type) and issubclass(posterior, Distribution):
        return posteriors.Family(posterior)
    return _in_role(posterior, Posterior, OwnPosterior)


def _in_role(member: Any, role: Any, adapt: Callable[[nn.Module], Any]) -> Any:
    """A copy of a user's member, which `adapt` gives a role if it has none."""
    name: str = role.__name__.lower()
    match member:
        case role():
            return _copied(member)
        case ConditionalDistribution():
            raise ValueError(
                f"Expected a {name}, a pyro_vae.{role.__name__}; got {short(member)}, which has "
                "another role."
            )
        case nn.Module():
            return adapt(_copied(member))
    kinds = {
        "prior": "a distribution, a member of pyro_vae.priors or a latent size",
        "likelihood": "a member of pyro_vae.likelihoods or a class of Pyro distributions",
        "posterior": "a member of pyro_vae.posteriors or a class of Pyro distributions",
    }
    raise ValueError(f"Expected the {name} to be {kinds[name]}; got {short(member)}.")


def as_network(network: Any, role: str, x_shape: tuple[int, ...]) -> nn.Module:
    """Returns a copy of a network, and passes the shape of x to it.

    Arguments:
        network: A module.
        role: `"encoder"` or `"decoder"`, for the message.
        x_shape: The shape of one row of x.

    Raises:
        ValueError: If it is not a module.
    """
    match network:
        case Network():
            sized = _copied(network)
            sized.set_event_shape(x_shape)
            return sized
        case nn.Module():
            return _copied(network)
    raise ValueError(f"Expected the {role} to be an nn.Module; got {short(network)}.")


def _copied(module: Member) -> Member:
    """A deep copy; lazy buffers, which refuse to be copied, are created anew."""
    lazy = [buffer for buffer in module.buffers() if isinstance(buffer, UninitializedBuffer)]
    make: Any = UninitializedBuffer
    memo = {id(b): make(device=b.device, dtype=b.dtype) for b in lazy}
    return copy.deepcopy(module, memo)


def features_of(network: nn.Module, shape: tuple[int, ...], like: Tensor, role: str) -> Tensor:
    r"""Returns the features of two rows of zeros, from which sizes are inferred.

    Arguments:
        network: The network, which makes its lazy layers in this call.
        shape: The shape of one row of its input.
        like: A tensor of the dtype and device of the rows.
        role: `"encoder"` or `"decoder"`, for the message.

    Raises:
        ValueError: If the network fails on such rows, or does not return features of 2 rows.
    """
    inputs = like.new_zeros((2, *shape))
    try:
        with kept_modes(network), torch.no_grad():
            network.eval()
            features = network(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"Expected the {role} to take rows of shape {tuple(inputs.shape)}; got {error}."
        ) from error
    match features:
        case Tensor() if features.ndim >= 2 and len(features) == 2:
            return features
        case Tensor():
            got: object = tuple(features.shape)
        case _:
            got = type(features).__name__
    raise ValueError(f"Expected the {role} to map 2 rows to features (2, ...); got {got}.")


def built_posterior(posterior: Posterior, prior: Prior, features: Tensor) -> Posterior:
    """Builds a posterior over the latents of a prior.

    If the prior has another support, a posterior on the real line is transported to it.

    Arguments:
        posterior: The posterior, not built yet.
        prior: The prior.
        features: An example of the encoder's features.

    Raises:
        ValueError: If the two do not fit each other.
    """
    support = fitting(lambda: prior.support)
    if support is not None:
        check_prior_shape(prior())
    shape = tuple(prior.event_shape)
    if support is not None and not _is_real(support) and not support.is_discrete:
        trial = copy.deepcopy(posterior).build(shape, features)
        if _is_real(fitting(trial, features).support):
            posterior = Transported(posterior, prior.forward)
    return fitting(posterior.build, shape, features)


def check_latents(posterior: Any, prior: Any, members: str) -> Tensor:
    r"""Refuses a posterior and a prior that do not fit each other; returns latents of 2 rows.

    Arguments:
        posterior: q(z | x) of two rows.
        prior: p(z).
        members: The names of the two in messages.

    Raises:
        ValueError: If shapes or supports differ, or a density is infinite.
    """
    _check_placed(posterior, "posterior")
    _check_placed(prior, "prior")
    if posterior.event_shape != prior.event_shape:
        raise ValueError(
            f"Expected a posterior of event shape {tuple(prior.event_shape)}, the prior's; "
            f"got {tuple(posterior.event_shape)}."
        )
    if posterior.support.is_discrete != prior.support.is_discrete:
        raise ValueError(
            "Expected a prior and a posterior that are both discrete or both continuous; got "
            f"{members}."
        )
    many = posterior.expand((64, 2))
    z: Tensor = many.sample()
    if not prior.support.check(z).all():
        raise ValueError(
            f"Expected a posterior on the support of the prior, {prior.support}; some draws lie "
            f"outside it: {members}."
        )
    if many.support.check(prior.expand((64, 2)).sample()).double().mean() < 0.9:
        raise ValueError(
            f"The posterior lies on {many.support} and does not cover the support of the prior "
            f"({members}). Use a posterior on the real line, which is transported to the prior's "
            "support."
        )
    if not (many.log_prob(z) + prior.log_prob(z)).isfinite().all():
        raise ValueError(
            "Expected a prior and a posterior that have a density at the posterior's draws; "
            f"got infinite ones: {members}."
        )
    return z[0]


def check_likelihood(likelihood: Any, x_shape: torch.Size, member: Likelihood) -> None:
    r"""Refuses a likelihood of another shape, or one that does not work in a plate.

    Arguments:
        likelihood: p(x | z) of two rows.
        x_shape: The shape of one row of x.
        member: The member that it comes from, for the message.

    Raises:
        ValueError: If its event shape is not that of x, or it cannot be expanded.
    """
    if likelihood.event_shape != x_shape:
        raise ValueError(
            f"Expected a likelihood of event shape {tuple(x_shape)}; got "
            f"{tuple(likelihood.event_shape)} from {member}."
        )
    _check_placed(likelihood, "likelihood")


def fitting(call: Callable[..., T], *args: Any) -> T:
    """Calls a function, and raises its technical errors as a ValueError about the members.

    Arguments:
        call: The function.
        args: Its arguments.

    Raises:
        ValueError: If it raises an error of shapes, types or names.
    """
    try:
        return call(*args)
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"The members of the VAE do not fit each other: {type(error).__name__}: {error}"
        ) from error


def _check_placed(distribution: Any, role: str) -> None:
    if not isinstance(distribution, TorchDistributionMixin):
        raise ValueError(
            f"Expected a {role} that returns a Pyro distribution; got {distribution} of "
            f"{type(distribution).__module__}: take it from pyro.distributions."
        )
    try:
        draws = distribution.expand((3, 2)).sample()
        distribution.expand((3, 2)).log_prob(draws)
        shape = tuple(draws.shape)
    except Exception as error:
        raise ValueError(
            f"Expected a {role} that works in a plate, which needs expand() and log_prob(); got "
            f"{distribution}: {type(error).__name__}: {error}"
        ) from error
    if shape != (3, 2, *distribution.event_shape):
        raise ValueError(
            f"Expected a {role} that works in a plate, with draws of shape "
            f"{(3, 2, *distribution.event_shape)}; got {shape} from {distribution}."
        )


def _is_real(support: Constraint) -> bool:
    return isinstance(base_of(support), type(constraints.real))


def like_of(*networks: nn.Module) -> Tensor:
    """Returns an empty tensor of the dtype and device of networks.

    Arguments:
        networks: The networks.
    """
    return floating_like(nn.ModuleList(networks))
