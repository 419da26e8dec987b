"""Made-up machines: a torch that is only files, a CUDA toolkit that is only a script."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from twostep.build import Stamp
from twostep.toolchain import TorchFiles

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def torch_files() -> Callable[..., TorchFiles]:
    """`torch_files("2.11.0+cu130", cuda="13.0")`"""

    def make(version: str = "2.13.0+cpu", cuda: str | None = None) -> TorchFiles:
        return TorchFiles(version, cuda, Path("/site-packages/torch"))

    return make


@pytest.fixture
def stamp() -> Callable[..., Stamp]:
    """The stamp of a sound CPU build, with some of it changed."""
    from twostep.version import __version__

    def make(**changes: object) -> Stamp:
        sound = Stamp(
            version=__version__,
            torch="2.13.0+cpu",
            abi_target="2.10",
            cuda=None,
            archs=[],
            machine="x86_64",
            python="3.11.7",
            compiler="g++ 12",
            sources="0" * 64,
            built="2026-01-01T00:00:00+00:00",
        )
        return {**sound, **changes}  # type: ignore[typeddict-item]

    return make


@pytest.fixture
def toolkit_folder(tmp_path: Path) -> Callable[..., Path]:
    """A toolkit whose nvcc answers what the build asks it, and nothing more."""

    def make(version: str = "13.0", codes: str = "sm_80 sm_90", name: str = "cuda") -> Path:
        root = tmp_path / name
        for folder, file in (("include", "cuda_runtime.h"), ("lib64", "libcudart_static.a")):
            (root / folder).mkdir(parents=True)
            (root / folder / file).touch()
        nvcc = root / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            f'  --dryrun) echo "#\\$ TOP={root}/bin/.." >&2;;\n'
            f'  --version) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
            f"  --list-gpu-code) printf '%s\\n' {codes};;\n"
            "esac\n"
        )
        nvcc.chmod(0o755)
        return root

    return make


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build's own module, which no installation holds."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("build_backend.extension")
