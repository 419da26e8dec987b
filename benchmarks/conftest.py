"""pytest-benchmark over every operator: `pytest benchmarks`, one file an operator, one group a case.

A group compares the candidates of one shape, dtype and direction. `twostep bench` prints the same measurements as one
table with bandwidths; this is the form for pytest-benchmark's own tools (--benchmark-autosave, --benchmark-compare).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from twostep.allocator import keep_freed_memory
from twostep.bench import cases, measure, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = cases.CPU_SHAPES if DEVICE == "cpu" else cases.CUDA_SHAPES
DTYPES = ("float32", "bfloat16") if DEVICE == "cpu" else ("bfloat16",)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> cases.Shape:
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(params=list(timing.DIRECTIONS))
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    params=["twostep", "eager", "F.rms_norm", "torch.add", "compile", "liger", "quack", "flash-attn", "xformers"]
)
def candidate(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def time_op(
    benchmark: Any, shape: cases.Shape, dtype: torch.dtype, direction: str, candidate: str
) -> Callable[[str], None]:
    @timing.keep_for_another_backward
    def run(op: str) -> None:
        if op in cases.DATA_OPS and direction != "forward":
            pytest.skip(f"{op} has no backward")
        keep_freed_memory()
        floor = dict(zip(("forward", "backward"), cases.floor_bytes(op, shape, dtype), strict=True))
        floor["both"] = sum(floor.values())
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        count = timing.rotations(floor["both"], DEVICE)
        inputs = [cases.make(op, shape, dtype, DEVICE, generator) for _ in range(count)]
        candidates, _ = measure.candidates_of(op, inputs[0], DEVICE, candidate == "compile")
        if candidate not in candidates:
            pytest.skip(f"{candidate} has no {op} here")
        calls = itertools.cycle([timing.DIRECTIONS[direction](candidates[candidate], i) for i in inputs])
        benchmark.group = f"{op} {shape} {str(dtype).removeprefix('torch.')} {direction}"
        benchmark.extra_info["floor_bytes"] = floor[direction]

        def call() -> None:
            next(calls)()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(call)

    return run
