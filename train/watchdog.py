"""Ends a run that no longer moves, and says which rank the others wait for.

Every rank beats: it counts, and says what it is about to do. A thread on each rank looks at its own rank's last beat;
when that is older than the time-out, it reads the others' from the group's store. Ranks that wait in a collective have
said so and have counted further than the one that they wait for, which is thereby known. Where all have counted alike
(FSDP waits inside the networks), their threads decide: a rank whose thread gives no sign of life was stopped; and of
those that live, the one whose Python is not inside torch.distributed is not waiting for anybody. A thread, because a
collective that hangs does not return to Python; and the process ends there, since nothing can be saved in it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

HANGS = 70  # the exit status; EX_SOFTWARE of sysexits.h


class Watchdog:
    def __init__(self, rank: int, world_size: int, timeout: float, store: Any = None) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._store = store
        self._mine = (0, "starting", time.monotonic(), 1.0)
        self._looks = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """I live, and am about to do this; `patience` times the time-out is granted for it."""
        count = self._mine[0] + 1
        self._mine = (count, doing, time.monotonic(), patience)
        if self._store is not None and self.world_size > 1:
            self._store.set(f"beat/{self.rank}", json.dumps([count, doing]))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        store = self._store.clone() if self.world_size > 1 else None  # a client of its own: the main one may be busy
        pause = min(5.0, self.timeout / 10)
        woke = looked = time.monotonic()
        while not self._stop.wait(pause):
            if store is not None:
                self._show_life(store)
            count, doing, since, patience = self._mine
            now = time.monotonic()
            if now - looked > 3 * pause:  # this thread was not run either: the process was suspended, and goes on
                woke = now
            looked = now
            still = now - max(since, woke)
            if still <= self.timeout * patience:
                continue
            others = {} if store is None else _beats(store, self.world_size)
            others[self.rank] = (count, doing)
            alike = len(others) == self.world_size and len({counted for counted, _ in others.values()}) == 1
            stopped = [] if store is None or not alike else self._without_life(store, 3 * pause)
            places = {} if store is None else _places(store, self.world_size)
            print(self._verdict(others, still, stopped, places), file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            os._exit(HANGS)

    def _show_life(self, store: Any) -> None:
        self._looks += 1
        store.set(f"alive/{self.rank}", json.dumps([self._looks, *_place()]))

    def _without_life(self, store: Any, wait: float) -> list[int]:
        """The ranks whose watchdogs do not run: nobody who runs takes longer than a pause to look again."""
        before = _signs(store, self.world_size)
        for _ in range(3):  # others that wait as this one does are to see that it lives
            time.sleep(wait / 3)
            self._show_life(store)
        after = _signs(store, self.world_size)
        return [rank for rank in range(self.world_size) if rank != self.rank and before[rank] == after[rank]]

    def _verdict(
        self,
        beats: dict[int, tuple[int, str]],
        still: float,
        stopped: Sequence[int] = (),
        places: Mapping[int, tuple[bool, str]] = MappingProxyType({}),
    ) -> str:
        head = f"twostep train: rank {self.rank} has not moved for {still:.0f} s ({beats[self.rank][1]})"
        advice = (
            "the last checkpoint is whole: the same command goes on from it; parallel.timeout sets how long to wait"
        )
        if self.world_size == 1:
            return f"{head}; its stack follows; {advice}"
        silent = [rank for rank in range(self.world_size) if rank not in beats]
        if silent:
            return f"{head}: {_named(silent)} never said anything; {advice}"
        least = min(count for count, _ in beats.values())
        behind = [rank for rank, (count, _) in sorted(beats.items()) if count == least]
        if stopped:
            return (
                f"{head}: {_named(stopped)} gives no sign of life, and the others wait for it: its process was "
                f"stopped, or its machine is lost; {advice}"
            )
        # Said here, since the one that hangs may be ended before it prints its stack.
        stand = "".join(f"\n  rank {rank} is at {place}" for rank, (_, place) in sorted(places.items()))
        if len(behind) == self.world_size:
            busy = [rank for rank, (waits, _) in sorted(places.items()) if not waits]
            if 0 < len(busy) < len(places):
                return f"{head}: {_named(busy)} hangs, and the others wait for it; {advice}{stand}"
            return f"{head}; all ranks stand at the same place, and each prints its stack; {advice}{stand}"
        return f"{head}: {_named(behind)} hangs ({beats[behind[0]][1]}), and the others wait for it; {advice}{stand}"


def _beats(store: Any, world_size: int) -> dict[int, tuple[int, str]]:
    """What each rank said last; without those that never did."""
    found = {}
    for rank in range(world_size):
        key = f"beat/{rank}"
        if store.check([key]):
            count, doing = json.loads(store.get(key))
            found[rank] = (count, doing)
    return found


def _place() -> tuple[bool, str]:
    """Whether this process waits for other ranks, some thread of its being in torch.distributed; where its main thread
    is."""
    own = threading.get_ident()
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != own}
    waits = any(f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename for frame in frames.values())
    main = frames.get(threading.main_thread().ident or 0)
    if main is None:
        return waits, "its end"
    return waits, f"{main.f_code.co_filename}:{main.f_lineno} in {main.f_code.co_name}"


def _places(store: Any, world_size: int) -> dict[int, tuple[bool, str]]:
    """Of the ranks that have shown life."""
    signs = {rank: sign for rank, sign in enumerate(_signs(store, world_size)) if sign is not None}
    return {rank: (waits, place) for rank, (_, waits, place) in ((r, json.loads(s)) for r, s in signs.items())}


def _signs(store: Any, world_size: int) -> list[Any]:
    keys = [f"alive/{rank}" for rank in range(world_size)]
    return [store.get(key) if store.check([key]) else None for key in keys]


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
