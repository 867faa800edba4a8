"""log p(x) by importance sampling from the guide."""

import ctypes
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.checks import checked_count
from ..data.rows import Data, Rows, floating_like
from ..elbos.drawing import Drawing
from ..elbos.log_densities import Structure, log_densities, programs_of, structure
from ..programs.running import evaluating, seeded
from .pareto_k import good_k, pareto_k

__all__ = [
    "Plan",
    "checked_rows",
    "data_sites",
    "estimates",
    "give_memory_back",
    "labelled",
    "log_evidence",
    "point_masses",
    "summary",
]

MAX_ELEMENTS = 2**24
IN_CACHE = 2**20  # larger blocks are given back to the system and zeroed anew at each call
PIECES_AT_ONCE = 32
MAX_WEIGHTS = 2**17  # of whose numbers a processor's cache holds all

ATTRIBUTES = {
    "log_evidence": {
        "long_name": "importance-sampling estimate of log p(x)",
        "units": "nats",
        "direction": "lower bound in expectation",
    },
    "mcse": {
        "long_name": "Monte Carlo standard error of log_evidence (delta method)",
        "units": "nats",
        "direction": "understates where pareto_k is high",
    },
    "ess": {
        "long_name": "effective sample size of the importance weights",
        "units": "draws",
        "direction": "larger is better, num_samples at most",
    },
    "pareto_k": {
        "long_name": "shape of the generalised Pareto tail of the importance weights",
        "units": "1",
        "direction": "smaller is better, reliable below good_k",
    },
    "elbo": {
        "long_name": "evidence lower bound",
        "units": "nats",
        "direction": "lower bound in expectation",
    },
    "elbo_mcse": {
        "long_name": "Monte Carlo standard error of elbo",
        "units": "nats",
        "direction": "smaller is better",
    },
    "log_evidence_quarter": {
        "long_name": "log_evidence at num_samples / 4, mean over the four quarters of the draws",
        "units": "nats",
        "direction": "lower bound in expectation, below that of log_evidence",
    },
    "log_evidence_quarter_mcse": {
        "long_name": "Monte Carlo standard error of log_evidence_quarter (sd of the four / 2)",
        "units": "nats",
        "direction": "of four values, so itself uncertain by some 40%",
    },
}


def log_evidence(
    program: nn.Module,
    x: Any,
    num_samples: int = 1000,
    *,
    max_elements: int = MAX_ELEMENTS,
    seed: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Estimates log p(x) of each row by importance sampling from the guide.

    .. math::
        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^S w_s, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q(z \mid x)

    In expectation it is a lower bound of log p(x) that rises with S, by more for a guide
    further from the posterior; its value at S / 4 beside it shows how much is still missing.
    Its standard error, sd(w) / (sqrt(S) mean(w)), is the delta method's: it knows
    the draws that came, not the rare large weights that did not, and understates the error,
    the more so the larger `pareto_k`. The weights are not Pareto-smoothed: smoothing takes away
    the largest of them, and makes the estimate more biased than the plain mean. Regions that
    the guide never visits are seen by neither `log_evidence` nor `pareto_k`.

    The program runs in evaluation mode, with a fixed amount of memory: rows and draws are cut
    into pieces.

    References:
        Importance weighted autoencoders (Burda et al., 2015), arXiv 1509.00519.
        Yes, but did it work?: Evaluating variational inference (Yao et al., 2018),
        arXiv 1802.02538.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such.
        num_samples: The number of draws S a row, 4 or more.
        max_elements: About how many elements one tensor may have.
        seed: Starts the draws; with `None` torch's generators run on.
        progress: Whether to show a bar.

    Returns:
        Over `datum`, labelled by the names of the rows: `log_evidence`, its `mcse`, the effective
        sample size `ess`, `pareto_k` (compare attribute `good_k`), `elbo`, its `elbo_mcse`, and
        `log_evidence_quarter`: the mean of the estimates from the four quarters of the draws
        (S // 4 each), with `log_evidence_quarter_mcse`, their standard deviation / sqrt(4). In
        nats, but for `ess` and `pareto_k`.

    Raises:
        ValueError: Where `program` is none, has latent sites that rows share, or a guide of
            point masses (`Delta`), which has no importance weights; where data or sizes do not
            fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> dict(evidence.sizes), bool((evidence.elbo < evidence.log_evidence).all())
        ({'datum': 3}, True)
    """
    num_samples = checked_count("num_samples", num_samples, least=4)
    checked_count("max_elements", max_elements)
    rows = checked_rows(program, x)
    with seeded(seed), evaluating(program):
        points = point_masses(program, rows)
        if points:
            raise ValueError(
                "Expected a guide with a density, for importance weights; got a point mass "
                f"(Delta) at {', '.join(points)}."
            )
        plan = Plan.of(program, rows, num_samples, _at_once(program, max_elements))
        drawing = plan.drawing(program, _log_weights(program, plan), num_samples)
        values = {name: np.empty(len(rows)) for name in ATTRIBUTES}
        waiting: list[np.ndarray] = []
        done = 0
        with _bar(len(rows) * num_samples, shown=progress) as bar:
            for piece in plan.pieces():
                x = rows[piece].to_like(program).x
                parts = [drawing(x, n)["log_weights"] for n in plan.parts(num_samples)]
                waiting.append(torch.cat(parts).cpu().numpy())
                if len(waiting) == PIECES_AT_ONCE or piece.stop == len(rows):
                    for name, numbers in estimates(np.concatenate(waiting, axis=1)).items():
                        values[name][done : piece.stop] = numbers
                    done = piece.stop
                    waiting.clear()
                    give_memory_back()
                bar.update(num_samples * (piece.stop - piece.start))
    return labelled(values, rows.names, num_samples, seed)


def summary(evidence: xr.Dataset) -> pd.DataFrame:
    """Averages the evidence over the rows.

    Arguments:
        evidence: What `log_evidence` returns.

    Returns:
        Indexed by quantity: `log_evidence`, `elbo`, `log_evidence_quarter` and `gap`
        (log_evidence - elbo), in nats per row, and `pareto_k_over`, the share of rows whose
        Pareto k is over `good_k` or not known; columns `mean`, its standard error `se` over the
        rows (Monte Carlo error included), and the Monte Carlo error alone, `mcse` (NaN where not
        estimated).

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> evidence = log_evidence(vae, torch.ones(3, 64), 100, seed=0)
        >>> summary(evidence).index.to_list()[:2]
        ['log_evidence', 'elbo']
    """
    known = {
        "log_evidence": "mcse",
        "elbo": "elbo_mcse",
        "log_evidence_quarter": "log_evidence_quarter_mcse",
    }
    means = {name: evidence[name].to_numpy() for name in known}
    errors = {name: _combined(evidence[error].to_numpy()) for name, error in known.items()}
    means["gap"] = means["log_evidence"] - means["elbo"]
    means["pareto_k_over"] = _over(evidence).astype(np.float64)
    table = {
        name: (values.mean(), standard_error(values), errors.get(name, math.nan))
        for name, values in means.items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["mean", "se", "mcse"])


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of a mean, NaN for fewer than two values.

    Arguments:
        values: The values, shape (n,).
    """
    if len(values) < 2:
        return math.nan
    with np.errstate(invalid="ignore"):
        return float(values.std(ddof=1) / math.sqrt(len(values)))


def _combined(errors: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors).sum()) / len(errors))


def _over(evidence: xr.Dataset) -> np.ndarray:
    over: np.ndarray = ~(evidence["pareto_k"].to_numpy() <= evidence.attrs["good_k"])
    return over


def checked_rows(program: Any, x: Any) -> Rows:
    """Reads data as a program's rows, and lets the program's own `check` refuse them.

    They take its dtype and stay on their own device, to be moved piece by piece.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data.

    Raises:
        ValueError: Where `program` is something else, or the data do not fit it.
    """
    programs_of(program)
    rows = Rows.of(x, like=program, move=False)
    check = getattr(program, "check", None)
    if callable(check):
        rows.ask(lambda piece: check(piece.x), program)
    return rows


def estimates(log_weights: np.ndarray) -> dict[str, np.ndarray]:
    """Computes every per-row number of the evidence.

    Arguments:
        log_weights: log p(x, z) - log q(z | x), shape (S, rows).

    Returns:
        By name, each of shape (rows,).
    """
    size, rows = log_weights.shape
    at_once = max(1, MAX_WEIGHTS // max(size, 1))
    values = {name: np.empty(rows) for name in ATTRIBUTES}
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        for name, numbers in _estimates(log_weights[:, piece].astype(np.float64)).items():
            values[name][piece] = numbers
    return values


def _estimates(log_weights: np.ndarray) -> dict[str, np.ndarray]:
    size = len(log_weights)
    with np.errstate(all="ignore"):
        log_evidence, weights = _log_mean_exp(log_weights)
        mean = weights.mean(axis=0)
        quarters, _ = _log_mean_exp(_quarters(log_weights))
        return {
            "log_evidence": log_evidence,
            "mcse": weights.std(axis=0, ddof=1) / (math.sqrt(size) * mean),
            "ess": weights.sum(axis=0) ** 2 / np.square(weights).sum(axis=0),
            "pareto_k": pareto_k(log_weights),
            "elbo": log_weights.mean(axis=0),
            "elbo_mcse": log_weights.std(axis=0, ddof=1) / math.sqrt(size),
            "log_evidence_quarter": quarters.mean(axis=0),
            "log_evidence_quarter_mcse": quarters.std(axis=0, ddof=1) / math.sqrt(4),
        }


def _quarters(log_weights: np.ndarray) -> np.ndarray:
    size, rows = log_weights.shape
    quarters = log_weights[: size // 4 * 4].reshape(4, size // 4, rows)
    return quarters.swapaxes(0, 1)


def _log_mean_exp(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logarithm of the mean weight, and the weights over the largest of them."""
    top = log_weights.max(axis=0)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(log_weights - top)
    return np.log(weights.mean(axis=0)) + top, weights


def labelled(
    values: dict[str, np.ndarray], names: np.ndarray, num_samples: int, seed: int | None
) -> xr.Dataset:
    """Labels the numbers of the evidence.

    Arguments:
        values: What `estimates` returns.
        names: The labels of the rows.
        num_samples: The number of draws behind them.
        seed: The seed of these, noted.
    """
    variables = {name: ("datum", values[name], ATTRIBUTES[name]) for name in ATTRIBUTES}
    attributes = {
        "num_samples": num_samples,
        "seed": "none" if seed is None else seed,
        "good_k": good_k(num_samples),
    }
    return xr.Dataset(variables, coords={"datum": names}, attrs=attributes)


def point_masses(program: Any, rows: Rows) -> list[str]:
    """Names the latent sites of the guide that are point masses.

    Arguments:
        program: The program.
        rows: Its data, of which two rows are read.
    """
    trace = poutine.trace(program.guide).get_trace(rows[:2].to_like(program).x)
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and isinstance(_innermost(site["fn"]), dist.Delta)
    ]


def data_sites(found: Structure) -> tuple[str, ...]:
    """Names the observed sites that hold data, which those of `pyro.factor` do not.

    Arguments:
        found: What the program is made of.
    """
    return tuple(name for name in found.observed if found.event_shapes[name].numel())


def _innermost(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


@dataclass(frozen=True)
class Plan:
    """How a run of a program is cut into pieces that fit a bound on memory.

    Arguments:
        structure: What the program is made of.
        rows: The number of rows.
        rows_at_once: The most rows of a piece.
        draws_at_once: The most draws of each row in one part of a piece.
        elements: How many elements the largest tensor has for each draw of each row.
    """

    structure: Structure
    rows: int
    rows_at_once: int
    draws_at_once: int
    elements: int

    @classmethod
    def of(cls, program: nn.Module, rows: Rows, num_samples: int, max_elements: int) -> "Plan":
        """Plans to draw for each row, with tensors of about `max_elements` elements at most.

        Arguments:
            program: The program.
            rows: Its data.
            num_samples: The number of draws of each row.
            max_elements: The bound.
        """
        found = structure(program, rows[:2].to_like(program).x)
        elements = _elements_per_draw(program, rows, found)
        at_once = min(len(rows), max(1, max_elements // (num_samples * elements)))
        most = min(num_samples, max(1, max_elements // (at_once * elements)))
        draws = math.ceil(num_samples / math.ceil(num_samples / most))  # parts of one size
        return cls(found, len(rows), at_once, draws, elements)

    def pieces(self) -> list[slice]:
        """The pieces of the rows."""
        starts = range(0, self.rows, self.rows_at_once)
        return [slice(start, min(start + self.rows_at_once, self.rows)) for start in starts]

    def drawing(self, program: nn.Module, function: Any, num_samples: int) -> Drawing:
        """Returns a function of rows and draws that runs piece after piece.

        Arguments:
            program: The program.
            function: What it runs, as of :class:`Drawing`.
            num_samples: The number of draws of each row, of all parts.
        """
        calls = len(self.pieces()) * len(self.parts(num_samples))
        return Drawing(program, function, calls, self.rows * num_samples * self.elements)

    def parts(self, num_samples: int) -> list[int]:
        """How many draws each part of a piece has.

        Arguments:
            num_samples: Their sum.
        """
        starts = range(0, num_samples, self.draws_at_once)
        return [min(self.draws_at_once, num_samples - start) for start in starts]


def _bar(total: int, *, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="evidence", unit=" draws", unit_scale=True, disable=not shown)


def _log_weights(program: nn.Module, plan: Plan) -> Any:
    def log_weights(x: Data, count: int) -> dict[str, Tensor]:
        found = log_densities(program, x, count, known=plan.structure)
        return {"log_weights": found.log_weights}

    return log_weights


def _at_once(program: nn.Module, max_elements: int) -> int:
    """How many elements a tensor has best: on a CPU as many as its caches hold."""
    is_cpu = floating_like(program).device.type == "cpu"
    return min(max_elements, IN_CACHE) if is_cpu else max_elements


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library would keep it.

    glibc holds on to blocks that lie below live ones: over thousands of pieces that came to
    several times the bound.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _TensorSizes(TorchDispatchMode):
    """Notes how many elements the storage behind each operation's results has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.sizes.append(max(map(_stored_elements, tensors), default=0))
        return results


def _stored_elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _tensor_sizes(program: nn.Module, rows: Rows, shape: Structure, side: int) -> list[int]:
    few = rows[torch.arange(side, device=rows.device) % len(rows)].to_like(program).x
    noted = _TensorSizes()
    with noted:
        log_densities(program, few, side, known=shape)
    return noted.sizes


def _elements_per_draw(program: nn.Module, rows: Rows, shape: Structure) -> int:
    """Returns how many elements the largest tensor of a run has for each draw of each row.

    Two small runs tell it, hidden layers included; runs of unlike operations (rejection
    sampling) give an upper bound.
    """
    small, large = (_tensor_sizes(program, rows, shape, side) for side in (2, 4))
    events = max((math.prod(size) for size in shape.event_shapes.values()), default=1)
    if len(small) == len(large):
        growth = max((b - a for a, b in zip(small, large, strict=True)), default=0)
        return max(1, events, math.ceil(growth / (4 * 4 - 2 * 2)))
    return max(1, events, math.ceil(max(large) / 16))
