"""What the build needs from the machine: torch's files, nvcc, a host compiler, architectures, memory.

The build backend decides with these functions and ``twostep doctor`` reports with them, so the two cannot disagree.
Nothing here imports torch: the facts wanted (version, CUDA version, folders) stand in files, and reading those also
works where torch is too broken to import. Every decision takes its facts as arguments, so that each message can be
tested without the trouble it describes.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The oldest torch whose stable ABI has every shim that csrc/bindings calls.
ABI_TARGET = "2.10"
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
# Memory to keep for one compiler. Peaks seen: g++ 12 at 0.6 GiB (gated_residual_norm_modulate with sanitizers),
# nvcc 13.0 at 0.2 GiB (norm_modulate for four architectures); the rest is room for other compilers and the linker.
CXX_GIB_PER_JOB = 1.0
NVCC_GIB_PER_JOB = 2.0

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class ToolchainError(RuntimeError):
    """Something the build needs is missing or disagrees; the message says what and how to mend it."""


@dataclass(frozen=True)
class TorchFiles:
    """An installed torch, as its files describe it."""

    version: str
    cuda: str | None
    root: Path

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        include = self.root / "include"
        return (include, include / "torch" / "csrc" / "api" / "include")

    @property
    def library_dir(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the real nvcc behind any wrapper script, and the folders that belong to it."""

    nvcc: Path
    version: str
    include: Path
    library_dir: Path


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of '2.13.0+cpu', '13.0' or '2.10.0a0+git1234'."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ToolchainError(f"cannot read a version out of {text!r}: expected something like '2.13.0' or '13.0'")
    return int(match.group(1)), int(match.group(2))


def find_torch() -> TorchFiles | None:
    """The torch that `import torch` would import, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    version_file = root / "version.py"
    if not version_file.is_file():
        return None
    facts: dict[str, object] = {}
    for node in ast.parse(version_file.read_text()).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            facts[target.id] = value.value
    cuda = facts.get("cuda")
    return TorchFiles(str(facts["__version__"]), None if cuda is None else str(cuda), root)


def check_torch(torch: TorchFiles | None, pinned: str) -> TorchFiles:
    """The torch to build against, or an error that holds the exact commands."""
    if torch is None:
        raise ToolchainError(
            "twostep compiles against the torch that is already installed, and there is none in this environment. "
            f"Install torch and then twostep, with these two commands:  pip install torch=={pinned}  and then  "
            f"pip install -e .   (Any torch from {ABI_TARGET} on will do; a CUDA build of torch gives the CUDA "
            f"kernels. With uv:  uv pip install torch=={pinned} setuptools ninja  and then  uv pip install -e . )"
        )
    if parse_version(torch.version) < parse_version(ABI_TARGET):
        raise ToolchainError(
            f"the installed torch is {torch.version}, and twostep needs {ABI_TARGET} or newer. "
            f"Upgrade it:  pip install torch=={pinned}"
        )
    return torch


# CUDA toolkit


def _folder_with(name: str, folders: Iterable[Path], nvcc: Path, root: Path) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise ToolchainError(
        f"{nvcc} belongs to the CUDA toolkit at {root}, which holds no {name}: the toolkit is incomplete. "
        "Install its development files, or set CUDA_HOME to a complete toolkit"
    )


def _resolve_toolkit(nvcc: Path, run: Run) -> Toolkit:
    """Follow wrapper scripts and links to the toolkit that this nvcc really is.

    `nvcc --dryrun` prints TOP, the toolkit's root, from inside the real binary; a shell wrapper's path says nothing.
    """
    try:
        dry = run([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
        printed = run([str(nvcc), "--version"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{nvcc} does not run ({error}); reinstall the CUDA toolkit or set CUDA_HOME") from error
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", printed.stdout)
    if top is None or release is None:
        raise ToolchainError(
            f"{nvcc} does not answer like nvcc (`nvcc --version` printed {printed.stdout.strip()[:200]!r}); "
            "reinstall the CUDA toolkit or set CUDA_HOME to a complete one"
        )
    root = Path(os.path.realpath(top.group(1).strip()))
    headers = [root / "include", *root.glob("targets/*/include"), Path("/usr/include")]
    archives = [root / "lib64", root / "lib", *root.glob("targets/*/lib"), *Path("/usr/lib").glob("*-linux-gnu")]
    include = _folder_with("cuda_runtime.h", headers, nvcc, root)
    libraries = _folder_with("libcudart_static.a", archives, nvcc, root)
    real = root / "bin" / "nvcc"
    return Toolkit(real if real.is_file() else nvcc, release.group(1), include, libraries)


def find_toolkit(env: Mapping[str, str], run: Run = _run, fallback: Path = Path("/usr/local/cuda")) -> Toolkit | None:
    """CUDA_HOME (or CUDA_PATH), then nvcc on PATH, then /usr/local/cuda; None where there is no nvcc."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = env.get(variable)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise ToolchainError(
                    f"{variable} is {home}, which holds no bin/nvcc. "
                    f"Point it at a CUDA toolkit, or drop it:  unset {variable}"
                )
            return _resolve_toolkit(nvcc, run)
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    if on_path:
        return _resolve_toolkit(Path(on_path), run)
    if (fallback / "bin" / "nvcc").is_file():
        return _resolve_toolkit(fallback / "bin" / "nvcc", run)
    return None


def flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "")
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    raise ToolchainError(f"{name} is {value!r}; it can be 1, 0 or unset")


def choose_toolkit(
    torch: TorchFiles, env: Mapping[str, str], find: Callable[[Mapping[str, str]], Toolkit | None] = find_toolkit
) -> Toolkit | None:
    """The toolkit to compile the CUDA kernels with, or None for a CPU build.

    torch decides: a CUDA torch without a matching nvcc is an error, for a silent CPU build is noticed only much later.
    """
    force, never = flag(env, "TWOSTEP_FORCE_CUDA"), flag(env, "TWOSTEP_NO_CUDA")
    if force and never:
        raise ToolchainError("TWOSTEP_FORCE_CUDA=1 and TWOSTEP_NO_CUDA=1 are both set; unset one of them")
    if never or (torch.cuda is None and not force):
        return None
    toolkit = find(env)
    if toolkit is None and torch.cuda is None:
        raise ToolchainError(
            "TWOSTEP_FORCE_CUDA=1 asks for the CUDA kernels, but there is no nvcc in CUDA_HOME, on PATH or in "
            "/usr/local/cuda. Install a CUDA toolkit, or build for the CPU alone:  unset TWOSTEP_FORCE_CUDA"
        )
    if toolkit is None:
        raise ToolchainError(
            f"torch {torch.version} is a CUDA {torch.cuda} build, but there is no nvcc in CUDA_HOME, on PATH or in "
            f"/usr/local/cuda. Install the CUDA {torch.cuda} toolkit and set CUDA_HOME to it, "
            "or build for the CPU alone:  TWOSTEP_NO_CUDA=1 pip install -e ."
        )
    if torch.cuda is not None and parse_version(toolkit.version)[0] != parse_version(torch.cuda)[0]:
        major = parse_version(torch.cuda)[0]
        raise ToolchainError(
            f"torch {torch.version} is built for CUDA {torch.cuda}, but {toolkit.nvcc} is CUDA {toolkit.version}: the "
            f"major versions must agree. Install a CUDA {major} toolkit and name it:  "
            f"CUDA_HOME=/usr/local/cuda-{torch.cuda} pip install -e .   "
            "(or build for the CPU alone:  TWOSTEP_NO_CUDA=1 pip install -e . )"
        )
    return toolkit


# Architectures


@dataclass(frozen=True, order=True)
class Arch:
    """One entry of an architecture list: 9.0, 9.0a (that chip alone), 12.0f (its family), 12.0+PTX (and all later)."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @classmethod
    def parse(cls, text: str) -> Arch:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if match is None:
            raise ToolchainError(
                f"{text!r} is no CUDA architecture. TORCH_CUDA_ARCH_LIST takes entries such as 8.0, 9.0a or 12.0+PTX, "
                'separated by ";" or spaces; for example  TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"'
            )
        return cls(int(match.group(1)), int(match.group(2)), match.group(3), match.group(4) is not None)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}" + ("+PTX" if self.ptx else "")

    @property
    def number(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{self.number},code=sm_{self.number}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.number},code=compute_{self.number}")
        return flags

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether code for this entry runs on a device of that compute capability (CUDA C++ Programming Guide, 5.1)."""
        if self.suffix == "a":
            return (self.major, self.minor) == (major, minor)
        if self.major == major and self.minor <= minor:
            return True
        return self.ptx and not self.suffix and (self.major, self.minor) <= (major, minor)


def supported_archs(toolkit: Toolkit, run: Run = _run) -> frozenset[str]:
    """The numbers ('80', '120') that this nvcc can generate code for."""
    listed = run([str(toolkit.nvcc), "--list-gpu-code"]).stdout
    return frozenset(re.findall(r"sm_(\d+)", listed))


def choose_archs(
    requested: str | None, supported: Iterable[str], visible: Sequence[tuple[int, int]], nvcc_version: str
) -> tuple[Arch, ...]:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs, else every default that this nvcc knows, with PTX of the newest."""
    known = frozenset(supported)
    if requested is not None and requested.strip():
        archs = tuple(sorted({Arch.parse(entry) for entry in re.split(r"[;,\s]+", requested.strip()) if entry}))
        source = "TORCH_CUDA_ARCH_LIST asks for"
    elif visible:
        archs = tuple(sorted({Arch(major, minor) for major, minor in visible}))
        source = "the visible GPU has compute capability"
    else:
        defaults = [arch for arch in map(Arch.parse, DEFAULT_ARCHS) if arch.number in known]
        if not defaults:
            raise ToolchainError(
                f"nvcc {nvcc_version} supports none of {', '.join(DEFAULT_ARCHS)}. Install CUDA 12.0 or newer, or name "
                'an architecture it knows:  TORCH_CUDA_ARCH_LIST="7.5" pip install -e .'
            )
        newest = defaults[-1]
        return (*defaults[:-1], Arch(newest.major, newest.minor, ptx=True))
    for arch in archs:
        if f"{arch.major}{arch.minor}" not in known:
            numbers = sorted(int(number) for number in known)
            raise ToolchainError(
                f"{source} {arch}, which nvcc {nvcc_version} cannot compile for (it knows "
                f"{', '.join(f'{n // 10}.{n % 10}' for n in numbers)}). Install a CUDA toolkit that knows it, "
                "or set TORCH_CUDA_ARCH_LIST to an older one with +PTX"
            )
    return archs


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver as it answers here: the newest CUDA it can run, and the GPUs it shows this process."""

    cuda: str
    capabilities: tuple[tuple[int, int], ...]


def query_driver() -> Driver | None:
    """Ask libcuda itself: unlike nvidia-smi it honours CUDA_VISIBLE_DEVICES, and unlike torch it needs no import."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Driver(text, ())
    capabilities = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ..._MINOR
        capabilities.append((major.value, minor.value))
    return Driver(text, tuple(capabilities))


# Host


def host_compiler(env: Mapping[str, str]) -> list[str]:
    """The C++ compiler as a command: CXX if set (it may carry a launcher, as in 'ccache g++'), else what is on PATH."""
    path = env.get("PATH")
    chosen = shlex.split(env.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0], path=path) is None:
            raise ToolchainError(f"CXX is {env['CXX']!r}, and there is no {chosen[0]!r}. Install it, or:  unset CXX")
        return chosen
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name, path=path):
            return [name]
    raise ToolchainError(
        "twostep compiles C++17, and there is no g++, c++ or clang++ on PATH. Install one (Debian and Ubuntu:  "
        "apt-get install g++   Fedora:  dnf install gcc-c++   conda:  conda install cxx-compiler ) "
        "or set CXX to yours"
    )


def compiler_name(command: Sequence[str], run: Run = _run) -> str:
    return run([*command, "--version"]).stdout.partition("\n")[0].strip()


def available_memory_gib() -> float | None:
    """Free memory, or what the container's limit leaves of it, in GiB; None where the system does not say."""
    limits = []
    try:
        meminfo = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if meminfo:
            limits.append(int(meminfo.group(1)) / 2**20)
        group = Path("/sys/fs/cgroup")
        maximum = (group / "memory.max").read_text().strip()
        if maximum != "max":
            limits.append((int(maximum) - int((group / "memory.current").read_text())) / 2**30)
    except OSError:
        pass  # no /proc (macOS) or no cgroup v2: use what was read so far
    return min(limits, default=None)


def available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def job_count(env: Mapping[str, str], cpus: int, memory_gib: float | None, gib_per_job: float) -> int:
    """MAX_JOBS, else as many compilers as there are cores and memory for."""
    requested = env.get("MAX_JOBS", "")
    if requested:
        if not requested.isdigit() or int(requested) < 1:
            raise ToolchainError(f"MAX_JOBS is {requested!r}; it must be a whole number from 1 on")
        return int(requested)
    if memory_gib is None:
        return cpus
    return max(1, min(cpus, int(memory_gib / gib_per_job)))
