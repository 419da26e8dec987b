"""Prompts from files: text, JSON lines, parquet, or a folder of Hugging Face `datasets`.

    .txt       one a line; blank lines are skipped, blanks at both ends of a line are cut
    .jsonl     one object a line; blank lines are skipped
    .parquet   needs pyarrow
    a folder   that Dataset.save_to_disk wrote; needs datasets

In the last three a prompt stands under `column`, by default the first of prompt, caption, text that is there, and ""
is a prompt: the unconditional one. Text is held in memory; parquet stays in Arrow's columns and a dataset on the disk,
so that millions of prompts become strings only as they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from ...durable import replaced

COLUMNS = ("prompt", "caption", "text")
_CHUNK = 4096  # rows that become strings at a time when all are gone through


class Prompts(Sequence[str]):
    """Prompts by number. A slice or a list of numbers gives a list of them."""

    def __init__(self, source: str | Path, rows: Any, count: int) -> None:
        self.source = Path(source)
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, key: int) -> str: ...

    @overload
    def __getitem__(self, key: slice | Sequence[int]) -> list[str]: ...

    def __getitem__(self, key: int | slice | Sequence[int]) -> str | list[str]:
        if isinstance(key, slice):
            return self._take(list(range(self._count)[key]))
        if isinstance(key, Sequence):
            return self._take([self._place(place) for place in key])
        return self._take([self._place(key)])[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._count, _CHUNK):
            yield from self[start : start + _CHUNK]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self)

    def _place(self, place: int) -> int:
        if isinstance(place, bool) or not isinstance(place, int):
            raise TypeError(f"prompts: the key {place!r} is {type(place).__name__}, expected an int, a slice or a list")
        if not -self._count <= place < self._count:  # IndexError: what ends a loop over a sequence
            raise IndexError(f"prompts: number {place} was asked for, and {self.source} has {self._count}")
        return place % self._count

    def _take(self, places: list[int]) -> list[str]:
        if isinstance(self._rows, list):
            return [self._rows[place] for place in places]
        found: list[str] = self._rows(places) if places else []
        return found


def fingerprint(prompts: Iterable[str]) -> str:
    """Of all prompts and their order, wherever they came from."""
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(hashlib.sha256(prompt.encode()).digest())
    return total.hexdigest()[:32]


def write_prompts(path: Path, prompts: Iterable[str]) -> None:
    """A text file of them, one a line."""
    with replaced(path) as new:
        new.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def read_prompts(path: str | Path, *, column: str | None = None) -> Prompts:
    """The prompts of a file or folder; `column` is the key or column they stand under, where there are several."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"prompts: {path} does not exist; give a .txt, .jsonl or .parquet file, or a dataset's folder")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind not in READERS:
        raise ValueError(
            f"prompts: {path} is a {kind or 'file without an ending'}, expected .txt, .jsonl, .parquet, or a folder "
            f"that Dataset.save_to_disk wrote"
        )
    if kind == ".txt" and column is not None:
        raise ValueError(f"prompts: column {column!r} was given, and {path} is text: every line is a prompt")
    prompts: Prompts = READERS[kind](path, column)
    if not len(prompts):
        raise ValueError(f"prompts: {path} has no prompts in it")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank. Only a line feed ends a line, as in JSON lines."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"prompts: {path}, line {number} is not UTF-8 (byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}); convert the file, for instance with iconv"
                ) from None
            if text:
                yield number, text


def _text(path: Path, column: str | None) -> Prompts:
    rows = [text for _, text in _lines(path)]
    return Prompts(path, rows, len(rows))


def _json_lines(path: Path, column: str | None) -> Prompts:
    rows: list[str] = []
    for number, text in _lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"prompts: {where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'prompts: {where} is {type(row).__name__}, expected an object such as {{"prompt": "..."}}'
            )
        column = _column(where, list(row), column)
        if not isinstance(row[column], str):
            raise ValueError(f"prompts: {where}: {column!r} is {type(row[column]).__name__}, expected a str")
        if not is_text(row[column]):
            raise ValueError(f"prompts: {where}: {column!r} holds half of a surrogate pair, which is no text")
        rows.append(row[column])
    return Prompts(path, rows, len(rows))


def is_text(value: str) -> bool:
    """JSON may escape halves of characters, which nothing can encode."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _column(where: str, there: list[str], column: str | None) -> str:
    names = COLUMNS if column is None else (column,)
    for name in names:
        if name in there:
            return name
    wanted = " or ".join(map(repr, names))
    raise ValueError(
        f"prompts: {where} has no {wanted}; there are {', '.join(map(repr, there)) or 'no columns'}: name one "
        f"(data.column in a recipe, --column of twostep cache)"
    )


def _parquet(path: Path, column: str | None) -> Prompts:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"prompts: {path} needs pyarrow to be read; install it: pip install pyarrow") from None
    try:
        schema = pyarrow.parquet.read_schema(path)
        column = _column(str(path), schema.names, column)
        _check_strings(path, column, str(schema.field(column).type))
        rows = pyarrow.parquet.read_table(path, columns=[column])[column]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"prompts: {path} is not a whole parquet file: {error}") from None
    _check_nulls(path, column, rows)
    return Prompts(path, lambda places: rows.take(places).to_pylist(), len(rows))


def _dataset(path: Path, column: str | None) -> Prompts:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"prompts: the folder {path} needs datasets to be read; install it: pip install datasets"
        ) from None
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(f"prompts: {path} holds the splits {', '.join(splits)}; give one, such as {path / splits[0]}")
    if not (path / "state.json").is_file():
        raise ValueError(f"prompts: {path} has no state.json, so Dataset.save_to_disk did not write it; give a file?")
    dataset = datasets.load_from_disk(str(path))
    column = _column(str(path), dataset.column_names, column)
    _check_strings(path, column, str(getattr(dataset.features[column], "dtype", dataset.features[column])))
    texts = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(dataset), 1 << 16):
        _check_nulls(path, column, texts[start : start + (1 << 16)][column], start)
    return Prompts(path, lambda places: texts[places][column].to_pylist(), len(dataset))


def _check_strings(path: Path, column: str, kind: str) -> None:
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"prompts: the column {column!r} of {path} is {kind}, expected strings")


def _check_nulls(path: Path, column: str, rows: Any, start: int = 0) -> None:
    if rows.null_count:
        first = start + rows.is_null().to_pylist().index(True)
        raise ValueError(f"prompts: row {first} of {path} has no {column!r} (null); remove such rows")


READERS = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet, "folder": _dataset}
