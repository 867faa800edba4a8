"""Makes optimisers, and steps them without waiting for the device."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["MakeOptimizer", "Updates", "optimizer_of"]

MakeOptimizer: TypeAlias = type[Optimizer] | Callable[..., Optimizer] | PyroOptim
Group: TypeAlias = dict[str, Any]  # of torch.optim: parameters and options by name


class Updates:
    """Steps an optimiser on gradients, or changes nothing if the step is marked as bad.

    For Adam and AdamW in their fused form the kernel is called directly, which saves two thirds of
    the Python code of `Optimizer.step`. It changes the state of the optimiser itself.

    Arguments:
        optimizer: The optimiser.
        parameters: The parameters that it optimises.

    Attributes:
        is_warm: Whether the optimiser has created its state, which it does in its first step.
        version: The number of times that this state was replaced.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> updates = Updates(torch.optim.SGD([weight], lr=1.0), [weight])
        >>> updates([torch.ones(2)], torch.zeros(()))
        >>> updates([torch.ones(2)], torch.ones(()))
        >>> weight.tolist()
        [-1.0, -1.0]
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer, self.parameters = optimizer, list(parameters)
        self._fused: _FusedAdam | None = None
        self._rates: list[_Rate] = []
        self.is_warm = False
        self.version = 0
        optimizer.register_load_state_dict_post_hook(self._reset)

    def __call__(
        self,
        gradients: Sequence[Tensor | None],
        is_bad: Tensor,
        is_good: Tensor | None = None,
    ) -> None:
        """Takes a step.

        Arguments:
            gradients: The gradient of each parameter; `None` leaves that parameter unchanged.
            is_bad: 1 if the step must change nothing, else 0; shape ().
            is_good: 1 - is_bad, shape (), if the caller has computed it.
        """
        if self._fused is not None and self._fused.takes(gradients):
            self._fused.step(gradients, is_bad, 1.0 - is_bad if is_good is None else is_good)
            return
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.found_inf = is_bad  # type: ignore[attr-defined]
            self.optimizer.step()
        else:  # A bad step is undone without reading `is_bad` off the device.
            before = {key: t.detach().clone() for key, t in _tensors_of(self.optimizer).items()}
            self.optimizer.step()
            is_kept = is_bad.bool()
            with torch.no_grad():
                for key, tensor in _tensors_of(self.optimizer).items():
                    value = before.get(key, torch.zeros_like(tensor))
                    tensor.copy_(torch.where(is_kept, value, tensor))
        self.optimizer.zero_grad(set_to_none=True)
        self.is_warm = True
        self._fused = _FusedAdam.of(self.optimizer, self.parameters, gradients)

    @contextlib.contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """Holds the learning rates in tensors, which a capture reads and `follow_rates` sets."""
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        if not self._rates:
            self._rates = [_Rate(group) for group in groups]
        self.follow_rates()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate.tensor
                if "capturable" in group:
                    group["capturable"] = True
            yield
        finally:
            for group, options in zip(groups, before, strict=True):
                group.update(options)

    def follow_rates(self) -> None:
        """Copies the current learning rates to the tensors that a capture reads."""
        for rate in self._rates:
            rate.follow()

    def state(self) -> list[Tensor]:
        """Returns all tensors that a step changes."""
        return list(_tensors_of(self.optimizer).values())

    def _reset(self, optimizer: Optimizer) -> None:
        self._fused, self.is_warm = None, False
        self.version += 1


class _Rate:
    """The learning rate of a group of parameters, in a tensor on their device."""

    def __init__(self, group: Group) -> None:
        self.group, self.value = group, math.nan
        device = group["params"][0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # as kernels expect
        self.tensor = torch.full((), math.nan, dtype=dtype, device=device)

    def follow(self) -> None:
        if self.group["lr"] != self.value:
            self.value = self.group["lr"]
            self.tensor.fill_(self.value)


class _FusedAdam:
    """The state of an Adam or AdamW in fused form, with one group and no further options."""

    def __init__(
        self,
        group: Group,
        parameters: list[Tensor],
        state: Mapping[Tensor, dict[str, Tensor]],
        missing: tuple[bool, ...],
    ) -> None:
        self.group, self.missing = group, missing
        self.parameters = parameters
        self.first, self.second, self.steps = (
            [state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        is_decoupled = group.get("decoupled_weight_decay", False)
        self.kernel = torch._fused_adamw_ if is_decoupled else torch._fused_adam_

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        parameters: list[nn.Parameter],
        gradients: Sequence[Tensor | None],
    ) -> "_FusedAdam | None":
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return None
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        group = optimizer.param_groups[0]
        moved: list[Tensor] = [
            p for p, g in zip(parameters, gradients, strict=True) if g is not None
        ]
        is_plain = (
            len(optimizer.param_groups) == 1
            and bool(group.get("fused"))
            and not group.get("amsgrad")
            and not hooks
            and len({(p.device, p.dtype) for p in moved}) == 1
            and all("exp_avg" in optimizer.state.get(p, {}) for p in moved)
        )
        missing = tuple(gradient is None for gradient in gradients)
        return cls(group, moved, dict(optimizer.state), missing) if is_plain else None

    def takes(self, gradients: Sequence[Tensor | None]) -> bool:
        return tuple([gradient is None for gradient in gradients]) == self.missing

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], is_bad: Tensor, is_good: Tensor) -> None:
        beta1, beta2 = self.group["betas"]
        torch._foreach_add_(self.steps, [is_good] * len(self.steps))
        self.kernel(
            self.parameters,
            [gradient for gradient in gradients if gradient is not None],
            self.first,
            self.second,
            [],
            self.steps,
            lr=self.group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            amsgrad=False,
            maximize=self.group["maximize"],
            grad_scale=None,
            found_inf=is_bad,
        )


def optimizer_of(
    make: MakeOptimizer, parameters: Iterable[nn.Parameter], **defaults: float
) -> Optimizer:
    """Makes one torch optimiser for all parameters, in its fused form if it has one.

    Arguments:
        make: A class of `torch.optim`, a `functools.partial` of one, or a `pyro.optim` optimiser.
        parameters: The parameters to optimise.
        defaults: Options, such as a learning rate, that apply unless `make` sets them.

    Raises:
        ValueError: If the optimiser cannot be made.
    """
    match make:
        case PyroOptim():
            if callable(make.pt_optim_args) or make.pt_clip_args:
                raise ValueError(
                    "Expected a pyro.optim optimiser with one dict of options for all parameters, "
                    "and clipping left to max_grad_norm; got options or clipping by parameter."
                )
            constructor = cast(type[Optimizer], make.pt_optim_constructor)
            given = functools.partial(constructor, **make.pt_optim_args)
            return optimizer_of(given, parameters, **defaults)
        case functools.partial():
            target, own = make.func, make.keywords
        case _ if callable(make):
            target, own = make, {}
        case _:
            raise ValueError(f"Expected an optimiser such as torch.optim.Adam; got {make!r}.")
    options: Group = {name: value for name, value in defaults.items() if name not in own}
    parameters = list(parameters)
    has_fused = inspect.isclass(target) and "fused" in inspect.signature(target).parameters
    if has_fused and "fused" not in own and "foreach" not in own:
        devices = {p.device.type if p.is_floating_point() else "" for p in parameters}
        if devices <= {"cpu", "cuda"}:
            options["fused"] = True
    try:
        optimizer = make(parameters, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected an optimiser such as torch.optim.Adam; got {error}."
        ) from error
    is_one = isinstance(optimizer, Optimizer)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure") if is_one else None
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if not is_one or needs_closure:
        raise ValueError(
            "Expected an optimiser that steps on gradients, such as torch.optim.Adam; got "
            f"{type(optimizer).__name__}."
        )
    return optimizer


def _tensors_of(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        (id(p), name): value
        for p, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    return {(id(p), ""): p for p in parameters} | states
