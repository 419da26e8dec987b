"""Where a model lies, a folder or a repository of the hub, and whether what was loaded from there is all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REVISION = re.compile(r"[\w.-]+|refs/[\w./-]+")  # of the hub: a commit, a tag, a branch, or a pull request's


def folder_or_hub_id(place: str | Path, who: str) -> Path | str:
    """A folder that is there, or "owner/name", and maybe "@revision" behind it; ValueError, in the words of `who` asks,
    for what is neither."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    name, revision = repository(str(place))
    revised = revision is None or REVISION.fullmatch(revision)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")) or not revised:
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"{who}: {place} {found}; expected a diffusers folder, or a hub id of the form owner/name or "
            f"owner/name@revision"
        )
    return str(place)


def repository(place: str) -> tuple[str, str | None]:
    """A hub id's "owner/name", and its revision where it has one, as diffusers takes them; a folder is itself."""
    name, at, revision = place.partition("@")
    return (place, None) if not at or Path(place).is_dir() else (name, revision)


def inside(subfolder: str | None, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def fetched(
    place: str | Path, who: str, needed: Sequence[str], also: Sequence[str] = (), revision: str | None = None
) -> Path:
    """A folder that is there; of a hub repository, its place in the cache, where the files of these patterns are now.

    Everything is read from there: off-line as well, and all of it of one commit.

    Args:
        needed: OSError where nothing is of one of these patterns.
        also: taken where it is there.
        revision: of the repository, where the hub id has none.
    """
    found = folder_or_hub_id(place, who)
    if isinstance(found, Path):
        return found
    name, own = repository(found)
    if None not in (own, revision) and own != revision:
        raise ValueError(f"{who}: {place} names a revision, and another is given: {revision}")
    why, revision = "the repository, or what the cache holds of it, has none", own or revision
    try:
        folder, absent = _snapshot(name, revision, needed, also)
    except OSError as error:
        folder, absent, why = Path(), list(needed), str(error)
    if absent:
        raise OSError(
            f"{who}: there is no folder {place} here, and of the hub's {place} there is no {', '.join(absent)}: {why}. "
            f"With a connection:  hf download {name}{f' --revision {revision}' if revision else ''}"
        )
    return folder


def here(place: str | Path, who: str, needed: Sequence[str], also: Sequence[str] = ()) -> Path | None:
    """`fetched` of what is on this machine already; None where that is not everything needed."""
    found = folder_or_hub_id(place, who)
    if isinstance(found, Path):
        folder, absent = found, _absent(found, needed)
    else:
        try:
            folder, absent = _snapshot(*repository(found), needed, also, local_files_only=True)
        except OSError:
            return None
    return None if absent else folder


def _snapshot(
    name: str, revision: str | None, needed: Sequence[str], also: Sequence[str], **more: Any
) -> tuple[Path, list[str]]:
    """The repository's place in the cache, and of which patterns there is nothing: off-line nobody has looked."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*needed, *also], **more))
    return folder, _absent(folder, needed)


def _absent(folder: Path, needed: Sequence[str]) -> list[str]:
    return [pattern for pattern in needed if not any(folder.glob(pattern))]


def check_loaded(report: Mapping[str, Any], who: str, where: str) -> None:
    """ValueError unless the weights were those, and all of those, that the configuration wants."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise ValueError(
                f"{who}: the weights in {where} do not fit its config: {len(names)} {kind.replace('_', ' ')}, for "
                f"instance {', '.join(names[:4])}"
            )
