"""The run of a fit, from epoch to epoch."""

import contextlib
import functools
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent
from tqdm import tqdm

from ..data.cells import place_name
from ..data.checks import warn_user
from ..data.read import read, transformed
from ..data.rows import PLATE, Rows
from ..data.source import Row
from ..data.table import Table
from ..distributions.units import Affine
from ..elbos import Estimator
from ..elbos.log_densities import Structure, programs_of
from ..engine.progress import is_watched
from ..engine.row_noise import row_digests
from ..engine.running import evaluating, kept_modes, local_parameters, seeded, unvalidated
from ..programs.saving import described
from ..programs.vae import VAE
from .callbacks import Callback
from .checkpoint import Identity, Saved, State, call_of, callable_of
from .convergence import DEAD, Check, Convergence
from .history import History, NonFiniteError, Record
from .settings import Settings
from .svi import SVI, Totals, mean_terms

__all__ = ["Loop", "Split", "Transform"]

Transform: TypeAlias = Callable[[Any], Any]

MAY_CHANGE = ("max_steps", "max_epochs", "max_seconds")
AVERAGED = 5.0  # the exponent of polynomial-decay averaging (Shamir & Zhang, 2013)
DRAWS = 16  # of each row in a check
NONE = np.zeros(0, dtype=np.uint64)  # digests of rows, before the first fit
CHECKED = 4096  # training rows in a check, if no rows are held out


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

    @property
    def checked(self) -> Rows:
        """The rows on which the weights are checked."""
        every = math.ceil(len(self.train) / CHECKED)
        return self.train[::every] if self.held_out is None else self.held_out

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
        self.is_fresh = isinstance(state.program, VAE) and not state.program.is_initialized
        self.steps = len(_batches(torch.arange(len(split.train)), settings.batch_size))
        self.scaled = _ScaledRows(active=split.are_rows_scaled)
        self.kl_weight = torch.ones((), device=device)
        self.convergence = Convergence(is_held_out=split.held_out is not None)
        self.parameters = [p for p in state.program.parameters() if p.requires_grad]
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
            state.restore(saved, self.identity, self.device, len(self.split.checked))
            self.convergence.restore(saved.part("check", "cpu"))
        self._prepare()
        if self.path is not None and not state.records:
            state.write(self.path, self.identity)
        state.program.to(self.device)
        self.svi.to(self.device)
        self.split = self.split.to(self.device)
        if not state.average:
            state.average = [p.detach().clone() for p in self.parameters]
        bar = tqdm(
            total=self._most_epochs(),
            initial=len(state.records),
            unit="epoch",
            disable=not (progress and is_watched()),
        )
        self.svi.before_compiling = functools.partial(bar.set_postfix_str, "compiling a step")
        is_compiling = functools.partial(getattr, self.svi, "is_compiling")
        with bar, kept_modes(state.program), _interrupts(is_compiling) as interrupted:
            self.callback.on_start(state.program, self.settings)
            stopped = self._epochs(bar, interrupted)
            checks, done = self.convergence.checks, len(state.records)
            if done and stopped != "interrupted" and (not checks or checks[-1].epoch < done):
                state.records[-1] |= self._check(done)
        if state.best is not None:
            state.program.load_state_dict(state.best)
        elif not state.records:
            state.best_epoch = 0
        else:
            state.best_epoch = len(state.records)
            if self.settings.averaged:
                self._exchange(state.average)
        history = self._history(stopped)
        if isinstance(state.program, VAE):
            state.program.verdict = (history.converged, history.reason)
        with kept_modes(state.program):
            self.callback.on_end(history)
        return history

    def _prepare(self) -> None:
        """Keeps names of columns and digests of rows; a VAE learns its units, and gets a prior."""
        rows, settings, vae = self.split.train, self.settings, self.state.program
        with seeded(self.state.split_seed):
            few = read(self.split.transform(rows.head(2, vae)), check=False)
        new, old = few.event_shapes(), rows.event_shapes()
        names = {k: v for k, v in rows.names().items() if new.get(k) == old[k]}
        vars(vae).setdefault("fitted_columns", {}).update(names)
        is_changed = few.digest() != read(rows.head(2, vae), check=False).digest()
        known = None if is_changed else vars(vae).get("fitted_rows", NONE)
        if known is not None:
            parts = [rows] if self.split.held_out is None else [rows, self.split.held_out]
            digests = np.concatenate([row_digests(part) for part in parts])
            known = np.concatenate([known[~np.isin(known, digests)], digests])
        vars(vae)["fitted_rows"] = known  # None: not known
        if not isinstance(vae, VAE):
            return
        if not vae.is_initialized:
            with seeded(self.state.split_seed):
                vae.initialize(transformed(rows, self.split.transform, vae))
        if settings.weight_prior is not None:
            strength = 1.0 / (len(rows) * settings.weight_prior**2)
            self.svi.pull(vae.network_weights(), strength)

    def _epochs(self, bar: "tqdm[Any]", interrupted: threading.Event) -> str:
        """Runs epochs until there is a reason to stop, and returns it."""
        shown: dict[str, str] = {}
        while (reason := self._reason_to_stop()) is None:
            record = self._epoch(interrupted)
            if record is None:
                return "interrupted"
            found = {name: record.get(name, math.nan) for name in ("elbo", "validation_elbo")}
            shown |= {name: f"{v:.2f}" for name, v in found.items() if math.isfinite(v)}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if self.callback.on_epoch({"epoch": len(self.state.records), **record}):
                return "callback"
        return reason

    def _most_epochs(self) -> int | None:
        """The number of epochs after which a limit of steps or epochs is reached, if any."""
        settings = self.settings
        limits = [] if settings.max_epochs is None else [settings.max_epochs]
        if settings.max_steps is not None:
            limits.append(max(math.ceil(settings.max_steps / self.steps), 1))
        return min(limits, default=None)

    def _reason_to_stop(self) -> str | None:
        state, settings, done = self.state, self.settings, len(self.state.records)
        verdict = self.convergence.verdict() if settings.until_converged else None
        if verdict is not None:
            return "converged" if verdict[0] else "no gain"
        if settings.max_epochs is not None and done >= settings.max_epochs:
            return "max_epochs"
        most = self._most_epochs()
        if most is not None and done >= most:
            return "max_steps"
        if settings.max_seconds is not None:
            if sum(record["seconds"] for record in state.records) >= settings.max_seconds:
                return "max_seconds"
        return None

    def _epoch(self, interrupted: threading.Event) -> Record | None:
        """Trains once, checks if it is due, and returns the numbers; `None` if interrupted."""
        start = time.perf_counter()
        split, state = self.split, self.state
        if not self._train(interrupted):
            return None
        record = self.svi.totals.summary(len(split.train), len(split.train))
        epoch = len(state.records) + 1
        if epoch > self.settings.warmup and self.convergence.is_due(epoch * self.steps):
            record |= self._check(epoch)
        elif split.held_out is not None:
            record |= {f"validation_{name}": math.nan for name in record}
        if self.settings.warmup:
            record["kl_weight"] = float(self.kl_weight)
        record["seconds"] = time.perf_counter() - start
        if state.schedule is not None:
            state.schedule.step()
        state.records.append(record)
        if self.path is not None:
            state.write(self.path, self.identity, self.convergence.tensors())
        return record

    def _check(self, epoch: int) -> Record:
        """Scores rows at the averaged weights, keeps the weights if they are the best."""
        split, state, averaged = self.split, self.state, self.settings.averaged
        rows = split.checked
        trained = self._exchange(state.average) if averaged else []
        scores, totals = self._scores(rows)
        found = totals.summary(len(rows), len(split.train))
        kl = found["kl"] if split.structure.latents else math.nan
        record: Record = {}
        if split.held_out is not None:
            record = {f"validation_{name}": value for name, value in found.items()}
        check = Check(epoch * self.steps, epoch, scores, kl)
        self.convergence.checks.append(check)
        if self.convergence.best is check and split.held_out is not None:
            state.best_epoch = epoch
            state.best = {k: v.clone() for k, v in state.program.state_dict().items()}
        if averaged:
            self._exchange(trained)
        if split.held_out is None:
            state.best_epoch = epoch
        return record

    def _scores(self, rows: Rows) -> tuple[Tensor, Totals]:
        """The objective of each row, averaged over draws, and the sums of the ELBO's terms."""
        totals, program = Totals().to(self.device), self.state.program
        objective, scores = self.svi.objective, []
        weight = self.kl_weight.clone()
        self.kl_weight.fill_(1.0)
        with evaluating(program), seeded(self.state.split_seed):
            for chunk in rows.chunks(max(self.settings.batch_size, 1024)):
                batch = self._batch(chunk, slice(None))
                estimates = [objective(batch) for _ in range(DRAWS)]
                totals.add(mean_terms([estimate.terms for estimate in estimates]))
                values = [e.terms.elbo if e.per_row is None else e.per_row for e in estimates]
                total = torch.stack(values).double().sum(0)
                scores.append(total / DRAWS)
        self.kl_weight.copy_(weight)
        return torch.cat(scores).detach().to("cpu", torch.float64), totals

    @torch.no_grad()
    def _exchange(self, values: list[Tensor]) -> list[Tensor]:
        """Gives the parameters other values, and returns those that they had."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        return before

    def _train(self, interrupted: threading.Event) -> bool:
        """Takes the steps of an epoch; returns whether it was not interrupted."""
        svi, rows, batch_size = self.svi, self.split.train, self.settings.batch_size
        svi.totals.sums.zero_()
        svi.good.zero_()
        order = torch.randperm(len(rows), device=rows.device)
        batches = _batches(order, batch_size)
        program, epochs = self.state.program, self._most_epochs()
        program.train()
        with unvalidated(), local_parameters(program), self.scaled:
            for step, index in enumerate(batches):
                if interrupted.is_set():
                    return False
                self._anneal(len(self.state.records) * self.steps + step + 1)
                svi.row_weight = self.scaled.scale_to(len(rows), len(index))
                of_an_epoch = self.steps if len(index) == batch_size else 1
                svi.total_steps = None if epochs is None else epochs * of_an_epoch
                try:
                    svi.update(self._batch(rows, index))
                except _CompilingInterrupted:
                    return False
                self._average(len(self.state.records) * self.steps + step + 1)
        if (bad := int(svi.good)) < len(batches):
            self._recover(bad, rows, batches[bad])
            return self._train(interrupted)
        return True

    @torch.no_grad()
    def _average(self, steps: int) -> None:
        """Moves the averages of the weights towards the weights, without waiting for a device."""
        if self.settings.averaged:
            share = (1.0 + AVERAGED) / (steps + AVERAGED)
            torch._foreach_lerp_(self.state.average, list[Tensor](self.parameters), share)

    def _recover(self, bad: int, rows: Rows, index: Tensor) -> None:
        """Halves the learning rate after a step that was not finite; the second time it stops."""
        names = rows.labels[index.cpu().numpy()].tolist()
        shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        cause = self._autopsy(rows, index)
        what = (
            "The loss or its gradient became NaN or infinite in epoch "
            f"{len(self.state.records) + 1}, batch {bad + 1} of {self.steps} (rows {shown}). "
            f"{cause}The weights before that batch were kept."
        )
        if self.state.has_recovered:
            raise NonFiniteError(
                f"{what} Try a smaller lr or max_grad_norm, or look at those rows.",
                self._history("not finite"),
            )
        self.state.has_recovered = True
        for group in self.svi.optimizer.param_groups:
            group["lr"] = group["lr"] / 2.0
        self.svi.forgive()
        warn_user(f"{what} The learning rate was halved, and the fit goes on.")

    def _autopsy(self, rows: Rows, index: Tensor) -> str:
        """Names the site, row, column and value at which a log-density is not finite."""
        batch, program = self._batch(rows, index), self.state.program
        names = rows.labels[index.cpu().numpy()]
        with evaluating(program), seeded(self.state.split_seed), unvalidated():
            try:
                model, guide = programs_of(program)
                drawn = poutine.trace(guide).get_trace(batch)
                traces = (drawn, poutine.trace(poutine.replay(model, drawn)).get_trace(batch))
            except (ValueError, RuntimeError) as error:
                return f"At these rows the program fails: {error} "
            for name, site in itertools.chain(*(trace.nodes.items() for trace in traces)):
                if site["type"] != "sample":
                    continue
                law: Any = site["fn"]
                value: Any = site["value"]
                while isinstance(law, Independent | Affine) and law.event_shape:
                    law = law.base_dist
                scores = law.log_prob(value)
                bad = (~scores.isfinite()).nonzero()
                if len(bad):
                    cell = tuple(bad[0].tolist())
                    row, *place = cell
                    columns = rows.columns.get(name, ())
                    at = f", {place_name(place, scores.shape[1:], columns)}" if place else ""
                    number = value[cell]
                    shown = f"{number.item():.6g}" if number.ndim == 0 else "a vector"
                    return (
                        f"The log-density of {name!r} is {scores[cell].item()} in row "
                        f"{names[row]}{at}, at the value {shown}. "
                    )
        return "The log-densities of the rows are finite at other draws. "

    def _anneal(self, steps: int) -> None:
        if self.settings.warmup:
            self.kl_weight.fill_(min(1.0, steps / (self.settings.warmup * self.steps)))
        self.svi.objective.at_step(steps - 1)

    def _batch(self, rows: Rows, index: slice | Tensor) -> Row:
        data = rows.select(index)
        if rows.device != self.device:
            data = Rows(data, rows.labels, rows.columns).to(self.device).x
        return self.split.transform(data)

    def _history(self, stopped: str) -> History:
        records = self.state.records
        epochs = pd.RangeIndex(1, len(records) + 1, name="epoch")
        table, seed = Table(records, index=epochs), self.settings.seed
        converged, reason = self._conclusion(stopped)
        if stopped == "converged" and not converged:
            stopped = "no gain"
        return History(
            table,
            self.state.best_epoch,
            stopped,
            seed,
            self.svi.engine,
            self.svi.why,
            converged=converged,
            reason=reason,
        )

    def _conclusion(self, stopped: str) -> tuple[bool | None, str]:
        """Whether the fit has converged, and why, in words."""
        verdict, checks = self.convergence.verdict(), self.convergence.checks
        if verdict is not None:
            converged, reason = verdict
            if checks[-1].kl < DEAD:
                reason += "; all latents have collapsed to the prior"
            if bounds := self._bounds():
                reason += bounds
                converged = None if "without a bound" in bounds else converged
            return converged, reason
        limit = f"stopped by {stopped}"
        rise, error = self.convergence.rise()
        if math.isnan(rise):
            return None, f"{limit} before convergence could be judged{self._bounds()}"
        what = "held-out rows" if self.convergence.is_held_out else "the training rows"
        verb = "still gained" if rise > 0.0 else "changed by"
        moving = f"{what} {verb} {rise:.2g} +- {error:.1g} nats per row and 1000 steps at the end"
        return (False if rise > 0.0 else None), f"{limit}: {moving}{self._bounds()}"

    def _bounds(self) -> str:
        """Says of which columns the density has no bound, or is at its bound."""
        vae = self.state.program
        if not isinstance(vae, VAE):
            return ""
        said = ""
        if at_bound := vae.columns_at_bound():
            columns = "column" if len(at_bound) == 1 else "columns"
            said = f"; the scale of {columns} {self.split.train.listed(at_bound)} is at its bound"
        if vae.degenerate.keys() & {"duplicated", "collinear"}:
            said += "; duplicated or collinear columns have a density without a bound"
        return said

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
            **callable_of(transform),
            "program": described(state.program),
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


class _CompilingInterrupted(KeyboardInterrupt):
    """The first Ctrl-C of a fit, while it compiles a step."""


@contextlib.contextmanager
def _interrupts(is_compiling: Callable[[], bool]) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one raises KeyboardInterrupt as usual.

    The first one also ends a compilation, which takes longer than a user waits.
    """
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (None, signal.SIG_IGN):
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)
        if is_compiling():
            raise _CompilingInterrupted

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
