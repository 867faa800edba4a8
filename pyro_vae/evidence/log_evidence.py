"""log p(x) by importance sampling from the guide, and from proposals of the rows' own."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.cells import CellError
from ..data.checks import checked_choice, checked_draws
from ..data.read import check_rows, read, transformed
from ..data.rows import Rows, floating_like
from ..elbos.chunks import MAX_ELEMENTS
from ..elbos.log_densities import programs_of
from ..engine.replay import at_precision, fast_precision
from ..engine.running import evaluating, public, seeded
from .annealed import annealed
from .evidence import ATTRIBUTES, IMPOSSIBLE, Evidence, estimates, labelled, standard_error
from .exact import exact
from .pareto_k import notes
from .scorer import Scorer

DRAWS = {"importance": 1000, "ais": 256, "exact": 4}  # of ais the chains: k needs so many
BOUNDS = ("log_evidence", "log_evidence_quarter")
WORDS = {
    "ais": {"long_name": "estimate of log p(x) by annealed importance sampling"},
    "exact": {"long_name": "log p(x) in closed form", "direction": "exact"},
}
OF_GUIDE = ("elbo", "elbo_mcse", "pareto_k_guide")

__all__ = ["Evidence", "estimates", "labelled", "log_evidence", "standard_error"]


@public
def log_evidence(
    program: nn.Module,
    x: Any,
    num_samples: int | None = None,
    *,
    method: str = "importance",
    context: Any = None,
    weights: Any = None,
    transform: Callable[[Any], Any] | None = None,
    refine: bool | str = "auto",
    on_invalid: str = "raise",
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Estimates log p(x) of each row by importance sampling.

    .. math::
        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^S w_s, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x)

    The weights of the program are held fixed; only z is integrated out. In expectation the
    estimate is a lower bound of log p(x). The bound rises with S, and is further below log p(x)
    for a q that is further from the posterior.

    **Which q.** The guide serves all rows, and is often far from the posterior of a row. A pilot
    run of the guide, whose draws are not used for the value, finds the rows whose Pareto k is over
    0 (k has an error of 0.2 there, and log p(x) is visibly too low from 0.5 on). Each of them gets
    a proposal of its own: a normal distribution with any covariance (low rank plus a diagonal
    beyond 100 latents), in the unconstrained space of its continuous latents. It starts at the
    guide's moments, is improved on the ELBO of the row, and covers the tails by the moments of
    weighted draws. The draws are those of Student's t around it with 5 degrees of freedom, and 5 %
    from the prior. Trial draws, not used for the value either, decide which rows are improved for
    longer. Value, error and k come from new draws of the last proposal. Discrete latents,
    directions and angles are drawn from the guide (attribute `left_to_the_guide`). `refine=False`
    gives the guide's own number, `refine=True` refines every row.

    **Errors.** The standard error, sd(w) / (sqrt(S) mean(w)), comes from the delta method. It
    depends on the draws that were made, not on rare large weights that were not drawn, so it is
    too small if `pareto_k` is over `good_k`: such rows have the note `"error unknown"`. Rows
    without a k, which needs more than 20 draws, have the note `"k not known"`. The weights are not
    Pareto-smoothed, because smoothing reduces the largest weights and so increases the bias.
    Neither `log_evidence` nor `pareto_k` can show regions that no draw reached.

    If the prior of a latent site lies on a part of the real numbers (`HalfNormal`, `Gamma`,
    `Beta`), 5 % of the guide's draws come from the prior too, and q becomes the mixture of the
    guide and the prior. A weight then is at most 20 times the likelihood. The two are strata in
    `mcse`. `elbo` is that of the guide alone.

    **Other methods.** `method="ais"` is annealed importance sampling, by Hamiltonian Monte Carlo
    from a normal distribution to the posterior: also a lower bound in expectation. Its chains can
    reach modes that the proposal of a row leaves out. `method="exact"` is the closed form of
    programs that are linear and Gaussian in z.

    The program runs in evaluation mode. Rows and draws are processed in chunks, so the memory
    does not grow with their number. The draws of a row follow from the seed and from the values
    of the row that the program reads; rows of equal values have different draws, by their order.
    So a row's estimate does not change with the rows beside it or with the chunks, except for
    rounding. This holds if the guide is made of normal, uniform, exponential, gamma, Dirichlet,
    Bernoulli or categorical draws, or transforms of these. Other draws, such as those of a
    Poisson, and the chains of `"ais"` come from torch's generator.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        Yes, but did it work?: Evaluating variational inference (Yao et al., 2018),
        arXiv 1802.02538.
        Inference suboptimality in variational autoencoders (Cremer et al., 2018),
        arXiv 1801.03558.
        Annealed importance sampling (Neal, 2001), doi 10.1023/A:1008923215028.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such.
        num_samples: The number of draws S of each row, 4 or more; 1000 by default. Of `"ais"` the
            number of chains, 256 by default.
        method: `"importance"`, `"ais"` or `"exact"`.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        transform: A function of rows that returns them as the program takes them, as in
            :func:`pyro_vae.fit`. Its random numbers follow `seed`.
        refine: `"auto"`, or whether rows get proposals of their own.
        on_invalid: What happens to rows that the program's `check` refuses, such as a negative
            count: `"raise"` refuses all rows; `"inf"` gives these rows a log p(x) of -inf, with an
            error of 0. NaN is always refused.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws; with `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar.

    Returns:
        Over `datum`, labelled by the rows: `log_evidence`, its `mcse`, the effective sample size
        `ess`, `pareto_k` (reliable up to the attribute `good_k`), that of the guide's own draws,
        `pareto_k_guide`, `elbo`, its `elbo_mcse`, and `log_evidence_quarter`: the mean of the
        estimates from the four quarters of the draws (S // 4 each), with
        `log_evidence_quarter_mcse`, their standard deviation / sqrt(4). All are in nats, except
        `ess` and the two k. The coordinate `note` says in words whether the error of a row is
        unknown, and `refined` whether the row got a proposal of its own; the attribute
        `refine_seconds` is the time that this took. It has the methods :meth:`Evidence.summary`
        and :meth:`Evidence.plot`.

    Raises:
        ValueError: If `program` is not a program, has latent sites that all rows share, or has a
            guide of point masses (`Delta`), which has no importance weights; if data or sizes do
            not fit; if every row is refused, or one has NaN; if the method is `"exact"`, and
            log p(x) has no closed form.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> dict(evidence.sizes), bool((evidence.elbo < evidence.log_evidence).all())
        ({'datum': 3}, True)
    """
    method = checked_choice("method", method, DRAWS)
    num_samples = DRAWS[method] if num_samples is None else num_samples
    num_samples = checked_draws("num_samples", num_samples, least=4)
    refine = refine if isinstance(refine, bool) else checked_choice("refine", refine, ["auto"])
    if on_invalid not in ("raise", "inf"):
        raise ValueError(f"Expected on_invalid to be 'raise' or 'inf'; got {on_invalid!r}.")
    programs_of(program)
    with seeded(seed):
        rows = read(x, program, context=context, weights=weights, check=False)
        rows = rows if transform is None else transformed(rows, transform, program)
    if on_invalid == "raise":
        check_rows(program, rows)
        index = np.arange(len(rows))
    else:
        index = _possible(program, rows)
    values = {name: np.full(len(rows), IMPOSSIBLE[name]) for name in ATTRIBUTES}
    is_refined = np.zeros(len(rows), dtype=bool)
    scored = rows if len(index) == len(rows) else rows[torch.from_numpy(index).to(rows.device)]
    attributes: dict[str, Any] = {"method": method}
    precision = fast_precision(floating_like(program).device)
    with seeded(seed), evaluating(program), at_precision(precision):
        if method == "ais":
            found = _annealed(program, scored, num_samples, progress=progress)
        elif method == "exact":
            found = _exact(program, scored)
        else:
            scorer = Scorer(program, scored, num_samples, max_elements, seed, progress=progress)
            with scorer.bar:
                found = scorer.run(refine=refine)
            is_refined[index] = scorer.is_refined
            left = ", ".join(scorer.space.left)
            attributes |= {"refine_seconds": scorer.seconds, "left_to_the_guide": left}
    for name in ATTRIBUTES:
        values[name][index] = found[name]
    data = labelled(values, rows.labels, num_samples, seed)
    for name in BOUNDS:
        data[name].attrs |= WORDS.get(method, {})
    data.coords["note"] = ("datum", notes(values["pareto_k"], data.attrs["good_k"]))
    data.coords["refined"] = ("datum", is_refined)
    return Evidence(data.data_vars, data.coords, data.attrs | attributes)


def _annealed(
    program: nn.Module, rows: Rows, num_chains: int, *, progress: bool
) -> dict[str, np.ndarray]:
    found = estimates(annealed(program, rows, num_chains, progress=progress).log_weights)
    return found | {name: np.full(len(rows), math.nan) for name in OF_GUIDE}


def _exact(program: nn.Module, rows: Rows) -> dict[str, np.ndarray]:
    values, zero = exact(program, rows), np.zeros(len(rows))
    unknown = {name: np.full(len(rows), math.nan) for name in ATTRIBUTES}
    known = {name: values for name in BOUNDS} | {f"{BOUNDS[1]}_mcse": zero, "mcse": zero}
    return unknown | known | {"pareto_k": zero - math.inf}


def _possible(program: nn.Module, rows: Rows) -> np.ndarray:
    """Finds the rows that the program's own check accepts, by halves of what it refuses."""
    for name, tensor in rows.fields.items():
        if (bad := tensor.isnan()).any():
            wanted = f"Expected {name} without NaN, which has no density"
            raise CellError(wanted, tensor, bad).named(rows.labels, rows.columns[name])
    refusal: ValueError | None = None
    waiting, found = [slice(0, len(rows))], []
    while waiting:
        piece = waiting.pop()
        try:
            check_rows(program, rows[piece])
            found.append(np.arange(piece.start, piece.stop))
        except ValueError as error:
            refusal = error
            if piece.stop - piece.start > 1:
                middle = (piece.start + piece.stop) // 2
                waiting += [slice(piece.start, middle), slice(middle, piece.stop)]
    if not found and refusal is not None:
        raise refusal
    return np.sort(np.concatenate(found))
