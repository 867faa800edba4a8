"""Base class of the estimators, and the module of an estimator and a pair of programs."""

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import pyro
import pyro.infer
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..data.checks import checked_draws, checked_finite
from ..data.read import read
from ..data.rows import floating_like
from ..data.source import Row
from ..engine.replay import Outputs, Replayed, UntraceableError
from ..engine.running import (
    evaluating,
    kept_buffers,
    kept_generators,
    local_parameters,
    owner_of,
    public,
    seeded,
    unvalidated,
)
from .log_densities import (
    Args,
    Kwargs,
    Program,
    RowTerms,
    Site,
    Structure,
    faults_named,
    is_one_scale,
    plate_nesting,
    programs_of,
    row_terms_of,
)

__all__ = [
    "Estimate",
    "Estimator",
    "Objective",
    "PerRow",
    "Schedule",
    "Tempered",
    "WITHOUT_RSAMPLE",
    "owners",
    "refuse_unreparameterised",
    "tempered",
]

WITHOUT_RSAMPLE = "Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, VIMCO, RWS and TVO"
WORTH_TRACING = 200
WITHOUT_ROWS = (
    "Expected latent sites that have a value for each row; got global latent sites, which all "
    "rows share."
)
PER_SUM = "Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO and TraceEnum_ELBO"


class Estimate(NamedTuple):
    """One estimate of an objective, its numbers on the device of the programs.

    Arguments:
        loss: Minus the objective, summed over rows, in nats. Its gradient is the estimator's.
        per_row: The objective of each row, shape (rows,), in nats, without the scale that all
            rows have in common. `None` if the program has global latent sites, and for Pyro's own
            ELBOs, which do not compute it.
        terms: The terms of the ELBO of each row, without any KL weight.
    """

    loss: Tensor
    per_row: Tensor | None
    terms: RowTerms


class PerRow(NamedTuple):
    """The objective of each row, averaged over repeats.

    Arguments:
        value: The mean over repeats, shape (rows,), in nats.
        mcse: The Monte Carlo standard error of that mean, shape (rows,), in nats. NaN if there is
            one repeat.
    """

    value: Tensor
    mcse: Tensor


class Estimator(pyro.infer.ELBO):  # type: ignore[misc]
    r"""The base class of the estimators: a Pyro ELBO that does not wait for the device.

    An estimator works with `pyro.infer.SVI`, in :func:`pyro_vae.fit`, and as a module:
    `elbo(model, guide)(x)` is the loss, and the module owns the parameters of the programs. As in
    Pyro, the loss is minus the objective, summed over the rows.

    In every method `model` and `guide` are Pyro programs, and `args` and `kwargs` are the
    arguments that both are called with. An estimator takes numbers of draws by position, and all
    other arguments by keyword.

    To add one, subclass it, write `estimate`, and set the attributes that differ.

    Attributes:
        direction: How its value relates to log p(x): `"lower bound"`, `"no bound"`, or a phrase
            such as `"upper bound as num_particles grows"`.
        unbiased_value: Whether its value is unbiased for the objective.
        unbiased_gradient: Whether its gradient is unbiased for the gradient of the objective.
        needs_rsample: Whether the guide must draw every site by `rsample`.
        is_linear: Whether its value is linear in the KL terms, as the ELBO's is.
        takes_kl_weight: Whether its KL terms can have a weight, such as that of a warm-up.
        takes_globals: Whether the programs may have sites outside the plate `"data"`.
        is_split: Whether model and guide have different objectives.
        least_particles: The smallest number of draws K that it can take.
        is_traceable: Whether its computation is a fixed sequence of tensor operations, without
            branches on the value of a tensor.
        kl_weight: The weight of the KL terms, a number or a tensor of shape ().
    """

    direction: str = "lower bound"
    unbiased_value: bool = True
    unbiased_gradient: bool = True
    needs_rsample: bool = True
    is_linear: bool = True
    takes_kl_weight: bool = True
    takes_globals: bool = False
    is_split: bool = False
    least_particles: int = 1
    is_traceable: bool = True
    kl_weight: Tensor | float = 1.0

    def at_step(self, steps: int) -> None:
        """Sets the number of steps taken, from which schedules compute their weights.

        Arguments:
            steps: The number of steps.
        """

    def infer_plate_nesting(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> None:
        """Infers `max_plate_nesting` by a dry run, if it is needed and the user did not set it."""
        if self._is_vectorised() and math.isinf(self.max_plate_nesting):
            self._guess_max_plate_nesting(model, guide, args, kwargs)

    def _is_vectorised(self) -> bool:
        return bool(self.vectorize_particles) and self.num_particles > 1

    def schedules(self) -> "list[Schedule]":
        """Returns the schedules of its weights, including those of inner estimators."""
        return []

    def plain(self) -> "Estimator | None":
        """Returns an estimator of the guide's objective whose gradient is autograd's, or `None`.

        It is the reference with which :func:`pyro_vae.compare_elbos` compares the gradient. `None`
        means that there is no such estimator.
        """
        return None

    def with_particles(self, num_particles: int) -> "Estimator | None":
        """Returns a copy with another number of draws K, or `None` if K is not free.

        Arguments:
            num_particles: The number of draws K. If the draws form groups, it is that of each
                group.
        """
        return None

    @abstractmethod
    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Returns the loss, the objective of each row and the terms of the ELBO.

        Raises:
            ValueError: If the estimator does not apply to the programs.
        """

    def check(self, structure: Structure) -> None:
        """Refuses programs that the estimator does not apply to.

        Arguments:
            structure: The sites and plates of the programs.

        Raises:
            ValueError: If there are sites without `rsample` or global sites that the estimator
                cannot take. The message names the sites, and the estimators that take them.
        """
        if self.needs_rsample:
            refuse_unreparameterised(self, structure.unreparameterised)
        outside = structure.global_latents + structure.global_observed
        if outside and not self.takes_globals:
            raise ValueError(
                f"Expected every site in the plate of the rows, under {self}; got "
                f"{', '.join(outside)} outside it. {PER_SUM} accept such sites."
            )

    @public
    def per_row(
        self,
        program: nn.Module,
        x: object,
        *,
        num_repeats: int = 16,
        context: object = None,
        weights: object = None,
        seed: int | None = None,
    ) -> PerRow:
        """Returns the objective of each row, in evaluation mode and without gradient.

        Arguments:
            program: A module with the Pyro programs `model(x)` and `guide(x)`.
            x: The data, as :func:`pyro_vae.fit` takes them.
            num_repeats: The number of estimates to average.
            context: Covariates of the rows: `row["context"]` of the program.
            weights: The weight of each row: `row["weight"]` of the program.
            seed: The seed of the draws. `None` continues torch's generators from their state.

        Raises:
            ValueError: If `program` is not such a module, it has global latent sites,
                `num_repeats` is not positive, or the data do not fit the program.
        """
        checked_draws("num_repeats", num_repeats)
        pair = programs_of(program)
        rows = read(x, program, context=context, weights=weights, move=True)
        data = rows.head(len(rows))
        objective = Objective(*pair, self)
        module = _RowValues(objective)
        evaluate: Callable[[Row], Outputs] = module
        with faults_named("the data"), seeded(seed), evaluating(program):
            objective.infer_plate_nesting(data)
            if num_repeats >= WORTH_TRACING and objective.is_traceable:
                replayed = Replayed(module)
                with contextlib.suppress(UntraceableError):
                    replayed.graph(data)
                    evaluate = replayed

            def moments() -> Tensor:
                values = cast(Tensor, evaluate(data)[0]).double()
                return torch.stack([values, values.square()])

            sums = moments()
            for _ in range(num_repeats - 1):
                sums = sums + moments()
        mean, square = sums / num_repeats
        variance = (square - mean.square()).clamp_min(0.0) / (num_repeats - 1 or math.nan)
        return PerRow(mean, variance.sqrt())

    def _row_values(self, objective: "Objective", x: Row) -> Tensor:
        per_row: Tensor | None = objective(x).per_row
        if per_row is None:
            raise ValueError(WITHOUT_ROWS)
        return per_row

    def differentiable_loss(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Tensor:
        """Returns minus the objective, summed over rows, shape (), with its gradient."""
        return self.estimate(model, guide, *args, **kwargs).loss

    def loss(self, model: Program, guide: Program, *args: object, **kwargs: object) -> Tensor:
        """Returns minus the objective, summed over rows, shape (), without gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Tensor:
        """Returns the loss, and adds its gradient to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def __call__(self, model: Program, guide: Program) -> nn.Module:  # type: ignore[override]
        """Returns the module whose `forward(*args, **kwargs)` is the loss."""
        return _Loss(Objective(model, guide, self))

    def _get_trace(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> object:
        """Calls the method of the next class, since `pyro.infer.ELBO` declares it abstract."""
        return super()._get_trace(model, guide, args, kwargs)  # type: ignore[safe-super]

    def _guess_max_plate_nesting(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> None:
        """Overrides Pyro's method, which validates the traces and warns."""
        nesting = plate_nesting(model, guide, *args, **kwargs)
        self.max_plate_nesting = nesting + int(self._is_vectorised())


def refuse_unreparameterised(elbo: Estimator, sites: tuple[str, ...]) -> None:
    """Refuses sites that a guide draws without `rsample`.

    Arguments:
        elbo: The estimator, which needs `rsample`.
        sites: The names of the sites that the guide draws without `rsample`.

    Raises:
        ValueError: If `sites` is not empty.
    """
    if sites:
        raise ValueError(
            f"Expected a guide that draws every latent site by rsample, under {elbo}; got "
            f"{', '.join(sites)} without rsample. These do not need it: {WITHOUT_RSAMPLE}."
        )


class Schedule:
    """A weight that is a function of the number of steps taken.

    Arguments:
        function: A function from the number of steps to the weight.

    Attributes:
        steps: The number of steps taken.
        held: The tensor that holds the weight while a traced step is replayed, else `None`.
    """

    def __init__(self, function: Callable[[int], float | Tensor]) -> None:
        self.function, self.steps = function, 0
        self.held: Tensor | None = None

    def now(self) -> float | Tensor:
        """Returns the weight at the current step, from the tensor `held` if there is one."""
        return self.number() if self.held is None else self.held

    def number(self) -> float | Tensor:
        """Computes the weight at the current step.

        Raises:
            ValueError: If the function returns anything but a finite number of at least 0.
        """
        weight = self.function(self.steps)
        return weight if isinstance(weight, Tensor) else checked_finite("beta", weight, least=0.0)

    def count(self) -> None:
        """Advances by one step if gradients are enabled and no replay counts the steps."""
        if self.held is None and torch.is_grad_enabled():
            self.steps += 1


class Tempered(Messenger):  # type: ignore[misc]
    """Effect handler that multiplies the scale of every latent site by the weight of the KL terms.

    Arguments:
        weight: The weight of the KL terms.
    """

    def __init__(self, weight: Tensor | float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


def tempered(weight: Tensor | float) -> contextlib.AbstractContextManager[object]:
    """Returns the handler :class:`Tempered`, or a context that does nothing if the weight is 1.

    Arguments:
        weight: The weight of the KL terms.
    """
    return contextlib.nullcontext() if is_one_scale(weight, 1.0) else Tempered(weight)


class Objective(nn.Module):
    """A module that evaluates an ELBO of two programs, and owns the parameters of both.

    Arguments:
        model: The model, a bound method of a module or a module.
        guide: The guide, likewise.
        elbo: An estimator, or one of Pyro's own ELBOs.
        wrap: A function that is applied to both programs, for example to run them in half
            precision.

    Raises:
        ValueError: If the ELBO has no differentiable loss.
    """

    elbo: pyro.infer.ELBO
    estimator: Estimator
    kl_weight: Tensor | None
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
        match elbo:
            case Estimator():
                self.elbo = self.estimator = copy.copy(elbo)
            case pyro.infer.ELBO() if hasattr(elbo, "differentiable_loss"):
                self.elbo = copy.copy(elbo)
                self.estimator = _OfPyro(self.elbo)
            case type():
                name = elbo.__name__
                raise ValueError(f"Expected an estimator, as {name}(...); got the class {name}.")
            case _:
                raise ValueError(
                    "Expected an ELBO with a differentiable loss, as pyro_vae.elbos.Trace_ELBO(); "
                    f"got {elbo!r}."
                )
        self.programs = owners(model, guide)
        self.pair = (model, guide) if wrap is None else (wrap(model), wrap(guide))
        self.schedules = self.estimator.schedules()
        self.register_buffer("kl_weight", None, persistent=False)
        device = floating_like(self.programs).device
        weights = torch.ones(len(self.schedules), dtype=torch.float64, device=device)
        self.register_buffer("weights", weights, persistent=False)

    @property
    def is_traceable(self) -> bool:
        """Whether the ELBO is a fixed sequence of tensor operations."""
        return self.estimator.is_traceable

    def forward(self, *args: object, **kwargs: object) -> Estimate:
        """Returns an estimate of the objective.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
        """
        if self.kl_weight is not None:
            self.estimator.kl_weight = self.kl_weight
        model, guide = self.pair
        return self.estimator.estimate(model, guide, *args, **kwargs)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Holds the current weights of schedules in tensors, which a traced step reads."""
        if not self.schedules:
            yield
            return
        for schedule, weight in zip(self.schedules, self.weights.unbind(), strict=True):
            number = schedule.number()
            with torch.no_grad():
                weight.fill_(number)
            schedule.held = weight
        try:
            yield
        finally:
            for schedule in self.schedules:
                schedule.held = None

    def infer_plate_nesting(self, *args: object, **kwargs: object) -> None:
        """Infers the nesting of plates, so that no later estimate needs a dry run.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
        """
        with unvalidated(), local_parameters(self.programs):
            self.estimator.infer_plate_nesting(*self.pair, args, kwargs)

    def count_step(self) -> None:
        """Advances the schedules by one step, after a traced step was replayed."""
        for schedule in self.schedules:
            schedule.steps += 1

    def weigh_kl(self, weight: Tensor) -> None:
        """Sets the weight of the KL terms.

        Arguments:
            weight: The weight, shape (). Later changes in place take effect.

        Raises:
            ValueError: If the estimator has no such weight.
        """
        if not self.estimator.takes_kl_weight:
            raise ValueError(
                f"Expected an estimator whose KL terms have a weight, for a warm-up; got "
                f"{self.elbo}, which has none."
            )
        self.kl_weight = weight

    def at_step(self, steps: int) -> None:
        """Sets the number of steps taken, from which schedules compute their weights.

        Arguments:
            steps: The number of steps.
        """
        self.estimator.at_step(steps)

    def check(self, structure: Structure) -> None:
        """Refuses programs that the estimator does not apply to.

        Arguments:
            structure: The sites and plates of the programs.

        Raises:
            ValueError: If the estimator refuses them.
        """
        self.estimator.check(structure)


class _OfPyro(Estimator):
    """Adapter of one of Pyro's own ELBOs. One more pass, of the same noise, gives the terms."""

    needs_rsample = False
    takes_globals = True
    is_traceable = False

    def __init__(self, elbo: pyro.infer.ELBO) -> None:
        super().__init__()
        self.inner = elbo

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        with kept_generators(), kept_buffers(owners(model, guide)), torch.no_grad():
            terms = row_terms_of(model, guide, *args, **kwargs)
        with tempered(self.kl_weight):
            loss = self.inner.differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
        return Estimate(loss, None, terms)


class _RowValues(nn.Module):
    """The objective of each row, as a module that can be traced."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, x: Row) -> Outputs:
        return (self.objective.estimator._row_values(self.objective, x),)


class _Loss(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.objective(*args, **kwargs).loss


def owners(*programs: Program) -> nn.ModuleList:
    """Returns the modules that own the programs: a module itself, or the module of a method.

    Arguments:
        programs: Pyro programs.
    """
    modules = map(owner_of, programs)
    return nn.ModuleList(dict.fromkeys(m for m in modules if m is not None))
