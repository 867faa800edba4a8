"""Parses the name of a member and its literal arguments, `Mixture(10, 8)`, without evaluation."""

import ast
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from ..data.checks import closest

__all__ = ["Call", "build", "near", "parse"]

MAX_LENGTH = 1000

_SIGNS: dict[type, int] = {ast.UAdd: 1, ast.USub: -1}

T = TypeVar("T")
Words = Mapping[str, Callable[..., object]]


class Call(NamedTuple):
    """A name and its arguments.

    Arguments:
        name: The name.
        args: The positional arguments.
        kwargs: The keyword arguments.
    """

    name: str
    args: tuple[object, ...]
    kwargs: dict[str, object]


def parse(text: str, words: Words | None = None) -> Call:
    """Parses a name, alone or with literal arguments.

    Literals are numbers, strings, booleans, `None`, tuples and lists of literals, and calls of the
    names in `words` with literal arguments. The text is parsed; no part of it is evaluated as
    Python code.

    Arguments:
        text: The text.
        words: The functions that an argument may call, by name.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse("Mixture(10, 8)")
        Call(name='Mixture', args=(10, 8), kwargs={})
        >>> parse("StudentT(df=-4.0, link='log')").kwargs
        {'df': -4.0, 'link': 'log'}
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"Expected at most {MAX_LENGTH} characters; got {len(text)}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"Expected a name with arguments, as in 'Mixture(10, 8)'; got {text!r}."
        ) from error
    match node:
        case ast.Name(id=name):
            return Call(name, (), {})
        case ast.Call(func=ast.Name(id=name)):
            return _call(name, node, words or {})
    raise ValueError(f"Expected a name, alone or with arguments in brackets; got {text!r}.")


def build(target: Callable[..., T], call: Call, **given: object) -> T:
    """Calls a class or function with parsed arguments.

    Arguments:
        target: The class or function.
        call: The parsed arguments.
        given: Further arguments. One is used if the target has a parameter of that name and the
            text does not set it.

    Raises:
        ValueError: If the arguments do not match the signature.

    Example:
        >>> build(dict.fromkeys, Call("fromkeys", ("ab",), {}), iterable="cd", size=3)
        {'a': None, 'b': None}
    """
    signature = inspect.signature(target)
    parameters = signature.parameters
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in parameters.values()])
    known = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for name in () if takes_any else call.kwargs:
        if name not in known:
            raise ValueError(
                f"Expected an argument of {call.name}{bare}; got {name!r}: {near(name, known)}"
            )
    try:
        written = signature.bind_partial(*call.args, **call.kwargs).arguments
        added = {k: v for k, v in given.items() if k in parameters and k not in written}
        arguments = signature.bind(*call.args, **call.kwargs, **added)
    except TypeError as error:
        raise ValueError(f"Expected {call.name}{bare}; got {error}.") from error
    return target(*arguments.args, **arguments.kwargs)


def near(name: str, names: Iterable[str], others: Iterable[str] = ()) -> str:
    """Returns a hint for a wrong name: the most similar names, or all names.

    Arguments:
        name: The wrong name.
        names: The correct names.
        others: More correct names, too many to list, which come after the others.

    Example:
        >>> near("binomail", ["Binomial", "Normal"])
        "did you mean 'Binomial' or 'Normal'?"
    """
    correct = sorted(set(names))
    if similar := (closest(name, correct) or closest(name, sorted(others))):
        return f"did you mean {' or '.join(map(repr, similar))}?"
    return f"there are {', '.join(correct)}"


def _source(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "deeply nested brackets"


def _call(name: str, node: ast.Call, words: Words) -> Call:
    kwargs: dict[str, object] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise ValueError(f"Expected each argument once, by name; got {_source(node)}.")
        kwargs[keyword.arg] = _literal(keyword.value, words)
    return Call(name, tuple(_literal(arg, words) for arg in node.args), kwargs)


def _literal(node: ast.expr, words: Words) -> object:
    match node:
        case ast.Constant(value=int() | float() | str() | None as value):
            return value
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_literal(item, words) for item in items)
        case ast.UnaryOp(op=op, operand=ast.Constant(value=int() | float() as value)) if (
            type(op) in _SIGNS and type(value) is not bool
        ):
            return _SIGNS[type(op)] * value
        case ast.Call(func=ast.Name(id=name)) if name in words:
            return build(words[name], _call(name, node, {}))
    allowed = ", ".join(["a number", "a string", "a tuple", "None", *(f"{w}(...)" for w in words)])
    raise ValueError(f"Expected as argument {allowed}; got {_source(node)}.")
