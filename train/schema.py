"""The types a configuration may be made of: what they are called, which keys they have, and whether they can be read.

A schema is a dataclass whose fields are `bool`, `int`, `float`, `str`, `Path`, `Literal[...]`, other dataclasses,
`X | None`, `tuple[T, ...]`, `tuple[A, B]`, `list[T]`, `dict[str, T]`, unions of different scalars, and tagged unions:
`Union[A, B]` of dataclasses that each have `kind: Literal["..."]`. A mistake in a schema is a TypeError.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .suggest import one_of

MISSING: Any = dataclasses.MISSING
SCALARS = {bool: "true or false", int: "int", float: "float", str: "text", Path: "path"}


def is_dataclass(hint: object) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@cache
def fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """name -> (field, its type with every reference by name resolved)."""
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def kinds(cls: type) -> tuple[str, ...]:
    """What `kind` may say for this dataclass; nothing where it is not one of a tagged union."""
    hint = fields(cls)["kind"][1] if "kind" in fields(cls) else None
    return get_args(hint) if get_origin(hint) is Literal else ()


def tagged(hint: Any) -> dict[str, type]:
    """kind -> dataclass of a tagged union; empty for everything else, a dataclass by itself included."""
    candidates = [member for member in members(hint) if is_dataclass(member)]
    return {kind: member for member in candidates for kind in kinds(member)} if len(candidates) > 1 else {}


def default_of(field: dataclasses.Field[Any]) -> Any:
    factory: Any = field.default_factory
    return field.default if factory is MISSING else factory()


def called(hint: Any) -> str:
    """What is accepted, in words."""
    names = [_called(member) for member in members(hint) if member is not type(None) and not is_dataclass(member)]
    classes = [member for member in members(hint) if is_dataclass(member)]
    if len(classes) > 1:
        names.append(f"a mapping of kind {one_of([repr(kind) for kind in tagged(hint)])}")
    elif classes:
        names.append("a mapping")
    return one_of(names + ["null"] * (type(None) in members(hint)))


def _called(hint: Any) -> str:
    if hint in SCALARS:
        return SCALARS[hint]
    args = get_args(hint)
    origin = get_origin(hint)
    if origin is Literal:
        words = {None: "null", True: "true", False: "false"}
        return one_of([words[arg] if arg is None or isinstance(arg, bool) else repr(arg) for arg in args])
    if origin is dict:
        return f"a mapping of names to {called(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(called(arg) for arg in args)}"
    return f"a list of {called(args[0])}"


def check_schema(schema: type) -> None:
    """TypeError unless every type in the schema is one that can be read, and read in one way."""
    if not is_dataclass(schema):
        raise TypeError(f"a schema is a dataclass, given {schema!r}")
    _check_class(schema, schema.__name__, set())
    if "extends" in fields(schema):
        raise TypeError(f"{schema.__name__}.extends: the name is taken, it says which file a configuration builds on")


def _check_class(cls: type, where: str, seen: set[type]) -> None:
    if cls in seen:
        return
    seen.add(cls)
    for name, (field, hint) in fields(cls).items():
        if not field.init:
            raise TypeError(f"{where}.{name}: a field with init=False cannot be configured")
        _check_type(hint, f"{where}.{name}", seen)


def _check_type(hint: Any, where: str, seen: set[type]) -> None:
    alternatives = [member for member in members(hint) if member is not type(None)]
    classes = [member for member in alternatives if is_dataclass(member)]
    for member in alternatives:
        _check_member(member, where, seen)
    if len(classes) > 1:
        untagged = [cls.__name__ for cls in classes if not kinds(cls)]
        if untagged:
            raise TypeError(f"{where}: {', '.join(untagged)} in a union needs a field kind: Literal['...']")
        if len(tagged(hint)) < sum(len(kinds(cls)) for cls in classes):
            raise TypeError(f"{where}: two dataclasses of the union have the same kind")
    origins = [get_origin(member) for member in alternatives]
    if sum(origin in (list, tuple) for origin in origins) > 1 or (dict in origins) + bool(classes) > 1:
        raise TypeError(f"{where}: {hint} has two alternatives that look the same in YAML")
    if str in alternatives and Path in alternatives:
        raise TypeError(f"{where}: str and Path look the same in YAML; keep one")


def _check_member(member: Any, where: str, seen: set[type]) -> None:
    args = get_args(member)
    origin = get_origin(member)
    if is_dataclass(member):
        _check_class(member, where, seen)
    elif member in SCALARS:
        pass
    elif origin is Literal:
        if not all(arg is None or isinstance(arg, (bool, int, str)) for arg in args):
            raise TypeError(f"{where}: Literal of text, int, bool or None only, given {member}")
    elif origin in (list, tuple) and args and args != ((),):
        for arg in args:
            if arg is not Ellipsis:
                _check_type(arg, f"{where}[]", seen)
    elif origin is dict and args[0] is str:
        _check_type(args[1], f"{where}.<name>", seen)
    else:
        raise TypeError(f"{where}: {member} cannot be configured; twostep.train.schema lists the types that can")


@dataclass(frozen=True)
class Row:
    """One key of a schema."""

    path: str  # a.b; a[].b in lists, a.<name>.b in mappings of names
    kind: str | None  # the kind of the innermost tagged union that the key belongs to
    hint: Any
    default: Any  # MISSING where the key must be given
    help: str


def rows(schema: type) -> list[Row]:
    """Every key, sections before what is in them. A dataclass that contains itself is entered once."""
    return list(_rows(schema, "", None, MISSING, ()))


def _rows(cls: type, path: str, kind: str | None, owner: Any, outer: tuple[type, ...]) -> Iterator[Row]:
    for name, (field, hint) in fields(cls).items():
        here = f"{path}.{name}" if path else name
        default = getattr(owner, name) if isinstance(owner, cls) else default_of(field)
        yield Row(here, kind, hint, default, str(field.metadata.get("help", "")))
        yield from _rows_below(hint, here, kind, default, (*outer, cls))


def _rows_below(hint: Any, path: str, kind: str | None, default: Any, outer: tuple[type, ...]) -> Iterator[Row]:
    for member in members(hint):
        origin, args = get_origin(member), get_args(member)
        if is_dataclass(member) and member not in outer:
            inner = one_of(kinds(member)) if tagged(hint) else kind
            yield from _rows(member, path, inner, default, outer)
        elif origin in (list, tuple):
            for arg in dict.fromkeys(arg for arg in args if arg is not Ellipsis):
                yield from _rows_below(arg, f"{path}[]", kind, MISSING, outer)
        elif origin is dict:
            yield from _rows_below(args[1], f"{path}.<name>", kind, MISSING, outer)
