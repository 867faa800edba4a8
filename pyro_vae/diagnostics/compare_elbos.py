"""Estimators of the ELBO on one program at one state: value, gradient, noise and cost."""

import copy
import html
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from .. import plots
from ..data.checks import checked_count
from ..data.read import read
from ..data.rows import Rows
from ..data.source import Row
from ..elbos import (
    IWAE,
    MIWAE,
    Estimate,
    Estimator,
    Objective,
    Trace_ELBO,
)
from ..elbos.chunks import Plan, give_memory_back, point_masses
from ..elbos.log_densities import Structure, draw, latent_sites, programs_of, structure
from ..engine.running import evaluating, kept_buffers, kept_generators, seeded
from ..evidence.linear_gaussian import doubled, marginal
from ..evidence.log_evidence import estimates
from ..evidence.pareto_k import good_k
from .memory import LiveBytes
from .moments import (
    Moments,
    Variance,
    efficiency,
    median,
    relative_distance,
    signal_to_noise,
)

__all__ = ["Comparison", "compare_elbos"]

Reference: TypeAlias = int | Estimator | np.ndarray | Tensor | Sequence[float] | None
Parameters: TypeAlias = dict[str, list[nn.Parameter]]

GROUPS = ("encoder", "decoder", "prior")
MEDIAN_OF_ABS_NORMAL = 0.6744897501960817
NUM_SAMPLES = 5000
QUARTERS = 4
ROUNDS = 20
MAX_ELEMENTS = 2**22  # of one tensor, of which a gradient keeps many
DEFAULT_PARTICLES = (1, 4, 16, 64)


def compare_elbos(
    program: nn.Module,
    x: Any,
    elbos: Mapping[str, Estimator],
    *,
    context: Any = None,
    weights: Any = None,
    num_repeats: int = 100,
    reference: Reference = None,
    seed: int | None = 0,
    progress: bool = False,
) -> "Comparison":
    r"""Compares estimators on one program as it stands: bias, noise and cost of their gradients.

    Nothing is trained: weights, their `.grad`, buffers, modes and generators are as before. The
    program runs in evaluation mode, on all rows at once. Gradients are those of the objective
    per row, in nats, in the unconstrained parameters. These fall into groups, told by what
    depends on what: those of q(z | x) are the `encoder`; of the others, those of p(z) are the
    `prior`, those of p(x | z) the `decoder`.

    Of the gradient g in R repeats, with mean m and standard deviation s of each parameter:

    - `sd` is the root of the mean of s squared;
    - `snr`, the signal-to-noise ratio, is the median of \|m\| / s. Without any signal it would be
      `snr_floor` = 0.6745 / sqrt(R): what is not well above it is not known. Parameters with
      m = s = 0 (of dead units) are left out;
    - `grad_bias` is \|E g - r\| / \|r\|, the Euclidean distance over the group's parameters to a
      reference r. The square is estimated without bias, from products of different batches
      of repeats; a negative estimate is set to 0. `grad_bias_se` is defined so that
      grad_bias / grad_bias_se is the number of standard errors between the squared distance and
      0. It is a jackknife error, includes the error of r, and is rather too large. If r cannot
      be distinguished from 0, as at an optimum, both are NaN.

    For decoder and prior, r is the gradient of log p(x): the exact one if log p(x) has a closed
    form, otherwise the mean of four importance-sampling estimates. There `grad_bias` is the bias
    of the objective: that of the ELBO is larger than that of `IWAE(5)`. log p(x) has no gradient
    in the encoder. There r is the gradient of the estimator's own objective by autograd, or NaN
    if there is none (`RWS`, `TVO`, ...).
    So an unbiased one has a `grad_bias_encoder` of 0 within its error.

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such: a minibatch or more, held out.
        elbos: By name, estimators of `pyro_vae.elbos`.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        num_repeats: How often each is asked, R, 4 or more.
        reference: The reference of the bias. By default it is the exact log p(x) if the program is
            linear and Gaussian, otherwise `IWAE(5000)`. An int is another number of samples (16 or
            more), an array the exact log p(x) of each row, an estimator its own value and
            gradient.
        seed: The seed of the draws; with `None` torch's generator continues.
        progress: Whether to show a bar.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: If `program` is not a program or has no parameters, an estimator is none of
            `pyro_vae.elbos` or cannot take the program (the message names it), or the data do
            not fit.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> elbos = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(5)}
        >>> found = compare_elbos(vae, torch.ones(3, 64), elbos, num_repeats=10, reference=100)
        >>> found.reference[:24]
        'IWAE(100), a lower bound'
        >>> found.table.index.to_list()
        ['ELBO', 'IWAE']
    """
    checked_count("num_repeats", num_repeats, least=4)
    programs_of(program)
    rows = read(x, program, context=context, weights=weights)
    run = _Run(program, rows.to_like(program), _checked(elbos), num_repeats, seed)
    target = _checked_reference(reference, len(rows))
    run.check()
    with run.fixed(), _bar(run.passes(), shown=progress) as bar:
        known = run.log_evidence(target)
        gradient = run.gradient_reference(target, known)
        table = run.table(known, gradient, bar)
    run.forget()
    table.attrs = {
        "reference": known.label,
        "gradient_reference": gradient.label,
        "num_repeats": num_repeats,
        "seed": seed,
        "num_rows": len(rows),
    }
    return Comparison(table, known.label, run)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Estimators of the ELBO side by side, as :func:`compare_elbos` returns them.

    Arguments:
        table: A row an estimator, in the order given:

            - `value`, the mean over rows and repeats, in nats per row, and `value_se`, the
              Monte Carlo error of the repeats for these rows;
            - `bias`, the value less the reference's, and `bias_se`;
            - `direction`, what the value is to log p(x);
            - for `encoder`, `decoder` and `prior`, if they have parameters, `grad_bias_*`,
              `grad_bias_*_se`, `sd_*`, `snr_*` and `snr_floor_*`;
            - `ms`, the median time of a step (value and gradient), asked in turn, and `ms_se`;
            - `memory_mb`, the most memory that a step takes beside parameters and data, in 10^6
              bytes: on a CPU that of tensors, without what an operation takes for itself;
            - `efficiency`, (sd^2 ms) of the first / (sd^2 ms), over all parameters: how many
              times less compute gives the same noise, larger is better; `efficiency_se`. It
              compares estimators of one objective: it knows nothing of bias.

            Its `attrs` hold `reference`, `gradient_reference`, `num_repeats`, `seed` and
            `num_rows`.
        reference: What `bias` is counted from: `"exact"`, `"IWAE(5000), a lower bound"`, ...
    """

    table: pd.DataFrame
    reference: str
    _run: "_Run" = field(repr=False)

    def curves(
        self,
        num_particles: Sequence[int] = DEFAULT_PARTICLES,
        *,
        num_repeats: int | None = None,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Asks the multi-sample estimators again, at other numbers of draws K.

        Arguments:
            num_particles: The numbers of draws. Of `MIWAE` and `PIWAE`, M stays.
            num_repeats: How often each is asked; by default as often as in the comparison.
            progress: Whether to show a bar.

        Returns:
            A row an estimator and K: `estimator`, `num_particles`, `snr_*`, `snr_floor_*`, `ms`.
            Of an estimator without K the row is that of `table`, its `num_particles` NaN.

        Raises:
            ValueError: If there are no numbers, or one is not a positive integer.
        """
        counts = [checked_count("num_particles", count) for count in num_particles]
        if not counts:
            raise ValueError("Expected at least one number of particles; got none.")
        kept = [*(str(c) for c in self.table if str(c).startswith("snr_")), "ms"]
        elbos = self._run.elbos
        fixed = [name for name, elbo in elbos.items() if elbo.with_particles(2) is None]
        made = {
            (name, count): made
            for name, elbo in elbos.items()
            for count in counts
            if count >= elbo.least_particles and (made := elbo.with_particles(count)) is not None
        }
        repeats = self._run.num_repeats if num_repeats is None else num_repeats
        run = self._run.of(made, checked_count("num_repeats", repeats, least=4))
        found: dict[tuple[str, float], Any] = {
            (name, math.nan): self.table.loc[name] for name in fixed
        }
        with run.fixed(), _bar(run.passes(), shown=progress) as bar:
            times = run.times(bar)
            for key, elbo in made.items():
                moments = run.repeats(elbo, bar)
                found[key] = run.statistics(elbo, moments) | {"ms": times[key][0]}
        lines = [
            {"estimator": name, "num_particles": count} | {k: found[name, count][k] for k in kept}
            for own in self._run.elbos
            for name, count in found
            if name == own
        ]
        return pd.DataFrame(lines)

    def plot(
        self,
        num_particles: Sequence[int] = DEFAULT_PARTICLES,
        *,
        num_repeats: int | None = None,
        progress: bool = False,
        figure: Any = None,
    ) -> Any:
        """Draws signal-to-noise and cost against the number of draws K, and returns the figure.

        The program is asked again, as it is now.

        Arguments:
            num_particles: The numbers of draws.
            num_repeats: How often each is asked; by default as often as in the comparison.
            progress: Whether to show a bar.
            figure: The figure or subfigure to draw into; a new one by default.

        Raises:
            ValueError: If there are no numbers, or one is not a positive integer.
        """
        curves = self.curves(num_particles, num_repeats=num_repeats, progress=progress)
        return plots.estimators(curves, figure=figure)

    def blocks(self) -> dict[str, pd.DataFrame]:
        """The table in pieces that fit on a page: by title some of its columns."""
        groups = [group for group in GROUPS if f"sd_{group}" in self.table]
        said = ["grad_bias_{}", "grad_bias_{}_se", "sd_{}", "snr_{}", "snr_floor_{}"]
        values = ["value", "value_se", "bias", "bias_se", "direction"]
        cost = ["ms", "ms_se", "memory_mb", "efficiency", "efficiency_se"]
        return {
            f"objective, nats per row; bias to: {self.reference}": self.table[values],
            **{
                f"gradient of the {group}": self.table[[name.format(group) for name in said]]
                for group in groups
            },
            "cost of a step": self.table[cost],
        }

    def __repr__(self) -> str:
        return "\n\n".join(
            f"{title}\n{part.to_string(float_format='{:.4g}'.format)}"
            for title, part in self.blocks().items()
        )

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(title)}</p>{part.to_html(float_format='{:.4g}'.format)}"
            for title, part in self.blocks().items()
        )


class _Evidence(NamedTuple):
    """log p(x) per row: its mean over the rows, its error, and what it is."""

    value: float
    se: float
    label: str


class _Gradients(NamedTuple):
    """The gradient of the reference by group, independent estimates (n, parameters) of it."""

    draws: dict[str, Tensor]
    label: str


@dataclass(frozen=True, eq=False)
class _Run:
    """A program at a fixed state, rows, and the estimators that are asked."""

    program: nn.Module
    rows: Rows
    elbos: dict[Any, Estimator]
    num_repeats: int
    seed: int | None
    notes: dict[str, Any] = field(default_factory=dict)

    def of(self, elbos: dict[Any, Estimator], num_repeats: int) -> "_Run":
        return _Run(self.program, self.rows, elbos, num_repeats, self.seed, self.notes)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Runs the program as it is evaluated, with gradients, and puts all back."""
        with (
            kept_buffers(self.program),
            seeded(self.seed),
            evaluating(self.program),
            torch.enable_grad(),
        ):
            yield

    def check(self) -> None:
        """Refuses what could not be asked, before anything is asked for long."""
        known = structure(self.program, self.x)
        for name, elbo in self.elbos.items():
            with _naming(name):
                elbo.check(known)
        with self.fixed(), kept_generators():
            self.notes["known"] = known
            self.notes["scale"] = self._scale(known)
            self.notes["parameters"], self.notes["is_tied"] = _parameters(self.program, self.x)
            self._check_parameters()
            for name, elbo in self.elbos.items():
                with _naming(name):
                    self.step(self.objective(elbo))

    def forget(self) -> None:
        """Lets go of what was kept for one table."""
        for name in self.notes.keys() - {"known", "scale", "parameters", "is_tied"}:
            del self.notes[name]

    def _scale(self, known: Structure) -> Any:
        """The scale of the loss, N / B of a subsampling plate, say."""
        if known.global_latents or known.global_observed:
            return 1.0
        nesting = known.max_plate_nesting
        particles = draw(*programs_of(self.program), (self.x,), {}, 1, nesting)
        return particles.scale()

    def _check_parameters(self) -> None:
        if not any(self.groups.values()):
            raise ValueError(
                "Expected a program with parameters that take a gradient; got "
                f"{type(self.program).__name__}, which has none."
            )

    @property
    def x(self) -> Row:
        return self.rows.head(len(self.rows))

    @property
    def known(self) -> Structure:
        found: Structure = self.notes["known"]
        return found

    @property
    def groups(self) -> Parameters:
        """The parameters of each group that has any."""
        found: Parameters = self.notes["parameters"]
        return found

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups.values() for parameter in group]

    def passes(self) -> int:
        """How many steps a bar counts."""
        return len(self.elbos) * (self.num_repeats + self._rounds())

    def _rounds(self) -> int:
        return max(5, min(ROUNDS, self.num_repeats))

    def objective(self, elbo: Estimator) -> Objective:
        return Objective(*programs_of(self.program), elbo)

    def step(
        self, objective: Objective, parameters: list[nn.Parameter] | None = None
    ) -> tuple[Estimate, tuple[Tensor, ...]]:
        """One value and its gradient, as an optimiser would have it."""
        objective.at_step(getattr(objective.elbo, "steps", 0))
        before = getattr(objective.elbo, "steps", 0)
        estimate = objective(self.x)
        objective.at_step(before)
        wanted = self.parameters if parameters is None else parameters
        found = torch.autograd.grad(estimate.loss, wanted, materialize_grads=True)
        return estimate, found

    def repeats(
        self,
        elbo: Estimator,
        bar: Any = None,
        parameters: list[nn.Parameter] | None = None,
        num_repeats: int | None = None,
    ) -> "Moments":
        """The moments of the gradient of the objective per row, and of its value."""
        objective = self.objective(elbo)
        count = num_repeats or self.num_repeats
        moments = Moments(count)
        for _ in range(count):
            estimate, gradients = self.step(objective, parameters)
            flat = torch.cat([gradient.flatten() for gradient in gradients]).double()
            moments.add(self._value(estimate), flat / -(len(self.rows) * self.notes["scale"]))
            if bar is not None:
                bar.update()
        return moments

    def _value(self, estimate: Estimate) -> Tensor:
        if estimate.per_row is not None:
            return estimate.per_row.detach().double().mean()
        return -estimate.loss.detach().double() / (len(self.rows) * self.notes["scale"])

    def log_evidence(self, reference: Any) -> _Evidence:
        """log p(x) of the rows, as it is asked for."""
        if isinstance(reference, np.ndarray):
            return _Evidence(reference.mean(), 0.0, "given, as exact")
        if isinstance(reference, Estimator):
            moments = self._own_reference(reference)
            label = f"{reference}, {_article(reference.direction)}"
            return _Evidence(*moments.value(), label)
        if reference is None and (exact := self._exact()) is not None:
            return _Evidence(float(exact.detach()), 0.0, "exact")
        if (why := self._without_evidence()) is not None:
            return _Evidence(math.nan, math.nan, why)
        found = self._sampled(reference or NUM_SAMPLES)[0]
        over = (~(found["pareto_k"] <= good_k(reference or NUM_SAMPLES))).mean()
        error = np.sqrt(np.square(found["mcse"]).sum()) / len(self.rows)
        label = f"IWAE({reference or NUM_SAMPLES}), a lower bound"
        if over > 0.1:
            label = f"{label} (too low: Pareto k over its limit in {over:.0%} of rows)"
        return _Evidence(float(found["log_evidence"].mean()), float(error), label)

    def gradient_reference(self, reference: Any, known: _Evidence) -> _Gradients:
        """The gradient of log p(x) in decoder and prior."""
        groups = {name: self.groups[name] for name in GROUPS[1:] if name in self.groups}
        if not groups:
            return _Gradients({}, "none")
        if isinstance(reference, Estimator):
            draws = self._own_reference(reference).batches()
            return _Gradients(self._split(draws, groups), known.label)
        if self._without_evidence() is not None:
            return _Gradients({}, "none")
        exact = self._exact()
        if exact is not None and not isinstance(reference, int):
            wanted = self._of_double([p for group in groups.values() for p in group])
            found = torch.autograd.grad(exact, wanted, materialize_grads=True)
            draws = torch.cat([gradient.flatten() for gradient in found])[None]
            return _Gradients(self._split(draws, groups), "exact")
        samples = reference if isinstance(reference, int) else NUM_SAMPLES
        label = f"IWAE({samples // QUARTERS}), the mean of {QUARTERS}"
        return _Gradients(self._split(self._sampled(samples)[1], groups), label)

    def _split(self, draws: Tensor, groups: Parameters) -> dict[str, Tensor]:
        sizes = [sum(p.numel() for p in group) for group in groups.values()]
        return dict(zip(groups, draws.split(sizes, dim=1), strict=True))

    def _own_reference(self, elbo: Estimator) -> "Moments":
        if "own reference" not in self.notes:
            wanted = [p for name in GROUPS[1:] for p in self.groups.get(name, ())]
            with _naming("reference"):
                elbo.check(self.known)
                moments = self.repeats(elbo, parameters=wanted or self.parameters)
            self.notes["own reference"] = moments
        found: Moments = self.notes["own reference"]
        return found

    def _exact(self) -> Tensor | None:
        """The mean log p(x) in float64, with its gradient in a copy of the program."""
        if "exact" not in self.notes:
            self.notes["exact"] = None
            if (double := doubled(self.program)) is not None:
                with evaluating(double), torch.enable_grad():
                    if (found := marginal(double)) is not None:
                        x = self.rows.to_like(double).field("x").flatten(1)
                        self.notes["exact"] = found.log_prob(x).mean()
                        self.notes["double"] = double
        exact: Tensor | None = self.notes["exact"]
        return exact

    def _of_double(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        double: nn.Module = self.notes["double"]
        own = zip(self.program.parameters(), double.parameters(), strict=True)
        twin = {id(one): other for one, other in own}
        return [twin[id(parameter)] for parameter in parameters]

    def _without_evidence(self) -> str | None:
        """The reason why there is no log p(x) of each row, or `None`."""
        if self.known.global_latents or self.known.global_observed:
            return "none: there are sites that all rows share"
        with torch.no_grad(), kept_generators():
            points = point_masses(self.program, self.rows)
        return f"none: a point mass at {', '.join(points)}" if points else None

    def _sampled(self, num_samples: int) -> tuple[dict[str, np.ndarray], Tensor]:
        """log p(x) of each row from S draws, and its gradient from each quarter of them."""
        if "sampled" in self.notes:
            return self.notes["sampled"]  # type: ignore[no-any-return]
        wanted = [p for name in GROUPS[1:] for p in self.groups.get(name, ())]
        quarter, parts = num_samples // QUARTERS, []
        gradients: list[Any] = [0.0] * QUARTERS
        with torch.no_grad():
            plan = Plan.of(self.program, self.rows, quarter, MAX_ELEMENTS)
        for piece in plan.pieces():
            x, weights = self.rows[piece].x, []
            for i in range(QUARTERS):
                log_weights, gradient = self._of_piece(x, quarter, wanted)
                gradients[i] = gradients[i] + gradient / len(self.rows)
                weights.append(log_weights)
            parts.append(estimates(torch.cat(weights).cpu().numpy()))
            give_memory_back()
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.notes["sampled"] = found, (torch.stack(gradients) if wanted else torch.empty(4, 0))
        return self.notes["sampled"]  # type: ignore[no-any-return]

    def _of_piece(
        self, x: Row, count: int, wanted: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor | float]:
        nesting = self.known.max_plate_nesting
        with torch.set_grad_enabled(bool(wanted)):
            particles = draw(*programs_of(self.program), (x,), {}, count, nesting)
            densities = particles.densities()
        log_weights = densities.log_weights.detach()
        if not wanted:
            return log_weights, 0.0
        total = (log_weights.softmax(0) * densities.log_joint).sum()
        found = torch.autograd.grad(total, wanted, materialize_grads=True)
        return log_weights, torch.cat([gradient.flatten() for gradient in found]).double()

    def table(self, known: _Evidence, gradient: _Gradients, bar: Any) -> pd.DataFrame:
        """The table of a comparison."""
        times = self.times(bar)
        lines: dict[str, dict[str, Any]] = {}
        variances: list[Variance] = []
        for name, elbo in self.elbos.items():
            moments = self.repeats(elbo, bar)
            value, error = moments.value()
            line: dict[str, Any] = {
                "value": value,
                "value_se": error,
                "bias": value - known.value,
                "bias_se": math.hypot(error, known.se),
                "direction": elbo.direction,
            }
            line |= self.statistics(elbo, moments, gradient)
            ms, ms_se = times[name]
            line |= {"ms": ms, "ms_se": ms_se, "memory_mb": self._memory(elbo) / 1e6}
            variances.append(Variance(*moments.variance(), ms, ms_se))
            lines[name] = line | efficiency(variances[0], variances[-1])
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("estimator")

    def statistics(
        self, elbo: Estimator, moments: "Moments", gradient: _Gradients | None = None
    ) -> dict[str, float]:
        """What is said of the gradient of each group."""
        found: dict[str, float] = {}
        means, variances, batches = (
            self._split(part, self.groups)
            for part in (moments.mean[None], moments.variances()[None], moments.batches())
        )
        for group in self.groups:
            if gradient is not None:
                bias = self._bias(elbo, group, batches[group], gradient)
                found |= {f"grad_bias_{group}": bias[0], f"grad_bias_{group}_se": bias[1]}
            found[f"sd_{group}"] = float(variances[group].mean().sqrt())
            found[f"snr_{group}"] = signal_to_noise(means[group], variances[group])
            found[f"snr_floor_{group}"] = MEDIAN_OF_ABS_NORMAL / math.sqrt(self.num_repeats)
        return found

    def _bias(
        self, elbo: Estimator, group: str, batches: Tensor, gradient: _Gradients
    ) -> tuple[float, float]:
        reference = gradient.draws.get(group)
        if group == "encoder":
            reference = self._encoder_reference(elbo)
        if reference is None:
            return math.nan, math.nan
        return relative_distance(batches, reference.to(batches))

    def _encoder_reference(self, elbo: Estimator) -> Tensor | None:
        """The gradient of an estimator's own objective in the encoder, by autograd."""
        plain = elbo.plain()
        if plain is None or (elbo.is_split and self.notes.get("is_tied")):
            return None
        plain.kl_weight = elbo.kl_weight
        if self.known.unreparameterised and plain.needs_rsample:
            return None
        is_common = type(plain) in (Trace_ELBO, IWAE, MIWAE) and float(plain.kl_weight) == 1.0
        key = repr(plain) if is_common else f"{plain!r}, {id(elbo)}"
        if key not in self.notes:
            moments = self.repeats(plain, parameters=self.groups["encoder"])
            self.notes[key] = moments.batches()
        return self.notes[key]  # type: ignore[no-any-return]

    def times(self, bar: Any) -> dict[Any, tuple[float, float]]:
        """The median time of a step of each, asked in turn, and its error, in ms."""
        objectives = {name: self.objective(elbo) for name, elbo in self.elbos.items()}
        spent: dict[Any, list[float]] = {name: [] for name in objectives}
        for objective in objectives.values():
            self.step(objective)
        for _ in range(self._rounds()):
            for name, objective in objectives.items():
                self._wait()
                start = time.perf_counter()
                self.step(objective)
                self._wait()
                spent[name].append(1000 * (time.perf_counter() - start))
                bar.update()
        return {name: median(np.array(values)) for name, values in spent.items()}

    def _wait(self) -> None:
        if self.rows.device.type == "cuda":
            torch.cuda.synchronize(self.rows.device)

    def _memory(self, elbo: Estimator) -> int:
        """The most bytes of tensors that a step makes at a time."""
        objective, device = self.objective(elbo), self.rows.device
        with kept_generators():
            self.step(objective)
            if device.type != "cuda":
                with LiveBytes() as live:
                    self.step(objective)
                return live.most
            self._wait()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.step(objective)
            self._wait()
            return torch.cuda.max_memory_allocated(device) - before


def _parameters(program: nn.Module, x: Row) -> tuple[Parameters, bool]:
    """The parameters of each group, and whether log p(x, z) depends on those of the guide."""
    parameters = [p for p in program.parameters() if p.requires_grad]
    runs: Any = programs_of(program)
    guide = prune_subsample_sites(poutine.trace(runs[1]).get_trace(x))
    guide.compute_log_prob()
    drawn = [site for _, site in latent_sites(guide)]
    encoder = _used([part for s in drawn for part in (s["value"], s["log_prob"])], parameters)
    for site in drawn:
        site["value"] = site["value"].detach()
    replayed = poutine.replay(runs[0], trace=guide)
    model = prune_subsample_sites(poutine.trace(replayed).get_trace(x))
    model.compute_log_prob()
    sites = [site for site in model.nodes.values() if site["type"] == "sample"]
    prior = _used([s["log_prob"] for s in sites if not s["is_observed"]], parameters)
    decoder = _used([s["log_prob"] for s in sites if s["is_observed"]], parameters)
    found = dict(zip(GROUPS, (encoder, decoder - prior - encoder, prior - encoder), strict=True))
    groups = {k: [p for i, p in enumerate(parameters) if i in v] for k, v in found.items() if v}
    return groups, bool(encoder & (prior | decoder))


def _used(results: Iterable[Any], parameters: list[nn.Parameter]) -> set[int]:
    """The places of the parameters that any result depends on."""
    traced = [r.sum() for r in results if isinstance(r, Tensor) and r.requires_grad]
    if not traced or not parameters:
        return set()
    found = torch.autograd.grad(traced, parameters, allow_unused=True, retain_graph=True)
    return {i for i, gradient in enumerate(found) if gradient is not None}


def _checked(elbos: Any) -> dict[str, Estimator]:
    if not isinstance(elbos, Mapping) or not elbos:
        raise ValueError(f"Expected a dict of estimators by name; got {elbos!r}.")
    if len({str(name) for name in elbos}) < len(elbos):
        raise ValueError(f"Expected names that differ as text; got {list(elbos)}.")
    for name, elbo in elbos.items():
        if isinstance(elbo, type):
            raise ValueError(
                f"Expected an estimator, as {elbo.__name__}(...); got the class {elbo.__name__}. "
                f"({name!r})"
            )
        if not isinstance(elbo, Estimator):
            raise ValueError(
                f"Expected an estimator of pyro_vae.elbos, as pyro_vae.elbos.Trace_ELBO(); got "
                f"{elbo!r}. ({name!r})"
            )
    return {str(name): copy.deepcopy(elbo) for name, elbo in elbos.items()}


def _checked_reference(reference: Any, count: int) -> Any:
    if isinstance(reference, IWAE):
        reference = reference.num_particles
    if reference is None or isinstance(reference, Estimator):
        return copy.deepcopy(reference)
    is_count = isinstance(reference, Integral)
    try:
        values = reference.detach().cpu() if isinstance(reference, Tensor) else reference
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(())
    if not is_count and array.ndim == 0:
        raise ValueError(
            "Expected as reference None, a number of samples, log p(x) of each row, or an "
            f"estimator; got {reference!r}."
        )
    if is_count:
        return checked_count("reference", reference, least=4 * QUARTERS)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(
            f"Expected a reference of {count} finite numbers, log p(x) of each row; got shape "
            f"{array.shape}, {np.isnan(array).sum()} of them NaN."
        )
    return array


def _article(direction: str) -> str:
    if direction == "no bound":
        return direction
    return f"{'an' if direction.startswith('upper') else 'a'} {direction}"


@contextmanager
def _naming(name: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} ({name!r})") from error


def _bar(total: int, *, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="estimators", unit=" steps", disable=not shown)
