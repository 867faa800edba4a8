"""The commands of `pyro-vae`: their options, and the texts that they print."""

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
from torch import nn

from .. import plots
from ..data import datasets
from ..data.files import new_file
from ..data.read import read
from ..data.rows import Rows
from ..diagnostics import compare_elbos
from ..engine.running import device_of
from ..evidence import linear_gaussian
from ..programs.saving import load
from ..programs.vae import VAE
from .judgement import Judgement, show_estimators
from .members import members
from .runs import (
    EVIDENCE,
    LOADING,
    PICTURES,
    SETTINGS,
    Settings,
    run,
    save_picture,
    seen,
    settings_of,
)

__all__ = [
    "Columns",
    "Data",
    "Decimal",
    "Device",
    "Drop",
    "Header",
    "Index",
    "Key",
    "Label",
    "Run",
    "Samples",
    "Seed",
    "Separator",
    "app",
    "main",
    "new_picture",
    "opened",
]

_WRITERS: dict[str, Callable[[Path, np.ndarray, list[str]], None]] = {
    ".csv": lambda path, x, names: _frame(x, names).to_csv(path, index=False),
    ".npy": lambda path, x, names: np.save(path, x),
    ".npz": lambda path, x, names: np.savez_compressed(path, x=x),
    ".png": lambda path, x, names: save_picture(
        plots.prior_samples(_frame(x, names) if names else x, size=len(x)), path
    ),
}

ELBOS = "Trace_ELBO, TraceMeanField_ELBO, STL, IWAE(5), DReG(5), VIMCO(5), RWS(5)"
MOST_DRAWN_REPEATS = 30

app = typer.Typer(
    help="Fits deep latent-variable models with a prior, a likelihood and a posterior that you "
    "name, and measures how reliable the fit is.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. An error in the input prints one line and exits with code 2.

    Arguments:
        arguments: The command line after the name of the program; `None` reads `sys.argv`.
    """
    command = typer.main.get_command(app)
    try:
        command(None if arguments is None else list(arguments), prog_name="pyro-vae")
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(f"pyro-vae: {error}".split())
        Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
        raise SystemExit(2) from error


def _frame(x: np.ndarray, names: list[str]) -> pd.DataFrame:
    flat = x.reshape(len(x), -1)
    numbered = [f"x[{', '.join(map(str, index))}]" for index in np.ndindex(x.shape[1:])]
    return pd.DataFrame(flat, columns=names or numbered)


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Turns Ctrl-C into one line and the conventional exit code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        Console(stderr=True).print(f"Interrupted. {advice}", highlight=False)
        raise typer.Exit(128 + signal.SIGINT) from error


Seed = Annotated[
    int, typer.Option(help="Seed of the data split, the weights and all draws.", min=0)
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, ...; auto selects CUDA if a GPU is available.")
]
Refine = Annotated[
    bool, typer.Option(help="Give rows far from their guide proposals of their own.")
]
Samples = Annotated[int, typer.Option(help="Number S of draws per row for log p(x).", min=4)]
Label = Annotated[
    str | None, typer.Option(help="Column of a table, or array of an .npz file, with labels.")
]
Key = Annotated[str | None, typer.Option(help="Array of an .npz file that contains the data.")]
Separator = Annotated[
    str | None,
    typer.Option(help="Separator of a text table: , ; | or spaces. If omitted: found."),
]
Decimal = Annotated[
    str | None, typer.Option(help="Decimal mark of a text table, . or ,. If omitted: found.")
]
Header = Annotated[
    bool | None,
    typer.Option(
        "--header/--no-header",
        help="Whether the first line of a text table names its columns. If omitted: found.",
    ),
]
Index = Annotated[
    str | None,
    typer.Option(help='Column of a text table with the row names; "": none. If omitted: found.'),
]
Columns = Annotated[
    str | None, typer.Option(help="Columns of a table to keep, separated by commas.")
]
Drop = Annotated[
    str | None, typer.Option(help="Columns of a table to leave out, separated by commas.")
]
MostRows = Annotated[
    int,
    typer.Option(
        help="Largest number of rows to use. Only held-out rows are used if the run was fitted to "
        "DATA.",
        min=1,
    ),
]
Prior = Annotated[
    str | None,
    typer.Option(
        help='"Mixture(10, 8)", "VampPrior(50)", "StudentT(df=4.0)", ..., or module:Object. '
        "If omitted: N(0, I)."
    ),
]
Likelihood = Annotated[
    str,
    typer.Option(
        help='"Binomial(total_count=16)", "Normal", ..., any Pyro distribution, or module:Object.'
    ),
]
Posterior = Annotated[
    str, typer.Option(help='"Normal", "MultivariateNormal", ..., or module:Object.')
]
Latent = Annotated[
    int | None,
    typer.Option(help="Latent dims, if the prior does not set them. If omitted: 8.", min=1),
]
Test = Annotated[
    float,
    typer.Option(help="Share (below 1) or number of rows held out from training, for log p(x)."),
]
Validation = Annotated[
    float | None,
    typer.Option(
        help="Share or number of the training rows that stop the fit; 0: none. If omitted: a "
        "tenth, if there are 50 rows."
    ),
]
MaxEpochs = Annotated[
    int | None, typer.Option(help="Largest number of passes over the training rows.", min=1)
]
MaxSteps = Annotated[int, typer.Option(help="Largest number of training steps.", min=1)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an existing run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]
Data = Annotated[
    str, typer.Argument(help="A data set (digits, wine, mnist, ...) or a file.", metavar="DATA")
]
Run = Annotated[
    Path, typer.Argument(help="A run folder that `fit` or `demo` wrote.", metavar="RUN")
]
Out = Annotated[Path, typer.Option(help="Run folder to write.")]


@app.callback(invoke_without_command=True)
def _root(*, version: Version = False) -> None:
    if not version:
        return
    try:
        number = metadata.version("pyro-vae")
    except metadata.PackageNotFoundError:
        number = "(not installed)"
    Console().print(f"pyro-vae {number}", highlight=False)
    raise typer.Exit


@app.command("demo")
def _demo(
    out: Out = Path("runs/demo"),
    max_steps: MaxSteps = 10_000,
    max_epochs: MaxEpochs = None,
    num_samples: Samples = 1000,
    seed: Seed = 0,
) -> None:
    """Fits a VAE with a Binomial likelihood to handwritten digits (8 x 8 counts from 0 to 16)."""
    settings = Settings(
        "digits",
        "Binomial(total_count=16)",
        latent=10,
        max_steps=max_steps,
        max_epochs=max_epochs,
        num_samples=num_samples,
        seed=seed,
    )
    Console().print(
        f"Fitting a VAE to {settings.data}: prior N(0, I) with {settings.latent} latent dims, "
        f"likelihood {settings.likelihood}, posterior {settings.posterior}.",
        highlight=False,
    )
    is_ours = not out.exists() or settings_of(out).get("command") == "demo"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads do not speed up networks of this size.
    try:
        with _interruptible("Run the command again to start from the beginning."):
            run(settings, out, resume=False, overwrite=is_ours, command="demo")
    finally:
        torch.set_num_threads(threads)


@app.command("fit")
def _fit(
    data: Data,
    likelihood: Likelihood,
    out: Out,
    prior: Prior = None,
    posterior: Posterior = "Normal",
    latent: Latent = None,
    hidden: Annotated[
        str | None, typer.Option(help="Hidden units of both networks, as in 64,64.")
    ] = None,
    activation: Annotated[str, typer.Option(help="Activation function in torch.nn.")] = "SiLU",
    transform: Annotated[
        str | None, typer.Option(help="binarize draws new 0s and 1s for each minibatch.")
    ] = None,
    label: Label = None,
    key: Key = None,
    separator: Separator = None,
    decimal: Decimal = None,
    header: Header = None,
    index: Index = None,
    columns: Columns = None,
    drop: Drop = None,
    test: Test = 0.2,
    validation: Validation = None,
    batch_size: Annotated[int, typer.Option(help="Rows per minibatch.", min=1)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 5e-3,
    weight_prior: Annotated[
        float, typer.Option(help="Standard deviation of the weights' prior; 0: none.", min=0)
    ] = 1.0,
    max_steps: MaxSteps = 10_000,
    max_epochs: MaxEpochs = None,
    elbo: Annotated[
        str, typer.Option(help='"Trace_ELBO(num_particles=5)", "IWAE(5)", ..., or module:Object.')
    ] = "Trace_ELBO",
    num_samples: Samples = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help="auto, eager, traced, compiled, ...")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="Float precision: highest, high, medium or bf16.")
    ] = None,
    *,
    refine: Refine = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fits a VAE to DATA and writes a run folder: weights, history, log p(x), draws, pictures."""
    chosen = {k: v for k, v in locals().items() if k in Settings.__dataclass_fields__}
    if resume and overwrite:
        raise ValueError("Expected --resume or --overwrite; got both.")
    with _interruptible("Continue with --resume."):
        run(Settings(**chosen), out, resume=resume, overwrite=overwrite, command="fit")


@app.command("evaluate")
def _evaluate(
    folder: Run,
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help=".csv file to write, one line per row of DATA.")
    ] = None,
    label: Label = None,
    key: Key = None,
    separator: Separator = None,
    decimal: Decimal = None,
    header: Header = None,
    index: Index = None,
    columns: Columns = None,
    drop: Drop = None,
    num_samples: Samples = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    *,
    refine: Refine = True,
) -> None:
    """Estimates log p(x) of all rows of DATA under a run, and how reliable the estimate is."""
    options = {name: value for name, value in locals().items() if name in LOADING}
    program, rows, held_out = opened(folder, data, options, seed, device)
    judgement = Judgement.of(program, rows, num_samples, seed, refine=refine)
    if out is not None:
        with new_file(out) as beside:
            judgement.frame().to_csv(beside)
    judgement.show(f"{len(rows)} rows of {data} under {folder}")
    if held_out is not None:
        note = (
            "Most of these rows were used for training, so these values are likely optimistic. "
            f"The {len(held_out)} held-out rows are listed in {folder / SETTINGS} (held_out_rows)"
        )
        has_file = (folder / EVIDENCE).exists()
        note += f", and their log p(x) in {folder / EVIDENCE}." if has_file else "."
        Console().print(note, markup=False, highlight=False)


def opened(
    folder: Path, data: str, options: dict[str, Any], seed: int, device: str
) -> tuple[nn.Module, Rows, np.ndarray | None]:
    """Returns a program, rows for it, and the held-out rows if it was fitted to the same data.

    Arguments:
        folder: The run folder.
        data: The data set or file.
        options: How it is read, by the names in `LOADING`.
        seed: The seed of a random transform.
        device: The device.
    """
    record = settings_of(folder)
    fitted = record.get("settings", {})
    program = load(folder, device=device_of(device))
    if isinstance(program, VAE) and record.get("reason"):
        program.verdict = (record["converged"], record["reason"])
    path, path_of_fit = (Path(p).expanduser().resolve() for p in (data, fitted.get("data", "")))
    if path == path_of_fit:
        layout = ("separator", "decimal", "header", "index", "columns", "drop")
        options |= {name: fitted.get(name) for name in layout if options[name] is None}
    loaded = datasets.load(data, **options)
    if loaded.note:
        Console(stderr=True).print(f"{data}: {loaded.note}.", markup=False, highlight=False)
    rows = read(loaded)
    expected = record.get("columns")
    if expected is not None and rows.column_names() is None:
        raise ValueError(
            f"Expected the columns of the fit, {expected}; got columns without names."
        )
    rows = rows.ordered({} if expected is None else {"x": [expected]})
    is_same = path == path_of_fit and options["key"] == fitted.get("key")
    held_out = np.asarray(record["held_out_rows"]) if fitted and is_same else None
    if held_out is not None and rows.labels.dtype.kind == "M":
        held_out = held_out.astype(rows.labels.dtype)
    return program, seen(rows, fitted.get("transform"), seed), held_out


@app.command("compare-elbos")
def _compare_elbos(
    folder: Run,
    data: Data,
    elbos: Annotated[
        str, typer.Option(help='"Trace_ELBO, IWAE(5), PIWAE(2, 5)", module:Object, ...')
    ] = ELBOS,
    rows: MostRows = 100,
    num_repeats: Annotated[
        int, typer.Option(help="Number of evaluations of each estimator.", min=4)
    ] = 100,
    num_samples: Annotated[
        int,
        typer.Option(help="Draws of the reference, if log p(x) has no closed form.", min=16),
    ] = 5000,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to write. If omitted: pictures/estimators.png in RUN."),
    ] = None,
    label: Label = None,
    key: Key = None,
    separator: Separator = None,
    decimal: Decimal = None,
    header: Header = None,
    index: Index = None,
    columns: Columns = None,
    drop: Drop = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Compares ELBO estimators on a run: bias, noise and cost of their gradients."""
    options = {name: value for name, value in locals().items() if name in LOADING}
    estimators = members(elbos, "ELBO")
    file = new_picture(plot, folder / PICTURES / "estimators.png")
    program, taken, held_out = opened(folder, data, options, seed, device)
    title = f"rows of {data}"
    if held_out is not None:
        is_held_out = torch.from_numpy(np.isin(taken.labels, held_out))
        taken, title = taken[is_held_out], f"held-out rows of {data}"
    taken, shown = taken[slice(0, rows)], Console().is_terminal
    is_exact = linear_gaussian(program, taken) is not None
    comparison = compare_elbos(
        program,
        taken,
        estimators,
        num_repeats=num_repeats,
        reference=None if is_exact else num_samples,
        seed=seed,
        progress=shown,
    )
    show_estimators(comparison, f"{len(taken)} {title} under {folder}")
    file.parent.mkdir(parents=True, exist_ok=True)
    repeats = min(num_repeats, MOST_DRAWN_REPEATS)
    picture = comparison.plot(num_repeats=repeats, progress=shown)
    with new_file(file) as beside:
        save_picture(picture, beside)
    Console().print(f"{'picture':16} {file}", soft_wrap=True, markup=False, highlight=False)


def new_picture(plot: Path | None, default: Path) -> Path:
    """Returns a file that does not exist: `plot`, or the first of `name.png`, `name-2.png`, ...

    Arguments:
        plot: The file that the user named, if any.
        default: The first name otherwise.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    if plot is None:
        count = itertools.count(2)
        names = itertools.chain(
            [default], (default.with_stem(f"{default.stem}-{i}") for i in count)
        )
        return next(name for name in names if not name.exists())
    if plot.exists():
        raise ValueError(f"{plot} exists and is not replaced. Choose another --plot.")
    formats = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"Expected a picture, of {', '.join(sorted(formats))}; got {plot}.")
    return plot


@app.command("sample")
def _sample(
    folder: Run,
    size: Annotated[int, typer.Option("-n", "--size", help="Number of rows to draw.", min=1)] = 16,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .csv, .npy, .npz or .png. If omitted: print csv."),
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
