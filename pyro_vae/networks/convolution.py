"""A convolutional encoder of images."""

from typing import Any

from torch import Tensor, nn

from .network import Network, checked_sizes

__all__ = ["Convolution"]


class Convolution(Network):
    """Creates a convolutional encoder of images: each layer halves height and width.

    Images have shape (rows, height, width) or (rows, channels, height, width).

    Arguments:
        channels: The numbers of channels of the layers, each a 3 x 3 convolution of stride 2.
        activation: The class of the activation, constructed without arguments.

    Raises:
        ValueError: If a number of channels is not a positive integer.

    Example:
        >>> network = Convolution(16, 32)
        >>> network(torch.randn(5, 1, 28, 28)).shape
        torch.Size([5, 1568])
    """

    def __init__(self, *channels: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.channels = checked_sizes("channels", channels, at_least=1)
        self.activation = activation
        layers: list[nn.Module] = []
        for outputs in self.channels:
            sizes: Any = {"kernel_size": 3, "stride": 2, "padding": 1}
            layers.append(nn.LazyConv2d(outputs, **sizes))
            layers.append(activation())
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the constructor, positional and by name."""
        return self.channels, {"activation": self.activation}

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (rows, ..., height, width) to features (rows, units).

        Arguments:
            x: The images.

        Raises:
            ValueError: If x has fewer than 3 dims, or square images whose channels are last.
        """
        if x.ndim < 3:
            raise ValueError(
                f"Expected images of shape (rows, ..., height, width); got {tuple(x.shape)}."
            )
        if x.ndim == 4 and x.shape[3] <= 4 < x.shape[1] == x.shape[2]:
            raise ValueError(
                f"Expected images of shape (rows, channels, height, width); got {tuple(x.shape)}, "
                "with the channels last: move them with torch.movedim(x, -1, 1)."
            )
        features: Tensor = self.layers(x.reshape(len(x), -1, *x.shape[-2:]))
        return features
