"""One measured case: an operator at a shape, dtype and direction, beside everything a user would pick instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from twostep import ops

from . import cases, expressions, peers, timing
from .cases import Inputs, Shape

ORACLE_ROWS = 64  # tokens on which the error is measured: float64 on a large case would take longer than the timing


@dataclass
class Row:
    """Seconds of each candidate, and what stands beside them."""

    op: str
    shape: str
    dtype: str
    direction: str
    floor_bytes: int
    copy_bytes_per_second: float
    seconds: dict[str, float]
    saved_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def percent_of_copy(self) -> float:
        return 100 * self.floor_bytes / self.seconds["twostep"] / self.copy_bytes_per_second

    def ratio(self, candidate: str) -> float | None:
        found = self.seconds.get(candidate)
        return None if found is None else found / self.seconds["twostep"]


def candidates_of(
    op: str, inputs: Inputs, device: str, compiled: bool
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    eager = getattr(expressions.diffusers, op)
    found: dict[str, Callable[..., Any]] = {"twostep": getattr(ops, op), "eager": eager}
    if hasattr(expressions.native, op):
        found[expressions.NATIVE_NAMES.get(op, "F.rms_norm")] = getattr(expressions.native, op)
    if compiled:
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        found["compile"] = torch.compile(eager, dynamic=False, mode=mode)
    installed, refused = peers.available(op, inputs, device)
    return {**found, **installed}, refused


def relative_errors(
    op: str, shape: Shape, dtype: torch.dtype, device: str, candidates: dict[str, Callable[..., Any]]
) -> dict[str, float]:
    """The largest relative error, over the outputs and all gradients, against float64."""
    small = Shape(min(2, shape.batch), min(ORACLE_ROWS, shape.length), shape.width)
    generator = torch.Generator(device=device).manual_seed(1)
    inputs = cases.make(op, small, dtype, device, generator)

    def everything(function: Callable[..., Any], arguments: dict[str, Any]) -> list[torch.Tensor]:
        wanted = [t for t in arguments.values() if t.requires_grad]
        outputs = timing.as_tuple(function(**arguments, **inputs.options))
        if not wanted:
            return list(outputs)
        incoming = [g.to(o.dtype) for g, o in zip(inputs.incoming, outputs, strict=True)]
        return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, wanted, incoming))

    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.arguments.items()}
    exact = everything(getattr(ops.reference, op), wide)
    errors = {}
    for name, function in candidates.items():
        found = everything(function, inputs.arguments)
        errors[name] = max(
            ((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True) if e.norm() > 0
        )
    return errors


@timing.keep_for_another_backward
def measure(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    directions: tuple[str, ...],
    *,
    seconds: float = 1.0,
    compiled: bool = True,
) -> list[Row]:
    """One row for each direction, all timed on the same rotating inputs."""
    generator = torch.Generator(device=device).manual_seed(0)
    forward_bytes, backward_bytes = cases.floor_bytes(op, shape, dtype)
    floor = {"forward": forward_bytes, "backward": backward_bytes, "both": forward_bytes + backward_bytes}
    count = timing.rotations(forward_bytes + backward_bytes, device)
    inputs = [cases.make(op, shape, dtype, device, generator) for _ in range(count)]
    candidates, refused = candidates_of(op, inputs[0], device, compiled)
    errors = relative_errors(op, shape, dtype, device, candidates)
    saved = {name: timing.saved_bytes(function, inputs[0]) for name, function in candidates.items()}

    numel = inputs[0].incoming[0].numel()
    copy_bytes = 2 * numel * dtype.itemsize
    copies = timing.copy_calls(numel, dtype, device)
    rows = []
    for direction in directions:
        if op in cases.DATA_OPS and direction != "forward":
            continue
        make_call = timing.DIRECTIONS[direction]
        calls = {name: [make_call(function, i) for i in inputs] for name, function in candidates.items()}
        found = timing.time_candidates({**calls, "copy": copies}, device, seconds)
        speed = copy_bytes / found.pop("copy")
        name = str(dtype).removeprefix("torch.")
        rows.append(Row(op, str(shape), name, direction, floor[direction], speed, found, saved, errors, refused))
        del calls
    return rows
