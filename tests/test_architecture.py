"""The floors of the package, its public names, and what importing it costs others."""

import ast
import inspect
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from measure import measure

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
FLOORS = [
    {"data", "distributions", "networks"},
    {"priors", "likelihoods", "posteriors"},
    {"engine"},
    {"elbos"},
    {"prediction"},
    {"programs"},
    {"plots"},
    {"training", "evidence"},
    {"diagnostics"},
    {"cli", "__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FAMILIES = {"priors", "likelihoods", "posteriors"}


MEMBERS = FAMILIES | {"distributions", "networks", "programs"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def imported(module: str) -> set[str]:
    """The files of the package that a file imports, anywhere in it."""
    tree = ast.parse(FILES[module].read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = origin(module, node)
            found |= {
                name if (name := f"{source}.{alias.name}") in FILES else source
                for alias in node.names
            }
    return (found & FILES.keys()) - {module}


def origin(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = FILES[module].name == "__init__.py"
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, node.module] if node.module else base)


@pytest.mark.parametrize("module", FILES)
def test_every_file_stands_on_a_floor(module: str) -> None:
    assert room(module) in FLOOR


@pytest.mark.parametrize("module", FILES)
def test_no_file_imports_from_a_floor_above(module: str) -> None:
    above = {name for name in imported(module) if FLOOR[room(name)] > FLOOR[room(module)]}
    assert above == set()


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in FAMILIES])
def test_families_import_no_other_family(module: str) -> None:
    others = FAMILIES - {room(module)}
    assert {name for name in imported(module) if room(name) in others} == set()


def test_no_circle() -> None:
    TopologicalSorter({module: imported(module) for module in FILES}).prepare()


def test_the_graph_is_seen() -> None:
    assert "pyro_vae.programs" in imported("pyro_vae")
    assert "pyro_vae.distributions" in imported("pyro_vae.likelihoods.normal")


@pytest.mark.parametrize("module", FILES)
def test_programs_stand_in_one_file(module: str) -> None:
    primitives = {"sample", "param", "module", "factor", "deterministic"}
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pyro"
        and node.attr in primitives
    }
    assert used == ({"pyro.sample"} if module == "pyro_vae.programs.vae" else set())


@pytest.mark.parametrize("module", FILES)
def test_functions_are_short(module: str) -> None:
    tree = ast.parse(FILES[module].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in functions if lines(node) > 60} == set()


def lines(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    length = function.end_lineno - function.lineno + 1
    return length - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_the_package_has_few_rooms_and_no_lookup_on_members() -> None:
    assert measure()["rooms"] <= 16
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert rooms & set(pyro_vae.__all__) <= set(dir(pyro_vae))
    assert not [name for name in rooms if inspect.isfunction(getattr(pyro_vae, name, None))]


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in MEMBERS])
def test_members_are_asked_for_what_they_declare(module: str) -> None:
    """A program asks a member for what ConditionalDistribution declares, and looks nothing up."""
    source = FILES[module].read_text()
    assert "hasattr(" not in source
    assert "inspect.signature(self" not in source


def test_public_names_alone_complete() -> None:
    assert set(dir(pyro_vae)) == {*pyro_vae.__all__, "__version__"}
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name) is not None


def public(module: ModuleType) -> dict[str, object]:
    return {name: getattr(module, name) for name in module.__all__}


@pytest.mark.parametrize("name", public(pyro_vae))
def test_public_names_are_documented(name: str) -> None:
    value = getattr(pyro_vae, name)
    written = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    assert written
    assert not written.startswith(f"{name}(")


def in_a_new_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARED_STATE = """
import json, logging, os, random, sys, warnings
import matplotlib, numpy, pandas, pyro, torch, xarray

def shared_state():
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "settings of Pyro": pyro.settings.get(),
        "parameter store": sorted(pyro.get_param_store().keys()),
        "gradients": torch.is_grad_enabled(),
        "generator of torch": torch.get_rng_state().tolist(),
        "generator of numpy": numpy.random.get_state(),
        "generator of Python": random.getstate(),
        "threads": torch.get_num_threads(),
        "matrix products": torch.get_float32_matmul_precision(),
        "printing": [torch._tensor_str.PRINT_OPTS, numpy.get_printoptions()],
        "floating errors": numpy.geterr(),
        "style": dict(matplotlib.rcParams.copy()),
        "options of xarray": dict(xarray.core.options.OPTIONS),
        "warnings": [str(rule) for rule in warnings.filters],
        "logging": {log.name: [log.level, log.handlers] for log in loggers if log.handlers},
        "environment": dict(os.environ),
        "hooks": [sys.excepthook, sys.displayhook, warnings.showwarning],
    }

before = {name: str(value) for name, value in shared_state().items()}
import pyro_vae
after = {name: str(value) for name, value in shared_state().items()}
changed = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
print(json.dumps(changed))
"""


def test_importing_changes_no_shared_state() -> None:
    assert json.loads(in_a_new_process(SHARED_STATE)) == {}


@pytest.mark.parametrize(
    "heavy",
    ["arviz", "matplotlib", "matplotlib.pyplot", "pyarrow.parquet", "rich", "sklearn", "typer"],
)
def test_importing_leaves_heavy_packages_alone(heavy: str) -> None:
    assert heavy not in loaded()


@cache
def loaded() -> list[str]:
    """The modules that importing the package loads."""
    program = "import json, sys, pyro_vae; print(json.dumps(list(sys.modules)))"
    return json.loads(in_a_new_process(program))
