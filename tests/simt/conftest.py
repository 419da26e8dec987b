"""The emulated device, built from csrc as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .launchers import Emulator

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "simt"


def simt_build() -> ModuleType:
    """csrc/simt/build.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("twostep_simt_build", ROOT / "csrc" / "simt" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules["twostep_simt_build"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    return simt_build()


@pytest.fixture(scope="session")
def emulator(builder: ModuleType) -> Emulator:
    return Emulator(builder.load(builder.build(CACHE)))
