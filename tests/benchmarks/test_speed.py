"""Steps of one VAE in each system, under pytest-benchmark: a group for each shape.

A line is one call: 8 steps for NumPyro's scan, one for all others. The processor's cores are all
used, whatever other tests do. `speed.py` times the same steps in turn, and prints their ratios.

    pytest tests/benchmarks/test_speed.py --benchmark-group-by=group
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peers import PEERS, SHAPES

from pyro_vae.engine.running import kept_generators

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

WARM_UP = 3


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    with kept_generators():
        yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize("system", PEERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step(shape: str, system: str, benchmark: Any) -> None:
    peer = PEERS[system]
    if peer.missing:
        pytest.skip(f"not installed: {', '.join(peer.missing)}")
    benchmark.group = shape
    benchmark.extra_info["steps a call"] = peer.steps
    call = peer.make(SHAPES[shape])
    for _ in range(WARM_UP):
        call()
    benchmark(call)
