"""Compiles csrc into twostep/_C.so with ninja, and writes the stamp twostep/_C.json beside it.

What is compiled follows from where a file stands in csrc, so that adding an op adds no line here:

    bindings/*.cpp    once each, against torch's headers (the LibTorch stable ABI): the only files that know torch
    <op>.cpp          once per instruction set, with -DTWOSTEP_ISA=portable | avx2 | avx512
    cpu/*.cpp         once: chooses among those at run time
    *.cu, cuda/*.cu   once each, by nvcc, in CUDA builds

The library is linked by name (-ltorch, no path to it) and holds its own CUDA runtime, so that the same file loads on
CPU-only and CUDA torch.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from build_backend import ROOT, installed_torch, stop
from twostep.build import Stamp, dump_stamp, hash_sources
from twostep.toolchain import (
    ABI_TARGET,
    CXX_GIB_PER_JOB,
    NVCC_GIB_PER_JOB,
    Arch,
    ToolchainError,
    Toolkit,
    TorchFiles,
    available_cpus,
    available_memory_gib,
    choose_archs,
    choose_toolkit,
    compiler_name,
    flag,
    host_compiler,
    job_count,
    parse_version,
    query_driver,
    supported_archs,
)
from twostep.version import __version__

CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-Wall", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# Memory is checked by calls: inlined into kernels that are themselves inlined whole, checks triple the compile time.
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE_FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


@dataclass(frozen=True)
class Plan:
    """Everything that was decided before the first compiler runs."""

    torch: TorchFiles
    compiler: list[str]
    toolkit: Toolkit | None
    archs: tuple[Arch, ...]
    sanitize: bool
    jobs: int

    @property
    def folder(self) -> Path:
        """Where objects go, relative to the root; one folder per kind of build, so that they do not undo each other."""
        return Path("build") / (("cuda" if self.toolkit else "cpu") + ("-sanitize" if self.sanitize else ""))


def make_plan() -> Plan:
    env = os.environ
    torch = installed_torch()
    compiler = host_compiler(env)
    toolkit = choose_toolkit(torch, env)
    archs: tuple[Arch, ...] = ()
    if toolkit is not None:
        driver = query_driver()
        visible = driver.capabilities if driver is not None else ()
        archs = choose_archs(env.get("TORCH_CUDA_ARCH_LIST"), supported_archs(toolkit), visible, toolkit.version)
    gib = NVCC_GIB_PER_JOB if toolkit is not None else CXX_GIB_PER_JOB
    jobs = job_count(env, available_cpus(), available_memory_gib(), gib)
    return Plan(torch, compiler, toolkit, archs, flag(env, "TWOSTEP_SANITIZE"), jobs)


# build.ninja


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]


def _compile_steps(plan: Plan) -> list[tuple[str, Path, Path, list[str]]]:
    """(rule, source, object, flags) of every translation unit, the slow ones first; paths relative to the root."""
    steps: list[tuple[str, Path, Path, list[str]]] = []
    csrc = Path("csrc")
    if plan.toolkit is not None:
        for path in sorted([*(ROOT / csrc).glob("*.cu"), *(ROOT / csrc / "cuda").glob("*.cu")]):
            source = path.relative_to(ROOT)
            steps.append(("nvcc", source, plan.folder / source.with_suffix(".cu.o"), []))
    major, minor = parse_version(ABI_TARGET)
    flags = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    flags += [f"-isystem{folder}" for folder in plan.torch.include_dirs]
    if plan.toolkit is not None:
        flags += ["-DTWOSTEP_CUDA", f"-isystem{plan.toolkit.include}"]
    for path in sorted((ROOT / csrc / "bindings").glob("*.cpp"), reverse=True):
        source = path.relative_to(ROOT)
        steps.insert(0, ("cxx", source, plan.folder / source.with_suffix(".o"), flags))
    for path in sorted((ROOT / csrc).glob("*.cpp")):
        source = path.relative_to(ROOT)
        for isa in _isas():
            flags = [f"-DTWOSTEP_ISA={isa}", *ISA_FLAGS[isa]]
            steps.append(("cxx", source, plan.folder / source.with_suffix(f".{isa}.o"), flags))
    for path in sorted((ROOT / csrc / "cpu").glob("*.cpp")):
        source = path.relative_to(ROOT)
        steps.append(("cxx", source, plan.folder / source.with_suffix(".o"), []))
    return steps


def ninja_file(plan: Plan) -> str:
    """The text of build.ninja, to be run from the root."""
    sanitize = SANITIZE_FLAGS if plan.sanitize else []
    cxx = [*plan.compiler, *CXX_FLAGS, *sanitize, "-Icsrc"]
    link = [*plan.compiler, "-shared", *sanitize, "-Wl,--exclude-libs,ALL"]
    libraries = [f"-L{plan.torch.library_dir}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    lines = [
        f"builddir = {_escape(str(plan.folder))}",
        "rule cxx",
        f"  command = {_shell(cxx)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
    ]
    if plan.toolkit is not None:
        gencode = [code for arch in plan.archs for code in arch.gencode()]
        nvcc = [str(plan.toolkit.nvcc), *NVCC_FLAGS, *gencode, "-Icsrc"]
        libraries += [f"-L{plan.toolkit.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        lines += [
            "rule nvcc",
            # ptxas' report (registers, spills) goes to a file beside the object; warnings and errors are shown.
            f"  command = {_shell(nvcc)} $flags -MD -MF $out.d -c $in -o $out > $out.ptxas 2>&1"
            " || { cat $out.ptxas; false; } && { grep -iE '(warning|remark)' $out.ptxas || true; }",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
        ]
    lines += ["rule link", f"  command = {_shell(link)} -o $out $in {_shell(libraries)}", "  description = link $out"]
    objects = []
    for rule, source, output, flags in _compile_steps(plan):
        lines += [f"build {_escape(str(output))}: {rule} {_escape(str(source))}", f"  flags = {_shell(flags)}"]
        objects.append(_escape(str(output)))
    lines += [f"build {_escape(str(plan.folder / '_C.so'))}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            stop("building twostep needs ninja:  pip install ninja")
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def compile_library(plan: Plan) -> tuple[Path, Stamp]:
    """Bring build/<kind>/_C.so up to date; returns it with its stamp."""
    folder = ROOT / plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    cuda = plan.toolkit.version if plan.toolkit is not None else None
    stamp = Stamp(
        version=__version__,
        torch=plan.torch.version,
        abi_target=ABI_TARGET,
        cuda=cuda,
        archs=[str(arch) for arch in plan.archs],
        machine=platform.machine(),
        python=platform.python_version(),
        compiler=compiler_name(plan.compiler),
        # Read before compiling: a file edited meanwhile then shows as stale, and not as built.
        sources=hash_sources(ROOT / "csrc", cuda is not None),
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    print(
        f"twostep: torch {plan.torch.version}, "
        + (f"CUDA {cuda} for {' '.join(stamp['archs'])}" if cuda else "CPU only")
        + f", {stamp['compiler']}, {plan.jobs} jobs",
        flush=True,
    )
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs at a time would write the same objects
        (folder / "build.ninja").write_text(ninja_file(plan))
        command = [_ninja(), "-f", str(plan.folder / "build.ninja"), "-j", str(plan.jobs)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            stop(
                "a compiler failed; its messages are above. If it was killed, memory ran out: "
                f"build with fewer jobs than {plan.jobs}, as in  MAX_JOBS=1 pip install -e ."
            )
    return folder / "_C.so", stamp


class BuildKernels(build_ext):
    """`build_ext` that compiles the one library, into the source tree for editable installs."""

    def run(self) -> None:
        try:
            library, stamp = compile_library(make_plan())
        except ToolchainError as error:
            stop(str(error))
        target = (ROOT if self.inplace else Path(self.build_lib)) / "twostep"
        target.mkdir(parents=True, exist_ok=True)
        # Replace, never overwrite: a running process may have the old file mapped.
        temporary = target / f"_C.so.{os.getpid()}"
        shutil.copy2(library, temporary)
        (target / "_C.json").write_text(dump_stamp(stamp))
        os.replace(temporary, target / "_C.so")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "twostep" / name) for name in ("_C.so", "_C.json")]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {built: str(ROOT / "twostep" / Path(built).name) for built in self.get_outputs()}


class WheelForEveryPython(bdist_wheel):
    """The library holds no Python symbols, so one wheel per platform serves all Pythons."""

    def run(self) -> None:
        # setuptools keeps build/lib between runs, and would ship modules that were deleted since.
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
