"""Members written as text, `Mixture(10, 8)`: read as literals, never evaluated."""

import ast
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..data.checks import closest

__all__ = ["Call", "build", "near", "parse"]

MAX_LENGTH = 1000

_SIGNS: dict[type, int] = {ast.UAdd: 1, ast.USub: -1}

Words = Mapping[str, Callable[..., Any]]


class Call(NamedTuple):
    """A name and its arguments.

    Arguments:
        name: The name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parse(text: str, words: Words | None = None) -> Call:
    """Reads a name, alone or with literal arguments.

    Literals are numbers, strings, booleans, `None`, tuples and lists of them, and the words,
    whose own arguments are literals. The text is parsed, and nothing of it is evaluated.

    Arguments:
        text: The text.
        words: What may stand as an argument under its name, with arguments of its own.

    Raises:
        ValueError: If the text is something else.

    Example:
        >>> parse("Mixture(10, 8)")
        Call(name='Mixture', args=(10, 8), kwargs={})
        >>> parse("StudentT(df=-4.0, link='log')").kwargs
        {'df': -4.0, 'link': 'log'}
    """
    node = _expression(text)
    if isinstance(node, ast.Name):
        return Call(node.id, (), {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"Expected a name, alone or with arguments in brackets; got {text!r}.")
    return Call(node.func.id, *_arguments(node, words or {}))


def build(target: Callable[..., Any], call: Call, **given: Any) -> Any:
    """Calls what a name stands for.

    Arguments:
        target: What is called.
        call: The arguments, as they were written.
        given: Further arguments, used if the target takes them and the text has none.

    Raises:
        ValueError: If they do not fit its signature.

    Example:
        >>> build(dict.fromkeys, Call("fromkeys", ("ab",), {}), iterable="cd", size=3)
        {'a': None, 'b': None}
    """
    signature = inspect.signature(target)
    _check_keywords(signature, call)
    try:
        said = signature.bind_partial(*call.args, **call.kwargs).arguments
        unsaid = {k: v for k, v in given.items() if k in signature.parameters and k not in said}
        arguments = signature.bind(*call.args, **call.kwargs, **unsaid)
    except TypeError as error:
        raise ValueError(f"Expected {call.name}{_plain(signature)}; got {error}.") from error
    return target(*arguments.args, **arguments.kwargs)


def near(name: str, names: Iterable[str]) -> str:
    """Says which names a wrong one is near to, or what there is.

    Arguments:
        name: The wrong name.
        names: The right ones.

    Example:
        >>> near("binomail", ["Binomial", "Normal"])
        "did you mean 'Binomial' or 'Normal'?"
    """
    known = set(names)
    if found := closest(name, sorted(known)):
        return f"did you mean {' or '.join(map(repr, found))}?"
    return f"there are {', '.join(sorted(known))}"


def _check_keywords(signature: inspect.Signature, call: Call) -> None:
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, kind in kinds.items() if kind in by_name]
    for name in call.kwargs:
        if name not in known:
            raise ValueError(
                f"Expected an argument of {call.name}{_plain(signature)}; got {name!r}: "
                f"{near(name, known)}"
            )


def _shown(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "brackets in brackets"


def _plain(signature: inspect.Signature) -> str:
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _expression(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"Expected at most {MAX_LENGTH} characters; got {len(text)}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"Expected a name with arguments, as in 'Mixture(10, 8)'; got {text!r}."
        ) from error


def _arguments(node: ast.Call, words: Words) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise ValueError(f"Expected each argument once, by name; got {_shown(node)}.")
        kwargs[keyword.arg] = _literal(keyword.value, words)
    return tuple(_literal(arg, words) for arg in node.args), kwargs


def _literal(node: ast.expr, words: Words) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(item, words) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        value, sign = node.operand.value, _SIGNS.get(type(node.op))
        if sign is not None and isinstance(value, int | float) and not isinstance(value, bool):
            return sign * value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in words:
        return build(words[node.func.id], Call(node.func.id, *_arguments(node, {})))
    allowed = ", ".join(["a number", "a string", "a tuple", "None", *(f"{w}(...)" for w in words)])
    raise ValueError(f"Expected as argument {allowed}; got {_shown(node)}.")
