"""twostep: turn a multi-step text-to-image flow transformer into a two-step one.

Importing this loads neither torch nor the compiled kernels; the parts (``twostep.ops``, ...) are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from twostep.version import __version__

__all__ = ["__version__"]

_PARTS = ("ops", "zoo", "losses", "train", "evaluate", "export")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        try:
            return importlib.import_module(f"twostep.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"twostep.{name}":
                raise
    raise AttributeError(f"module 'twostep' has no attribute {name!r}")
