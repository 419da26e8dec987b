"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def target_of(out: str | Path, overwrite: bool) -> Path:
    target = Path(out).expanduser().absolute()
    if target.exists() and not overwrite:
        raise ValueError(f"export: {target} is there already; give another folder, or --overwrite")
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """What is written into it becomes `target`, in the place of what was there; an error leaves all as it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield new
        new.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def check_space(where: Path, needed: int) -> None:
    where = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(where).free
    if needed > free:
        raise ValueError(
            f"export: {needed / 2**30:.1f} GiB are to be written to {where}, where {free / 2**30:.1f} are free"
        )


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
