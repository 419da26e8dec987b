"""A file of JSON objects, one a line, that grows by whole lines and is revised in one step.

A line is one `write` in append mode and is in the kernel's hands when `append` returns, so a killed process loses at
most the line that it was writing. Such a torn end has no newline, and is cut off when the file is opened next. A
revision (lines dropped or changed) is a new file, synced, and renamed over the old one: a reader sees one or the other.

JSON has no NaN and no infinities, and strict parsers refuse Python's spelling of them. They are written as the strings
"NaN", "Infinity" and "-Infinity", which `float()` reads back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...durable import clear_leftovers, replaced

Record = dict[str, Any]
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class LineFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        clear_leftovers(path)  # of a process killed in the middle of a revision
        self._handle = _open(path)
        _cut_torn_end(self._handle)

    def append(self, record: Mapping[str, Any]) -> None:
        rest = memoryview(encode(record))
        while rest:  # a full disk may take a part of it, and raises at the next try
            rest = rest[os.write(self._handle, rest) :]

    def revise(self, change: Callable[[Record], Record | None]) -> int:
        """Puts `change(record)` in the place of each line, None: nothing; returns how many lines it touched."""
        lines, touched = [], 0
        for line, record in _whole_lines(self.path):
            revised = change(record)
            touched += revised is not record
            if revised is not None:
                lines.append(line if revised is record else encode(revised))
        if touched:
            replace_file(self.path, lines)
            os.close(self._handle)
            self._handle = _open(self.path)
        return touched

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)
        self._handle = -1  # the number will be another file's


def read_lines(path: Path) -> list[Record]:
    """The whole lines of a file, which may be in the middle of being written; none where there is no file."""
    return [record for _, record in _whole_lines(path)] if path.exists() else []


def encode(record: Mapping[str, Any]) -> bytes:
    """One strict line; what JSON has no word for (a path, a device) is its text."""
    return json.dumps(_strict(record), allow_nan=False, ensure_ascii=False, default=str).encode() + b"\n"


def replace_file(path: Path, lines: Iterable[bytes]) -> None:
    with replaced(path) as new:
        new.write_bytes(b"".join(lines))


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _cut_torn_end(handle: int) -> None:
    """Takes away the line that a killed process had begun."""
    size = end = os.fstat(handle).st_size
    while end:  # backwards to the last newline
        start = max(0, end - 65536)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        end = start if found < 0 else start + found + 1
        if found >= 0:
            break
    if end < size:
        os.ftruncate(handle, end)


def _whole_lines(path: Path) -> Iterable[tuple[bytes, Record]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                valid = isinstance(record, dict) and isinstance(record["iteration"], int)
            except (ValueError, KeyError):
                valid = False
            if not valid:
                raise ValueError(
                    f"{path}: line {number} is {line[:60]!r}, expected a JSON object with an iteration; mend or remove "
                    "the line, or move the file away"
                )
            yield line, record


def _strict(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of NumPy's, or a tensor of one
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return NOT_FINITE[0] if math.isnan(value) else NOT_FINITE[1 if value > 0 else 2]
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
