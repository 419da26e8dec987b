"""What a run ran on: versions, commit and command line, to stand beside its configuration."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def environment() -> dict[str, Any]:
    """Versions (None: not installed) and the command line; `git` of the folder that the run was started in, and
    `twostep_git` of the checkout that twostep runs from (None: there is no repository). It never raises."""
    from twostep.version import __version__

    return {
        "python": platform.python_version(),
        "twostep": __version__,
        **{name: _version(name) for name in LIBRARIES},
        "git": _repository(Path.cwd()),
        "twostep_git": _repository(Path(__file__).resolve().parent, holds="train/environment.py"),
        "command": [str(word) for word in getattr(sys, "orig_argv", sys.argv)],
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # damaged metadata too: a version that cannot be told must not stop a run
        return None


def _repository(folder: Path, holds: str | None = None) -> dict[str, Any] | None:
    """Commit and dirty flag of the repository around a folder; untracked files do not make it dirty. One that does not
    track `holds` is another's: of an environment with installed packages, for instance."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or (holds is not None and not _git(folder, "ls-files", f":/{holds}")):
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # `status` would otherwise refresh, and write, the index
    try:
        words = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, env=quiet, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
