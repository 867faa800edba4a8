"""Prints tables: the evidence of held-out rows, and the comparison of ELBO estimators."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from torch import nn

from ..data.read import read
from ..data.rows import Rows
from ..diagnostics import Calibration, Comparison, Gaps, active_units, calibrate, gaps
from ..elbos.chunks import point_masses
from ..engine.running import evaluating
from ..evidence import Evidence, log_evidence
from ..evidence.log_evidence import standard_error
from ..programs.vae import VAE

__all__ = ["Judgement", "show_estimators"]

MOST_OVER = 0.1
MOST_GAPS = 100  # rows


@dataclass(frozen=True)
class Judgement:
    """The evidence of a program on some rows, and its active latent dims.

    Arguments:
        evidence: The result of `log_evidence`; `None` if the posterior is a point mass.
        active: The result of `active_units`.
        baselines: log p(x) of each row under the baselines of a VAE, by name.
        advice: What to do first if a VAE is worse than a baseline.
        gaps: What the family of the guide and what the encoder loses, of the first rows.
        calibration: Whether the guide is the posterior of simulated rows.
    """

    evidence: Evidence | None
    active: pd.DataFrame
    baselines: dict[str, np.ndarray]
    advice: str = ""
    gaps: Gaps | None = None
    calibration: Calibration | None = None

    @classmethod
    def of(
        cls,
        program: nn.Module,
        rows: Rows,
        num_samples: int,
        seed: int,
        *,
        refine: bool = True,
        has_checks: bool = False,
    ) -> "Judgement":
        """Evaluates a program.

        Arguments:
            program: The program.
            rows: Rows that were not used for training.
            num_samples: The number of draws per row.
            seed: The seed of the draws.
            refine: Whether rows far from their guide get proposals of their own.
            has_checks: Whether to find the gaps, and to calibrate the guide.
        """
        rows = read(rows, program, check=False, move=True)
        with evaluating(program):
            has_density = not point_masses(program, rows)
        evidence = None
        if has_density:
            shown = Console().is_terminal
            options: dict[str, Any] = {"seed": seed, "progress": shown}
            kind = "auto" if refine else False
            evidence = log_evidence(program, rows, num_samples, refine=kind, **options)
        baselines, advice = {}, ""
        if isinstance(program, VAE) and program.is_initialized:
            scores = program.baselines(rows).items()
            baselines = {str(k).replace("_", " "): v.to_numpy() for k, v in scores}
            advice = program.advice()
        units = active_units(program, rows, seed=seed)
        found, calibration = None, None
        if has_checks and evidence is not None:
            with suppress(ValueError):  # of latents or data that cannot be checked
                found = gaps(program, rows[:MOST_GAPS], **options)
            with suppress(ValueError):
                calibration = calibrate(program, **options)
        return cls(evidence, units, baselines, advice, found, calibration)

    def frame(self) -> pd.DataFrame:
        """Returns the evidence, one line per row.

        Raises:
            ValueError: If the posterior is a point mass.
        """
        if self.evidence is None:
            raise ValueError("Expected a posterior with a density; got a point mass.")
        return self.evidence.to_dataframe().rename_axis("row")

    def show(self, title: str) -> None:
        """Prints a table and a sentence that says how reliable it is.

        Arguments:
            title: The title of the table.
        """
        console = Console()
        table = Table("quantity", "value", "s.e.", "meaning", title=title, title_justify="left")
        table.columns[1].justify = table.columns[2].justify = "right"
        advice = "A point mass has no density, so log p(x) cannot be estimated for this posterior."
        if self.evidence is not None:
            summary, attrs = self.evidence.summary(), self.evidence.attrs
            means, errors = (dict(summary[column].items()) for column in ("mean", "se"))
            notes = dict(summary["note"].items())
            limit, size = attrs["good_k"], attrs["num_samples"]
            for name, label, meaning in (
                ("elbo", "ELBO", "lower bound"),
                ("log_evidence", f"log p(x), S = {size}", "tighter lower bound"),
                ("log_evidence_quarter", f"log p(x), S = {size // 4}", "trend in S"),
            ):
                value, error = f"{means[name]:.2f}", f"{errors[name]:.2f}"
                meaning = f"{meaning}, nats per row"
                if note := notes[name]:
                    meaning = f"{meaning}; {note}"
                table.add_row(label, value, error, meaning)
            for name, scores in self.baselines.items():
                is_better = scores.mean() > means["log_evidence"]
                meaning = "a simple model" + (": better than this VAE" if is_better else "")
                error = f"{standard_error(scores):.2f}"
                table.add_row(name, f"{scores.mean():.2f}", error, meaning)
            over, missing = means["pareto_k_over"], means["pareto_k_missing"]
            rows = self.evidence.sizes["datum"]
            meaning = f"{round(over * rows)} of {rows} rows; fewer is better"
            before = means["pareto_k_guide_over"]
            meaning += f" ({before:.1%} under the guide alone)" if before != over else ""
            table.add_row(f"Pareto k over {limit:.2f}", f"{over:.1%}", "", meaning)
            if missing:
                meaning = f"{round(missing * rows)} of {rows} rows; it needs more than 20 draws"
                table.add_row("Pareto k not known", f"{missing:.1%}", "", meaning)
            advice = _advice(over, missing)
            if any(s.mean() > means["log_evidence"] for s in self.baselines.values()):
                advice = f"A simple model describes these rows better: {self.advice}."
        used = f"{int(self.active['active'].sum())} of {len(self.active)}"
        table.add_row("active units", used, "", "dims that depend on the data")
        console.print(table)
        console.print(advice, highlight=False)
        for line in self.checks():
            console.print(line, highlight=False)

    def checks(self) -> list[str]:
        """Says in one line each what the gaps and the calibration found."""
        lines = []
        if self.gaps is not None:
            numbers = self.gaps.summary()[["mean", "se"]].to_numpy()
            family, encoder = (f"{mean:.2f} +- {error:.2f}" for mean, error in numbers)
            lines.append(
                f"Gaps: of log p(x) - ELBO, {family} nats per row come from the family of the "
                f"posterior and {encoder} from the encoder. {self.gaps.advice()}"
            )
        if self.calibration is not None:
            table = self.calibration.table
            covered = table["coverage"].mean()
            verdict = "not the posterior" if table["flagged"].any() else "like the posterior"
            lines.append(
                f"Calibration: on rows simulated from the model, the guide is {verdict}: its 90% "
                f"intervals hold {covered:.0%} of the true latents."
            )
        return lines


def _advice(over: float, missing: float) -> str:
    """The advice for the shares of rows whose Pareto k is over its limit, or is not known."""
    if over > MOST_OVER:
        return (
            f"Pareto k is over its limit in more than {MOST_OVER:.0%} of the rows. "
            "There, log p(x) is too low by an unknown amount. Try more draws (--num-samples), "
            "a richer posterior, or a likelihood with a larger spread."
        )
    if missing:
        return (
            "Where Pareto k is not known, the error of log p(x) is not known either. Use more "
            "than 20 draws (--num-samples)."
        )
    return (
        "The standard errors cover rows and draws for these weights, but not the variation "
        "between training seeds."
    )


def show_estimators(comparison: Comparison, title: str) -> None:
    """Prints two tables of estimators, of their values and of their gradients.

    Arguments:
        comparison: The result of `compare_elbos`.
        title: The title of the first table.
    """
    table, console = comparison.table, Console()
    groups = [g for g in ("encoder", "decoder", "prior") if f"sd_{g}" in table]
    values = Table(
        *("estimator", "value", "s.e.", "bias", "s.e.", "ms", "MB", "efficiency"), title=title
    )
    gradients = Table("estimator", title="Signal-to-noise ratio of the gradient; relative bias")
    for group in groups:
        gradients.add_column(group)
        gradients.add_column("bias (s.e.)")
    for name, line in table.iterrows():
        parts = [f"{line[c]:.2f}" for c in ("value", "value_se", "bias", "bias_se")]
        values.add_row(
            str(name), *parts, *(f"{line[c]:.3g}" for c in ("ms", "memory_mb", "efficiency"))
        )
        cells = []
        for group in groups:
            bias, error = line[f"grad_bias_{group}"], line[f"grad_bias_{group}_se"]
            relative = f"{bias:.2f} ({error:.2f})" if np.isfinite(bias) else "-"
            cells += [f"{line[f'snr_{group}']:.2g}", relative]
        gradients.add_row(str(name), *cells)
    for part in (values, gradients):
        part.title_justify, part.columns[0].overflow = "left", "fold"
        for column in part.columns[1:]:
            column.justify = "right"
        console.print(part)
    floor = table[f"snr_floor_{groups[0]}"].iloc[0]
    others = [f"{n} ({d})" for n, d in table["direction"].items() if d != "lower bound"]
    notes = [
        "Values and their bias are in nats per row; ms and MB are the time and memory of a step.",
        f"The reference of log p(x) is {comparison.reference}.",
        "The reference of the gradient in decoder and prior is "
        f"{table.attrs['gradient_reference']}; in the encoder it is the gradient of the same "
        "objective by autograd.",
        f"A gradient without signal has a signal-to-noise ratio of about {floor:.2g}.",
        "Efficiency is variance times time, of the first estimator relative to each.",
    ]
    if others:
        notes.insert(0, f"These estimators are not lower bounds of log p(x): {', '.join(others)}.")
    console.print(" ".join(notes), markup=False, highlight=False)
