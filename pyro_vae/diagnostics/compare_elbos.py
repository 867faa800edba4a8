"""Bias, noise and cost of the gradients of several estimators, on one program."""

import copy
import html
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor, nn

from .. import plots
from ..data.checks import checked_draws
from ..data.read import read
from ..data.rows import Rows
from ..data.source import Row
from ..data.table import Table
from ..elbos import IWAE, MIWAE, Estimate, Estimator, Objective, Trace_ELBO
from ..elbos.chunks import Plan, give_memory_back, point_masses
from ..elbos.log_densities import (
    Scale,
    Structure,
    draw,
    latent_sites,
    programs_of,
    structure,
)
from ..engine.progress import progress_bar
from ..engine.running import (
    check_gradients,
    evaluating,
    kept_buffers,
    kept_generators,
    public,
    seeded,
)
from ..evidence.linear_gaussian import doubled, marginal
from ..evidence.log_evidence import estimates
from ..evidence.pareto_k import good_k
from ..prediction.traces import trace_of
from .memory import LiveBytes
from .moments import Moments, Variance, efficiency, median, relative_distance, signal_to_noise
from .naming import checked_names, naming

if TYPE_CHECKING:
    from ..plots.canvas import Canvas

__all__ = ["Comparison", "compare_elbos"]

Reference: TypeAlias = int | Estimator | np.ndarray | Tensor | Sequence[float] | None
Parameters: TypeAlias = dict[str, list[nn.Parameter]]

GROUPS = ("encoder", "decoder", "prior")
MEDIAN_OF_ABS_NORMAL = 0.6744897501960817
NUM_SAMPLES = 5000
QUARTERS = 4
ROUNDS = 20
MAX_ELEMENTS = 2**22  # of one tensor; a gradient needs many tensors at a time
DEFAULT_PARTICLES = (1, 4, 16, 64)
CLEAR = 3.0  # standard errors


@public
def compare_elbos(
    program: nn.Module,
    x: object,
    elbos: Mapping[str, Estimator],
    *,
    context: object = None,
    weights: object = None,
    num_repeats: int = 100,
    reference: Reference = None,
    seed: int | None = None,
    progress: bool = True,
) -> "Comparison":
    r"""Compares estimators on one program with fixed weights: bias, noise and cost of gradients.

    Nothing is trained: weights, their `.grad`, buffers and modes do not change, and only the draw
    of a seed advances torch's generator. The program runs in evaluation mode, on all rows at
    once. Gradients are those of the objective per row, in nats, with respect to the unconstrained
    parameters. The parameters form three groups: the `encoder` are those that q(z | x) depends
    on; of the others, the `prior` are those of p(z) and the `decoder` those of p(x | z).

    Let g be the gradient in R repeats, with mean m and standard deviation s for each parameter:

    - `sd` is the root of the mean of s squared;
    - `snr`, the signal-to-noise ratio, is the median of \|m\| / s. Pure noise has a ratio of about
      `snr_floor` = 0.6745 / sqrt(R), so a ratio near it does not show a signal. Parameters with
      m = s = 0 (of dead units) are left out;
    - `grad_bias` is \|E g - r\| / \|r\|, the Euclidean distance over the group's parameters to a
      reference r. Its square is estimated without bias, from products of different batches
      of repeats; a negative estimate is set to 0. `grad_bias_se` is defined such that
      grad_bias / grad_bias_se is the number of standard errors between the squared distance and
      0. It is a jackknife error that includes the error of r, and tends to be too large. If r
      cannot be distinguished from 0, as at an optimum, both are NaN.

    For decoder and prior, r is the gradient of log p(x): the exact one if log p(x) has a closed
    form, otherwise the mean of four importance-sampling estimates. There `grad_bias` is the bias
    of the objective: that of the ELBO is larger than that of `IWAE(5)`. For the encoder, log p(x)
    has no gradient, and r is the gradient of the estimator's own objective by autograd; it is NaN
    if autograd cannot compute it (`RWS`, `TVO`, ...). The `grad_bias_encoder` of an unbiased
    estimator is therefore 0 within its error.

    References:
        Tighter variational bounds are not necessarily better (Rainforth et al., 2018),
        arXiv 1802.04537.

    Arguments:
        program: A module with methods `model(x)` and `guide(x)`.
        x: The data, shape (rows, *event), or a dict of such arrays: a minibatch or more, held out.
        elbos: Estimators of `pyro_vae.elbos` by name.
        context: Covariates of the rows, shape (rows, *context): `row["context"]` of the program.
        weights: The weight of each row, shape (rows,): `row["weight"]` of the program.
        num_repeats: The number of gradients R of each estimator, 4 or more.
        reference: The reference of the bias. By default it is the exact log p(x) if the program is
            linear and Gaussian, otherwise `IWAE(5000)`. An int is another number of samples (16 or
            more), an array the exact log p(x) of each row, an estimator its own value and
            gradient.
        seed: The seed of the draws. With `None` one is drawn from torch's generator.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: If `program` is not a program or has no parameters, if an estimator is not one
            of `pyro_vae.elbos` or does not support the program (the message names it), or if the
            data do not fit the program.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(64, 2, pv.likelihoods.Binomial(total_count=16), seed=0)
        >>> elbos = {"ELBO": pv.elbos.Trace_ELBO(), "IWAE": pv.elbos.IWAE(5)}
        >>> x = torch.ones(3, 64)
        >>> comparison = compare_elbos(vae, x, elbos, num_repeats=10, reference=100, seed=0)
        >>> comparison.reference[:24]
        'IWAE(100), a lower bound'
        >>> comparison.table.index.to_list()
        ['ELBO', 'IWAE']
    """
    checked_draws("num_repeats", num_repeats, least=4)
    programs_of(program)
    with torch.enable_grad():
        check_gradients(program.parameters())
    rows = read(x, program, context=context, weights=weights).to_like(program)
    given = checked_names("estimators", elbos)
    if len({str(name) for name in given}) < len(given):
        raise ValueError(f"Expected names that differ as text; got {list(given)}.")
    for name, elbo in given.items():
        if not isinstance(elbo, Estimator):
            raise ValueError(
                "Expected an object of a class of pyro_vae.elbos, such as "
                f"pyro_vae.elbos.Trace_ELBO(); got {elbo!r}. (estimator {name!r})"
            )
    chosen: dict[Hashable, Estimator] = {
        str(name): copy.deepcopy(elbo) for name, elbo in given.items()
    }
    target = _checked_reference(reference, len(rows))
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    run = _Run(program, rows, chosen, num_repeats, seed, _setup(program, rows, chosen, seed))
    with (
        _fixed(program, seed),
        progress_bar(run.steps, "estimators", " steps", progress=progress) as bar,
    ):
        known = run.reference(target)
        table = run.table(known, bar.update)
    table.attrs = {
        "reference": known.label,
        "gradient_reference": known.gradient_label,
        "num_repeats": num_repeats,
        "seed": seed,
        "num_rows": len(rows),
    }
    return Comparison(table, known.label, run)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The comparison of estimators of the ELBO that :func:`compare_elbos` returns.

    Arguments:
        table: A line an estimator, in the order of the argument `elbos`:

            - `value`, the mean over rows and repeats, in nats per row, and `value_se`, its
              Monte Carlo error over the repeats, for these rows;
            - `bias`, the value minus that of the reference, and `bias_se`;
            - `direction`, how the expected value relates to log p(x): `"lower bound"`, ...;
            - for `encoder`, `decoder` and `prior`, if they have parameters, `grad_bias_*`,
              `grad_bias_*_se`, `sd_*`, `snr_*` and `snr_floor_*`;
            - `ms`, the median time of a step (value and gradient), and `ms_se`; the estimators
              take turns;
            - `memory_mb`, the peak memory of a step without parameters and data, in 10^6 bytes;
              on a CPU it counts tensors, not the workspace of an operation;
            - `efficiency`, (sd^2 ms) of the first estimator / (sd^2 ms), over all parameters: by
              which factor less compute gives the same noise, larger is better; and
              `efficiency_se`. It compares estimators of one objective, and ignores bias.

            Its `attrs` hold `reference`, `gradient_reference`, `num_repeats`, `seed` and
            `num_rows`.
        reference: The reference of `bias`: `"exact"`, `"IWAE(5000), a lower bound"`, ...
    """

    table: pd.DataFrame
    reference: str
    _run: "_Run" = field(repr=False)

    def summary(self) -> str:
        """Describes in sentences the values, and the bias, noise and cost of the gradients."""
        attrs = self.table.attrs
        lines = [
            f"Each estimator was evaluated {attrs['num_repeats']} times on {attrs['num_rows']} "
            "rows."
        ]
        if self.reference.startswith("none: "):
            lines.append(f"There is no reference of log p(x): {self.reference[6:]}.")
        else:
            lines.append(f"The reference of log p(x) is {self.reference}.")
        if (label := attrs["gradient_reference"]) != "none":
            lines.append(f"The reference of the gradients of decoder and prior is {label}.")
        for name, line in self.table.iterrows():
            distance = f", which is {abs(line['bias']):.3f} (s.e. {line['bias_se']:.3f}) "
            distance += f"{'below' if line['bias'] < 0 else 'above'} the reference"
            lines.append(
                f"{name!r} ({line['direction']}) is {line['value']:.3f} (s.e. "
                f"{line['value_se']:.3f}) nats per row"
                f"{'' if math.isnan(line['bias']) else distance}."
            )
        for group in self._run.setup.groups:
            bias, snr = self.table[f"grad_bias_{group}"], self.table[f"snr_{group}"]
            is_clear = bias > CLEAR * self.table[f"grad_bias_{group}_se"]
            is_noise = snr < 2 * self.table[f"snr_floor_{group}"]
            for found, sentence in (
                (is_clear, f"The gradient of the {group} has a clear bias for"),
                (is_noise, f"The gradient of the {group} does not stand out from its noise for"),
            ):
                if names := ", ".join(map(repr, self.table.index[found])):
                    lines.append(f"{sentence} {names}.")
        place = int(np.argmax(self.table["efficiency"].fillna(-math.inf)))
        best, first = self.table.index[place], self.table.index[0]
        if best != first:
            lines.append(
                f"{best!r} needs the least compute for the same noise: its efficiency is "
                f"{self.table['efficiency'].iloc[place]:.3g}, that of {first!r} is 1."
            )
        elif len(self.table) > 1:
            lines.append(f"No other estimator has a larger efficiency than {first!r}.")
        if len(self.table) > 1:
            lines.append("Efficiency compares estimators of one objective, and ignores bias.")
        return " ".join(lines)

    @public
    def curves(
        self,
        num_particles: Sequence[int] = DEFAULT_PARTICLES,
        *,
        num_repeats: int | None = None,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Evaluates the multi-sample estimators again, at other numbers of draws K.

        The program is evaluated with the weights that it has now.

        Arguments:
            num_particles: The numbers of draws K. `MIWAE` and `PIWAE` do not change their M.
            num_repeats: The number of gradients of each estimator; by default that of the
                comparison.
            progress: Whether to show a progress bar, on a terminal or in a notebook.

        Returns:
            A line an estimator and K: `estimator`, `num_particles`, `snr_*`, `snr_floor_*`, `ms`.
            An estimator without K has one line, copied from `table`, with a `num_particles` of
            NaN.

        Raises:
            ValueError: If `num_particles` is empty, or one is not a positive integer.
        """
        counts = [checked_draws("num_particles", count) for count in num_particles]
        if not counts:
            raise ValueError("Expected at least one number of particles; got none.")
        repeats = self._run.num_repeats if num_repeats is None else num_repeats
        checked_draws("num_repeats", repeats, least=4)
        columns = [*(str(c) for c in self.table if str(c).startswith("snr_")), "ms"]
        made: dict[Hashable, Estimator] = {}
        keys: list[tuple[str, float]] = []
        for name, elbo in self._run.elbos.items():
            if elbo.with_particles(2) is None:
                keys.append((str(name), math.nan))
            for count in counts:
                other = elbo.with_particles(count) if count >= elbo.least_particles else None
                if other is not None:
                    keys.append((str(name), count))
                    made[str(name), count] = other
        with torch.enable_grad():
            check_gradients(self._run.program.parameters())
        run = replace(self._run, elbos=made, num_repeats=repeats)
        found: dict[Hashable, dict[str, float]] = {}
        with (
            _fixed(run.program, run.seed),
            progress_bar(run.steps, "estimators", " steps", progress=progress) as bar,
        ):
            times = run.times(bar.update)
            for key, elbo in made.items():
                moments = run.repeats(elbo, tick=bar.update)
                found[key] = run.statistics(moments) | {"ms": times[key][0]}
        lines = []
        for key in keys:
            line = found.get(key, self.table.loc[key[0]])
            parts = {column: line[column] for column in columns}
            lines.append({"estimator": key[0], "num_particles": key[1]} | parts)
        return Table(lines)

    def plot(
        self,
        num_particles: Sequence[int] = DEFAULT_PARTICLES,
        *,
        num_repeats: int | None = None,
        progress: bool = True,
        figure: "Canvas | None" = None,
    ) -> "Canvas":
        """Plots :meth:`curves`, signal-to-noise ratio and cost against the number of draws K.

        Arguments:
            num_particles: The numbers of draws K.
            num_repeats: The number of gradients of each estimator; by default that of the
                comparison.
            progress: Whether to show a progress bar, on a terminal or in a notebook.
            figure: The figure or subfigure to draw into; a new one by default.

        Returns:
            The figure.

        Raises:
            ValueError: If `num_particles` is empty, or one is not a positive integer.
        """
        curves = self.curves(num_particles, num_repeats=num_repeats, progress=progress)
        return plots.estimators(curves, figure=figure)

    def blocks(self) -> dict[str, pd.DataFrame]:
        """Returns groups of columns of the table that each fit on a page, by title."""
        gradient = ["grad_bias_{}", "grad_bias_{}_se", "sd_{}", "snr_{}", "snr_floor_{}"]
        values = ["value", "value_se", "bias", "bias_se", "direction"]
        cost = ["ms", "ms_se", "memory_mb", "efficiency", "efficiency_se"]
        return {
            f"objective, nats per row; bias to: {self.reference}": self.table[values],
            **{
                f"gradient of the {group}": self.table[[c.format(group) for c in gradient]]
                for group in self._run.setup.groups
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


class _Target(NamedTuple):
    """The argument `reference` after its check; at most one field is not `None`."""

    elbo: Estimator | None = None
    log_evidence: np.ndarray | None = None
    num_samples: int | None = None


class _Reference(NamedTuple):
    """The mean log p(x) per row with its error, and independent estimates of its gradient.

    `gradients` has a tensor of shape (estimates, parameters) for each group.
    """

    value: float
    se: float
    label: str
    gradients: dict[str, Tensor]
    gradient_label: str


class _Setup(NamedTuple):
    """Properties of a program and its rows that do not depend on the estimator.

    `scale` is the scale of the loss, such as N / B of a subsample; `groups` has the groups that
    are not empty; `is_tied` is whether log p(x, z) depends on parameters of the encoder.
    """

    structure: Structure
    scale: Scale
    groups: Parameters
    is_tied: bool


@dataclass(frozen=True, eq=False)
class _Run:
    """The evaluation of estimators on a program with fixed weights, and on fixed rows."""

    program: nn.Module
    rows: Rows
    elbos: Mapping[Hashable, Estimator]
    num_repeats: int
    seed: int
    setup: _Setup

    @property
    def rounds(self) -> int:
        """The number of times that a step of each estimator is timed."""
        return max(5, min(ROUNDS, self.num_repeats))

    @property
    def steps(self) -> int:
        """The number of steps of all estimators, for the progress bar."""
        return len(self.elbos) * (self.num_repeats + self.rounds)

    @property
    def x(self) -> Row:
        return self.rows.head(len(self.rows))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.setup.groups.values() for parameter in group]

    def objective(self, elbo: Estimator) -> Objective:
        return Objective(*programs_of(self.program), elbo)

    def repeats(
        self,
        elbo: Estimator,
        parameters: list[nn.Parameter] | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> Moments:
        """The moments of the gradient of the objective per row, and of its value."""
        objective, moments = self.objective(elbo), Moments(self.num_repeats)
        wanted = self.parameters if parameters is None else parameters
        scale = len(self.rows) * self.setup.scale
        for _ in range(self.num_repeats):
            estimate, gradients = _step(objective, self.x, wanted)
            if estimate.per_row is None:
                value = -estimate.loss.detach().double() / scale
            else:
                value = estimate.per_row.detach().double().mean()
            moments.add(value, _flat(gradients) / -scale)
            tick()
        return moments

    def reference(self, target: _Target) -> _Reference:
        """The mean log p(x), and its gradient with respect to decoder and prior."""
        groups = {k: group for k, group in self.setup.groups.items() if k in GROUPS[1:]}
        wanted = [parameter for group in groups.values() for parameter in group]
        if (elbo := target.elbo) is not None:
            with naming("reference"):
                elbo.check(self.setup.structure)
                moments = self.repeats(elbo, wanted or self.parameters)
            article = "an " if elbo.direction.startswith("upper") else "a "
            label = f"{elbo}, {'' if elbo.direction == 'no bound' else article}{elbo.direction}"
            if not wanted:
                return _Reference(*moments.value(), label, {}, "none")
            return _Reference(*moments.value(), label, _split(moments.batches(), groups), label)
        obstacle = None
        if self.setup.structure.global_latents or self.setup.structure.global_observed:
            obstacle = "there are sites that all rows share"
        else:
            with torch.no_grad(), kept_generators():
                if points := point_masses(self.program, self.rows):
                    obstacle = f"a point mass at {', '.join(points)}"
        samples = NUM_SAMPLES if target.num_samples is None else target.num_samples
        value, se, label, gradients = math.nan, math.nan, f"none: {obstacle}", torch.empty(0)
        gradient_label = f"IWAE({samples // QUARTERS}), the mean of {QUARTERS}"
        exact = self._exact(wanted) if target.num_samples is None else None
        if exact is not None:
            value, gradients = exact
            se, label, gradient_label = 0.0, "exact", "exact"
        elif obstacle is None and (wanted or target.log_evidence is None):
            value, se, label, gradients = self._sampled(samples, wanted)
        if target.log_evidence is not None:
            value, se, label = float(target.log_evidence.mean()), 0.0, "given, as exact"
        if obstacle is not None or not wanted:
            return _Reference(value, se, label, {}, "none")
        return _Reference(value, se, label, _split(gradients, groups), gradient_label)

    def _exact(self, wanted: list[nn.Parameter]) -> tuple[float, Tensor] | None:
        """The exact mean log p(x) and its gradient, in float64, if it has a closed form."""
        if (double := doubled(self.program)) is None:
            return None
        with evaluating(double), torch.enable_grad():
            if (normal := marginal(double)) is None:
                return None
            value = normal.log_prob(self.rows.to_like(double).field("x").flatten(1)).mean()
        if not wanted:
            return float(value.detach()), torch.empty(1, 0)
        pairs = zip(self.program.parameters(), double.parameters(), strict=True)
        twins = {id(own): twin for own, twin in pairs}
        parameters = [twins[id(parameter)] for parameter in wanted]
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        return float(value.detach()), _flat(gradients)[None]

    def _sampled(
        self, num_samples: int, wanted: list[nn.Parameter]
    ) -> tuple[float, float, str, Tensor]:
        """The mean log p(x), its error, its label, and its gradient from each quarter of draws."""
        quarter, parts = num_samples // QUARTERS, []
        programs, nesting = programs_of(self.program), self.setup.structure.max_plate_nesting
        size = sum(parameter.numel() for parameter in wanted)
        gradients = torch.zeros(QUARTERS, size, dtype=torch.float64, device=self.rows.device)
        with torch.no_grad():
            plan = Plan.of(self.program, self.rows, quarter, MAX_ELEMENTS)
        for piece in plan.pieces():
            x, weights = self.rows[piece].x, []
            for i in range(QUARTERS):
                with torch.set_grad_enabled(bool(wanted)):
                    densities = draw(*programs, (x,), {}, quarter, nesting).densities()
                weights.append(densities.log_weights.detach())
                if wanted:
                    total = (weights[i].softmax(0) * densities.log_joint).sum()
                    gradient = torch.autograd.grad(total, wanted, materialize_grads=True)
                    gradients[i] += _flat(gradient) / len(self.rows)
            parts.append(estimates(torch.cat(weights).cpu().numpy()))
            give_memory_back()
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        over, missing = found["pareto_k"] > good_k(num_samples), np.isnan(found["pareto_k"])
        label = f"IWAE({num_samples}), a lower bound"
        if over.mean() > 0.1:
            label = f"{label} (too low: Pareto k over its limit in {over.mean():.0%} of rows)"
        elif missing.mean() > 0.1:
            label = f"{label} (of unknown error: Pareto k needs more than 20 draws)"
        error = np.sqrt(np.square(found["mcse"]).sum()) / len(self.rows)
        return float(found["log_evidence"].mean()), float(error), label, gradients

    def table(self, known: _Reference, tick: Callable[[], object]) -> pd.DataFrame:
        """The table of a comparison."""
        times = self.times(tick)
        lines: dict[Hashable, dict[str, float | str]] = {}
        variances: list[Variance] = []
        by_autograd: dict[str, Tensor] = {}
        for name, elbo in self.elbos.items():
            moments = self.repeats(elbo, tick=tick)
            references = dict(known.gradients)
            if (own := self._encoder_reference(elbo, by_autograd)) is not None:
                references["encoder"] = own
            value, error = moments.value()
            ms, ms_se = times[name]
            variances.append(Variance(*moments.variance(), ms, ms_se))
            lines[name] = {
                "value": value,
                "value_se": error,
                "bias": value - known.value,
                "bias_se": math.hypot(error, known.se),
                "direction": elbo.direction,
                **self.statistics(moments, references),
                "ms": ms,
                "ms_se": ms_se,
                "memory_mb": self._memory(elbo) / 1e6,
                **efficiency(variances[0], variances[-1]),
            }
        return Table(pd.DataFrame.from_dict(lines, orient="index")).rename_axis("estimator")

    def statistics(
        self, moments: Moments, references: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """The columns of each group; those of the bias only if there are references."""
        columns: dict[str, float] = {}
        groups = self.setup.groups
        means = _split(moments.mean[None], groups)
        variances = _split(moments.variances()[None], groups)
        batches = _split(moments.batches(), groups)
        for group in groups:
            if references is not None:
                bias = math.nan, math.nan
                if group in references:
                    reference = references[group].to(batches[group])
                    bias = relative_distance(batches[group], reference)
                columns |= {f"grad_bias_{group}": bias[0], f"grad_bias_{group}_se": bias[1]}
            columns[f"sd_{group}"] = float(variances[group].mean().sqrt())
            columns[f"snr_{group}"] = signal_to_noise(means[group], variances[group])
            columns[f"snr_floor_{group}"] = MEDIAN_OF_ABS_NORMAL / math.sqrt(self.num_repeats)
        return columns

    def _encoder_reference(self, elbo: Estimator, cache: dict[str, Tensor]) -> Tensor | None:
        """The gradient of an estimator's objective with respect to the encoder, by autograd."""
        plain = elbo.plain()
        if "encoder" not in self.setup.groups or plain is None:
            return None
        if elbo.is_split and self.setup.is_tied:
            return None
        plain.kl_weight = elbo.kl_weight
        if self.setup.structure.unreparameterised and plain.needs_rsample:
            return None
        is_common = type(plain) in (Trace_ELBO, IWAE, MIWAE) and float(plain.kl_weight) == 1.0
        key = repr(plain) if is_common else f"{plain!r}, {id(elbo)}"
        if key not in cache:
            cache[key] = self.repeats(plain, self.setup.groups["encoder"]).batches()
        return cache[key]

    def times(self, tick: Callable[[], object]) -> dict[Hashable, tuple[float, float]]:
        """The median time of a step of each estimator in turn, and its error, in ms."""
        objectives = {name: self.objective(elbo) for name, elbo in self.elbos.items()}
        spent: dict[Hashable, list[float]] = {name: [] for name in objectives}
        for objective in objectives.values():
            _step(objective, self.x, self.parameters)
        for _ in range(self.rounds):
            for name, objective in objectives.items():
                _synchronise(self.rows.device)
                start = time.perf_counter()
                _step(objective, self.x, self.parameters)
                _synchronise(self.rows.device)
                spent[name].append(1000 * (time.perf_counter() - start))
                tick()
        return {name: median(np.array(values)) for name, values in spent.items()}

    def _memory(self, elbo: Estimator) -> int:
        """The largest number of bytes of the tensors that exist at a time in a step."""
        objective, device = self.objective(elbo), self.rows.device
        with kept_generators():
            _step(objective, self.x, self.parameters)
            if device.type != "cuda":
                with LiveBytes() as live:
                    _step(objective, self.x, self.parameters)
                return live.most
            _synchronise(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            _step(objective, self.x, self.parameters)
            _synchronise(device)
            return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _fixed(program: nn.Module, seed: int) -> Iterator[None]:
    """Puts a program in evaluation mode with gradients, and restores its state at the end."""
    with kept_buffers(program), seeded(seed), evaluating(program), torch.enable_grad():
        yield


def _setup(
    program: nn.Module, rows: Rows, elbos: Mapping[Hashable, Estimator], seed: int
) -> _Setup:
    """Checks that each estimator supports the program, by one step of each."""
    x = rows.head(len(rows))
    known = structure(program, x)
    for name, elbo in elbos.items():
        with naming(f"estimator {name!r}"):
            elbo.check(known)
    scale: Scale = 1.0
    with _fixed(program, seed):
        if not known.global_latents and not known.global_observed:
            particles = draw(*programs_of(program), (x,), {}, 1, known.max_plate_nesting)
            scale = particles.scale()
        groups, is_tied = _parameters(program, x)
        if not groups:
            raise ValueError(
                "Expected a program with parameters that take a gradient; got "
                f"{type(program).__name__}, which has none."
            )
        parameters = [parameter for group in groups.values() for parameter in group]
        for name, elbo in elbos.items():
            with naming(f"estimator {name!r}"):
                _step(Objective(*programs_of(program), elbo), x, parameters)
    return _Setup(known, scale, groups, is_tied)


def _step(
    objective: Objective, x: Row, parameters: list[nn.Parameter]
) -> tuple[Estimate, tuple[Tensor, ...]]:
    """One value and its gradient, as in training; schedules do not advance."""
    steps = getattr(objective.elbo, "steps", 0)
    objective.at_step(steps)
    estimate = objective(x)
    objective.at_step(steps)
    return estimate, torch.autograd.grad(estimate.loss, parameters, materialize_grads=True)


def _flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def _split(draws: Tensor, groups: Parameters) -> dict[str, Tensor]:
    sizes = [sum(p.numel() for p in group) for group in groups.values()]
    return dict(zip(groups, draws.split(sizes, dim=1), strict=True))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parameters(program: nn.Module, x: Row) -> tuple[Parameters, bool]:
    """The parameters of each group, and whether log p(x, z) depends on those of the guide."""
    parameters = [p for p in program.parameters() if p.requires_grad]
    model, guide = programs_of(program)
    guided = trace_of(guide, x)
    guided.compute_log_prob()
    drawn = [site for _, site in latent_sites(guided)]
    encoder = _used([part for s in drawn for part in (s["value"], s["log_prob"])], parameters)
    for site in drawn:
        site["value"] = site["value"].detach()
    scored = trace_of(poutine.replay(model, trace=guided), x)
    scored.compute_log_prob()
    sites = [site for site in scored.nodes.values() if site["type"] == "sample"]
    prior = _used([s["log_prob"] for s in sites if not s["is_observed"]], parameters)
    decoder = _used([s["log_prob"] for s in sites if s["is_observed"]], parameters)
    places = dict(zip(GROUPS, (encoder, decoder - prior - encoder, prior - encoder), strict=True))
    groups = {k: [p for i, p in enumerate(parameters) if i in v] for k, v in places.items() if v}
    return groups, bool(encoder & (prior | decoder))


def _used(results: Iterable[object], parameters: list[nn.Parameter]) -> set[int]:
    """The positions of the parameters that at least one result depends on."""
    traced = [r.sum() for r in results if isinstance(r, Tensor) and r.requires_grad]
    if not traced or not parameters:
        return set()
    gradients = torch.autograd.grad(traced, parameters, allow_unused=True, retain_graph=True)
    return {i for i, gradient in enumerate(gradients) if gradient is not None}


def _checked_reference(reference: Reference, count: int) -> _Target:
    values: object = reference
    match reference:
        case None:
            return _Target()
        case IWAE(num_particles=size):
            return _Target(num_samples=checked_draws("reference", size, least=4 * QUARTERS))
        case Integral():
            return _Target(num_samples=checked_draws("reference", reference, least=4 * QUARTERS))
        case Estimator():
            return _Target(elbo=copy.deepcopy(reference))
        case Tensor():
            values = reference.detach().cpu()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(())
    if array.ndim == 0:
        raise ValueError(
            "Expected reference to be None, a number of samples, log p(x) of each row, or an "
            f"estimator; got {reference!r}."
        )
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(
            f"Expected a reference of {count} finite numbers, log p(x) of each row; got shape "
            f"{array.shape}, with {np.isnan(array).sum()} NaN."
        )
    return _Target(log_evidence=array)
