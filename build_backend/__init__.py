"""In-tree build backend: setuptools', plus one thing, that it compiles against the torch which is already installed.

pip builds in an isolated environment, but runs it with the interpreter of the environment it installs into, so that
`sysconfig` still names the user's site-packages. Adding those behind the isolated ones lets the build find torch
without --no-build-isolation and without naming torch as a build requirement, which would fetch another one.

`requires` in pyproject.toml is empty on purpose: the tools are asked for in `get_requires_for_build_*`, after the
check for torch, so that without torch the build stops before anything is downloaded.
"""

from __future__ import annotations

import importlib
import re
import site
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from twostep.toolchain import ToolchainError, TorchFiles, check_torch, find_torch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["setuptools>=77", "ninja>=1.11"]


def installed_site_packages() -> list[str]:
    """Every folder in which `pip install torch` by this interpreter may have put it."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    in_venv = sys.prefix != sys.base_prefix
    if in_venv:
        config = Path(sys.prefix) / "pyvenv.cfg"
        text = config.read_text() if config.is_file() else ""
        if re.search(r"include-system-site-packages\s*=\s*true", text):
            folders += site.getsitepackages([sys.base_prefix])
    else:
        folders += [*site.getsitepackages(), site.getusersitepackages()]
    return list(dict.fromkeys(folders))


def installed_torch() -> TorchFiles:
    """The torch to build against; stops the build with one paragraph where there is none."""
    if find_torch() is None:
        for folder in installed_site_packages():
            site.addsitedir(folder)  # appends, and follows .pth files: a torch installed with `pip install -e` is one
        importlib.invalidate_caches()
    try:
        return check_torch(find_torch(), pinned_torch())
    except ToolchainError as error:
        stop(str(error))


def pinned_torch() -> str:
    """The torch version that constraints.txt pins, which is the one CI tests with."""
    match = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match is not None, "constraints.txt pins no torch"
    return match.group(1)


def stop(message: str) -> NoReturn:
    """End the build with the message alone: SystemExit leaves no traceback above it in pip's report."""
    raise SystemExit(f"\nerror: {message}\n")


def _setuptools() -> ModuleType:
    try:
        from setuptools import build_meta
    except ImportError:
        stop(f"building twostep without build isolation needs  pip install {' '.join(repr(t) for t in TOOLS)}  first")
    return build_meta


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    installed_torch()
    return TOOLS


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    installed_torch()
    return TOOLS


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return TOOLS[:1]


def prepare_metadata_for_build_wheel(folder: str, config_settings: dict[str, Any] | None = None) -> str:
    installed_torch()
    return _setuptools().prepare_metadata_for_build_wheel(folder, config_settings)


def prepare_metadata_for_build_editable(folder: str, config_settings: dict[str, Any] | None = None) -> str:
    installed_torch()
    return _setuptools().prepare_metadata_for_build_editable(folder, config_settings)


def build_wheel(folder: str, config_settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    installed_torch()
    return _setuptools().build_wheel(folder, config_settings, metadata)


def build_editable(folder: str, config_settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    installed_torch()
    return _setuptools().build_editable(folder, config_settings, metadata)


def build_sdist(folder: str, config_settings: dict[str, Any] | None = None) -> str:
    return _setuptools().build_sdist(folder, config_settings)
