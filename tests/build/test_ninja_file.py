"""What is compiled, how often and with which flags, follows from where a file stands in csrc."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from twostep.toolchain import Arch, Toolkit, TorchFiles

MakeTorch = Callable[..., TorchFiles]


@pytest.fixture
def lines(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_files: MakeTorch
) -> Callable[..., list[str]]:
    """The lines of the build.ninja for a small csrc; `machine` and the parts of the plan can be chosen."""
    for name in ("bindings/library.cpp", "rope.cpp", "rope.cu", "cpu/dispatch.cpp", "cuda/device.cu", "simt/module.cpp"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    monkeypatch.setattr(extension, "ROOT", tmp_path)

    def make(machine: str = "x86_64", **changes: Any) -> list[str]:
        monkeypatch.setattr("platform.machine", lambda: machine)
        plan = {"torch": torch_files(), "compiler": ["g++"], "toolkit": None, "archs": (), "sanitize": False, "jobs": 2}
        return list(extension.ninja_file(extension.Plan(**{**plan, **changes})).splitlines())

    return make


def objects(lines: list[str]) -> list[str]:
    return [line.split()[1].rstrip(":") for line in lines if re.match(r"build \S+\.o:", line)]


def flags(lines: list[str], target: str) -> str:
    start = next(number for number, line in enumerate(lines) if line.startswith(f"build {target}:"))
    return lines[start + 1]


CUDA = {"toolkit": Toolkit(Path("/cuda/bin/nvcc"), "13.0", Path("/cuda/include"), Path("/cuda/lib64"))}


def test_an_op_is_compiled_once_per_instruction_set_and_the_rest_once(lines: Callable[..., list[str]]) -> None:
    assert sorted(objects(lines())) == [
        "build/cpu/csrc/bindings/library.o",
        "build/cpu/csrc/cpu/dispatch.o",
        "build/cpu/csrc/rope.avx2.o",
        "build/cpu/csrc/rope.avx512.o",
        "build/cpu/csrc/rope.portable.o",
    ]


def test_instruction_set_flags_stand_with_their_objects_alone(lines: Callable[..., list[str]]) -> None:
    text = lines()
    assert flags(text, "build/cpu/csrc/rope.portable.o").strip() == "flags = -DTWOSTEP_ISA=portable"
    assert "-mavx2 -mfma -mf16c" in flags(text, "build/cpu/csrc/rope.avx2.o")
    assert "-mavx512f" in flags(text, "build/cpu/csrc/rope.avx512.o")
    assert sum("-mavx" in line for line in text) == 2


def test_other_processors_get_the_portable_kernels(lines: Callable[..., list[str]]) -> None:
    text = lines("aarch64")
    assert [name for name in objects(text) if "rope" in name] == ["build/cpu/csrc/rope.portable.o"]
    assert not any("-mavx" in line for line in text)


def test_only_the_bindings_see_torch_and_they_are_held_to_the_stable_abi(lines: Callable[..., list[str]]) -> None:
    text = lines()
    assert [line for line in text if "torch/include" in line] == [flags(text, "build/cpu/csrc/bindings/library.o")]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in flags(text, "build/cpu/csrc/bindings/library.o")


def test_a_cuda_build_adds_the_kernels_for_each_arch(lines: Callable[..., list[str]]) -> None:
    text = lines(**CUDA, archs=(Arch(9, 0), Arch(12, 0, ptx=True)))
    assert {"build/cuda/csrc/rope.cu.o", "build/cuda/csrc/cuda/device.cu.o"} < set(objects(text))
    command = next(line for line in text if "/cuda/bin/nvcc" in line)
    for code in ("code=sm_90", "code=sm_120", "code=compute_120"):
        assert code in command
    assert "code=compute_90" not in command
    assert "-DTWOSTEP_CUDA" in flags(text, "build/cuda/csrc/bindings/library.o")
    link = next(line for line in text if "-shared" in line)
    assert "-lcudart_static -ldl -lrt -lpthread" in link


def test_torch_is_linked_by_name_alone(lines: Callable[..., list[str]]) -> None:
    link = next(line for line in lines() if "-shared" in line)
    assert "-ltorch" in link
    assert "rpath" not in link
    assert "python" not in link


def test_a_sanitized_build_goes_to_a_folder_of_its_own(lines: Callable[..., list[str]]) -> None:
    text = lines(sanitize=True)
    assert "build/cpu-sanitize/csrc/rope.avx2.o" in objects(text)
    assert sum("-fsanitize=address,undefined" in line for line in text) == 2  # compiling and linking


def test_paths_with_spaces_reach_the_compiler_whole(lines: Callable[..., list[str]], torch_files: MakeTorch) -> None:
    torch = TorchFiles("2.13.0", None, Path("/my packages/torch"))
    assert "'-isystem/my packages/torch/include'" in flags(lines(torch=torch), "build/cpu/csrc/bindings/library.o")
