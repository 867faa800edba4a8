"""Pyro's estimators for discrete and other sites without `rsample`, handed on."""

from typing import Any, cast

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
from ..engine.running import kept_buffers, kept_generators
from .estimator import WITHOUT_ROWS, Estimate, Estimator, Objective, owners
from .handed import Handed
from .log_densities import Program, row_terms, row_terms_of
from .trace_elbo import PLAIN_PARTICLES, Trace_ELBO, mean_terms_of

__all__ = ["TraceEnum_ELBO", "TraceGraph_ELBO"]


class _Discrete(Handed):
    """What both are checked by."""

    def plain(self) -> Estimator:
        """Returns the ELBO by autograd, of several draws."""
        return Trace_ELBO(PLAIN_PARTICLES)


class TraceGraph_ELBO(_Discrete, pyro.infer.TraceGraph_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates the ELBO with the score function's gradient along the graph of the program.

    .. math::
        \nabla_\phi = E\Big[\sum_i \nabla_\phi \log q(z_i)\, (c_i - b_i) + \dots\Big]

    where :math:`c_i` are the terms of the ELBO downstream of the site i alone, and :math:`b_i` a
    baseline, if the site's `infer` asks for one. A lower bound on log p(x); value and gradient are
    unbiased. Sites with `rsample` have its gradient. Unlike Pyro's it has a differentiable loss,
    so that it is a module, works with torch's optimisers, and in `fit`. A baseline that is a
    decaying average lives in Pyro's global parameter store, which `fit` refuses.

    References:
        Gradient estimation using stochastic computation graphs (Schulman et al., 2015),
        arXiv 1506.05254.

    Arguments:
        num_particles: The number of draws of z for each row.
        vectorize_particles: Whether they are drawn in one pass.

    Raises:
        ValueError: Where the number of particles is no positive integer.

    Example:
        >>> TraceGraph_ELBO(5)
        TraceGraph_ELBO(num_particles=5, vectorize_particles=True)
    """

    def _estimate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Estimate:
        losses, terms = [], []
        particles = self.num_particles if self.vectorize_particles else 1
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            elbo, surrogate = _compute_elbo(model_trace, guide_trace)
            losses.append((surrogate - surrogate.detach() - elbo.detach()) / particles)
            found = row_terms(model_trace, guide_trace, particles)
            terms.append(type(found)._make(map(detach_provenance, found)))
        mean = mean_terms_of(terms)
        per_row = mean.reconstruction - self.kl_weight * mean.kl
        loss = torch.stack(losses).mean()
        return Estimate(loss, per_row if mean.global_kl is None else None, mean)


class TraceEnum_ELBO(_Discrete, pyro.infer.TraceEnum_ELBO):  # type: ignore[misc]  # noqa: N801
    r"""Creates the ELBO that sums over the values of discrete sites.

    .. math:: \mathrm{ELBO}(x) = \sum_z q(z \mid x)\, (\log p(x, z) - \log q(z \mid x))

    over the sites that are marked `infer={"enumerate": "parallel"}`, by
    `pyro.infer.config_enumerate`, say; other sites are drawn. A site that is marked in the model
    and missing in the guide is summed out of the model: then it is log p(x) itself that is bounded
    in the other sites alone. A lower bound on log p(x); value and gradient are unbiased, and
    exact where nothing is drawn.

    Networks must broadcast over dims on the left. The terms that :func:`pyro_vae.fit` tells are
    of one draw. Pyro's sums look at whether a probability is 0, which on a GPU waits for it.

    References:
        | DiCE (Foerster et al., 2018), arXiv 1802.05098.
        | Tensor variable elimination (Obermeyer et al., 2019), arXiv 1902.03210.

    Arguments:
        num_particles: The number of draws of what is drawn, for each row.
        vectorize_particles: Whether they are drawn in one pass.

    Raises:
        ValueError: Where the number of particles is no positive integer; when `per_row` is asked
            for sites that are summed out of the model.

    Example:
        >>> TraceEnum_ELBO()
        TraceEnum_ELBO(num_particles=1, vectorize_particles=False)
    """

    is_traceable = False

    def _estimate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Estimate:
        value = self._value(model, guide, args, kwargs)
        with kept_generators(), kept_buffers(owners(model, guide)), torch.no_grad():
            terms = row_terms_of(model, guide, *args, **kwargs)
        return Estimate(-value, None, terms)

    def _value(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Tensor:
        traces = self._get_traces(model, guide, args, kwargs)
        total: Any = sum(_compute_dice_elbo(*pair) for pair in traces)
        value: Tensor = total / self.num_particles
        return value

    def _rows(self, objective: Objective, args: Any, kwargs: Any) -> Tensor:
        """The ELBO is linear in a weight on each row: its derivative is the row's part."""
        (model, guide), elbo = objective.pair, cast(TraceEnum_ELBO, objective.elbo)
        like = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        weighted = _WeightedRows(like.device)
        try:
            with torch.enable_grad(), elbo._tempered(), weighted:
                value = elbo._value(model, guide, args, kwargs)
        except ValueError as error:
            raise ValueError(
                "Expected latent sites that the guide has, for the objective of each row; got "
                f"some that are summed out of the model: {error}"
            ) from error
        if weighted.is_shared:
            raise ValueError(WITHOUT_ROWS)
        (per_row,) = torch.autograd.grad(value, weighted.weights)
        return per_row


class _WeightedRows(Messenger):  # type: ignore[misc]
    """Gives the sites of each row a weight of its own, 1, in the place of their scales."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.weights: Any = None
        self.is_shared = False

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        frames = [frame for frame in msg["cond_indep_stack"] if frame.name == PLATE]
        self.is_shared |= not frames
        for frame in frames:
            if self.weights is None:
                self.weights = torch.ones(
                    frame.size, dtype=torch.float64, device=self.device, requires_grad=True
                )
            msg["scale"] = self.weights.reshape(-1, *[1] * (-frame.dim - 1))
