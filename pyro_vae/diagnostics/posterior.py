"""Draws from the posterior of each row."""

from typing import Any

from torch import nn

from ..elbos.chunks import MAX_ELEMENTS
from ..engine.running import public
from .to_arviz import to_arviz

__all__ = ["posterior"]


@public
def posterior(
    program: nn.Module,
    x: Any,
    method: str = "guide",
    num_samples: int = 1000,
    *,
    chains: int = 4,
    context: Any = None,
    weights: Any = None,
    num_predictive: int | None = None,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Any:
    r"""Draws the latents of each row from the guide, or from the posterior itself.

    The guide q(z | x) is an approximation: its means can be shifted, and its standard deviations
    are often too small. The other two methods draw from p(z | x), given the weights of the
    program.

    `method="importance"` gives each row a proposal of its own, as :func:`pyro_vae.log_evidence`
    does, and resamples its draws by their weights. `vi_stats` holds `pareto_k`: over `good_k` the
    draws of a row are not to be trusted. It is fast, and right if the posterior of a row has one
    mode.

    `method="hmc"` draws by several chains of Hamiltonian Monte Carlo for each row. All chains of
    all rows move together, in the unconstrained space of the latents. Half of the chains start at
    draws of the guide, the others at draws of the prior. A warm-up of 500 trajectories adapts the
    step size and the full mass matrix of each row; they are then fixed.

    Look at `vi_stats`: if the largest R-hat of a row is over 1.01, its coordinate `note` says that
    its chains disagree. The posterior of the row then has several modes, between which the chains
    do not move, or more draws are needed. `log_joint` in `sample_stats` shows which chains are in
    a mode of little weight; the share of the draws in a mode is not its probability. A mode that
    no chain found cannot be seen.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), arXiv 1206.1901.
        Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021),
        arXiv 1903.08008.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, \*event), or a dict of such arrays.
        method: `"guide"`, `"importance"` or `"hmc"`.
        num_samples: The number of draws from the guide, or of each chain, 4 or more.
        chains: The number of chains of each row, for `"hmc"`.
        context: Covariates of the rows, shape (rows, \*context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        num_predictive: The number of draws at which data are drawn. By default as many as fit in
            `max_elements`, at most 100.
        max_elements: The largest number of elements of a tensor, approximately.
        seed: The seed of the draws. `None` continues torch's generator from its state.
        progress: Whether to show the progress of Hamiltonian Monte Carlo.

    Returns:
        The tree of :func:`pyro_vae.to_arviz`: an `InferenceData` under ArviZ 0.23, a `DataTree`
        under 1.x. With `"hmc"` its `posterior` has the dims (chain, draw, datum, ...), and its
        `vi_stats` hold for each row the largest `r_hat` over its latents, the smallest `ess_bulk`
        and `ess_tail`, the `acceptance_rate`, the `step_size` and `num_steps`.

    Raises:
        ValueError: If `program` is not a program, the data do not fit it, or a size is out of its
            range; for `"hmc"` if it has latents that are not continuous or that rows share.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> tree = posterior(vae, torch.ones(3, 64), "hmc", 50, seed=0)
        >>> dict(tree["posterior"].z.sizes)
        {'chain': 4, 'draw': 50, 'datum': 3, 'z_dim_0': 2}
        >>> tree["vi_stats"].r_hat.dims
        ('datum',)
    """
    return to_arviz(
        program,
        x,
        num_samples,
        method=method,
        chains=chains,
        context=context,
        weights=weights,
        num_predictive=num_predictive,
        max_elements=max_elements,
        seed=seed,
        progress=progress,
    )
