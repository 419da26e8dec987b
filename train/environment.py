"""What a run ran on: versions, commit and command line, to stand beside its configuration."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def environment() -> dict[str, Any]:
    """Versions (None: not installed), `git` (None: no repository here) and the command line. It never raises."""
    from twostep.version import __version__

    return {
        "python": platform.python_version(),
        "twostep": __version__,
        **{name: _version(name) for name in LIBRARIES},
        "git": _repository(),
        "command": [str(word) for word in getattr(sys, "orig_argv", sys.argv)],
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # damaged metadata too: a version that cannot be told must not stop a run
        return None


def _repository() -> dict[str, Any] | None:
    """Commit and dirty flag of the repository around the working folder; untracked files do not make it dirty."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # `status` would otherwise refresh, and write, the index
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, env=quiet, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
