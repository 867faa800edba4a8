"""The variational mixture of posteriors prior."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..data.checks import checked_number_of, checked_shape, size_of
from ..data.read import read
from ..distributions import Arguments, Encode, Prior
from .mixture import mixture_of

__all__ = ["VampPrior"]


class VampPrior(Prior):
    r"""Creates the prior that is the mixture of the posteriors of K learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q(z \mid u_k)

    A program connects it to its encoder. The prior owns the pseudo-inputs :math:`u_k` alone.

    References:
        VAE with a VampPrior (Tomczak & Welling, 2018), arXiv 1705.07120.

    Arguments:
        num_components: The number of pseudo-inputs :math:`K`.
        event_shape: The shape of z, an int or a tuple.
        data: Rows of x from which the pseudo-inputs are drawn without replacement at the start;
            by default they start uniform in (0, 1).

    Raises:
        ValueError: If a size is not a positive integer, or there are fewer rows than K.

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
        self.event_shape = torch.Size(checked_shape(event_shape))
        self.data = None if data is None else self._drawn(read(data).field("x"))

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, but for the data that it started from."""
        return (self.num_components, size_of(self.event_shape)), {}

    def _drawn(self, rows: Tensor) -> Tensor:
        if len(rows) < self.num_components:
            raise ValueError(
                f"Expected at least {self.num_components} rows of x to start from; got "
                f"{len(rows)}."
            )
        return rows[torch.randperm(len(rows))[: self.num_components]]

    def connect(self, x_shape: tuple[int, ...], encode: Encode) -> None:
        """Makes the pseudo-inputs, and keeps the encoder of the program.

        Arguments:
            x_shape: The shape of one row of x.
            encode: The map from rows to q(z | x).

        Raises:
            ValueError: If the data that it starts from have another shape.
        """
        shape = (self.num_components, *x_shape)
        if self.data is not None and self.data.shape != shape:
            raise ValueError(
                f"Expected rows of event shape {tuple(x_shape)} for the VampPrior to start from; "
                f"got {tuple(self.data.shape[1:])}."
            )
        start = torch.rand(shape) if self.data is None else self.data.to(torch.get_default_dtype())
        self.pseudo_inputs = nn.Parameter(start.clone())
        self._encode = encode

    @property
    def support(self) -> None:
        """`None`: z lies where the posterior's draws lie."""
        return None

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns p(z), of batch shape () and event shape (*event)."""
        inputs = self.pseudo_inputs
        return mixture_of(inputs.new_zeros(self.num_components), self._encode(inputs))
