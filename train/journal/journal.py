"""The journal of a run: what its numbers were, what its samples looked like, and what happened.

    metrics.jsonl    a line for each call of `numbers`: iteration, seconds, time (Unix), and the values beside them
    events.jsonl     a line for each call of `event`: iteration, seconds, time, event, facts
    samples/         <name>-<iteration, eight digits>.png
    tensorboard/     the same numbers and pictures for TensorBoard, where it is installed
    wandb.json       the id of wandb's run, where one is configured

`seconds` is the time that the run has been running, without pauses between being stopped and resumed.

A run goes back to an iteration when it is resumed there and when it is rolled back. Numbers and pictures behind it are
dropped, and the run makes them anew: those of a resumed run are those of an uninterrupted one, times aside. Events are
history, and stay; those behind the iteration get `"undone": true`.

Values that JSON has no word for are the strings "NaN", "Infinity", "-Infinity"; `read_metrics` makes them numbers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ...durable import is_leftover, replaced
from ...images import pil_image
from .display import Display
from .line_file import NOT_FINITE, LineFile, Record, read_lines
from .sinks import Sink, TensorBoard, Wandb, import_wandb

if TYPE_CHECKING:
    from ..recipe import WandbSettings

RESERVED = ("iteration", "seconds", "time")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
ANEW = -1  # before the sheet of iteration 0
_PICTURE = re.compile(r".+-(\d{8,})\.png")


def read_metrics(folder: Path) -> list[Record]:
    """The lines of metrics.jsonl, with NaN and infinities as numbers."""
    return [
        {name: float(value) if value in NOT_FINITE else value for name, value in line.items()}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def read_events(folder: Path) -> list[Record]:
    """The lines of events.jsonl; those of iterations that were gone back over have `undone`."""
    return read_lines(folder / "events.jsonl")


class Journal:
    """The journal in `folder`, of which there is one writer: rank 0.

    `resumed_at` is the iteration that the run goes on from; None: a new run, whose folder holds no numbers yet;
    ANEW: from the beginning, dropping what is there. Whatever was written until an event is on the disk, with it,
    after the event: an event per checkpoint makes the journal as durable as the checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        resumed_at: int | None = None,
        tensorboard: bool = True,
        wandb: WandbSettings | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.folder = Path(folder)
        if resumed_at is None and (lines := read_lines(self.folder / "metrics.jsonl")):
            raise ValueError(
                f"journal: {self.folder} holds one already, up to iteration {lines[-1]['iteration']}; resume that run, "
                "or give this one a folder of its own"
            )
        if wandb is not None:
            import_wandb()  # before anything is changed
        self._samples = self.folder / "samples"
        self._samples.mkdir(parents=True, exist_ok=True)
        self._metrics, self._events = LineFile(self.folder / "metrics.jsonl"), LineFile(self.folder / "events.jsonl")
        self._sinks: list[Sink] = []
        self._closed = False
        dropped = {} if resumed_at is None else self._drop_behind(resumed_at)
        self._before = max((line["seconds"] for line in read_lines(self._metrics.path)), default=0.0)
        self._start = time.monotonic()
        at = max(resumed_at or 0, 0)
        self._display = Display(total, at, shown=progress)
        try:
            self._note_dropped(at, dropped)
            self._open_sinks(tensorboard, wandb, resumed_at, settings)
        except BaseException:
            self.close()
            raise

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, and a point in every sink."""
        taken = [name for name in values if name in RESERVED]
        if taken:
            raise ValueError(
                f"journal: a metric is called {taken[0]!r}; {', '.join(RESERVED)} are the line's own names"
            )
        plain = {name: float(value) for name, value in values.items()}
        self._metrics.append({**self._stamp(iteration), **plain})
        for sink in self._sinks:
            sink.numbers(iteration, plain)

    def picture(self, iteration: int, name: str, image: Image.Image | Tensor) -> None:
        """samples/<name>-<iteration>.png, and the picture in every sink; a tensor is uint8, [3, H, W]."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"journal: a picture is called {name!r}, expected letters, digits, '_', '.' and '-'")
        picture = as_picture(image)
        path = self._samples / f"{name}-{iteration:08d}.png"
        with replaced(path) as new:
            picture.save(new, format="PNG")
        for sink in self._sinks:
            sink.picture(iteration, name, picture)

    def event(self, iteration: int, text: str, **facts: Any) -> None:
        """A line of events.jsonl, and one on stderr."""
        self._events.append({**self._stamp(iteration), "event": text, "facts": facts})
        self.sync()
        for sink in self._sinks:
            sink.flush()
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        self._display.say(f"iteration {iteration}: {text}" + (f" ({told})" if told else ""))

    def sync(self) -> None:
        """Whatever was written is on the disk."""
        self._metrics.sync()
        self._events.sync()

    def advance(self, iteration: int, values: Mapping[str, float]) -> None:
        """The bar alone: rate, time left, the losses among `values`; empty values keep those that are shown."""
        self._display.advance(iteration, values)

    def rewind(self, iteration: int) -> None:
        """The run goes on from `iteration`: what lies behind it is dropped."""
        dropped = self._drop_behind(iteration)
        for sink in self._sinks:
            sink.rewind(iteration)
        self._display.rewind(iteration)
        self._note_dropped(iteration, dropped)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._display.close()
        for sink in self._sinks:
            sink.close()
        self._metrics.close()
        self._events.close()

    def _stamp(self, iteration: int) -> Record:
        seconds = self._before + time.monotonic() - self._start
        return {"iteration": int(iteration), "seconds": round(seconds, 3), "time": round(time.time(), 3)}

    def _open_sinks(
        self, tensorboard: bool, wandb: WandbSettings | None, resumed_at: int | None, settings: Mapping[str, Any] | None
    ) -> None:
        if tensorboard:
            try:
                self._sinks.append(TensorBoard(self.folder / "tensorboard", resumed_at, settings))
            except ImportError as error:
                self.event(
                    max(resumed_at or 0, 0), f"no TensorBoard ({error}): `pip install tensorboard` for its charts"
                )
        if wandb is not None:
            self._sinks.append(Wandb(wandb, self.folder, resumed_at, settings))

    def _drop_behind(self, iteration: int) -> dict[str, int]:
        def undone(line: Record) -> Record:
            return line if line["iteration"] <= max(iteration, 0) or "undone" in line else {**line, "undone": True}

        lines = self._metrics.revise(lambda line: line if line["iteration"] <= iteration else None)
        self._events.revise(undone)
        pictures = 0
        for path in list(self._samples.iterdir()):
            found = _PICTURE.fullmatch(path.name)
            if is_leftover(path) or (found and int(found[1]) > iteration):
                path.unlink()
                pictures += 1
        return {"lines": lines, "pictures": pictures}

    def _note_dropped(self, iteration: int, dropped: Mapping[str, int]) -> None:
        counts = {what: count for what, count in dropped.items() if count}
        if counts:
            self.event(iteration, "dropped from the journal what lay behind", **counts)


class NullJournal:
    """A journal's methods without a journal, for every rank but the first."""

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        pass

    def picture(self, iteration: int, name: str, image: Image.Image | Tensor) -> None:
        pass

    def event(self, iteration: int, text: str, **facts: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def advance(self, iteration: int, values: Mapping[str, float]) -> None:
        pass

    def rewind(self, iteration: int) -> None:
        pass

    def close(self) -> None:
        pass


def as_picture(image: Image.Image | Tensor) -> Image.Image:
    """An RGB image of one, or of a tensor of bytes [3, H, W]."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        given = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"journal: a picture is {given}, expected a PIL image or a uint8 tensor [3, height, width]")
    return pil_image(image)
