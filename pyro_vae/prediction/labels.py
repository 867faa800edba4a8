"""Labels of latent units and of the elements of a data site."""

import numpy as np

from ..data.rows import Rows

__all__ = ["site_coordinates", "unit_labels"]


def unit_labels(site: str, shape: tuple[int, ...]) -> list[str]:
    """Returns a label for each element of a latent site.

    Arguments:
        site: The name of the site.
        shape: The shape of its value in one row.

    Example:
        >>> unit_labels("z", (2,)), unit_labels("w", ())
        (['z[0]', 'z[1]'], ['w'])
    """
    if not shape:
        return [site]
    return [f"{site}[{', '.join(map(str, index))}]" for index in np.ndindex(shape)]


def site_coordinates(site: str, shape: tuple[int, ...], rows: Rows) -> dict[str, np.ndarray]:
    """Returns the dims of a data site in one row, `{site}_dim_{i}`, and the labels along each.

    The labels are those of the field of the data that has the same name as the site and the same
    shape; data of one tensor or frame are the field of every site. Otherwise they are numbers.

    Arguments:
        site: The name of the site.
        shape: The shape of its value in one row.
        rows: The data.
    """
    field = site if isinstance(rows.x, dict) else "x"
    labels = rows.columns.get(field, ())
    if tuple(map(len, labels)) != shape:
        labels = tuple(map(np.arange, shape))
    return {f"{site}_dim_{i}": label for i, label in enumerate(labels)}
