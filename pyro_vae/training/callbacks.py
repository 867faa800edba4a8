"""Callback: what a user's own code does at the start, after each epoch and at the end of a fit."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from torch import nn

from ..engine.running import kept_generators
from .history import History, Record
from .settings import Settings

__all__ = ["Callback", "Callbacks", "callback_of"]

Callbacks: TypeAlias = "Iterable[Callback | Callable[[Record], object]]"


class Callback:
    """Base of the callbacks of :func:`pyro_vae.fit`: three methods that do nothing.

    To write one, override any of them and give an instance to `fit(callbacks=[...])`. What a
    callback draws from torch's generators does not change the fit. If it raises, the fit ends
    with that error, and the last checkpoint stays.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> class Reached(pv.Callback):
        ...     def __init__(self, elbo):
        ...         self.elbo = elbo
        ...
        ...     def on_epoch(self, record):
        ...         return record["elbo"] > self.elbo
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=0)
        >>> pv.fit(vae, torch.ones(64, 4), callbacks=[Reached(-100.0)], seed=0).stopped
        'callback'
    """

    def on_start(self, program: nn.Module, settings: Settings) -> None:
        """Called before the first epoch, also of a fit that resumes from a checkpoint.

        Arguments:
            program: The program, on the device of the fit.
            settings: The settings of the fit, which cannot be changed.
        """

    def on_epoch(self, record: Record) -> object:
        """Called after each epoch, once its checkpoint is written.

        Arguments:
            record: The numbers of the epoch: `epoch`, and the columns of the history's table.

        Returns:
            `True` to stop the fit after this epoch; anything else lets it go on.
        """

    def on_end(self, history: History) -> None:
        """Called when the fit has ended and the program has its final weights.

        It is not called if the fit raises an error.

        Arguments:
            history: The history that `fit` returns.
        """


class _Function(Callback):
    """A function of the record as a callback."""

    def __init__(self, function: Callable[[Record], object]) -> None:
        self.function = function

    def on_epoch(self, record: Record) -> object:
        return self.function(record)


class _Several(Callback):
    """Calls several callbacks in turn; what they draw does not change the fit."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks

    def on_start(self, program: nn.Module, settings: Settings) -> None:
        for callback in self.callbacks:
            with kept_generators():
                callback.on_start(program, settings)

    def on_epoch(self, record: Record) -> bool:
        """Whether one of them returned `True`; a number, as from `file.write`, does not count."""
        answers = []
        for callback in self.callbacks:
            with kept_generators():
                answers.append(callback.on_epoch(dict(record)))
        return any(isinstance(answer, bool | np.bool_) and answer for answer in answers)

    def on_end(self, history: History) -> None:
        for callback in self.callbacks:
            with kept_generators():
                callback.on_end(history)


def callback_of(callbacks: Callbacks) -> Callback:
    """Returns one callback that calls several; a function is called with each epoch's record.

    Arguments:
        callbacks: A list of instances of :class:`Callback` and functions.

    Raises:
        ValueError: If it is no list, or something in it is neither.

    Example:
        >>> callback_of([print]).on_epoch({"epoch": 1, "elbo": -2.0})
        {'epoch': 1, 'elbo': -2.0}
        False
    """
    if not isinstance(callbacks, Iterable):
        raise ValueError(f"Expected callbacks to be a list; got {callbacks!r}.")
    called: list[Callback] = []
    for callback in callbacks:
        if isinstance(callback, Callback):
            called.append(callback)
        elif callable(callback) and not isinstance(callback, type):
            called.append(_Function(callback))
        else:
            raise ValueError(
                "Expected each callback to be an instance of a subclass of pyro_vae.Callback, or "
                f"a function of an epoch's record; got {callback!r}."
            )
    return _Several(called)
