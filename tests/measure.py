"""Measures how the package is written: `python tests/measure.py [folder]` prints a table.

Functions, their lengths, private helpers, type checks at run time, `Any`: by Python's own `ast`.
"""

import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pyro_vae"
LOOKED_UP = ("hasattr", "getattr")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees(package: Path) -> dict[str, ast.Module]:
    files = sorted(package.rglob("*.py"))
    return {str(f.relative_to(package)): ast.parse(f.read_text()) for f in files}


def functions(tree: ast.Module) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """The lines of a function, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def uses(tree: ast.Module) -> Counter[str]:
    """How often each name or attribute is read."""
    names = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    attributes = (node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return Counter([*names, *attributes])


def calls(tree: ast.Module, *names: str) -> int:
    found = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(isinstance(func, ast.Name) and func.id in names for func in found)


def bare_any(tree: ast.Module) -> int:
    """How often `Any` stands alone as a type, not inside another one."""
    annotations = []
    for node in ast.walk(tree):
        annotations += [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return sum(isinstance(a, ast.Name) and a.id == "Any" for a in annotations)


def code_lines(package: Path) -> int:
    """Lines that are neither blank, nor a comment, nor in a docstring."""
    total = 0
    for file in sorted(package.rglob("*.py")):
        source, skipped = file.read_text(), set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
                skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        for number, line in enumerate(source.splitlines(), 1):
            is_code = line.strip() and not line.strip().startswith("#")
            total += bool(is_code) and number not in skipped
    return total


def measure(package: Path = PACKAGE) -> dict[str, float]:
    found = trees(package)
    lengths = sorted(body_lines(f) for tree in found.values() for f in functions(tree))
    names = [(path, f.name) for path, tree in found.items() for f in functions(tree)]
    private = [(path, name) for path, name in names if is_private(name)]
    read = {path: uses(tree) for path, tree in found.items()}
    alone = [name for path, name in private if sum(r[name] for r in read.values()) <= 1]
    places = [p for p in package.iterdir() if p.name not in ("__init__.py", "py.typed")]
    return {
        "rooms": sum(not p.name.startswith("__pycache__") for p in places),
        "files": len(found),
        "lines of code": code_lines(package),
        "body of a function, median": statistics.median(lengths),
        "body of a function, 90 %": lengths[int(0.9 * len(lengths))],
        "body of a function, longest": lengths[-1],
        "functions": len(names),
        "private functions": len(private),
        "private functions, % of all": round(100 * len(private) / len(names), 1),
        "private with one use, % of them": round(100 * len(alone) / len(private), 1),
        "isinstance": sum(calls(tree, "isinstance") for tree in found.values()),
        "hasattr and getattr": sum(calls(tree, *LOOKED_UP) for tree in found.values()),
        "bare Any": sum(map(bare_any, found.values())),
        "type: ignore": sum(
            file.read_text().count("type: ignore") for file in package.rglob("*.py")
        ),
    }


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    for name, value in measure(package).items():
        sys.stdout.write(f"{name:32} {value:g}\n")


if __name__ == "__main__":
    main()
