"""A small case of tests/benchmarks/defaults.py: default fits against simple models."""

import pytest
from benchmarks import defaults


@pytest.mark.parametrize(("table", "likelihood"), [("wine", "Normal"), ("made", "Normal")])
def test_a_default_fit_of_a_raw_table_is_better_than_simple_models(
    table: str, likelihood: str
) -> None:
    found = defaults.one_fit((table, likelihood, 0, 0))
    best = max(found["independent"], found["PPCA"], found["FA"])
    assert found["VAE"] > best - defaults.SLACK
    assert found["lost"] == 0.0


def test_a_larger_model_is_level_on_data_of_the_smaller() -> None:
    found = defaults.one_pair(("StudentT", "Normal", 0))
    assert abs(found["difference"]) < 0.1


def test_all_true_latents_are_active() -> None:
    assert defaults.one_of_latents(0)["active"] == 3
