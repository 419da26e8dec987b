"""Weights that were saved as a variant: diffusion_pytorch_model.fp16.safetensors, whole or in shards."""

from __future__ import annotations

import re
from pathlib import Path

_SHARD = r"(?:-\d+-of-\d+)?"


def variant_of(folder: Path, stem: str = "diffusion_pytorch_model") -> str | None:
    """The one variant that a folder holds, to be asked for by name; None where its weights have the usual names."""
    plain = re.compile(rf"{stem}{_SHARD}\.safetensors")
    other = re.compile(rf"{stem}{_SHARD}\.(?P<variant>[^.]+?){_SHARD}\.safetensors")
    names = [path.name for path in folder.glob(f"{stem}*.safetensors")]
    if any(plain.fullmatch(name) for name in names):
        return None
    found = sorted({match["variant"] for name in names if (match := other.fullmatch(name))})
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds the weights as the variants {', '.join(found)} and none without a variant's name: leave "
            f"one of them there"
        )
    return found[0] if found else None
