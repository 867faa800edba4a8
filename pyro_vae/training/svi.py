"""Stochastic variational inference with traced steps that never wait for the device."""

import functools
import math
from collections.abc import Callable
from typing import TypeAlias, cast

import pyro.infer
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.checks import (
    checked,
    checked_count,
    checked_finite,
    checked_positive,
    warn_user,
)
from ..elbos import Estimate, Objective
from ..elbos.log_densities import Args, Kwargs, Program, RowTerms
from ..engine import replay as engines
from ..engine.half_precision import HalfPrecision
from ..engine.replay import (
    Graph,
    Outputs,
    Replayed,
    UntraceableError,
    at_precision,
    saved_by_compiling,
)
from ..engine.running import LOCK, check_gradients, owner_of
from ..engine.updates import MakeOptimizer, Updates, optimizer_of
from ..programs.program import Program as PyroPair

__all__ = ["SVI", "MakeOptimizer", "Totals", "mean_terms"]

COMPILING_COSTS = 20.0
WORTH_COMPILING = 20.0  # compile only if the time limit is at least this multiple of the cost
WORTH_TRACING = 200
TERMS = 5

_Owner: TypeAlias = dict[str, nn.Parameter | None]


class SVI(pyro.infer.SVI):  # type: ignore[misc]
    r"""Creates Pyro's SVI with one optimiser and a choice of engines.

    A step whose loss or gradient is not finite changes no weight, no buffer and no moment of the
    optimiser, and neither does any later step. The tensor `is_bad` on the device is then 1. If the
    programs scale the loss of a minibatch of B rows by N / B, set `row_weight` to that number, so
    that `max_grad_norm` applies to the mean over rows. `row_weight` does not scale the loss.

    The engine decides how a step runs:

    - `"eager"` runs the Pyro program each time. It takes any program and any ELBO, Pyro's too.
    - `"traced"` runs the program once for each shape of its arguments, records its tensor
      operations and those of the gradient, and runs the recorded operations. They give the same
      numbers from the same draws, bit for bit on a CPU, without the Python code of the program.
    - `"compiled"` compiles these operations by Inductor, which takes 10 to 20 seconds. The draws
      are the same, and the numbers differ by rounding.
    - `"cudagraph"` captures them, and the optimiser's update, in a CUDA graph.
    - `"auto"` chooses `"eager"` for Pyro's own ELBOs and for few steps. Otherwise it chooses
      `"cudagraph"` on a GPU, `"compiled"` if that saves time over `total_steps`, or `"traced"`. If
      the program is not a fixed sequence of operations, it chooses `"eager"`, with a warning that
      names the reason. The attribute `why` gives the reason.

    Python numbers in a program are read only when it is traced; parameters, buffers and other
    tensors are read in each step. For the first arguments of a shape the recorded operations are
    compared with the program. Pyro's validation, if it is on, applies to these arguments alone.

    Arguments:
        model: The model: a method of the module that owns the parameters, or a function or module
            as Pyro's tutorials write it. Such a pair is wrapped in :class:`pyro_vae.Program`; its
            parameters and the optimiser are created in the first step.
        guide: The guide, likewise.
        optim: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim` optimiser.
        loss: An estimator of `pyro_vae.elbos`, or one of Pyro's own ELBOs.
        lr: The learning rate, if `optim` does not set one.
        max_grad_norm: The largest norm of the gradient of the objective's mean over rows; a larger
            gradient is clipped to it.
        engine: The name of the engine.
        precision: The precision of float32 matrix products in a step: `"highest"`, `"high"` or
            `"medium"`, as in `torch.set_float32_matmul_precision`. `"bf16"` runs the programs'
            networks under autocast, with densities and sums in float32. `None` keeps torch's
            setting.
        total_steps: The approximate number of steps, for `"auto"`.
        max_seconds: The time limit of all steps in seconds, for `"auto"`.

    Attributes:
        why: The reason for the choice of the engine.
        before_compiling: A function that is called before each compilation, for instance to tell
            the user to wait.
        is_compiling: Whether a step is being compiled.

    Raises:
        ValueError: If the programs have no parameters, a number is out of range, or the optimiser
            cannot be made. In a step, if the engine cannot run it, or if the first data of a
            shape are outside the likelihood's support.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> svi = SVI(
        ...     vae.model, vae.guide, torch.optim.Adam, pv.elbos.Trace_ELBO(), engine="traced"
        ... )
        >>> svi.step(torch.ones(5, 4)).shape
        torch.Size([])
    """

    @checked
    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: MakeOptimizer,
        loss: pyro.infer.ELBO,
        *,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        engine: str = "eager",
        precision: str | None = None,
        total_steps: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self.engine = engines.checked_engine(engine)
        self.precision = engines.checked_precision(precision)
        if max_grad_norm is not None:
            max_grad_norm = checked_positive("max_grad_norm", max_grad_norm)
        defaults = {} if lr is None else {"lr": checked_finite("lr", lr, least=0.0)}
        self.total_steps = None
        if total_steps is not None:
            self.total_steps = checked_count("total_steps", total_steps)
        self.max_seconds = math.inf
        if max_seconds is not None:
            self.max_seconds = checked_positive("max_seconds", max_seconds)
        self.why = "" if engine == "auto" else "the user chose it"
        self.before_compiling: Callable[[], object] = lambda: None
        self.is_compiling = False
        self._is_auto = engine == "auto"
        self._program = _wrapped(model, guide)
        if self._program is not None:
            model, guide = self._program.model, self._program.guide

        def make(parameters: list[nn.Parameter]) -> Optimizer:
            return optimizer_of(optim, parameters, **defaults)

        self._start = functools.partial(self._started, model, guide, make, loss, max_grad_norm)
        if self._program is None or self._program.is_prepared:
            self._start()

    def _started(
        self,
        model: Program,
        guide: Program,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        loss: pyro.infer.ELBO,
        max_grad_norm: float | None,
    ) -> None:
        """Creates the objects that need the parameters: the objective, the optimiser, the step."""
        wrap = HalfPrecision if self.precision == "bf16" else None
        self.objective = Objective(model, guide, loss, wrap=wrap)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "Expected a model or guide with parameters to train; got none. Declare them by "
                "pyro.param or pyro.module, or make both methods of a module that owns them."
            )
        self.optimizer = make_optimizer(self.parameters)
        self._step = _Step(self.objective, self.parameters, max_grad_norm)
        self._updates = Updates(self.optimizer, self.parameters)
        self._replayed: Replayed | None = None
        self._captures: dict[Graph, _Capture] = {}
        super().__init__(model, guide, _AsPyroOptim(self.optimizer), loss)

    @property
    def is_bad(self) -> Tensor:
        """1 if the loss or the gradient of any step was not finite, else 0; shape ()."""
        return self._step.is_bad

    @property
    def good(self) -> Tensor:
        """The number of steps with a finite loss and gradient, shape ()."""
        return self._step.good

    @property
    def totals(self) -> "Totals":
        """The sums of the ELBO's terms over the rows of all steps."""
        return self._step.totals

    @property
    def row_weight(self) -> float:
        """The scale that the programs give to each row: 1, or N / B for a minibatch of B rows."""
        return self._step.row_weight

    @row_weight.setter
    def row_weight(self, weight: float) -> None:
        self._step.row_weight = weight

    def pull(self, weights: list[nn.Parameter], strength: float) -> None:
        r"""Adds a normal prior of some weights to the steps, but not to the loss.

        A step on a batch of B rows adds the gradient of

        .. math:: \frac{\lambda B}{2} \lVert w \rVert^2

        to that of the loss. With :math:`\lambda = 1 / (N \sigma^2)` the N training rows count the
        prior :math:`N(0, \sigma^2)` once. Call it before the first step.

        Arguments:
            weights: The weights.
            strength: The number :math:`\lambda`, per row.
        """
        chosen = {id(weight) for weight in weights}
        self._step.pull = [strength * (id(p) in chosen) for p in self.parameters]

    def forgive(self) -> None:
        """Forgets that a step was bad, so that the next steps change the weights again."""
        self._step.is_bad.zero_()
        self._step.is_good.fill_(1.0)

    def to(self, device: torch.device) -> None:
        """Moves the programs and the state of the steps to a device.

        Arguments:
            device: The device.
        """
        self._step.to(device)

    def update(self, *args: object, **kwargs: object) -> Estimate:
        """Takes a step, and returns the estimate at the weights before the step, on the device.

        With a CUDA graph the next step overwrites the tensors of the estimate.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.

        Raises:
            ValueError: If the engine cannot run the step. The message gives the reason.
        """
        if self._program is not None and not self._program.is_prepared:
            self._program.prepare(*args, **kwargs)
            self._start()
        check_gradients(self.parameters)
        with LOCK, at_precision(self.precision):
            outputs = self._run(args, kwargs)
        loss, per_row, *terms = outputs[:TERMS]
        return Estimate(loss, per_row, RowTerms._make(terms))  # type: ignore[arg-type]

    def step(self, *args: object, **kwargs: object) -> Tensor:
        """Takes a step, and returns the loss in nats before it, shape (), on the device.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.

        Raises:
            ValueError: If the engine cannot run the step. The message gives the reason.
        """
        loss = self.update(*args, **kwargs).loss.detach()
        return loss.clone() if self._captures else loss

    def _run(self, args: Args, kwargs: Kwargs) -> Outputs:
        if self.engine == "auto" and not self.objective.is_traceable:
            self.engine, self.why = "eager", f"{self.objective.elbo} reads numbers off the device"
        if self.engine == "auto" and self._are_few():
            self.engine, self.why = "eager", f"tracing takes longer than {self.total_steps} steps"
        if self.engine != "eager" and not self._are_few():
            try:
                return self._replay(args, kwargs)
            except UntraceableError as error:
                self._fall_back(error)
        outputs: Outputs = self._step(*args, **kwargs)
        self._update_parameters(outputs)
        return outputs

    def _update_parameters(self, outputs: Outputs) -> None:
        """Steps the optimiser with the gradients of a step."""
        self._updates(outputs[TERMS:], self._step.is_bad, self._step.is_good)

    def _are_few(self) -> bool:
        """Whether there are too few steps for `"auto"` to trace them."""
        return self._is_auto and self.total_steps is not None and self.total_steps < WORTH_TRACING

    def _fall_back(self, error: UntraceableError) -> None:
        if not self._is_auto:
            raise ValueError(
                f"The engine {self.engine!r} cannot run this program: {error}. engine='eager' "
                "runs any program."
            ) from error
        self.engine, self.why = "eager", f"the program cannot be traced: {error}"
        warn_user(
            f"Steps run eagerly, and slower, since the program cannot be traced: {error}. "
            "Set engine='eager' to run it without this warning."
        )

    def _replay(self, args: Args, kwargs: Kwargs) -> Outputs:
        if not engines.Captured.is_possible(self.is_bad.device) and self.engine == "cudagraph":
            raise UntraceableError(f"CUDA graphs need a CUDA device; got {self.is_bad.device}")
        if self._replayed is None:
            self.objective.infer_plate_nesting(*args, **kwargs)
            self._replayed = Replayed(self._step)
        with self.objective.replayed():
            graph = self._replayed.graph(*args, static=self.row_weight, **kwargs)
        tensors = self._replayed.tensors(*args, **kwargs)
        if graph.is_compiled is None:
            self._compile_if_worth_it(graph, tensors)
        capture = self._captured(graph, tensors) if self._updates.is_warm else None
        if capture is None:
            outputs = graph(tensors)
            self._update_parameters(outputs)
        else:
            outputs = capture(tensors[self._replayed.num_own :])
        self.objective.count_step()
        return outputs

    def _compile_if_worth_it(self, graph: Graph, tensors: list[Tensor]) -> None:
        """Chooses the engine for `"auto"`, and compiles a graph if that saves time."""
        uses = math.inf if self.total_steps is None else self.total_steps
        saved = saved_by_compiling(graph.size) * uses
        has_time = self.max_seconds > WORTH_COMPILING * COMPILING_COSTS
        is_repaid = saved > 2.0 * COMPILING_COSTS and has_time
        if self.engine == "auto":
            self._choose_engine(saved, is_repaid=is_repaid)
        is_first = not self._is_auto and self._replayed is not None and self._replayed.size == 1
        graph.is_compiled = self.engine == "compiled" and (is_repaid or is_first)
        if graph.is_compiled:
            self.before_compiling()
            self.is_compiling = True
            try:
                graph.compile(tensors)
            except UntraceableError as error:
                if not self._is_auto:
                    raise
                graph.is_compiled = False
                self.engine, self.why = "traced", str(error)
            finally:
                self.is_compiling = False

    def _choose_engine(self, saved: float, *, is_repaid: bool) -> None:
        if engines.Captured.is_possible(self.is_bad.device):
            self.engine, self.why = "cudagraph", "there is a GPU to capture steps on"
        elif self.total_steps is None:
            self.engine, self.why = "traced", "the number of steps is unknown"
        else:
            self.engine = "compiled" if is_repaid else "traced"
            self.why = (
                f"compiling takes about {COMPILING_COSTS:.0f} s and saves {saved:.0f} s in "
                f"{self.total_steps} steps"
            )
            if math.isfinite(self.max_seconds):
                self.why += f", with a time limit of {self.max_seconds:g} s"

    def _captured(self, graph: Graph, tensors: list[Tensor]) -> "_Capture | None":
        if self.engine != "cudagraph" or self._replayed is None:
            return None
        own = self._replayed.num_own
        places = (self._updates.version, *[tensor.data_ptr() for tensor in tensors[:own]])
        capture = self._captures.get(graph)
        if capture is None or capture.places != places:
            try:
                capture = _Capture(self, graph, tensors[:own], tensors[own:], places)
            except (RuntimeError, AssertionError) as error:
                reason = f"a step of it cannot be captured: {error}"
                if not self._is_auto:
                    raise UntraceableError(reason) from error
                self.engine, self.why = "traced", reason
                return None
            self._captures[graph] = capture
        return capture


def _wrapped(model: Program, guide: Program) -> PyroPair | None:
    """The Program of a pair that creates parameters when it runs; modules have theirs already."""
    owners = [owner_of(program) if callable(program) else None for program in (model, guide)]
    if isinstance(owners[0], PyroPair) and owners[0] is owners[-1]:
        return owners[0]
    if all(owner is not None and not isinstance(owner, AutoGuide) for owner in owners):
        return None
    return PyroPair(model, guide)


class _Capture:
    """A captured step, and the tensors to which its arguments are copied."""

    def __init__(
        self,
        svi: SVI,
        graph: Graph,
        own: list[Tensor],
        arguments: list[Tensor],
        places: tuple[int, ...],
    ) -> None:
        self.places = places
        self.static = [argument.clone() for argument in arguments]
        self.updates = svi._updates

        def step() -> Outputs:
            outputs = graph([*own, *self.static])
            svi._update_parameters(outputs)
            return outputs

        with self.updates.rates_on_device():
            self.captured = engines.Captured(step, [*own, *self.updates.state()])

    def __call__(self, arguments: list[Tensor]) -> Outputs:
        for static, argument in zip(self.static, arguments, strict=True):
            static.copy_(argument)
        self.updates.follow_rates()
        return self.captured.replay()


class _Step(nn.Module):
    """The part of a step that can be traced: an estimate, its gradient, and checks of both.

    Arguments:
        objective: The objective.
        parameters: The parameters of the gradient.
        max_grad_norm: The largest norm of the gradient, or `None`.
    """

    is_bad: Tensor
    is_good: Tensor
    good: Tensor

    def __init__(
        self,
        objective: Objective,
        parameters: list[nn.Parameter],
        max_grad_norm: float | None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.max_grad_norm = max_grad_norm
        self.row_weight = 1.0
        self.pull = [0.0] * len(parameters)
        device = parameters[0].device
        self.totals = Totals().to(device)
        for name in ("is_bad", "is_good", "good"):
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self.register_buffer(name, zero, persistent=False)
        self._places = _places(objective, parameters)
        self._buffers_of = [
            (module._buffers, name)
            for module in objective.programs.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def forward(self, *args: object, **kwargs: object) -> Outputs:
        """Returns loss, objective of each row, three terms and the gradient of each parameter."""
        parameters = [cast(nn.Parameter, owner[name]) for owner, name in self._places]
        buffers = [_SavedBuffer(*place) for place in self._buffers_of]
        estimate: Estimate = self.objective(*args, **kwargs)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(estimate.loss, trained, allow_unused=True))
        gradients = tuple([next(found) if p.requires_grad else None for p in parameters])
        with torch.no_grad():
            clipped = self._check_and_clip(estimate, gradients)
            for buffer in buffers:
                buffer.restore_if(self.is_bad.bool())
            self.totals.add(estimate.terms)
            rows = self.row_weight * len(estimate.terms.reconstruction)
            clipped = tuple(
                gradient if gradient is None or not pull else gradient + rows * pull * parameter
                for gradient, parameter, pull in zip(clipped, parameters, self.pull, strict=True)
            )
        return (estimate.loss, estimate.per_row, *estimate.terms, *clipped)

    def _check_and_clip(self, estimate: Estimate, gradients: Outputs) -> Outputs:
        """Sets `is_bad` if a number is not finite, and clips the gradient."""
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        finite = torch.isfinite(norm) & torch.isfinite(estimate.loss)
        self.is_bad.copy_(torch.maximum(self.is_bad, (~finite).to(self.is_bad.dtype)))
        self.is_good.copy_(1.0 - self.is_bad)
        self.good.add_(self.is_good)
        if self.max_grad_norm is None:
            return gradients
        rows = self.row_weight * len(estimate.terms.reconstruction)
        share = (self.max_grad_norm * rows / (norm + 1e-6)).clamp(max=1.0)
        return tuple(None if g is None else g * share for g in gradients)


def _places(module: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[_Owner, str]]:
    """The dict and name under which a module holds each parameter: a replay exchanges them."""
    found: dict[int, tuple[_Owner, str]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            found.setdefault(id(parameter), (part._parameters, name))
    return [found[id(parameter)] for parameter in parameters]


def mean_terms(terms: list[RowTerms]) -> RowTerms:
    """Returns the terms of the ELBO of each row, averaged over draws.

    Arguments:
        terms: The terms of each draw, of the same rows.
    """
    reconstruction, kl = (
        torch.stack([part[i] for part in terms]).mean(0)  # type: ignore[misc]
        for i in range(2)
    )
    shared = [part.global_kl for part in terms if part.global_kl is not None]
    return RowTerms(reconstruction, kl, torch.stack(shared).mean(0) if shared else None)


class Totals(nn.Module):
    """Sums over rows of the ELBO's terms and of their squares, on the device."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(7, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def add(self, terms: RowTerms) -> None:
        """Adds the terms of some rows.

        Arguments:
            terms: The terms of the ELBO of these rows, in nats.
        """
        parts = torch.stack([terms.elbo, *terms[:2]]).double()
        summed = torch.stack([parts.sum(1), parts.square().sum(1)], 1).flatten()
        shared = torch.zeros_like(summed[:1])
        if terms.global_kl is not None:
            shared = (terms.global_kl.double() * parts.shape[1]).reshape(1)
        self.sums.add_(torch.cat([summed, shared]))

    def summary(self, num_rows: int, num_sharing: int) -> dict[str, float]:
        """Returns means over rows and their standard errors, in nats per row.

        The KL of global latents is divided evenly over the training rows.

        Arguments:
            num_rows: The number of rows that were added.
            num_sharing: The number of training rows, which share the global latents.
        """
        *means, global_kl = (total / num_rows for total in self.sums.tolist())
        shared = global_kl / num_sharing
        record = {}
        for i, (name, share) in enumerate(
            {"elbo": -shared, "reconstruction": 0.0, "kl": shared}.items()
        ):
            mean, square = means[2 * i : 2 * i + 2]
            variance = max(square - mean**2, 0.0) / max(num_rows - 1, 1)
            record[name] = mean + share
            record[f"{name}_se"] = math.sqrt(variance) if num_rows > 1 else math.nan
        return record


class _SavedBuffer:
    """A copy of a buffer, restored after a bad step that changed it in place or by assignment."""

    def __init__(self, buffers: dict[str, Tensor | None], name: str) -> None:
        self.buffers, self.name = buffers, name
        self.buffer = cast(Tensor, buffers[name])
        self.value = self.buffer.clone()

    @torch.no_grad()
    def restore_if(self, is_bad: Tensor) -> None:
        now = cast(Tensor, self.buffers[self.name])
        kept = torch.where(is_bad, self.value, now)
        if now is self.buffer and 0 not in now.stride():
            now.copy_(kept)
        elif now is not self.buffer:
            self.buffers[self.name] = kept


class _AsPyroOptim(PyroOptim):  # type: ignore[misc]
    """Adapter of one torch optimiser to the interface of Pyro's optimisers."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer

    def __call__(self, params: object, *args: object, **kwargs: object) -> None:
        self.optimizer.step()
