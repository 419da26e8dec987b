"""SIGTERM and Ctrl-C ask a run to stop: it finishes the update, saves, and ends. A second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

ASKED = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Inside the context, `received` is the signal that came, and 0 before. In the main thread; elsewhere none come."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in ASKED}
        return self

    def __exit__(self, *failure: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
