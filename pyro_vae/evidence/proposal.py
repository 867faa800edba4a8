"""The proposal of importance sampling: the guide, and a part of the prior if z is constrained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.source import Row
from ..elbos.log_densities import Densities, Structure, log_densities, prior_densities
from ..engine.row_noise import Noise, RowNoise
from .scoring import Stratum

__all__ = ["PRIOR_SHARE", "Proposal", "spread_out"]

PRIOR_SHARE = 0.05


def spread_out(few: int, count: int) -> np.ndarray:
    """Marks `few` of `count` places, at even distances, shape (count,).

    Arguments:
        few: How many places are marked.
        count: The number of places.
    """
    places = (np.arange(few) + 0.5) * count / max(few, 1)
    return np.isin(np.arange(count), places.astype(int))


@dataclass(frozen=True, eq=False)
class Proposal:
    r"""Draws z, and evaluates the importance weights of the draws.

    If the prior of a latent site lies on a part of the real numbers, 5 % of the draws come from
    the prior, and the weights are those of the mixture (Owen & Zhou, 2000). The random numbers of
    these draws are a Latin hypercube, so that they reach all parts of the prior evenly.

    .. math:: w_s = \frac{p(x, z_s)}{(1 - \alpha)\, q(z_s \mid x) + \alpha\, p(z_s)}
        \le \frac{p(x \mid z_s)}{\alpha}

    References:
        Safe and effective importance sampling (Owen & Zhou, 2000),
        doi 10.1080/01621459.2000.10473909.

    Arguments:
        program: A module with the Pyro programs `model(x)` and `guide(x)`.
        known: Its sites and plates.
        num_samples: The number of draws of each row.
    """

    program: nn.Module
    known: Structure
    num_samples: int

    @property
    def num_prior(self) -> int:
        """The number of draws of each row that come from the prior."""
        return math.ceil(PRIOR_SHARE * self.num_samples) if self.known.constrained else 0

    @property
    def is_prior(self) -> np.ndarray:
        """Whether each draw comes from the prior, shape (num_samples,), at even distances."""
        return spread_out(self.num_prior, self.num_samples)

    def strata(self, few: Row, seed: int) -> list[Stratum]:
        """Returns the draws from the guide, and those from the prior if there are any.

        Arguments:
            few: A few rows, with which the operations that need random numbers are recorded.
            seed: The seed.
        """
        with RowNoise(self.known.rows_dim) as of_guide:
            log_densities(self.program, few, 2, known=self.known)
        guided = Noise(of_guide.sizes, self.num_samples - self.num_prior, seed)
        if not self.num_prior:
            return [Stratum(self.from_guide, guided)]
        with RowNoise(self.known.rows_dim) as of_prior:
            prior_densities(self.program, few, 2, known=self.known)
        spread = Noise(of_prior.sizes, self.num_prior, seed + 1, is_stratified=True)
        return [Stratum(self.from_guide, guided), Stratum(self.from_prior, spread)]

    def of_rows(self, piece: slice) -> Mapping[str, Tensor]:  # noqa: ARG002
        """The guide needs the data of the rows alone."""
        return {}

    def from_guide(self, x: Any, count: int) -> dict[str, Tensor]:
        """Draws z from the guide.

        Arguments:
            x: A dict of the rows, `"row"`, and of their random numbers: the `"table"` and
                `"shifts"` of :class:`~pyro_vae.engine.row_noise.RowNoise`.
            count: The number of draws.

        Returns:
            `log_weights` of the proposal, and `elbo_terms`, log p(x, z) - log q(z | x), of shape
            (count, rows).
        """
        with RowNoise(self.known.rows_dim, x["table"], x["shifts"]):
            found = log_densities(self.program, x["row"], count, known=self.known)
        if not self.num_prior:
            return {"log_weights": found.log_weights}
        return {"log_weights": self._log_weights(found), "elbo_terms": found.log_weights}

    def from_prior(self, x: Any, count: int) -> dict[str, Tensor]:
        """Draws z from the prior, and returns their `log_weights`, shape (count, rows).

        Arguments:
            x: As for :meth:`from_guide`.
            count: The number of draws.
        """
        with RowNoise(self.known.rows_dim, x["table"], x["shifts"]):
            found = prior_densities(self.program, x["row"], count, known=self.known)
        return {"log_weights": self._log_weights(found)}

    def _log_weights(self, found: Densities) -> Tensor:
        share = self.num_prior / self.num_samples
        parts = (math.log1p(-share) + found.log_guide, math.log(share) + found.log_prior)
        return found.log_joint - torch.logaddexp(*parts)
