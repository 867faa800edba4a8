"""A convolutional decoder to images."""

import math
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .network import Network, checked_sizes

__all__ = ["Deconvolution"]


class Deconvolution(Network):
    """Creates a convolutional decoder to images: each layer doubles height and width.

    It returns features of shape (rows, channels, height, width), from which a family predicts its
    parameters pixel by pixel. The VAE sets the size of the image.

    Arguments:
        channels: The numbers of channels of the layers, from the smallest image to the largest.
        activation: The class of the activation, constructed without arguments.

    Raises:
        ValueError: If a number of channels is not a positive integer.

    Example:
        >>> network = Deconvolution(32, 16)
        >>> network.set_event_shape((1, 28, 28))
        >>> network(torch.randn(5, 8)).shape
        torch.Size([5, 16, 28, 28])
    """

    def __init__(self, *channels: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.channels = checked_sizes("channels", channels, at_least=1)
        self.activation = activation
        self.event_shape: tuple[int, ...] | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the constructor, positional and by name."""
        return self.channels, {"activation": self.activation}

    def set_event_shape(self, event_shape: tuple[int, ...]) -> None:
        """Creates the layers for images of one size.

        Arguments:
            event_shape: The shape of x, (..., height, width).

        Raises:
            ValueError: If `event_shape` has fewer than 2 dims.
        """
        if len(event_shape) < 2:
            raise ValueError(
                f"Expected an event shape (..., height, width); got {tuple(event_shape)}."
            )
        self.event_shape = tuple(event_shape)
        self.start = [math.ceil(size / 2 ** len(self.channels)) for size in event_shape[-2:]]
        self.project = nn.LazyLinear(self.channels[0] * math.prod(self.start))
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((self.channels[0], *self.channels)):
            upsample = nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
            layers += [self.activation(), upsample]
        self.layers = nn.Sequential(*layers, self.activation())

    def forward(self, z: Tensor) -> Tensor:
        """Maps latents (rows, *event) to features (rows, channels, height, width).

        Arguments:
            z: The latents.

        Raises:
            ValueError: If `set_event_shape` was not called before.
        """
        if self.event_shape is None:
            raise ValueError("Call set_event_shape first, with the size of the image.")
        height, width = self.event_shape[-2:]
        image = self.project(z.flatten(1)).unflatten(-1, (self.channels[0], *self.start))
        return self.layers(image)[..., :height, :width]
