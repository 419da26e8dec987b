"""Arguments that several commands take alike, and what they say of the system's faults."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a write says without a name


def add_interval(parser: argparse.ArgumentParser, what: str, says: str) -> None:
    """--WHAT-interval LEAST GREATEST, levels sigma; everywhere by default."""
    parser.add_argument(
        f"--{what}-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LEAST", "GREATEST"),
        help=f"{says} (default: 0 1, all)",
    )


def system_fault(error: OSError, folder: Path | None) -> str:
    """What a command says of it; a disk's fault, which has no name of its own, is of the folder that is written."""
    if error.errno is None:
        return str(error)
    where = folder if error.filename is None and error.errno in DISK else error.filename
    place = "" if where is None else f"{where}: "
    return f"{place}{error.strerror}; once that is mended the same command goes on"
