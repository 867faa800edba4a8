"""The variational mixture of posteriors prior."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..data.checks import checked_number_of, checked_shape
from ..data.read import read
from .mixture import mixture_of

__all__ = ["VampPrior"]


class VampPrior(nn.Module):
    r"""Creates the prior that is the mixture of the posteriors of K learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q(z \mid u_k)

    It is handed the encoder when it is called, and owns the pseudo-inputs :math:`u_k` alone.

    References:
        VAE with a VampPrior (Tomczak & Welling, 2018), arXiv 1705.07120.

    Arguments:
        num_components: The number of pseudo-inputs :math:`K`.
        event_shape: The shape of z, an int or a tuple.
        data: Rows of x that the pseudo-inputs start from, drawn without replacement; by default
            they start uniform in (0, 1).

    Raises:
        ValueError: Where a size is not a positive integer, or there are fewer rows than K.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE((4,), VampPrior(5, 2), pv.likelihoods.Bernoulli())
        >>> vae.prior.pseudo_inputs.shape
        torch.Size([5, 4])
    """

    def __init__(
        self, num_components: int, event_shape: int | tuple[int, ...], data: Any = None
    ) -> None:
        super().__init__()
        self.num_components = checked_number_of("components", num_components)
        self.event_shape = checked_shape(event_shape)
        self.data = None if data is None else self._drawn(read(data).field("x"))

    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, by name, but for the data that it started from."""
        return {"num_components": self.num_components, "event_shape": self.event_shape}

    def _drawn(self, rows: Tensor) -> Tensor:
        if len(rows) < self.num_components:
            raise ValueError(
                f"Expected at least {self.num_components} rows of x to start from; got "
                f"{len(rows)}."
            )
        return rows[torch.randperm(len(rows))[: self.num_components]]

    def set_event_shape(self, event_shape: tuple[int, ...]) -> None:
        """Makes the pseudo-inputs.

        Arguments:
            event_shape: The shape of x.
        """
        shape = (self.num_components, *event_shape)
        if self.data is not None and self.data.shape != shape:
            raise ValueError(
                f"Expected rows of event shape {tuple(event_shape)}; got "
                f"{tuple(self.data.shape[1:])}."
            )
        start = torch.rand(shape) if self.data is None else self.data.to(torch.get_default_dtype())
        self.pseudo_inputs = nn.Parameter(start.clone())

    def extra_repr(self) -> str:
        """The arguments, as they were written."""
        return f"{self.num_components}, {self.event_shape}"

    def forward(self, encode: Callable[[Tensor], Distribution]) -> Distribution:
        """Returns p(z), of batch shape () and event shape (*event).

        Arguments:
            encode: The map from rows of x to q(z | x).
        """
        inputs = self.pseudo_inputs
        return mixture_of(inputs.new_zeros(self.num_components), encode(inputs))
