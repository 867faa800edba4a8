"""Members by their names on the command line."""

import importlib
import inspect
import os
import re
import sys
from types import ModuleType
from typing import Any

import pyro.distributions as dist
from torch.distributions import Distribution

from .. import elbos, likelihoods, posteriors, priors
from ..distributions import Likelihood, Posterior, Predicted, Prior, Shared
from . import specs

__all__ = ["member", "members"]

_ROOMS: dict[str, tuple[ModuleType, type, Any]] = {
    "prior": (priors, Prior, priors.Family),
    "likelihood": (likelihoods, Likelihood, likelihoods.Family),
    "posterior": (posteriors, Posterior, posteriors.Family),
    "ELBO": (elbos, elbos.Estimator, None),
}
_WORDS = {"Predicted": Predicted, "Shared": Shared}
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def member(text: str, what: str, **given: Any) -> Any:
    """Makes the prior, likelihood, posterior or ELBO that a text names.

    Arguments:
        text: The name of a member of the package, or of a Pyro distribution, with literal
            arguments, `"Mixture(10, 8)"`; or `"module:Object"`, which is imported.
        what: `"prior"`, `"likelihood"`, `"posterior"` or `"ELBO"`.
        given: Arguments for a member that takes them, unless the text contains them.

    Raises:
        ValueError: If nothing has that name, or the arguments do not fit.

    Example:
        >>> member("StudentT(df=4.0, scale=Shared(scalar=True))", "likelihood")
        StudentT(df=4.0, loc=Predicted(), scale=Shared(scalar=True))
        >>> member("Gumbel", "likelihood")
        Family(Gumbel)
    """
    if _REFERENCE.fullmatch(text.strip()):
        return _imported(text.strip())
    room, kind, family = _ROOMS[what]
    members, distributions = _public(room, kind), {} if family is None else _public(dist, None)
    call = specs.parse(text, _WORDS if family is not None else members)
    if call.name in members:
        return specs.build(members[call.name], call, **given)
    if call.name not in distributions:
        hint = specs.near(call.name, [*members, *distributions])
        raise ValueError(f"Expected the name of a {what}; got {call.name!r}: {hint}")
    shape = (given["event_shape"],) if what == "prior" else ()

    def of_distribution(**parameters: Any) -> Any:
        return family(distributions[call.name], *shape, **parameters)

    return specs.build(of_distribution, call)


def members(text: str, what: str) -> dict[str, Any]:
    """Makes the members that a text names, with commas between them, by what it says of each.

    Arguments:
        text: Their names, as :func:`member` takes them.
        what: What they are.

    Raises:
        ValueError: If one does not exist, or is named twice.

    Example:
        >>> list(members("Trace_ELBO, PIWAE(2, 3)", "ELBO"))
        ['Trace_ELBO', 'PIWAE(2, 3)']
    """
    found: dict[str, Any] = {}
    for part in _apart(text):
        if part in found:
            raise ValueError(f"Expected each {what} once; got {part} twice.")
        found[part] = member(part, what)
    return found


def _apart(text: str) -> list[str]:
    """Cuts at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _public(room: ModuleType, kind: type | None) -> dict[str, type]:
    """The classes of a room that can be built from literals, by name."""
    return {
        name: value
        for name, value in vars(room).items()
        if inspect.isclass(value)
        and issubclass(value, kind or Distribution)
        and not (name.startswith("_") or inspect.isabstract(value))
        and name != "Family"
    }


def _imported(text: str) -> Any:
    name, _, path = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Expected module:Object that can be imported; got {text}: {error}."
        ) from (error)
    finally:
        sys.path.remove(os.getcwd())
    return found
