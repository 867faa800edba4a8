"""Fits of one program from several seeds: how much of a result comes from training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn

from .. import plots
from ..data.checks import checked_count, is_number, warn_user
from ..data.read import read
from ..data.rows import Rows
from ..data.split import split
from ..data.table import Table
from ..engine.progress import progress_bar
from ..engine.row_noise import row_digests
from ..engine.running import public
from ..evidence.log_evidence import log_evidence
from ..evidence.pareto_k import note_on, notes
from ..prediction.embed import embed
from ..programs.vae import VAE
from .builds import Build, built, checked_build, checked_seeds
from .fit import FEWEST, SHARE, fit
from .history import History, NonFiniteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..plots.canvas import Canvas

__all__ = ["Ensemble", "EnsembleEvidence", "aligned", "ensemble"]

ROUNDS = 100  # of the alignment; a few are enough
SETTLED = 1e-8  # the relative change of the mean embedding at which the alignment ends
NOT_TAKEN = {
    "seed": "the argument seeds names them",
    "checkpoint": "one file cannot hold several fits",
    "resume": "one file cannot hold several fits",
}
EVIDENCE = {
    "log_evidence": "log p(x) of each member",
    "mcse": "Monte Carlo standard error of log_evidence",
    "pareto_k": "Pareto k of the importance weights of each member",
    "mean": "mean of log_evidence over the members",
    "training_sd": "standard deviation of log p(x) over the members, without Monte Carlo error",
    "draws_sd": "Monte Carlo standard error of log_evidence, root mean square over the members",
}
EMBEDDING = {
    "mean": "mean of z under the guide of each member, rotated to the others",
    "sd": "standard deviation of z under the guide of each member, rotated like mean",
    "centre": "mean of z under the guide, averaged over the members",
    "training_sd": "standard deviation of mean over the members, without Monte Carlo error",
    "guide_sd": "standard deviation of z under the guide, root mean square over the members",
    "rows_sd": "standard deviation of centre over the rows",
    "similarity": "share of the mean square of a member's embedding that agrees with centre",
}


class EnsembleEvidence(xr.Dataset):
    """log p(x) of each row under each member: a data set over `member` and `datum`."""

    __slots__ = ()

    def summary(self) -> pd.DataFrame:
        """Splits the variation of log p(x) by its source.

        Returns:
            Indexed by the source. `training`: how much the mean over these rows differs from one
            fit to another; `rows`: how much rows differ; `draws`: the Monte Carlo error. The
            columns, in nats, are the standard deviation `sd` of one member, one row or one
            estimate, and `se`, the standard error of the mean over all that comes from it. The
            `attrs` hold the mean `log_evidence` in nats per row, what `training` contains, and a
            `note` on rows whose Monte Carlo error is unknown. With one member the `training` line
            is NaN, and with one row the line `rows`.
        """
        values, mcse = self["log_evidence"].to_numpy(), self["mcse"].to_numpy()
        (members, rows), draws = values.shape, np.square(mcse)
        by_member = _sd(values.mean(1), draws.mean(1) / rows)
        by_row = _sd(values.mean(0), draws.mean(0) / members)
        one = float(np.sqrt(draws.mean()))
        sds = {"training": float(by_member), "rows": float(by_row), "draws": one}
        counts = {"training": members, "rows": rows, "draws": members * rows}
        lines = {name: (sd, sd / math.sqrt(counts[name])) for name, sd in sds.items()}
        table = Table.from_dict(lines, orient="index", columns=["sd", "se"])
        k = notes(self["pareto_k"].to_numpy().ravel(), self.attrs["good_k"])
        table.attrs = {
            "log_evidence": float(values.mean()),
            "training": self.attrs["training"],
            "note": note_on(k),
        }
        return table.rename_axis("source")


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Fits of one program from several seeds, as :func:`ensemble` returns them.

    Arguments:
        programs: The fitted programs.
        histories: The history of each.
        seeds: The seed of each.
        bootstrap: Whether each was fitted to a bootstrap of the rows.
        stopped: `"finished"`, or `"interrupted"` if Ctrl-C came before the last fit was done.
    """

    programs: list[nn.Module] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    bootstrap: bool = False
    stopped: str = "finished"

    @property
    def table(self) -> pd.DataFrame:
        """A line a fit, indexed by `seed`.

        Its columns are `elbo`, at the best epoch, in nats per row (`validation_elbo` instead if
        rows were held out, those of each fit by its own seed), the number of `epochs`, `seconds`,
        `converged` and `stopped`.
        """
        lines = []
        for history in self.histories:
            table = history.table
            name = "validation_elbo" if "validation_elbo" in table else "elbo"
            lines.append(
                {
                    name: table[name].get(history.best_epoch, math.nan),
                    "epochs": len(table),
                    "seconds": table["seconds"].sum(),
                    "converged": history.converged,
                    "stopped": history.stopped,
                }
            )
        return Table(lines, index=pd.Index(self.seeds, name="seed"))

    @property
    def training(self) -> str:
        """What differs from one fit to another, in words."""
        return "seeds and bootstraps of the rows" if self.bootstrap else "seeds"

    def evidence(
        self,
        x: object,
        num_samples: int = 1000,
        *,
        seed: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> EnsembleEvidence:
        """Estimates log p(x) of each row under each fit, and how much comes from training.

        Arguments:
            x: The rows, shape (rows, *event), best held out from the fits.
            num_samples: The number of draws S of each row and member.
            seed: The seed of the draws, which differ between members. With `None` one is drawn
                from torch's generator.
            progress: Whether to show a progress bar, on a terminal or in a notebook.
            options: Further arguments of :func:`pyro_vae.log_evidence`.

        Raises:
            ValueError: If :func:`pyro_vae.log_evidence` refuses an argument.

        Returns:
            In nats, over `member` and `datum`: `log_evidence`, `mcse` and `pareto_k` of each
            member. Over `datum`: `mean`; `training_sd`, the standard deviation over the members
            that the Monte Carlo error does not explain; and `draws_sd`, that error.
            :meth:`EnsembleEvidence.summary` splits the variation of their mean.
        """
        seed = (
            int(torch.randint(2**31, ())) if seed is None else checked_count("seed", seed, least=0)
        )
        found = []
        with progress_bar(len(self.programs), "evidence", " members", progress=progress) as bar:
            for place, program in enumerate(self.programs):
                own = (seed + place) % 2**63
                found.append(
                    log_evidence(program, x, num_samples, seed=own, progress=False, **options)
                )
                bar.update()
        names = ("log_evidence", "mcse", "pareto_k")
        values = {name: np.stack([data[name].to_numpy() for data in found]) for name in names}
        draws = np.square(values["mcse"])
        values["mean"] = values["log_evidence"].mean(0)
        values["training_sd"] = _sd(values["log_evidence"], draws)
        values["draws_sd"] = np.sqrt(draws.mean(0))
        attrs = {"training": self.training, "good_k": found[0].attrs["good_k"]}
        attrs |= {"num_samples": num_samples, "seed": seed}
        coords = {"member": self.seeds, "datum": found[0]["datum"].to_numpy()}
        return EnsembleEvidence(
            {
                name: (
                    tuple(coords)[-value.ndim :],
                    value,
                    {"long_name": EVIDENCE[name], "units": "1" if name == "pareto_k" else "nats"},
                )
                for name, value in values.items()
            },
            coords,
            attrs,
        )

    def embed(
        self,
        x: object,
        num_samples: int = 200,
        *,
        seed: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> xr.Dataset:
        """Embeds rows by each fit, rotated to each other, and says how much comes from training.

        Two fits of one model may differ by a rotation of the latent space, which changes nothing
        in p(x). Their embeddings are rotated, with reflections, to their common mean (generalised
        orthogonal Procrustes), in the axes of the first member.

        References:
            Generalized Procrustes analysis (Gower, 1975), doi 10.1007/BF02291478.

        Arguments:
            x: The rows, shape (rows, *event).
            num_samples: The number of draws of each row, if there is no closed form.
            seed: The seed of the draws. With `None` torch's generator is used.
            progress: Whether to show a progress bar, on a terminal or in a notebook.
            options: Further arguments of :func:`pyro_vae.embed`.

        Raises:
            ValueError: If :func:`pyro_vae.embed` refuses an argument, or the members have
                different numbers of latents.

        Returns:
            In the units of z, over `member`, `datum` and `latent`: `mean` and `sd` of z under the
            guide of each member, rotated. Over `datum` and `latent`: their `centre`, the mean over
            the members; `training_sd`, the standard deviation of `mean` over the members; and
            `guide_sd`, that of z under q(z | x). Over `latent`: `rows_sd`, that of `centre` over
            the rows. Over `member`: `similarity`, the share of the mean square of a member's
            embedding that agrees with `centre`, 1 if they are equal. For `sd`, latents count as
            uncorrelated under q.
        """
        found = []
        with progress_bar(len(self.programs), "embed", " members", progress=progress) as bar:
            for program in self.programs:
                found.append(
                    embed(
                        program, x, num_samples=num_samples, seed=seed, progress=False, **options
                    )
                )
                bar.update()
        sizes = [data.sizes["latent"] for data in found]
        if len({*sizes}) > 1:
            raise ValueError(
                "Expected members with the same number of latents, to rotate their embeddings to "
                f"each other; got {sizes}."
            )
        means, sds, errors = (
            np.stack([data[name].to_numpy() for data in found])
            for name in ("mean", "sd", "mean_mcse")
        )
        rotations = aligned(means)
        mean = means @ rotations
        centre = mean.mean(0)
        variance, error = (np.square(part) @ np.square(rotations) for part in (sds, errors))
        size = np.square(mean).sum((1, 2))
        distance = np.square(mean - centre).sum((1, 2))
        values = {
            "mean": mean,
            "sd": np.sqrt(variance),
            "centre": centre,
            "training_sd": _sd(mean, error),
            "guide_sd": np.sqrt(variance.mean(0)),
            "rows_sd": _sd(centre, np.zeros(1)),
            "similarity": 1.0 - distance / np.where(size > 0.0, size, 1.0),
        }
        coords = {
            "member": self.seeds,
            "datum": found[0]["datum"].to_numpy(),
            "latent": found[0]["latent"].to_numpy(),
        }
        variables = {}
        for name, value in values.items():
            dims = ("member",) if name == "similarity" else tuple(coords)[-value.ndim :]
            units = "1" if name == "similarity" else "those of z"
            variables[name] = (dims, value, {"long_name": EMBEDDING[name], "units": units})
        return xr.Dataset(variables, coords, {"training": self.training, **found[0].attrs})

    def plot(self, *, ax: Axes | None = None) -> Canvas:
        """Draws the ELBO of all fits: :func:`pyro_vae.plots.ensemble`.

        Arguments:
            ax: The axes of matplotlib to draw into; a new figure by default.

        Returns:
            The figure.
        """
        return plots.ensemble(self, ax=ax)

    def __len__(self) -> int:
        return len(self.programs)

    def __repr__(self) -> str:
        fits = "fit" if len(self) == 1 else "fits"
        note = "" if self.stopped == "finished" else f" ({self.stopped})"
        table = self.table.to_string(float_format="{:.3f}".format)
        return (
            f"Ensemble of {len(self)} {fits} that differ in their {self.training}{note}\n{table}"
        )


@public
def ensemble(
    build: Build,
    x: Any,
    *,
    seeds: int | Iterable[int] = 10,
    bootstrap: bool = False,
    context: Any = None,
    weights: Any = None,
    progress: bool = True,
    **options: Any,
) -> Ensemble:
    """Fits a program from several seeds, to see how much of a result comes from training.

    Weights, minibatches and draws follow the seed of a fit, and so do the rows that it holds out.
    With `bootstrap` each fit trains on as many rows, drawn with replacement, so that the fits also
    vary as they would on other data; rows that are held out for validation are taken out before,
    and are not drawn.

    Ctrl-C ends the fit that is running, which is dropped, and the ensemble of those that are done
    is returned. A fit whose loss becomes NaN or infinite is left out, and a warning names its
    seed. The same seeds give the same fits.

    Arguments:
        build: A function of a seed that returns a new program at each call, with the same weights
            for the same seed. Torch's generators are seeded with it before the call.
        x: The rows to train on, shape (rows, *event), as in :func:`pyro_vae.fit`.
        seeds: The seeds of the fits, or their number: 10 are the seeds 0 to 9.
        bootstrap: Whether each fit trains on a bootstrap of the rows.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        progress: Whether to show a progress bar over the fits, on a terminal or in a notebook.
        options: Further arguments of :func:`pyro_vae.fit`, but not `seed`, `checkpoint` and
            `resume`.

    Raises:
        ValueError: If an argument is refused, before anything is fitted.
        FloatingPointError: If no fit has a finite loss.
        KeyboardInterrupt: If Ctrl-C comes before the first fit is done.

    Returns:
        An :class:`Ensemble`, with its `programs`, `histories` and `table`, and the methods
        :meth:`Ensemble.evidence`, :meth:`Ensemble.embed` and :meth:`Ensemble.plot`.

    Example:
        >>> import pyro_vae as pv
        >>> def build(seed):
        ...     return pv.VAE((4,), 2, pv.likelihoods.Bernoulli(), seed=seed)
        >>> x = (torch.rand(64, 4) < 0.3).float()
        >>> members = ensemble(build, x, seeds=3, max_epochs=2, device="cpu")
        >>> len(members), members.evidence(x, 100, seed=0).summary().index.to_list()
        (3, ['training', 'rows', 'draws'])
    """
    chosen = checked_seeds(
        seeds if isinstance(seeds, Iterable) else range(checked_count("seeds", seeds))
    )
    for name in NOT_TAKEN.keys() & options:
        raise ValueError(f"Expected no {name} in the options of the fits: {NOT_TAKEN[name]}.")
    program = checked_build(build, chosen[0])
    rows = read(x, program, context=context, weights=weights, check=False)
    done: list[tuple[nn.Module, History, int]] = []
    failed: dict[int, NonFiniteError] = {}
    stopped = "finished"
    with progress_bar(len(chosen), "ensemble", " fits", progress=progress) as bar:
        try:
            for seed in chosen:
                bar.set_postfix_str(f"seed {seed}")
                try:
                    program, history = _member(build, rows, seed, options, bootstrap=bootstrap)
                except NonFiniteError as error:
                    failed[seed] = error
                else:
                    if history.stopped == "interrupted":
                        raise KeyboardInterrupt
                    done.append((program, history, seed))
                bar.update()
        except KeyboardInterrupt:
            if not done:
                raise
            stopped = "interrupted"
    if not done:
        raise failed[chosen[0]]
    if failed:
        warn_user(
            f"The loss or its gradient became NaN or infinite at the seeds {[*failed]}, whose "
            "fits are left out. Try a smaller lr."
        )
    programs, histories, fitted = (list(part) for part in zip(*done, strict=True))
    return Ensemble(programs, histories, fitted, bootstrap, stopped)


def _member(
    build: Build, rows: Rows, seed: int, options: dict[str, Any], *, bootstrap: bool
) -> tuple[nn.Module, History]:
    """Fits one program."""
    program, given = built(build, seed), dict(options)
    if "elbo" in given:
        given["elbo"] = copy.deepcopy(given["elbo"])
    train = rows
    if bootstrap:
        validation = given.get("validation", "auto")
        if isinstance(validation, str) and validation == "auto":
            is_split = isinstance(program, VAE) and len(rows) >= FEWEST
            validation = SHARE if is_split else None
        if is_number(validation):
            train, validation = split(rows, validation, program, seed=seed, name="validation")
        given["validation"] = validation
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(train), (len(train),), generator=generator)
        train = train[index.to(rows.device)]
    history = fit(program, train, seed=seed, progress=False, **given)
    known = vars(program)["fitted_rows"]
    if bootstrap and known is not None:  # each row once, or equal rows would pass for chance
        digests = row_digests(rows)
        vars(program)["fitted_rows"] = np.append(digests, known[~np.isin(known, digests)])
    return program, history


def aligned(embeddings: np.ndarray) -> np.ndarray:
    """Returns rotations of embeddings to their common mean, in the axes of the first.

    Arguments:
        embeddings: The embedding of each member, shape (members, rows, latents).

    Returns:
        Orthogonal matrices, shape (members, latents, latents): `embeddings @ rotations` agree.

    Example:
        >>> first = np.random.default_rng(0).normal(size=(9, 2))
        >>> both = np.stack([first, first[:, ::-1]])
        >>> bool(np.allclose(both @ aligned(both), first))
        True
    """
    from scipy.linalg import orthogonal_procrustes  # importing SciPy adds a filter of warnings

    centre, rotations = embeddings[0], np.empty(0)
    for _ in range(ROUNDS):
        rotations = np.stack([orthogonal_procrustes(own, centre)[0] for own in embeddings])
        mean = (embeddings @ rotations).mean(0)
        change = np.linalg.norm(mean - centre)
        centre = mean
        if change <= SETTLED * np.linalg.norm(centre):
            break
    back: np.ndarray = rotations @ rotations[0].T
    return back


def _sd(values: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The standard deviation along the first axis, after the variance of noise is taken out."""
    if len(values) < 2:
        return np.full(values.shape[1:], math.nan)
    with np.errstate(invalid="ignore"):  # a row with a log p(x) of -inf
        variance: np.ndarray = values.var(axis=0, ddof=1) - noise.mean(axis=0)
    return np.sqrt(np.maximum(variance, 0.0))
