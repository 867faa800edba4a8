"""Every example runs with small arguments and prints its results."""

import importlib.util
from pathlib import Path

import matplotlib  # noqa: F401 - conftest compares its style before and after each test
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--max-epochs", "2", "--num-samples", "40", "--seed", "0"]
ARGUMENTS = {
    "compare_elbos.py": [
        *("--max-epochs", "1", "--rows", "4", "--num-samples", "16", "--num-repeats", "4"),
        *("--num-particles", "1", "2"),
    ],
    "signal_to_noise.py": "--num-particles 1 4 --num-repeats 50 --num-seeds 2".split(),
}
PRINTS = {
    "compare_elbos.py": ["IWAE(16)", "snr_encoder", "efficiency", "picture: compare_elbos.png"],
    "posterior_diagnostics.py": ["z[0, 0]", "Pareto k", "alcohol", "after writing and reading"],
    "quickstart.py": ["epoch 2", "log_evidence", "pareto_k_over", "upper"],
    "signal_to_noise.py": ["DReG", "encoder", "Noise floor", "picture: signal_to_noise.png"],
    "swap_the_likelihood.py": ["beta-binomial", "categorical", "difference_se", "training seed"],
    "swap_the_prior.py": ["student t", "mixture of 10", "vamp, 50 rows", "difference_se"],
    "your_own_program.py": ["conditional", "plain", "z_dim_0", "log_evidence"],
}


def test_every_example_has_a_case() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTS.keys()


@pytest.mark.filterwarnings("ignore:The difference from:UserWarning")
@pytest.mark.parametrize("name", PRINTS)
def test_example(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(ARGUMENTS.get(name, SMALL))
    printed = capsys.readouterr().out
    assert [word for word in PRINTS[name] if word not in printed] == []


def test_the_model_that_an_example_saves_can_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyro_vae as pv

    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "quickstart.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([*SMALL, "--out", str(tmp_path / "vae")])
    assert pv.load(tmp_path / "vae").sample(2, seed=0).shape == (2, 64)
