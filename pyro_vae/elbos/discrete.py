"""The ELBOs for discrete and other sites without `rsample`, which extend Pyro's."""

from typing import cast

import pyro.infer
import torch
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.tracegraph_elbo import _compute_elbo
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..data.rows import PLATE
from ..data.source import Row
from ..engine.running import kept_buffers, kept_generators
from .estimator import WITHOUT_ROWS, Estimate, Objective, owners, tempered
from .log_densities import Args, Kwargs, Program, RowTerms, Site, row_terms, row_terms_of
from .trace_elbo import PyroELBO

__all__ = ["TraceEnum_ELBO", "TraceGraph_ELBO"]


class TraceGraph_ELBO(PyroELBO, pyro.infer.TraceGraph_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates the ELBO with a score-function gradient that uses the program's dependencies.

    .. math::
        \nabla_\phi = E\Big[\sum_i \nabla_\phi \log q(z_i)\, (c_i - b_i) + \dots\Big]

    where :math:`c_i` is the sum of the ELBO's terms downstream of the site i, and :math:`b_i` a
    baseline, if the site's `infer` has one. A lower bound on log p(x); value and gradient are
    unbiased. Sites with `rsample` have the reparameterised gradient. Unlike Pyro's class it has a
    differentiable loss, so that it can be a module, and works in `fit` and with torch's
    optimisers. `fit` refuses a baseline that is a decaying average, since Pyro stores it in the
    global parameter store.

    References:
        Gradient estimation using stochastic computation graphs (Schulman et al., 2015),
        arXiv 1506.05254.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether all draws are made in one pass.

    Raises:
        ValueError: If `num_particles` is not a positive integer.

    Example:
        >>> TraceGraph_ELBO(5)
        TraceGraph_ELBO(5, vectorize_particles=True)
    """

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Returns the mean over the draws, which are one pass if the particles are vectorised."""
        losses, terms = [], []
        particles = self.num_particles if self.vectorize_particles else 1
        with tempered(self.kl_weight):
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                elbo, surrogate = _compute_elbo(model_trace, guide_trace)
                losses.append((surrogate - surrogate.detach() - elbo.detach()) / particles)
                found = row_terms(model_trace, guide_trace, particles)
                terms.append(RowTerms._make(map(detach_provenance, found)))
        return self._averaged(losses, terms)


class TraceEnum_ELBO(PyroELBO, pyro.infer.TraceEnum_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates the ELBO that sums over the values of discrete sites.

    .. math:: \mathrm{ELBO}(x) = \sum_z q(z \mid x)\, (\log p(x, z) - \log q(z \mid x))

    over the sites that are marked `infer={"enumerate": "parallel"}`, for instance by
    `pyro.infer.config_enumerate`; other sites are drawn. A site that is marked in the model and
    missing in the guide is summed out of the model, so that only the other sites contribute to
    the gap between the bound and log p(x). A lower bound on log p(x); value and gradient are
    unbiased, and exact if no site is drawn.

    Networks must broadcast over dims on the left. The terms that :func:`pyro_vae.fit` reports are
    computed from one draw. Pyro's sums test whether a probability is 0, which on a GPU makes each
    step wait for the device.

    References:
        | DiCE (Foerster et al., 2018), arXiv 1802.05098.
        | Tensor variable elimination (Obermeyer et al., 2019), arXiv 1902.03210.

    Arguments:
        num_particles: The number of draws of the sites that are not summed out, for each row.
        vectorize_particles: Whether all draws are made in one pass.

    Raises:
        ValueError: If `num_particles` is not a positive integer. In `per_row`, if a site is summed
            out of the model.

    Example:
        >>> TraceEnum_ELBO()
        TraceEnum_ELBO(1, vectorize_particles=False)
    """

    is_traceable = False

    def estimate(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Estimate:
        """Returns the sum over the values of discrete sites, and the terms of the ELBO."""
        with tempered(self.kl_weight):
            value = self._value(model, guide, args, kwargs)
            with kept_generators(), kept_buffers(owners(model, guide)), torch.no_grad():
                terms = row_terms_of(model, guide, *args, **kwargs)
        return Estimate(-value, None, terms)

    def _value(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Tensor:
        traces = self._get_traces(model, guide, args, kwargs)
        value: Tensor = sum(_compute_dice_elbo(*pair) for pair in traces) / self.num_particles
        return value

    def _row_values(self, objective: Objective, x: Row) -> Tensor:
        """Differentiates the ELBO in a weight on each row, in which it is linear."""
        (model, guide), elbo = objective.pair, cast(TraceEnum_ELBO, objective.elbo)
        weighted = _RowWeights(tree_leaves(x)[0].device)
        try:
            with torch.enable_grad(), tempered(elbo.kl_weight), weighted:
                value = elbo._value(model, guide, (x,), {})
        except ValueError as error:
            raise ValueError(
                "Expected latent sites that the guide has, for the objective of each row; got "
                f"sites that are summed out of the model: {error}"
            ) from error
        if weighted.has_globals:
            raise ValueError(WITHOUT_ROWS)
        (per_row,) = torch.autograd.grad(value, cast(Tensor, weighted.weights))
        return per_row


class _RowWeights(Messenger):  # type: ignore[misc]
    """Effect handler that replaces the scale of each site by a weight of 1 for each row."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.weights: Tensor | None = None
        self.has_globals = False

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):
            return
        frames = [frame for frame in msg["cond_indep_stack"] if frame.name == PLATE]
        self.has_globals |= not frames
        for frame in frames:
            if self.weights is None:
                self.weights = torch.ones(
                    frame.size, dtype=torch.float64, device=self.device, requires_grad=True
                )
            msg["scale"] = self.weights.reshape(-1, *[1] * (-frame.dim - 1))
