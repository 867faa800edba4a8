"""What an estimator of the ELBO gives, and the module that a pair of programs makes with it."""

import copy
from abc import abstractmethod
from typing import Any, NamedTuple

import pyro.infer
import torch
from torch import Tensor, nn

from ..contexts import kept_buffers, kept_generators
from ..importance import Program, RowTerms, row_terms_of

__all__ = ["Estimate", "Estimator", "Objective"]


class Estimate(NamedTuple):
    """One estimate of an objective, every number on the device.

    Arguments:
        loss: Minus the objective, summed over rows, in nats; its gradient is the estimator's.
        per_row: The objective of each row, shape (rows,), in nats, without a scale that all rows
            share; `None` where there are latents that all rows share.
        terms: The terms of the ELBO of each row, as they are without annealing.
    """

    loss: Tensor
    per_row: Tensor | None
    terms: RowTerms


class Estimator(pyro.infer.ELBO):  # type: ignore[misc]
    r"""The base of the estimators: an ELBO of Pyro's that never asks the device for a number.

    Usable with `pyro.infer.SVI`, in :func:`pyro_vae.fit`, and as a module,
    `elbo(model, guide)(x)`, which owns the parameters of the programs' modules. As in Pyro, the
    loss is minus the objective, summed over the rows.

    To add one, subclass it and write `estimate`.
    """

    @abstractmethod
    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Returns the loss and the terms of the ELBO.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """

    def per_row(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the objective of each row, shape (rows,), in nats.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.

        Raises:
            ValueError: Where there are latents that all rows share.
        """
        per_row = self.estimate(model, guide, *args, **kwargs).per_row
        if per_row is None:
            raise ValueError(
                "Expected latent sites that have a value for each row; got some that all share."
            )
        return per_row

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns minus the objective, summed over rows, shape (), with its gradient.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        return self.estimate(model, guide, *args, **kwargs).loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns minus the objective, summed over rows, shape (), without gradient.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        return self.differentiable_loss(model, guide, *args, **kwargs).detach()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss, and adds its gradient to the parameters' `.grad`.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def __call__(self, model: Program, guide: Program) -> nn.Module:  # type: ignore[override]
        """Returns the module whose `forward(x)` is the loss.

        Arguments:
            model: The model, a bound method of a module or a module.
            guide: The guide, likewise.
        """
        return _Loss(Objective(model, guide, self))


class Objective(nn.Module):
    """Creates the module of a pair of programs and an ELBO: its parameters are the programs'.

    Arguments:
        model: The model, a bound method of a module or a module.
        guide: The guide, likewise.
        elbo: An estimator, or one of Pyro's own ELBOs.

    Raises:
        ValueError: Where the ELBO has no differentiable loss.
    """

    def __init__(self, model: Program, guide: Program, elbo: pyro.infer.ELBO) -> None:
        super().__init__()
        if not isinstance(elbo, pyro.infer.ELBO) or not hasattr(elbo, "differentiable_loss"):
            raise ValueError(
                "Expected an ELBO with a differentiable loss, as pyro_vae.elbos.Trace_ELBO(); got "
                f"{elbo!r}."
            )
        owners = dict.fromkeys(o for o in (_owner(model), _owner(guide)) if o is not None)
        self.programs = nn.ModuleList(owners)
        self.pair = (model, guide)
        self.elbo = copy.copy(elbo)

    def forward(self, *args: Any, **kwargs: Any) -> Estimate:
        """Returns an estimate of the objective.

        Arguments:
            args: What model and guide are called with.
            kwargs: The same, by name.
        """
        if isinstance(self.elbo, Estimator):
            return self.elbo.estimate(*self.pair, *args, **kwargs)
        return self._foreign(*args, **kwargs)

    def _foreign(self, *args: Any, **kwargs: Any) -> Estimate:
        """Pyro's own ELBOs tell no terms: one pass more tells them, with the same noise."""
        with kept_generators(), kept_buffers(self), torch.no_grad():
            terms = row_terms_of(*self.pair, *args, **kwargs)
        loss = self.elbo.differentiable_loss(*self.pair, *args, **kwargs)
        return Estimate(loss, None, terms)


class _Loss(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.objective(*args, **kwargs).loss


def _owner(program: Program) -> nn.Module | None:
    owner = getattr(program, "__self__", program)
    return owner if isinstance(owner, nn.Module) else None
