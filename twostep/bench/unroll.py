"""`twostep bench unroll`: memory and time of the two-step backward, on a transformer of growing depth.

Memory is measured as peaks within one call, parameters, their gradients and the noise left out:

    saved   bytes that autograd holds for backward, each storage once. Of a checkpointed block that is its input:
            what it computes again in backward goes by hooks of its own, and is seen in live alone.
    live    all tensors made since the call began. On CUDA, the allocator's peak; on the CPU, where there is no such
            record, a dispatch mode that sees every tensor come and go.

The reference is a single step: forward, loss and backward of one of the two models alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep.memory import LiveBytes
from twostep.ops import two_step_backward
from twostep.tables import markdown

CANDIDATES = ("single", "recompute", "retain", "plain")
CHANNELS = 64  # of an image token: 16 latent channels, 2 x 2 patches, as in Z-Image


class Block(nn.Module):
    """A transformer block in plain PyTorch, so that what is measured depends on no kernel of this library."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # [B, H, 3, L, D/H]
        attended = nn.functional.scaled_dot_product_attention(*heads.unbind(2))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        hidden: Tensor = self.up(self.norm2(x))
        branch: Tensor = self.down(nn.functional.gelu(hidden))
        return x + branch


class Transformer(nn.Module):
    def __init__(self, depth: int, width: int, heads: int, checkpointed: bool) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.checkpointed = checkpointed
        self.forwards = 0

    def forward(self, noisy: Tensor) -> Tensor:  # [B, L, channels]
        self.forwards += 1
        x = self.embed(noisy)
        for block in self.blocks:
            # checkpoint decides by grad mode itself: without a graph it just calls the block
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        velocity: Tensor = self.project(x)
        return velocity


class SavedBytes:
    """The bytes that autograd holds for backward at each moment, and their peak; some tensors' storages left out."""

    def __init__(self, without: Iterator[Tensor] | Sequence[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._without = {t.untyped_storage().data_ptr() for t in without}
        self._holders: Counter[int] = Counter()

    def pack(self, t: Tensor) -> _Saved:
        return _Saved(self, t)

    def measured(self) -> Any:
        """The region in which what is saved counts."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor)

    def hold(self, storage: torch.UntypedStorage) -> int | None:
        address = storage.data_ptr()
        if address in self._without:
            return None
        self._holders[address] += 1
        if self._holders[address] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return address

    def release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            self.now -= size


class _Saved:
    """One saved tensor; autograd drops it when the graph no longer needs it."""

    def __init__(self, meter: SavedBytes, t: Tensor) -> None:
        self.tensor = t.detach()  # an output that held its own graph would never be freed
        self._meter, self._size = meter, t.untyped_storage().nbytes()
        self._address = meter.hold(t.untyped_storage())

    def __del__(self) -> None:
        if self._address is not None:
            self._meter.release(self._address, self._size)


@dataclass(frozen=True)
class Setting:
    batch: int
    length: int
    width: int
    depth: int
    checkpointed: bool
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Row:
    depth: int
    checkpointed: bool
    mode: str
    saved_bytes: int
    live_bytes: int
    seconds: float
    first_forwards: int


class Workload:
    """Two models of one depth, and one call for each candidate. Gradients exist from the start, so none are counted."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        heads = max(1, setting.width // 64)
        self.first, self.second = (
            Transformer(setting.depth, setting.width, heads, setting.checkpointed).to(setting.device, setting.dtype)
            for _ in range(2)
        )
        shape = (setting.batch, setting.length, CHANNELS)
        self.noise = torch.randn(shape).to(setting.device, setting.dtype)
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def parameters(self) -> Iterator[Tensor]:
        yield from self.first.parameters()
        yield from self.second.parameters()

    def call(self, candidate: str) -> None:
        def loss(x: Tensor) -> Tensor:
            return x.square().mean()

        if candidate == "single":
            loss(self.noise - self.first(self.noise)).backward()
        else:
            two_step_backward(self.first, self.second, self.noise, (1, 0.75, 0), loss, loss, mode=candidate)


def peak_saved_bytes(work: Workload, candidate: str) -> int:
    meter = SavedBytes([*work.parameters(), work.noise])
    with meter.measured():
        work.call(candidate)
    return meter.peak


def peak_live_bytes(work: Workload, candidate: str) -> int:
    if work.setting.device != "cuda":
        meter = LiveBytes()
        with meter:
            work.call(candidate)
        return meter.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before: int = torch.cuda.memory_allocated()
    work.call(candidate)
    torch.cuda.synchronize()
    peak: int = torch.cuda.max_memory_allocated()
    return peak - before


def measure(setting: Setting, repetitions: int) -> list[Row]:
    work = Workload(setting)
    seconds: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
    for turn in range(repetitions + 1):
        for candidate in CANDIDATES:  # they take turns, so that a disturbance meets all of them
            with _timed(setting.device) as elapsed:
                work.call(candidate)
            if turn:  # the first warms up
                seconds[candidate].append(elapsed())
    rows = []
    for candidate in CANDIDATES:
        before = work.first.forwards
        live = peak_live_bytes(work, candidate)
        forwards = work.first.forwards - before
        saved = peak_saved_bytes(work, candidate)
        time_of = statistics.median(seconds[candidate])
        rows.append(Row(setting.depth, setting.checkpointed, candidate, saved, live, time_of, forwards))
    return rows


@contextmanager
def _timed(device: str) -> Iterator[Callable[[], float]]:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    start, end = time.perf_counter(), [0.0]
    yield lambda: end[0] - start
    wait()
    end[0] = time.perf_counter()


def table(rows: Sequence[Row]) -> str:
    head = ["depth", "blocks", "mode", "saved MB", "x single", "live MB", "x single", "ms", "x single", "runs of first"]
    lines = []
    single: dict[tuple[int, bool], Row] = {(r.depth, r.checkpointed): r for r in rows if r.mode == "single"}
    for row in rows:
        unit = single[row.depth, row.checkpointed]
        cells = [str(row.depth), "checkpointed" if row.checkpointed else "kept", row.mode]
        cells += [f"{row.saved_bytes / 1e6:.1f}", f"{row.saved_bytes / unit.saved_bytes:.2f}"]
        cells += [f"{row.live_bytes / 1e6:.1f}", f"{row.live_bytes / unit.live_bytes:.2f}"]
        cells += [f"{row.seconds * 1e3:.0f}", f"{row.seconds / unit.seconds:.2f}", str(row.first_forwards)]
        lines.append(cells)
    return markdown(head, lines, aligned=True)


def run(arguments: argparse.Namespace) -> int:
    from . import cases, make_out, prepared, report

    device = prepared(arguments)
    if arguments.repetitions < 1:
        raise ValueError(f"--repetitions is {arguments.repetitions}, expected at least 1")
    if min(arguments.depths) < 1:
        raise ValueError(f"--depths has {min(arguments.depths)}, expected at least 1")
    shape = cases.Shape.parse(arguments.shape or ("2x256x256" if device == "cpu" else "2x4096x2048"))
    heads = max(1, shape.width // 64)
    if shape.width % heads:
        raise ValueError(f"--shape is {shape}, and its width must be a multiple of 64, or smaller than 128")
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    make_out(arguments)
    rows: list[Row] = []
    for checkpointed in (False, True):
        for depth in arguments.depths:
            print(f"depth {depth}, blocks {'checkpointed' if checkpointed else 'kept'}", file=sys.stderr, flush=True)
            setting = Setting(shape.batch, shape.length, shape.width, depth, checkpointed, dtype, device)
            rows += measure(setting, arguments.repetitions)
    print(table(rows))
    if arguments.out:
        found = report.environment(device)
        described = ", ".join(f"{key} {value}" for key, value in found.items())
        (arguments.out / "unroll.md").write_text(f"{described}, shape {shape}, {dtype}\n\n{table(rows)}\n")
        content = {"environment": found, "shape": str(shape), "dtype": str(dtype), "rows": [asdict(r) for r in rows]}
        (arguments.out / "unroll.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {arguments.out / 'unroll.md'}\nwrote {arguments.out / 'unroll.json'}")
    return 0
