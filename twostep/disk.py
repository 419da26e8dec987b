"""Disk space: asked for before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path


def size_text(count: int) -> str:
    """Bytes as people read them: 1536 is "1.5 KiB"."""
    if count < 1024:
        return f"{count} bytes"
    size, units = float(count), ("KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        size /= 1024
        if size < 1023.95 or unit == units[-1]:
            break
    return f"{size:.1f} {unit}"


def free_space(folder: Path) -> int:
    """What is free where the folder is, or will be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """ValueError, naming both numbers, if that much will not fit."""
    free = free_space(folder)
    if needed > free:
        raise ValueError(
            f"{what}: {size_text(needed)} ({needed} bytes) are to be written to {folder}, and {size_text(free)} "
            f"({free} bytes) are free there; free some, choose another disk, or write less"
        )
