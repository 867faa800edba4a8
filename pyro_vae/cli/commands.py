"""The commands: what they take, and what they say."""

import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console

from .. import plots
from ..data import datasets
from ..data.files import new_file
from ..data.read import read
from ..data.rows import Rows
from ..diagnostics import compare_elbos
from ..engine.running import device_of
from ..evidence import linear_gaussian
from ..programs.saving import load
from .judgement import Judgement, show_estimators
from .members import members
from .runs import (
    EVIDENCE,
    PICTURES,
    SETTINGS,
    Settings,
    run,
    save_picture,
    seen,
    settings_of,
)

__all__ = ["app", "main"]

_WRITERS: dict[str, Callable[[Path, np.ndarray, list[str]], None]] = {
    ".csv": lambda path, x, names: _frame(x, names).to_csv(path, index=False),
    ".npy": lambda path, x, names: np.save(path, x),
    ".npz": lambda path, x, names: np.savez_compressed(path, x=x),
    ".png": lambda path, x, names: save_picture(plots.prior_samples(x, size=len(x)), path),
}

ELBOS = "Trace_ELBO, TraceMeanField_ELBO, STL, IWAE(5), DReG(5), VIMCO(5), RWS(5)"
MOST_DRAWN_REPEATS = 30

app = typer.Typer(
    help="Deep latent-variable models: name a prior, a likelihood and a posterior, fit them, and "
    "see how far to trust the fit.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; an error that the user can mend is one line, and exit code 2.

    Arguments:
        arguments: What follows the program's name; by default that of the process.
    """
    command = typer.main.get_command(app)
    try:
        command(None if arguments is None else list(arguments), prog_name="pyro-vae")
    except (ValueError, OSError, FloatingPointError) as error:
        said = " ".join(f"pyro-vae: {error}".split())
        Console(stderr=True, soft_wrap=True).print(said, markup=False, highlight=False)
        raise SystemExit(2) from error


def _frame(x: np.ndarray, names: list[str]) -> pd.DataFrame:
    flat = x.reshape(len(x), -1)
    numbered = [f"x[{', '.join(map(str, index))}]" for index in np.ndindex(x.shape[1:])]
    return pd.DataFrame(flat, columns=names or numbered)


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Makes Ctrl-C one line, and the exit code that shells know it by."""
    try:
        yield
    except KeyboardInterrupt as error:
        Console(stderr=True).print(f"interrupted; {advice}", highlight=False)
        raise typer.Exit(128 + signal.SIGINT) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing by threads, and on busy cores threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say_version(*, asked: bool) -> None:
    if not asked:
        return
    try:
        version = metadata.version("pyro-vae")
    except metadata.PackageNotFoundError:
        version = "not installed"
    Console().print(f"pyro-vae {version}", highlight=False)
    raise typer.Exit


Seed = Annotated[int, typer.Option(help="Seed of the split, the weights, the draws.", min=0)]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto is CUDA if there is one.")]
Samples = Annotated[int, typer.Option(help="Draws S a row for log p(x).", min=4)]
Label = Annotated[
    str | None, typer.Option(help="Column of a table, or array of an npz, with labels.")
]
Key = Annotated[str | None, typer.Option(help="Array of an npz to take.")]
Prior = Annotated[
    str | None,
    typer.Option(help='"Mixture(10, 8)", "VampPrior(50)", "StudentT(df=4.0)", module:Object.'),
]
Likelihood = Annotated[
    str,
    typer.Option(help='"Binomial(total_count=16)", "Normal", any Pyro distribution, ...'),
]
Posterior = Annotated[str, typer.Option(help='"MultivariateNormal", ..., module:Object.')]
Latent = Annotated[
    int | None, typer.Option(help="Latent dims of a prior that names none; 8 by default.", min=1)
]
Test = Annotated[float, typer.Option(help="Share, or number, of rows held out for the evidence.")]
Validation = Annotated[
    float, typer.Option(help="Share of the others for early stopping; 0: none.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")]
Version = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Say the version.",
        is_eager=True,
        callback=lambda asked: _say_version(asked=asked),
    ),
]
Data = Annotated[str, typer.Argument(help="digits, wine, mnist, ..., or a file.", metavar="DATA")]
Run = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]


@app.callback()
def _root(*, version: Version = False) -> None:
    pass


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option(help="The run folder to write.")] = Path("runs/demo"),
    max_epochs: Annotated[int, typer.Option(help="Most passes over the rows.", min=1)] = 100,
    num_samples: Samples = 1000,
    seed: Seed = 0,
) -> None:
    """Fits handwritten digits (8 x 8 counts, 0 to 16) with a Binomial likelihood."""
    ask = Settings(
        "digits",
        "Binomial(total_count=16)",
        latent=10,
        activation="SiLU",
        batch_size=64,
        lr=2e-3,
        schedule="cosine",
        weight_decay=0.1,
        max_epochs=max_epochs,
        num_samples=num_samples,
        seed=seed,
    )
    said = (
        f"{ask.data} ~ {ask.likelihood}, {ask.latent} latents ~ N(0, 1), posterior {ask.posterior}"
    )
    Console().print(said, highlight=False)
    is_ours = not out.exists() or settings_of(out).get("command") == "demo"
    with _one_thread(), _interruptible("ask again to start anew"):
        run(ask, out, resume=False, overwrite=is_ours, command="demo")


@app.command("fit")
def _fit(
    data: Data,
    likelihood: Likelihood,
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    prior: Prior = None,
    posterior: Posterior = "Normal",
    latent: Latent = None,
    hidden: Annotated[str, typer.Option(help="Units of both networks.")] = "256,256",
    activation: Annotated[str, typer.Option(help="Of torch.nn.")] = "ReLU",
    transform: Annotated[str | None, typer.Option(help="binarize: anew at each visit.")] = None,
    label: Label = None,
    key: Key = None,
    test: Test = 0.2,
    validation: Validation = 0.1,
    batch_size: Annotated[int, typer.Option(help="Rows of a minibatch.", min=1)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="constant, or cosine: to 0.")] = "constant",
    weight_decay: Annotated[float, typer.Option(help="That of AdamW.", min=0)] = 0.0,
    max_epochs: Annotated[int, typer.Option(help="Most passes over the rows.", min=1)] = 200,
    patience: Annotated[int, typer.Option(help="Epochs without gain; 0: never.", min=0)] = 20,
    elbo: Annotated[str, typer.Option(help='"Trace_ELBO(num_particles=5)".')] = "Trace_ELBO",
    num_samples: Samples = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help="auto, traced, compiled ...")] = "auto",
    precision: Annotated[str | None, typer.Option(help="highest, high, medium, bf16.")] = None,
    *,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fits DATA, and writes a run folder: weights, history, evidence, draws, pictures."""
    asked = {k: v for k, v in locals().items() if k in Settings.__dataclass_fields__}
    if resume and overwrite:
        raise ValueError("Expected --resume or --overwrite; got both.")
    with _interruptible("go on with --resume"):
        run(Settings(**asked), out, resume=resume, overwrite=overwrite, command="fit")


@app.command("evaluate")
def _evaluate(
    folder: Run,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="A .csv to write, a line a row.")] = None,
    label: Label = None,
    key: Key = None,
    num_samples: Samples = 1000,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Estimates log p(x) of all rows of DATA under a run, and how far to trust it."""
    settings = settings_of(folder)
    program = load(folder, device=device_of(device))
    rows = _rows_of_run(settings, data, label, key, seed)
    judgement = Judgement.of(program, rows, num_samples, seed)
    if out is not None:
        with new_file(out) as beside:
            judgement.frame().to_csv(beside)
    judgement.show(f"{len(rows)} rows of {data} under {folder}")
    if _is_of_the_fit(data, key, settings.get("settings", {})):
        said = (
            f"Most of these rows trained the run: read the {len(settings['held_out_rows'])} held "
            f"out, named in {folder / SETTINGS} (held_out_rows), with their evidence in "
            f"{folder / EVIDENCE}."
        )
        Console().print(said, markup=False, highlight=False)


def _rows_of_run(
    settings: dict[str, Any], data: str, label: str | None, key: str | None, seed: int
) -> Rows:
    """The rows of a file, as the program of a run sees them."""
    rows = read(datasets.load(data, label=label, key=key))
    expected, found = settings.get("columns"), rows.column_names()
    if expected is not None and found != expected:
        raise ValueError(f"Expected the columns of the fit, {expected}; got {found}.")
    return seen(rows, settings.get("settings", {}).get("transform"), seed)


@app.command("compare-elbos")
def _compare_elbos(
    folder: Run,
    data: Data,
    elbos: Annotated[
        str, typer.Option(help='"Trace_ELBO, IWAE(5), PIWAE(2, 5)", module:Object, ...')
    ] = ELBOS,
    rows: Annotated[
        int, typer.Option(help="The most rows to take; held out ones of the fit's data.", min=1)
    ] = 100,
    num_repeats: Annotated[int, typer.Option(help="How often each is asked.", min=4)] = 100,
    num_samples: Annotated[
        int, typer.Option(help="Draws of the reference, if log p(x) has no closed form.", min=16)
    ] = 5000,
    plot: Annotated[
        Path | None, typer.Option(help="The picture; else pictures/estimators.png of the run.")
    ] = None,
    label: Label = None,
    key: Key = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Compares estimators of the ELBO on a run: bias, noise and cost of their gradients."""
    chosen = members(elbos, "ELBO")
    file = _picture_file(folder / PICTURES / "estimators.png") if plot is None else plot
    _check_picture(file)
    settings = settings_of(folder)
    program = load(folder, device=device_of(device))
    taken = _rows_of_run(settings, data, label, key, seed)
    title = f"rows of {data}"
    if _is_of_the_fit(data, key, settings.get("settings", {})):
        held_out = np.isin(taken.labels, settings["held_out_rows"])
        taken, title = taken[torch.from_numpy(held_out)], f"rows held out from {data}"
    taken, shown = taken[slice(0, rows)], Console().is_terminal
    is_exact = linear_gaussian(program, taken) is not None
    found = compare_elbos(
        program,
        taken,
        chosen,
        num_repeats=num_repeats,
        reference=None if is_exact else num_samples,
        seed=seed,
        progress=shown,
    )
    show_estimators(found, f"{len(taken)} {title} under {folder}")
    file.parent.mkdir(parents=True, exist_ok=True)
    repeats = min(num_repeats, MOST_DRAWN_REPEATS)
    picture = found.plot(num_repeats=repeats, progress=shown)
    with new_file(file) as beside:
        save_picture(picture, beside)
    Console().print(f"{'drawn':16} {file}", soft_wrap=True, markup=False, highlight=False)


def _picture_file(file: Path) -> Path:
    """The first of `name.png`, `name-2.png`, ... that is not there yet."""
    names = (file.with_stem(f"{file.stem}-{i}") if i > 1 else file for i in itertools.count(1))
    return next(name for name in names if not name.exists())


def _check_picture(file: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    if file.exists():
        raise ValueError(f"Expected a file that is not there yet; got {file}.")
    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"Expected a picture, of {', '.join(sorted(formats))}; got {file}.")


def _is_of_the_fit(data: str, key: str | None, fitted: dict[str, Any]) -> bool:
    same = [Path(name).expanduser().resolve() for name in (data, fitted.get("data", ""))]
    return same[0] == same[1] and key == fitted.get("key")


@app.command("sample")
def _sample(
    folder: Run,
    size: Annotated[int, typer.Option("-n", "--size", help="How many rows.", min=1)] = 16,
    out: Annotated[
        Path | None, typer.Option(help=".csv, .npy, .npz or .png; else csv is printed.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draws new rows from the prior predictive distribution of a run."""
    if out is not None and out.suffix not in _WRITERS:
        raise ValueError(f"Expected a file ending in {', '.join(_WRITERS)}; got {out}.")
    program: Any = load(folder, device=device_of(device))
    names = settings_of(folder).get("columns") or []
    draws = program.sample(size, seed=seed).cpu().numpy()
    if out is None:
        sys.stdout.write(_frame(draws, names).to_csv(index=False))
        return
    with new_file(out) as beside:
        _WRITERS[out.suffix](beside, draws, names)
