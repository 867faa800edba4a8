"""The commands that write what runs say of rows: latents, reconstructions, and a ranking."""

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table as Printed

from ..data.files import new_file
from ..data.rows import Rows
from ..diagnostics import compare
from ..diagnostics.compare import Ranking
from ..prediction import reconstruct
from .commands import (
    Columns,
    Data,
    Decimal,
    Device,
    Drop,
    Header,
    Index,
    Key,
    Label,
    Refine,
    Run,
    Samples,
    Seed,
    Separator,
    app,
    new_picture,
    opened,
)
from .runs import LOADING, latents_of, save_picture, settings_of

__all__ = ["show_ranking"]

Out = Annotated[Path | None, typer.Option(help=".csv file to write. If omitted: print csv.")]


def _write(frame: pd.DataFrame, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(frame.to_csv())
        return
    with new_file(out) as beside:
        frame.to_csv(beside)


@app.command("embed")
def _embed(
    folder: Run,
    data: Data,
    out: Out = None,
    label: Label = None,
    key: Key = None,
    separator: Separator = None,
    decimal: Decimal = None,
    header: Header = None,
    index: Index = None,
    columns: Columns = None,
    drop: Drop = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Writes mean and standard deviation of the latents of each row of DATA, given the row."""
    reading = {name: value for name, value in locals().items() if name in LOADING}
    program, rows, _ = opened(folder, data, reading, seed, device)
    _write(latents_of(program, rows, seed), out)


@app.command("reconstruct")
def _reconstruct(
    folder: Run,
    data: Data,
    out: Out = None,
    prob: Annotated[float, typer.Option(help="Probability of the interval.")] = 0.9,
    num_samples: Annotated[int, typer.Option(help="Number of replicates per row.", min=2)] = 200,
    label: Label = None,
    key: Key = None,
    separator: Separator = None,
    decimal: Decimal = None,
    header: Header = None,
    index: Index = None,
    columns: Columns = None,
    drop: Drop = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Writes what the model predicts of each value of DATA, given its row: mean and interval.

    There is one line for each value, with its row, its column and the value observed; one for
    each category, with its probability, under a likelihood of categories.
    """
    reading = {name: value for name, value in locals().items() if name in LOADING}
    program, rows, _ = opened(folder, data, reading, seed, device)
    options: dict[str, Any] = {"num_samples": num_samples, "prob": prob, "seed": seed}
    found = reconstruct(program, rows, progress=Console().is_terminal, **options)
    dims = [str(dim) for dim in found.dims if dim != "category"]
    found["observed"] = (dims, rows.field("x").cpu().numpy())
    names = {name: name.replace("x_dim_0", "column") for name in dims} | {"datum": "row"}
    _write(found.rename(names).to_dataframe(), out)


@app.command("compare")
def _compare(
    data: Data,
    folders: Annotated[
        list[Path],
        typer.Argument(help="Run folders that `fit` or `demo` wrote.", metavar="RUN..."),
    ],
    out: Annotated[Path | None, typer.Option(help=".csv file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
    label: Label = None,
    key: Key = None,
    separator: Separator = None,
    decimal: Decimal = None,
    header: Header = None,
    index: Index = None,
    columns: Columns = None,
    drop: Drop = None,
    num_samples: Samples = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    *,
    refine: Refine = True,
) -> None:
    """Ranks runs by log p(x) of the same rows of DATA, held out from all runs fitted to DATA."""
    reading = {name: value for name, value in locals().items() if name in LOADING}
    picture = None if plot is None else new_picture(plot, plot)
    programs, rows = _held_out(folders, data, reading, seed, device)
    options: dict[str, Any] = {"seed": seed, "progress": Console().is_terminal}
    kind = "auto" if refine else False
    ranking = compare(programs, rows, num_samples, refine=kind, **options)
    show_ranking(ranking, f"{len(rows)} rows of {data}")
    if out is not None:
        _write(ranking, out)
    if picture is not None:
        with new_file(picture) as beside:
            save_picture(ranking.plot(), beside)


def _held_out(
    folders: list[Path], data: str, reading: dict[str, Any], seed: int, device: str
) -> tuple[dict[str, torch.nn.Module], Rows]:
    """The programs of runs by the name of the folder, and the rows that no run was fitted to."""
    programs: dict[str, torch.nn.Module] = {}
    kept: Rows | None = None
    changes = {settings_of(f).get("settings", {}).get("transform") or "none" for f in folders}
    if len(changes) > 1:
        raise ValueError(
            "Expected runs with the same --transform, since they score the same rows; got "
            f"{' and '.join(sorted(changes))}."
        )
    for folder in folders:
        name = folder.name if sum(f.name == folder.name for f in folders) == 1 else str(folder)
        programs[name], rows, held_out = opened(folder, data, dict(reading), seed, device)
        kept = rows if kept is None else kept
        if held_out is not None:
            kept = kept[torch.from_numpy(np.isin(kept.labels, held_out))]
    if kept is None or not len(kept):
        raise ValueError(
            f"No row of {data} was held out from all of these runs. Give other rows, or fit the "
            "runs with the same --test and --seed."
        )
    return programs, kept


def show_ranking(ranking: Ranking, title: str) -> None:
    """Prints a ranking, the baselines beside it, and what limits it.

    Arguments:
        ranking: The result of `compare`.
        title: The title of the table.
    """
    table = Printed("model", "difference", "s.e.", "log p(x)", "s.e.", "note", title=title)
    table.title_justify, table.columns[0].overflow = "left", "fold"
    for column in table.columns[1:5]:
        column.justify, column.no_wrap = "right", True
    numbers = ["difference", "difference_se", "log_evidence", "se"]
    for name, line in ranking.iterrows():
        is_equal = line["within_error"] and name != ranking.index[0]
        notes = [line["note"], "equals the best within error" if is_equal else ""]
        notes.append("below a simple model" if line["below"] else "")
        note = "; ".join(note for note in notes if note)
        table.add_row(str(name), *(f"{line[number]:.2f}" for number in numbers), note)
    best = ranking["log_evidence"].iloc[0]
    for name, (mean, error) in ranking.attrs["baselines"].items():
        table.add_row(
            name, f"{mean - best:.2f}", "", f"{mean:.2f}", f"{error:.2f}", "simple model"
        )
    console = Console()
    console.print(table)
    console.print(f"In nats per row. {ranking.summary()}", markup=False, highlight=False)
