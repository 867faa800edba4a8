"""The command line: its input, its files, its texts and its errors."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib  # noqa: F401 - conftest compares its style before and after each test
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.cli import main, member, runs, specs
from pyro_vae.cli.commands import ELBOS
from pyro_vae.cli.judgement import Judgement
from pyro_vae.cli.members import members
from pyro_vae.data.files import read_tensors

SMALL = ["--max-epochs", "2", "--hidden", "16", "--latent", "2", "--num-samples", "40"]
FILES = [
    "checkpoint.safetensors",
    "evidence.csv",
    "fit.json",
    "history.csv",
    "latents.csv",
    "pictures/latents.png",
    "pictures/pareto_k.png",
    "pictures/prior_samples.png",
    "pictures/reconstructions.png",
    "pictures/training.png",
    "posterior.nc",
    "spec.json",
    "weights.safetensors",
]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def table() -> str:
    generator = np.random.default_rng(0)
    z = generator.normal(size=(80, 1))
    columns = ["height", "weight", "age", "dose"]
    frame = pd.DataFrame(z + 0.5 * generator.normal(size=(80, 4)), columns=columns)
    frame.index = [f"patient {i}" for i in range(80)]
    frame["group"] = np.where(z[:, 0] > 0, "high", "low")
    frame.to_csv("table.csv")
    return "table.csv"


@pytest.fixture
def images() -> str:
    x = np.random.default_rng(0).integers(0, 256, size=(60, 1, 8, 8), dtype=np.uint8)
    np.savez("images.npz", images=x, labels=np.arange(60) % 3)
    return "images.npz"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code or 0


def files(folder: str) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def epochs_of(checkpoint: str) -> int:
    return len(read_tensors(checkpoint)[1]["records"]) if Path(checkpoint).exists() else 0


def weights(folder: str) -> dict[str, torch.Tensor]:
    return pv.load(folder).state_dict()


MEMBERS = {
    ("prior", "StandardNormal"): "StandardNormal(3)",
    ("prior", "Mixture(10, 8)"): "Mixture(10, 8",
    ("prior", "Mixture(10)"): "Mixture(10, 3",
    ("prior", "VampPrior(5)"): "VampPrior",
    ("prior", "StudentT(df=4.0, loc=0.0, scale=1.0)"): (
        "Family(StudentT, 3, df=4.0, loc=0.0, scale=1.0)"
    ),
    ("prior", "Laplace"): "Family(Laplace, 3)",
    ("likelihood", "Binomial(total_count=16)"): "Binomial(total_count=16, logits=Predicted())",
    ("likelihood", " Binomial( 16 ) "): "Binomial(total_count=16, logits=Predicted())",
    ("likelihood", "Categorical(17)"): "Categorical(logits=Predicted(shape=17))",
    ("likelihood", "StudentT(df=4.0, scale=Shared())"): (
        "StudentT(df=4.0, loc=Predicted(), scale=Shared())"
    ),
    ("likelihood", "Normal(scale=Shared(init=0.5, scalar=True))"): (
        "Normal(loc=Predicted(), scale=Shared(init=0.5, scalar=True))"
    ),
    ("likelihood", "Poisson(rate=Predicted(link='softplus'))"): (
        "Poisson(rate=Predicted(link='softplus'))"
    ),
    ("likelihood", "Gumbel"): "Family(Gumbel)",
    ("likelihood", "AsymmetricLaplace(asymmetry=Shared())"): (
        "Family(AsymmetricLaplace, asymmetry=Shared())"
    ),
    ("posterior", "MultivariateNormal"): (
        "MultivariateNormal(loc=Predicted(), scale_tril=Predicted())"
    ),
    ("posterior", "LowRankMultivariateNormal(2)"): "LowRankMultivariateNormal",
    ("posterior", "Laplace"): "Family(Laplace)",
    ("ELBO", "Trace_ELBO(num_particles=5)"): "Trace_ELBO",
}


@pytest.mark.parametrize(("what", "text"), MEMBERS, ids=[f"{w}: {t}" for w, t in MEMBERS])
def test_a_member_is_read_from_text(what: str, text: str) -> None:
    assert MEMBERS[what, text] in str(member(text, what, event_shape=3, data=torch.rand(9, 4)))


def test_a_prior_receives_data_and_size_if_it_has_these_parameters() -> None:
    prior = member("VampPrior(5)", "prior", event_shape=3, data=torch.rand(9, 4))
    assert prior.event_shape == (3,)
    assert prior.data.shape == (5, 4)


BAD_MEMBERS = {
    ("likelihood", "Binomail(16)"): "did you mean 'Binomial'",
    ("likelihood", "normal"): "did you mean 'Normal'",
    ("prior", "Vamp(5)"): "did you mean 'VampPrior'",
    ("posterior", "Xyz"): "there are .*MultivariateNormal",
    ("ELBO", "Trace_Elbow"): "did you mean 'Trace_ELBO'",
    ("ELBO", "Estimator"): "Trace_ELBO",
    ("likelihood", "Likelihood"): "name of a likelihood",
    ("likelihood", "Binomial"): "Binomial.total_count.*missing a required argument",
    ("likelihood", "Binomial(n=16)"): "argument of Binomial.*; got 'n': there are",
    ("likelihood", "Binomial(total_cuont=16)"): "got 'total_cuont': did you mean 'total_count'",
    ("likelihood", "Normal(scale=Shared(inti=0.5))"): "got 'inti': did you mean 'init'",
    ("likelihood", "Normal(1.0, 2.0)"): "too many positional arguments",
    ("likelihood", "Gumbel(1.0)"): "positional",
    ("likelihood", "Gumbel(skale=1.0)"): "perhaps 'scale'",
    ("likelihood", "Normal(scale=Shared(0.5, 1, 2, 3, 4))"): "Expected Shared",
    ("likelihood", "nowhere.to_be:found"): "module:Object that can be imported",
    ("likelihood", "math:nothing"): "module:Object that can be imported",
    ("prior", "Mixture(0, 8)"): "positive number of components",
}


@pytest.mark.parametrize(("what", "text"), BAD_MEMBERS, ids=[f"{w}: {t}" for w, t in BAD_MEMBERS])
def test_a_wrong_member_is_refused(what: str, text: str) -> None:
    with pytest.raises(ValueError, match=BAD_MEMBERS[what, text]):
        member(text, what, event_shape=3, data=torch.rand(9, 4))


MALICIOUS = [
    "__import__('pathlib').Path('was here').touch()",
    "Mixture(__import__('pathlib').Path('was here').touch(), 8)",
    "Mixture(*[open('was here', 'w')])",
    "Mixture(**{'a': open('was here', 'w')})",
    "Mixture(num_components=open('was here', 'w').close() or 10)",
    "Shared(init=Shared(open('was here', 'w')))",
    "Mixture([x for x in [open('was here', 'w')]], 8)",
    'Mixture(f\'{open("was here", "w")}\')',
    "(lambda: open('was here', 'w'))()",
    "Mixture(10 ** 10 ** 10, 8)",
    "Mixture([0] * 10 ** 9, 8)",
    "Mixture(x := 3, 8)",
    "Mixture(10, 8); open('was here', 'w')",
    "Mixture(10, 8)\nopen('was here', 'w')",
    "priors.Mixture(10, 8)",
    "Mixture(10, 8).__class__",
    "Mixture(10)(8)",
    "Mixture(a=1, a=2)",
    "(" * 400 + ")" * 400,
    "Mixture(" + "-" * 400 + "1)",
    "Mixture(" + "9" * 2000 + ")",
    "Mixture(10, 8",
    "Mixture(...)",
    "Mixture(b'ten')",
    "Mixture(1j)",
    "Mixture(x)",
    "10",
    "'Mixture'",
    "a\0b",
    "",
]


@pytest.mark.parametrize("text", MALICIOUS, ids=range(len(MALICIOUS)))
@pytest.mark.parametrize("what", ["prior", "likelihood"])
def test_text_is_never_evaluated(what: str, text: str) -> None:
    with pytest.raises(ValueError, match="Expected"):
        member(text, what, event_shape=3, data=None)
    assert os.listdir() == []


def test_literals() -> None:
    call = specs.parse("f(-1, +2.5, 'a', None, True, (1, [2, (3,)]), key=-1e-3)")
    assert call == specs.Call("f", (-1, 2.5, "a", None, True, (1, (2, (3,)))), {"key": -1e-3})


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/fit.json").write_text('{"command": "demo"}')  # an earlier demo is replaced
    assert run("demo", "--max-epochs", "1", "--num-samples", "40") == 0
    printed = capsys.readouterr().out
    assert files("runs/demo") == FILES
    assert os.listdir("runs") == ["demo"]
    for word in ("ELBO", "log p(x), S = 40", "lower bound", "Pareto k over 0.38", "active"):
        assert word in printed
    for file in Path("runs/demo/pictures").iterdir():
        assert str(file) in printed
    vae = pv.load("runs/demo")
    assert vae.sample(2, seed=0).shape == (2, 64)
    evidence = pd.read_csv("runs/demo/evidence.csv", index_col="row")
    assert len(evidence) == 359
    assert evidence.notna().all(axis=None)
    assert sum(p.stat().st_size for p in Path("runs/demo").rglob("*")) < 8e6


def test_fit_evaluate_and_sample_a_table(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", table, "--likelihood", "StudentT(df=4.0)", "--label", "group", *SMALL]
    assert (
        run(*fit, "--prior", "Mixture(3)", "--posterior", "MultivariateNormal", "--out", "r") == 0
    )
    assert "16 held-out rows of table.csv" in capsys.readouterr().out
    assert files("r") == FILES
    evidence = pd.read_csv("r/evidence.csv", index_col="row")
    assert evidence.index[0].startswith("patient ")
    with xr.open_dataset("r/posterior.nc", group="observed_data", engine="h5netcdf") as observed:
        assert observed.x_dim_0.values.tolist() == ["height", "weight", "age", "dose"]
    assert len(pd.read_csv("r/history.csv", index_col="epoch")) == 2

    assert run("evaluate", "r", table, "--label", "group", "--out", "all.csv") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "80 rows of table.csv" in printed
    assert (
        "The 16 held-out rows are listed in r/fit.json (held_out_rows), and their log p(x)"
        in printed
    )
    Path("other.csv").write_bytes(Path(table).read_bytes())
    assert run("evaluate", "r", "other.csv", "--label", "group", "--num-samples", "40") == 0
    assert "held-out" not in capsys.readouterr().out
    again = pd.read_csv("all.csv", index_col="row")
    held_out = again.loc[evidence.index, "log_evidence"]
    assert np.corrcoef(held_out, evidence["log_evidence"])[0, 1] > 0.9

    assert run("sample", "r", "-n", "3") == 0
    assert capsys.readouterr().out.splitlines()[0] == "height,weight,age,dose"
    for ending in ("csv", "npy", "npz", "png"):
        assert run("sample", "r", "-n", "3", "--out", f"draws.{ending}", "--seed", "1") == 0
    expected = pv.load("r").sample(3, seed=1).numpy()
    np.testing.assert_array_equal(np.load("draws.npy"), expected)
    np.testing.assert_array_equal(np.load("draws.npz")["x"], expected)
    np.testing.assert_allclose(pd.read_csv("draws.csv"), expected, rtol=1e-5)


def test_fit_and_evaluate_images(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", images, "--likelihood", "Bernoulli", "--transform", "binarize", *SMALL]
    assert run(*fit, "--prior", "VampPrior(4)", "--out", "r", "--test", "10") == 0
    assert "10 held-out rows of images.npz" in capsys.readouterr().out
    assert pv.load("r").event_shape == (1, 8, 8)
    assert run("evaluate", "r", images, "--num-samples", "40") == 0
    assert run("sample", "r", "-n", "2") == 0
    assert capsys.readouterr().out.splitlines()[-3].startswith('"x[0, 0, 0]"')


def test_compare_elbos(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", table, "--likelihood", "StudentT(df=4.0)", "--label", "group", *SMALL]
    assert run(*fit, "--out", "r") == 0
    few = ["--num-repeats", "4", "--num-samples", "40", "--label", "group"]
    capsys.readouterr()
    arguments = ["compare-elbos", "r", table, "--elbos", "STL, PIWAE(2, 3),RWS(2)", *few]
    assert run(*arguments, "--rows", "10") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "10 held-out rows of table.csv under r" in printed
    assert "reference of log p(x) is IWAE(40), a lower bound" in printed
    for word in ("STL", "PIWAE(2, 3)", "RWS(2)", "efficiency", "encoder", "decoder"):
        assert word in printed
    assert printed.endswith("picture r/pictures/estimators.png")
    assert files("r") == sorted([*FILES, "pictures/estimators.png"])
    Path("other.csv").write_bytes(Path(table).read_bytes())
    assert run("compare-elbos", "r", "other.csv", *few, "--elbos", "STL", "--plot", "p.png") == 0
    assert "80 rows of other.csv" in " ".join(capsys.readouterr().out.split())
    assert Path("p.png").stat().st_size > 5000
    for plot, message in (("p.png", "is not replaced"), ("p.txt", "Expected a picture")):
        assert run("compare-elbos", "r", table, *few, "--plot", plot) == 2
        assert message in capsys.readouterr().err
    assert len(members(ELBOS, "ELBO")) == 7
    for elbos, message in (
        ("IWAE", "num_particles"),
        ("STL, STL", "got STL twice"),
        ("STL,", "Expected"),
        ("IWEA(5)", "did you mean 'IWAE'"),
        ("MMD(weight=1.0), TVO(1)", "at least 2"),
    ):
        assert run("compare-elbos", "r", table, "--elbos", elbos, *few) == 2
        assert message in capsys.readouterr().err


def test_compare_elbos_if_log_evidence_has_a_closed_form(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    vae = pv.VAE(3, 2, pv.likelihoods.Normal(scale=pv.Shared()), decoder=torch.nn.Identity())
    pv.save(vae, "pca")
    np.save("x.npy", np.random.default_rng(0).normal(size=(9, 3)))
    arguments = ["compare-elbos", "pca", "x.npy", "--elbos", "STL,IWAE(2)", "--num-repeats", "4"]
    assert run(*arguments) == 0
    assert "The reference of log p(x) is exact. The reference" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("k", "words"),
    [
        ([0.1, -math.inf, 0.3], ["but not the variation", "0 of 3 rows"]),
        ([0.1, 0.9, 0.95], ["error unknown in 2 of 3 rows", "too low by an unknown amount"]),
        ([0.1, math.nan, 0.2], ["Pareto k not known", "k not known in 1 of 3 rows", "than 20"]),
        ([math.nan] * 3, ["0 of 3 rows; fewer", "k not known in 3 of 3 rows", "than 20 draws"]),
        ([0.9, math.nan, 0.2], ["error unknown in 1 of 3 rows, k not known in 1 of 3 rows"]),
    ],
)
def test_evidence_of_unknown_error_is_named(
    k: list[float],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    vae = pv.VAE(4, 2, pv.likelihoods.Normal(), seed=0)
    evidence = pv.log_evidence(vae, torch.zeros(3, 4), 40, seed=0)
    evidence["pareto_k"] = ("datum", np.array(k))
    active = pv.diagnostics.active_units(vae, torch.zeros(3, 4), seed=0)
    Judgement(evidence, active, {}).show("three rows")
    printed = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in printed] == []


def test_a_point_mass_has_no_evidence(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", table, "--likelihood", "Normal", "--label", "group", *SMALL]
    assert run(*fit, "--posterior", "Delta", "--out", "r") == 0
    assert "A point mass has no density" in capsys.readouterr().out
    assert files("r") == [f for f in FILES if f not in ("evidence.csv", "pictures/pareto_k.png")]


def test_a_members_own_module(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "members_of_a_test", raising=False)
    Path("members_of_a_test.py").write_text(
        "import pyro_vae as pv\n\nclass room:\n    noisy = pv.likelihoods.Normal(scale=0.7)\n"
    )
    before = list(sys.path)
    fit = ["fit", table, "--label", "group", *SMALL, "--out", "r"]
    assert run(*fit, "--likelihood", "members_of_a_test:room.noisy") == 0
    assert sys.path == before
    assert str(pv.load("r").likelihood) == "Normal(loc=Predicted(), scale=0.7)"


def test_resuming_gives_the_weights_of_an_unbroken_run(table: str) -> None:
    fit = ["fit", table, "--likelihood", "Normal", "--label", "group", *SMALL, "--seed", "3"]
    assert run(*fit, "--max-epochs", "3", "--out", "whole") == 0
    assert run(*fit, "--out", "broken") == 0
    assert run(*fit, "--max-epochs", "3", "--out", "broken", "--resume") == 0
    assert files("broken") == FILES
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert sorted(p for p in os.listdir() if p != table) == ["broken", "whole"]


def test_ctrl_c_leaves_a_complete_run(table: str) -> None:
    fit = ["fit", table, "--likelihood", "Normal", "--label", "group", *SMALL, "--out", "r"]
    arguments = [*fit, "--max-epochs", "1000000", "--max-steps", "10000000"]
    program = "import sys; from pyro_vae.cli import main; main(sys.argv[1:])"
    root = str(Path(pv.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not epochs_of("r.unfinished/checkpoint.safetensors") and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "(interrupted)" in printed
    assert files("r") == FILES
    assert pv.load("r").sample(1, seed=0).shape == (1, 4)
    assert not Path("r.unfinished").exists()


def test_a_second_ctrl_c_is_one_line(
    table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Judgement, "of", interrupted)
    fit = ["fit", table, "--likelihood", "Normal", "--label", "group", *SMALL, "--out", "r"]
    assert run(*fit) == 130
    assert capsys.readouterr().err == "Interrupted. Continue with --resume.\n"
    assert files("r.unfinished") == ["checkpoint.safetensors"]


@pytest.mark.parametrize("value", ["", "-1.0"])
def test_held_out_rows_are_checked_before_the_fit(
    table: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(table, index_col=0).drop(columns="group").abs() + 0.1
    _, test = pv.datasets.Dataset("table", frame).split(test=0.2, seed=0)
    frame.loc[test.x.index[3], "age"] = float(value or "nan")
    frame.to_csv("bad.csv")
    monkeypatch.setattr(runs, "fit", lambda *_, **__: pytest.fail("the fit began"))
    assert run("fit", "bad.csv", "--likelihood", "Gamma", "--out", "r", *SMALL) == 2
    assert f"row {test.x.index[3]!r}, column 'age' (1 of 16 rows)" in capsys.readouterr().err
    assert not Path("r.unfinished").exists()


def test_an_unfinished_run_is_continued(table: str) -> None:
    fit = ["fit", table, "--likelihood", "Normal", "--label", "group", *SMALL]
    assert run(*fit, "--out", "r") == 0
    whole = weights("r")
    os.rename("r", "whole")
    Path("r.unfinished").mkdir()
    os.rename("whole/checkpoint.safetensors", "r.unfinished/checkpoint.safetensors")
    assert run(*fit, "--out", "r") == 2
    assert run(*fit, "--out", "r", "--resume") == 0
    assert all(torch.equal(whole[name], value) for name, value in weights("r").items())


FIT = ["fit", "table.csv", "--label", "group", "--out", "new", *SMALL]
NORMAL = [*FIT, "--likelihood", "Normal"]
ERRORS = {
    "no such data": (["fit", "digit", "--likelihood", "Normal", "--out", "new"], "digits"),
    "no such file": (
        ["fit", "absent.csv", "--likelihood", "Normal", "--out", "new"],
        "No such file",
    ),
    "no such column": ([*NORMAL, "--label", "grp"], "got 'grp'"),
    "words in the data": (
        ["fit", "table.csv", "--likelihood", "Normal", "--out", "new"],
        "numbers in column 'group'",
    ),
    "no such likelihood": ([*FIT, "--likelihood", "Binomail"], "did you mean"),
    "a likelihood without its count": ([*FIT, "--likelihood", "Binomial"], "total_count"),
    "data off the support": ([*FIT, "--likelihood", "Poisson"], "support of Poisson"),
    "code": ([*FIT, "--likelihood", "open('new', 'w')"], "Expected"),
    "two latent sizes": ([*NORMAL, "--prior", "Mixture(3, 5)"], "--latent"),
    "hidden": ([*NORMAL, "--hidden", "16,many"], "--hidden as in 256,256"),
    "activation": ([*NORMAL, "--activation", "Relu"], "did you mean 'ReLU'"),
    "transform": ([*NORMAL, "--transform", "binarise"], "--transform binarize"),
    "lr": ([*NORMAL, "--lr", "0"], "lr"),
    "all rows for the test": ([*NORMAL, "--test", "80"], "fewer than the 80 rows"),
    "validation": ([*NORMAL, "--validation", "1.5"], "validation"),
    "device": ([*NORMAL, "--device", "tpu"], "device"),
    "both": ([*NORMAL, "--resume", "--overwrite"], "got both"),
    "a file in the way": ([*NORMAL, "--out", "table.csv"], "exists"),
    "a folder in the way": ([*NORMAL, "--out", "full"], "exists"),
    "not a run to overwrite": ([*NORMAL, "--out", "full", "--overwrite"], "contains 'note.txt'"),
    "not a file to overwrite": ([*NORMAL, "--out", "table.csv", "--overwrite"], "'table.csv'"),
    "below a file": ([*NORMAL, "--out", "table.csv/new"], "table.csv"),
    "no run to evaluate": (["evaluate", "absent", "table.csv"], "absent"),
    "no run": (["evaluate", "full", "table.csv"], "spec.json"),
    "no run to sample": (["sample", "full"], "spec.json"),
    "an ending": (["sample", "full", "--out", "draws.txt"], ".csv, .npy"),
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = ERRORS[case]
    Path("full").mkdir()
    Path("full/note.txt").write_text("dear diary")
    before = files(".")
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("pyro-vae: ")
    assert message in printed.err
    assert files(".") == before


def test_an_existing_run_is_not_replaced(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*NORMAL, "--out", "r") == 0
    before = Path("r/spec.json").read_bytes()
    assert run(*NORMAL, "--out", "r") == 2
    assert "use --resume or --overwrite" in capsys.readouterr().err
    assert run("demo", "--max-epochs", "1", "--out", "r") == 2
    assert capsys.readouterr().err == "pyro-vae: r already exists. Choose another --out.\n"
    assert Path("r/spec.json").read_bytes() == before
    assert run(*NORMAL, "--out", "r", "--resume", "--seed", "1") == 2
    assert "This checkpoint belongs to another fit" in capsys.readouterr().err
    assert Path("r/spec.json").read_bytes() == before
    assert run(*NORMAL, "--out", "r", "--overwrite", "--seed", "1") == 0
    assert Path("r/spec.json").read_bytes() != before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("pyro-vae ")
    run()
    assert "Usage: pyro-vae" in capsys.readouterr().out
    assert run("--wrong") == 2
    assert "--wrong" in capsys.readouterr().err
    for command in ("demo", "fit", "evaluate", "compare-elbos", "sample"):
        assert run(command, "--help") == 0
        assert "Usage: pyro-vae" in capsys.readouterr().out
    assert run("fit", "digits", "--out", "new") == 2
    assert "--likelihood" in capsys.readouterr().err


def test_embed_reconstruct_and_compare_write_what_python_returns(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.read_csv(table, index_col=0).drop(columns="group").to_csv(table, index=False)
    for name, likelihood in (("a", "Normal"), ("b", "StudentT")):
        assert run("fit", table, "--likelihood", likelihood, "--out", name, *SMALL) == 0
    program, rows = pv.load("a"), pd.read_csv(table)
    capsys.readouterr()
    assert run("embed", "a", table) == 0
    shown = pd.read_csv(io.StringIO(capsys.readouterr().out), index_col="row")
    assert list(shown) == ["z[0] mean", "z[1] mean", "z[0] sd", "z[1] sd"]
    wanted = pv.embed(program, rows)["mean"].to_numpy()
    np.testing.assert_allclose(shown.iloc[:, :2], wanted, rtol=1e-4)
    written = pd.read_csv("a/latents.csv", index_col="row")
    np.testing.assert_allclose(written.iloc[:, :4], shown, rtol=1e-4)
    held_out = json.loads(Path("a/fit.json").read_text())["held_out_rows"]
    assert sorted(written.index[written.held_out]) == sorted(held_out)

    assert run("reconstruct", "a", table, "--out", "r.csv", "--num-samples", "40") == 0
    lines = pd.read_csv("r.csv")
    found = pv.reconstruct(program, rows, num_samples=40, seed=0, progress=False)
    assert list(lines)[:2] == ["row", "column"]
    np.testing.assert_allclose(lines["lower"], found["lower"].to_numpy().ravel(), rtol=1e-4)
    np.testing.assert_allclose(lines["observed"], rows.to_numpy().ravel(), rtol=1e-4)

    few = ["--num-samples", "40"]
    assert run("compare", table, "a", "b", *few, "--out", "c.csv", "--plot", "c.png") == 0
    text = capsys.readouterr().out
    assert f"{len(held_out)} rows of {table}" in text
    assert "independent columns of 'a'" in text
    ranking = pd.read_csv("c.csv", index_col="model")
    assert sorted(ranking.index) == ["a", "b"]
    assert Path("c.png").stat().st_size > 5000
    pd.read_csv(table).iloc[:20].to_csv("few.csv", index=False)
    assert run("compare", "few.csv", "a", *few) == 0
    assert "20 rows of few.csv" in capsys.readouterr().out
    for seed in (1, 2, 3):
        options = ["--out", f"s{seed}", "--test", "3", "--seed", str(seed), *SMALL]
        assert run("fit", table, "--likelihood", "Normal", *options) == 0
    assert run("fit", table, "--likelihood", "Normal", "--out", "d", "--drop", "age", *SMALL) == 0
    capsys.readouterr()
    assert run("embed", "d", table) == 0
    assert capsys.readouterr().out.startswith("row,z[0] mean")
    assert json.loads(Path("d/fit.json").read_text())["columns"] == ["height", "weight", "dose"]
    record = json.loads(Path("b/fit.json").read_text())
    record["settings"]["transform"] = "binarize"
    Path("b/fit.json").write_text(json.dumps(record))
    assert run("compare", table, "a", "b", *few) == 2
    assert "the same --transform" in capsys.readouterr().err
    assert run("compare", table, "s1", "s2", "s3", *few) == 2
    assert "No row of table.csv was held out from all" in capsys.readouterr().err


def scores(folder: str, data: str, *options: str) -> pd.DataFrame:
    out = f"{folder}-{Path(data).stem}.csv"
    assert run("evaluate", folder, data, "--out", out, "--num-samples", "20", *options) == 0
    return pd.read_csv(out, index_col=0).select_dtypes("number")


def test_the_layout_of_a_table_is_found_said_and_an_option(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(table, index_col=0).drop(columns="group")
    frame["year"] = 2e6 + np.random.default_rng(1).normal(size=80)  # float32 would round it
    frame.to_csv("plain.csv")
    frame.iloc[:, ::-1].to_csv("german.csv", sep=";", decimal=",", index_label="patient")
    frame.drop(columns="age").to_csv("short.csv")
    fit = ["--likelihood", "Normal", *SMALL]
    assert run("fit", "plain.csv", "--out", "plain", *fit) == 0
    capsys.readouterr()
    given = ["--separator", ";", "--decimal", ",", "--header", "--index", "patient"]
    assert run("fit", "german.csv", "--out", "given", *fit, *given) == 0
    said = [" ".join(capsys.readouterr().out.split())]
    expected = scores("plain", "plain.csv")
    pd.testing.assert_frame_equal(scores("plain", "german.csv"), expected)
    said.append(" ".join(capsys.readouterr().err.split()))
    for text in said:
        assert "separator ';', decimal mark ',', column names in the first line" in text
        assert "row names in column 'patient'" in text
    assert run("evaluate", "plain", "short.csv") == 2
    assert "missing columns: 'age'" in capsys.readouterr().err
    assert run("evaluate", "plain", "german.csv", "--no-header") == 2
    vae = pv.load("plain")
    python = pv.log_evidence(vae, frame, 20, seed=0, progress=False).log_evidence
    np.testing.assert_allclose(expected["log_evidence"], python, rtol=1e-6)


def test_dates_name_the_rows_of_a_run(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(table, index_col=0).drop(columns="group")
    days = pd.date_range("2020-01-01", periods=80, name="day")
    frame.set_index(days).to_parquet("days.parquet")
    assert run("fit", "days.parquet", "--likelihood", "Normal", "--out", "r", *SMALL) == 0
    capsys.readouterr()
    assert run("compare-elbos", "r", "days.parquet", "--elbos", "Trace_ELBO", "--rows", "5") == 0
    assert "5 held-out rows" in capsys.readouterr().out


def test_the_advice_names_first_that_a_simple_model_is_better(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.read_csv(table, index_col=0).drop(columns="group").to_csv(table)
    assert run("fit", table, "--likelihood", "Normal", "--out", "r", *SMALL) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "A simple model describes these rows better: its fit has not converged (stopped" in said
    assert "richer posterior" not in said
    assert "row names in the first column" in said
    assert run("evaluate", "r", table, "--num-samples", "40") == 0
    assert "better: its fit has not converged" in " ".join(capsys.readouterr().out.split())
