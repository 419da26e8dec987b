"""What a run says on stderr: rich's bar in a terminal, a line now and then in a log, and what happened."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 30.0  # seconds between two lines of a log
SHOWN = 4  # values under the bar: about a terminal's line


class Pace:
    """Iterations a second over the last minute or, where they are slower than one a second, the last sixty."""

    def __init__(self, iteration: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=60)
        self.reset(iteration)

    def reset(self, iteration: int) -> None:
        self._marks.clear()
        self._marks.append((self._clock(), iteration))
        self.rate = 0.0  # not known yet

    def note(self, iteration: int) -> None:
        now = self._clock()
        since, first = self._marks[0]
        if now - since >= 1.0:
            self.rate = (iteration - first) / (now - since)
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, iteration))

    def text(self) -> str:
        if not self.rate:
            return ""
        return f"{self.rate:.2f} it/s" if self.rate >= 1 else f"{1 / self.rate:.2f} s/it"

    def left(self, iterations: int) -> str:
        return f"{timedelta(seconds=round(iterations / self.rate))} left" if self.rate else ""


class Display:
    """Progress where it is `shown`, and what happened in any case."""

    def __init__(
        self,
        total: int,
        iteration: int = 0,
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
    ) -> None:
        self.total, self._shown, self._clock = total, shown, clock
        self._pace = Pace(iteration, clock)
        self._values = ""
        self._last_line: float | None = None
        if shown and console is None:
            console = _terminal()
        self._bar = Bar(total, iteration, console) if shown and console is not None else None

    def advance(self, iteration: int, values: Mapping[str, float]) -> None:
        """An empty `values` keeps those that are shown, so that a loop need not read its losses at every iteration."""
        self._pace.note(iteration)
        if values:
            self._values = ", ".join(f"{name} {value:.4g}" for name, value in main_values(values).items())
        if self._bar is not None:
            self._bar.show(iteration, *self._pace_and_left(iteration), self._values)
        elif self._shown and self._due(iteration):
            parts = (f"iteration {iteration} of {self.total}", *self._pace_and_left(iteration), self._values)
            self.say(", ".join(part for part in parts if part))

    def say(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.say(text)

    def rewind(self, iteration: int) -> None:
        self._pace.reset(iteration)
        if self._bar is not None:
            self._bar.show(iteration, "", "", self._values)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _pace_and_left(self, iteration: int) -> tuple[str, str]:
        return self._pace.text(), self._pace.left(max(0, self.total - iteration))

    def _due(self, iteration: int) -> bool:
        now = self._clock()
        if self._last_line is not None and iteration < self.total and now - self._last_line < EVERY:
            return False
        self._last_line = now
        return True


class Bar:
    """rich's bar, and the values in a line of their own: beside the bar they squeeze it out of a narrow terminal."""

    def __init__(self, total: int, iteration: int, console: Console) -> None:
        import rich.progress as rich
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        columns = (rich.BarColumn(20), rich.MofNCompleteColumn(), rich.TextColumn("{task.fields[pace]}"))
        times = (rich.TimeElapsedColumn(), rich.TextColumn("{task.fields[left]}"))
        self._values = ""
        self._progress = rich.Progress(*columns, *times)
        self._task = self._progress.add_task("", total=total, completed=iteration, pace="", left="")
        self._live = Live(
            get_renderable=lambda: Group(self._progress, Text(self._values)),
            console=console,
            refresh_per_second=2,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe is not the bar's to take
        )
        self._live.start()

    def show(self, iteration: int, pace: str, left: str, values: str) -> None:
        self._values = values
        self._progress.update(self._task, completed=iteration, pace=pace, left=left)

    def say(self, text: str) -> None:
        """Above the bar, and as it is: brackets are no markup."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def main_values(values: Mapping[str, float]) -> dict[str, float]:
    """The losses, or whatever comes first where no name says loss: as many as fit beside a bar."""
    losses = [name for name in values if name.endswith("loss")]
    return {name: values[name] for name in (losses or list(values))[:SHOWN]}


def _terminal() -> Console | None:
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=True)
