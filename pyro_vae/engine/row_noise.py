"""Random numbers of each row, which do not depend on the rows beside it or on chunks."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..data.rows import PLATE, Rows
from .running import Site

__all__ = [
    "Noise",
    "ReadFields",
    "RowNoise",
    "row_digests",
    "row_keys",
    "standard_normal",
]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
HASHED_AT_ONCE = 2**20  # elements of x
DIGESTED_AT_ONCE = 2**14  # rows
TRIES = 6  # of the gamma sampler: one in 10^8 draws is not accepted
ROOT_TWO = math.sqrt(2.0)


def _mixed(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014), element by element."""
    state = (state ^ (state >> np.uint64(30))) * FACTORS[0]
    state = (state ^ (state >> np.uint64(27))) * FACTORS[1]
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


class ReadFields(dict[str, Tensor]):
    """A row that records the names of the fields that a program reads.

    Arguments:
        row: The row.
    """

    def __init__(self, row: Mapping[str, Tensor]) -> None:
        super().__init__(row)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field if there is one.

        Arguments:
            name: The name of the field.
            default: What to return if there is none.
        """
        return self[name] if name in self else default

    def items(self) -> Any:
        """Returns all names and fields."""
        self.names |= self.keys()
        return super().items()

    def values(self) -> Any:
        """Returns all fields."""
        self.names |= self.keys()
        return super().values()


def row_digests(rows: Rows) -> np.ndarray:
    """Hashes each row by its values, shape (rows,), as unsigned 64-bit integers.

    Rows that are equal in float32 have equal digests, whatever their weights are.

    Arguments:
        rows: The rows.

    Example:
        >>> from pyro_vae.data.read import read
        >>> one, other = (
        ...     row_digests(read([[0.1], [0.1]])),
        ...     row_digests(read(torch.tensor([[0.1]]))),
        ... )
        >>> bool(one[0] == one[1] == other[0])
        True
    """
    names = [name for name in rows.fields if name != "weight"]
    pieces = []
    for piece in rows.chunks(DIGESTED_AT_ONCE):
        fields = {name: piece.field(name).float() for name in names}
        pieces.append(_hashed(Rows(fields, piece.labels, piece.columns), names))
    return np.concatenate(pieces)


def row_keys(rows: Rows, names: Collection[str] = ()) -> np.ndarray:
    """Hashes each row by its values, shape (rows,), as unsigned 64-bit integers.

    Rows of equal values get different keys by their order, so that their draws are independent.

    Arguments:
        rows: The rows.
        names: The names of the fields to hash; by default all.

    Example:
        >>> from pyro_vae.data.read import read
        >>> one, other = row_keys(read([[1.0, 2.0], [3.0, 4.0]])), row_keys(read([[3.0, 4.0]]))
        >>> bool(one[1] == other[0])
        True
    """
    keys = _hashed(rows, names)
    order = np.argsort(keys, kind="stable")
    is_first = np.append(True, keys[order][1:] != keys[order][:-1])
    places = np.arange(len(keys))
    occurrence = np.empty(len(keys), dtype=np.uint64)
    occurrence[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return _mixed(keys + GOLDEN * occurrence)


def _hashed(rows: Rows, names: Collection[str]) -> np.ndarray:
    """Hashes the values of some fields of each row; no names are all fields."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    for name, tensor in sorted(rows.fields.items()):
        if names and name not in names:
            continue
        flat = tensor.reshape(len(rows), -1)
        at_once = max(1, HASHED_AT_ONCE // max(flat.shape[1], 1))
        columns = _mixed(GOLDEN * np.arange(1, flat.shape[1] + 1, dtype=np.uint64))
        for start in range(0, len(rows), at_once):
            piece = slice(start, start + at_once)
            values = flat[piece].cpu().double().add(0.0).numpy()  # -0.0 becomes 0.0
            hashed = _mixed(np.ascontiguousarray(values).view(np.uint64) ^ columns).sum(axis=1)
            keys[piece] = _mixed(keys[piece] + GOLDEN + hashed.astype(np.uint64))
    return keys


def standard_normal(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns uniform 32-bit integers into standard normal numbers of the same shape.

    Arguments:
        integers: The integers.
        dtype: The type of the result.
    """
    below_one = 1.0 - torch.finfo(dtype).eps / 2.0
    symmetric = ((integers.to(dtype) + 0.5) * 2.0**-31).clamp(-below_one, below_one)
    return torch.erfinv(symmetric) * ROOT_TWO


class Noise:
    r"""Uniform random numbers for the draws of each row, as 32-bit integers.

    .. math:: u_{snj} = b_{sj} + h_{nj} \mod 2^{32}

    The table :math:`b` is common to all rows. The shift :math:`h` of a row is a hash of its key
    and the seed. The draws of one row are independent, and so are the s-th draws of two rows.
    Each number costs one sum. A random shift modulo 1 is due to Cranley & Patterson (1976).

    Arguments:
        sizes: The number of random numbers of each draw, for each operation.
        num_draws: The number of draws of each row.
        seed: The seed.
        is_stratified: Whether each column of the table is a random order of even distances (a
            Latin hypercube) rather than independent numbers.
    """

    def __init__(
        self, sizes: Sequence[int], num_draws: int, seed: int, *, is_stratified: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sizes = list(sizes)
        shape = (num_draws, sum(self.sizes))
        if is_stratified:
            ranks = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(0)
            table = ranks * (2**32 // max(num_draws, 1)) - 2**31
        else:
            table = torch.randint(-(2**31), 2**31, shape, generator=generator)
        self.table = table.to(torch.int32)
        self._salt = _mixed(np.asarray([seed], dtype=np.int64).view(np.uint64) + GOLDEN)

    def shifts(self, keys: np.ndarray) -> Tensor:
        """Returns the shift of each row, shape (rows, sum of sizes), on the CPU.

        Arguments:
            keys: The keys of the rows, of :func:`row_keys`.
        """
        columns = GOLDEN * np.arange(1, sum(self.sizes) + 1, dtype=np.uint64)
        hashed = _mixed((keys ^ self._salt)[:, None] + columns) >> np.uint64(32)
        return torch.from_numpy(hashed.astype(np.uint32).view(np.int32))


class RowNoise(Messenger):  # type: ignore[misc]
    """Effect handler that draws the sites of the plate `"data"` from given random numbers.

    It replaces the random operations of torch that fill a tensor over draws and rows: normal,
    uniform, exponential, Bernoulli, categorical, gamma and Dirichlet numbers. Others (Poisson,
    von Mises) come from torch's generator. It must be the outermost handler of the program.

    Arguments:
        rows_dim: The dim of the plate `"data"`, negative.
        table: The common numbers of the draws, shape (draws, columns). By default the numbers
            come from torch's generator, and `sizes` records how many are needed.
        shifts: The shifts of the rows, shape (rows, columns).

    Attributes:
        sizes: The number of columns that each operation used.
    """

    def __init__(
        self, rows_dim: int, table: Tensor | None = None, shifts: Tensor | None = None
    ) -> None:
        super().__init__()
        self.rows_dim, self.table, self.shifts = rows_dim, table, shifts
        self.sizes: list[int] = []

    def _pyro_sample(self, msg: Site) -> None:
        batch = getattr(msg["fn"], "batch_shape", None)  # the index of a plate has none
        is_drawn = not (msg["done"] or msg["is_observed"] or msg["value"] is not None)
        if is_drawn and batch and any(f.name == PLATE for f in msg["cond_indep_stack"]):
            with _Replaced(self, batch):
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])

    def integers(self, shape: torch.Size, batch: torch.Size) -> Tensor | None:
        """Returns 32-bit integers over draws and rows, or `None` if the shape is another one.

        Arguments:
            shape: The shape, which begins with `batch`.
            batch: The batch shape of the site: draws first, rows at `rows_dim`.
        """
        rows = len(batch) + self.rows_dim
        if shape[: len(batch)] != batch or rows < 1:
            return None
        rest = [size for dim, size in enumerate(shape) if dim not in (0, rows)]
        start, size = sum(self.sizes), math.prod(rest)
        self.sizes.append(size)
        if self.table is None or self.shifts is None:
            return None
        table, shifts = (t[:, start : start + size] for t in (self.table, self.shifts))
        if (len(table), len(shifts), table.shape[1]) != (batch[0], batch[rows], size):
            return None
        both = table[:, None] + shifts[None]
        return both.reshape(batch[0], batch[rows], *rest).movedim(1, rows)


class _Replaced(TorchFunctionMode):
    """Replaces random operations of torch while one site is drawn."""

    def __init__(self, noise: RowNoise, batch: torch.Size) -> None:
        super().__init__()
        self.noise, self.batch = noise, batch

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        sampler = SAMPLERS.get(func)
        found = None if sampler is None else sampler(self, *args, **kwargs)
        return func(*args, **kwargs) if found is None else found

    def normal(self, like: Tensor) -> Tensor | None:
        """Standard normal numbers, by the inverse of their distribution function."""
        integers = self.noise.integers(like.shape, self.batch)
        if integers is None:
            return None
        return standard_normal(integers, like.dtype)

    def uniform(self, like: Tensor) -> Tensor | None:
        """Numbers between 0 and 1, both excluded, with a relative resolution near 0."""
        integers = self.noise.integers(like.shape, self.batch)
        if integers is None:
            return None
        below_one = 1.0 - torch.finfo(like.dtype).eps / 2.0
        positive = ((integers >> 1) & (2**31 - 1)).to(like.dtype) + 0.5  # the upper 31 bits
        return (positive * 2.0**-31).clamp_max(below_one)


def _normal_(mode: _Replaced, out: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor | None:
    found = mode.normal(out)
    return None if found is None else out.copy_(mean + std * found)


def _normal(mode: _Replaced, mean: Any, std: Any = 1.0, **options: Any) -> Tensor | None:
    like = torch.as_tensor(mean) + torch.as_tensor(std)
    found = mode.normal(like)
    return None if found is None else mean + std * found


def _uniform_(mode: _Replaced, out: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor | None:
    found = mode.uniform(out)
    return None if found is None else out.copy_(low + (high - low) * found)


def _exponential_(mode: _Replaced, out: Tensor, rate: float = 1.0) -> Tensor | None:
    found = mode.uniform(out)
    return None if found is None else out.copy_(-torch.log1p(-found) / rate)


def _rand(mode: _Replaced, *size: Any, **options: Any) -> Tensor | None:
    return mode.uniform(_empty(size, options))


def _randn(mode: _Replaced, *size: Any, **options: Any) -> Tensor | None:
    return mode.normal(_empty(size, options))


def _empty(size: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return torch.empty(shape, dtype=options.get("dtype"), device=options.get("device"))


def _bernoulli(mode: _Replaced, probs: Tensor, **options: Any) -> Tensor | None:
    found = mode.uniform(probs)
    return None if found is None else (found < probs).to(probs.dtype)


def _multinomial(
    mode: _Replaced, probs: Tensor, num_samples: int, *args: Any, **options: Any
) -> Tensor | None:
    """One category a row, by the inverse of the distribution function."""
    size = math.prod(mode.batch)
    if num_samples != 1 or probs.ndim != 2 or size == 0 or len(probs) % size:
        return None
    found = mode.uniform(probs[:, 0].reshape(*mode.batch, -1))
    if found is None:
        return None
    below = probs.cumsum(-1)
    total = below[:, -1:]
    return (below[:, :-1] <= found.reshape(-1, 1) * total).sum(-1, keepdim=True)


def _gamma(mode: _Replaced, shape: Tensor, **options: Any) -> Tensor | None:
    """The method of Marsaglia & Tsang (2000) with shape + 1, in a fixed number of tries."""
    boost = mode.uniform(shape)
    pairs = [(mode.normal(shape), mode.uniform(shape)) for _ in range(TRIES)]
    tries = [(n, u) for n, u in pairs if n is not None and u is not None]
    if boost is None or len(tries) < TRIES:
        return None
    d = shape + 2.0 / 3.0
    value = d
    for normals, uniforms in reversed(tries):
        root = 1.0 + normals / (9.0 * d).sqrt()
        cube = root.clamp_min(torch.finfo(shape.dtype).tiny) ** 3
        bound = 0.5 * normals.square() + d * (1.0 - cube + cube.log())
        value = torch.where((root > 0.0) & (uniforms.log() < bound), d * cube, value)
    drawn: Tensor = (value.log() + boost.log() / shape).exp()
    return drawn.clamp_min(torch.finfo(shape.dtype).tiny)


def _dirichlet(mode: _Replaced, shape: Tensor, **options: Any) -> Tensor | None:
    found = _gamma(mode, shape)
    return None if found is None else found / found.sum(-1, keepdim=True)


Sampler = Callable[..., Tensor | None]
SAMPLERS: dict[Any, Sampler] = {
    torch.Tensor.normal_: _normal_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.exponential_: _exponential_,
    torch.normal: _normal,
    torch.rand: _rand,
    torch.randn: _randn,
    torch.rand_like: lambda mode, like, **_: mode.uniform(like),
    torch.randn_like: lambda mode, like, **_: mode.normal(like),
    torch.bernoulli: _bernoulli,
    torch.multinomial: _multinomial,
    torch._standard_gamma: _gamma,
    torch._sample_dirichlet: _dirichlet,
}
