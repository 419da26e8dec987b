"""A headless browser: what a page looks like, and what it becomes once its scripts have run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium (Debian and Ubuntu: apt-get install chromium)"
)


def screenshot(address: str, folder: Path, size: tuple[int, int], budget: int = 5000) -> Path:
    shot = folder / "shot.png"
    _run(address, folder, f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}", budget=budget)
    return shot


def document(address: str, folder: Path, size: tuple[int, int], budget: int = 5000) -> str:
    return _run(address, folder, f"--window-size={size[0]},{size[1]}", "--dump-dom", budget=budget)


def _run(address: str, folder: Path, *more: str, budget: int) -> str:
    """
    Args:
        folder: of the browser's profile.
        budget: milliseconds of the page's own time.
    """
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={budget}"]
    command = [CHROMIUM, *flags, *more, address]
    return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
