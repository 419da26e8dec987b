"""What a checkpoint folder says of itself, and whether that is true.

step-00001200/
    manifest.json            written last: format, run, step, world size, signature, metrics, sizes, checksums
    state.json               rank 0's state
    student.safetensors ...  rank 0's parts
    rank-0001/               the same of rank 1, and so on: state.json, *.safetensors
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .state_tree import decode, encode
from .tensor_file import digest

FORMAT, VERSION = "twostep-checkpoint", 1
MANIFEST, STATE, SUFFIX = "manifest.json", "state.json", ".safetensors"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILE = re.compile(rf"(rank-\d{{4,}}/)?{PART.pattern}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or saved, with the reason and what to do."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as its manifest describes it."""

    path: Path
    step: int
    sequence: int  # counts the saves of a store, so that the order survives a return to an earlier step
    run: str
    token: str  # of this one save
    world_size: int
    signature: dict[str, Any]
    metrics: dict[str, float]
    files: dict[str, dict[str, Any]]  # relative name -> bytes, sha256


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def rank_folder(rank: int) -> str:
    """Where a rank's files are, relative to the checkpoint; rank 0's are at its top."""
    return f"rank-{rank:04d}/" if rank else ""


def manifest_bytes(saved: Saved) -> bytes:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "run": saved.run,
        "step": saved.step,
        "sequence": saved.sequence,
        "token": saved.token,
        "world_size": saved.world_size,
        "signature": encode(saved.signature),
        "metrics": encode(saved.metrics),
        "files": saved.files,
    }
    return json.dumps({**content, "sha256": _own_digest(content)}, indent=1).encode("ascii")


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def read_manifest(folder: Path) -> Saved:
    """The checkpoint in `folder`; CheckpointError unless its manifest is whole and all files are there in full size."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    content = _content(folder)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: not a checkpoint of twostep: {MANIFEST} has format {content.get('format')!r}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: has format version {content.get('version')!r}, this twostep reads {VERSION}; "
            "use the twostep that wrote it"
        )
    if content.pop("sha256", None) != _own_digest(content):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: its checksum does not match")
    names = ("step", "sequence", "run", "token", "world_size", "files")
    signature, metrics = decode(content["signature"]), decode(content["metrics"])
    saved = Saved(path=folder, signature=signature, metrics=metrics, **{name: content[name] for name in names})
    named = STEP_FOLDER.fullmatch(folder.name)
    if named is not None and int(named[1]) != saved.step:
        raise CheckpointError(f"{folder}: holds step {saved.step}; it was renamed or copied over another")
    for name, file in saved.files.items():
        _check_size(folder, name, file["bytes"])
    return saved


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint of twostep: it has no {MANIFEST}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder}: not a checkpoint of twostep: {MANIFEST} holds no mapping")
    return content


def _check_size(folder: Path, name: str, expected: int) -> None:
    if not _FILE.fullmatch(name):
        raise CheckpointError(f"{folder}: {MANIFEST} names the file {name!r}, which no checkpoint of twostep has")
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing") from None
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{folder}: {name} is {kind}: it has {size} bytes, {expected} were written")


def verify_files(saved: Saved, names: list[str]) -> None:
    """CheckpointError unless these files have the checksums that they were written with."""
    for name in names:
        if digest(saved.path / name) != saved.files[name]["sha256"]:
            raise CheckpointError(f"{saved.path}: {name} is damaged: its checksum does not match what was written")


def read_state(saved: Saved, rank: int) -> Any:
    """What a rank's state says, verified."""
    name = f"{rank_folder(rank)}{STATE}"
    verify_files(saved, [name])
    return decode(json.loads((saved.path / name).read_bytes()))


def check_signature(saved: Saved, expected: Mapping[str, Any]) -> None:
    """CheckpointError, with the keys that differ and how, unless the checkpoint belongs to `expected`."""
    found = _differences(canonical(saved.signature), canonical(expected), "")
    if found:
        raise CheckpointError(f"{saved.path}: belongs to something else: {'; '.join(found)}")


def canonical(value: Any) -> Any:
    """A signature's JSON, in which lists and tuples are the same."""
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, (list, tuple)) else value


def _differences(stored: Any, expected: Any, path: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(expected, dict):
        found = []
        for key in [*stored, *(key for key in expected if key not in stored)]:
            here = f"{path}.{key}" if path else str(key)
            if key not in expected:
                found.append(f"{here}: {stored[key]!r} in the checkpoint, absent now")
            elif key not in stored:
                found.append(f"{here}: absent in the checkpoint, {expected[key]!r} now")
            else:
                found += _differences(stored[key], expected[key], here)
        return found
    # As text, for 1, 1.0 and true are not the same, and nan is the same as nan.
    same = json.dumps(encode(stored)) == json.dumps(encode(expected))
    return [] if same else [f"{path}: {stored!r} in the checkpoint, {expected!r} now"]
