"""Log-probabilities of counts that are right at any size of counts and parameters.

Their terms are as large as the count times its logarithm and cancel, so that float32 loses all
digits of a log-probability near 1e6. They are computed in float64 and rounded at the end. What
depends on the data alone is computed once for all draws, so most cost no more than torch's.
"""

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from .special import log_binomial, log_rising, once, rounded

__all__ = ["BetaBinomial", "Binomial", "NegativeBinomial", "Poisson"]

LINEAR = 40.0  # from here on log(1 + e^l) is l in float64
LEAST = 1e-100  # in the place of a total count of 0, at which the logarithms are infinite


class Poisson(dist.Poisson):  # type: ignore[misc]
    """Pyro's Poisson, with a log-probability in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Counts, of a shape that broadcasts with the rate.
        """
        if self._validate_args:
            self._validate_sample(value)
        rate, counts = once(self.rate).double(), value.double()
        log_prob = torch.xlogy(counts, rate) - rate - (counts + 1.0).lgamma()
        return rounded(log_prob, value, self.rate)


class Binomial(dist.Binomial):  # type: ignore[misc]
    """Pyro's binomial, with a log-probability in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Counts, of a shape that broadcasts with the logits.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits = self.logits
        total, counts, wide = once(self.total_count).double(), value.double(), logits.double()
        odds = counts * wide - total * F.softplus(wide, threshold=LINEAR)
        return rounded(odds + log_binomial(total, counts), value, logits)


class NegativeBinomial(dist.NegativeBinomial):  # type: ignore[misc]
    """Pyro's negative binomial, with a log-probability in float64, also near the Poisson limit."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Counts, of a shape that broadcasts with the logits.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits = self.logits
        total = once(self.total_count).double().clamp_min(LEAST)
        counts, wide = value.double(), logits.double()
        odds = counts * wide - (counts + total) * F.softplus(wide, threshold=LINEAR)
        ways = log_rising(total, counts) - (counts + 1.0).lgamma()
        return rounded(odds + ways, value, logits)


class BetaBinomial(dist.BetaBinomial):  # type: ignore[misc]
    """Pyro's beta-binomial, with a log-probability in float64, also near the binomial limit."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value).

        Arguments:
            value: Counts, of a shape that broadcasts with the concentrations.
        """
        if self._validate_args:
            self._validate_sample(value)
        first, second = self.concentration1.double(), self.concentration0.double()
        total, counts = once(self.total_count).double(), value.double()
        rises = log_rising(first, counts) + log_rising(second, total - counts)
        log_prob = log_binomial(total, counts) + rises - log_rising(first + second, total)
        return rounded(log_prob, value, self.concentration1)
