"""A folder that is there whole or not at all, and what must not be overwritten by it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..durable import publish, recover, temporary


def target_of(out: str | Path, overwrite: bool, *sources: Path) -> Path:
    """Where the folder is to be, links followed.

    Args:
        sources: what is exported, none of which may lie in the target, or the target in one of them.
    """
    target = Path(out).expanduser().resolve()
    recover(target.parent, target.name)  # from an export that was killed
    if os.path.ismount(target):
        raise ValueError(f"export: {target} is where something is mounted, and cannot be replaced; give a folder in it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"export: {target} is a file; give a folder")
    if target.exists() and not overwrite:
        raise ValueError(f"export: {target} is there already; give another folder, or --overwrite")
    for source in (one.expanduser().resolve() for one in sources):
        if target == source or target in source.parents or source in target.parents:
            raise ValueError(
                f"export: {target} and {source}, which is exported, are in one another; give another folder"
            )
    if target.exists() and any(target.iterdir()) and not (target / "export.json").is_file():
        raise ValueError(
            f"export: {target} holds no export, and --overwrite replaces nothing else; give another folder"
        )
    return target


@contextlib.contextmanager
def new_folder(target: Path, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """What is written into it becomes `target`, in the place of what was there; an error leaves all as it was.

    Args:
        check: raises where the target must not be replaced: what has appeared there meanwhile is somebody's.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with temporary(target.parent, target.name) as new:
            yield new
            check()
            publish(new, target)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of each file and folder in it; none for links."""
    return {
        part.name: bytes_in(part) if part.is_dir() else part.stat().st_size
        for part in sorted(folder.iterdir())
        if not part.is_symlink()
    }
