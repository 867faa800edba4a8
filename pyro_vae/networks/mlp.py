"""A multi-layer perceptron."""

from torch import Tensor, nn

from ..data.checks import is_size

__all__ = ["MLP", "checked_sizes"]


class MLP(nn.Module):
    r"""Creates a multi-layer perceptron whose last hidden layer is its output.

    .. math:: h_0 = \mathrm{flatten}(x), \qquad h_l = \sigma(W_l h_{l-1} + b_l)

    The layers are made at the first batch, in a VAE when it is built, from its seed. A family
    puts its own linear layer behind.

    Arguments:
        hidden: The numbers of units of the layers; without any the network only flattens.
        activation: The class of the activation, built without arguments.

    Raises:
        ValueError: Where a number of units is not a positive integer.

    Example:
        >>> network = MLP(32, 16)
        >>> network(torch.randn(5, 8, 8)).shape
        torch.Size([5, 16])
    """

    def __init__(self, *hidden: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.hidden = checked_sizes("hidden units", hidden)
        self.activation = activation
        layers: list[nn.Module] = [nn.Flatten()]
        for outputs in self.hidden:
            layers += [nn.LazyLinear(outputs), activation()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (rows, *event) to (rows, units)."""
        return self.layers(x)


def checked_sizes(what: str, sizes: tuple[int, ...], *, at_least: int = 0) -> tuple[int, ...]:
    """Returns numbers of units or channels, checked.

    Arguments:
        what: What is counted, in the plural.
        sizes: The numbers.
        at_least: How many there must be.

    Raises:
        ValueError: If there are too few, or one is not a positive integer.
    """
    if len(sizes) < at_least or not all(map(is_size, sizes)):
        raise ValueError(f"Expected positive numbers of {what}; got {sizes}.")
    return sizes
