"""Runs: the settings of a fit, the fit itself, and the run folder that it writes."""

import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn

from .. import plots
from ..data import datasets
from ..data.files import (
    is_temporary,
    locked,
    new_file,
    new_folder,
    read_json,
    standing,
    write_json,
)
from ..data.read import read, transformed
from ..data.rows import Rows
from ..diagnostics import to_arviz
from ..engine.running import seeded
from ..networks.mlp import MLP
from ..prediction import embed
from ..programs.saving import write_program
from ..programs.vae import DEFAULT_UNITS, VAE, WIDE
from ..training.fit import fit
from ..training.history import History
from . import specs
from .judgement import Judgement
from .members import member

__all__ = [
    "LOADING",
    "Settings",
    "json_labels",
    "latents_of",
    "run",
    "save_picture",
    "seen",
    "settings_of",
]

CHECKPOINT, EVIDENCE, HISTORY = "checkpoint.safetensors", "evidence.csv", "history.csv"
SETTINGS, POSTERIOR, PICTURES = "fit.json", "posterior.nc", "pictures"
LATENTS = "latents.csv"
OURS = {"spec.json", "weights.safetensors", CHECKPOINT, EVIDENCE, HISTORY, LATENTS, SETTINGS}
OURS |= {POSTERIOR}

LOADING = ("label", "key", "separator", "decimal", "header", "index", "columns", "drop")
MAX_DRAWS, MAX_PREDICTIVE, MAX_ROWS = 250, 25, 100
MAX_ELEMENTS = 2**20
MAX_POINTS = 2000

_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {"binarize": datasets.binarize}


@dataclass(frozen=True)
class Settings:
    """The settings of a fit on the command line."""

    data: str
    likelihood: str
    prior: str | None = None
    posterior: str = "Normal"
    elbo: str = "Trace_ELBO"
    latent: int | None = None
    hidden: str | None = None
    activation: str = "SiLU"
    transform: str | None = None
    label: str | None = None
    key: str | None = None
    separator: str | None = None
    decimal: str | None = None
    header: bool | None = None
    index: str | None = None
    columns: str | None = None
    drop: str | None = None
    test: float = 0.2
    validation: float | None = None
    batch_size: int = 128
    lr: float = 5e-3
    weight_prior: float = 1.0
    max_steps: int = 10_000
    max_epochs: int | None = None
    num_samples: int = 1000
    refine: bool = True
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"
    precision: str | None = None


@dataclass(frozen=True)
class Data:
    """All rows, those for training, and those held out with their labels.

    `note` is the layout of the text table that they were read from.
    """

    rows: Rows
    train: Rows
    test: Rows
    labels: np.ndarray | None
    note: str

    @classmethod
    def of(cls, settings: Settings) -> "Data":
        options = {name: getattr(settings, name) for name in LOADING}
        data = datasets.load(settings.data, **options)
        numbered = replace(data, y=torch.arange(len(data)))
        share = int(settings.test) if settings.test >= 1 else settings.test
        train, test = (part.y for part in numbered.split(share, seed=settings.seed))
        rows = read(data)
        labels = None if data.y is None else np.asarray(data.y)[np.asarray(test)]
        held_out = rows[torch.as_tensor(test)]
        return cls(rows, rows[torch.as_tensor(train)], held_out, labels, data.note)


def _program(settings: Settings, rows: Rows) -> VAE:
    width = DEFAULT_UNITS[math.prod(rows.event_shapes()["x"]) > WIDE]
    given = settings.hidden
    try:
        hidden = width if given is None else [int(n) for n in given.split(",") if n.strip()]
    except ValueError as error:
        raise ValueError(f"Expected --hidden as in 256,256; got {settings.hidden!r}.") from error
    activations = {name: vars(nn)[name] for name in torch.nn.modules.activation.__all__}
    if (name := settings.activation) not in activations:
        hint = specs.near(name, activations)
        raise ValueError(f"Expected an activation of torch.nn; got {name!r}: {hint}")
    encoder, decoder = (MLP(*hidden, activation=activations[name]) for _ in range(2))
    with seeded(settings.seed):
        shown = seen(rows, settings.transform, settings.seed)
        size = 8 if settings.latent is None else settings.latent
        prior = member(settings.prior or "StandardNormal", "prior", event_shape=size, data=shown)
        shape = tuple(getattr(prior, "event_shape", ()))
        if settings.latent is not None and shape and shape != (size,):
            raise ValueError(f"Expected --latent to be the prior's size {shape}; got {size}.")
        return VAE(
            shown.event_shapes()["x"],
            prior,
            member(settings.likelihood, "likelihood"),
            member(settings.posterior, "posterior"),
            encoder=encoder,
            decoder=decoder,
        )


def json_labels(labels: np.ndarray) -> list[Any]:
    """Returns labels as JSON holds them; dates become text.

    Arguments:
        labels: The labels.
    """
    found: list[Any] = (labels.astype(str) if labels.dtype.kind == "M" else labels).tolist()
    return found


def _transform(name: str | None) -> Callable[[Tensor], Tensor] | None:
    if name is not None and name not in _TRANSFORMS:
        raise ValueError(f"Expected --transform {', '.join(_TRANSFORMS)}; got {name!r}.")
    return None if name is None else _TRANSFORMS[name]


def seen(rows: Rows, transform: str | None, seed: int) -> Rows:
    """Returns the rows after the transform, as the program sees them.

    Arguments:
        rows: The rows.
        transform: The name of the transform; `None` returns the rows unchanged.
        seed: The seed of a random transform.
    """
    change = _transform(transform)
    if change is None:
        return rows
    with seeded(seed):
        return transformed(rows, change)


def latents_of(program: nn.Module, rows: Rows, seed: int) -> pd.DataFrame:
    """Returns mean and standard deviation of the latents given each row, one line a row.

    Arguments:
        program: The program.
        rows: The rows.
        seed: The seed of the draws, if the posterior has no moments in closed form.
    """
    found = embed(program, rows, seed=seed, progress=False)
    names = ["mean", "sd"] + ["mean_mcse", "sd_mcse"] * (found.attrs["method"] == "draws")
    columns = [f"{latent} {name}" for name in names for latent in found["latent"].to_numpy()]
    values = np.hstack([found[name].to_numpy() for name in names])
    return pd.DataFrame(values, pd.Index(found["datum"].to_numpy(), name="row"), columns)


@dataclass(frozen=True)
class Run:
    """A finished fit, with everything that its run folder contains.

    Arguments:
        settings: The settings of the fit.
        program: The fitted program.
        history: The history of the fit.
        rows: The held-out rows, after the transform.
        every_row: The rows for training and the held-out rows, after the transform.
        labels: The labels of the held-out rows.
        judgement: The evidence of the held-out rows and the active latent dims.
        command: The name of the command, `"fit"` or `"demo"`.
    """

    settings: Settings
    program: VAE
    history: History
    rows: Rows
    every_row: Rows
    labels: np.ndarray | None
    judgement: Judgement
    command: str

    def write(self, folder: Path, checkpoint: Path) -> None:
        """Writes all files of the run.

        Arguments:
            folder: An empty folder.
            checkpoint: The last checkpoint of the fit.
        """
        shutil.copyfile(checkpoint, folder / CHECKPOINT)
        self.history.table.to_csv(folder / HISTORY)
        if self.judgement.evidence is not None:
            self.judgement.frame().to_csv(folder / EVIDENCE)
        latents = latents_of(self.program, self.every_row, self.settings.seed)
        is_held_out = np.isin(self.every_row.labels, self.rows.labels)
        latents.assign(held_out=is_held_out).to_csv(folder / LATENTS)
        elements = max(self.program.event_shape.numel(), self.program.latent_shape.numel())
        few = self.rows[: max(1, min(MAX_ROWS, MAX_ELEMENTS // (MAX_PREDICTIVE * elements)))]
        seed = self.settings.seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tree = to_arviz(self.program, few, MAX_DRAWS, num_predictive=MAX_PREDICTIVE, seed=seed)
        tree = getattr(tree, "to_datatree", lambda: tree)()  # of ArviZ 0.23
        # made in memory, as HDF5 crashes the process if the disk is full
        (folder / POSTERIOR).write_bytes(tree.to_netcdf(engine="h5netcdf"))
        (folder / PICTURES).mkdir()
        for name, draw in self.pictures().items():
            save_picture(draw(), folder / PICTURES / f"{name}.png")
        write_json(folder / SETTINGS, self.record())
        write_program(self.program, folder)

    def pictures(self) -> dict[str, Callable[[], Any]]:
        """Returns a function for each picture that draws it, by the name of the picture."""
        program, evidence, few = self.program, self.judgement.evidence, self.rows[:MAX_POINTS]
        seed = self.settings.seed
        labels: Any = None if self.labels is None else self.labels[:MAX_POINTS]
        draw: dict[str, Callable[[], Any]] = {
            "training": lambda: plots.history(self.history),
            "reconstructions": lambda: plots.reconstructions(program, few, seed=seed),
            "prior_samples": lambda: plots.prior_samples(program, data=few, seed=seed),
            "latents": lambda: plots.latents(program, few, labels, seed=seed),
        }
        if evidence is not None:
            draw["pareto_k"] = lambda: plots.pareto_k(evidence)
        return draw

    def record(self) -> dict[str, Any]:
        """Returns the content of `fit.json`."""
        return {
            "command": self.command,
            "settings": asdict(self.settings),
            "columns": self.rows.column_names(),
            "held_out_rows": json_labels(self.rows.labels),
            "epochs": len(self.history),
            "best_epoch": self.history.best_epoch,
            "stopped": self.history.stopped,
            "converged": self.history.converged,
            "reason": self.history.reason,
            "engine": self.history.engine,
            "why": self.history.why,
        }

    def report(self, out: Path, seconds: float) -> None:
        """Prints how the fit ended, the evidence, and the paths of the files.

        Arguments:
            out: The run folder.
            seconds: The time that the run took.
        """
        console, history = Console(), self.history
        console.print(
            f"Training stopped after {len(history)} epochs ({history.stopped}); the weights are "
            f"those of epoch {history.best_epoch}. The run took {seconds:.0f} s.",
            highlight=False,
        )
        if history.converged is not True:
            console.print(history.reason.capitalize() + ".", markup=False, highlight=False)
        self.judgement.show(f"{len(self.rows)} held-out rows of {self.settings.data}")
        files = {name: out / PICTURES / f"{name}.png" for name in self.pictures()}
        for name, file in {**files, "run folder": out}.items():
            console.print(f"{name:16} {file}", soft_wrap=True, markup=False, highlight=False)


def run(settings: Settings, out: Path, *, resume: bool, overwrite: bool, command: str) -> None:
    """Fits a VAE, evaluates it, writes the run folder and prints a report.

    The checkpoint is in the folder `OUT.unfinished` until all files are written.

    Arguments:
        settings: The settings of the fit.
        out: The run folder.
        resume: Whether to continue an existing run, finished or not.
        overwrite: Whether to replace an existing run.
        command: The name of the command, `"fit"` or `"demo"`.

    Raises:
        ValueError: If a setting is invalid, or another process writes the run. Nothing is
            written in that case.
        KeyboardInterrupt: If the fit was interrupted before the end of the first epoch.
    """
    start = time.perf_counter()
    working = out.with_name(f"{out.name}.unfinished")
    checkpoint = working / CHECKPOINT
    _check_free(out, working, command, replaced=resume or overwrite)
    data = Data.of(settings)
    program = _program(settings, data.train)
    for part in (data.train, data.test):
        program.check(seen(part, settings.transform, settings.seed))
    elbo = member(settings.elbo, "ELBO")
    share = settings.validation
    share = int(share) if share is not None and share >= 1 and share.is_integer() else share
    working.parent.mkdir(parents=True, exist_ok=True)
    with locked(working, wait=0.0):
        _check_free(out, working, command, replaced=resume or overwrite)
        if data.note:
            Console().print(f"{settings.data}: {data.note}.", markup=False, highlight=False)
        if not resume:
            shutil.rmtree(working, ignore_errors=True)
        elif not checkpoint.exists() and (out / CHECKPOINT).exists():
            with new_file(checkpoint) as beside:
                shutil.copyfile(out / CHECKPOINT, beside)
        history = fit(
            program,
            data.train,
            validation="auto" if share is None else share or None,
            elbo=elbo,
            transform=_transform(settings.transform),
            batch_size=settings.batch_size,
            engine=settings.engine,
            precision=settings.precision,
            lr=settings.lr,
            weight_prior=settings.weight_prior or None,
            max_steps=settings.max_steps,
            max_epochs=settings.max_epochs,
            seed=settings.seed,
            device=settings.device,
            checkpoint=checkpoint,
            resume=resume,
        )
        if not len(history):
            shutil.rmtree(working)
            raise KeyboardInterrupt
        rows, every_row = (
            seen(part, settings.transform, settings.seed) for part in (data.test, data.rows)
        )
        draws = settings.num_samples, settings.seed
        judgement = Judgement.of(program, rows, *draws, refine=settings.refine, has_checks=True)
        run = Run(settings, program, history, rows, every_row, data.labels, judgement, command)
        with new_folder(out, overwrite=resume or overwrite) as folder:
            run.write(folder, checkpoint)
        shutil.rmtree(working)
    run.report(out, time.perf_counter() - start)


def _check_free(out: Path, working: Path, command: str, *, replaced: bool) -> None:
    """Protects existing runs unless they are to be replaced, and all folders that are no run."""
    for path in (out, working):
        if not path.exists():
            continue
        if not replaced:
            options = "--out, or use --resume or --overwrite" if command == "fit" else "--out"
            raise ValueError(f"{path} already exists. Choose another {options}.")
        foreign = [] if path.is_dir() else [path.name]
        for file in path.rglob("*"):
            is_picture = file.suffix == ".png" and file.parent == path / PICTURES
            is_ours = is_picture or file.name in OURS or is_temporary(file, OURS)
            if file.is_file() and not is_ours:
                foreign.append(str(file.relative_to(path)))
        if foreign:
            raise ValueError(
                f"{path} is not replaced, because it contains {foreign[0]!r}, which is no file of "
                "a run. Choose another --out."
            )


def settings_of(folder: Path) -> dict[str, Any]:
    """Returns the content of `fit.json` of a run folder; empty if there is no such file.

    Arguments:
        folder: The folder.

    Raises:
        ValueError: If the file holds something else.
    """
    file = standing(folder) / SETTINGS
    if not file.exists():
        return {}
    content = {"settings": {}, "columns": None, "held_out_rows": [], **read_json(file)}
    content = {"converged": None, "reason": "", **content}
    match content:
        case {
            "settings": dict(given),
            "columns": list() | None as columns,
            "held_out_rows": list(),
            "converged": bool() | None,
            "reason": str(),
        }:
            names = [name for name in ("transform", *LOADING) if name != "header"]
            texts = [given.get("data", ""), *(given.get(name) or "" for name in names)]
            texts += columns or []
            if all(isinstance(text, str) and "\0" not in text for text in texts):
                return content
    raise ValueError(f"Expected {file} to hold the settings of a run; got others.")


def save_picture(figure: Any, path: Path) -> None:
    """Writes a figure to a file.

    Arguments:
        figure: The figure.
        path: The file.
    """
    figure.savefig(path, dpi=120)
