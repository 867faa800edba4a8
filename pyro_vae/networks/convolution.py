"""Convolutions: an encoder and a decoder of images."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .mlp import checked_sizes

__all__ = ["Convolution", "Deconvolution"]


class Convolution(nn.Module):
    """Creates a convolutional encoder of images: each layer halves height and width.

    Images have shape (rows, height, width) or (rows, channels, height, width).

    Arguments:
        channels: The numbers of channels of the layers, each a 3 x 3 convolution of stride 2.
        activation: The class of the activation, built without arguments.

    Raises:
        ValueError: Where a number of channels is not a positive integer.

    Example:
        >>> network = Convolution(16, 32)
        >>> network(torch.randn(5, 1, 28, 28)).shape
        torch.Size([5, 1568])
    """

    def __init__(self, *channels: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.channels = checked_sizes("channels", channels, at_least=1)
        self.activation = activation
        layers: list[nn.Module] = []
        for outputs in self.channels:
            sizes: Any = {"kernel_size": 3, "stride": 2, "padding": 1}
            layers.append(nn.LazyConv2d(outputs, **sizes))
            layers.append(activation())
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (rows, ..., height, width) to features (rows, units)."""
        return self.layers(_with_channels(x))


class Deconvolution(nn.Module):
    """Creates a convolutional decoder to images: each layer doubles height and width.

    Its features have shape (rows, channels, height, width); a family reads its parameters off
    them pixel by pixel. The size of the image is told by the model that it is built into.

    Arguments:
        channels: The numbers of channels, from the smallest image to the largest.
        activation: The class of the activation, built without arguments.

    Raises:
        ValueError: Where a number of channels is not a positive integer, or x is not an image.

    Example:
        >>> network = Deconvolution(32, 16)
        >>> network.set_event_shape((1, 28, 28))
        >>> network(torch.randn(5, 8)).shape
        torch.Size([5, 16, 28, 28])
    """

    def __init__(self, *channels: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.channels = checked_sizes("channels", channels, at_least=1)
        self.activation = activation
        self.event_shape: tuple[int, ...] | None = None

    def set_event_shape(self, event_shape: Sequence[int]) -> None:
        """Builds the layers for images of a size.

        Arguments:
            event_shape: The shape of x, (..., height, width).
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
        """Maps latents (rows, *event) to features (rows, channels, height, width)."""
        if self.event_shape is None:
            raise ValueError("Expected set_event_shape to be called first; got no image size.")
        height, width = self.event_shape[-2:]
        image = self.project(z.flatten(1)).unflatten(-1, (self.channels[0], *self.start))
        return self.layers(image)[..., :height, :width]


def _with_channels(x: Tensor) -> Tensor:
    if x.ndim < 3:
        raise ValueError(
            f"Expected images of shape (rows, ..., height, width); got {tuple(x.shape)}."
        )
    return x.reshape(len(x), -1, *x.shape[-2:])
