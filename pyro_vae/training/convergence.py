"""Convergence: whether more steps would still change the objective, with an error."""

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Check", "Convergence"]

RATIO = math.sqrt(3.0)  # of the steps of a check to those of the check before it
TOLERANCE = 0.1  # nats per row, which training three times as long would have to gain
EARLIEST = 1000  # steps before which a fit whose latents carry nothing is not converged
DEAD = 0.1  # nats per row of KL, below which no latent carries anything


@dataclass(frozen=True, eq=False)
class Check:
    """The objective of some rows after a number of steps.

    Arguments:
        steps: The number of steps.
        epoch: The epoch.
        scores: The objective of each row, at the averaged weights, shape (rows,), in nats.
        kl: The mean KL of the rows' latents, in nats; NaN if there are none.
    """

    steps: int
    epoch: int
    scores: Tensor
    kl: float

    @property
    def mean(self) -> float:
        """The mean objective, -inf if it is not a number."""
        mean = float(self.scores.mean())
        return -math.inf if math.isnan(mean) else mean

    def gain_over(self, other: "Check") -> tuple[float, float]:
        """Returns the mean gain over an earlier check and its paired standard error, in nats.

        Arguments:
            other: The earlier check, of the same rows.
        """
        gains = (self.scores - other.scores).double()
        if len(gains) < 2:
            return float(gains.mean()), math.nan
        return float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))

    def has_kl_of(self, other: "Check") -> bool:
        """Whether the KL is that of an earlier check, up to a tenth of it and 0.1 nats.

        After a warm-up the latents carry too much, and may lose it while the objective is flat.

        Arguments:
            other: The earlier check.
        """
        return not abs(self.kl - other.kl) > TOLERANCE * (1.0 + other.kl)


@dataclass(eq=False)
class Convergence:
    r"""Decides whether a fit has converged.

    The rows are checked after numbers of steps that grow by the square root of 3. The fit has
    converged at step t if, from t / 3 on, the mean gain per row plus two paired standard errors
    is below 0.1 nats at both checks, and the KL has settled: three times as many steps brought
    nothing. If the rows were held out, the same holds for the gain since the best check, if that
    was at t / 3 or before.
    Rows that have not gained since t / 3, but are too few for such an error, end the fit too, and
    whether it has converged is not known.

    Arguments:
        is_held_out: Whether the checked rows are held out.
        checks: The checks so far.
    """

    is_held_out: bool
    checks: list[Check] = field(default_factory=list)

    def is_due(self, steps: int) -> bool:
        """Whether the next check is to be made after so many steps.

        Arguments:
            steps: The number of steps taken.
        """
        return not self.checks or steps >= RATIO * self.checks[-1].steps - 0.5

    @property
    def best(self) -> Check | None:
        """The check whose weights the program gets: the best of held-out rows, else the last."""
        if not self.is_held_out:
            return self.checks[-1] if self.checks else None
        return max(self.checks, key=lambda check: check.mean, default=None)

    def verdict(self) -> tuple[bool | None, str] | None:
        """Returns whether the fit has converged and the reason, or `None` if it goes on."""
        if not self.checks:
            return None
        now, best = self.checks[-1], self.best
        before = [check for check in self.checks if check.steps <= now.steps / (RATIO**2 - 0.1)]
        if not before or best is None or (now.kl < DEAD and now.steps < EARLIEST):
            return None
        what = "held-out rows" if self.is_held_out else "the training rows"
        since = self.checks[self.checks.index(before[-1]) + 1 :]
        gains = [check.gain_over(before[-1]) for check in since]
        is_flat = all(gain + 2.0 * error < TOLERANCE for gain, error in gains)
        if is_flat and now.has_kl_of(before[-1]):
            return True, f"{what} no longer gain"
        if best.steps > before[-1].steps:
            return None
        gain, error = now.gain_over(best)
        if gain + 2.0 * error < 0.0:
            return True, f"{what} lose: more steps overfit"
        if gain + 2.0 * error < TOLERANCE:
            return (True, f"{what} no longer gain") if now.has_kl_of(before[-1]) else None
        return None, (
            f"{what} have not gained since step {best.steps} of {now.steps}, but the change since "
            f"then, {gain:.2g} +- {error:.1g} nats per row, is too uncertain to call the fit "
            "converged"
        )

    def rise(self) -> tuple[float, float]:
        """Returns the gain per 1000 steps between the last two checks, and its error, in nats."""
        if len(self.checks) < 2:
            return math.nan, math.nan
        earlier, now = self.checks[-2:]
        per = 1000.0 / (now.steps - earlier.steps)
        gain, error = now.gain_over(earlier)
        return per * gain, per * error

    def tensors(self) -> dict[str, Tensor]:
        """Returns the checks as tensors, for a checkpoint."""
        return {f"{check.steps}.{check.epoch}.{check.kl!r}": check.scores for check in self.checks}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Undoes :meth:`tensors`.

        Arguments:
            tensors: Its result, on the CPU.
        """
        found = []
        for key, scores in tensors.items():
            steps, epoch, kl = key.split(".", 2)
            found.append(Check(int(steps), int(epoch), scores, float(kl)))
        self.checks = sorted(found, key=lambda check: check.steps)
