"""Each trouble that a build can meet names the two things that disagree and the command that mends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twostep import toolchain
from twostep.toolchain import Arch, ToolchainError, Toolkit, TorchFiles

MakeTorch = Callable[..., TorchFiles]
MakeToolkit = Callable[..., Path]
NEW_NVCC = ("75", "80", "86", "90", "100", "120", "121")


def kit(version: str) -> Toolkit:
    return Toolkit(Path(f"/opt/cuda-{version}/bin/nvcc"), version, Path("/include"), Path("/lib"))


# torch


def test_no_torch_gives_both_commands() -> None:
    with pytest.raises(ToolchainError) as caught:
        toolchain.check_torch(None, "2.13.0")
    message = str(caught.value)
    assert "pip install torch==2.13.0" in message
    assert "pip install -e ." in message
    assert "\n" not in message  # one paragraph


def test_a_torch_older_than_the_abi_target_is_named_with_the_upgrade(torch_files: MakeTorch) -> None:
    with pytest.raises(ToolchainError, match=r"2\.9\.1.*2\.10 or newer.*pip install torch==2\.13\.0"):
        toolchain.check_torch(torch_files("2.9.1+cu128", "12.8"), "2.13.0")


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_any_torch_from_the_abi_target_on_is_accepted(torch_files: MakeTorch, version: str) -> None:
    assert toolchain.check_torch(torch_files(version), "2.13.0").version == version


def test_torch_is_described_by_its_files_as_by_itself() -> None:
    import torch

    found = toolchain.find_torch()
    assert found is not None
    assert found.version == str(torch.__version__)
    assert found.cuda == torch.version.cuda
    assert (found.include_dirs[0] / "torch" / "csrc" / "stable" / "library.h").is_file()


def test_the_leftover_folder_of_an_uninstalled_torch_is_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert toolchain.find_torch() is None


# CUDA or not


def test_cpu_torch_builds_for_the_cpu_even_where_nvcc_is(torch_files: MakeTorch) -> None:
    assert toolchain.choose_toolkit(torch_files(), {}, lambda _: kit("13.0")) is None


def test_cuda_torch_takes_a_toolkit_of_the_same_major_version(torch_files: MakeTorch) -> None:
    chosen = toolchain.choose_toolkit(torch_files("2.11.0+cu130", "13.0"), {}, lambda _: kit("13.1"))
    assert chosen == kit("13.1")


def test_cuda_torch_without_nvcc_is_an_error_with_both_ways_out(torch_files: MakeTorch) -> None:
    with pytest.raises(ToolchainError, match=r"2\.11\.0\+cu130.*no nvcc.*CUDA 13\.0 toolkit.*TWOSTEP_NO_CUDA=1 pip"):
        toolchain.choose_toolkit(torch_files("2.11.0+cu130", "13.0"), {}, lambda _: None)


def test_toolkit_of_another_major_version_is_an_error_that_names_both(torch_files: MakeTorch) -> None:
    with pytest.raises(
        ToolchainError, match=r"CUDA 12\.8.*/opt/cuda-13\.0/bin/nvcc is CUDA 13\.0.*CUDA_HOME=\S*12\.8 pip"
    ):
        toolchain.choose_toolkit(torch_files("2.11.0+cu128", "12.8"), {}, lambda _: kit("13.0"))


def test_no_cuda_wins_over_a_cuda_torch(torch_files: MakeTorch) -> None:
    env = {"TWOSTEP_NO_CUDA": "1"}
    assert toolchain.choose_toolkit(torch_files("2.11.0+cu130", "13.0"), env, lambda _: kit("13.0")) is None


def test_force_cuda_compiles_the_kernels_beside_a_cpu_torch(torch_files: MakeTorch) -> None:
    assert toolchain.choose_toolkit(torch_files(), {"TWOSTEP_FORCE_CUDA": "1"}, lambda _: kit("13.0")) == kit("13.0")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TWOSTEP_FORCE_CUDA": "1"}, "TWOSTEP_FORCE_CUDA=1.*no nvcc.*unset TWOSTEP_FORCE_CUDA"),
        ({"TWOSTEP_FORCE_CUDA": "1", "TWOSTEP_NO_CUDA": "1"}, "both set; unset one"),
        ({"TWOSTEP_NO_CUDA": "yes"}, "TWOSTEP_NO_CUDA is 'yes'; it can be 1, 0 or unset"),
    ],
)
def test_contradictory_switches_are_errors(torch_files: MakeTorch, env: dict[str, str], message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        toolchain.choose_toolkit(torch_files(), env, lambda _: None)


# nvcc


def test_nvcc_is_looked_for_in_cuda_home_then_path_then_the_usual_place(toolkit_folder: MakeToolkit) -> None:
    home, path, usual = (toolkit_folder(version, name=version) for version in ("13.0", "12.9", "12.8"))
    env = {"CUDA_HOME": str(home), "PATH": f"{path}/bin:{os.environ['PATH']}"}
    versions = []
    for removed in (None, "CUDA_HOME", "PATH"):
        env.pop(str(removed), None)
        if removed == "PATH":
            env["PATH"] = "/nonexistent"
        found = toolchain.find_toolkit(env, fallback=usual)
        assert found is not None
        versions.append(found.version)
    assert versions == ["13.0", "12.9", "12.8"]
    assert toolchain.find_toolkit(env, fallback=Path("/nonexistent")) is None


def test_a_wrapper_script_is_followed_to_the_toolkit_behind_it(tmp_path: Path, toolkit_folder: MakeToolkit) -> None:
    root = toolkit_folder()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    found = toolchain.find_toolkit({"PATH": f"{wrapper.parent}:{os.environ['PATH']}"})
    assert found == Toolkit(root / "bin" / "nvcc", "13.0", root / "include", root / "lib64")


def test_cuda_home_without_nvcc_is_an_error_and_not_a_search_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=f"CUDA_HOME is {tmp_path}, which holds no bin/nvcc.*unset CUDA_HOME"):
        toolchain.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]})


@pytest.mark.parametrize("name", ["cuda_runtime.h", "libcudart_static.a"])
def test_a_toolkit_without_its_development_files_is_named(toolkit_folder: MakeToolkit, name: str) -> None:
    root = toolkit_folder()
    next(root.rglob(name)).unlink()
    if any((folder / name).is_file() for folder in (Path("/usr/include"), *Path("/usr/lib").glob("*-linux-gnu"))):
        pytest.skip(f"a system-wide {name} stands in")
    with pytest.raises(ToolchainError, match=f"{root}, which holds no {name}: the toolkit is incomplete"):
        toolchain.find_toolkit({"CUDA_HOME": str(root)})


def test_something_else_called_nvcc_is_not_taken_for_one(toolkit_folder: MakeToolkit) -> None:
    root = toolkit_folder()
    (root / "bin" / "nvcc").write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(ToolchainError, match="does not answer like nvcc"):
        toolchain.find_toolkit({"CUDA_HOME": str(root)})


# Architectures


def archs(
    requested: str | None = None, supported: tuple[str, ...] = NEW_NVCC, visible: tuple[tuple[int, int], ...] = ()
) -> list[str]:
    return [str(arch) for arch in toolchain.choose_archs(requested, supported, visible, "13.0")]


def test_without_a_gpu_every_default_is_built_with_ptx_of_the_newest() -> None:
    assert archs() == ["8.0", "9.0", "10.0", "12.0+PTX"]


def test_an_older_nvcc_builds_the_defaults_that_it_knows() -> None:
    assert archs(supported=("70", "80", "90")) == ["8.0", "9.0+PTX"]


def test_a_visible_gpu_decides_and_the_list_overrides_it() -> None:
    assert archs(visible=((9, 0), (9, 0))) == ["9.0"]
    assert archs("8.0", visible=((9, 0),)) == ["8.0"]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0 8.0", ["8.0", "9.0"]),
        (" 9.0a;12.0f ; 8.6 ", ["8.6", "9.0a", "12.0f"]),
        ("", ["8.0", "9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_torch_cuda_arch_list_is_read_in_all_its_spellings(requested: str, expected: list[str]) -> None:
    assert archs(requested) == expected


@pytest.mark.parametrize("requested", ["Hopper", "90", "8.0;sm_90", "9.0+ptx", "9.0x"])
def test_a_bad_arch_list_says_what_is_accepted(requested: str) -> None:
    with pytest.raises(
        ToolchainError, match=r'is no CUDA architecture.*8\.0, 9\.0a or 12\.0\+PTX.*TORCH_CUDA_ARCH_LIST="'
    ):
        archs(requested)


def test_an_arch_that_nvcc_does_not_know_is_named_with_those_it_knows() -> None:
    with pytest.raises(
        ToolchainError, match=r"asks for 12\.0, which nvcc 13\.0 cannot compile for \(it knows 8\.0, 9\.0\)"
    ):
        archs("12.0", supported=("80", "90"))
    with pytest.raises(ToolchainError, match=r"visible GPU has compute capability 12\.0"):
        archs(visible=((12, 0),), supported=("80", "90"))


def test_supported_archs_are_asked_of_nvcc(toolkit_folder: MakeToolkit) -> None:
    found = toolchain.find_toolkit({"CUDA_HOME": str(toolkit_folder(codes="sm_80 sm_90 sm_120"))})
    assert found is not None
    assert toolchain.supported_archs(found) == {"80", "90", "120"}


def test_gencode_holds_machine_code_and_ptx_where_asked() -> None:
    assert Arch.parse("9.0a").gencode() == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert Arch.parse("12.0+PTX").gencode() == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# Host


def test_no_compiler_says_which_to_install() -> None:
    with pytest.raises(ToolchainError, match=r"no g\+\+, c\+\+ or clang\+\+ on PATH.*apt-get install g\+\+"):
        toolchain.host_compiler({"PATH": "/nonexistent"})
    with pytest.raises(ToolchainError, match=r"CXX is 'g\+\+-99'.*unset CXX"):
        toolchain.host_compiler({"PATH": os.environ["PATH"], "CXX": "g++-99"})


def test_cxx_may_carry_a_launcher() -> None:
    assert toolchain.host_compiler({"PATH": os.environ["PATH"], "CXX": "env g++"}) == ["env", "g++"]


@pytest.mark.parametrize(
    ("env", "cpus", "memory", "jobs"),
    [
        ({}, 16, 64.0, 16),
        ({}, 16, 6.5, 3),  # 2 GiB each
        ({}, 16, 0.5, 1),
        ({}, 4, None, 4),
        ({"MAX_JOBS": "7"}, 2, 0.5, 7),
    ],
)
def test_jobs_are_as_many_as_cores_and_memory_allow(
    env: dict[str, str], cpus: int, memory: float | None, jobs: int
) -> None:
    assert toolchain.job_count(env, cpus, memory, 2.0) == jobs


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_bad_max_jobs_is_an_error(value: str) -> None:
    with pytest.raises(ToolchainError, match=f"MAX_JOBS is '{value}'"):
        toolchain.job_count({"MAX_JOBS": value}, 4, 8.0, 2.0)
