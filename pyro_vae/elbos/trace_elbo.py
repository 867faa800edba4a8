"""The evidence lower bound by draws from the guide."""

from collections.abc import Sequence
from typing import Any

import pyro.infer
import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .estimator import Estimate, Estimator
from .handed import Handed
from .log_densities import Program, RowTerms, row_terms

__all__ = ["PLAIN_PARTICLES", "Trace_ELBO", "mean_terms_of"]

PLAIN_PARTICLES = 8


class Trace_ELBO(Handed, pyro.infer.Trace_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates Pyro's estimator of the evidence lower bound, its numbers kept on the device.

    .. math:: \mathrm{ELBO}(x) = E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)] \le \log p(x)

    A lower bound on log p(x); value and gradient are unbiased. The gradient is the
    reparameterised one, and where a site has no `rsample` the score function's, with Pyro's
    Rao-Blackwellisation over plates. Under one seed value and gradient are those of
    `pyro.infer.Trace_ELBO`, draw for draw.

    References:
        | Black box variational inference (Ranganath, Gerrish & Blei, 2014), arXiv 1401.0118.
        | Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether they are drawn in one pass.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> elbo = Trace_ELBO(num_particles=3)
        >>> elbo.per_row(vae.model, vae.guide, torch.ones(5, 4)).value.shape
        torch.Size([5])
        >>> elbo(vae.model, vae.guide)(torch.ones(5, 4)).backward()
    """

    def plain(self) -> Estimator:
        """Returns the ELBO by autograd, of several draws."""
        return Trace_ELBO(PLAIN_PARTICLES)

    def _estimate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Estimate:
        traces = self._get_traces(model, guide, args, kwargs)
        losses, terms = zip(*(self._of_traces(*pair) for pair in traces), strict=True)
        mean = mean_terms_of(terms)
        loss = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
        per_row = mean.reconstruction - self.kl_weight * mean.kl
        return Estimate(loss, per_row if mean.global_kl is None else None, mean)

    def _of_traces(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, RowTerms]:
        particles = self.num_particles if self.vectorize_particles else 1
        surrogate = self._surrogate(model_trace, guide_trace)
        value: Any = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        loss = -(value.detach() + surrogate - surrogate.detach()) / particles
        return loss, row_terms(model_trace, guide_trace, particles)

    def _surrogate(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        total: Any = model_trace.log_prob_sum()
        log_r = None
        for _, site in guide_trace.nodes.items():
            if site["type"] != "sample":
                continue
            _, score_function_term, entropy_term = site["score_parts"]
            if not is_identically_zero(entropy_term):
                total = total - entropy_term.sum()
            if not is_identically_zero(score_function_term):
                log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
                weight = log_r.sum_to(site["cond_indep_stack"])
                total = total + (weight * score_function_term).sum()
        return total


def mean_terms_of(terms: Sequence[RowTerms]) -> RowTerms:
    """Returns the mean of the terms of several passes.

    Arguments:
        terms: Those of each.
    """
    if len(terms) == 1:
        return terms[0]
    parts: Any = zip(*terms, strict=True)
    means = [None if part[0] is None else torch.stack(part).mean(0) for part in parts]
    return RowTerms._make(means)
