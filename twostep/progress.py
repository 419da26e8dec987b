"""How far a long piece of work is: rich's bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]  # (done, total)

_EVERY = 30.0  # seconds between two lines of a log


@contextmanager
def progress_bar(what: str, *, shown: bool = True) -> Iterator[Report]:
    """Gives a function to call with (done, total)."""
    if not shown:
        yield lambda done, total: None
        return
    try:
        import rich.progress as rich
    except ImportError:
        yield _lines(what)
        return
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counter(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same, for work that says how much it has done since."""
    done = 0
    with progress_bar(what) as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        yield advance


def _lines(what: str) -> Report:
    start = last = time.monotonic()
    finished = False

    def report(done: int, total: int) -> None:
        nonlocal last, finished
        now = time.monotonic()
        if finished or (done < total and now - last < _EVERY):
            return
        last, finished = now, done == total
        left = f", about {(now - start) / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{what}: {done} of {total}{left}", file=sys.stderr, flush=True)

    return report
