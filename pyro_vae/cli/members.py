"""Builds the priors, likelihoods, posteriors and ELBOs that the command line names."""

import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyro.distributions as dist
from torch.distributions import Distribution

from .. import elbos, likelihoods, posteriors, priors
from ..distributions import Likelihood, Posterior, Predicted, Prior, Shared
from . import specs

__all__ = ["member", "members"]

_ROOMS: dict[str, tuple[ModuleType, type, Callable[..., object] | None]] = {
    "prior": (priors, Prior, priors.Family),
    "likelihood": (likelihoods, Likelihood, likelihoods.Family),
    "posterior": (posteriors, Posterior, posteriors.Family),
    "ELBO": (elbos, elbos.Estimator, None),
}
_WORDS = {"Predicted": Predicted, "Shared": Shared}
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def member(text: str, what: str, **given: object) -> Any:
    """Builds a prior, likelihood, posterior or ELBO from its name.

    Arguments:
        text: The name of a member of the package, or of a Pyro distribution, with literal
            arguments, `"Mixture(10, 8)"`; or `"module:Object"`, which is imported.
        what: `"prior"`, `"likelihood"`, `"posterior"` or `"ELBO"`.
        given: Further arguments. One is used if the member has a parameter of that name and the
            text does not set it.

    Raises:
        ValueError: If there is no member of that name, or the arguments do not match it.

    Example:
        >>> member("StudentT(df=4.0, scale=Shared(scalar=True))", "likelihood")
        StudentT(df=4.0, loc=Predicted(), scale=Shared(scalar=True))
        >>> member("Gumbel", "likelihood")
        Family(Gumbel)
    """
    if _REFERENCE.fullmatch(text.strip()):
        return _imported(text.strip())
    room, kind, family = _ROOMS[what]
    classes = _public(room, kind)
    call = specs.parse(text, classes if family is None else _WORDS)
    if call.name in classes:
        return specs.build(classes[call.name], call, **given)
    distributions = {} if family is None else _public(dist, Distribution)
    if family is None or call.name not in distributions:
        hint = specs.near(call.name, classes, distributions)
        others = "" if family is None else ", or any other distribution of Pyro"
        hint += "" if hint.endswith("?") else others
        article = "an" if what == "ELBO" else "a"
        raise ValueError(f"Expected the name of {article} {what}; got {call.name!r}: {hint}")
    shape = (given["event_shape"],) if what == "prior" else ()

    def of_distribution(**parameters: object) -> object:
        return family(distributions[call.name], *shape, **parameters)

    return specs.build(of_distribution, call)


def members(text: str, what: str) -> dict[str, Any]:
    """Builds several members from a list that is separated by commas.

    Arguments:
        text: The list; each entry is written as for :func:`member`.
        what: What they are, as for :func:`member`.

    Returns:
        The members, by their text.

    Raises:
        ValueError: If an entry names no member, or stands in the list twice.

    Example:
        >>> list(members("Trace_ELBO, PIWAE(2, 3)", "ELBO"))
        ['Trace_ELBO', 'PIWAE(2, 3)']
    """
    entries, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0:
            entries.append("")
        else:
            entries[-1] += sign
    built: dict[str, Any] = {}
    for entry in map(str.strip, entries):
        if entry in built:
            raise ValueError(f"Expected each {what} once; got {entry} twice.")
        built[entry] = member(entry, what)
    return built


def _public(room: ModuleType, kind: type) -> dict[str, type]:
    """Returns the public concrete classes of a module that are subclasses of `kind`, by name."""
    return {
        name: value
        for name, value in vars(room).items()
        if inspect.isclass(value)
        and issubclass(value, kind)
        and not (name.startswith("_") or inspect.isabstract(value))
        and name != "Family"
    }


def _imported(text: str) -> object:
    sys.path.insert(0, os.getcwd())
    try:
        return pkgutil.resolve_name(text)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Expected module:Object that can be imported; got {text}: {error}."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
