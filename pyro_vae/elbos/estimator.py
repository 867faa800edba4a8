"""What an estimator of the ELBO gives, and the module that a pair of programs makes with it."""

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, cast

import pyro
import pyro.infer
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..data.checks import checked_count, checked_finite
from ..data.read import read
from ..data.rows import floating_like
from ..engine.replay import Outputs, Replayed, UntraceableError
from ..engine.running import evaluating, kept_buffers, kept_generators, local_parameters
from .log_densities import Program, RowTerms, Structure, plate_nesting, row_terms_of

__all__ = [
    "Estimate",
    "Estimator",
    "Objective",
    "PerRow",
    "Schedule",
    "Tempered",
    "WITHOUT_RSAMPLE",
]

WITHOUT_RSAMPLE = "Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, VIMCO, RWS and TVO"
WORTH_TRACING = 200
WITHOUT_ROWS = "Expected latent sites that have a value for each row; got some that all share."
PER_SUM = "Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO and TraceEnum_ELBO"


class Estimate(NamedTuple):
    """One estimate of an objective, every number on the device.

    Arguments:
        loss: Minus the objective, summed over rows, in nats; its gradient is the estimator's.
        per_row: The objective of each row, shape (rows,), in nats, without a scale that all rows
            share; `None` where there are latents that all rows share, and for Pyro's own ELBOs,
            which do not tell it.
        terms: The terms of the ELBO of each row, as they are without annealing.
    """

    loss: Tensor
    per_row: Tensor | None
    terms: RowTerms


class PerRow(NamedTuple):
    """The objective of each row.

    Arguments:
        value: Its mean over repeats, shape (rows,), in nats.
        mcse: The Monte Carlo standard error of that mean, shape (rows,), in nats; NaN for one
            repeat.
    """

    value: Tensor
    mcse: Tensor


class Estimator(pyro.infer.ELBO):  # type: ignore[misc]
    r"""The base of the estimators: an ELBO of Pyro's that never asks the device for a number.

    Usable with `pyro.infer.SVI`, in :func:`pyro_vae.fit`, and as a module,
    `elbo(model, guide)(x)`, which owns the parameters of the programs' modules. As in Pyro, the
    loss is minus the objective, summed over the rows.

    To add one, subclass it and write `estimate`; say what it bounds and needs in the attributes.

    Attributes:
        direction: What its value is to log p(x): `"lower bound"`, or what else.
        unbiased_value: Whether its value is unbiased for the objective.
        unbiased_gradient: Whether its gradient is unbiased for that of the objective.
        needs_rsample: Whether the guide must draw every site by `rsample`.
        is_linear: Whether its value is linear in the KL terms, as the ELBO's is.
        takes_kl_weight: Whether its KL terms can be weighed, by a warm-up, say.
        takes_globals: Whether there may be sites outside the plate `"data"`.
        is_split: Whether model and guide follow objectives of their own.
        least_particles: The smallest number of draws K that it can take.
        is_traceable: Whether it is a fixed sequence of operations, that asks for no number.
        kl_weight: The weight of the KL terms, a number or a tensor of shape ().
    """

    direction: ClassVar[str] = "lower bound"
    unbiased_value: ClassVar[bool] = True
    unbiased_gradient: ClassVar[bool] = True
    needs_rsample: ClassVar[bool] = True
    is_linear: ClassVar[bool] = True
    takes_kl_weight: ClassVar[bool] = True
    takes_globals: ClassVar[bool] = False
    is_split: ClassVar[bool] = False
    least_particles: ClassVar[int] = 1
    is_traceable: ClassVar[bool] = True
    kl_weight: Tensor | float = 1.0

    def at_step(self, steps: int) -> None:
        """Tells a schedule, where the estimator has one, how many steps were taken.

        Arguments:
            steps: The number of steps.
        """

    def settle(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Finds out, before a first estimate, what a dry run would have to find out in it.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """
        if self._is_spread() and math.isinf(self.max_plate_nesting):
            self._guess_max_plate_nesting(model, guide, args, kwargs)

    def _is_spread(self) -> bool:
        """Whether the draws take a dim of their own."""
        return bool(self.vectorize_particles) and self.num_particles > 1

    def schedules(self) -> "list[Schedule]":
        """Returns the weights that change from step to step, of this and what is inside it."""
        return []

    def plain(self) -> "Estimator | None":
        """Returns an estimator by autograd of the objective that the guide follows.

        With it a gradient can be checked. `None` where there is none.
        """
        return None

    def with_particles(self, num_particles: int) -> "Estimator | None":
        """Returns a copy with another number of draws K; `None` where its K bounds nothing.

        Arguments:
            num_particles: The number of draws, of each group where they come in groups.
        """
        return None

    @abstractmethod
    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Returns the loss and the terms of the ELBO.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            kwargs: The same, by name.
        """

    def check(self, known: Structure) -> None:
        """Refuses programs that the estimator would be wrong for.

        Arguments:
            known: What the program is made of.

        Raises:
            ValueError: Where it has sites without `rsample` or sites that all rows share, and the
                estimator cannot take them: the message names the sites, and what can.
        """
        if self.needs_rsample:
            refuse_unreparameterised(self, known.unreparameterised)
        shared = known.global_latents + known.global_observed
        if shared and not self.takes_globals:
            raise ValueError(
                f"Expected sites in the plate of the rows alone, under {self}; got "
                f"{', '.join(shared)} outside it: {PER_SUM} take them."
            )

    def per_row(
        self, model: Program, guide: Program, *args: Any, num_repeats: int = 16, **kwargs: Any
    ) -> PerRow:
        """Returns the objective of each row, in evaluation mode and without gradient.

        Arguments:
            model: The model, a Pyro program.
            guide: The guide, a Pyro program.
            args: What both are called with.
            num_repeats: How often to estimate it.
            kwargs: What both are called with, by name.

        Raises:
            ValueError: Where there are latents that all rows share, no repeats, or rows that the
                program's own `check` refuses.
        """
        checked_count("num_repeats", num_repeats)
        if not callable(model) or not callable(guide):
            raise ValueError(
                "Expected per_row(model, guide, x), the methods of a program, and rows; got "
                f"{type(model).__name__}, {type(guide).__name__}."
            )
        objective = Objective(model, guide, self)
        args = _checked_data(objective.programs, args)
        sums: Any = 0.0
        with objective.evaluating():
            objective.settle(*args, **kwargs)
            elbo = cast(Estimator, objective.elbo)
            rows = elbo._repeated(objective, args, kwargs, num_repeats)
            for _ in range(num_repeats):
                row = rows().double()
                sums = sums + torch.stack([row, row.square()])
        mean, square = sums / num_repeats
        variance = (square - mean.square()).clamp_min(0.0) / (num_repeats - 1 or math.nan)
        return PerRow(mean, variance.sqrt())

    def _repeated(
        self, objective: "Objective", args: Any, kwargs: Any, num_repeats: int
    ) -> Callable[[], Tensor]:
        """What gives the objective of each row again and again: traced, if often and if it can."""

        def eager() -> Tensor:
            return self._rows(objective, args, kwargs)

        if num_repeats < WORTH_TRACING or not self.is_traceable:
            return eager
        replayed = Replayed(_Rows(objective, self))
        try:
            replayed.graph(*args, **kwargs)
        except UntraceableError:
            return eager
        return lambda: cast(Tensor, replayed(*args, **kwargs)[0])

    def _rows(self, objective: "Objective", args: Any, kwargs: Any) -> Tensor:
        per_row = objective(*args, **kwargs).per_row
        if per_row is None:
            raise ValueError(WITHOUT_ROWS)
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
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

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

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Leaves it to the class of Pyro's beside this one, if there is one."""
        return super()._get_trace(model, guide, args, kwargs)  # type: ignore[safe-super]

    def _guess_max_plate_nesting(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Does what Pyro's does, and says nothing."""
        nesting = plate_nesting(model, guide, *args, **kwargs)
        spread = bool(self.vectorize_particles) and self.num_particles > 1
        self.max_plate_nesting = nesting + int(spread)


def refuse_unreparameterised(elbo: Estimator, sites: tuple[str, ...]) -> None:
    """Refuses sites that a guide draws without `rsample`.

    Arguments:
        elbo: The estimator that needs one.
        sites: Their names.

    Raises:
        ValueError: Where there are any.
    """
    if sites:
        raise ValueError(
            f"Expected a guide that draws every latent site by rsample, under {elbo}; got "
            f"{', '.join(sites)} without one: {WITHOUT_RSAMPLE} take it."
        )


class Schedule:
    """A weight that is a function of the number of steps taken.

    Arguments:
        function: The function.
    """

    def __init__(self, function: Callable[[int], float | Tensor]) -> None:
        self.function, self.steps = function, 0
        self.held: Tensor | None = None

    def now(self) -> float | Tensor:
        """The weight at the step it is at, a number; or the tensor that holds it in a replay."""
        return self.number() if self.held is None else self.held

    def number(self) -> Any:
        """The weight at the step it is at.

        Raises:
            ValueError: Where the function gives something else.
        """
        weight = self.function(self.steps)
        return weight if isinstance(weight, Tensor) else checked_finite("beta", weight, least=0.0)

    def count(self) -> None:
        """Goes on to the next step, where steps are not counted from outside."""
        if self.held is None and torch.is_grad_enabled():
            self.steps += 1


class Tempered(Messenger):  # type: ignore[misc]
    """Weighs the latent sites, in the model and in the guide.

    Arguments:
        weight: The weight of the KL terms.
    """

    def __init__(self, weight: Tensor | float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


class Objective(nn.Module):
    """Creates the module of a pair of programs and an ELBO: its parameters are the programs'.

    Arguments:
        model: The model, a bound method of a module or a module.
        guide: The guide, likewise.
        elbo: An estimator, or one of Pyro's own ELBOs.
        wrap: What both programs are wrapped in, to run in half precision, say.

    Raises:
        ValueError: Where the ELBO has no differentiable loss.
    """

    kl_weight: Tensor | None
    schedules: list[Schedule]
    weights: Tensor

    def __init__(
        self,
        model: Program,
        guide: Program,
        elbo: pyro.infer.ELBO,
        *,
        wrap: Callable[[Program], Program] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(elbo, type):
            raise ValueError(
                f"Expected an estimator, as {elbo.__name__}(...); got the class {elbo.__name__}."
            )
        if not isinstance(elbo, pyro.infer.ELBO) or not hasattr(elbo, "differentiable_loss"):
            raise ValueError(
                "Expected an ELBO with a differentiable loss, as pyro_vae.elbos.Trace_ELBO(); got "
                f"{elbo!r}."
            )
        self.programs = owners(model, guide)
        self.pair = (model, guide) if wrap is None else (wrap(model), wrap(guide))
        elbo = self.elbo = copy.copy(elbo)
        self.schedules = elbo.schedules() if isinstance(elbo, Estimator) else []
        self.register_buffer("kl_weight", None, persistent=False)
        device = floating_like(self.programs).device
        weights = torch.ones(len(self.schedules), dtype=torch.float64, device=device)
        self.register_buffer("weights", weights, persistent=False)

    @property
    def is_traceable(self) -> bool:
        """Whether the ELBO is known to ask the device for no number."""
        return isinstance(self.elbo, Estimator) and self.elbo.is_traceable

    def forward(self, *args: Any, **kwargs: Any) -> Estimate:
        """Returns an estimate of the objective.

        Arguments:
            args: What model and guide are called with.
            kwargs: The same, by name.
        """
        if not isinstance(self.elbo, Estimator):
            return self._foreign(*args, **kwargs)
        if self.kl_weight is not None:
            self.elbo.kl_weight = self.kl_weight
        return self.elbo.estimate(*self.pair, *args, **kwargs)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Puts the weights of schedules in tensors, as they are now, for a replay to read."""
        if not self.schedules:
            yield
            return
        for schedule, weight in zip(self.schedules, self.weights.unbind(), strict=True):
            number = schedule.number()
            with torch.no_grad():
                weight.copy_(number) if isinstance(number, Tensor) else weight.fill_(number)
            schedule.held = weight
        try:
            yield
        finally:
            for schedule in self.schedules:
                schedule.held = None

    def settle(self, *args: Any, **kwargs: Any) -> None:
        """Finds out what a first estimate would, so that it is like all others.

        Arguments:
            args: What model and guide are called with.
            kwargs: The same, by name.
        """
        if isinstance(self.elbo, Estimator):
            with pyro.validation_enabled(False), local_parameters(self.programs):
                self.elbo.settle(*self.pair, args, kwargs)

    def count_step(self) -> None:
        """Notes that a replayed step was taken."""
        for schedule in self.schedules:
            schedule.steps += 1

    def weigh_kl(self, weight: Tensor) -> None:
        """Weighs the KL terms from now on.

        Arguments:
            weight: The weight, shape (), which may change in place.

        Raises:
            ValueError: Where the estimator has no such weight.
        """
        if isinstance(self.elbo, Estimator) and not self.elbo.takes_kl_weight:
            raise ValueError(
                f"Expected an estimator whose KL terms have a weight, for a warm-up; got "
                f"{self.elbo}, which has none."
            )
        self.kl_weight = weight

    def at_step(self, steps: int) -> None:
        """Tells the estimator's schedule, where it has one, how many steps were taken.

        Arguments:
            steps: The number of steps.
        """
        if isinstance(self.elbo, Estimator):
            self.elbo.at_step(steps)

    def check(self, known: Structure) -> None:
        """Refuses programs that the estimator would be wrong for.

        Arguments:
            known: What the program is made of.

        Raises:
            ValueError: As the estimator does.
        """
        if isinstance(self.elbo, Estimator):
            self.elbo.check(known)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Runs the programs in evaluation mode, without gradients, and puts all back."""
        owned = evaluating(self.programs) if len(self.programs) else contextlib.nullcontext()
        with owned, torch.no_grad(), pyro.validation_enabled(False):
            yield

    def _foreign(self, *args: Any, **kwargs: Any) -> Estimate:
        """Pyro's own ELBOs tell no terms: one pass more tells them, with the same noise."""
        with kept_generators(), kept_buffers(self), torch.no_grad():
            terms = row_terms_of(*self.pair, *args, **kwargs)
        tempered = contextlib.nullcontext() if self.kl_weight is None else Tempered(self.kl_weight)
        with tempered:
            loss = self.elbo.differentiable_loss(*self.pair, *args, **kwargs)
        return Estimate(loss, None, terms)


class _Rows(nn.Module):
    """The objective of each row, as a module."""

    def __init__(self, objective: Objective, elbo: Estimator) -> None:
        super().__init__()
        self.objective, self.elbo = objective, elbo

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        return (self.elbo._rows(self.objective, args, kwargs),)


class _Loss(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.objective(*args, **kwargs).loss


def _checked_data(programs: nn.ModuleList, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The rows that one program is asked for, checked and placed as it needs them."""
    if len(programs) != 1 or len(args) != 1:
        return args
    rows = read(args[0], programs[0], move=True)
    return (rows.head(len(rows)),)


def owners(*programs: Program) -> nn.ModuleList:
    """Returns the modules whose methods the programs are, or which they are themselves.

    Arguments:
        programs: Pyro programs.
    """
    modules = (getattr(program, "__self__", program) for program in programs)
    return nn.ModuleList(dict.fromkeys(m for m in modules if isinstance(m, nn.Module)))
