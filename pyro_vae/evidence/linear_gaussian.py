"""log p(x) in closed form, for linear Gaussian VAEs."""

import copy
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent

from ..data.read import read
from ..distributions.units import Affine
from ..elbos.log_densities import programs_of
from ..engine.running import evaluating, public
from ..programs.vae import VAE

__all__ = ["doubled", "linear_gaussian", "marginal"]

TOLERANCE = 1e-9
PROBES = (0.1, 1.0, 10.0, 100.0)


@public
def linear_gaussian(
    program: nn.Module, x: Any, *, context: Any = None, weights: Any = None
) -> np.ndarray | None:
    r"""Returns log p(x) of each row in closed form, if the program is a linear Gaussian VAE.

    .. math:: p(z) = N(m, S), \quad p(x \mid z) = N(W z + b, \mathrm{diag}(s^2))
        \;\Rightarrow\; p(x) = N(W m + b,\ W S W^\top + \mathrm{diag}(s^2))

    Probabilistic PCA and factor analysis are such VAEs. Whether the decoder is linear is found by
    running it at several points, not from the classes of its layers. The computation is in
    float64, with the program in evaluation mode.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event).
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.

    Returns:
        log p(x) of each row, shape (rows,), in nats; `None` if the program is of another kind.

    Raises:
        ValueError: If `program` is not a program, or the data do not fit it.

    Example:
        >>> import pyro_vae as pv
        >>> pca = pv.VAE(
        ...     3, 2, pv.likelihoods.Normal(scale=pv.Shared()), decoder=torch.nn.Identity(), seed=0
        ... )
        >>> linear_gaussian(pca, torch.zeros(5, 3)).shape
        (5,)
        >>> linear_gaussian(pv.VAE(3, 2, pv.likelihoods.Normal(), seed=0), torch.zeros(5, 3))
    """
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    if (double := doubled(program)) is None:
        return None
    with evaluating(double):
        found = marginal(double)
        if found is None:
            return None
        return found.log_prob(rows.to_like(double).field("x").flatten(1)).cpu().numpy()


def doubled(program: nn.Module) -> nn.Module | None:
    """Returns a float64 copy of a VAE, with its parameters in the same order, else `None`.

    Arguments:
        program: The program.
    """
    if not isinstance(program, VAE) or type(program).model is not VAE.model:
        return None
    return copy.deepcopy(program).double()


def marginal(program: nn.Module) -> Any:
    r"""Returns p(x), a normal distribution over flattened rows, differentiable in the parameters.

    Arguments:
        program: The result of :func:`doubled`, in evaluation mode.

    Returns:
        A `LowRankMultivariateNormal` of event shape (D,), or `None` if p(x) is not normal or the
        decoder cannot run in float64.
    """
    vae: Any = program
    match vae.prior():
        case dist.MultivariateNormal() | dist.LowRankMultivariateNormal() as prior:
            mean, scale_tril = prior.loc, prior.scale_tril
        case prior:
            if (found := _independent_normal(prior)) is None:
                return None
            mean, scale_tril = found[0].flatten(), found[1].flatten().diag()
    try:
        likelihood = _affine(vae, mean, scale_tril)
    except RuntimeError:  # a decoder that sets its own precision
        return None
    if likelihood is None:
        return None
    weight, offset, scale = likelihood
    return dist.LowRankMultivariateNormal(
        offset + mean @ weight, weight.T @ scale_tril, scale.square()
    )


def _independent_normal(distribution: Any) -> tuple[Tensor, Tensor] | None:
    if isinstance(distribution, Affine):
        if (found := _independent_normal(distribution.base)) is None:
            return None
        loc, scale = found
        return distribution.loc + distribution.scale * loc, distribution.scale * scale
    base = distribution
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, dist.Normal) or not distribution.event_shape:
        return None
    return base.loc, base.scale


def _affine(vae: Any, mean: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns W (L, D), b (D,) and s (D,) of a normal likelihood whose mean is affine in z."""
    size = len(mean)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(len(PROBES), size, generator=generator, dtype=mean.dtype)
    probes = wide.to(mean.device) * mean.new_tensor(PROBES)[:, None]
    points = torch.cat([mean.new_zeros(1, size), torch.eye(size).to(mean), probes])
    found = _independent_normal(vae.decode(points.reshape(len(points), *vae.latent_shape)))
    if found is None:
        return None
    locs, scales = (part.flatten(1) for part in found)
    offset, weight = locs[0], locs[1 : size + 1] - locs[0]
    expected = torch.cat([locs[: size + 1], offset + probes @ weight])
    is_affine = (locs - expected).abs().max() <= TOLERANCE * locs.abs().max()
    is_constant = (scales - scales[0]).abs().max() <= TOLERANCE * scales[0].abs().max()
    return (weight, offset, scales[0]) if is_affine and is_constant else None
