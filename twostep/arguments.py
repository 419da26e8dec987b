"""Arguments that several commands take alike, and how a command ends: its exit status, and what it says of faults."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FAULT, FAILED, INTERRUPTED = 2, 1, 130  # what was asked for is wrong; it could not be done; Ctrl-C, as shells have it
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a write says without a name


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


def usable_device(wanted: str | torch.device | None, name: str, local: int | None = None) -> torch.device:
    """The device of this name, which must be there; None: a GPU where there are any, else the CPU.

    Args:
        local: the GPU that is this process's, for "cuda" alone; None: torch's current one.
    """
    import torch

    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"{name} is {str(wanted)!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is {str(wanted)!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError(f"{name} is {str(wanted)!r}, and torch {torch.__version__} sees no GPU; `twostep doctor`")
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if local is None else local)
        if device.index >= count:
            raise ValueError(f"{name} is {str(wanted)!r}, here {device}, and torch sees {count} GPUs, from cuda:0 on")
    return device


def system_fault(error: OSError, folder: Path | None) -> str:
    """What a command says of it; a disk's fault, which has no name of its own, is of the folder that is written."""
    if error.errno is None:
        return str(error)
    where = folder if error.filename is None and error.errno in DISK else error.filename
    place = "" if where is None else f"{where}: "
    return f"{place}{error.strerror}; once that is mended the same command goes on"


def answered(
    command: str,
    work: Callable[[], int],
    *,
    out: Path | None = None,
    kept: str = "the same command goes on",
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """The exit status of a command's work; a line on stderr says what ended it early.

    Args:
        out: the folder that it writes.
        kept: what is left of it, and what to do, where it is interrupted.
        failures: what the work itself raises where it was asked for rightly, and fails.
    """

    def said(text: str) -> None:
        # A function of the library names itself, and under this name it is the command.
        for name in (f"twostep {command}: ", f"{command}: "):
            text = text.removeprefix(name)
        print(f"twostep {command}: {text}", file=sys.stderr)

    try:
        return work()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        said(f"interrupted; {kept}")
        return INTERRUPTED
    except failures as error:
        said(str(error))
        return FAILED
    except ValueError as error:
        said(str(error))
        return FAULT
    except OSError as error:
        said(system_fault(error, out))
        return FAILED
