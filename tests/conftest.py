"""A fresh world for every test and doctest, and proof that none of it was left changed."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # tests and the processes they start round alike

import matplotlib
import pyro
import pytest
import torch
import zuko  # noqa: F401 - its import switches off torch's validation

from pyro_vae.data.rows import Rows

torch.set_num_threads(1)
pyro.enable_validation(True)  # as it is after importing pyro
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


@pytest.fixture(autouse=True)
def _fresh_world(request: pytest.FixtureRequest) -> Iterator[None]:
    before = shared_state()
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        yield
        left = sorted(pyro.get_param_store().keys())
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    after = shared_state()
    changed = {name: after[name] for name in before if after[name] != before[name]}
    assert not changed, f"left changed: {changed}"
    assert not left or request.node.get_closest_marker("param_store"), (
        f"left in Pyro's parameter store: {left}"
    )


def shared_state() -> dict[str, Any]:
    """What every user of the process shares, and no function of the package may leave changed."""
    return {
        "default dtype": torch.get_default_dtype(),
        **pyro.settings.get(),
        "gradients": torch.is_grad_enabled(),
        "matrix products": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "style of matplotlib": dict(matplotlib.rcParams.copy()),
    }


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows went at once to the device of a module, each time that some did."""
    sizes: list[int] = []
    real = Rows.to_like

    def noted(rows: Rows, module: Any, *, move: bool = True) -> Rows:
        if move and module is not None:
            sizes.append(len(rows))
        return real(rows, module, move=move)

    monkeypatch.setattr(Rows, "to_like", noted)
    return sizes


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data on the project's machines."""
    folder = os.environ.get("PYRO_VAE_DATA")
    if not folder:
        pytest.skip("PYRO_VAE_DATA is unset: it names the folder of real data")
    return Path(folder)
