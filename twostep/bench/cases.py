"""What is measured: shapes that count, inputs for each operator, and the bytes that no implementation can avoid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPS = (
    "norm_modulate",
    "gated_residual",
    "gated_residual_norm_modulate",
    "qk_norm_rope",
    "rope",
    "swiglu",
    "euler_step",
    "two_step_split",
    "inject_gradient",
    "gradient_norms",
    "dmd_direction",
)
DATA_OPS = ("inject_gradient", "gradient_norms", "dmd_direction")  # nothing flows back through them

# Activation tensors moved, forward and backward; csrc/<op>.h derives each.
FLOORS = {
    "norm_modulate": (2, 3),
    "gated_residual": (3, 3),
    "gated_residual_norm_modulate": (4, 6),
    "qk_norm_rope": (4, 6),
    "rope": (2, 2),
    "swiglu": (3, 5),
}
# The operators on a sampler's state, which is float32, and on what a network gave, in the dtype that is measured:
# tensors of either moved forward, and moved backward.
STATE_FLOORS = {
    "euler_step": ((2, 1), (1, 1)),
    "two_step_split": ((3, 1), (2, 1)),
    "inject_gradient": ((2, 1), (0, 0)),
    "gradient_norms": ((1, 0), (0, 0)),
    "dmd_direction": ((2, 2), (0, 0)),
}
HEAD = 128


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise ValueError(f"shape is {text!r}, expected BATCHxLENGTHxWIDTH, for example 2x1152x3840")
        return cls(*map(int, parts))


CPU_SHAPES = (Shape(32, 96, 128), Shape(2, 1152, 3840))
CUDA_SHAPES = tuple(
    Shape(batch, length, width) for width in (3840, 3072, 4096) for batch in (1, 4) for length in (1152, 4608, 16896)
)


@dataclass
class Inputs:
    """Arguments of one call, the incoming gradients, and the number of bytes of one activation tensor."""

    arguments: dict[str, Tensor]
    options: dict[str, Any]
    incoming: tuple[Tensor, ...]

    def differentiable(self) -> list[Tensor]:
        return [t for t in self.arguments.values() if t.requires_grad]


def check(shape: Shape, ops: Sequence[str]) -> None:
    """ValueError where an operator cannot be measured at that shape."""
    head = min(HEAD, shape.width)
    if {"qk_norm_rope", "rope"} & set(ops) and (head % 2 or shape.width % head):
        raise ValueError(
            f"shape is {shape}, and for heads its width must be even, and a multiple of {HEAD} from there on"
        )


def activation_shape(op: str, shape: Shape) -> tuple[int, ...]:
    """[batch, length, width]; heads of 128 for q and k (one head where the width is smaller than two)."""
    if op in ("qk_norm_rope", "rope"):
        head = min(HEAD, shape.width)
        return shape.batch, shape.length, shape.width // head, head
    if op == "swiglu":  # the hidden width of the feed-forward: int(width / 3 * 8)
        return shape.batch, shape.length, shape.width * 8 // 3 // 16 * 16
    return shape.batch, shape.length, shape.width


def floor_bytes(op: str, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """The fewest bytes that the forward and the backward can move."""
    numel = 1
    for size in activation_shape(op, shape):
        numel *= size
    unit = numel * dtype.itemsize
    if op in STATE_FLOORS:
        of_state = numel * torch.float32.itemsize
        forward, backward = (state * of_state + network * unit for state, network in STATE_FLOORS[op])
        return forward, backward
    table = shape.length * min(HEAD, shape.width) * 4 if op in ("qk_norm_rope", "rope") else 0
    forward, backward = FLOORS[op]
    return forward * unit + table, backward * unit + table


def make(op: str, shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Fresh inputs of one call, as a model gives them: modulation per sample, a chunk of one projection."""
    size = activation_shape(op, shape)
    batch, length, width = size[0], size[1], size[-1]

    def randn(*sizes: int, grad: bool = True) -> Tensor:
        t = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return t.requires_grad_(grad)

    def modulation(count: int) -> list[Tensor]:
        chunks = randn(batch, 1, 4 * width, grad=False).chunk(4, dim=2)[:count]
        return [c.detach().requires_grad_() for c in chunks]

    def table() -> Tensor:
        angles = torch.randn(1, length, width // 2, generator=generator, device=device)
        return torch.stack((angles.cos(), angles.sin()), -1)

    incoming: tuple[Tensor, ...] = (randn(*size, grad=False),)
    arguments: dict[str, Tensor]
    if op == "norm_modulate":
        (scale,) = modulation(1)
        arguments = {"x": randn(*size), "weight": randn(width), "scale": scale}
    elif op == "gated_residual":
        (gate,) = modulation(1)
        arguments = {"x": randn(*size), "z": randn(*size), "gate": gate, "weight": randn(width)}
    elif op == "gated_residual_norm_modulate":
        gate, scale = modulation(2)
        weights = {"gate": gate, "post_weight": randn(width), "pre_weight": randn(width), "scale": scale}
        arguments = {"x": randn(*size), "z": randn(*size), **weights}
        incoming = (*incoming, randn(*size, grad=False))
    elif op == "qk_norm_rope":
        weights = {"q_weight": randn(width), "k_weight": randn(width)}
        arguments = {"q": randn(*size), "k": randn(*size), **weights, "freqs": table()}
        incoming = (*incoming, randn(*size, grad=False))
    elif op == "rope":
        arguments = {"x": randn(*size), "freqs": table()}
    elif op == "swiglu":
        arguments = {"gate": randn(*size), "up": randn(*size)}
    elif op in STATE_FLOORS:
        return _state_inputs(op, size, dtype, device, generator)
    else:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    return Inputs(arguments, {}, incoming)


def _state_inputs(
    op: str, size: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator
) -> Inputs:
    """A float32 state, and the network's tensors in the dtype that is measured."""

    def state(grad: bool = False) -> Tensor:
        return torch.randn(size, generator=generator, device=device).requires_grad_(grad)

    def network(grad: bool = False) -> Tensor:
        return state().to(dtype).requires_grad_(grad)

    if op == "euler_step":
        return Inputs({"x": state(True), "v": network(True)}, {"delta": -0.25}, (state(),))
    if op == "two_step_split":  # noise is data
        return Inputs({"noise": state(), "v": network(True)}, {"mid": 0.75}, (state(), state()))
    if op == "inject_gradient":
        gradients = {"inherited": state(), "own": state(), "factor": torch.full((), 0.5, device=device)}
        return Inputs(gradients, {"mid": 0.75, "weight": 0.1, "dtype": dtype}, (state(),))
    if op == "gradient_norms":
        return Inputs({"g": state()}, {}, (state(),))
    return Inputs({"x": state(), "real_clean": network(), "fake_clean": network()}, {}, (state(),))
