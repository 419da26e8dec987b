"""`python -m twostep.train.miniature`: makes the miniature's weights from nothing, and goes on where it was stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...allocator import keep_freed_memory
from .stages import STAGES, Chain, StageFailed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m twostep.train.miniature", description=__doc__.split(": ", 1)[1])
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="of the base's and the teacher's runs: docs/training.md")
    add("--out", type=Path, default=Path("runs/miniature"), help="where everything is put (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    add("--ranks", type=int, default=1, help="processes of the base's and the teacher's runs (default: %(default)s)")
    add("--images", type=int, default=500, help="that the quality of what ships is measured on (default: %(default)s)")
    add("--steps", type=_step, action="append", default=[], metavar="STAGE=N", help="fewer, to see the chain run")
    add("--large", action="store_true", help="the larger sister, 30 million parameters on the package's other parts")
    given = parser.parse_args(arguments)
    if given.ranks < 1:
        parser.error(f"--ranks is {given.ranks}, expected at least 1")
    keep_freed_memory()
    out, steps = given.out.resolve(), dict(given.steps)
    chain = Chain(out, given.seed, steps, given.ranks, tuple(given.settings), given.images, given.large)
    try:
        chain.run(given.until)
    except (StageFailed, ValueError) as error:
        print(f"twostep.train.miniature: {error}", file=sys.stderr)
        return error.status if isinstance(error, StageFailed) else 2
    return 0


def _step(text: str) -> tuple[str, int]:
    stage, _, number = text.partition("=")
    if stage not in STAGES[:-1] or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(STAGES[:-1])}, = and a number")
    return stage, int(number)


if __name__ == "__main__":
    sys.exit(main())
