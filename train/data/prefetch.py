"""Batches made ahead in a thread, with the state of what was taken.

torchdata's StatefulDataLoader keeps worker processes, whose states it must collect and replay. Here the slow parts
(decoding and scaling of images, reading of shards, the text encoder) release Python's lock, so a thread is enough, and
its state is exact at no cost: each batch travels with the state of its source right after it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item", covariant=True)


class Stateful(Protocol[Item]):
    """An endless iterator whose position is part of a checkpoint: what all sources of batches are."""

    def __iter__(self) -> Iterator[Item]: ...

    def __next__(self) -> Item: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetch(Generic[Item]):
    """`source`, up to `ahead` batches in advance. The source belongs to it from now on; `close` ends the thread.

    `state_dict` is the state after the last batch that was taken: batches made ahead and not taken are made again.
    An error of the source is raised when its batch is asked for, and again when it is asked for once more.
    """

    def __init__(self, source: Stateful[Item], ahead: int = 2) -> None:
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise ValueError(f"Prefetch: ahead is {ahead!r}, expected an integer of at least 1")
        self.source, self.ahead = source, ahead
        self._state = source.state_dict()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._failed is not None:
            raise self._failed
        if self._thread is None:
            self._start()
        item, state, error = self._ready.get()
        if error is not None:
            self._failed = error
            raise error
        self._state = state
        return item

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.source.load_state_dict(state)
        self._state, self._failed = self.source.state_dict(), None

    def close(self) -> None:
        """Ends the thread; what was made ahead is forgotten, and the next batch is the one after the last taken."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():  # it may wait for a free place
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()
        self._thread = None
        self.source.load_state_dict(self._state)

    def _start(self) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(self.ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_fill, args=(self.source, self._ready, self._stop), daemon=True)
        self._thread.start()


def _fill(source: Stateful[Any], ready: queue.Queue[Any], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            item = next(source)
            made = (item, source.state_dict(), None)
        except BaseException as error:  # it belongs to whoever waits for the batch
            ready.put((None, None, error))
            return
        ready.put(made)
