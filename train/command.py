"""`twostep train RECIPE [key=value ...]`: trains, and goes on where the run in its folder stopped.

    twostep train recipe.yaml out=runs/first method.inherit=0.2
    torchrun --nproc-per-node 8 -m twostep train recipe.yaml parallel.kind=fsdp

RECIPE is a file, or the name of one that comes with the package (`twostep train --list`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..arguments import FAILED, FAULT, INTERRUPTED, system_fault

RECIPES = Path(__file__).parent / "recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", help="a YAML file, or the name of a recipe of the package")
    add("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, such as method.inherit=1")
    add("--dry-run", action="store_true", help="resolve and check, print roles, parameters, memory and steps, and stop")
    add("--fresh", action="store_true", help="begin anew: an error if the run's folder holds a checkpoint")
    add("--checkpoint", metavar="STEP", help="go on from this one (an iteration, or a folder) instead of the last")
    add("--profile", action="store_true", help="write a trace of a few iterations into the run's folder")
    add("--list", action="store_true", help="name the recipes of the package")
    add("--keys", action="store_true", help="print every key with its type, default and meaning")


def run(args: argparse.Namespace) -> int:
    from .checkpoint import CheckpointError

    if args.list or args.keys:
        print(_recipes() if args.list else _keys(), end="")
        return 0
    if args.recipe is None:
        print("twostep train: give a recipe: a YAML file, or one of\n" + _recipes(), end="", file=sys.stderr)
        return FAULT
    recipe = None
    try:
        recipe = read_recipe(args.recipe, args.overrides)
        if args.dry_run:
            from .dry_run import describe_run

            print(describe_run(recipe))
            return 0
        return _train(args, recipe)
    except (ValueError, CheckpointError) as error:
        print(f"twostep train: {error}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        print("twostep train: interrupted; the same command goes on where the run was saved last", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"twostep train: {system_fault(error, None if recipe is None else recipe.out)}", file=sys.stderr)
        return FAILED


def read_recipe(name: str, overrides: list[str]) -> Any:
    """The recipe of a file or a name, with the overrides over it."""
    from .configuration import load
    from .recipe import Recipe

    path = Path(name)
    if not path.suffix and not path.exists():
        path = RECIPES / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"there is no recipe {name!r}; give a YAML file, or one of\n{_recipes()}".rstrip())
    return load(Recipe, path, overrides)


def _train(args: argparse.Namespace, recipe: Any) -> int:
    from transformers.utils import logging

    from ..allocator import keep_freed_memory
    from .engine import TrainingFailed, train
    from .ranks import join
    from .update import OutOfMemory

    logging.disable_progress_bar()  # a run has one bar, its own
    keep_freed_memory()
    parallel = recipe.parallel
    sharded = parallel.kind == "fsdp"
    try:
        with join(
            device=recipe.compute.device, timeout=parallel.timeout, sharded=sharded, replicas=parallel.replicas
        ) as ranks:
            which = _checkpoint(args.checkpoint)
            return train(recipe, ranks, fresh=args.fresh, profile=args.profile, which=which).status
    except (TrainingFailed, OutOfMemory) as error:
        print(f"twostep train: {error}", file=sys.stderr)
        return FAILED


def _checkpoint(text: str | None) -> int | Path | None:
    if text is None:
        return None
    return int(text) if text.isdecimal() else Path(text)


def _recipes() -> str:
    """The recipes of the package, with the first line of what each says of itself."""
    rows = []
    for path in sorted(RECIPES.glob("[!_]*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        rows.append(f"  {path.stem:32} {first}\n")
    return "".join(rows)


def _keys() -> str:
    from .configuration import describe
    from .recipe import Recipe

    return describe(Recipe)
