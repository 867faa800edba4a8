"""fit: trains a program by stochastic variational inference."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pyro.infer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..data.checks import warn_user
from ..data.files import PathLike
from ..data.read import check_rows, on_copies, read
from ..data.rows import Rows
from ..data.source import Row
from ..data.split import split
from ..elbos import Estimator, Objective, Trace_ELBO
from ..elbos.log_densities import (
    PROGRAM_ERRORS,
    Structure,
    check_particles,
    programs_of,
    structure,
)
from ..engine.running import (
    check_gradients,
    device_of,
    evaluating,
    kept_generators,
    public,
    seeded,
)
from ..programs.vae import VAE
from .callbacks import Callbacks, callback_of
from .checkpoint import Saved, State, checkpoint_path, only_writer, read_checkpoint
from .history import History
from .loop import Loop, Split, Transform
from .settings import Settings
from .svi import SVI, MakeOptimizer

__all__ = ["Transform", "fit"]

WARMUP = 1000  # steps
SHARE, FEWEST = 0.1, 50  # of the rows of a VAE that are held out, if it has so many rows

MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]


@public
def fit(
    program: nn.Module,
    x: Any,
    *,
    context: Any | None = None,
    weights: Any | None = None,
    validation: float | Any | None = "auto",
    elbo: pyro.infer.ELBO | None = None,
    optimizer: MakeOptimizer = torch.optim.Adam,
    lr: float | None = 5e-3,
    schedule: MakeSchedule | None = None,
    batch_size: int = 128,
    max_steps: int | None = 10_000,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    warmup: int | None = None,
    weight_prior: float | None = 1.0,
    averaged: bool = True,
    until_converged: bool = True,
    refit: bool = False,
    max_grad_norm: float | None = 10.0,
    transform: Transform | None = None,
    callbacks: Callbacks = (),
    engine: str = "auto",
    precision: str | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    checkpoint: PathLike | None = None,
    resume: bool = False,
) -> History:
    r"""Trains a program by stochastic variational inference.

    A :class:`pyro_vae.VAE` learns units and a start from the training rows first, unless
    `initialize` was called before. A second fit continues the first. The program keeps the names
    of the columns as `fitted_columns`: the columns of other rows, and of `validation`, are matched
    to them by name, and columns without names are taken as they stand. It keeps a 64-bit digest of
    each row, those held out included, as `fitted_rows`, which are not saved with the program
    (`None` if there is a transform).

    The program gets averages of the weights over the last steps, weighted by polynomial decay
    (Shamir & Zhang, 2013, arXiv 1212.1824), which takes the noise of the learning rate out. They
    are checked on the rows held out, on 16 draws of each row, after numbers of steps that grow by
    the square root of 3. The fit has converged if three times as many steps brought less than 0.1
    nats per row, or if the rows held out lose, each by two standard errors. The program gets the
    weights of the best check. Without rows held out the training rows are checked, and the
    program gets the last averages. `History.converged` and `History.reason` say how the fit
    ended. Ctrl-C ends it early, and loses nothing.

    If a loss or its gradient is NaN or infinite, the weights before that batch are kept, the
    learning rate is halved once, with a warning that names the row, and the fit goes on. The
    second time it stops. Modules return to the mode (training or evaluation) that they had.

    Arguments:
        program: A module with the Pyro programs `model(row)` and `guide(row)`, whose sites of each
            row are in a plate named `"data"`: a :class:`pyro_vae.VAE`, or a program of your own.
            If it has a method `check(x)`, that is called first to refuse rows.
        x: The rows: a tensor, an array, a pandas frame, an xarray array, or a dict of them.
        context: The covariates of the rows, shape (rows, ...). The programs then get a dict with
            `"x"` and `"context"`.
        weights: The weight of each row, shape (rows,). The programs then get a dict with `"x"` and
            `"weight"`, and must use it.
        validation: The rows to validate on: the share of the rows to hold out, a number in (0, 1);
            the number of rows to hold out, an integer; or other rows, in the form of `x` (with
            `context` or `weights` a dict of `"x"`, `"context"` and `"weight"`); `None` to train
            on all rows. `"auto"` holds out a tenth of the rows for a VAE with at least 50 rows,
            and none for other programs.
        elbo: The objective, of `pyro_vae.elbos` or Pyro's; by default
            `pyro_vae.elbos.Trace_ELBO()`.
        optimizer: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim`
            optimiser. As in Pyro, it gets the gradient of the objective summed over a batch.
        lr: The learning rate; `None` if the optimiser has its own.
        schedule: A function that makes a learning-rate schedule from the optimiser. The schedule
            advances once an epoch.
        batch_size: The number of rows in a minibatch. The last one of an epoch may be smaller.
        max_steps: The largest number of steps, rounded up to whole epochs; `None` for no limit.
        max_epochs: The largest number of passes over the rows; `None` for no limit.
        max_seconds: The training time after which the fit stops, at the end of an epoch. The time
            before a resume counts. `None` for no limit.
        warmup: The number of epochs in which the weight of the KL terms rises from 0 to 1. The
            history shows the ELBO with weight 1, and the best weights are those of later epochs.
            `None` takes about 1000 steps, at most half of `max_epochs`, if this fit initialises a
            VAE, whose start is a saddle of the ELBO, and no warm-up otherwise.
        weight_prior: The standard deviation of a normal prior of the network weights of a VAE
            (`VAE.network_weights`), which the training rows count once; `None` for no prior.
            Other programs have none. The history's ELBO leaves it out.
        averaged: Whether the program gets averaged weights.
        until_converged: Whether the fit stops if it has converged; if not, it runs to its limits.
        refit: Whether the program is then trained once more from its start, on all rows of x, for
            as many steps as its best check took. The history is that of the second training, with
            `stopped`, `converged` and `reason` of the first; a checkpoint holds the first alone.
        max_grad_norm: The norm at which the gradient of the mean over a batch is clipped.
        transform: A function applied to each minibatch on the device, such as
            `pyro_vae.datasets.binarize`. It may change the values and the shape of a row, not the
            number of rows.
        callbacks: Instances of :class:`pyro_vae.Callback`, or functions that are called with the
            record of each epoch and return `True` to stop the fit.
        engine: What takes the steps, as in :class:`pyro_vae.svi.SVI`: `"eager"`, `"traced"`,
            `"compiled"`, `"cudagraph"`, or `"auto"`, which chooses by the device, the program and
            the number of steps. The history names the choice and the reason.
        precision: The precision of float32 matrix products during training; `None` for torch's
            setting.
        device: The device to train on; `"auto"` is CUDA if it is available.
        seed: The seed of everything random; torch's generators are restored after the fit. With
            `None` they go on from their state.
        progress: Whether to show a progress bar, on a terminal or in a notebook.
        checkpoint: The file that the state is written to at the start and after each epoch. Two
            fits cannot write one file at the same time.
        resume: Whether to go on from that file, if it exists. On a CPU the final weights equal
            those of an unbroken fit bit for bit. Settings, rows, members with their arguments, and
            the classes and `extra_repr()` of your own modules must be the same. The code of your
            own classes, and what a transform refers to, are not compared.

    Raises:
        ValueError: If an argument or the data are refused, before anything is computed.
        FloatingPointError: If the loss or a gradient is NaN or infinite for the second time. The
            message names epoch, batch and rows; the attribute `history` holds the epochs before.

    Warns:
        UserWarning: If the program runs with one draw of each row, as in this fit, but fails with
            several, which `log_evidence` and `to_arviz` need.

    Returns:
        The history of the fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> history = fit(vae, torch.ones(64, 4), max_epochs=2, seed=0, device="cpu")
        >>> len(history), history.stopped
        (2, 'max_epochs')
    """
    limits = (max_steps, max_epochs, max_seconds, until_converged)
    weighing = (0 if warmup is None else warmup, weight_prior, averaged)
    settings = Settings(lr, batch_size, *limits, *weighing, max_grad_norm, seed)
    pair = programs_of(program)
    check_gradients(program.parameters())
    target = device_of(device)
    saved = read_checkpoint(path := checkpoint_path(checkpoint, resume=resume))
    split_seed = _split_seed(seed) if saved is None else int(saved.header["split_seed"])
    rows = read(x, program, context=context, weights=weights, check=False)
    parts = _split(program, rows, validation, transform, split_seed)
    objective = Trace_ELBO() if elbo is None else elbo
    if warmup is None:
        settings = _warmed_up(settings, saved, program, len(parts.train), objective)
    options = {name: getattr(settings, name) for name in ("lr", "max_grad_norm", "max_seconds")}

    def loop_of(parts: Split, settings: Settings, path: Path | None = None) -> Loop:
        svi = SVI(*pair, optimizer, objective, engine=engine, precision=precision, **options)
        svi.objective.check(parts.structure)
        _check_particles(program, parts, svi.objective, split_seed)
        state = State(program, svi.optimizer, _schedule_of(schedule, svi.optimizer), split_seed)
        return Loop(state, svi, parts, settings, target, callback_of(callbacks), path)

    loop = loop_of(parts, settings, path)
    start = {name: value.clone() for name, value in program.state_dict().items()} if refit else {}
    with seeded(settings.seed), only_writer(path, saved):
        history = loop.run(saved, progress=progress)
    if refit and parts.held_out is not None and history.stopped != "interrupted":
        history = _refitted(loop, history, rows, start, loop_of, progress=progress)
    return history


def _refitted(
    first: Loop,
    history: History,
    rows: Rows,
    start: dict[str, Tensor],
    loop_of: Callable[[Split, Settings], Loop],
    *,
    progress: bool,
) -> History:
    """Trains on all rows for the steps of a fit with rows held out, whose verdict it keeps."""
    program = first.state.program
    program.load_state_dict(start, strict=False)
    if isinstance(program, VAE):
        program.is_initialized = not first.is_fresh
    settings, steps = first.settings, history.best_epoch * first.steps
    warmup = settings.warmup * first.steps / math.ceil(len(rows) / settings.batch_size)
    settings = replace(
        settings,
        max_steps=steps,
        max_epochs=None,
        max_seconds=None,
        until_converged=False,
        warmup=math.floor(warmup),
    )
    loop = loop_of(replace(first.split, train=rows, held_out=None), settings)
    with seeded(settings.seed):
        second = loop.run(None, progress=progress)
    reason = f"{history.reason}; then trained on all rows for {steps} steps"
    if isinstance(program, VAE):
        program.verdict = (history.converged, reason)
    stopped = second.stopped if second.stopped == "interrupted" else history.stopped
    return replace(second, stopped=stopped, converged=history.converged, reason=reason)


def _warmed_up(
    settings: Settings,
    saved: Saved | None,
    program: nn.Module,
    num_rows: int,
    objective: pyro.infer.ELBO,
) -> Settings:
    """Warms a fresh VAE up for about 1000 steps, at most half of the fit; or as the checkpoint."""
    if saved is not None:
        return replace(settings, warmup=int(saved.header["fit"]["warmup"]))
    if not isinstance(program, VAE) or program.is_initialized:
        return settings
    takes_weight = isinstance(objective, Estimator) and objective.takes_kl_weight
    epochs = math.ceil(WARMUP / math.ceil(num_rows / settings.batch_size)) if takes_weight else 0
    most = epochs if settings.max_epochs is None else settings.max_epochs // 2
    return replace(settings, warmup=min(epochs, most))


def _split_seed(seed: int | None) -> int:
    with kept_generators():
        return int(torch.randint(2**31, ())) if seed is None else seed


def _split(
    program: nn.Module, rows: Rows, validation: Any, transform: Transform | None, seed: int
) -> Split:
    """Holds rows out, and checks both parts as the program will see them."""
    change = _unchanged if transform is None else on_copies(transform)
    train, held_out = rows, None
    if isinstance(validation, str):
        if validation != "auto":
            raise ValueError(
                "Expected validation to be 'auto', a share in (0, 1), a number of rows, other "
                f"rows, or None; got {validation!r}."
            )
        validation = SHARE if isinstance(program, VAE) and len(rows) >= FEWEST else None
    if validation is not None:
        train, held_out = split(rows, validation, program, seed=seed, name="validation")
    parts = Split(train, held_out, change, _checked(program, train, change, seed))
    known = parts.structure
    if parts.are_rows_scaled and known.is_scaled:
        shared = ", ".join(known.global_latents + known.global_observed)
        raise ValueError(
            "The program scales its rows (poutine.scale) and has sites outside the plate "
            f"({shared}), beside which fit scales the rows of a minibatch by N / B: both would "
            "apply. Remove the scale, or give the plate a subsample_size, which Pyro scales and "
            "fit does not."
        )
    if held_out is not None:
        _checked(program, held_out, change, seed)
    return parts


def _unchanged(row: Row) -> Row:
    return row


def _checked(program: nn.Module, rows: Rows, transform: Transform, seed: int) -> Structure:
    """Lets the program refuse the rows, and returns its structure."""
    with seeded(seed):
        check_rows(program, rows, transform)
        return structure(program, transform(rows.head(2, program)))


def _check_particles(program: nn.Module, parts: Split, objective: Objective, seed: int) -> None:
    """Finds programs that fail with several draws of each row: refuses them, or warns."""
    known = parts.structure
    with seeded(seed):
        few = parts.transform(parts.train.head(3, program))
        try:
            check_particles(program, few, known)
        except ValueError as error:
            try:
                with evaluating(objective.programs):
                    objective(few)
            except PROGRAM_ERRORS:
                raise error from None
            if not known.global_latents + known.global_observed:
                warn_user(
                    f"{error} This fit takes one draw of each row and runs, but log_evidence and "
                    "to_arviz take many draws and will fail."
                )


def _schedule_of(make: MakeSchedule | None, optimizer: Optimizer) -> LRScheduler | None:
    if make is None:
        return None
    advice = (
        "Expected a function of the optimiser that makes a schedule whose step() takes no argument"
    )
    try:
        schedule = make(optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{advice}; got {error}.") from error
    if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(f"{advice}; got {type(schedule).__name__}.")
    if schedule.optimizer is not optimizer:
        raise ValueError(f"{advice}; got a schedule of another optimiser.")
    return schedule
