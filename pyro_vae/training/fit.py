"""fit: stochastic variational inference on a table of rows, and its history."""

import contextlib
import functools
import inspect
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pyro
import pyro.infer
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from .. import plots
from ..data.checks import checked_count, checked_positive
from ..data.files import PathLike, load_state, read_tensors, write_tensors
from ..data.read import read
from ..data.rows import PLATE, Data, Rows
from ..elbos import Estimator, Trace_ELBO
from ..elbos.log_densities import Structure, programs_of, row_terms_of, structure
from ..engine.running import (
    device_of,
    evaluating,
    kept_generators,
    kept_modes,
    local_parameters,
    seeded,
)
from .states import (
    call_of,
    generator_states,
    joined_state,
    plain,
    set_generator_states,
    split_state,
    under,
    unplain,
)
from .svi import SVI, MakeOptimizer, Totals

__all__ = ["History", "fit"]

Transform: TypeAlias = Callable[[Any], Any]
MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """What happened in a fit, epoch by epoch.

    Arguments:
        table: Indexed by `epoch`: `elbo`, `reconstruction` and `kl`, each followed by its standard
            error over rows (`elbo_se`, `reconstruction_se`, `kl_se`), of the training rows under
            the changing weights of the epoch; the same with `validation_` of the rows held out;
            `kl_weight`, and `seconds`. In nats per row; never annealed. The errors are over rows
            and their draws of z; latents that all rows share add nothing to them.
        best_epoch: The epoch whose weights the program has. (After Ctrl-C without validation they
            have gone on from there.)
        stopped: Why the fit ended: `"max_epochs"`, `"max_seconds"`, `"patience"` or
            `"interrupted"`.
        seed: The seed of the fit.
        engine: What took its steps.
        why: Why that was chosen.
    """

    table: pd.DataFrame
    best_epoch: int
    stopped: str
    seed: int | None = None
    engine: str = "eager"
    why: str = ""

    def plot(self) -> Any:
        """Draws the training curve, and returns the matplotlib figure."""
        return plots.training(self)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        kept = self.table["elbo"].get(self.best_epoch, math.nan) if len(self) else math.nan
        return (
            f"History({len(self)} epochs, stopped={self.stopped!r}, "
            f"best_epoch={self.best_epoch}, elbo={kept:.2f})"
        )


def fit(
    program: nn.Module,
    x: Any,
    *,
    validation: float | Any | None = None,
    elbo: pyro.infer.ELBO | None = None,
    optimizer: MakeOptimizer = torch.optim.Adam,
    lr: float | None = 1e-3,
    schedule: MakeSchedule | None = None,
    batch_size: int = 128,
    max_epochs: int = 100,
    max_seconds: float | None = None,
    patience: int | None = 20,
    warmup: int = 0,
    max_grad_norm: float | None = None,
    transform: Transform | None = None,
    engine: str = "auto",
    precision: str | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    checkpoint: PathLike | None = None,
    resume: bool = False,
) -> History:
    r"""Trains a program by stochastic variational inference.

    The weights go on from where they are: a second fit continues the first. Without validation
    nothing is held out, the fit never stops early and the last weights are kept; with it the fit
    stops after `patience` epochs without gain, and the best weights are kept. Ctrl-C ends the
    epoch and returns in the same way. A loss or gradient that is not finite changes no weight: the
    fit stops with the last good ones. Modules return to the mode, training or evaluation, that
    they had.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`, whose sites of each
            row stand in a plate named `"data"`: a :class:`pyro_vae.VAE`, or one's own. Where it
            has a method `check(x)`, that is first asked to refuse rows it cannot have produced.
        x: The rows: a tensor, an array, a pandas frame, an xarray array, or a dict of them.
        validation: The share of the rows to hold out, or rows to validate on.
        elbo: The objective; `pyro_vae.elbos.Trace_ELBO()` by default. Pyro's own work too.
        optimizer: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim`
            optimiser. As in Pyro, its gradient is that of the objective's sum over a batch.
        lr: The learning rate; `None` where the optimiser has it already.
        schedule: A function of the optimiser that makes a learning-rate schedule, stepped once an
            epoch.
        batch_size: The rows of a minibatch; the last one of an epoch may be smaller.
        max_epochs: The most passes over the rows.
        max_seconds: The time after which to stop, at the end of the epoch in which it runs out:
            the history's `seconds`, summed, those before a resume too. `None` for no limit.
        patience: The epochs without gain after which to stop; `None` for never.
        warmup: The epochs in which the weight of the KL terms climbs from 0 to 1. The history
            tells the ELBO without it; the best weights are sought after it.
        max_grad_norm: Where to clip the norm of the gradient of the mean over a batch.
        transform: Applied to each minibatch on the device, `pyro_vae.datasets.binarize`, say; it
            may change the values and the shape of a row, not the number of rows.
        engine: What takes the steps, as of :class:`pyro_vae.svi.SVI`: `"eager"`, `"traced"`,
            `"compiled"`, `"cudagraph"`, or `"auto"`, which chooses by the device, the program and
            the number of steps; the history says what it chose and why.
        precision: That of float32 matrix products, while it trains; `None` leaves torch's own.
        device: Where to train; `"auto"` takes CUDA where there is one.
        seed: The seed of everything random; torch's generators are put back after the fit. With
            `None` they run on.
        progress: Whether to show a progress bar, on a terminal.
        checkpoint: A file to write the state to at the start and after each epoch.
        resume: Whether to go on from that file, where it is there; on a CPU the weights end
            equal, bit for bit, to those of an unbroken fit.

    Raises:
        ValueError: Where an argument or the data are refused, before anything is computed.
        FloatingPointError: Where the loss or a gradient is not finite; it names epoch and batch.

    Returns:
        The history of the fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> history = fit(vae, torch.ones(64, 4), max_epochs=2, seed=0, device="cpu")
        >>> history.best_epoch, history.stopped
        (2, 'max_epochs')
    """
    settings = _Settings.checked(
        lr=lr,
        batch_size=batch_size,
        max_epochs=max_epochs,
        max_seconds=max_seconds,
        patience=patience,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        seed=seed,
    )
    pair, target, change = programs_of(program), device_of(device), transform or _identity
    path = _checkpoint_path(checkpoint, resume=resume)
    saved = read_tensors(path) if path is not None and path.exists() else None
    split_seed = _split_seed(seed, saved)
    rows, held_out, known = _checked_rows(program, x, validation, change, split_seed)
    loss = Trace_ELBO() if elbo is None else elbo
    steps = functools.partial(SVI, *pair, optimizer, loss, engine=engine, precision=precision)
    svi = steps(
        lr=settings.lr, max_grad_norm=settings.max_grad_norm, max_seconds=settings.max_seconds
    )
    svi.objective.check(known)
    run = _Run(
        program=program,
        svi=svi,
        schedule=_schedule_of(schedule, svi.optimizer),
        rows=rows,
        held_out=held_out,
        structure=known,
        device=target,
        transform=change,
        settings=settings,
        split_seed=split_seed,
        path=path,
    )
    with seeded(settings.seed):
        return run.finish(saved, progress=progress)


@dataclass(frozen=True)
class _Settings:
    lr: float | None
    batch_size: int
    max_epochs: int
    max_seconds: float | None
    patience: int | None
    warmup: int
    max_grad_norm: float | None
    seed: int | None

    @classmethod
    def checked(cls, **said: Any) -> "_Settings":
        made = {name: _CHECKS[name](name, value) for name, value in said.items()}
        if made["warmup"] > made["max_epochs"]:
            raise ValueError(
                f"Expected a warm-up of at most max_epochs={made['max_epochs']}; got "
                f"{made['warmup']} epochs: the KL terms would never have their full weight."
            )
        return cls(**made)


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


_from_zero = functools.partial(checked_count, least=0)
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _or_none(checked_positive),
    "batch_size": checked_count,
    "max_epochs": checked_count,
    "max_seconds": _or_none(checked_positive),
    "patience": _or_none(checked_count),
    "warmup": _from_zero,
    "max_grad_norm": _or_none(checked_positive),
    "seed": _or_none(_from_zero),
}


@dataclass
class _Run:
    """The state of a fit between two epochs, and what takes it to the next."""

    program: nn.Module
    svi: SVI
    schedule: LRScheduler | None
    rows: Rows
    held_out: Rows | None
    structure: Structure
    device: torch.device
    transform: Transform
    settings: _Settings
    split_seed: int
    path: Path | None
    records: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_epoch: int = 0

    def __post_init__(self) -> None:
        self.kl_weight = torch.ones((), device=self.device)
        known = self.structure
        self.scaled = _ScaledRows(active=_is_shared(known) and not known.is_subsampled)
        self.steps = len(_batches(torch.arange(len(self.rows)), self.settings.batch_size))
        elbo = self.svi.objective.elbo
        if math.isinf(elbo.max_plate_nesting):  # else Pyro spends random numbers to find out
            spread = elbo.vectorize_particles and elbo.num_particles > 1
            elbo.max_plate_nesting = self.structure.max_plate_nesting + int(spread)
        if self.settings.warmup:
            self.svi.objective.weigh_kl(self.kl_weight)

    def finish(
        self, saved: tuple[dict[str, Tensor], dict[str, Any]] | None, *, progress: bool
    ) -> History:
        """Runs the epochs that are left."""
        if saved is not None:
            self.restore(*saved)
        if self.path is not None and not self.records:
            self.save(self.path)
        self._move()
        stopped = "max_epochs"
        bar = tqdm(
            total=self.settings.max_epochs,
            initial=len(self.records),
            unit="epoch",
            disable=not (progress and _is_watched()),
        )
        self.svi.before_compiling = functools.partial(bar.set_postfix_str, "compiling a step")
        with bar, kept_modes(self.program), _interrupts() as interrupted:
            while len(self.records) < self.settings.max_epochs:
                if self._is_out_of_patience():
                    stopped = "patience"
                    break
                if self._is_out_of_time():
                    stopped = "max_seconds"
                    break
                if not self._epoch(interrupted):
                    stopped = "interrupted"
                    break
                bar.set_postfix(self._shown())
                bar.update()
        if self.best is None:
            self.best_epoch = len(self.records)
        else:
            self.program.load_state_dict(self.best)
        return self._history(stopped)

    def _move(self) -> None:
        self.program.to(self.device)
        self.svi.to(self.device)
        self.rows = _placed(self.rows, self.device)
        self.held_out = None if self.held_out is None else _placed(self.held_out, self.device)

    def _epoch(self, interrupted: threading.Event) -> bool:
        start = time.perf_counter()
        record = self._train(interrupted)
        if record is None:
            return False
        if self.held_out is not None:
            held_out = self._validate(self.held_out).summary(len(self.held_out), len(self.rows))
            record |= {f"validation_{name}": value for name, value in held_out.items()}
        if self.settings.warmup:
            record["kl_weight"] = float(self.kl_weight)
        record["seconds"] = time.perf_counter() - start
        if self.schedule is not None:
            self.schedule.step()
        self.records.append(record)
        self._keep_best(record)
        if self.path is not None:
            self.save(self.path)
        return True

    def _train(self, interrupted: threading.Event) -> dict[str, float] | None:
        svi, size = self.svi, len(self.rows)
        svi.totals.sums.zero_()
        svi.good.zero_()
        order = torch.randperm(size, device=self.rows.device)
        batches = _batches(order, self.settings.batch_size)
        self.program.train()
        with self._training_handlers():
            for step, index in enumerate(batches):
                if interrupted.is_set():
                    return None
                self._anneal(len(self.records) * self.steps + step + 1)
                svi.row_weight = self.scaled.scale_of(size, len(index))
                is_last = len(index) != self.settings.batch_size
                svi.total_steps = self.settings.max_epochs * (1 if is_last else self.steps)
                svi.update(self._batch(self.rows, index))
        if (bad := int(svi.good)) < len(batches):
            self._refuse(bad, self.rows.labels[batches[bad].cpu().numpy()].tolist())
        return svi.totals.summary(size, size)

    @contextlib.contextmanager
    def _training_handlers(self) -> Iterator[None]:
        with pyro.validation_enabled(False), local_parameters(self.program), self.scaled:
            yield

    def _anneal(self, steps: int) -> None:
        if self.settings.warmup:
            self.kl_weight.fill_(min(1.0, steps / (self.settings.warmup * self.steps)))
        self.svi.objective.at_step(steps - 1)

    def _validate(self, rows: Rows) -> "Totals":
        totals = Totals().to(self.device)
        pair = programs_of(self.program)
        with evaluating(self.program), seeded(self.split_seed):
            for chunk in rows.chunks(max(self.settings.batch_size, 1024)):
                batch = self._batch(chunk, slice(None))
                totals.add(row_terms_of(*pair, batch))
        return totals

    def _batch(self, rows: Rows, index: slice | Tensor) -> Data:
        data = rows.select(index)
        if rows.device != self.device:
            data = Rows(data, rows.labels, rows.columns).to(self.device).x
        return self.transform(data)

    def _keep_best(self, record: dict[str, float]) -> None:
        epoch = len(self.records)
        if self.held_out is None:
            self.best_epoch = epoch
        elif epoch > self.settings.warmup:
            best = -math.inf
            if self.best is not None:
                best = self.records[self.best_epoch - 1]["validation_elbo"]
            if self.best is None or math.isnan(best) or record["validation_elbo"] > best:
                self.best_epoch = epoch
                self.best = {k: v.clone() for k, v in self.program.state_dict().items()}

    def _is_out_of_patience(self) -> bool:
        if self.best is None or self.settings.patience is None:
            return False
        return len(self.records) - self.best_epoch >= self.settings.patience

    def _is_out_of_time(self) -> bool:
        limit = self.settings.max_seconds
        return limit is not None and sum(record["seconds"] for record in self.records) >= limit

    def _shown(self) -> dict[str, str]:
        record = self.records[-1]
        names = [name for name in ("elbo", "validation_elbo") if name in record]
        return {name: f"{record[name]:.2f}" for name in names}

    def _refuse(self, batch: int, names: list[Any]) -> None:
        said = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        error = FloatingPointError(
            f"Expected a finite loss and gradient; got others in epoch {len(self.records) + 1}, "
            f"batch {batch + 1} of {self.steps}, rows {said}. The weights are those before it. "
            "Perhaps a smaller lr, max_grad_norm, or standardised data."
        )
        error.history = self._history("not finite")  # type: ignore[attr-defined]
        raise error

    def _history(self, stopped: str) -> History:
        epochs = pd.RangeIndex(1, len(self.records) + 1, name="epoch")
        table = pd.DataFrame(self.records, index=epochs)
        said = self.svi.engine, self.svi.why
        return History(table, self.best_epoch, stopped, self.settings.seed, *said)

    def save(self, path: Path) -> None:
        """Writes all that the next epoch depends on."""
        tensors = {f"program.{k}": v for k, v in self.program.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in (self.best or {}).items()}
        state, options = split_state(self.svi.optimizer.state_dict())
        tensors |= {f"optimizer.{k}": v for k, v in state.items()}
        tensors |= {f"generator.{k}": v for k, v in generator_states().items()}
        header = {
            "kind": "checkpoint",
            "fit": self._identity,
            "records": self.records,
            "best_epoch": self.best_epoch,
            "optimizer": options,
            "schedule": None if self.schedule is None else plain(self.schedule.state_dict()),
            "split_seed": self.split_seed,
        }
        write_tensors(path, tensors, header)

    def restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Takes up the state that :meth:`save` wrote."""
        if header.get("kind") != "checkpoint":
            raise ValueError(f"Expected {self.path} to be a checkpoint; got {header.get('kind')}.")
        _check_identity(self._identity, header["fit"])
        load_state(self.program, under("program.", tensors, self.device), self.path)
        self.program.to(self.device)
        self.best = under("best.", tensors, self.device) or None
        self.best_epoch, self.records = header["best_epoch"], header["records"]
        state = under("optimizer.", tensors, self.device)
        self.svi.optimizer.load_state_dict(joined_state(state, header["optimizer"]))
        if self.schedule is not None:
            self.schedule.load_state_dict(unplain(header["schedule"]))
        set_generator_states(under("generator.", tensors, "cpu"))

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from, as it is at the start."""
        asked = {k: v for k, v in asdict(self.settings).items() if k not in _MAY_CHANGE}
        elbo, optimizer = self.svi.objective.elbo, self.svi.optimizer
        return asked | {
            "rows": self.rows.digest(),
            "validation": None if self.held_out is None else self.held_out.digest(),
            "transform": getattr(self.transform, "__qualname__", type(self.transform).__name__),
            "elbo": repr(elbo) if isinstance(elbo, Estimator) else _said_of(elbo),
            "optimizer": call_of(optimizer, optimizer.defaults),
            "schedule": self.schedule and call_of(self.schedule, self.schedule.state_dict()),
            "trained tensors": len(self.svi.parameters),
        }


def _said_of(elbo: pyro.infer.ELBO) -> str:
    names = ("num_particles", "vectorize_particles")
    return call_of(elbo, {name: getattr(elbo, name) for name in names})


_MAY_CHANGE = ("max_epochs", "max_seconds", "patience")


def _is_shared(known: Structure) -> bool:
    """Whether the program has sites that all rows share, beside which rows count N / B times."""
    return bool(known.global_latents or known.global_observed)


def _batches(order: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cuts the rows; a last one alone, which batch normalisation refuses, joins those before."""
    batches = order.split(size)
    if len(batches) > 1 and len(batches[-1]) == 1:
        return (*batches[:-2], torch.cat(batches[-2:]))
    return batches


class _ScaledRows(Messenger):  # type: ignore[misc]
    """Weighs the sites of the rows by N / B, where there are latents that all rows share."""

    def __init__(self, *, active: bool) -> None:
        super().__init__()
        self.active, self.scale = active, 1.0

    def scale_of(self, rows: int, batch: int) -> float:
        self.scale = rows / batch if self.active else 1.0
        return self.scale

    def _pyro_sample(self, msg: Any) -> None:
        if self.active and any(frame.name == PLATE for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one interrupts as ever."""
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (None, signal.SIG_IGN):
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _is_watched() -> bool:
    """Whether somebody sees a progress bar: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _identity(data: Any) -> Any:
    return data


def _checkpoint_path(checkpoint: PathLike | None, *, resume: bool) -> Path | None:
    if checkpoint is None:
        if resume:
            raise ValueError("Expected the checkpoint to resume from; got checkpoint=None.")
        return None
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(f"Expected checkpoint to be a file; got the folder {path}.")
    if path.exists() and not resume:
        raise ValueError(
            f"Expected a checkpoint that is not there yet, or resume=True; got {path}, which "
            "exists."
        )
    return path


def _split_seed(seed: int | None, saved: Any) -> int:
    if saved is not None:
        return int(saved[1].get("split_seed", 0))
    with kept_generators():
        return int(torch.randint(2**31, ())) if seed is None else seed


def _schedule_of(make: MakeSchedule | None, optimizer: Optimizer) -> LRScheduler | None:
    if make is None:
        return None
    advice = (
        "Expected a function of the optimiser that makes a schedule whose step() takes nothing"
    )
    try:
        schedule = make(optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{advice}; got {error}") from error
    if not isinstance(schedule, LRScheduler) or _needs_metric(schedule):
        raise ValueError(f"{advice}; got {type(schedule).__name__}.")
    return schedule


def _needs_metric(schedule: LRScheduler) -> bool:
    parameters = inspect.signature(schedule.step).parameters.values()
    return any(parameter.default is parameter.empty for parameter in parameters)


def _checked_rows(
    program: nn.Module, x: Any, validation: Any, transform: Transform, split_seed: int
) -> tuple[Rows, Rows | None, Structure]:
    if not callable(transform):
        raise ValueError(f"Expected a function of rows as transform; got {transform!r}.")
    rows = read(x, program, check=False)
    if validation is None:
        train, held_out = rows, None
    elif isinstance(validation, float | int) and not isinstance(validation, bool):
        train, held_out = _split(rows, validation, split_seed)
    else:
        train, held_out = rows, read(validation, program, check=False)
    known = _check(program, train, transform, split_seed)
    if _is_shared(known) and known.is_scaled and not known.is_subsampled:
        shared = ", ".join(known.global_latents + known.global_observed)
        raise ValueError(
            f"Expected rows without a scale of their own beside {shared}, which all share: fit "
            "weighs rows by N / B; got a poutine.scale. A plate with a subsample_size is weighed "
            "by Pyro, and left as it is."
        )
    if held_out is not None:
        _check_alike(train, held_out)
        _check(program, held_out, transform, split_seed)
    return train, held_out, known


def _check_alike(train: Rows, held_out: Rows) -> None:
    shapes, others = (
        {k: tuple(t.shape[1:]) for k, t in r.fields.items()} for r in (train, held_out)
    )
    if shapes != others:
        raise ValueError(
            f"Expected validation rows like those of x, event shapes {shapes}; got {others}."
        )


def _split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    if not 0.0 < share < 1.0:
        raise ValueError(f"Expected validation to be a share in (0, 1), or rows; got {share!r}.")
    if len(rows) < 2:
        raise ValueError("Expected at least 2 rows to hold some out; got 1.")
    held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    order = order.to(rows.device)
    return rows[order[held_out:].sort().values], rows[order[:held_out].sort().values]


def _check(program: nn.Module, rows: Rows, transform: Transform, seed: int) -> Structure:
    """Asks the program, where it has a `check`, about all rows as it will see them."""
    check = getattr(program, "check", None)

    def ask(piece: Rows) -> None:
        seen = transform(piece.x)
        if (count := len(read(seen, program, check=False))) != len(piece):
            raise ValueError(
                f"Expected a transform that keeps the {len(piece)} rows; got {count} from it."
            )
        if callable(check):
            check(seen)

    with seeded(seed):
        rows.ask(ask, program)
        return structure(program, transform(rows[slice(0, 2)].to_like(program).x))


def _placed(rows: Rows, device: torch.device) -> Rows:
    """Moves the rows to the device once and for all, where they fit into half of what is free."""
    if device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in rows.fields.values())
        if size > torch.cuda.mem_get_info(device)[0] / 2:
            return rows.to("cpu")
    return rows.to(device)


def _check_identity(now: dict[str, Any], then: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    changed = [name for name in now if now[name] != then.get(name)]
    if changed:
        said = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"Expected the fit that the checkpoint is of; got another: {said}.")
