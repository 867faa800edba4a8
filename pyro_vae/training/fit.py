"""fit: trains a program by stochastic variational inference."""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import pyro.infer
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..data.files import PathLike
from ..data.read import check_rows, read
from ..data.rows import Rows
from ..data.source import Row
from ..data.split import split
from ..elbos import Objective, Trace_ELBO
from ..elbos.log_densities import (
    PROGRAM_ERRORS,
    Structure,
    check_particles,
    programs_of,
    structure,
)
from ..engine.running import device_of, evaluating, kept_generators, seeded
from .callbacks import Callbacks, callback_of
from .checkpoint import State, checkpoint_path, read_checkpoint
from .history import History
from .loop import Loop, Split, Transform
from .settings import Settings
from .svi import SVI, MakeOptimizer

__all__ = ["Transform", "fit"]

MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]


def fit(
    program: nn.Module,
    x: Any,
    *,
    context: Any | None = None,
    weights: Any | None = None,
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

    Training starts from the current weights, so a second fit continues the first. With
    `validation` the fit stops after `patience` epochs without a better validation ELBO, and the
    program gets the best weights; without it nothing is held out, the fit runs to the end, and the
    program keeps the last weights. Ctrl-C ends the fit early in the same way. If a loss or its
    gradient is NaN or infinite, the fit stops with the weights before that batch. Modules return
    to the mode (training or evaluation) that they had.

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
            `context` or `weights` a dict of `"x"`, `"context"` and `"weight"`).
        elbo: The objective, of `pyro_vae.elbos` or Pyro's; by default
            `pyro_vae.elbos.Trace_ELBO()`.
        optimizer: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim`
            optimiser. As in Pyro, it gets the gradient of the objective summed over a batch.
        lr: The learning rate; `None` if the optimiser has its own.
        schedule: A function that makes a learning-rate schedule from the optimiser. The schedule
            advances once an epoch.
        batch_size: The number of rows in a minibatch. The last one of an epoch may be smaller.
        max_epochs: The largest number of passes over the rows.
        max_seconds: The training time after which the fit stops, at the end of an epoch. The time
            before a resume counts. `None` for no limit.
        patience: The number of epochs without gain after which the fit stops; `None` for no limit.
        warmup: The number of epochs in which the weight of the KL terms rises from 0 to 1. The
            history shows the ELBO with weight 1, and the best weights are those of later epochs.
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
        checkpoint: The file that the state is written to at the start and after each epoch.
        resume: Whether to go on from that file, if it exists. On a CPU the final weights equal
            those of an unbroken fit bit for bit.

    Raises:
        ValueError: If an argument or the data are refused, before anything is computed.
        FloatingPointError: If the loss or a gradient is NaN or infinite. The message names epoch,
            batch and rows; the attribute `history` holds the epochs before.

    Warns:
        UserWarning: If the program runs with one draw of each row, as in this fit, but fails with
            several, which `log_evidence` and `to_arviz` need.

    Returns:
        The history of the fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> history = fit(vae, torch.ones(64, 4), max_epochs=2, seed=0, device="cpu")
        >>> history.best_epoch, history.stopped
        (2, 'max_epochs')
    """
    settings = Settings(
        lr, batch_size, max_epochs, max_seconds, patience, warmup, max_grad_norm, seed
    )
    callback = callback_of(callbacks)
    model, guide = programs_of(program)
    target = device_of(device)
    path = checkpoint_path(checkpoint, resume=resume)
    saved = read_checkpoint(path)
    split_seed = _split_seed(seed) if saved is None else int(saved.header["split_seed"])
    rows = read(x, program, context=context, weights=weights, check=False)
    parts = _split(program, rows, validation, transform, split_seed)
    svi = SVI(
        model,
        guide,
        optimizer,
        Trace_ELBO() if elbo is None else elbo,
        lr=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        engine=engine,
        precision=precision,
        max_seconds=settings.max_seconds,
    )
    svi.objective.check(parts.structure)
    _check_particles(program, parts, svi.objective, split_seed)
    state = State(program, svi.optimizer, _schedule_of(schedule, svi.optimizer), split_seed)
    loop = Loop(state, svi, parts, settings, target, callback, path)
    with seeded(settings.seed):
        return loop.run(saved, progress=progress)


def _split_seed(seed: int | None) -> int:
    with kept_generators():
        return int(torch.randint(2**31, ())) if seed is None else seed


def _split(
    program: nn.Module, rows: Rows, validation: Any, transform: Transform | None, seed: int
) -> Split:
    """Holds rows out, and checks both parts as the program will see them."""
    change = _unchanged if transform is None else transform
    if not callable(change):
        raise ValueError(f"Expected a function of rows as transform; got {transform!r}.")
    train, held_out = rows, None
    if validation is not None:
        train, held_out = split(rows, validation, program, seed=seed, name="validation")
    parts = Split(train, held_out, change, _checked(program, train, change, seed))
    _check_scale(parts)
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


def _check_scale(parts: Split) -> None:
    known = parts.structure
    if parts.are_rows_scaled and known.is_scaled:
        shared = ", ".join(known.global_latents + known.global_observed)
        raise ValueError(
            "The program scales its rows (poutine.scale) and has sites outside the plate "
            f"({shared}), beside which fit scales the rows of a minibatch by N / B: both would "
            "apply. Remove the scale, or give the plate a subsample_size, which Pyro scales and "
            "fit does not."
        )


def _check_particles(program: nn.Module, parts: Split, objective: Objective, seed: int) -> None:
    """Finds programs that fail with several draws of each row: refuses them, or warns."""
    known = parts.structure
    with seeded(seed):
        few = parts.transform(parts.train.head(3, program))
        try:
            check_particles(program, few, known)
        except ValueError as error:
            if not _runs(objective, few):
                raise
            if not known.global_latents + known.global_observed:
                warnings.warn(
                    f"{error} This fit takes one draw of each row and runs, but log_evidence and "
                    "to_arviz take many draws and will fail.",
                    UserWarning,
                    stacklevel=3,
                )


def _runs(objective: Objective, row: Row) -> bool:
    try:
        with evaluating(objective.programs):
            objective(row)
    except PROGRAM_ERRORS:
        return False
    return True


def _schedule_of(make: MakeSchedule | None, optimizer: Optimizer) -> LRScheduler | None:
    if make is None:
        return None
    advice = (
        "Expected a function of the optimiser that makes a schedule whose step() takes no argument"
    )
    try:
        schedule = make(optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{advice}; got {error}") from error
    if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(f"{advice}; got {type(schedule).__name__}.")
    return schedule
