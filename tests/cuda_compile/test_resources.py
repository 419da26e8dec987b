"""What the CUDA compiler makes of every kernel, without a GPU: registers, local memory, width of accesses."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_compile"
SOURCES = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.cu"))
ARCHITECTURES = ("80", "90", "100", "120")
FLAGS = ("-O3", "-std=c++17", "-lineinfo", f"-I{CSRC}")
REGISTERS = 65536  # of a multiprocessor, on all four


def _nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = [shutil.which("nvcc"), *(shutil.which(f"{home}/bin/nvcc") for home in homes if home)]
    return next((str(Path(path).resolve()) for path in found if path), None)


NVCC = _nvcc()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc: neither on the PATH nor in CUDA_HOME nor in /usr/local/cuda"),
]


def _compiled(source: str, what: str, *flags: str) -> str:
    """What nvcc writes, kept under the hash of all that goes into it."""
    assert NVCC is not None
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    headers = [p for p in sorted(CSRC.rglob("*")) if p.suffix in {".h", ".cuh"} and "simt" not in p.parts]
    parts = [version, *FLAGS, *flags, *(p.read_text() for p in headers), (CSRC / source).read_text()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    kept = CACHE / f"{source.replace('/', '-')}-{digest}.{what}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_suffix(f".{os.getpid()}")
        command = [NVCC, *FLAGS, *flags, str(CSRC / source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if what == "log":
            made.write_text(done.stdout + done.stderr)
        made.replace(kept)
    return kept.read_text()


def _log(source: str) -> str:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return _compiled(source, "log", "-c", "-Xptxas", "-v", *targets)


def _ptx(source: str) -> str:
    return _compiled(source, "ptx", "-ptx", "-arch=compute_90")


@dataclass(frozen=True)
class Report:
    """ptxas on one kernel."""

    kernel: str  # mangled
    architecture: str
    registers: int
    stack: int
    spilled: int
    text: str


def parse_reports(log: str) -> Iterator[Report]:
    for block in log.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'(\w+)' for 'sm_(\w+)'", block)[0]
        stack, stores, loads = (
            int(n)
            for n in re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)[0]
        )
        yield Report(
            name, architecture, int(re.findall(r"Used (\d+) registers", block)[0]), stack, stores + loads, block
        )


@dataclass(frozen=True)
class Entry:
    """A kernel in PTX."""

    kernel: str
    threads: int  # of a block, at most
    blocks: int  # to reside on a multiprocessor, at least
    body: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The integers among its template arguments: vector width, then vectors a thread, where there are any."""
        return tuple(int(n) for n in re.findall(r"Li(\d+)E", self.kernel))

    @property
    def element(self) -> int:
        """Bytes of its dtype."""
        return 2 if "__nv_bfloat16" in self.kernel or "__half" in self.kernel else 4


def parse_entries(ptx: str) -> Iterator[Entry]:
    for block in ptx.split(".visible .entry ")[1:] + ptx.split("\n.entry ")[1:]:
        name = re.match(r"\w+", block)
        assert name is not None
        threads = re.search(r"\.maxntid (\d+)", block)
        blocks = re.search(r"\.minnctapersm (\d+)", block)
        assert threads is not None, f"{name[0]} has no launch bound"
        body = block.split("\n}\n")[0]
        yield Entry(name[0], int(threads[1]), int(blocks[1]) if blocks else 1, body)


@pytest.fixture(scope="module")
def reports() -> dict[str, list[Report]]:
    with ThreadPoolExecutor(2) as pool:
        return {s: list(parse_reports(log)) for s, log in zip(SOURCES, pool.map(_log, SOURCES), strict=True)}


@pytest.fixture(scope="module")
def entries() -> dict[str, list[Entry]]:
    with ThreadPoolExecutor(2) as pool:
        return {s: list(parse_entries(ptx)) for s, ptx in zip(SOURCES, pool.map(_ptx, SOURCES), strict=True)}


WITH_KERNELS = [s for s in SOURCES if "__global__" in (CSRC / s).read_text()]


def test_the_parsers_find_what_must_not_be() -> None:
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers"""
    assert [(r.kernel, r.architecture, r.registers, r.stack, r.spilled) for r in parse_reports(log)] == [
        ("_Z1kv", "90", 64, 16, 12)
    ]
    ptx = ".visible .entry _Z1kILi8ELi2EEv(\n)\n.maxntid 384\n.minnctapersm 2\n{\n ld.global.nc.u16 %r, [%rd];\n}\n"
    (entry,) = parse_entries(ptx)
    assert (entry.threads, entry.blocks, entry.shape) == (384, 2, (8, 2)) and narrow_accesses(entry)


@pytest.mark.parametrize("source", WITH_KERNELS)
def test_no_kernel_spills_or_uses_local_memory(reports: dict[str, list[Report]], source: str) -> None:
    found = reports[source]
    assert {r.architecture for r in found} == set(ARCHITECTURES)
    spilling = [(r.kernel, r.architecture, r.stack, r.spilled) for r in found if r.stack or r.spilled]
    assert spilling == []


@pytest.mark.parametrize("source", WITH_KERNELS)
def test_registers_let_the_promised_blocks_reside(
    reports: dict[str, list[Report]], entries: dict[str, list[Entry]], source: str
) -> None:
    bounds = {e.kernel: e for e in entries[source]}
    for report in reports[source]:
        entry = bounds[report.kernel]
        warps = entry.blocks * -(-entry.threads // 32)
        allocated = -(-report.registers // 8) * 8 * 32  # a warp's registers come in units of 256
        assert warps * allocated <= REGISTERS, (report.kernel, report.architecture, report.registers, entry)


def narrow_accesses(entry: Entry) -> list[str]:
    """Loads and stores of single 16-bit elements in device memory."""
    return re.findall(r"(?:ld|st)\.global\S*\.[bu]16 .*", entry.body)


def wide_accesses(entry: Entry, kind: str) -> list[str]:
    return re.findall(rf"{kind}\.global\S*\.v4\S* .*", entry.body)


@pytest.mark.parametrize("source", [s for s in WITH_KERNELS if not s.startswith("cuda/")])
def test_aligned_variants_move_16_bytes_at_a_time(entries: dict[str, list[Entry]], source: str) -> None:
    aligned = [e for e in entries[source] if e.shape[0] * e.element == 16]
    assert aligned and len(aligned) < len(entries[source])
    for entry in aligned:
        assert narrow_accesses(entry) == []
        assert wide_accesses(entry, "st"), entry.kernel
        staged = "_rows" in entry.kernel and len(entry.shape) > 1 and entry.shape[1] > 0
        if staged:
            assert re.search(r"cp\.async\.cg\.shared\.global \[\S+\], \[\S+\], 16", entry.body), entry.kernel
        else:
            assert wide_accesses(entry, "ld"), entry.kernel
    for entry in entries[source]:
        if entry.element == 2 and entry not in aligned:
            assert narrow_accesses(entry), entry.kernel


def test_sums_over_samples_read_16_bytes_at_a_time(entries: dict[str, list[Entry]]) -> None:
    pieces = [e for e in entries["cuda/sample_sums.cu"] if "sum_pieces" in e.kernel]
    assert len(pieces) == 2 * (5 + 3)  # differences of five pairs of dtypes, squares of three, aligned or not
    for entry in pieces:
        aligned = entry.shape[0] * entry.element == 16
        assert bool(wide_accesses(entry, "ld")) == aligned, entry.kernel
        assert aligned is False or narrow_accesses(entry) == []
