"""What a folder of benchmarks/results holds: the files that the benchmarks write there, read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostep.bench.measure import Row

RESULTS = Path(__file__).resolve().parent / "results"
FILES = ("kernels", "launch", "stock_vs_fused", "train_speed", "unroll", "exported_forms", "full_size")


@dataclass(frozen=True)
class Folder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, file: str) -> dict[str, Any] | None:
        path = self.path / f"{file}.json"
        if not path.exists():
            return None
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not what a benchmark writes: {error!r}") from None
        if not isinstance(found.get("rows"), list):
            raise ValueError(f"{path} is not what a benchmark writes: it has no rows")
        return found

    def rows(self, file: str) -> list[dict[str, Any]]:
        found = self.read(file)
        return [] if found is None else found["rows"]

    def kernels(self) -> list[Row]:
        return [Row(**row) for row in self.rows("kernels")]

    def facts(self, file: str) -> dict[str, str]:
        """Device, threads, versions, date and command, under the names that all benchmarks share."""
        found = self.read(file) or {}
        known = {**found, **found.get("environment", {})}
        device = str(known.get("device") or known.get("machine", "")).partition(",")[0]
        if found and not device:
            raise ValueError(f"{self.path / file}.json names no device")
        return {"device": device, **{key: str(known[key]) for key in ("threads", "torch", "date") if key in known}}

    @property
    def date(self) -> str:
        return max((self.facts(file).get("date", "") for file in FILES), default="")


def folders(root: Path = RESULTS) -> list[Folder]:
    """The newest first."""
    found = [Folder(path) for path in sorted(root.iterdir()) if any((path / f"{file}.json").exists() for file in FILES)]
    return sorted(found, key=lambda folder: (folder.date, folder.name), reverse=True)


@dataclass(frozen=True)
class Number:
    """One thing that was measured, told in one or several ways, each beside something of the same run where it can
    be: {way: (value, whether more is better)}."""

    name: str
    ways: dict[str, tuple[float, bool]]


def numbers(folder: Folder) -> Iterator[Number]:
    for row in folder.kernels():
        ways = {"percent of a copy": (row.percent_of_copy, True)}
        if (ratio := row.ratio("eager")) is not None:
            ways["times eager"] = (ratio, True)
        yield Number(f"{row.op} {row.shape} {row.dtype} {row.direction}", ways)
    for row in folder.rows("stock_vs_fused"):
        taken = row["milliseconds"]
        name = f"{row['model']} {row['batch']} x {row['tokens']} {row['dtype']} {row['direction']}"
        yield Number(name, {"times stock": (taken["stock"] / taken["fused"], True)})
    for row in folder.rows("train_speed"):
        name = f"turbo_pp iteration, {row['weights']}, {row['dtype']}, batch {row['batch']}"
        yield Number(name, {"times stock": (row["ratio"], True)})
    for row in folder.rows("unroll"):
        kind = "blocks recomputed" if row["checkpointed"] else "blocks kept"
        name = f"two_step_backward {row['mode']}, depth {row['depth']}, {kind}"
        yield Number(name, {"live bytes": (row["live_bytes"], False)})
    for row in folder.rows("full_size"):
        for update, peak in (row["peak_gib"] or {}).items():
            yield Number(f"{row['name']}, {update} update", {"peak GiB": (peak, False)})
