"""Counts the memory of tensors on a CPU, which torch does not do itself."""

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the new tensors that are not yet freed.

    `now` is the number of these bytes, `most` its largest value so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now, self.most = 0, 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = {storage._cdata for storage in _storages((args, kwargs or {}))}
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata).atexit = False
        return results

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """The storages of the dense tensors in nested containers."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [t.untyped_storage() for t in tensors if t.layout == torch.strided]
