"""The command line: `twostep <command>`. Only the chosen command's module is imported, so that `doctor` runs without
torch.

A command is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from twostep.version import __version__

COMMANDS = {
    "bench": ("twostep.bench", "measure the kernels against eager PyTorch, torch.compile and other libraries"),
    "doctor": ("twostep.doctor", "check torch, CUDA, the compiled kernels and the optional packages"),
}


def make_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the chosen command alone filled in."""
    parser = argparse.ArgumentParser(prog="twostep", description="Two-step text-to-image models and their kernels.")
    parser.add_argument("--version", action="version", version=f"twostep {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        if importlib.util.find_spec(module) is None:
            continue  # not every part is in every installation
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((argument for argument in given if not argument.startswith("-")), None)
    parsed = make_parser(chosen).parse_args(given)
    status = importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
