"""Labels of latent units."""

import numpy as np

__all__ = ["unit_labels"]


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
