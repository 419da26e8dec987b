"""A setting that says what it is: `twostep train --keys` prints the sentence."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def told(default: Any, text: str) -> Any:
    """A dataclass's field with a default and a sentence."""
    if isinstance(default, (dict, list)) or hasattr(default, "__dataclass_fields__"):
        return field(default_factory=lambda: default, metadata={"help": text})
    return field(default=default, metadata={"help": text})
