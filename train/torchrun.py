"""What torchrun tells a process of its place among the ranks, by the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local: int  # among the ranks of this machine: which of its GPUs is this one's


def place() -> Place:
    """Rank 0 of 1 without torchrun; ValueError where several ranks have no way to find each other."""
    found = Place(_number("RANK", 0), world_size(), _number("LOCAL_RANK", 0))
    if found.rank >= found.world_size:
        raise ValueError(
            f"the environment's RANK is {found.rank} and its WORLD_SIZE {found.world_size}; torchrun sets both"
        )
    if found.world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {found.world_size} and MASTER_ADDR is not set; start several ranks with torchrun"
        )
    return found


def world_size() -> int:
    return _number("WORLD_SIZE", 1, least=1)


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(
            f"the environment's {name} is {text!r}, expected a whole number from {least} on; torchrun sets it"
        )
    return int(text)
