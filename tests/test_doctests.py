"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import pyro_vae

MODULES = ["pyro_vae", *(m.name for m in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae."))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for name in MODULES for t in finder.find(importlib.import_module(name), name)]
    return [test for test in found if test.examples]


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_example(test: doctest.DocTest) -> None:
    test.globs["torch"] = __import__("torch")
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)
