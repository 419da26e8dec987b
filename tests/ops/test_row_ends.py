"""Where a row is no multiple of the vector's width, its last elements are read and written, and nothing beside them."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from pathlib import Path

import pytest

from twostep import toolchain

from .conftest import available_isas

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
HEADER = (CPU / "vec.h").read_text(encoding="utf-8")
# What a careless hand might write, and the instruction sets that would suffer.
MUTATIONS = {
    "a lane too many": ("(uint32_t{1} << part.n) - 1", "(uint32_t{2} << part.n) - 1", ["avx512"]),
    "a lane too few": ("(uint32_t{1} << part.n) - 1", "(uint32_t{1} << (part.n - 1)) - 1", ["avx512"]),
    "a float too many": ("first_lanes<float>(part.n),", "first_lanes<float>(part.n + 1),", ["avx2"]),
    "a pair too many": ("first_lanes<float>(part.n / 2)", "first_lanes<float>((part.n + 1) / 2)", ["avx2"]),
    "an odd element forgotten": ("p[part.n - 1] = h[part.n - 1];", "", ["avx2"]),
    "an element too many": ("i < part.n; ++i) v[i]", "i <= part.n; ++i) v[i]", ["portable"]),
}

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="it guards memory by mmap and mprotect")


def run(header: str, isa: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    """row_ends.cpp with this vec.h, compiled for the instruction set."""
    (folder / "cpu").mkdir()
    (folder / "cpu" / "vec.h").write_text(header, encoding="utf-8")
    (folder / "cpu" / "isa.h").write_text((CPU / "isa.h").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(ROOT))
    isa_flags = importlib.import_module("build_backend.extension").ISA_FLAGS[isa]
    source, program = ROOT / "tests" / "ops" / "row_ends.cpp", folder / "row_ends"
    command = [*toolchain.host_compiler(os.environ), "-O2", "-std=c++17", f"-I{folder}", f"-DTWOSTEP_ISA={isa}"]
    subprocess.run([*command, *isa_flags, str(source), "-o", str(program)], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", available_isas())
def test_the_end_of_a_row_is_touched_and_nothing_beside_it(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run(HEADER, isa, tmp_path, monkeypatch)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_there_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, isas = MUTATIONS[name]
    assert right in HEADER
    here = [isa for isa in isas if isa in available_isas()]
    if not here:
        pytest.skip(f"this processor has no {' and no '.join(isas)}")
    assert run(HEADER.replace(right, wrong), here[0], tmp_path, monkeypatch).returncode != 0
