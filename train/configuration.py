"""A run's configuration: dataclasses say what there is to set, YAML files and `key=value` overrides set it.

    config = load(Recipe, Path("recipe.yaml"), ["method.inherit=0.1", "lora=null"])

Strict: an unknown, missing, contradictory or wrongly typed key is an error with its file and line, and all errors of a
configuration are reported at once. A file may say `extends: other.yaml`, relative to itself; its keys lie over the
other's. A dataclass may have `check(self) -> Iterable[str]`, which yields its contradictions.

The types a schema may use are in `schema.py`, the rules of layers and YAML in `yaml_tree.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .describe import describe
from .environment import environment
from .reader import INVALID, Reader
from .schema import check_schema
from .yaml_tree import BASE, FIRST_FILE, Node, Place, described, from_mapping, merge, override, parse, to_yaml

__all__ = ["ConfigurationError", "describe", "dump", "environment", "load", "resolved"]

T = TypeVar("T")


class ConfigurationError(ValueError):
    """Everything that is wrong with a configuration: `problems` has one line for each fault."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        head = [] if len(problems) == 1 else [f"the configuration has {len(problems)} faults:"]
        super().__init__("\n".join([*head, *problems]))


def load(
    schema: type[T],
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    base: Mapping[str, Any] | None = None,
) -> T:
    """Reads a configuration: `base`, with the file laid over it, with the overrides laid over that.

    Args:
        schema: the dataclass to make.
        path: a YAML file, or None for a configuration of defaults and overrides alone.
        overrides: `key=value` or `section.key=value`, the value in YAML; a later one wins.
        base: what the file builds on, for example the settings of a preset.

    Raises ConfigurationError, with all faults, and TypeError where the schema itself has a type that cannot be read.
    """
    check_schema(schema)
    problems: list[str] = []
    root = Node({}, Place("the configuration"))
    if base is not None:
        root = merge(root, from_mapping(base, "base", problems))
    if path is not None:
        root = merge(root, _read_chain(Path(path), problems))
    for text in overrides:
        root = override(root, text, problems)
    value = Reader(schema, problems).read(schema, root, "")
    if problems:
        raise ConfigurationError(problems)
    assert value is not INVALID
    return value


def _read_chain(path: Path, problems: list[str]) -> Node:
    """The file with all that it extends merged below it. Without a tree to go on with, the faults so far are raised."""
    files: list[tuple[Path, dict[str, Node]]] = []
    seen: dict[Path, Path] = {}
    asked: Place | None = None
    while True:
        if path.resolve() in seen:
            chain = " -> ".join(str(p) for p in [*seen.values(), path])
            raise ConfigurationError([*problems, f"{asked}: extends: goes in a circle: {chain}"])
        seen[path.resolve()] = path
        entries = _read_file(path, asked, problems)
        files.append((path, entries))
        extends = entries.pop("extends", None)
        if extends is None:
            break
        if not isinstance(extends.value, str) or not extends.value:
            text = f"{extends.place}: extends: given {described(extends.value)}; accepted: a file, relative to this one"
            raise ConfigurationError([*problems, text])
        asked, path = extends.place, path.parent / extends.value
    root = Node({}, Place(str(path)))
    for layer, (file, entries) in enumerate(reversed(files), FIRST_FILE):
        root = merge(root, _in_layer(Node(entries, Place(str(file))), layer))
    return root


def _read_file(path: Path, asked: Place | None, problems: list[str]) -> dict[str, Node]:
    by = "" if asked is None else f"{asked}: extends: "
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError([*problems, f"{by}{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigurationError([*problems, f"{by}{path}: not UTF-8: {error.reason} at byte {error.start}"]) from None
    node = parse(text, str(path), BASE, problems)
    if node is None:
        raise ConfigurationError(problems)
    if node.value is None:
        return {}
    if not isinstance(node.value, dict):
        raise ConfigurationError([*problems, f"{node.place}: given {described(node.value)}; accepted: a mapping"])
    return node.value


def _in_layer(node: Node, layer: int) -> Node:
    """The tree of a file, once it is known how many files it builds on."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _in_layer(item, layer) for key, item in value.items()}
    elif isinstance(value, list):
        value = [_in_layer(item, layer) for item in value]
    return Node(value, dataclasses.replace(node.place, layer=layer), node.replaces)


def resolved(config: Any) -> dict[str, Any]:
    """The whole configuration, defaults included, as dicts, lists, text and numbers for JSON or YAML.

    An infinite float stays one: YAML writes it as `.inf`, Python's json as `Infinity`.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"resolved: given {type(config).__name__}, expected a configuration (a dataclass)")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return resolved(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):  # what is read again as this very path, and no home
        return f"./{value}" if str(value).startswith("~") else str(value)
    return value


def dump(config: Any, path: Path) -> None:
    """Writes `resolved(config)` as YAML; `load(type(config), path)` gives an equal configuration."""
    Path(path).write_text(to_yaml(resolved(config)), encoding="utf-8", newline="\n")
