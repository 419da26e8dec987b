"""Where a model lies, a folder or a repository of the hub, and whether what was loaded from there is all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def folder_or_hub_id(place: str | Path, who: str) -> Path | str:
    """A folder that is there, or "owner/name"; ValueError, in the words of `who` asks, for what is neither."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    name = str(place)
    if folder.exists() or isinstance(place, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{who}: {place} {found}; expected a diffusers folder, or a hub id of the form owner/name")
    return name


def check_loaded(report: Mapping[str, Any], who: str, where: str) -> None:
    """ValueError unless the weights were those, and all of those, that the configuration wants."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise ValueError(
                f"{who}: the weights in {where} do not fit its config: {len(names)} {kind.replace('_', ' ')}, for "
                f"instance {', '.join(names[:4])}"
            )
