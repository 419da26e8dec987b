"""A tree of YAML read against a schema: every fault is collected with its place, none ends the reading."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .schema import MISSING, called, default_of, fields, is_dataclass, kinds, members, rows, tagged
from .suggest import did_you_mean, one_of
from .yaml_tree import OVERRIDE, Node, Place, described, exponent_as_float

INVALID: Any = object()  # stands for a value that has been reported already


class Reader:
    def __init__(self, schema: type, problems: list[str]) -> None:
        self.problems = problems
        self.places: dict[str, list[str]] = {}  # a key's name -> everywhere in the schema where it is one
        for row in rows(schema):
            where = row.path if row.kind is None else f"{row.path} (kind {row.kind!r})"
            self.places.setdefault(row.path.rpartition(".")[2], []).append(where)

    def report(self, place: Place, path: str, text: str) -> Any:
        self.problems.append(f"{place}: {path}: {text}" if path else f"{place}: {text}")
        return INVALID

    def read(self, hint: Any, node: Node, path: str, default: Any = MISSING) -> Any:
        """The value of `node`; a mapping that gives some keys of a dataclass takes the others from `default`."""
        if isinstance(node.value, dict):
            return self._mapping(hint, node, path, default)
        if isinstance(node.value, list):
            return self._list(hint, node.value, node, path)
        return self._scalar(hint, node, path)

    def _wrong(self, hint: Any, node: Node, path: str) -> Any:
        words = [word for member in members(hint) if get_origin(member) is Literal for word in get_args(member)]
        text = f"given {described(node.value)}; {_hint(node, words)}accepted: {called(hint)}"
        if str in members(hint) and isinstance(node.value, (bool, int, float)):
            text += "; put quotes around it to make it text"
        elif isinstance(node.value, str) and {bool, int, float} & set(members(hint)) and _looks_plain(node.value):
            text += "; without quotes"
        return self.report(node.place, path, text)

    # Scalars

    def _scalar(self, hint: Any, node: Node, path: str) -> Any:
        value = node.value
        for member in members(hint):  # what it is already, before what it could be taken for
            if member is type(None) and value is None:
                return None
            if get_origin(member) is Literal and any(type(value) is type(w) and value == w for w in get_args(member)):
                return value
            if member in (bool, int, float, str) and type(value) is member:
                return self._number(value, node, path) if member is float else value
        for member in members(hint):
            if member is Path and isinstance(value, (str, Path)):
                if value == "":
                    return self.report(node.place, path, "given '' (str); accepted: a path that is not empty")
                return Path(os.path.expanduser(value) if isinstance(value, str) else value)
            if member is float and type(value) is int:
                return self._float_of_int(value, node, path)
            if member is float and (number := exponent_as_float(value)) is not None:
                return number
        return self._wrong(hint, node, path)

    def _number(self, value: Any, node: Node, path: str) -> Any:
        return self.report(node.place, path, "given nan; accepted: a number") if math.isnan(value) else value

    def _float_of_int(self, value: int, node: Node, path: str) -> Any:
        try:
            return float(value)
        except OverflowError:
            return self.report(node.place, path, f"given {described(value)}; too large for a float")

    # Lists and mappings

    def _list(self, hint: Any, items: list[Node], node: Node, path: str) -> Any:
        target = next((member for member in members(hint) if get_origin(member) in (list, tuple)), None)
        if target is None:
            return self._wrong(hint, node, path)
        args = get_args(target)
        fixed = get_origin(target) is tuple and args[-1] is not Ellipsis
        if fixed and len(items) != len(args):
            return self.report(node.place, path, f"given a list of {len(items)}; accepted: {called(target)}")
        types = args if fixed else (args[0],) * len(items)
        values = [self.read(t, item, f"{path}[{i}]") for i, (t, item) in enumerate(zip(types, items, strict=True))]
        if any(value is INVALID for value in values):
            return INVALID
        return tuple(values) if get_origin(target) is tuple else values

    def _mapping(self, hint: Any, node: Node, path: str, default: Any) -> Any:
        if choice := tagged(hint):
            return self._tagged(choice, hint, node, path, default)
        for member in members(hint):
            if is_dataclass(member):
                return self._dataclass(member, node, path, default)
            if get_origin(member) is dict:
                return self._names(get_args(member)[1], node, path)
        return self._wrong(hint, node, path)

    def _names(self, hint: Any, node: Node, path: str) -> Any:
        assert isinstance(node.value, dict)
        values = {name: self.read(hint, item, f"{path}.{name}") for name, item in node.value.items()}
        return INVALID if any(value is INVALID for value in values.values()) else values

    def _tagged(self, choice: dict[str, type], hint: Any, node: Node, path: str, default: Any) -> Any:
        assert isinstance(node.value, dict)
        kind = node.value.get("kind")
        accepted = f"accepted: {one_of([repr(name) for name in choice])}"
        here = f"{path}.kind" if path else "kind"
        if kind is None:
            if type(default) in choice.values():
                return self._dataclass(type(default), node, path, default)
            return self.report(node.place, here, f"missing; {accepted}")
        if not isinstance(kind.value, str) or kind.value not in choice:
            return self.report(kind.place, here, f"given {described(kind.value)}; {_hint(kind, choice)}{accepted}")
        return self._dataclass(choice[kind.value], node, path, default)

    # Dataclasses

    def _dataclass(self, cls: type, node: Node, path: str, default: Any) -> Any:
        assert isinstance(node.value, dict)
        given = node.value
        faulty = self._unknown(cls, given, path)
        values: dict[str, Any] = {}
        for name, (field, hint) in fields(cls).items():
            here = f"{path}.{name}" if path else name
            # A section's own default counts only where it is of the class that is being read.
            fallback = getattr(default, name) if type(default) is cls else default_of(field)
            if name in given:
                values[name] = self.read(hint, given[name], here, fallback)
            elif fallback is not MISSING:
                values[name] = fallback
                faulty |= self._contradicts(fallback, node.place, here)
            else:
                about = field.metadata.get("help")
                text = f"missing; accepted: {called(hint)}{f' ({about})' if about else ''}"
                values[name] = self.report(node.place, here, text)
        if faulty or any(value is INVALID for value in values.values()):
            return INVALID
        try:
            made = cls(**values)
        except ValueError as error:
            return self.report(node.place, path, str(error))
        return INVALID if self._check(made, node.place, path) else made

    def _unknown(self, cls: type, given: dict[str, Node], path: str) -> bool:
        """Whether `given` has keys that the dataclass lacks; they are reported."""
        known = fields(cls)
        unknown = {name: node for name, node in given.items() if name not in known}
        kind = given.get("kind")
        stale: dict[str, Node] = {}
        if kind is not None and kinds(cls):
            stale = {name: node for name, node in unknown.items() if node.place.layer < kind.place.layer}
            self._stale(stale, kind, path)
        for name, node in unknown.items():
            if name in stale:
                continue
            elsewhere = [where for where in self.places.get(name, []) if where != f"{path}.{name}".lstrip(".")]
            hinted = f"it is a key at {one_of(elsewhere)}; " if elsewhere else did_you_mean(name, known)
            here = f"{path}.{name}" if path else name
            accepted = ", ".join(known) or "no key"
            self.report(node.place, here, f"unknown key; {hinted}accepted: {accepted}")
        return bool(unknown)

    def _stale(self, stale: dict[str, Node], kind: Node, path: str) -> None:
        """Keys that were meant for the kind which a layer above has replaced."""
        if not stale:
            return
        names = ", ".join(f"{name} ({node.place})" for name, node in stale.items())
        change = f"replace the whole section: {path}={{kind: {kind.value}, ...}}"
        if kind.place.layer != OVERRIDE:
            change = f"write  {path}: !replace  to leave out all that stands below"
        text = f"{kind.value!r} has no {names}, given for the kind before; {change}"
        self.report(kind.place, f"{path}.kind" if path else "kind", text)

    def _check(self, made: Any, place: Place, path: str) -> bool:
        """Whether the dataclass contradicts itself, by its own `check`; reported."""
        found: Sequence[str] = list(made.check()) if callable(getattr(made, "check", None)) else []
        for text in found:
            self.report(place, path, text)
        return bool(found)

    def _contradicts(self, value: Any, place: Place, path: str) -> bool:
        """`_check` for a default, which was never read: its dataclasses, innermost first."""
        inner: list[tuple[str, Any]] = []
        if isinstance(value, (list, tuple)):
            inner = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, dict):
            inner = [(f"{path}.{name}", item) for name, item in value.items()]
        elif is_dataclass(type(value)):
            inner = [(f"{path}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
        found = [self._contradicts(item, place, here) for here, item in inner]
        return any(found) or self._check(value, place, path)


def _hint(node: Node, accepted: Iterable[Any]) -> str:
    words = [word for word in accepted if isinstance(word, str)]
    return did_you_mean(node.value, words) if isinstance(node.value, str) else ""


def _looks_plain(value: Any) -> bool:
    """Whether the text would be a number or a boolean if it were not in quotes."""
    if value in ("true", "false"):
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True
