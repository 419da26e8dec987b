"""Counts the bytes that tensors hold, as they come and go: of real tensors, and of fake ones, which have shapes alone.

Under torch's FakeTensorMode a training update runs with no data and no memory, and the count is what the same code
would hold with real tensors. That is how `twostep plan` knows: it runs the update.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on: `live` is what the tensors made since then hold, `peak` the most they ever held at once, and
    `peaks` the same for each named phase. A storage counts once, however many views it has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.peaks: dict[str, int] = {}
        self._phase_peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            # Neither a view nor what was written in place is new.
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self._phase_peak = max(self._phase_peak, self.live)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The peak of what runs inside, all that was live before it included, as peaks[name]."""
        self._phase_peak = self.live
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), self._phase_peak)
