"""History: what happened in a fit, epoch by epoch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import pandas as pd

from .. import plots

if TYPE_CHECKING:
    from ..plots.canvas import Canvas

__all__ = ["History", "NonFiniteError", "Record"]

Record: TypeAlias = dict[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """What happened in a fit, epoch by epoch.

    Arguments:
        table: One line an epoch, indexed by `epoch`, in nats per row: `elbo`, `reconstruction` and
            `kl` of the training rows under the changing weights of the epoch, each with its
            standard error (`elbo_se`, ...) over rows and their draws of z; the same with the
            prefix `validation_` for the rows held out, at the averaged weights, in the epochs
            that were checked, else NaN; `kl_weight` if there was a warm-up, and `seconds`. The
            ELBO is without the warm-up's weight and without the prior of the network weights.
            Latents that all rows share add nothing to the standard errors.
        best_epoch: The epoch whose weights the program has. (After Ctrl-C without validation the
            weights include the steps of the unfinished epoch after it.)
        stopped: What ended the fit: `"converged"`, `"no gain"`, `"max_steps"`, `"max_epochs"`,
            `"max_seconds"`, `"callback"` or `"interrupted"`.
        seed: The seed of the fit.
        engine: The engine that took the steps.
        why: Why that engine was chosen.
        converged: Whether the fit has converged: three times as many steps would change the
            objective by less than 0.1 nats per row. `None` if that is not known.
        reason: Why the fit ended, in words. If it has not converged, the reason says how much the
            objective still rose.
    """

    table: pd.DataFrame
    best_epoch: int
    stopped: str
    seed: int | None = None
    engine: str = "eager"
    why: str = ""
    converged: bool | None = None
    reason: str = ""

    def plot(self) -> "Canvas":
        """Draws the training curve, and returns the matplotlib figure."""
        return plots.history(self)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        elbo = self.table["elbo"].get(self.best_epoch, math.nan) if len(self) else math.nan
        return (
            f"History({len(self)} epochs, stopped={self.stopped!r}, converged={self.converged}, "
            f"best_epoch={self.best_epoch}, elbo={elbo:.2f})"
        )


class NonFiniteError(FloatingPointError):
    """Raised if the loss of a fit, or its gradient, becomes NaN or infinite.

    Arguments:
        message: The epoch, batch and rows.
        history: The epochs before.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history
