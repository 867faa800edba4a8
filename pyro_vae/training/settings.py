"""Settings: the numbers by which a fit is run."""

from dataclasses import dataclass

from ..data.checks import checked_count, checked_positive

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The numbers by which a fit is run, checked; see :func:`pyro_vae.fit`.

    Arguments:
        lr: The learning rate; `None` if the optimiser has its own.
        batch_size: The number of rows in a minibatch.
        max_steps: The largest number of steps; `None` for no limit.
        max_epochs: The largest number of epochs; `None` for no limit.
        max_seconds: The time after which the fit stops; `None` for no limit.
        warmup: The number of epochs in which the weight of the KL terms rises to 1.
        weight_prior: The standard deviation of the prior of network weights; `None` for none.
        averaged: Whether the program gets averages of the weights over the last steps.
        until_converged: Whether the fit stops if it has converged.
        max_grad_norm: The norm at which the gradient of the mean over a batch is clipped.
        seed: The seed.

    Raises:
        ValueError: If a number is out of range.
    """

    lr: float | None
    batch_size: int
    max_steps: int | None
    max_epochs: int | None
    max_seconds: float | None
    until_converged: bool
    warmup: int
    weight_prior: float | None
    averaged: bool
    max_grad_norm: float | None
    seed: int | None

    def __post_init__(self) -> None:
        checked: dict[str, float] = {
            "batch_size": checked_count("batch_size", self.batch_size),
            "warmup": checked_count("warmup", self.warmup, least=0),
        }
        for name in ("lr", "max_seconds", "max_grad_norm", "weight_prior"):
            if getattr(self, name) is not None:
                checked[name] = checked_positive(name, getattr(self, name))
        for name, least in (("max_steps", 1), ("max_epochs", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                checked[name] = checked_count(name, getattr(self, name), least=least)
        self.__dict__.update(checked)
        if self.max_epochs is not None and self.warmup > self.max_epochs:
            raise ValueError(
                f"The warm-up of {self.warmup} epochs is longer than max_epochs="
                f"{self.max_epochs}: the KL terms would never have their full weight. Take a "
                "shorter warm-up, or more epochs."
            )
