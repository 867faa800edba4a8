"""What arguments must be, and the near names of misspelt ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.data.checks import (
    checked_count,
    checked_number_of,
    checked_positive,
    checked_shape,
    closest,
    is_size,
    perhaps,
    short,
)

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "too small": (
        lambda: checked_count("n", 3, least=4),
        "n to be an integer of at least 4; got 3",
    ),
    "a truth": (lambda: checked_count("n", True), "n to be an integer of at least 1; got True"),
    "half": (lambda: checked_count("n", 2.0), "n to be an integer of at least 1; got 2.0"),
    "a huge one": (lambda: checked_count("n", 2**63), r"n to be an integer below 2\*\*63; got 9"),
    "zero": (lambda: checked_positive("lr", 0), "lr to be a positive number; got 0"),
    "no number": (lambda: checked_positive("lr", np.nan), "lr to be a positive number; got nan"),
    "infinity": (lambda: checked_positive("lr", np.inf), "lr to be a positive number; got inf"),
    "text": (lambda: checked_positive("lr", "1"), "lr to be a positive number; got '1'"),
    "none of them": (lambda: checked_number_of("parts", 0), "a positive number of parts; got 0"),
    "no dims": (lambda: checked_shape(()), r"an event shape of positive sizes; got \(\)"),
    "no columns": (
        lambda: checked_shape((3, 0)),
        r"an event shape of positive sizes; got \(3, 0\)",
    ),
    "a shape of text": (lambda: checked_shape("3"), "an event shape of positive sizes; got '3'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_amiss_is_refused(case: str) -> None:
    call, said = REFUSED[case]
    with pytest.raises(ValueError, match=f"^Expected {said}"):
        call()


def test_what_is_right_is_returned() -> None:
    assert checked_count("seed", np.int64(0), least=0) == 0
    assert type(checked_count("seed", np.int64(7))) is int
    assert checked_positive("lr", np.float32(0.5)) == 0.5
    assert checked_shape([2, 3]) == (2, 3)
    assert [value for value in (0, 1, True, 2.0, -1, "1", None) if is_size(value)] == [1]


def test_near_names() -> None:
    assert closest("bernouli", ["Bernoulli", "Beta"]) == ["Bernoulli"]
    assert perhaps("LOC", ["loc", "scale"]) == ", perhaps 'loc'"
    assert perhaps("sigma", ["loc", "scale"]) == ""


def test_tensors_are_short() -> None:
    assert short(torch.zeros(1000)) == "tensor of shape (1000,)"
    assert short("log") == "'log'"
