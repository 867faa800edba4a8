"""The evidence lower bound with the Kullback-Leibler divergence in closed form."""

import warnings

import pyro.infer
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Distribution

from .divergence import analytic_kl
from .estimator import refuse_unreparameterised
from .log_densities import (
    RowTerms,
    Site,
    Structure,
    is_one_scale,
    latent_sites,
    row_terms,
    unreparameterised,
)
from .trace_elbo import Trace_ELBO

__all__ = ["TraceMeanField_ELBO"]


class TraceMeanField_ELBO(Trace_ELBO, pyro.infer.TraceMeanField_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates the estimator of the evidence lower bound with an analytic KL divergence.

    .. math::
        \mathrm{ELBO}(x) = E_{q(z \mid x)}[\log p(x \mid z)] - \mathrm{KL}(q(z \mid x), p(z))
        \le \log p(x)

    A lower bound on log p(x); value and gradient are unbiased. The divergence is in closed form
    if torch or Pyro has a formula, and for full-covariance and low-rank normals against
    independent ones. Otherwise it is estimated from draws, with a warning once per site. A latent
    site may depend on those before it, but model and guide must draw the sites in the same order,
    since the value would be biased otherwise.

    Unlike `pyro.infer.TraceMeanField_ELBO` it applies the scales of the model as well as those of
    the guide, and refuses sites without `rsample` even if Pyro's validation is off.

    References:
        Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114, appendix B.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether all draws are made in one pass.

    Raises:
        ValueError: When called, if a site has no `rsample`, or the order of the sites differs.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), pv.posteriors.MultivariateNormal())
        >>> elbo = TraceMeanField_ELBO()
        >>> elbo(vae.model, vae.guide)(torch.ones(5, 4)).shape
        torch.Size([])
    """

    needs_rsample = True

    def __init__(
        self, num_particles: int = 1, *, vectorize_particles: bool = True, **options: object
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles, **options)
        self._warned: set[str] = set()

    def _of_traces(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, RowTerms]:
        particles = self.num_particles if self.vectorize_particles else 1
        guided = dict(latent_sites(guide_trace))
        refuse_unreparameterised(self, unreparameterised(guide_trace))
        order = [name for name in model_trace.nodes if name in guided]
        self._check_order(is_ordered=order == [name for name in guided if name in order])
        total: Tensor | float = 0.0
        divergences: dict[str, Tensor] = {}
        nodes: dict[str, Site] = model_trace.nodes
        for name, site in nodes.items():
            if site["type"] != "sample":
                continue
            own = guided.get(name)
            divergence = None
            if own is not None and own["mask"] is site["mask"]:
                divergence = analytic_kl(own["fn"], site["fn"])
            if own is not None and divergence is None:
                message = (
                    f"No analytic KL divergence for site {name!r}, from {_describe(own['fn'])} to "
                    f"{_describe(site['fn'])}: {self} estimates it from draws instead."
                )
                if message not in self._warned:
                    self._warned.add(message)
                    warnings.warn(message, UserWarning, stacklevel=1)
            if own is None or divergence is None:
                total = total + site["log_prob"].sum()
                continue
            divergences[name] = divergence
            del guided[name]
            whole = scale_and_mask(divergence, scale=own["scale"], mask=own["mask"])
            if not is_one_scale(own["scale"], site["scale"]):  # s_q E[log q] - s_p E[log p]
                rest = site["scale"] - own["scale"]
                log_prob = site["unscaled_log_prob"]
                whole = whole - scale_and_mask(log_prob, scale=rest, mask=site["mask"])
            total = total - whole.sum()
        for site in guided.values():
            total = total - site["log_prob"].sum()
        terms = row_terms(model_trace, guide_trace, particles, divergences)
        return -total / particles, terms  # type: ignore[return-value]

    def check(self, structure: Structure) -> None:
        """Refuses also a guide that draws the latent sites in another order than the model."""
        super().check(structure)
        self._check_order(is_ordered=structure.is_ordered)

    def _check_order(self, *, is_ordered: bool) -> None:
        if not is_ordered:
            raise ValueError(
                f"Expected a guide whose latent sites come in the model's order, under {self}; "
                "got another order. Trace_ELBO, STL and the multi-sample bounds accept it."
            )


def _describe(distribution: Distribution) -> str:
    base = getattr(distribution, "base_dist", None)
    name = type(distribution).__name__
    return name if base is None else f"{name}({_describe(base)})"
