"""Timing: inputs rotate so that nothing sits in a cache, the candidates take turns, medians are compared.

On the CPU a call is timed by the wall clock. On CUDA one rotation through the inputs is captured in a graph and its
replays are timed by events, so that launch gaps do not count; launch overhead is measured on its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

# A set of inputs is used again only after this many bytes have gone by: several times the L2 of a GPU (60 MB on an
# H200), and on a CPU more than the part of a shared last-level cache that two cores can count on.
ROTATE_BYTES = {"cpu": 768 << 20, "cuda": 512 << 20}


def rotations(bytes_per_call: int, device: str) -> int:
    # On the CPU as many as candidates, at least, so that each has others in a turn.
    return max(6 if device == "cpu" else 2, min(256, -(-ROTATE_BYTES[device] // max(1, bytes_per_call))))


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward(function: Callable[..., Any], inputs: Any) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function(**inputs.arguments, **inputs.options)

    return call


def both(function: Callable[..., Any], inputs: Any) -> Callable[[], Any]:
    wanted = inputs.differentiable()

    def call() -> Any:
        return torch.autograd.grad(as_tuple(function(**inputs.arguments, **inputs.options)), wanted, inputs.incoming)

    return call


Function = TypeVar("Function", bound=Callable[..., Any])


def keep_for_another_backward(function: Function) -> Function:
    """Inside this function torch.compile makes backwards that may run again; else they overwrite what forward kept."""
    return cast(Function, functorch_config.patch(donated_buffer=False)(function))


def backward(function: Callable[..., Any], inputs: Any) -> Callable[[], Any]:
    wanted = inputs.differentiable()
    outputs = as_tuple(function(**inputs.arguments, **inputs.options))

    def call() -> Any:
        return torch.autograd.grad(outputs, wanted, inputs.incoming, retain_graph=True)

    return call


DIRECTIONS: dict[str, Callable[..., Callable[[], Any]]] = {"forward": forward, "backward": backward, "both": both}


def time_cpu(candidates: dict[str, Sequence[Callable[[], Any]]], seconds: float) -> dict[str, float]:
    """Median seconds of one call for each candidate; they take turns, so that a disturbance meets all of them.

    In a turn no two work on the same inputs: the second would find in the cache what the first has read.
    """
    for calls in candidates.values():
        for call in list(calls)[:3]:
            call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    turn, deadline = 0, time.perf_counter() + seconds * len(candidates)
    while turn < 7 or time.perf_counter() < deadline:
        for place, (name, calls) in enumerate(candidates.items()):
            call = calls[(turn + place * len(calls) // len(candidates)) % len(calls)]
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        turn += 1
    return {name: statistics.median(found) for name, found in samples.items()}


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_cuda(candidates: dict[str, Sequence[Callable[[], Any]]], seconds: float) -> dict[str, float]:
    graphs = {name: (capture(calls), len(calls)) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for graph, _ in graphs.values():
        graph.replay()
    deadline = time.perf_counter() + seconds * len(candidates)
    turn = 0
    while turn < 7 or time.perf_counter() < deadline:
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / 1000 / count)
        turn += 1
    return {name: statistics.median(found) for name, found in samples.items()}


def time_candidates(
    candidates: dict[str, Sequence[Callable[[], Any]]], device: str, seconds: float
) -> dict[str, float]:
    return (time_cuda if device == "cuda" else time_cpu)(candidates, seconds)


def launch_overhead(call: Callable[[], Any], device: str, count: int = 200) -> float:
    """Seconds that the host spends on one call: on CUDA without waiting for the device, on the CPU with tiny inputs."""
    for _ in range(20):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return elapsed / count


def copy_calls(numel: int, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """Copies of one activation into a new tensor, which is what the percentages are percentages of: like an operator, a
    copy allocates what it returns."""
    count = rotations(2 * numel * dtype.itemsize, device)
    buffers = torch.ones(count, numel, dtype=dtype, device=device)
    return [buffer.clone for buffer in buffers]


def saved_bytes(function: Callable[..., Any], inputs: Any) -> int:
    """Bytes that a call keeps for its backward beyond its own inputs, each storage counted once."""
    own = {t.untyped_storage().data_ptr() for t in inputs.arguments.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function(**inputs.arguments, **inputs.options)
    del outputs
    return sum(kept.values())
