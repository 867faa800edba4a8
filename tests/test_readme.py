"""The README: its Python runs, its tables are complete, its commands are those that there are."""

import functools
import inspect
import re
from pathlib import Path

import matplotlib  # noqa: F401 - its style is compared before and after
import pytest
import typer
from torch import nn

import pyro_vae as pv
from pyro_vae.cli import app

ROOT = Path(__file__).parents[1]
PROMISED = ["log_evidence", "elbo", "log_evidence_quarter", "gap"]
PROMISED += ["pareto_k_over", "pareto_k_missing", "pareto_k_guide_over"]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit to convergence takes some 10 s."""
    monkeypatch.setattr(pv, "fit", functools.partial(pv.fit, max_steps=200))


@pytest.mark.filterwarnings("ignore:The difference from:UserWarning")
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = re.sub(r"max_epochs=\d+", "max_epochs=2", "\n".join(blocks("python")))
    program = re.sub(r"num_samples=\d+", "num_samples=40", program)
    program = re.sub(r"num_repeats=\d+", "num_repeats=4", program)
    program = re.sub(r"budget=\d+", "budget=2", program)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), names)
    assert names["ranking"].index.name == "model"
    assert (tmp_path / "training.png").exists()


def test_the_first_screen_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    screen = "\n".join(README.splitlines()[:40])
    (program,) = re.findall(r"^```python\n(.*?)^```", screen, re.DOTALL | re.MULTILINE)
    assert len(program.splitlines()) <= 10
    shown: list[object] = []
    small = re.sub(r"max_epochs=\d+", "max_epochs=1", program)
    exec(compile(small, "README.md", "exec"), {"__name__": "readme", "print": shown.append})
    (table,) = shown
    assert [line.split()[0] for line in str(table).splitlines()[1:]] == PROMISED


def test_the_text_is_short() -> None:
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("room", ["priors", "likelihoods", "posteriors", "networks", "elbos"])
def test_every_member_stands_in_the_table(room: str) -> None:
    (line,) = re.findall(rf"^\| `pv\.{room}` \| (.*?) \|", README, re.MULTILINE)
    classes = {k: v for k, v in vars(getattr(pv, room)).items() if inspect.isclass(v)}
    members = {
        name
        for name, value in classes.items()
        if (issubclass(value, nn.Module) or hasattr(value, "estimate"))
        and not inspect.isabstract(value)
        and name not in ("Objective",)
    }
    assert set(re.findall(r"`(\w+)`", line)) == members


def test_every_example_stands_in_the_table() -> None:
    named = set(re.findall(r"\(examples/(\w+\.py)\)", README))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_commands_are_there() -> None:
    commands = typer.main.get_command(app).commands
    lines = [line for block in blocks("sh") for line in block.splitlines() if "pyro-vae " in line]
    assert len(lines) == 10
    for line in lines:
        name, *words = line.split("pyro-vae ")[1].split()
        known = {flag for option in commands[name].params for flag in option.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_set_up_is_what_the_gate_runs() -> None:
    promised = "\n".join(blocks("sh"))
    assert "pip install . && pyro-vae demo\n" in promised
    assert "pip install '.[test]' && pytest -n 2\n" in promised
