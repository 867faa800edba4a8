"""Stochastic variational inference whose step asks the device for nothing."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import pyro.infer
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer

from .elbos import Estimate, Objective
from .importance import Program

__all__ = ["SVI", "MakeOptimizer", "optimizer_of"]

MakeOptimizer: TypeAlias = type[Optimizer] | Callable[..., Optimizer] | PyroOptim


class SVI(pyro.infer.SVI):  # type: ignore[misc]
    r"""Creates Pyro's SVI, with one optimiser, and no number read off the device.

    A step whose loss or gradient is not finite changes no weight, no buffer and no moment of the
    optimiser, nor does any after it: `is_bad`, a tensor on the device, says so. `row_weight` says
    how often a row counts in the loss, N / B where a minibatch stands for all rows.

    Arguments:
        model: The model: a method of the module that owns the parameters.
        guide: The guide, likewise.
        optim: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim` optimiser.
        loss: An estimator of `pyro_vae.elbos`, or one of Pyro's own ELBOs.
        lr: The learning rate, where the optimiser has none of its own.
        max_grad_norm: Where to clip the norm of the gradient of the objective's mean over rows.

    Raises:
        ValueError: Where the programs own no parameters, or the optimiser cannot be made.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> svi = SVI(vae.model, vae.guide, torch.optim.Adam, pv.elbos.Trace_ELBO())
        >>> svi.step(torch.ones(5, 4)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: MakeOptimizer,
        loss: pyro.infer.ELBO,
        *,
        lr: float | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.objective = Objective(model, guide, loss)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "Expected a model or guide that is a method of a module with parameters to train; "
                "got none."
            )
        given = {} if lr is None else {"lr": lr}
        self.optimizer = optimizer_of(optim, self.parameters, **given)
        self.max_grad_norm = max_grad_norm
        self.row_weight = 1.0
        self.is_bad = self.parameters[0].new_zeros((), dtype=torch.float32)
        super().__init__(model, guide, _AsPyroOptim(self.optimizer), loss)

    def update(self, *args: Any, **kwargs: Any) -> Estimate:
        """Takes a step, and returns the estimate that it was taken on, on the device.

        Arguments:
            args: What model and guide are called with.
            kwargs: The same, by name.
        """
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [_Kept(*place) for place in self._buffers()]
        estimate = self.objective(*args, **kwargs)
        estimate.loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm) & torch.isfinite(estimate.loss.detach())
        torch.maximum(self.is_bad, (~finite).to(self.is_bad.dtype), out=self.is_bad)
        if self.max_grad_norm is not None:
            rows = self.row_weight * len(estimate.terms.reconstruction)
            limit = self.max_grad_norm * rows
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        _step_unless(self.optimizer, self.is_bad)
        for buffer in buffers:
            buffer.take_back(self.is_bad.bool())
        self.optimizer.zero_grad(set_to_none=True)
        return estimate

    def _buffers(self) -> Iterator[tuple[dict[str, Any], str]]:
        """What a forward pass may change, and a bad one must not: running means, say."""
        for module in self.objective.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield module._buffers, name

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a step, and returns the loss it was taken on, shape (), on the device.

        Arguments:
            args: What model and guide are called with.
            kwargs: The same, by name.
        """
        return self.update(*args, **kwargs).loss.detach()


def optimizer_of(
    make: MakeOptimizer, parameters: Iterable[nn.Parameter], **given: Any
) -> Optimizer:
    """Makes one torch optimiser for all parameters, in its fused form where it has one.

    Arguments:
        make: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim` optimiser.
        parameters: What to optimise.
        given: Options that are not given already, a learning rate, say.

    Raises:
        ValueError: Where it cannot be made.
    """
    build: Any = _torch_constructor(make)
    said = build.keywords if isinstance(build, functools.partial) else {}
    options = {name: value for name, value in given.items() if name not in said}
    parameters = list(parameters)
    if _can_fuse(build, parameters) and "fused" not in said and "foreach" not in said:
        options["fused"] = True
    try:
        optimizer = build(parameters, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Expected an optimiser such as torch.optim.Adam; got {error}") from error
    if not isinstance(optimizer, Optimizer) or _needs_closure(optimizer):
        raise ValueError(
            "Expected an optimiser that steps on gradients, such as torch.optim.Adam; got "
            f"{type(optimizer).__name__}."
        )
    return optimizer


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _torch_constructor(make: Any) -> Any:
    if not isinstance(make, PyroOptim):
        if not callable(make):
            raise ValueError(f"Expected an optimiser such as torch.optim.Adam; got {make!r}.")
        return make
    pyro_constructor: Any = make.pt_optim_constructor
    if callable(make.pt_optim_args) or make.pt_clip_args:
        raise ValueError(
            "Expected a pyro.optim optimiser with one dict of options for all parameters, and "
            "clipping left to max_grad_norm; got options or clipping by parameter."
        )
    return functools.partial(pyro_constructor, **make.pt_optim_args)


def _can_fuse(build: Any, parameters: list[nn.Parameter]) -> bool:
    target = build.func if isinstance(build, functools.partial) else build
    if not (inspect.isclass(target) and "fused" in inspect.signature(target).parameters):
        return False
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _step_unless(optimizer: Optimizer, is_bad: Tensor) -> None:
    """Steps, but changes nothing where `is_bad` is 1: without asking the device which it is."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = is_bad  # type: ignore[attr-defined]
        optimizer.step()
        return
    _step_and_take_back(optimizer, is_bad.bool())


def _step_and_take_back(optimizer: Optimizer, is_bad: Tensor) -> None:
    before = {key: t.detach().clone() for key, t in _tensors_of(optimizer).items()}
    optimizer.step()
    after = _tensors_of(optimizer)
    _take_back(is_bad, [(t, before.get(k, torch.zeros_like(t))) for k, t in after.items()])


@torch.no_grad()
def _take_back(is_bad: Tensor, changes: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in changes:
        tensor.copy_(torch.where(is_bad, before, tensor))


def _tensors_of(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        (id(p), name): value
        for p, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    return {(id(p), ""): p for p in parameters} | states


class _Kept:
    """A buffer as it was, put back where a step was bad: changed in place, or by assignment."""

    def __init__(self, buffers: dict[str, Any], name: str) -> None:
        self.buffers, self.name, self.buffer = buffers, name, buffers[name]
        self.value = self.buffer.clone()

    @torch.no_grad()
    def take_back(self, is_bad: Tensor) -> None:
        now = self.buffers[self.name]
        kept = torch.where(is_bad, self.value, now)
        if now is self.buffer and 0 not in now.stride():
            now.copy_(kept)
        elif now is not self.buffer:
            self.buffers[self.name] = kept


class _AsPyroOptim(PyroOptim):  # type: ignore[misc]
    """One torch optimiser in the place where Pyro's SVI keeps one for each parameter."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.optimizer.step(*args, **kwargs)
