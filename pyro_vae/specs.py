"""Members written as text, `Mixture(10, 8)`: read as literals, never evaluated."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["Call", "bound", "near", "parse"]

MAX_LENGTH = 1000

Words = Mapping[str, Callable[..., Any]]


class Call(NamedTuple):
    """A name and its arguments.

    Arguments:
        name: The name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012


def parse(text: str, words: Words | None = None) -> Call:
    """Reads a name, alone or with literal arguments.

    Literals are numbers, strings, booleans, `None`, tuples and lists of them, and the words,
    whose own arguments are literals. The text is parsed, and nothing of it is evaluated.

    Arguments:
        text: The text.
        words: What may stand as an argument under its name, with arguments of its own.

    Raises:
        ValueError: Where the text is something else.

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


def bound(target: Callable[..., Any], call: Call) -> dict[str, Any]:
    """Returns the arguments of a call by name, those of `*args` as a tuple.

    Arguments:
        target: What is called.
        call: The arguments.

    Raises:
        ValueError: Where they do not fit its signature.
    """
    signature = inspect.signature(target)
    try:
        return dict(signature.bind_partial(*call.args, **call.kwargs).arguments)
    except TypeError as error:
        names = ", ".join(signature.parameters) or "none"
        raise ValueError(f"Expected arguments of {call.name} ({names}); got {error}.") from error


def near(name: str, names: Iterable[str]) -> str:
    """Says which names a wrong one is near to, or what there is.

    Arguments:
        name: The wrong name.
        names: The right ones.

    Example:
        >>> near("binomail", ["Binomial", "Normal"])
        "did you mean 'Binomial'?"
    """
    by_lower = {right.lower(): right for right in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if found:
        return f"did you mean {' or '.join(repr(by_lower[lower]) for lower in found)}?"
    return f"there are {', '.join(sorted(by_lower.values()))}"


def _expression(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"Expected at most {MAX_LENGTH} characters; got {len(text)}.")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"Expected a name with arguments, as in 'Mixture(10, 8)'; got {text!r}."
        ) from error


def _arguments(node: ast.Call, words: Words) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise ValueError(f"Expected each argument once, by name; got {ast.unparse(node)}.")
        kwargs[keyword.arg] = _literal(keyword.value, words)
    return tuple(_literal(arg, words) for arg in node.args), kwargs


def _literal(node: ast.expr, words: Words) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(item, words) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand, words)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in words:
        args, kwargs = _arguments(node, {})
        return _word(words[node.func.id], Call(node.func.id, args, kwargs))
    allowed = ", ".join(["a number", "a string", "a tuple", "None", *(f"{w}(...)" for w in words)])
    raise ValueError(f"Expected as argument {allowed}; got {ast.unparse(node)}.")


def _word(word: Callable[..., Any], call: Call) -> Any:
    bound(word, call)
    return word(*call.args, **call.kwargs)
