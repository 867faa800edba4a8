"""The evidence lower bound by draws from the guide."""

from collections.abc import Sequence
from typing import cast

import pyro.infer
import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..data.checks import checked, checked_draws
from .estimator import Estimate, Estimator, tempered
from .log_densities import Program, RowTerms, row_terms

__all__ = ["PLAIN_PARTICLES", "PyroELBO", "Trace_ELBO", "mean_terms_of"]

PLAIN_PARTICLES = 8


class PyroELBO(Estimator):
    """The base class of the estimators that extend one of Pyro's.

    To add an estimator, subclass it and Pyro's class, and write `estimate`, in which the programs
    run with the weight of the KL terms as a scale, by `tempered`.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether all draws are made in one pass.
        options: Further arguments of Pyro's class.
    """

    needs_rsample = False
    takes_globals = True

    @checked
    def __init__(
        self, num_particles: int = 1, *, vectorize_particles: bool = True, **options: object
    ) -> None:
        num_particles = checked_draws("num_particles", num_particles)
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles and num_particles > 1,
            **options,
        )

    def _averaged(self, losses: Sequence[Tensor], terms: Sequence[RowTerms]) -> Estimate:
        """The mean over passes. There is an objective of each row if no site is global."""
        mean = mean_terms_of(terms)
        loss = torch.stack([*losses]).mean() if len(losses) > 1 else losses[0]
        per_row = mean.reconstruction - self.kl_weight * mean.kl
        return Estimate(loss, per_row if mean.global_kl is None else None, mean)

    def plain(self) -> Estimator:
        """Returns the ELBO of several draws, with autograd's gradient."""
        return Trace_ELBO(PLAIN_PARTICLES)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_particles}, "
            f"vectorize_particles={self.vectorize_particles})"
        )


class Trace_ELBO(PyroELBO, pyro.infer.Trace_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates Pyro's estimator of the evidence lower bound, without waiting for the device.

    .. math:: \mathrm{ELBO}(x) = E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)] \le \log p(x)

    A lower bound on log p(x); value and gradient are unbiased. The gradient is the
    reparameterised one; for a site without `rsample` it is that of the score function, with Pyro's
    Rao-Blackwellisation over plates. With the same seed, value and gradient are those of
    `pyro.infer.Trace_ELBO`.

    References:
        | Black box variational inference (Ranganath, Gerrish & Blei, 2014), arXiv 1401.0118.
        | Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether all draws are made in one pass.

    Raises:
        ValueError: If `num_particles` is not a positive integer.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli())
        >>> elbo = Trace_ELBO(3)
        >>> elbo.per_row(vae, torch.ones(5, 4)).value.shape
        torch.Size([5])
        >>> elbo(vae.model, vae.guide)(torch.ones(5, 4)).backward()
    """

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Returns the mean over the draws, which are one pass if the particles are vectorised."""
        with tempered(self.kl_weight):
            traces = self._get_traces(model, guide, args, kwargs)
            losses, terms = zip(*(self._of_traces(*pair) for pair in traces), strict=True)
        return self._averaged(losses, terms)

    def _of_traces(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, RowTerms]:
        particles = self.num_particles if self.vectorize_particles else 1
        surrogate, log_r = cast(Tensor, model_trace.log_prob_sum()), None
        for site in guide_trace.nodes.values():
            if site["type"] != "sample":
                continue
            parts: tuple[Tensor, ...] = site["score_parts"]
            _, score_function_term, entropy_term = parts
            if not is_identically_zero(entropy_term):
                surrogate = surrogate - entropy_term.sum()
            if not is_identically_zero(score_function_term):
                log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
                weight = log_r.sum_to(site["cond_indep_stack"])
                surrogate = surrogate + (weight * score_function_term).sum()
        value = cast(Tensor, model_trace.log_prob_sum() - guide_trace.log_prob_sum())
        loss = -(value.detach() + surrogate - surrogate.detach()) / particles
        return loss, row_terms(model_trace, guide_trace, particles)


def mean_terms_of(terms: Sequence[RowTerms]) -> RowTerms:
    """Returns the mean of the terms over several passes.

    Arguments:
        terms: The terms of each pass.
    """
    if len(terms) == 1:
        return terms[0]
    shared = [part.global_kl for part in terms if part.global_kl is not None]
    return RowTerms(
        torch.stack([part.reconstruction for part in terms]).mean(0),
        torch.stack([part.kl for part in terms]).mean(0),
        torch.stack(shared).mean(0) if shared else None,
    )
