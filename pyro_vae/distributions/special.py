"""Functions of log-densities that lose no digits, at any size of their arguments."""

import math

import torch
from torch import Tensor

__all__ = ["log_binomial", "log_rising", "once", "rounded", "stirling_rest"]

SHIFT = 4.0
# The remainder of Stirling's formula times y >= 4, as a polynomial in 1 / y^2 (a Chebyshev fit;
# the asymptotic series is 1/12, -1/360, 1/1260, ...). The remainder has an error below 2e-11.
REMAINDER = (
    0.08333333325536134,
    -0.0027777376965392095,
    0.00079037488426436746,
    -0.00050669833447538136,
)


def once(expanded: Tensor) -> Tensor:
    """Returns a tensor without the copies of elements that `expand` added.

    Arguments:
        expanded: A tensor of any shape.

    Example:
        >>> once(torch.ones(3).expand(7, 2, 3)).shape
        torch.Size([1, 1, 3])
    """
    for dim, stride in enumerate(expanded.stride()):
        if stride == 0 and expanded.shape[dim] > 1:
            expanded = expanded.narrow(dim, 0, 1)
    return expanded


def rounded(log_prob: Tensor, value: Tensor, parameter: Tensor) -> Tensor:
    """Returns a log-density in the dtype and of the shape that torch would give it.

    Arguments:
        log_prob: The log-density in float64, of a shape that broadcasts to the result's.
        value: The values, of any dtype.
        parameter: A parameter, expanded to the batch shape.
    """
    shape = torch.broadcast_shapes(log_prob.shape, value.shape, parameter.shape)
    return log_prob.to(torch.promote_types(value.dtype, parameter.dtype)).expand(shape)


def log_binomial(n: Tensor, k: Tensor) -> Tensor:
    r"""Returns the logarithm of the binomial coefficient, :math:`\log\binom{n}{k}`.

    Arguments:
        n: The total, in float64.
        k: The count, 0 to n, in float64.

    Example:
        >>> five, two = torch.tensor([5.0, 2.0], dtype=torch.float64)
        >>> log_binomial(five, two).exp().round()
        tensor(10., dtype=torch.float64)
    """
    return (n + 1.0).lgamma() - (k + 1.0).lgamma() - (n - k + 1.0).lgamma()


def log_rising(start: Tensor, steps: Tensor) -> Tensor:
    r"""Returns :math:`\log\Gamma(a + x) - \log\Gamma(a)` without cancellation at large a.

    Both are moved up by 4, where Stirling's formula is exact to 2e-11, and its large terms cancel
    by hand. The backward pass needs no digamma, which takes most of the time of lgamma.

    .. math:: (a + 7/2) \log\left(1 + \frac{x}{a + 4}\right) + x \log(a + x + 4) - x
        + c(a + x) - c(a)

    c is the remainder of Stirling's formula and the logarithm of the product that moves it.

    Arguments:
        start: The positive number a, in float64.
        steps: The number x, 0 or more, in float64.

    Example:
        >>> a, x = torch.tensor([1e13, 3.0], dtype=torch.float64)
        >>> bool((log_rising(a, x) - 3.0 * a.log()).abs() < 1e-9)
        True
    """
    total = start + steps
    moved = start + SHIFT
    powers = (start + (SHIFT - 0.5)) * torch.log1p(steps / moved)
    large = powers + steps * ((total + SHIFT).log() - 1.0)
    return large + (_correction(total) - _correction(start))


def stirling_rest(a: Tensor) -> Tensor:
    r"""Returns :math:`\log\Gamma(a) - (a \log a - a)`, which stays small at large a.

    It is moved up by 4 as in :func:`log_rising`.

    Arguments:
        a: Positive numbers, in float64.

    Example:
        >>> stirling_rest(torch.tensor([1.0, 1e13], dtype=torch.float64))
        tensor([  1.0000, -14.0479], dtype=torch.float64)
    """
    moved = a + SHIFT
    powers = a * torch.log1p(SHIFT / a) + (SHIFT - 0.5) * moved.log()
    return powers + _correction(a) + (0.5 * math.log(2.0 * math.pi) - SHIFT)


def _correction(a: Tensor) -> Tensor:
    """Stirling's remainder at y = a + 4, less log(a (a + 1) (a + 2) (a + 3))."""
    inverse, pair = (a + SHIFT).reciprocal(), a * (a + 3.0)
    square = inverse**2
    first, second, third, fourth = REMAINDER
    series = first + square * (second + square * (third + square * fourth))
    return inverse * series - (pair * (pair + 2.0)).log()
