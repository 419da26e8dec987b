"""`twostep bench launch`: what a call costs the host, whatever the size of its tensors.

Microseconds from a call to its return, on tensors so small that arithmetic does not count; on CUDA without waiting for
the device. This is what hides behind a kernel that runs longer, and what small shapes wait for. The cure is to run
fewer calls (fuse) or none (a CUDA graph: what `twostep bench` times on CUDA).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..tables import markdown
from . import cases, make_out, prepared, report, timing
from .measure import candidates_of

SHAPE = cases.Shape(1, 4, 128)
DIRECTIONS = ("forward", "both")
REPETITIONS = 7  # of which the best is taken: what interrupts a call makes it longer, and nothing makes it shorter


@dataclass
class Row:
    op: str
    dtype: str
    direction: str
    microseconds: dict[str, float]


@timing.keep_for_another_backward
def measure(op: str, dtype: torch.dtype, device: str, compiled: bool) -> list[Row]:
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = cases.make(op, SHAPE, dtype, device, generator)
    candidates, _ = candidates_of(op, inputs, device, compiled)
    rows = []
    for direction in DIRECTIONS:
        if op in cases.DATA_OPS and direction != "forward":
            continue
        calls = {name: timing.DIRECTIONS[direction](function, inputs) for name, function in candidates.items()}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(REPETITIONS):
            for name, call in calls.items():
                found[name].append(timing.launch_overhead(call, device))
        best = {name: 1e6 * min(seconds) for name, seconds in found.items()}
        rows.append(Row(op, str(dtype).removeprefix("torch."), direction, best))
    return rows


def table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.microseconds))
    lines = []
    for row in rows:
        cells = [f"{row.microseconds[name]:.1f}" if name in row.microseconds else "" for name in names]
        lines.append([f"`{row.op}`", row.dtype, row.direction, *cells])
    return markdown(["op", "dtype", "direction", *names], lines)


def run(arguments: argparse.Namespace) -> int:
    device = prepared(arguments)
    make_out(arguments)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows: list[Row] = []
    for op in cases.OPS:
        print(op, file=sys.stderr, flush=True)
        rows += measure(op, dtype, device, not arguments.no_compile)
    print(f"microseconds of a call\n\n{table(rows)}")
    if arguments.out:
        facts: dict[str, Any] = {"environment": report.environment(device), "shape": str(SHAPE)}
        facts["command"] = shlex.join(["twostep", *sys.argv[1:]])
        path = arguments.out / "launch.json"
        path.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        print(f"wrote {path}")
    return 0
