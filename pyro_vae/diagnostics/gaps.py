"""Why the ELBO is below log p(x): the family of the guide, or the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import nn

from .. import plots
from ..data.checks import checked_draws
from ..data.read import read
from ..data.table import Table
from ..elbos.chunks import MAX_ELEMENTS
from ..elbos.log_densities import programs_of
from ..engine.running import evaluating, public, seeded
from ..evidence.evidence import standard_error
from ..evidence.pareto_k import good_k, note_on, notes
from ..evidence.refined import Refined, Stage, refined
from ..evidence.scorer import Scorer, later

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Gaps", "gaps"]

STAGES = *[Stage(100, 16, 0.1)] * 3, Stage(300, 64, 0.02)  # Adam starts anew: far rows converge
SMALL = 0.1  # nats per row

LONG_NAMES = {
    "approximation": "log p(x) - ELBO of the best q of the guide's kind",
    "approximation_mcse": "Monte Carlo standard error of approximation",
    "amortisation": "ELBO of the best q of the guide's kind - ELBO of the guide",
    "amortisation_mcse": "Monte Carlo standard error of amortisation",
    "log_evidence": "estimate of log p(x), a lower bound in expectation",
    "refined_elbo": "ELBO of the best q of the guide's kind",
    "elbo": "ELBO of the guide",
}


class Gaps(xr.Dataset):
    """The two gaps of each row, as :func:`gaps` returns them: a data set over `datum`.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> found = gaps(vae, torch.ones(3, 64), 100, seed=0)
        >>> found.summary().index.to_list()
        ['approximation', 'amortisation']
    """

    __slots__ = ()

    def summary(self) -> pd.DataFrame:
        """Averages the gaps over the rows.

        Returns:
            For `approximation` and `amortisation` the `mean` in nats per row, its standard error
            `se` over the rows, the Monte Carlo error `mcse` alone, and a `note` on rows whose
            log p(x) has an unknown error.
        """
        lines = {}
        for name in ("approximation", "amortisation"):
            values, errors = self[name].to_numpy(), self[f"{name}_mcse"].to_numpy()
            lines[name] = {
                "mean": values.mean(),
                "se": standard_error(values),
                "mcse": np.sqrt(np.square(errors).sum()) / len(errors),
                "note": self.attrs["note"] if name == "approximation" else "",
            }
        return Table(pd.DataFrame.from_dict(lines, orient="index"))

    def advice(self) -> str:
        """Says in words what would bring the ELBO nearer to log p(x)."""
        table = self.summary()
        means, errors = table["mean"], table["mcse"]
        is_large = {name: means[name] > SMALL + 2.0 * errors[name] for name in table.index}
        cures = {
            "approximation": f"a richer posterior than {self.attrs['family']}, such as "
            + (
                "a flow"
                if self.attrs["family"] == "a normal distribution"
                else "MultivariateNormal"
            ),
            "amortisation": "a larger encoder, or longer training",
        }
        parts = [
            f"{cures[name]}, by up to {means[name]:.2f} nats per row"
            for name in sorted(is_large, key=lambda name: -means[name])
            if is_large[name]
        ]
        if not parts:
            return (
                f"The ELBO is within {SMALL} nats per row of log p(x), as far as it can be seen."
            )
        return f"The ELBO would gain from {'; and from '.join(parts)}."

    def plot(self, *, ax: Axes | None = None) -> Canvas:  # type: ignore[override]
        """Draws the distribution of both gaps over the rows: :func:`pyro_vae.plots.gaps`.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        return plots.gaps(self, ax=ax)


@public
def gaps(
    program: nn.Module,
    x: Any,
    num_samples: int = 1000,
    *,
    context: Any = None,
    weights: Any = None,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = True,
) -> Gaps:
    r"""Divides log p(x) - ELBO of each row into what the family of q, and what the encoder loses.

    .. math:: \log p(x) - \mathrm{ELBO} = \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{
        \text{approximation}} + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{
        \text{amortisation}}

    q* is the best q for this row alone: a normal distribution in unconstrained space, with
    independent latents if the guide draws them independently, and any covariance otherwise. That
    is the family of the guide if it is `Normal`, `LogNormal` or `MultivariateNormal`; for another
    guide, such as a flow or a `Gamma`, the approximation gap is that of such a normal
    distribution, and the amortisation gap can be below 0.

    log p(x) is a lower bound in expectation, so that the approximation gap is one too. Each
    number has a Monte Carlo error, within which it can be negative.

    References:
        Inference suboptimality in variational autoencoders (Cremer et al., 2018),
        arXiv 1801.03558.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such.
        num_samples: The number of draws of each row, 100 or more.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        max_elements: About how many elements one tensor may have.
        seed: The seed of the draws; with `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar.

    Returns:
        Over `datum`, in nats: `approximation` and `amortisation`, each with its `_mcse`,
        `log_evidence`, `refined_elbo` and `elbo`. It has the methods :meth:`Gaps.summary`,
        :meth:`Gaps.advice` and :meth:`Gaps.plot`.

    Raises:
        ValueError: If `program` is not a program, has no continuous latents of each row, or has a
            guide of point masses; if data or sizes do not fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> found = gaps(vae, torch.ones(3, 64), 100, seed=0)
        >>> bool(((found.approximation + found.amortisation) > 0.0).all())
        True
    """
    num_samples = checked_draws("num_samples", num_samples, least=100)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    with seeded(seed), evaluating(program):
        options = num_samples, max_elements, seed
        scorer = Scorer(program, rows, *options, progress=progress)
        space, keys = scorer.space, scorer.keys
        if not space.shapes or space.left:
            raise ValueError(
                "Expected latents that are all continuous, whose q can be improved for each row; "
                f"got {', '.join(scorer.known.latents)}."
            )
        is_diagonal = space.is_mean_field(rows.head(2, program))
        with scorer.bar:
            evidence = scorer.run(refine="auto")
            part = later(scorer.seed, 20), scorer.max_elements
            normal = refined(space, rows, keys, STAGES[0], *part, is_diagonal=is_diagonal)
            for number, stage in enumerate(STAGES[1:], start=11):
                part = later(scorer.seed, 2 * number), scorer.max_elements
                normal = refined(space, rows, keys, stage, *part, normal)
            own = Refined(space, normal, num_samples, degrees=None)
            every = np.arange(len(rows))
            best = scorer.scores(rows, every, own, num_samples, later(scorer.seed, 30))
    return _gaps(evidence, best, rows.labels, num_samples, is_diagonal=is_diagonal)


def _gaps(
    evidence: dict[str, np.ndarray],
    best: dict[str, np.ndarray],
    labels: np.ndarray,
    num_samples: int,
    *,
    is_diagonal: bool,
) -> Gaps:
    values = {
        "approximation": evidence["log_evidence"] - best["elbo"],
        "approximation_mcse": np.hypot(evidence["mcse"], best["elbo_mcse"]),
        "amortisation": best["elbo"] - evidence["elbo"],
        "amortisation_mcse": np.hypot(best["elbo_mcse"], evidence["elbo_mcse"]),
        "log_evidence": evidence["log_evidence"],
        "refined_elbo": best["elbo"],
        "elbo": evidence["elbo"],
    }
    units = {name: {"long_name": LONG_NAMES[name], "units": "nats"} for name in values}
    noted = notes(evidence["pareto_k"], good_k(num_samples))
    attributes = {
        "num_samples": num_samples,
        "family": "independent normal latents" if is_diagonal else "a normal distribution",
        "note": note_on(noted),
    }
    variables = {name: ("datum", values[name], units[name]) for name in values}
    coordinates = {"datum": labels, "note": ("datum", noted)}
    return Gaps(variables, coordinates, attributes)
