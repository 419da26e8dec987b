"""The compiled kernels beside this file: `_C.so`, and `_C.json`, the stamp that says what they were built from and for.

The binary uses the LibTorch stable ABI and no Python symbols, so that one file serves every torch from the ABI target
on and every Python. What can still disagree (see `find_problem` and the messages after it) is found by comparing the
stamp with the running machine, before the library is loaded: a wrong library shows itself as an undefined symbol,
which tells nobody what to do.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from twostep.toolchain import Arch, TorchFiles, find_torch, parse_version
from twostep.version import __version__

BINARY = Path(__file__).with_name("_C.so")
STAMP = Path(__file__).with_name("_C.json")
REBUILD = "pip install -e ."
REINSTALL = "pip install --force-reinstall --no-deps .   (in the source folder of twostep)"


class BuildError(ImportError):
    """The compiled kernels are missing or do not fit; the message says what disagrees and how to mend it."""


class Stamp(TypedDict):
    """What the binary was built from and for. `python` and `compiler` are information: nothing depends on them."""

    version: str
    torch: str
    abi_target: str
    cuda: str | None
    archs: list[str]
    machine: str
    python: str
    compiler: str
    sources: str
    built: str


def dump_stamp(stamp: Stamp) -> str:
    return json.dumps(stamp, indent=2) + "\n"


def parse_stamp(text: str) -> Stamp:
    """The stamp in this text; ValueError where it is truncated or not a stamp."""
    values: Any = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {type(values).__name__}")
    for key in Stamp.__annotations__:
        if key not in values:
            raise ValueError(f"no {key} in it")
        accepted = list if key == "archs" else (str, type(None)) if key == "cuda" else str
        if not isinstance(values[key], accepted):
            raise ValueError(f"{key} is {values[key]!r}")
    return cast(Stamp, values)


@dataclass(frozen=True)
class Status:
    """Whether the compiled kernels can be loaded here; `reason` says why not.

    `missing` tells a binary that was never built, where the reference can stand in, from one that does not fit.
    """

    usable: bool
    reason: str | None
    stamp: Stamp | None
    path: Path
    missing: bool = False


def source_files(csrc: Path, cuda: bool) -> list[Path]:
    """The files that the binary is compiled from; csrc/simt is a module of the tests and no part of it."""
    suffixes = {".cpp", ".h", ".cu", ".cuh"} if cuda else {".cpp", ".h"}
    return sorted(
        path
        for path in csrc.rglob("*")
        if path.suffix in suffixes and path.relative_to(csrc).parts[0] != "simt" and path.is_file()
    )


def hash_sources(csrc: Path, cuda: bool) -> str:
    digest = hashlib.sha256()
    for path in source_files(csrc, cuda):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def editable_root(package: Path = Path(__file__).parent) -> Path | None:
    """The source tree this package runs from, or None where it was installed from a wheel."""
    root = package.parent
    return root if (root / "csrc").is_dir() and (root / "build_backend").is_dir() else None


def find_problem(stamp: Stamp, torch: TorchFiles | None, machine: str, sources: str | None, mend: str) -> str | None:
    """Why the binary of this stamp cannot be loaded here, or None; `sources` is None where no csrc is beside it."""
    if torch is None:
        return "the compiled kernels need torch, and none is installed. Install one:  pip install torch"
    if parse_version(torch.version) < parse_version(stamp["abi_target"]):
        return (
            f"the running torch is {torch.version}, and the compiled kernels need torch {stamp['abi_target']} or newer "
            f"(they were built against {stamp['torch']}). Upgrade torch:  "
            f"pip install --upgrade 'torch>={stamp['abi_target']}'"
        )
    if stamp["machine"] != machine:
        return (
            f"the compiled kernels were built on a {stamp['machine']} machine, and this one is {machine}. "
            f"Build them here:  {mend}"
        )
    if stamp["version"] != __version__:
        return (
            f"the compiled kernels belong to twostep {stamp['version']}, and the Python files to "
            f"twostep {__version__}. Rebuild:  {mend}"
        )
    if torch.cuda is not None and stamp["cuda"] is not None:
        wanted, built = parse_version(torch.cuda)[0], parse_version(stamp["cuda"])[0]
        if wanted != built:
            return (
                f"the running torch {torch.version} uses CUDA {torch.cuda}, and the compiled kernels were built with "
                f"CUDA {stamp['cuda']} for torch {stamp['torch']}: the major versions must agree. Rebuild against this "
                f"torch:  {mend}"
            )
    if sources is not None and sources != stamp["sources"]:
        return (
            f"the files in csrc (sha256 {sources[:12]}) are not the ones that the compiled kernels were built from "
            f"(sha256 {stamp['sources'][:12]}, {stamp['built']}): the binary is stale. Rebuild:  {mend}"
        )
    return None


def no_cuda_kernels_message(stamp: Mapping[str, Any], torch_cuda: str | None) -> str:
    """Why a binary without CUDA kernels cannot serve a CUDA tensor. The stamp is empty where there is no binary."""
    against = f", built against torch {stamp['torch']}" if "torch" in stamp else ""
    if torch_cuda is None:
        return (
            f"this torch is a CPU build, and so are the compiled kernels{against}. Install a CUDA build of torch "
            f"(https://pytorch.org/get-started/locally) and rebuild:  {REBUILD}"
        )
    return (
        f"this torch is a CUDA {torch_cuda} build, and the compiled kernels are for the CPU alone{against}. "
        f"Rebuild with nvcc of CUDA {torch_cuda} on PATH:  TWOSTEP_NO_CUDA=0 {REBUILD}"
    )


def no_gpu_message(stamp: Mapping[str, Any], torch_cuda: str) -> str:
    """What to say where torch and binary have CUDA and torch.cuda.is_available() is False."""
    return (
        f"this torch (CUDA {torch_cuda}) and the compiled kernels (CUDA {stamp['cuda']}) are CUDA builds, but no GPU "
        "is visible: torch.cuda.is_available() is False. See whether the driver answers and whether "
        'CUDA_VISIBLE_DEVICES hides the GPU:  nvidia-smi; echo "$CUDA_VISIBLE_DEVICES"'
    )


def old_driver_message(stamp: Mapping[str, Any], driver_cuda: str) -> str | None:
    """Why the driver cannot run the kernels, or None: it must know the major version of their toolkit."""
    major = parse_version(driver_cuda)[0]
    if stamp["cuda"] is None or major >= parse_version(stamp["cuda"])[0]:
        return None
    return (
        f"the NVIDIA driver runs CUDA up to {driver_cuda}, and the compiled kernels were built with "
        f"CUDA {stamp['cuda']}. Upgrade the driver, or install a torch and a toolkit of CUDA {major} and rebuild:  "
        f"{REBUILD}"
    )


def check_arch(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Why a GPU of this compute capability cannot run kernels built for these architectures, or None."""
    major, minor = capability
    if any(Arch.parse(arch).runs_on(major, minor) for arch in archs):
        return None
    return (
        f"the GPU has compute capability {major}.{minor}, and the compiled kernels are for "
        f'{", ".join(archs) or "none"}. Rebuild for it:  TORCH_CUDA_ARCH_LIST="{major}.{minor}" {REBUILD}'
    )


def read_status(package: Path, torch: TorchFiles | None, machine: str) -> Status:
    """The state of the binary in this package folder, as seen by this torch and machine."""
    binary, stamp_file = package / BINARY.name, package / STAMP.name
    root = editable_root(package)
    mend = REBUILD if root is not None else REINSTALL
    if not binary.is_file():
        reason = f"{binary} does not exist: the kernels were never compiled. Build them:  {mend}"
        return Status(False, reason, None, binary, missing=True)
    try:
        stamp = parse_stamp(stamp_file.read_text())
    except FileNotFoundError:
        return Status(False, f"{binary} has no {STAMP.name} beside it. Rebuild:  {mend}", None, binary)
    except ValueError as error:
        reason = f"{stamp_file} is not the stamp of a build ({error}), as if it were truncated. Rebuild:  {mend}"
        return Status(False, reason, None, binary)
    sources = None if root is None else hash_sources(root / "csrc", stamp["cuda"] is not None)
    problem = find_problem(stamp, torch, machine, sources, mend)
    return Status(problem is None, problem, stamp, binary)


@functools.cache
def status() -> Status:
    """Whether the compiled kernels fit the running torch and machine; read once per process."""
    return read_status(Path(__file__).parent, find_torch(), platform.machine())


def check() -> None:
    """Raise BuildError where the compiled kernels do not fit this torch, this machine or their sources.

    Kernels that were never built are no error: the reference runs instead.
    """
    found = status()
    if not found.usable and not found.missing:
        raise BuildError(f"twostep: {found.reason}")
