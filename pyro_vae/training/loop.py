"""The run of a fit, from epoch to epoch."""

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import pandas as pd
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from ..data.rows import PLATE, Rows
from ..data.source import Row
from ..elbos import Estimator
from ..elbos.log_densities import Structure, programs_of, row_terms_of
from ..engine.progress import is_watched
from ..engine.running import evaluating, kept_modes, local_parameters, seeded, unvalidated
from .callbacks import Callback
from .checkpoint import Identity, Saved, State, call_of
from .history import History, NonFiniteError, Record
from .settings import Settings
from .svi import SVI, Totals

__all__ = ["Loop", "Split", "Transform"]

Transform: TypeAlias = Callable[[Any], Any]

MAY_CHANGE = ("max_epochs", "max_seconds", "patience")


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of a fit.

    Arguments:
        train: The rows it trains on.
        held_out: The rows it validates on, if any.
        transform: What is applied to each minibatch.
        structure: The sites and plates of the program.
    """

    train: Rows
    held_out: Rows | None
    transform: Transform
    structure: Structure

    @property
    def are_rows_scaled(self) -> bool:
        """Whether rows count N / B times in a minibatch, as there are sites outside the plate."""
        known = self.structure
        return bool(known.global_latents or known.global_observed) and not known.is_subsampled

    def to(self, device: torch.device) -> "Split":
        """Moves the rows to a device, as far as they fit into half of its free memory.

        Arguments:
            device: The device.
        """
        held_out = None if self.held_out is None else _placed(self.held_out, device)
        return Split(_placed(self.train, device), held_out, self.transform, self.structure)


class Loop:
    """The epochs of a fit: it trains, validates, keeps the best weights and writes checkpoints.

    Arguments:
        state: The state between two epochs, which the loop advances.
        svi: What takes the steps.
        split: The rows.
        settings: The settings.
        device: The device.
        callback: The user's callbacks, as one.
        path: The checkpoint, if one is written.
    """

    def __init__(
        self,
        state: State,
        svi: SVI,
        split: Split,
        settings: Settings,
        device: torch.device,
        callback: Callback,
        path: Path | None,
    ) -> None:
        self.state, self.svi, self.split, self.settings = state, svi, split, settings
        self.device, self.callback, self.path = device, callback, path
        self.identity = {} if path is None else self._identity()
        self.steps = len(_batches(torch.arange(len(split.train)), settings.batch_size))
        self.scaled = _ScaledRows(active=split.are_rows_scaled)
        self.kl_weight = torch.ones((), device=device)
        elbo = svi.objective.elbo
        if math.isinf(elbo.max_plate_nesting):  # or Pyro finds it by a run that draws
            has_particles = elbo.vectorize_particles and elbo.num_particles > 1
            elbo.max_plate_nesting = split.structure.max_plate_nesting + int(has_particles)
        if settings.warmup:
            svi.objective.weigh_kl(self.kl_weight)

    def run(self, saved: Saved | None, *, progress: bool) -> History:
        """Runs the epochs that are left, and gives the program its final weights.

        Arguments:
            saved: The checkpoint to go on from, if any.
            progress: Whether to show a progress bar, on a terminal or in a notebook.
        """
        state = self.state
        if saved is not None:
            state.restore(saved, self.identity, self.device)
        if self.path is not None and not state.records:
            state.write(self.path, self.identity)
        state.program.to(self.device)
        self.svi.to(self.device)
        self.split = self.split.to(self.device)
        bar = tqdm(
            total=self.settings.max_epochs,
            initial=len(state.records),
            unit="epoch",
            disable=not (progress and is_watched()),
        )
        self.svi.before_compiling = functools.partial(bar.set_postfix_str, "compiling a step")
        with bar, kept_modes(state.program), _interrupts() as interrupted:
            self.callback.on_start(state.program, self.settings)
            stopped = self._epochs(bar, interrupted)
        if state.best is None:
            state.best_epoch = len(state.records)
        else:
            state.program.load_state_dict(state.best)
        history = self._history(stopped)
        with kept_modes(state.program):
            self.callback.on_end(history)
        return history

    def _epochs(self, bar: "tqdm[Any]", interrupted: threading.Event) -> str:
        """Runs epochs until there is a reason to stop, and returns it."""
        while (reason := self._reason_to_stop()) is None:
            record = self._epoch(interrupted)
            if record is None:
                return "interrupted"
            shown = [name for name in ("elbo", "validation_elbo") if name in record]
            bar.set_postfix({name: f"{record[name]:.2f}" for name in shown})
            bar.update()
            if self.callback.on_epoch({"epoch": len(self.state.records), **record}):
                return "callback"
        return reason

    def _reason_to_stop(self) -> str | None:
        state, settings, done = self.state, self.settings, len(self.state.records)
        if done >= settings.max_epochs:
            return "max_epochs"
        if state.best is not None and settings.patience is not None:
            if done - state.best_epoch >= settings.patience:
                return "patience"
        if settings.max_seconds is not None:
            if sum(record["seconds"] for record in state.records) >= settings.max_seconds:
                return "max_seconds"
        return None

    def _epoch(self, interrupted: threading.Event) -> Record | None:
        """Trains and validates once, and returns the epoch's numbers; `None` if interrupted."""
        start = time.perf_counter()
        split, state = self.split, self.state
        if not self._train(interrupted):
            return None
        record = self.svi.totals.summary(len(split.train), len(split.train))
        if split.held_out is not None:
            held_out = self._validate(split.held_out).summary(
                len(split.held_out), len(split.train)
            )
            record |= {f"validation_{name}": value for name, value in held_out.items()}
        if self.settings.warmup:
            record["kl_weight"] = float(self.kl_weight)
        record["seconds"] = time.perf_counter() - start
        if state.schedule is not None:
            state.schedule.step()
        state.records.append(record)
        self._keep_best(record)
        if self.path is not None:
            state.write(self.path, self.identity)
        return record

    def _train(self, interrupted: threading.Event) -> bool:
        """Takes the steps of an epoch; returns whether it was not interrupted."""
        svi, rows, batch_size = self.svi, self.split.train, self.settings.batch_size
        svi.totals.sums.zero_()
        svi.good.zero_()
        order = torch.randperm(len(rows), device=rows.device)
        batches = _batches(order, batch_size)
        program = self.state.program
        program.train()
        with unvalidated(), local_parameters(program), self.scaled:
            for step, index in enumerate(batches):
                if interrupted.is_set():
                    return False
                self._anneal(len(self.state.records) * self.steps + step + 1)
                svi.row_weight = self.scaled.scale_to(len(rows), len(index))
                is_last = len(index) != batch_size
                svi.total_steps = self.settings.max_epochs * (1 if is_last else self.steps)
                svi.update(self._batch(rows, index))
        if (bad := int(svi.good)) < len(batches):
            names = rows.labels[batches[bad].cpu().numpy()].tolist()
            shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
            raise NonFiniteError(
                "The loss or its gradient became NaN or infinite in epoch "
                f"{len(self.state.records) + 1}, batch {bad + 1} of {self.steps} (rows {shown}). "
                "The weights before that batch were kept. Try a smaller lr or max_grad_norm, or "
                "standardise the data.",
                self._history("not finite"),
            )
        return True

    def _anneal(self, steps: int) -> None:
        if self.settings.warmup:
            self.kl_weight.fill_(min(1.0, steps / (self.settings.warmup * self.steps)))
        self.svi.objective.at_step(steps - 1)

    def _validate(self, rows: Rows) -> Totals:
        totals, program = Totals().to(self.device), self.state.program
        with evaluating(program), seeded(self.state.split_seed):
            for chunk in rows.chunks(max(self.settings.batch_size, 1024)):
                totals.add(row_terms_of(*programs_of(program), self._batch(chunk, slice(None))))
        return totals

    def _batch(self, rows: Rows, index: slice | Tensor) -> Row:
        data = rows.select(index)
        if rows.device != self.device:
            data = Rows(data, rows.labels, rows.columns).to(self.device).x
        return self.split.transform(data)

    def _keep_best(self, record: Record) -> None:
        state, epoch = self.state, len(self.state.records)
        if self.split.held_out is None:
            state.best_epoch = epoch
        elif epoch > self.settings.warmup:
            best = -math.inf
            if state.best is not None:
                best = state.records[state.best_epoch - 1]["validation_elbo"]
            if state.best is None or math.isnan(best) or record["validation_elbo"] > best:
                state.best_epoch = epoch
                state.best = {k: v.clone() for k, v in state.program.state_dict().items()}

    def _history(self, stopped: str) -> History:
        records = self.state.records
        epochs = pd.RangeIndex(1, len(records) + 1, name="epoch")
        table, seed = pd.DataFrame(records, index=epochs), self.settings.seed
        return History(table, self.state.best_epoch, stopped, seed, self.svi.engine, self.svi.why)

    def _identity(self) -> Identity:
        """What must be the same for a fit to go on from a checkpoint, as it is at the start."""
        asked = {k: v for k, v in asdict(self.settings).items() if k not in MAY_CHANGE}
        elbo, state, split = self.svi.objective.elbo, self.state, self.split
        schedule, transform = state.schedule, split.transform
        names = ("num_particles", "vectorize_particles")
        is_ours = isinstance(elbo, Estimator)
        return asked | {
            "rows": split.train.digest()[:16],
            "validation": None if split.held_out is None else split.held_out.digest()[:16],
            "transform": getattr(transform, "__qualname__", type(transform).__name__),
            "elbo": repr(elbo) if is_ours else call_of(elbo, {k: getattr(elbo, k) for k in names}),
            "optimizer": call_of(state.optimizer, state.optimizer.defaults),
            "schedule": schedule and call_of(schedule, schedule.state_dict()),
            "number of trained tensors": len(self.svi.parameters),
        }


def _batches(order: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cuts the rows into batches.

    A last batch of one row, which batch normalisation refuses, is joined to the batch before it.
    """
    batches = order.split(size)
    if len(batches) > 1 and len(batches[-1]) == 1:
        return (*batches[:-2], torch.cat(batches[-2:]))
    return batches


def _placed(rows: Rows, device: torch.device) -> Rows:
    if device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in rows.fields.values())
        if size > torch.cuda.mem_get_info(device)[0] / 2:
            return rows.to("cpu")
    return rows.to(device)


class _ScaledRows(Messenger):
    """Effect handler that scales the sites of the rows by N / B, if there are global sites."""

    def __init__(self, *, active: bool) -> None:
        super().__init__()
        self.active, self.scale = active, 1.0

    def scale_to(self, num_rows: int, batch_size: int) -> float:
        """Sets the scale to N / B, and returns it."""
        self.scale = num_rows / batch_size if self.active else 1.0
        return self.scale

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if self.active and any(frame.name == PLATE for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one raises KeyboardInterrupt as usual."""
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (None, signal.SIG_IGN):
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
