"""A binary that does not fit is found out before it is loaded, with the two things that disagree and what mends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from twostep import build
from twostep.build import Stamp
from twostep.toolchain import TorchFiles

MakeStamp = Callable[..., Stamp]
MakeTorch = Callable[..., TorchFiles]


def problem(stamp: Stamp, torch: TorchFiles | None, machine: str = "x86_64", sources: str | None = None) -> str:
    return build.find_problem(stamp, torch, machine, sources, "pip install -e .") or ""


# What fits


def test_a_sound_build_has_no_problem(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    assert problem(stamp(), torch_files(), sources="0" * 64) == ""


def test_another_python_is_no_problem(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    """The library holds no Python symbols; that it was built by another Python is information and no error."""
    assert problem(stamp(python="3.13.0"), torch_files()) == ""


@pytest.mark.parametrize("version", ["2.10.0", "2.11.0", "2.14.0"])
def test_another_torch_from_the_abi_target_on_is_no_problem(
    stamp: MakeStamp, torch_files: MakeTorch, version: str
) -> None:
    assert problem(stamp(), torch_files(version)) == ""


def test_cuda_kernels_beside_a_cpu_torch_are_no_problem(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    assert problem(stamp(cuda="13.0", archs=["9.0"]), torch_files()) == ""


def test_cpu_kernels_beside_a_cuda_torch_still_serve_cpu_tensors(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    assert problem(stamp(), torch_files("2.13.0+cu130", "13.0")) == ""


# What does not


def test_no_torch(stamp: MakeStamp) -> None:
    assert "pip install torch" in problem(stamp(), None)


def test_a_torch_older_than_the_abi_target(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    message = problem(stamp(), torch_files("2.9.1"))
    assert "the running torch is 2.9.1" in message
    assert "torch 2.10 or newer" in message
    assert "pip install --upgrade 'torch>=2.10'" in message


def test_a_torch_of_another_cuda(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    message = problem(stamp(cuda="13.0", torch="2.13.0+cu130"), torch_files("2.11.0+cu128", "12.8"))
    assert "2.11.0+cu128 uses CUDA 12.8" in message
    assert "built with CUDA 13.0 for torch 2.13.0+cu130" in message
    assert message.endswith("pip install -e .")


def test_another_machine(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    message = problem(stamp(), torch_files(), machine="aarch64")
    assert "built on a x86_64 machine, and this one is aarch64" in message
    assert message.endswith("pip install -e .")


def test_another_version_of_the_python_files(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    message = problem(stamp(version="0.0.1"), torch_files())
    assert "belong to twostep 0.0.1" in message
    assert message.endswith("pip install -e .")


def test_sources_edited_after_the_build(stamp: MakeStamp, torch_files: MakeTorch) -> None:
    message = problem(stamp(), torch_files(), sources="f" * 64)
    assert "csrc (sha256 ffffffffffff)" in message
    assert "(sha256 000000000000, 2026-01-01T00:00:00+00:00)" in message
    assert message.endswith("stale. Rebuild:  pip install -e .")


# CUDA tensors


def test_cpu_kernels_cannot_serve_cuda_tensors(stamp: MakeStamp) -> None:
    message = build.no_cuda_kernels_message(stamp(), "13.0")
    assert "torch is a CUDA 13.0 build" in message
    assert "for the CPU alone, built against torch 2.13.0+cpu" in message
    assert "pip install -e ." in message
    assert "for the CPU alone." in build.no_cuda_kernels_message({}, "13.0")


def test_no_gpu_visible(stamp: MakeStamp) -> None:
    message = build.no_gpu_message(stamp(cuda="13.0"), "13.0")
    assert "torch.cuda.is_available() is False" in message
    assert "CUDA_VISIBLE_DEVICES" in message
    assert "nvidia-smi" in message


def test_a_driver_older_than_the_toolkit(stamp: MakeStamp) -> None:
    message = build.old_driver_message(stamp(cuda="13.0"), "12.4") or ""
    assert "CUDA up to 12.4" in message
    assert "built with CUDA 13.0" in message
    assert build.old_driver_message(stamp(cuda="13.1"), "13.0") is None
    assert build.old_driver_message(stamp(), "12.4") is None


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), ["8.0"], True),
        ((8, 6), ["8.0"], True),  # the same major version, a later minor one
        ((8, 0), ["8.6"], False),
        ((9, 0), ["8.0"], False),
        ((9, 0), ["8.0+PTX"], True),  # compiled by the driver
        ((7, 5), ["8.0+PTX"], False),
        ((12, 1), ["8.0", "12.0+PTX"], True),
        ((9, 0), ["9.0a"], True),
        ((10, 0), ["9.0a+PTX"], False),  # code for one chip stays there
        ((10, 3), ["10.0a"], False),
        ((10, 3), ["10.0f"], True),
        ((12, 0), ["10.0f"], False),
        ((12, 0), ["10.0f+PTX"], False),
        ((9, 0), [], False),
    ],
)
def test_whether_a_gpu_can_run_the_kernels(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    message = build.check_arch(capability, archs)
    assert (message is None) is runs
    if message is not None:
        assert f"compute capability {capability[0]}.{capability[1]}" in message
        assert (", ".join(archs) or "none") in message
        assert f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}" pip install -e .' in message


# The files


@pytest.fixture
def package(tmp_path: Path, stamp: MakeStamp) -> Path:
    """A source tree with a built package in it."""
    (tmp_path / "csrc" / "simt").mkdir(parents=True)
    (tmp_path / "build_backend").mkdir()
    (tmp_path / "csrc" / "rope.cpp").write_text("int rope;\n")
    (tmp_path / "csrc" / "rope.cu").write_text("int rope;\n")
    package = tmp_path / "twostep"
    package.mkdir()
    (package / "_C.so").touch()
    sources = build.hash_sources(tmp_path / "csrc", cuda=False)
    (package / "_C.json").write_text(build.dump_stamp(stamp(sources=sources)))
    return package


def reason(package: Path, torch: TorchFiles) -> str:
    found = build.read_status(package, torch, "x86_64")
    assert found.usable is (found.reason is None)
    return found.reason or ""


def test_a_built_tree_is_usable(package: Path, torch_files: MakeTorch) -> None:
    assert reason(package, torch_files()) == ""


def test_editing_csrc_makes_the_binary_stale(package: Path, torch_files: MakeTorch) -> None:
    (package.parent / "csrc" / "rope.cpp").write_text("int rope = 1;\n")
    assert "the binary is stale. Rebuild:  pip install -e ." in reason(package, torch_files())


def test_a_new_and_a_renamed_source_make_the_binary_stale(package: Path, torch_files: MakeTorch) -> None:
    csrc = package.parent / "csrc"
    (csrc / "swiglu.cpp").write_text("int swiglu;\n")
    assert "stale" in reason(package, torch_files())
    (csrc / "swiglu.cpp").unlink()
    (csrc / "rope.cpp").rename(csrc / "rotary.cpp")
    assert "stale" in reason(package, torch_files())


def test_files_that_a_cpu_build_does_not_read_do_not_make_it_stale(package: Path, torch_files: MakeTorch) -> None:
    csrc = package.parent / "csrc"
    (csrc / "rope.cu").write_text("int rope = 1;\n")
    (csrc / "simt" / "block.h").write_text("int block;\n")
    assert reason(package, torch_files()) == ""


def test_a_cuda_build_reads_the_cu_files(package: Path, torch_files: MakeTorch, stamp: MakeStamp) -> None:
    csrc = package.parent / "csrc"
    built = stamp(cuda="13.0", archs=["9.0"], sources=build.hash_sources(csrc, cuda=True))
    (package / "_C.json").write_text(build.dump_stamp(built))
    assert reason(package, torch_files()) == ""
    (csrc / "rope.cu").write_text("int rope = 1;\n")
    assert "stale" in reason(package, torch_files())


def test_a_wheel_has_no_sources_to_compare_with(package: Path, torch_files: MakeTorch) -> None:
    shutil.rmtree(package.parent / "csrc")
    assert reason(package, torch_files()) == ""


def test_a_missing_binary_is_told_from_one_that_does_not_fit(package: Path, torch_files: MakeTorch) -> None:
    (package / "_C.so").unlink()
    found = build.read_status(package, torch_files(), "x86_64")
    assert found.missing
    assert found.reason is not None
    assert "never compiled. Build them:  pip install -e ." in found.reason
    (package / "_C.so").touch()
    assert not build.read_status(package, torch_files(), "aarch64").missing


@pytest.mark.parametrize("text", ["", '{"version": "0.1.0", "tor', "[]", "{}", '{"version": 1}'])
def test_a_truncated_stamp_is_said_to_be_one(package: Path, torch_files: MakeTorch, text: str) -> None:
    (package / "_C.json").write_text(text)
    message = reason(package, torch_files())
    assert "_C.json is not the stamp of a build" in message
    assert message.endswith("pip install -e .")


def test_a_binary_without_a_stamp(package: Path, torch_files: MakeTorch) -> None:
    (package / "_C.json").unlink()
    assert "no _C.json beside it. Rebuild:  pip install -e ." in reason(package, torch_files())


def test_the_stamp_survives_its_file(stamp: MakeStamp) -> None:
    assert build.parse_stamp(build.dump_stamp(stamp(cuda="13.0", archs=["9.0"]))) == stamp(cuda="13.0", archs=["9.0"])


@pytest.mark.parametrize(("missing", "raises"), [(False, True), (True, False)])
def test_check_refuses_what_does_not_fit_and_lets_the_reference_stand_in_for_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, missing: bool, raises: bool
) -> None:
    monkeypatch.setattr(build, "status", lambda: build.Status(False, "the reason", None, Path("_C.so"), missing))
    if raises:
        with pytest.raises(build.BuildError, match="twostep: the reason"):
            build.check()
    else:
        build.check()
