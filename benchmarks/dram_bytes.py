"""Bytes that each operator moves between a GPU and its memory, by Nsight Compute, beside the bytes that no
implementation can avoid.

    python benchmarks/dram_bytes.py --out DIR                          every operator, forward and backward
    python benchmarks/dram_bytes.py --ops rope swiglu --shape 4x4608x3840

A process for each case: ncu runs this file again with --worker, which calls the operator once between two marks of the
profiler, so that nothing else is counted; the tensors are larger than the second-level cache, which ncu empties before
every kernel (--cache-control all, its default). Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from twostep.bench import cases, report
from twostep.tables import markdown

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
DIRECTIONS = ("forward", "backward")


@dataclass
class Row:
    op: str
    shape: str
    dtype: str
    direction: str
    kernels: int
    read: float
    written: float
    floor: int


def worker(op: str, shape: cases.Shape, direction: str) -> None:
    import torch

    from twostep import ops
    from twostep.bench import timing

    inputs = cases.make(op, shape, torch.bfloat16, "cuda", torch.Generator(device="cuda").manual_seed(0))
    call = timing.DIRECTIONS[direction](getattr(ops, op), inputs)
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def totals(text: str) -> tuple[int, float, float]:
    """Kernels, bytes read and bytes written in what ncu prints with --csv --page raw --print-units base: a line of
    names, one of units, and one for each kernel, among lines of the program's own."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        raise ValueError(f"ncu printed no table; its last lines:\n{chr(10).join(lines[-8:])}")
    table = [row for row in csv.reader(lines[starts[0] :]) if row]
    names, units, kernels = table[0], table[1], table[2:]
    found = []
    for metric in METRICS:
        if metric not in names:
            raise ValueError(f"ncu printed no {metric}; it has {', '.join(names[-6:])}")
        column = names.index(metric)
        if units[column] != "byte":
            raise ValueError(f"ncu printed {metric} in {units[column]!r}, expected 'byte'")
        found.append(sum(float(row[column].replace(",", "")) for row in kernels))
    return len(kernels), found[0], found[1]


def profiled(op: str, shape: cases.Shape, direction: str) -> Row:
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command += [sys.executable, __file__, "--worker", op, str(shape), direction]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(
            f"{op} {direction}: ncu ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-800:]}"
        )
    import torch

    kernels, read, written = totals(ended.stdout)
    floor = cases.floor_bytes(op, shape, torch.bfloat16)[DIRECTIONS.index(direction)]
    return Row(op, str(shape), "bfloat16", direction, kernels, read, written, floor)


def table(rows: Sequence[Row]) -> str:
    head = ["op", "shape", "direction", "kernels", "read MB", "written MB", "floor MB", "moved / floor"]
    lines = []
    for row in rows:
        sizes = [f"{size / 1e6:.1f}" for size in (row.read, row.written, row.floor)]
        moved = f"{(row.read + row.written) / row.floor:.3f}"
        lines.append([row.op, row.shape, row.direction, str(row.kernels), *sizes, moved])
    return markdown(head, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(cases.OPS[:6]), choices=cases.OPS, metavar="OP")
    parser.add_argument("--shape", default="4x4608x3840", metavar="BxLxD", help="(default: %(default)s)")
    parser.add_argument("--worker", nargs=3, metavar=("OP", "SHAPE", "DIRECTION"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write dram_bytes.json and dram_bytes.md there")
    given = parser.parse_args(arguments)
    if given.worker:
        op, text, direction = given.worker
        worker(op, cases.Shape.parse(text), direction)
        return 0
    try:
        shape = cases.Shape.parse(given.shape)
        if shutil.which("ncu") is None:
            raise ValueError("there is no ncu on PATH: it comes with the CUDA toolkit (Nsight Compute)")
        directions = [
            (op, way) for op in given.ops for way in DIRECTIONS if way == "forward" or op not in cases.DATA_OPS
        ]
        rows = []
        for op, way in directions:
            rows.append(profiled(op, shape, way))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    except ValueError as error:
        print(f"dram_bytes: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        facts = {"environment": report.environment("cuda"), "command": " ".join(["python", *sys.argv])}
        content = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1)
        (given.out / "dram_bytes.json").write_text(content + "\n", encoding="utf-8")
        (given.out / "dram_bytes.md").write_text(table(rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
