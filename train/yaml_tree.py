"""YAML as a tree that remembers where everything stands, so that an error about a value can name its line.

Scalars follow YAML 1.2's core schema, in which `1e-5` is a number, and `no`, `on` and `1:30` are text; PyYAML's own
rules are those of 1.1, in which they are text, booleans and a number in base 60. Nothing in a file can name a Python
object: PyYAML composes the nodes, and this file alone makes values of them.

Layers lie one over another: a mapping, the files of a chain of `extends`, the overrides of a command line. A mapping is
merged key by key with the one below it; a list or a scalar replaces it, and so does a mapping tagged `!replace`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml  # type: ignore[import-untyped]

# A layer's number says which of two places was written over the other.
BASE, FIRST_FILE, OVERRIDE = 0, 1, 1_000_000

Scalar = None | bool | int | float | str | Path
Value = Scalar | list["Node"] | dict[str, "Node"]


@dataclass(frozen=True)
class Place:
    source: str  # a file, "override a.b=c", or what else was read
    line: int | None = None
    layer: int = BASE

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Node:
    value: Value
    place: Place  # of a mapping's value: the line of its key
    replaces: bool = False  # the mapping below is not merged with this one


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RULES = {
    "tag:yaml.org,2002:null": re.compile(r"~|null|Null|NULL|"),
    "tag:yaml.org,2002:bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "tag:yaml.org,2002:int": _INT,
    "tag:yaml.org,2002:float": _FLOAT,
}
_TEXT = "tag:yaml.org,2002:str"


def _resolvers() -> dict[Any, list[tuple[str, re.Pattern[str]]]]:
    # None: tried whatever a scalar begins with. PyYAML matches from the start only, hence the end.
    return {None: [(tag, re.compile(f"(?:{rule.pattern})\\Z")) for tag, rule in _RULES.items()]}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what either version of YAML would read as something other than text, so that both read it alike."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {**yaml.SafeDumper.yaml_implicit_resolvers, **_resolvers()}

    def ignore_aliases(self, data: Any) -> bool:
        return True  # equal values are written out, not written once and pointed at


def _text(dumper: Any, text: str) -> Any:
    # PyYAML takes U+0085 and the like for text that may stand as it is, and reads them as line breaks.
    return dumper.represent_scalar(_TEXT, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


def to_yaml(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def parse(text: str, source: str, layer: int, problems: list[str], *, lines: bool = True) -> Node | None:
    """The tree of one YAML document; None, with problems added, where there is none to be had."""
    try:
        top = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problems.append(_syntax(error, source, lines))
        return None
    if top is None:
        return Node(None, Place(source, layer=layer))
    before = len(problems)
    node = _Converter(source, layer, problems, lines).convert(top, top.start_mark.line + 1)
    return node if len(problems) == before else None


def _syntax(error: yaml.YAMLError, source: str, lines: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    where = Place(source, mark.line + 1 if mark is not None and lines else None)
    text = f"{where}: not YAML: {what}{f' ({context})' if context else ''}"
    return text if lines else f"{text}; put quotes around text that has a meaning in YAML"


class _Converter:
    def __init__(self, source: str, layer: int, problems: list[str], lines: bool) -> None:
        self.source, self.layer, self.problems, self.lines = source, layer, problems, lines
        self.open: set[int] = set()
        self.done: dict[int, Value] = {}

    def place(self, line: int) -> Place:
        return Place(self.source, line if self.lines else None, self.layer)

    def convert(self, node: Any, line: int) -> Node:
        replaces = isinstance(node, yaml.MappingNode) and node.tag == "!replace"
        if id(node) in self.open:
            self.problems.append(f"{self.place(line)}: the alias contains itself")
            return Node(None, self.place(line))
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = self._value(node)
            self.open.remove(id(node))
        return Node(self.done[id(node)], self.place(line), replaces)

    def _value(self, node: Any) -> Value:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line)
        plain = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != f"tag:yaml.org,2002:{plain}" and not (plain == "map" and node.tag == "!replace"):
            self._tag(node, line)
        if plain == "seq":
            return [self.convert(item, item.start_mark.line + 1) for item in node.value]
        return self._mapping(node)

    def _mapping(self, node: Any) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._scalar(key_node, line) if isinstance(key_node, yaml.ScalarNode) else key_node.value
            if not isinstance(key, str):
                self.problems.append(f"{self.place(line)}: the key {described(key)} is not text; put it in quotes")
            elif key == "<<":
                self.problems.append(f"{self.place(line)}: merge keys (<<) are not read; use extends: other.yaml")
            elif key in entries:
                first = entries[key].place
                at = f" (first on line {first.line})" if self.lines else ""
                self.problems.append(f"{self.place(line)}: {key}: given twice{at}; keep one")
            else:
                entries[key] = self.convert(value_node, line)
        return entries

    def _scalar(self, node: Any, line: int) -> Scalar:
        tag, text = node.tag, node.value
        if tag == _TEXT:
            return str(text)
        if tag not in _RULES or not _RULES[tag].fullmatch(text):
            self._tag(node, line)
            return None
        if tag.endswith("null"):
            return None
        if tag.endswith("bool"):
            return bool(text.lower() == "true")
        try:
            return _int(text) if tag.endswith("int") else float(re.sub(r"\.(?=[iInN])", "", text))
        except ValueError:  # Python reads no more than some thousand digits
            self.problems.append(f"{self.place(line)}: a number of {len(text)} digits")
            return None

    def _tag(self, node: Any, line: int) -> None:
        self.problems.append(
            f"{self.place(line)}: the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not read here; accepted: "
            "plain text, numbers, true, false, null, lists, mappings, and !replace before a mapping"
        )


def _int(text: str) -> int:
    return int(text[2:], 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text, 10)


def exponent_as_float(value: object) -> float | None:
    """The number in text such as "1e-5", which readers of YAML 1.1 hand on as text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value) and _FLOAT.fullmatch(value):
        return float(value)
    return None


def described(value: object) -> str:
    """A value as an error names it: what it is, and what it looks like."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    return f"{text} ({type(value).__name__})"


def from_mapping(value: object, source: str, problems: list[str], path: str = "") -> Node:
    """The tree of a mapping that is Python's already."""
    place = Place(source)
    if isinstance(value, Mapping):
        entries = {}
        for key, item in value.items():
            if not isinstance(key, str):
                problems.append(f"{place}: {path or 'top'}: the key {described(key)} is not text")
                continue
            entries[key] = from_mapping(item, source, problems, f"{path}.{key}" if path else key)
        return Node(entries, place)
    if isinstance(value, (list, tuple)):
        return Node([from_mapping(item, source, problems, f"{path}[{i}]") for i, item in enumerate(value)], place)
    if value is None or isinstance(value, (bool, int, float, str, Path)):
        return Node(value, place)
    problems.append(f"{place}: {path}: a {type(value).__name__} is not read; accepted: numbers, text, lists, mappings")
    return Node(None, place)


def merge(lower: Node, upper: Node) -> Node:
    """`upper` laid over `lower`."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict) or upper.replaces:
        return upper
    entries = dict(lower.value)
    for key, node in upper.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return replace(upper, value=entries)


def override(root: Node, text: str, problems: list[str]) -> Node:
    """`root` with one `a.b.c=value` of a command line put in; the value is YAML and replaces what was there."""
    source = f"override {text}"
    path, equals, given = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        problems.append(f"{source}: expected key=value or section.key=value")
        return root
    value = parse(given, source, OVERRIDE, problems, lines=False)
    return root if value is None else _put(root, keys, 0, value, problems)


def _put(node: Node, keys: Sequence[str], depth: int, value: Node, problems: list[str]) -> Node:
    if depth == len(keys):
        return value
    entries: dict[str, Node] = {}
    if isinstance(node.value, dict):
        entries = dict(node.value)
    elif node.value is not None:
        path = ".".join(keys[:depth])
        where = "" if node.place.layer == OVERRIDE else f" at {node.place}"
        problems.append(f"{value.place}: {path} is {described(node.value)}{where}; replace it whole: {path}=...")
        return node
    place = node.place if isinstance(node.value, dict) else value.place
    below = entries.get(keys[depth], Node(None, value.place))
    entries[keys[depth]] = _put(below, keys, depth + 1, value, problems)
    return Node(entries, place)
