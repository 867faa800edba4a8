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
    r"""Creates a prior that is the mixture of the posteriors of K learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q(z \mid u_k)

    A program connects the prior to its encoder. The pseudo-inputs :math:`u_k` are the only
    parameters that the prior adds.

    References:
        VAE with a VampPrior (Tomczak & Welling, 2018), arXiv 1705.07120.

    Arguments:
        num_components: The number of pseudo-inputs :math:`K`.
        event_shape: The shape of z, an int or a tuple.
        data: Rows of x, shape (rows, \*event). K of them, drawn without replacement, are the
            initial pseudo-inputs; by default these are uniform on (0, 1).

    Raises:
        ValueError: If a size is not a positive integer, or `data` has fewer than K rows.

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
        self.data: Tensor | None = None
        if data is not None:
            rows = read(data).field("x")
            if len(rows) < num_components:
                raise ValueError(
                    f"Expected the data of the VampPrior to have at least {num_components} rows; "
                    f"got {len(rows)}."
                )
            self.data = rows[torch.randperm(len(rows))[:num_components]]

    def arguments(self) -> Arguments:
        """Returns the arguments of the constructor, except `data`."""
        return (self.num_components, size_of(self.event_shape)), {}

    def connect(self, x_shape: tuple[int, ...], encode: Encode) -> None:
        """Creates the pseudo-inputs, and stores the encoder of the program.

        Arguments:
            x_shape: The shape of one row of x.
            encode: The map from rows to q(z | x).

        Raises:
            ValueError: If the rows of `data` have another shape than `x_shape`.
        """
        shape = (self.num_components, *x_shape)
        if self.data is not None and self.data.shape != shape:
            raise ValueError(
                f"Expected the data of the VampPrior to have event shape {tuple(x_shape)}; "
                f"got {tuple(self.data.shape[1:])}."
            )
        start = torch.rand(shape) if self.data is None else self.data.to(torch.get_default_dtype())
        self.pseudo_inputs = nn.Parameter(start.clone())
        self._encode = encode

    @property
    def support(self) -> None:
        """`None`, because z has the support of the posterior."""
        return None

    def forward(self, features: Tensor | None = None) -> Distribution:
        """Returns p(z), of batch shape () and event shape (*event)."""
        inputs = self.pseudo_inputs
        return mixture_of(inputs.new_zeros(self.num_components), self._encode(inputs))
