"""The files of a cache: shards and index, read and checked, and written so that only whole ones have a name.

A shard's header says what it is part of (the plan: two writers with one plan may share a folder) and, under the keys
that its kind names, what it alone holds, a checksum of every row among it. Contexts are one kind of shards; a trainer's
cache of samples is another.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..durable import replaced

INDEX = "index.json"


@dataclass(frozen=True)
class Rows:
    """What the index says of one shard."""

    entry: dict[str, Any]  # what finds a row in it
    counts: dict[str, int]  # added up over all shards
    common: dict[str, Any]  # the same in every shard


@dataclass(frozen=True)
class Kind:
    """What shards hold: how they are named and read, and the words for their errors."""

    format: str
    version: int
    stem: str  # of the files' names
    where: str
    holds: str
    writer: str  # the function that fills a folder
    input: str  # what a writer must be given again to go on
    own: tuple[str, ...]  # keys of a header that are the shard's alone, CHECKSUMS among them
    rows: Callable[[Any], Rows]  # of an open shard

    def name(self, shard: int, shards: int) -> str:
        return f"{self.stem}-{shard:05d}-of-{shards:05d}.safetensors"


CHECKSUMS = "checksums"


def checksums_of(rows: Iterable[tuple[Tensor, ...]]) -> dict[str, str]:
    """Into a shard's header: a CRC-32 of each row's tensors."""
    return {CHECKSUMS: json.dumps([_checksum(row) for row in rows])}


def checksums_in(file: Any) -> dict[str, list[int]]:
    """Of an open shard; nothing of one that was written before there were any."""
    about = file.metadata()
    return {CHECKSUMS: json.loads(about[CHECKSUMS])} if CHECKSUMS in about else {}


def check_row(path: Path, entry: dict[str, Any], row: int, found: tuple[Tensor, ...], kind: Kind) -> None:
    """ValueError where a row that was read is not the row that was written."""
    if CHECKSUMS in entry and entry[CHECKSUMS][row] != _checksum(found):
        raise ValueError(
            f"{kind.where}: row {row} of the shard {path} is not what was written: it is damaged; remove the shard and "
            f"write it again with {kind.writer}"
        )


def _checksum(row: tuple[Tensor, ...]) -> int:
    total = 0
    for tensor in row:
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, total)
    return total


def _captions(file: Any) -> Rows:
    about, lengths = file.metadata(), file.get_tensor("lengths")
    tokens, channels = file.get_slice("features").get_shape()
    prompts = json.loads(about["prompts"])
    return Rows(
        {"prompts": prompts, "lengths": lengths.tolist(), **checksums_in(file)},
        {"captions": len(prompts), "tokens": tokens},
        {"channels": channels, "lengths": about["has_lengths"] == "1"},
    )


FORMAT = "twostep.contexts"
VERSION = 1
WHERE = "context cache"
CONTEXTS = Kind(
    FORMAT,
    VERSION,
    stem="contexts",
    where=WHERE,
    holds="contexts",
    writer="ContextCache.write (`twostep cache`)",
    input="captions",
    own=("prompts", "has_lengths", CHECKSUMS),
    rows=_captions,
)


def shard_files(folder: Path, kind: Kind) -> list[Path]:
    return sorted(folder.glob(f"{kind.stem}-*-of-*.safetensors"))


def collect(paths: list[Path], header: dict[str, str], kind: Kind) -> dict[str, Any] | None:
    """The index of some shards; None if one of them is another plan's."""
    shards: list[dict[str, Any]] = []
    common: dict[str, Any] = {}
    totals: dict[str, int] = {}
    for path in paths:
        found, file = open_shard(path, kind)
        if found != header:
            return None
        rows, size = kind.rows(file), path.stat().st_size
        for name, count in {**rows.counts, "bytes": size}.items():
            totals[name] = totals.get(name, 0) + count
        common = rows.common
        shards.append({"file": path.name, "bytes": size, **rows.entry})
    return {"header": header, **common, "totals": totals, "shards": shards}


def open_shard(path: Path, kind: Kind) -> tuple[dict[str, str], Any]:
    """A shard, mapped into memory, and what its header says it is part of."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{kind.where}: {path} is not a whole shard ({error}); write it again with {kind.writer}"
        ) from error
    about = file.metadata() or {}
    if about.get("format") != kind.format:
        raise ValueError(f"{kind.where}: {path} is no shard of {kind.holds}; give the folder of a cache")
    return {key: value for key, value in about.items() if key not in kind.own}, file


def open_own(path: Path, header: dict[str, str], kind: Kind) -> Any:
    """The shard that an index names, open; ValueError where it is another cache's."""
    found, file = open_shard(path, kind)
    if found != header:
        raise ValueError(
            f"{kind.where}: {path} is a shard of another cache; write this one anew with resume=False (`twostep cache "
            f"--overwrite`)"
        )
    return file


def read_index(folder: Path, kind: Kind) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"{kind.where}: there is no folder {folder}; fill it with {kind.writer}")
    if (folder / INDEX).exists():
        return load_index(folder / INDEX, kind)
    paths = shard_files(folder, kind)
    if not paths:
        raise ValueError(f"{kind.where}: {folder} holds no {kind.holds}; fill it with {kind.writer}")
    total = int(paths[0].stem.rsplit("-", 1)[1])
    if len(paths) < total:
        raise ValueError(
            f"{kind.where}: {folder} is not finished, {len(paths)} of {total} shards are there; call {kind.writer} "
            f"with the same {kind.input} again, it goes on where it stopped"
        )
    index = collect(paths, open_shard(paths[0], kind)[0], kind)
    if index is None:
        raise ValueError(
            f"{kind.where}: the shards in {folder} come from two writings, the later of which is not finished; finish "
            f"it, or write the folder anew with resume=False on every rank (`twostep cache --overwrite`)"
        )
    return index


def load_index(path: Path, kind: Kind) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{kind.where}: {path} is not JSON: {error}") from error
    header = index.get("header") if isinstance(index, dict) else None
    if not isinstance(header, dict) or header.get("format") != kind.format:
        raise ValueError(f"{kind.where}: {path} is not the index of a {kind.where}; give another folder")
    if header["version"] != str(kind.version):
        raise ValueError(
            f"{kind.where}: {path} has version {header['version']}, this twostep reads {kind.version}; write it anew"
        )
    found: dict[str, Any] = index
    return found


def check_file(path: Path, size: int, kind: Kind) -> None:
    if not path.is_file():
        raise ValueError(f"{kind.where}: the shard {path} is missing; write it again with {kind.writer}")
    if path.stat().st_size != size:
        raise ValueError(
            f"{kind.where}: the shard {path} has {path.stat().st_size} bytes, expected {size}: it is damaged; write it "
            f"again with {kind.writer}"
        )


def claim(folder: Path, header: dict[str, str], kind: Kind) -> None:
    """ValueError if the folder belongs to another plan; otherwise its whole shards count, and damaged ones go."""
    index = folder / INDEX
    if index.exists():
        _check_plan(index, load_index(index, kind)["header"], header, kind)
    for path in shard_files(folder, kind):
        is_whole(path, header, kind)


def is_whole(path: Path, header: dict[str, str], kind: Kind) -> bool:
    if not path.exists():
        return False
    try:
        found, _ = open_shard(path, kind)
    except ValueError as error:
        warnings.warn(f"{error}; it is written again", stacklevel=3)
        path.unlink(missing_ok=True)
        return False
    _check_plan(path, found, header, kind)
    return True


def _check_plan(path: Path, found: dict[str, str], wanted: dict[str, str], kind: Kind) -> None:
    wrong = [key for key, value in wanted.items() if found.get(key) != value]
    # An identity says the same as the keys that it is made of, and tells a reader nothing.
    differ = [
        f"other {kind.input}, or another order of them"
        if key == kind.input
        else f"{key} {found.get(key)!r}, not {wanted[key]!r}"
        for key in [key for key in wrong if key != "identity"] or wrong
    ]
    if differ:
        raise ValueError(
            f"{kind.where}: {path} was written for something else: {'; '.join(differ)}; choose another folder, or "
            f"write this one anew with resume=False (`twostep cache --overwrite`)"
        )


def clear(folder: Path, own: set[str], plan: set[str], rank: int, kind: Kind) -> None:
    """Remove the shards that this rank will write anew, and rank 0 also those that nobody will."""
    index = folder / INDEX
    if index.exists():
        load_index(index, kind)  # ValueError if it is not ours to remove
        index.unlink(missing_ok=True)
    for path in shard_files(folder, kind):
        if path.name in own or (rank == 0 and path.name not in plan):
            path.unlink(missing_ok=True)


def merge(
    folder: Path, names: list[str], header: dict[str, str], kind: Kind, more: Mapping[str, Any] | None = None
) -> None:
    """Write the index, if every shard is there. The rank that finishes last always finds them all.

    Args:
        more: goes into the index alone.
    """
    paths = [folder / name for name in names]
    index = collect(paths, header, kind) if all(path.exists() for path in paths) else None
    if index is not None:
        text = json.dumps({**index, **(more or {})})
        with replaced(folder / INDEX, alone=False) as new:  # any rank may be the last
            new.write_text(text, encoding="utf-8")
