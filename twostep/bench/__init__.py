"""`twostep bench`: every operator against what a user would pick instead, in one run.

`twostep bench unroll`: memory and time of the two-step backward. `twostep bench launch`: what a call costs the host.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from ..allocator import keep_freed_memory
from ..arguments import answered, usable_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where a GPU is visible, else cpu")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="default: all")
    parser.add_argument("--shapes", nargs="+", metavar="BxLxD", help="default: the shapes that count on that device")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float32 and bfloat16 (bfloat16 on cuda)")
    parser.add_argument(
        "--directions", nargs="+", choices=["forward", "backward", "both"], default=["forward", "backward", "both"]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each candidate (default 1)")
    parser.add_argument(
        "--system-allocator",
        action="store_true",
        help="CPU: leave glibc's allocator as it is, page faults included (default: freed memory is kept for reuse)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out; its compilation takes most of the time"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the table, CSV, JSON and plot there")
    parts = parser.add_subparsers(dest="part", metavar="{unroll,launch}", required=False)
    summary = "measure memory and time of the two-step backward instead of the kernels"
    _add_unroll_arguments(parts.add_parser("unroll", help=summary, description=summary))
    summary = "measure what a call of each operator costs the host, whatever its size"
    launch = parts.add_parser("launch", help=summary, description=summary)
    _add_shared_arguments(launch)
    launch.add_argument("--no-compile", action="store_true", default=argparse.SUPPRESS, help="leave torch.compile out")


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    kept = argparse.SUPPRESS  # an option of several benchmarks keeps the value that was given before the part's name
    parser.add_argument("--device", choices=["cpu", "cuda"], default=kept, help="default: cuda where a GPU is visible")
    parser.add_argument("--threads", type=int, default=kept, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=kept, metavar="DIR", help="also write the table and JSON there")


def _add_unroll_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shared_arguments(parser)
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N", help="blocks (2 4 8 16)")
    parser.add_argument("--shape", metavar="BxLxD", help="activations (default 2x256x256; 2x4096x2048 on cuda)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 (bfloat16 on cuda)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="timed calls of each mode (default 5)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.part is None:
        return answered("bench", lambda: _run(arguments), out=arguments.out)
    part = importlib.import_module(f".{arguments.part}", __name__)
    return answered(f"bench {arguments.part}", lambda: part.run(arguments), out=arguments.out)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from . import cases, report
    from .measure import Row, measure

    device = prepared(arguments)
    ops = _chosen(arguments.ops, cases.OPS)
    default = cases.CPU_SHAPES if device == "cpu" else cases.CUDA_SHAPES
    shapes = [cases.Shape.parse(text) for text in arguments.shapes] if arguments.shapes else list(default)
    usual = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    dtypes = _chosen(arguments.dtypes, usual, ("float32", "bfloat16", "float16"))
    if not 0 < arguments.seconds < float("inf"):
        raise ValueError(f"--seconds is {arguments.seconds}, expected a number above 0")
    for shape in shapes:
        cases.check(shape, ops)
    make_out(arguments)
    if not arguments.system_allocator:
        keep_freed_memory()

    rows: list[Row] = []
    total = len(ops) * len(shapes) * len(dtypes)
    for number, (shape, dtype, op) in enumerate(((s, d, o) for s in shapes for d in dtypes for o in ops), 1):
        print(f"[{number}/{total}] {op} {shape} {dtype}", file=sys.stderr, flush=True)
        rows += measure(
            op,
            shape,
            getattr(torch, dtype),
            device,
            tuple(arguments.directions),
            seconds=arguments.seconds,
            compiled=not arguments.no_compile,
        )
    print(report.table(rows))
    print()
    print(report.summary(rows))
    for peer, reason in sorted({item for row in rows for item in row.notes.items()}):
        print(f"left out: {peer}: {reason}")
    if arguments.out:
        command = shlex.join(["twostep", *sys.argv[1:]])
        for path in report.save(rows, arguments.out, device, command):
            print(f"wrote {path}")
    return 0


def prepared(arguments: argparse.Namespace) -> str:
    """The device that was asked for or is there, and torch's threads set."""
    import torch

    device = usable_device(arguments.device, "--device").type
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads is {arguments.threads}, expected at least 1")
        torch.set_num_threads(arguments.threads)
    return device


def make_out(arguments: argparse.Namespace) -> None:
    """The folder, if one is asked for: once all arguments are known to be good, and before anything is measured."""
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)


def _chosen(given: list[str] | None, default: tuple[str, ...], accepted: tuple[str, ...] | None = None) -> list[str]:
    accepted = accepted or default
    for name in given or ():
        if name not in accepted:
            raise ValueError(f"{name!r} is not one of {', '.join(accepted)}")
    return list(given or default)
