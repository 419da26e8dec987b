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
    texts = {name: text for name, text in texts.items() if not name.startswith("cpu/") and name != "bindings.cpp"}
    for change in changes:
        texts[change.file] = change.apply(texts[change.file])
    return texts


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(cache: Path, changes: Iterable[Substitution] = (), defines: Iterable[str] = (), jobs: int = 2) -> Path:
    """The path of the module built from csrc with the changes applied."""
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    texts = _sources(CSRC, changes)
    flags = [*FLAGS, "-DTWOSTEP_SIMT", *(f"-D{define}" for define in defines)]
    headers = _digest(*(f"{n}\0{t}" for n, t in sorted(texts.items()) if n.endswith((".h", ".cuh"))))
    tree = cache / f"tree-{_digest(*(f'{n}{t}' for n, t in sorted(texts.items())))}"
    for name, text in texts.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text)
    interface = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    wanted = sorted(n for n in texts if n.endswith(".cu") or n in {"simt/simt.cpp", "simt/module.cpp"})
    contracts = _digest(*(f"{n}\0{t}" for n, t in sorted(texts.items()) if n.endswith(".h")))

    def compile_one(name: str) -> Path:
        # The module and the machine include contracts only, so a changed kernel header leaves them as they are.
        seen = headers if name.endswith(".cu") else contracts
        stem = name.replace("/", "-")
        target = cache / f"{stem}-{_digest(compiler, *flags, seen, texts[name], pybind11.__version__, sys.version)}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            includes = ["-I", str(tree), "-I", str(tree / "simt" / "include")]
            _run([compiler, "-x", "c++", *flags, *includes, *interface, "-c", str(tree / name), "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(compile_one, wanted)]
    module = cache / _digest(*objects) / f"twostep_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        partial = module.with_suffix(f".{os.getpid()}")
        _run([compiler, "-shared", *objects, "-o", str(partial)])
        partial.replace(module)
    return module


def load(module: Path) -> ModuleType:
    """Loads a built module; several (the sources' and mutants') may be loaded side by side."""
    spec = importlib.util.spec_from_file_location("twostep_simt", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
