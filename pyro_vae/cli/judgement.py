"""What is known of a program on rows that it was not trained on, as a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from torch import nn

from ..data.read import read
from ..data.rows import Rows
from ..diagnostics import Comparison, active_units
from ..elbos.chunks import point_masses
from ..engine.running import evaluating
from ..evidence import Evidence, log_evidence

__all__ = ["Judgement", "show_estimators"]

MOST_OVER = 0.1


@dataclass(frozen=True)
class Judgement:
    """The evidence of rows, if the posterior has a density, and the latent dims in use.

    Arguments:
        evidence: As `log_evidence` returns it; `None` for a point mass.
        active: As `active_units` returns it.
    """

    evidence: Evidence | None
    active: pd.DataFrame

    @classmethod
    def of(cls, program: nn.Module, rows: Rows, num_samples: int, seed: int) -> "Judgement":
        """Judges a program.

        Arguments:
            program: The program.
            rows: Rows that it was not trained on.
            num_samples: Draws a row.
            seed: The seed of the draws.
        """
        shown = Console().is_terminal
        rows = read(rows, program, check=False, move=True)
        with evaluating(program):
            has_density = not point_masses(program, rows)
        evidence = (
            log_evidence(program, rows, num_samples, seed=seed, progress=shown)
            if has_density
            else None
        )
        return cls(evidence, active_units(program, rows, seed=seed))

    def frame(self) -> pd.DataFrame:
        """The evidence, a line a row.

        Raises:
            ValueError: If there is none.
        """
        if self.evidence is None:
            raise ValueError("Expected a posterior with a density; got a point mass.")
        return self.evidence.to_dataframe().rename_axis("row")

    def show(self, title: str) -> None:
        """Prints the table.

        Arguments:
            title: What stands above it.
        """
        table = Table("", "value", "s.e.", "", title=title, title_justify="left")
        table.columns[1].justify = table.columns[2].justify = "right"
        if self.evidence is not None:
            for line in _evidence_lines(self.evidence):
                table.add_row(*line)
        used = f"{int(self.active['active'].sum())} of {len(self.active)}"
        table.add_row("active units", used, "", "latent dims that the data move")
        console = Console()
        console.print(table)
        console.print(self._advice(), highlight=False)

    def _advice(self) -> str:
        if self.evidence is None:
            return "A point mass has no importance weights: no evidence for this posterior."
        over: Any = self.evidence.summary().loc["pareto_k_over", "mean"]
        if over <= MOST_OVER:
            return "s.e.: over rows and draws, for these weights; training seeds are not in it."
        return (
            "If Pareto k is over its limit, log p(x) is too low by an unknown amount: take "
            "more draws, a richer posterior, or a likelihood that leaves more spread."
        )


def _evidence_lines(evidence: Evidence) -> Iterator[tuple[str, str, str, str]]:
    table, rows = evidence.summary(), evidence.sizes["datum"]
    means, errors = (dict(table[column].items()) for column in ("mean", "se"))
    limit, size = evidence.attrs["good_k"], evidence.attrs["num_samples"]
    for name, label, said in (
        ("elbo", "ELBO", "a lower bound"),
        ("log_evidence", f"log p(x), S = {size}", "a closer lower bound"),
        ("log_evidence_quarter", f"log p(x), S = {size // 4}", "shows the trend in S"),
    ):
        yield label, f"{means[name]:.2f}", f"{errors[name]:.2f}", f"nats per row; {said}"
    over = means["pareto_k_over"]
    note = f"{round(over * rows)} of {rows} rows; fewer is better"
    yield f"Pareto k over {limit:.2f}", f"{over:.1%}", "", note


def show_estimators(found: Comparison, title: str) -> None:
    """Prints what is known of estimators: a table of what they say, one of their gradients.

    Arguments:
        found: As `compare_elbos` returns it.
        title: What stands above.
    """
    table, console = found.table, Console()
    groups = [g for g in ("encoder", "decoder", "prior") if f"sd_{g}" in table]
    first = Table("", "value", "s.e.", "bias", "s.e.", "ms", "MB", "efficiency", title=title)
    second = Table("", title="signal-to-noise of the gradient, and its relative bias")
    for group in groups:
        second.add_column(group)
        second.add_column("bias (s.e.)")
    for name, line in table.iterrows():
        parts = [line[c] for c in ("value", "value_se", "bias", "bias_se")]
        cost = [line[c] for c in ("ms", "memory_mb", "efficiency")]
        first.add_row(str(name), *(f"{v:.2f}" for v in parts), *(f"{v:.3g}" for v in cost))
        second.add_row(str(name), *(cell for group in groups for cell in _cells(line, group)))
    for part in (first, second):
        part.title_justify, part.columns[0].overflow = "left", "fold"
        for column in part.columns[1:]:
            column.justify = "right"
        console.print(part)
    floor = table[f"snr_floor_{groups[0]}"].iloc[0]
    others = [f"{n}: {d}" for n, d in table["direction"].items() if d != "lower bound"]
    if others:
        console.print(
            f"Not lower bounds of log p(x) are {'; '.join(others)}.", markup=False, highlight=False
        )
    console.print(
        f"Nats per row. The reference of log p(x): {found.reference}; that of the gradient in "
        f"decoder and prior: {table.attrs['gradient_reference']}, in the encoder autograd's of "
        f"the same objective. Without any signal signal-to-noise would be {floor:.2g}. "
        "Efficiency: variance x time of the first over that of each.",
        markup=False,
        highlight=False,
    )


def _cells(line: Any, group: str) -> tuple[str, str]:
    bias, error = line[f"grad_bias_{group}"], line[f"grad_bias_{group}_se"]
    known = f"{bias:.2f} ({error:.2f})" if np.isfinite(bias) else "-"
    return f"{line[f'snr_{group}']:.2g}", known
