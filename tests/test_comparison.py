"""`compare` on data of a known model: a small case of tests/benchmarks/comparison.py."""

from benchmarks.comparison import far_from_zero, number_of_latents, two_guides


def test_the_smallest_model_within_error_has_the_true_number_of_latents() -> None:
    found = [number_of_latents(seed, num_samples=20) for seed in range(8)]
    assert all(line["smallest"] for line in found)
    assert not all(line["best"] for line in found)


def test_two_guides_of_one_model_are_equal_within_error() -> None:
    found = [two_guides(seed, rows=100) for seed in range(3)]
    assert all(line["equal"] for line in found)
    assert all(line["difference"] < 0 for line in found)


def test_weights_do_not_depend_on_the_units() -> None:
    line = far_from_zero(0)
    assert line["same weights"]
    assert line["largest weight"] > 0.5
