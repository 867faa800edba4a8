"""A run: what is asked for, the fit, and the folder that it leaves."""

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from .. import plots
from ..data import datasets
from ..data.files import new_folder, read_json, write_json
from ..data.read import read, transformed
from ..data.rows import Rows
from ..diagnostics import to_arviz
from ..engine.running import seeded
from ..networks.mlp import MLP
from ..programs.saving import write_program
from ..programs.vae import VAE
from ..training.fit import fit
from ..training.history import History
from . import specs
from .judgement import Judgement
from .members import member

__all__ = ["Settings", "is_rising", "run", "save_picture", "seen", "settings_of"]

CHECKPOINT, EVIDENCE, HISTORY = "checkpoint.safetensors", "evidence.csv", "history.csv"
SETTINGS, POSTERIOR, PICTURES = "fit.json", "posterior.nc", "pictures"
OURS = {"spec.json", "weights.safetensors", CHECKPOINT, EVIDENCE, HISTORY, SETTINGS, POSTERIOR}

MAX_DRAWS, MAX_PREDICTIVE, MAX_ROWS = 250, 25, 100
MAX_ELEMENTS = 2**20
MAX_POINTS = 2000

_TRANSFORMS: dict[str, Callable[[Any], Any]] = {"binarize": datasets.binarize}


@dataclass(frozen=True)
class Settings:
    """What a fit on the command line is asked for."""

    data: str
    likelihood: str
    prior: str | None = None
    posterior: str = "Normal"
    elbo: str = "Trace_ELBO"
    latent: int | None = None
    hidden: str = "256,256"
    activation: str = "ReLU"
    transform: str | None = None
    label: str | None = None
    key: str | None = None
    test: float = 0.2
    validation: float = 0.1
    batch_size: int = 128
    lr: float = 1e-3
    schedule: str = "constant"
    weight_decay: float = 0.0
    max_epochs: int = 200
    patience: int = 20
    num_samples: int = 1000
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"
    precision: str | None = None


@dataclass(frozen=True)
class Data:
    """The rows of a fit and those held out from it, with the labels of these."""

    train: Rows
    test: Rows
    labels: np.ndarray | None

    @classmethod
    def of(cls, ask: Settings) -> "Data":
        data = datasets.load(ask.data, label=ask.label, key=ask.key)
        numbered = replace(data, y=torch.arange(len(data)))
        share = int(ask.test) if ask.test >= 1 else ask.test
        train, test = (part.y for part in numbered.split(share, seed=ask.seed))
        rows = read(data)
        labels = None if data.y is None else np.asarray(data.y)[np.asarray(test)]
        return cls(rows[torch.as_tensor(train)], rows[torch.as_tensor(test)], labels)


def _program(ask: Settings, rows: Rows) -> VAE:
    with seeded(ask.seed):
        shown = seen(rows, ask.transform, ask.seed)
        size = 8 if ask.latent is None else ask.latent
        prior = member(ask.prior or "StandardNormal", "prior", event_shape=size, data=shown)
        shape = tuple(getattr(prior, "event_shape", ()))
        if ask.latent is not None and shape and shape != (size,):
            raise ValueError(f"Expected --latent to be the prior's size {shape}; got {size}.")
        return VAE(
            shown.event_shapes()["x"],
            prior,
            member(ask.likelihood, "likelihood"),
            member(ask.posterior, "posterior"),
            encoder=_network(ask),
            decoder=_network(ask),
        )


def _network(ask: Settings) -> MLP:
    try:
        hidden = [int(size) for size in ask.hidden.split(",") if size.strip()]
    except ValueError as error:
        raise ValueError(f"Expected --hidden as in 256,256; got {ask.hidden!r}.") from error
    known: dict[str, Any] = {name: vars(nn)[name] for name in torch.nn.modules.activation.__all__}
    if ask.activation not in known:
        hint = specs.near(ask.activation, known)
        raise ValueError(f"Expected an activation of torch.nn; got {ask.activation!r}: {hint}")
    return MLP(*hidden, activation=known[ask.activation])


def _transform(name: str | None) -> Callable[[Any], Any] | None:
    if name is not None and name not in _TRANSFORMS:
        raise ValueError(f"Expected --transform {', '.join(_TRANSFORMS)}; got {name!r}.")
    return None if name is None else _TRANSFORMS[name]


def _schedule(ask: Settings) -> Callable[[Any], Any] | None:
    if ask.schedule not in ("constant", "cosine"):
        raise ValueError(f"Expected --schedule constant or cosine; got {ask.schedule!r}.")
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=ask.max_epochs)
    return cosine if ask.schedule == "cosine" else None


def seen(rows: Rows, transform: str | None, seed: int) -> Rows:
    """Returns the rows as the program sees them, by one draw of the transform.

    Arguments:
        rows: The rows.
        transform: Its name; `None` for none.
        seed: The seed of the draw.
    """
    change = _transform(transform)
    if change is None:
        return rows
    with seeded(seed):
        return transformed(rows, change)


@dataclass(frozen=True)
class Run:
    """A fit that is over, and all that its folder will hold.

    Arguments:
        ask: What was asked for.
        program: The fitted program.
        history: The history of the fit.
        rows: The rows held out, as the program sees them.
        labels: Their labels.
        judgement: What is known of the program on them.
        command: The command that it was asked by.
    """

    ask: Settings
    program: VAE
    history: History
    rows: Rows
    labels: np.ndarray | None
    judgement: Judgement
    command: str

    def write(self, folder: Path, checkpoint: Path) -> None:
        """Writes all files of the run.

        Arguments:
            folder: An empty folder.
            checkpoint: The file that the fit left.
        """
        shutil.copyfile(checkpoint, folder / CHECKPOINT)
        self.history.table.to_csv(folder / HISTORY)
        if self.judgement.evidence is not None:
            self.judgement.frame().to_csv(folder / EVIDENCE)
        self._write_draws(folder / POSTERIOR)
        (folder / PICTURES).mkdir()
        for name, draw in self.pictures().items():
            save_picture(draw(), folder / PICTURES / f"{name}.png")
        write_json(folder / SETTINGS, self.said())
        write_program(self.program, folder)

    def _write_draws(self, file: Path) -> None:
        few = max(1, min(MAX_ROWS, MAX_ELEMENTS // (MAX_PREDICTIVE * self._row_elements())))
        draws: dict[str, Any] = {"num_predictive": MAX_PREDICTIVE, "seed": self.ask.seed}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tree = to_arviz(self.program, self.rows[:few], MAX_DRAWS, **draws)
            tree.to_netcdf(file, engine="h5netcdf")

    def _row_elements(self) -> int:
        return max(self.program.event_shape.numel(), self.program.latent_shape.numel())

    def pictures(self) -> dict[str, Callable[[], Any]]:
        """By name, what draws each picture."""
        program, evidence, few = self.program, self.judgement.evidence, self.rows[:MAX_POINTS]
        labels: Any = None if self.labels is None else self.labels[:MAX_POINTS]
        drawn: dict[str, Callable[[], Any]] = {
            "training": lambda: plots.history(self.history),
            "reconstructions": lambda: plots.reconstructions(program, few, seed=self.ask.seed),
            "prior_samples": lambda: plots.prior_samples(program, seed=self.ask.seed),
            "latents": lambda: plots.latents(program, few, labels, seed=self.ask.seed),
        }
        if evidence is not None:
            drawn["pareto_k"] = lambda: plots.pareto_k(evidence)
        return drawn

    def said(self) -> dict[str, Any]:
        """What `fit.json` holds."""
        return {
            "command": self.command,
            "settings": asdict(self.ask),
            "columns": self.rows.column_names(),
            "held_out_rows": self.rows.labels.tolist(),
            "epochs": len(self.history),
            "best_epoch": self.history.best_epoch,
            "stopped": self.history.stopped,
            "engine": self.history.engine,
            "why": self.history.why,
        }

    def report(self, out: Path, seconds: float) -> None:
        """Prints how the fit ended, and the paths of its files.

        Arguments:
            out: The folder.
            seconds: What it took.
        """
        console = Console()
        epochs, best = len(self.history), self.history.best_epoch
        console.print(
            f"{epochs} epochs ({self.history.stopped}), weights of epoch {best}, {seconds:.0f} s",
            highlight=False,
        )
        engine, why = self.history.engine, self.history.why
        console.print(f"steps: {engine}; {why}", markup=False, highlight=False)
        if is_rising(self.history):
            said = "still rising at max_epochs: more --max-epochs, or a larger --lr"
            console.print(said, highlight=False)
        self.judgement.show(f"{len(self.rows)} rows held out from {self.ask.data}")
        for name in self.pictures():
            file = out / PICTURES / f"{name}.png"
            console.print(f"{name:16} {file}", soft_wrap=True, markup=False, highlight=False)
        console.print(f"{'run':16} {out}", soft_wrap=True, markup=False, highlight=False)


def is_rising(history: History) -> bool:
    """Says whether the ELBO gained more than its error in the last tenth of a fit.

    Arguments:
        history: The history of the fit.
    """
    epochs, best = len(history), history.best_epoch
    if history.stopped != "max_epochs" or epochs < 2 or best <= 0.95 * epochs:
        return False
    column = "validation_elbo" if "validation_elbo" in history.table else "elbo"
    elbo = history.table[column]
    before = min(epochs - max(1, epochs // 10), best - 1)
    return bool(elbo[best] - elbo[before] > history.table[f"{column}_se"][best])


def run(ask: Settings, out: Path, *, resume: bool, overwrite: bool, command: str) -> None:
    """Fits, judges and writes a run folder, and says what came out.

    The checkpoint lies in a folder beside, `OUT.unfinished`, until all is written.

    Arguments:
        ask: What is asked for.
        out: The run folder.
        resume: Whether to go on from a run that is there, finished or not.
        overwrite: Whether to replace a run that is there.
        command: The command that asks.

    Raises:
        ValueError: If a setting is refused; nothing is written then.
        KeyboardInterrupt: If the fit was interrupted before the end of the first epoch.
    """
    start = time.perf_counter()
    working = out.with_name(f"{out.name}.unfinished")
    checkpoint = working / CHECKPOINT
    _check_free(out, working, replaced=resume or overwrite)
    data = Data.of(ask)
    program = _program(ask, data.train)
    if callable(check := getattr(program, "check", None)):
        for part in (data.train, data.test):
            check(seen(part, ask.transform, ask.seed))
    if not resume:
        shutil.rmtree(working, ignore_errors=True)
    elif not checkpoint.exists() and (out / CHECKPOINT).exists():
        working.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / CHECKPOINT, checkpoint)
    history = fit(
        program,
        data.train,
        validation=ask.validation or None,
        elbo=member(ask.elbo, "ELBO"),
        transform=_transform(ask.transform),
        optimizer=partial(torch.optim.AdamW, weight_decay=ask.weight_decay),
        schedule=_schedule(ask),
        batch_size=ask.batch_size,
        engine=ask.engine,
        precision=ask.precision,
        lr=ask.lr,
        max_epochs=ask.max_epochs,
        patience=ask.patience or None,
        seed=ask.seed,
        device=ask.device,
        checkpoint=checkpoint,
        resume=resume,
    )
    if not len(history):
        shutil.rmtree(working)
        raise KeyboardInterrupt
    rows = seen(data.test, ask.transform, ask.seed)
    judgement = Judgement.of(program, rows, ask.num_samples, ask.seed)
    run = Run(ask, program, history, rows, data.labels, judgement, command)
    with new_folder(out, overwrite=resume or overwrite) as folder:
        run.write(folder, checkpoint)
    shutil.rmtree(working)
    run.report(out, time.perf_counter() - start)


def _check_free(out: Path, working: Path, *, replaced: bool) -> None:
    """Refuses to replace what is there unasked, and what is no run at all."""
    for path in (out, working):
        if not path.exists():
            continue
        if not replaced:
            raise ValueError(
                f"Expected a new run folder, or --resume or --overwrite; got {path}, which exists."
            )
        foreign = [] if path.is_dir() else [path.name]
        for file in path.rglob("*"):
            is_picture = file.suffix == ".png" and file.parent == path / PICTURES
            if file.is_file() and not is_picture and file.name not in OURS:
                foreign.append(str(file.relative_to(path)))
        if foreign:
            raise ValueError(
                f"Expected a run folder, to be replaced; got {path}, which holds {foreign[0]!r}."
            )


def settings_of(folder: Path) -> dict[str, Any]:
    """Returns the content of `fit.json` of a run folder, empty if there is no such file.

    Arguments:
        folder: The folder.
    """
    return read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}


def save_picture(figure: Any, path: Path) -> None:
    """Writes a figure to a file.

    Arguments:
        figure: The figure.
        path: The file.
    """
    figure.savefig(path, dpi=120)
