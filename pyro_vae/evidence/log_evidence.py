"""log p(x) by importance sampling from the guide, and from proposals of the rows' own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.cells import CellError
from ..data.checks import checked_draws
from ..data.read import check_rows, read, transformed
from ..data.rows import Rows
from ..elbos.chunks import MAX_ELEMENTS
from ..elbos.log_densities import programs_of
from ..engine.running import evaluating, public, seeded
from .evidence import ATTRIBUTES, IMPOSSIBLE, Evidence, estimates, labelled, standard_error
from .pareto_k import notes
from .scorer import Scorer

__all__ = ["Evidence", "estimates", "labelled", "log_evidence", "standard_error"]


@public
def log_evidence(
    program: nn.Module,
    x: Any,
    num_samples: int = 1000,
    *,
    context: Any = None,
    weights: Any = None,
    transform: Callable[[Any], Any] | None = None,
    refine: bool | str = "auto",
    on_invalid: str = "raise",
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Estimates log p(x) of each row by importance sampling from the guide.

    .. math::
        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^S w_s, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x)

    The weights of the program are held fixed; only z is integrated out. In expectation the
    estimate is a lower bound of log p(x). The bound rises with S, and is further below log p(x)
    for a guide that is further from the posterior. If its value at S / 4 is lower, something is
    still missing; how much is not known, usually several times the change from S / 4 to S.

    The standard error, sd(w) / (sqrt(S) mean(w)), comes from the delta method. It depends on the
    draws that were made, not on rare large weights that were not drawn, so it is too small if
    `pareto_k` is over `good_k`: such rows have the note `"error unknown"`. Rows without a k, which
    needs more than 20 draws, have the note `"k not known"`. The weights are not
    Pareto-smoothed, because smoothing reduces the largest weights and so increases the bias.
    Neither `log_evidence` nor `pareto_k` can show regions that no draw reached.

    If the prior of a latent site lies on a part of the real numbers (`HalfNormal`, `Gamma`,
    `Beta`), 5 % of the draws come from the prior, and q becomes the mixture of the guide and the
    prior. A weight then is at most 20 times the likelihood, whatever the guide is. The two are
    strata in `mcse`. `elbo` is that of the guide alone.

    The program runs in evaluation mode. Rows and draws are processed in chunks, so the memory
    does not grow with their number. The draws of a row follow from the seed and from the values
    of the row that the program reads; rows of equal values have different draws, by their order.
    So a row's estimate does not change with the rows beside it or with the chunks, except for
    rounding. This holds if the guide is made of normal, uniform, exponential, gamma, Dirichlet,
    Bernoulli or categorical draws, or transforms of these. Other draws, such as those of a
    Poisson, come from torch's generator.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        Yes, but did it work?: Evaluating variational inference (Yao et al., 2018),
        arXiv 1802.02538.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such.
        num_samples: The number of draws S of each row, 4 or more.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        transform: A function of rows that returns them as the program takes them, as in
            :func:`pyro_vae.fit`. Its random numbers follow `seed`.
        on_invalid: What happens to rows that the program's `check` refuses, such as a negative
            count: `"raise"` refuses all rows; `"inf"` gives these rows a log p(x) of -inf, with an
            error of 0. NaN is always refused.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws; with `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar.

    Returns:
        Over `datum`, labelled by the rows: `log_evidence`, its `mcse`, the effective sample size
        `ess`, `pareto_k` (reliable up to the attribute `good_k`), `elbo`, its `elbo_mcse`, and
        `log_evidence_quarter`: the mean of the estimates from the four quarters of the draws
        (S // 4 each), with `log_evidence_quarter_mcse`, their standard deviation / sqrt(4). All
        are in nats, except `ess` and `pareto_k`. The coordinate `note` says in words whether the
        error of a row is unknown. It has the methods :meth:`Evidence.summary` and
        :meth:`Evidence.plot`.

    Raises:
        ValueError: If `program` is not a program, has latent sites that all rows share, or has a
            guide of point masses (`Delta`), which has no importance weights; if data or sizes do
            not fit; if every row is refused, or one has NaN.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> dict(evidence.sizes), bool((evidence.elbo < evidence.log_evidence).all())
        ({'datum': 3}, True)
    """
    num_samples = checked_draws("num_samples", num_samples, least=4)
    if refine not in (True, False, "auto"):
        raise ValueError(f"Expected refine to be 'auto', True or False; got {refine!r}.")
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
    with seeded(seed), evaluating(program):
        scorer = Scorer(program, scored, num_samples, max_elements, seed, progress=progress)
        with scorer.bar:
            found = scorer.run(refine=refine)
    for name in ATTRIBUTES:
        values[name][index] = found[name]
    is_refined[index] = scorer.is_refined
    data = labelled(values, rows.labels, num_samples, seed)
    data.coords["note"] = ("datum", notes(values["pareto_k"], data.attrs["good_k"]))
    data.coords["refined"] = ("datum", is_refined)
    left = ", ".join(scorer.space.left)
    data.attrs |= {"refine_seconds": scorer.seconds, "left_to_the_guide": left}
    return Evidence(data.data_vars, data.coords, data.attrs)


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
