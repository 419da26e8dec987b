"""Who may import whom: docs/architecture.md's one direction, asked of every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a part may import beside itself and the modules that lie in twostep/ alone, which know no part.
MAY: dict[str, set[str]] = {
    "ops": set(),
    "losses": set(),
    "zoo": {"ops"},
    "evaluate": {"ops", "zoo"},
    "train": {"ops", "losses", "zoo", "evaluate"},
    "export": {"ops", "zoo"},
}
COMMANDS = {"evaluate/command.py", "export/command.py"}  # of the command line, which imports all
COMMAND_LINE = {"__init__", "__main__", "cli", "demo", "doctor", "plan", "sample", "web"}


def part_of(module: str) -> str | None:
    """`twostep.zoo.fuse` is zoo's; `twostep.durable` is no part's."""
    words = module.split(".")
    return words[1] if words[0] == "twostep" and len(words) > 1 and words[1] in MAY else None


def imports(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


def edges(folder: Path, package: str) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        within = path.relative_to(folder)
        inside = ".".join([package, *within.parent.parts])
        for module in imports(path, inside):
            if (target := part_of(module)) is not None:
                yield path.relative_to(ROOT).as_posix(), target


@pytest.mark.parametrize("part", MAY)
def test_a_part_imports_what_it_may(part: str) -> None:
    folder = ROOT / "twostep" / "ops" if part == "ops" else ROOT / part
    found = list(edges(folder, f"twostep.{part}"))
    assert part == "losses" or any(target == part for _, target in found)  # relative imports are followed
    wrong = [(path, target) for path, target in found if target not in MAY[part] | {part} and path not in COMMANDS]
    assert not wrong


def test_what_lies_in_twostep_alone_knows_no_part() -> None:
    for path in sorted((ROOT / "twostep").glob("*.py")):
        if path.stem not in COMMAND_LINE:
            assert not [module for module in imports(path, "twostep") if part_of(module)], path
