"""Functions of a seed that build a program, and lists of seeds."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import nn

from ..data.checks import checked_count, short
from ..elbos.log_densities import programs_of
from ..engine.running import seeded

__all__ = ["Build", "built", "checked_build", "checked_seeds"]

Build: TypeAlias = Callable[[int], nn.Module]


def built(build: Build, seed: int) -> nn.Module:
    """Builds a program, with torch's generators seeded too.

    Arguments:
        build: A function of a seed that returns a program.
        seed: The seed.
    """
    with seeded(seed):
        return build(seed)


def checked_build(build: Build, seed: int) -> nn.Module:
    """Checks that a function returns new programs with the same weights, and returns one.

    Arguments:
        build: The function of a seed.
        seed: A seed to try it with.

    Raises:
        ValueError: If it is no such function.
    """
    if not callable(build) or isinstance(build, nn.Module):
        raise ValueError(f"Expected a function of a seed as build; got {short(build)}.")
    program, again = (built(build, seed) for _ in range(2))
    programs_of(program)
    if program is again:
        raise ValueError(
            "The function build returned the same program twice. Make a new program in it."
        )
    one, other = program.state_dict(), again.state_dict()
    if one.keys() != other.keys() or not all(torch.equal(one[k], other[k]) for k in one):
        raise ValueError(
            "The function build returned other weights for the same seed. Use the seed, or "
            "torch's generator, for all random numbers in it."
        )
    return program


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """Checks a list of different seeds, and returns it.

    Arguments:
        seeds: The seeds.

    Raises:
        ValueError: If they are not integers of at least 0, or one is there twice, or none is.

    Example:
        >>> checked_seeds(range(3))
        [0, 1, 2]
    """
    if not isinstance(seeds, Iterable):
        raise ValueError(f"Expected seeds to be a list of integers; got {seeds!r}.")
    checked = [checked_count("each seed", s, least=0) for s in seeds]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"Expected one seed or more, each of them once; got {checked}.")
    return checked
