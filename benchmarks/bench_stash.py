"""stash against autograd's own save_on_cpu and against nothing: a step of checkpointed blocks, and the memory it takes.

The floor is "nothing", which keeps every block's input on the device: what moving costs is the time above it.
`pytest benchmarks/bench_stash.py` prints seconds; extra_info has the bytes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep import ops

# (blocks, tokens, width, dtype): feed-forward blocks of Z-Image's width on a GPU, a small stack on the CPU.
SIZES = {"cuda": (16, 4608, 3840, torch.bfloat16), "cpu": (4, 512, 256, torch.float32)}


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.norm_modulate(x, self.norm)
        return x + self.down(ops.swiglu(self.gate(h), self.up(h)))


def _step(blocks: nn.ModuleList, x: Tensor, saved: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
    blocks.zero_grad()
    with saved:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        loss = x.float().square().mean()
    loss.backward()
    return [p.grad for p in blocks.parameters()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("candidate", ["nothing", "save_on_cpu", "stash"])
def test_stash(benchmark: Any, device: str, candidate: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    count, tokens, width, dtype = SIZES[device]
    torch.manual_seed(0)
    blocks = nn.ModuleList(FeedForward(width) for _ in range(count)).to(device, dtype)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype)
    held = ops.stash(min_bytes=1 << 16)
    candidates = {
        "nothing": contextlib.nullcontext,
        "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"),
        "stash": lambda: held,
    }
    expected = [g.clone() for g in _step(blocks, x, contextlib.nullcontext())]
    for found, gradient in zip(_step(blocks, x, candidates[candidate]()), expected, strict=True):
        assert torch.equal(found, gradient)
    del expected, found, gradient

    def call() -> None:
        _step(blocks, x, candidates[candidate]())
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"stash {count} blocks of {tokens}x{width} {dtype} {device}"
    benchmark(call)
    benchmark.extra_info["host_bytes"] = held.peak_bytes
    if device == "cuda":
        benchmark.extra_info["device_bytes"] = torch.cuda.max_memory_allocated()
