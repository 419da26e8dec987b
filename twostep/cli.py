"""The command line: `twostep <command>`. Only the chosen command's module is imported, so that `doctor` runs without
torch.

A command is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence

from twostep.version import __version__

COMMANDS = {
    "train": ("twostep.train.command", "train by a recipe, and go on where the run stopped"),
    "demo": ("twostep.demo", "make a two-step student of the miniature within minutes, and show it beside its teacher"),
    "export": ("twostep.export.command", "write a student as a diffusers folder, and check it"),
    "sample": ("twostep.sample", "draw images of prompts with a student or a pipeline"),
    "evaluate": ("twostep.evaluate.command", "compare models, runs and folders of images, and write a report"),
    "reproduce": ("twostep.reproduce.command", "repeat in miniature what three papers claim, over several seeds"),
    "bench": ("twostep.bench", "measure the kernels against eager PyTorch, torch.compile and other libraries"),
    "plan": ("twostep.plan", "predict the memory of a distillation, from shapes alone"),
    "cache": ("twostep.train.data.cache_command", "encode prompts and sample the teacher for them ahead of training"),
    "doctor": ("twostep.doctor", "check torch, CUDA, the compiled kernels and the optional packages"),
}


# diffusers imports torchao wherever it is installed; on a CPU build of torch all of these then speak of what it lacks.
OF_TORCHAO = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def _worse_than_a_warning(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def make_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the chosen command alone filled in."""
    parser = argparse.ArgumentParser(prog="twostep", description="Two-step text-to-image models and their kernels.")
    parser.add_argument("--version", action="version", version=f"twostep {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        if importlib.util.find_spec(".".join(module.split(".")[:2])) is None:
            continue  # not every part is in every installation
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name in OF_TORCHAO:
        logging.getLogger(name).addFilter(_worse_than_a_warning)  # again and again is once
    chosen = next((argument for argument in given if not argument.startswith("-")), None)
    parser = make_parser(chosen)
    parsed, rest = parser.parse_known_args(given)
    # argparse ends a list of arguments at the first option; `twostep train recipe --fresh batch=2` means one list.
    if rest and hasattr(parsed, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        parsed.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status = importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
