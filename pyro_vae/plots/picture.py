"""The figure that the pictures are drawn into. This file imports matplotlib, so others do so late.

matplotlib itself shows a figure in a notebook only after pyplot was imported there.
"""

import io

from matplotlib.figure import Figure

__all__ = ["Picture"]


class Picture(Figure):
    """A figure that a notebook shows if it is the value of a cell, without a magic command.

    Example:
        >>> Picture()._repr_png_()[1:4]
        b'PNG'
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
