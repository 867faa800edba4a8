"""A multi-layer perceptron."""

from typing import Any

from torch import Tensor, nn

from .network import Network, checked_sizes

__all__ = ["MLP"]


class MLP(Network):
    r"""Creates a multi-layer perceptron whose last hidden layer is its output.

    .. math:: h_0 = \mathrm{flatten}(x), \qquad h_l = \sigma(W_l h_{l-1} + b_l)

    The first batch determines the sizes of the layers. A VAE runs one when it is created, so that
    its seed determines the weights. The likelihood or posterior adds the linear layers from the
    last hidden layer to its parameters.

    Arguments:
        hidden: The number of units of each layer. If there are none, the network only flattens x.
        activation: The class of the activation, constructed without arguments.

    Raises:
        ValueError: If a number of units is not a positive integer.

    Example:
        >>> network = MLP(32, 16)
        >>> network(torch.randn(5, 8, 8)).shape
        torch.Size([5, 16])
    """

    def __init__(self, *hidden: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.hidden = checked_sizes("hidden units", hidden)
        self.activation = activation
        layers: list[nn.Module] = [nn.Flatten()]
        for outputs in self.hidden:
            layers += [nn.LazyLinear(outputs), activation()]
        self.layers = nn.Sequential(*layers)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the constructor, positional and by name."""
        return self.hidden, {"activation": self.activation}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (rows, *event) to (rows, units)."""
        features: Tensor = self.layers(x)
        return features
