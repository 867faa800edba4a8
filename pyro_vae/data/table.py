"""Tables that the package returns: data frames that LaTeX can read."""

from typing import Any

import pandas as pd

__all__ = ["Table"]


class Table(pd.DataFrame):
    r"""A data frame whose names of columns and rows are escaped in LaTeX.

    Example:
        >>> print(Table({"log_evidence": [-1.5]}).to_latex(index=False).splitlines()[2])
        log\_evidence \\
    """

    @property
    def _constructor(self) -> Any:
        """What pandas makes of a part of it."""
        return Table

    def to_latex(self, *args: Any, **options: Any) -> Any:
        """Writes it in LaTeX as `pandas.DataFrame.to_latex` does, with `escape=True` by default.

        Arguments:
            args: Its positional arguments.
            options: Its keyword arguments.
        """
        return super().to_latex(*args, **{"escape": True} | options)
