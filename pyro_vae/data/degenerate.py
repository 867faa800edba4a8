"""Columns under which a density has no bound: constant, duplicated, collinear, or with an atom."""

import warnings

import torch
from torch import Tensor

__all__ = ["DegenerateColumnsWarning", "degenerate_columns", "warn_of"]

ATOM, FEWEST = 0.1, 5  # share and number of the rows with one value
FLAT, COLLINEAR = 1e-12, 1e-10
MOST = 500  # columns, above which collinear ones are not looked for


class DegenerateColumnsWarning(UserWarning):
    """Warns of columns under which a density has no bound."""


def degenerate_columns(x: Tensor) -> dict[str, list[int]]:
    """Finds columns under which a flexible density has no bound.

    Arguments:
        x: Rows (rows, columns), in float64.

    Returns:
        The numbers of the columns by what is wrong with them: `"constant"`, `"duplicated"` (up to
        location and scale), `"collinear"`, and `"of one value in more than a tenth of the rows"`.

    Example:
        >>> x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> degenerate_columns(torch.cat([x, x.sum(1, keepdim=True), torch.ones(50, 1)], 1))
        {'constant': [3], 'collinear': [0, 1, 2]}
    """
    u = x - x.mean(0)
    spread = u.square().mean(0).sqrt()
    is_flat = spread <= FLAT * x.abs().amax(0)
    found = {"constant": is_flat.nonzero().flatten().tolist()}
    varied = (~is_flat).nonzero().flatten()
    if len(x) > len(varied) > 1 and len(varied) <= MOST:
        u = u[:, varied] / spread[varied]
        correlation = u.T @ u / len(u)
        apart = correlation.abs().fill_diagonal_(0.0)
        is_twin = apart.amax(1) >= 1.0 - COLLINEAR
        found["duplicated"] = varied[is_twin].tolist()
        first = torch.ones_like(is_twin)
        for column in is_twin.nonzero().flatten().tolist():
            first[column] = not (apart[column, :column] >= 1.0 - COLLINEAR).any()
        values, vectors = torch.linalg.eigh(correlation[first][:, first])
        null = vectors[:, values < COLLINEAR]
        found["collinear"] = varied[first][(null.abs() > 1e-6).any(1)].tolist()
    same = (x == x.mode(0).values).sum(0)
    has_atom = (same > ATOM * len(x)) & (same >= FEWEST) & ~is_flat
    found["of one value in more than a tenth of the rows"] = has_atom.nonzero().flatten().tolist()
    return {what: columns for what, columns in found.items() if columns}


def warn_of(found: dict[str, list[int]], names: list[str] | None) -> None:
    """Warns of degenerate columns by name.

    Arguments:
        found: The result of :func:`degenerate_columns`.
        names: The names of the columns, if they have any.

    Warns:
        DegenerateColumnsWarning: If there are such columns.
    """
    if not found:
        return
    parts = []
    for what, columns in found.items():
        called = [str(column if names is None else names[column]) for column in columns]
        shown = ", ".join(called[:5]) + (f" and {len(called) - 5} more" if len(called) > 5 else "")
        noun = "column" if len(called) == 1 else "columns"
        parts.append(f"{noun} {shown}: {what}")
    warnings.warn(
        "A density has no bound on some columns, so log p(x) says more about how far training "
        f"went than about the model ({'; '.join(parts)}). Leave such columns out, or "
        "use a likelihood of counts or categories for them.",
        DegenerateColumnsWarning,
        stacklevel=4,
    )
