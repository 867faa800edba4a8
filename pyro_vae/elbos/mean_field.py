"""The evidence lower bound with the Kullback-Leibler divergence in closed form."""

import warnings
from typing import Any

import pyro.infer
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .divergence import analytic_kl
from .estimator import refuse_unreparameterised
from .log_densities import RowTerms, Structure, is_one_scale, latent_sites, row_terms
from .trace_elbo import Trace_ELBO

__all__ = ["TraceMeanField_ELBO"]


class TraceMeanField_ELBO(Trace_ELBO, pyro.infer.TraceMeanField_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates the estimator of the evidence lower bound with an analytic KL divergence.

    .. math::
        \mathrm{ELBO}(x) = E_{q(z \mid x)}[\log p(x \mid z)] - \mathrm{KL}(q(z \mid x), p(z))
        \le \log p(x)

    A lower bound on log p(x); value and gradient are unbiased. The divergence is in closed form
    where torch or Pyro know it, and for full-covariance and low-rank normals against independent
    ones; else it is drawn, and a warning says so, once. Latent sites may depend on those before
    them, but must come in one order in model and guide: else the value would be biased.

    Unlike `pyro.infer.TraceMeanField_ELBO` it heeds a scale on the model as well as on the guide,
    and refuses sites without `rsample` whether or not Pyro validates.

    References:
        Auto-encoding variational Bayes (Kingma & Welling, 2014), arXiv 1312.6114, appendix B.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether they are drawn in one pass.

    Raises:
        ValueError: When called, where a site has no `rsample`, or the order of the sites differs.

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
        self, num_particles: int = 1, *, vectorize_particles: bool = True, **options: Any
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles, **options)
        self._told: set[str] = set()

    def _of_traces(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, RowTerms]:
        particles = self.num_particles if self.vectorize_particles else 1
        guided = dict(latent_sites(guide_trace))
        self._check_sites(model_trace, guided)
        total: Any = 0.0
        divergences: dict[str, Tensor] = {}
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            known = self._known(name, guided[name], site) if name in guided else None
            if known is None:
                total = total + site["log_prob"].sum()
                continue
            divergences[name] = known
            total = total - _weighted(known, guided.pop(name), site).sum()
        for site in guided.values():
            total = total - site["log_prob"].sum()
        terms = row_terms(model_trace, guide_trace, particles, divergences)
        return -total / particles, terms

    def _check_sites(self, model_trace: Trace, guided: dict[str, Any]) -> None:
        without = [n for n, s in guided.items() if not getattr(s["fn"], "has_rsample", False)]
        refuse_unreparameterised(self, tuple(without))
        order = [name for name in model_trace.nodes if name in guided]
        if order != [name for name in guided if name in order]:
            self._refuse_order()

    def check(self, known: Structure) -> None:
        """Refuses programs that the estimator would be wrong for.

        Arguments:
            known: What the program is made of.

        Raises:
            ValueError: As every estimator, and where the order of the latent sites differs.
        """
        super().check(known)
        if not known.is_ordered:
            self._refuse_order()

    def _refuse_order(self) -> None:
        raise ValueError(
            f"Expected a guide whose latent sites come in the model's order, under {self}; got "
            "another order: Trace_ELBO, STL and the multi-sample bounds take it."
        )

    def _known(self, name: str, guided: Any, site: Any) -> Tensor | None:
        divergence = None
        if guided["mask"] is site["mask"]:
            divergence = analytic_kl(guided["fn"], site["fn"])
        if divergence is None:
            self._tell(
                f"No analytic KL divergence for site {name!r}, from {_said(guided['fn'])} to "
                f"{_said(site['fn'])}: {self} draws it instead."
            )
        return divergence

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(what, UserWarning, stacklevel=2)


def _weighted(divergence: Tensor, guided: Any, site: Any) -> Tensor:
    r"""s_p E[log p] - s_q E[log q], negated, where the scales s of model and guide may differ."""
    whole = scale_and_mask(divergence, scale=guided["scale"], mask=guided["mask"])
    if is_one_scale(guided["scale"], site["scale"]):
        return whole
    rest = site["scale"] - guided["scale"]
    return whole - scale_and_mask(site["unscaled_log_prob"], scale=rest, mask=site["mask"])


def _said(distribution: Any) -> str:
    base = getattr(distribution, "base_dist", None)
    name = type(distribution).__name__
    return name if base is None else f"{name}({_said(base)})"
