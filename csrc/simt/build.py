"""Builds the emulated CUDA launchers (module twostep_simt) with the host compiler; needs no CUDA.

Objects are kept under names made from everything that goes into them, so that only what changed is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parent.parent
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Substitution:
    """One place in one file of csrc, changed: the sources of a mutant."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {text.count(self.old)} times, expected once")
        return text.replace(self.old, self.new)


def _sources(csrc: Path, changes: Iterable[Substitution]) -> dict[str, str]:
    files = [p for p in csrc.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    texts = {p.relative_to(csrc).as_posix(): p.read_text() for p in files}
    texts = {name: text for name, text in texts.items() if not name.startswith(("cpu/", "bindings/"))}
    for change in changes:
        texts[change.file] = change.apply(texts[change.file])
    return texts


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@dataclass(frozen=True)
class _Tree:
    """A copy of the sources, as they are or changed."""

    folder: Path
    texts: dict[str, str]

    @classmethod
    def write(cls, cache: Path, changes: Iterable[Substitution]) -> _Tree:
        texts = _sources(CSRC, changes)
        folder = cache / f"tree-{_digest(*(f'{name}{text}' for name, text in sorted(texts.items())))}"
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(text)
        return cls(folder, texts)

    def included_by(self, name: str) -> str:
        """All headers that a source may include; the module and the machine include contracts only."""
        suffixes = (".h", ".cuh") if name.endswith(".cu") else (".h",)
        return _digest(*(f"{n}\0{text}" for n, text in sorted(self.texts.items()) if n.endswith(suffixes)))


def _compile(cache: Path, tree: _Tree, name: str, flags: list[str]) -> Path:
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    parts = (compiler, *flags, tree.included_by(name), tree.texts[name], pybind11.__version__, sys.version)
    target = cache / f"{name.replace('/', '-')}-{_digest(*parts)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        folders = ["-I", str(tree.folder), "-I", str(tree.folder / "simt" / "include")]
        folders += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
        _run([compiler, "-x", "c++", *flags, *folders, "-c", str(tree.folder / name), "-o", str(partial)])
        partial.replace(target)
    return target


def build(cache: Path, changes: Iterable[Substitution] = (), *, affected: Iterable[str] | None = None) -> Path:
    """The path of the module built from csrc with the changes applied.

    With `affected`, only these sources see the changes; the others are compiled, or found compiled, as they are.
    """
    changes = tuple(changes)
    plain = _Tree.write(cache, ())
    changed = _Tree.write(cache, changes) if changes else plain
    flags = [*FLAGS, "-DTWOSTEP_SIMT"]
    names = sorted(n for n in plain.texts if n.endswith(".cu") or n in {"simt/simt.cpp", "simt/module.cpp"})
    first = names if affected is None else sorted(affected)
    # Affected objects come first: of inline functions that several objects hold, the linker takes the first.
    order = [(changed, name) for name in first] + [(plain, name) for name in names if name not in first]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(lambda each: _compile(cache, each[0], each[1], flags), order)]
    module = cache / _digest(*objects) / f"twostep_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        partial = module.with_suffix(f".{os.getpid()}")
        _run([os.environ.get("CXX", "g++"), "-shared", *objects, "-o", str(partial)])
        partial.replace(module)
    return module


def load(module: Path) -> ModuleType:
    """Loads a built module; several (the sources' and mutants') may be loaded side by side.

    Each under a name of its own, since pybind11 hands out a module once for each name.
    """
    spec = importlib.util.spec_from_file_location(f"{module.parent.name}.twostep_simt", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
