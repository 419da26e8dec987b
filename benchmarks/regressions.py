"""A new run of the benchmarks beside a committed one: what has become worse.

    python benchmarks/regressions.py benchmarks/results/FOLDER NEW

Both are folders that the benchmarks have written. Times are not compared, since machines are never alike, but what
stands beside something of the same run: a kernel's share of a copy's speed and how many times as fast as eager code it
is, a model's or an iteration's ratio to stock diffusers, bytes. A number has become worse where every way to tell it
is worse by more than --tolerance. The exit status is 1 where one has, and 2 where the two cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from committed import FILES, Folder, Number, numbers


def devices(folder: Folder) -> set[str]:
    return {folder.facts(file)["device"] for file in FILES if folder.read(file) is not None} - {""}


def change(old: float, new: float, more_is_better: bool) -> float:
    """1 where nothing has changed, less where it has become worse."""
    if not more_is_better:
        old, new = new, old
    return new / old if old else 1.0


def worse(old: Number, new: Number, tolerance: float) -> bool:
    shared = old.ways.keys() & new.ways.keys()
    changes = [change(old.ways[way][0], new.ways[way][0], old.ways[way][1]) for way in shared]
    return bool(changes) and max(changes) < 1 / (1 + tolerance)


def said(old: Number, new: Number) -> str:
    ways = [f"{way} {value:.4g} -> {new.ways[way][0]:.4g}" for way, (value, _) in old.ways.items() if way in new.ways]
    return f"{old.name}: {', '.join(ways)}"


def compare(old: Folder, new: Folder, tolerance: float) -> tuple[list[str], list[str], int]:
    """What has become worse, what is missing in the new run, and how many numbers both have."""
    before, after = ({number.name: number for number in numbers(folder)} for folder in (old, new))
    shared = [name for name in before if name in after]
    found = [said(before[name], after[name]) for name in shared if worse(before[name], after[name], tolerance)]
    return found, [name for name in before if name not in after], len(shared)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the committed folder")
    parser.add_argument("new", type=Path, help="the new run's")
    parser.add_argument("--tolerance", type=float, default=0.15, help="worse by this share (default: %(default)s)")
    parser.add_argument("--other-device", action="store_true", help="compare although the devices have other names")
    given = parser.parse_args(arguments)
    try:
        if not 0 <= given.tolerance < float("inf"):
            raise ValueError(f"--tolerance is {given.tolerance}, expected a number from 0 on")
        for path in (given.old, given.new):
            if not path.is_dir():
                raise ValueError(f"{path} is no folder")
        old, new = Folder(given.old), Folder(given.new)
        if devices(old) != devices(new) and not given.other_device:
            names = [", ".join(sorted(devices(folder))) or "nothing that was measured" for folder in (old, new)]
            raise ValueError(f"{given.old} is of {names[0]}, {given.new} of {names[1]} (--other-device compares them)")
        found, missing, count = compare(old, new, given.tolerance)
        if not count:
            raise ValueError(f"{given.old} and {given.new} have no number in common")
    except ValueError as error:
        print(f"regressions: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError) as error:
        print(f"regressions: a row is not what a benchmark writes: {error!r}", file=sys.stderr)
        return 2
    for line in found:
        print(f"worse: {line}")
    if missing:
        print(f"not in the new run: {len(missing)}, such as {missing[0]}")
    print(f"{count} compared, {len(found)} worse by more than {given.tolerance:.0%}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
