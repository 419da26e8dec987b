"""The reference table of a schema, made from the schema itself, so that the two cannot disagree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..tables import markdown
from .schema import MISSING, Row, called, check_schema, kinds, rows

HEAD = ("key", "type", "default", "meaning")


def describe(schema: type) -> str:
    """All keys with type, default and `field(metadata={"help": ...})`, as a Markdown table that reads well as text.

    Keys of a tagged union are marked with the kind that has them; what is in a list stands under `name[]`, what is in a
    mapping of names under `name.<name>`.
    """
    check_schema(schema)
    lines = [[_one_line(cell) for cell in _cells(row)] for row in rows(schema)]
    return markdown(HEAD, lines, aligned=True) + "\n"


def _one_line(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def _cells(row: Row) -> tuple[str, str, str, str]:
    key = row.path if row.kind is None else f"{row.path} (kind {row.kind})"
    return key, called(row.hint), _default(row.default), row.help


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        kind = getattr(value, "kind", None) if kinds(type(value)) else None
        return "as below" if kind is None else f"kind {kind}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_default(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_default(item)}' for name, item in value.items())}}}"
    return str(value) if isinstance(value, (str, Path)) and str(value) else repr(value)
