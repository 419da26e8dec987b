"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

A file is written under a hidden name of its own, `.<name>.tmp-<random>`, and renamed when it is on the disk. A folder
is filled under a temporary name, and renamed when every byte is on the disk. A rename is one step to every reader, and
survives a power cut once the folder above it is synced. The filler holds a lock (flock) on its temporary folder; the
kernel releases it at death of any kind, so a temporary folder that can be locked is a dead process's, whatever
container or reused process number it came from.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY, ASIDE = ".tmp-", ".old-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """Where to write a file, which becomes `path` at the end, in the place of what was there. An error leaves that.

    Args:
        alone: nobody else writes it meanwhile: what killed processes have left of it goes.
    """
    if alone:
        clear_leftovers(path)
    new = path.with_name(f".{path.name}{TEMPORARY}{secrets.token_hex(4)}")
    try:
        yield new
        sync(new)
        os.replace(new, path)
        sync_folder(path.parent)
    finally:
        new.unlink(missing_ok=True)


def clear_leftovers(path: Path) -> None:
    """Removes what killed processes had written of the file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY}*"):
        left.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and TEMPORARY in path.name


def sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last; without it a power cut may forget a file that is itself on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock; False where another process holds it, or the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            # Locked, but perhaps just renamed or removed by the one who had the lock before.
            yield folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder))
    finally:
        os.close(handle)


@contextmanager
def sole(folder: Path, doing: str) -> Iterator[None]:
    """ValueError if another process is `doing` something in this folder; made if it is not there. A file system
    without locks cannot tell."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is {doing} here; let it end, or take another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        yield
    finally:
        os.close(handle)


@contextmanager
def temporary(parent: Path, name: str) -> Iterator[Path]:
    """A new locked folder `.tmp-<name>-<pid>` in `parent`; what is left under that name at the end is removed."""
    folder = parent / f"{TEMPORARY}{name}-{os.getpid()}"
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with locked(folder) as held:
            if held or folder.exists():  # a file system without locks loses only the removal of leftovers
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


def publish(folder: Path, final: Path) -> None:
    """Renames the filled `folder` to `final`; what stood there before stands under `folder` afterwards, or is gone."""
    if not final.exists():
        os.rename(folder, final)
    elif not _exchange(folder, final):
        # Two steps: a death between them leaves the old one aside, and `recover` puts it back.
        aside = final.with_name(f"{ASIDE}{final.name}")
        with locked(final):
            os.rename(final, aside)
            try:
                os.rename(folder, final)
            except OSError:
                os.rename(aside, final)
                raise
            sync_folder(final.parent)
            shutil.rmtree(aside)
    sync_folder(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, where kernel and file system can (Linux; ext4, xfs, btrfs, tmpfs; not NFS)."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(folder: Path) -> None:
    """Removes a folder; to every reader it is gone in one step."""
    doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}-{os.getpid()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(parent: Path, name: str | None = None) -> None:
    """Removes what dead processes left in `parent`, and puts back what one of them had only just set aside.

    Args:
        name: of the folder that they were making; None: of any, where `parent` is ours alone.
    """
    if not os.access(parent, os.W_OK):
        return
    one = None if name is None else glob.escape(name)
    for folder in parent.glob(f"{ASIDE}{one or '*'}"):
        final = parent / folder.name.removeprefix(ASIDE)
        with suppress(FileNotFoundError), locked(folder) as dead:
            if dead and final.exists():
                shutil.rmtree(folder, ignore_errors=True)
            elif dead:
                os.rename(folder, final)
    for folder in parent.glob(f"{TEMPORARY}*" if one is None else f"{TEMPORARY}{one}-*"):
        with suppress(FileNotFoundError, NotADirectoryError), locked(folder) as dead:
            if dead:
                shutil.rmtree(folder, ignore_errors=True)
