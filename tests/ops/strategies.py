"""Calls as they really come, drawn by hypothesis: dtypes, widths, strides, options present and absent."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .oracle import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 255, 256, 384, 520, 1000, 1030)


class Draw:
    """Tensors of one case, on one generator, in the layouts that callers have."""

    def __init__(self, draw: Any, dtype: torch.dtype, device: str):
        self.draw = draw
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        # Parameters come in the activations' dtype, in float32, or mixed.
        self.parameter_dtypes = (
            [dtype]
            if dtype == torch.float64
            else draw(st.sampled_from([[dtype], [torch.float32], [dtype, torch.float32]]))
        )

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def activation(self, *shape: int) -> Tensor:
        """Contiguous, a chunk of something wider, or transposed: the strides that real models give."""
        layout = self.draw(st.sampled_from(["contiguous", "chunk", "offset", "transposed", "strided last"]))
        *lead, width = shape
        if layout == "chunk":
            return self.randn(*lead, 3 * width)[..., width : 2 * width]
        if layout == "offset":
            return self.randn(*lead, width + 3)[..., 1 : 1 + width]
        if layout == "transposed" and len(shape) > 2:
            return self.randn(lead[1], lead[0], *lead[2:], width).transpose(0, 1)
        if layout == "strided last":
            return self.randn(*lead, 2 * width)[..., ::2]
        return self.randn(*shape)

    def parameter(self, *shape: int) -> Tensor:
        return self.randn(*shape, dtype=self.draw(st.sampled_from(self.parameter_dtypes)))

    def weight(self, width: int) -> Tensor | None:
        return self.draw(st.sampled_from([None, self.parameter(width)]))

    def modulation(self, batch: int, length: int, width: int) -> Tensor | None:
        form = self.draw(
            st.sampled_from(["none", "matrix", "sample", "chunk", "token", "token chunk", "shared", "shared token"])
        )
        if form == "matrix":
            return self.parameter(batch, width)
        if form == "sample":
            return self.parameter(batch, 1, width)
        if form == "chunk":
            return self.parameter(batch, 1, 4 * width).chunk(4, dim=2)[self.draw(st.integers(0, 3))]
        if form == "token":
            return self.parameter(batch, length, width)
        if form == "token chunk":
            return self.parameter(batch, length, 2 * width).chunk(2, dim=2)[1]
        if form == "shared":
            return self.parameter(width)
        if form == "shared token":
            return self.parameter(1, length, width)
        return None


def _shape(draw: Any) -> tuple[int, int, int]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    return batch, length, draw(st.sampled_from(WIDTHS))


@st.composite
def norm_modulate(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, (batch, length, width) = Draw(draw, dtype, device), _shape(draw)
    return Case(
        "norm_modulate",
        {
            "x": tensors.activation(batch, length, width),
            "weight": tensors.weight(width),
            "scale": tensors.modulation(batch, length, width),
            "shift": tensors.modulation(batch, length, width),
        },
        {"norm": draw(st.sampled_from(["rms", "layer"])), "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2]))},
    )


@st.composite
def gated_residual(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, (batch, length, width) = Draw(draw, dtype, device), _shape(draw)
    return Case(
        "gated_residual",
        {
            "x": tensors.activation(batch, length, width),
            "z": tensors.activation(batch, length, width),
            "gate": tensors.modulation(batch, length, width),
            "weight": tensors.weight(width),
        },
        {
            "norm": draw(st.sampled_from(["rms", "none"])),
            "gate_act": draw(st.sampled_from(["tanh", "none"])),
            "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        },
    )


@st.composite
def gated_residual_norm_modulate(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, (batch, length, width) = Draw(draw, dtype, device), _shape(draw)
    return Case(
        "gated_residual_norm_modulate",
        {
            "x": tensors.activation(batch, length, width),
            "z": tensors.activation(batch, length, width),
            "gate": tensors.modulation(batch, length, width),
            "post_weight": tensors.weight(width),
            "pre_weight": tensors.weight(width),
            "scale": tensors.modulation(batch, length, width),
            "shift": tensors.modulation(batch, length, width),
        },
        {
            "norm": draw(st.sampled_from(["rms", "layer"])),
            "post_norm": draw(st.sampled_from(["rms", "none"])),
            "gate_act": draw(st.sampled_from(["tanh", "none"])),
            "eps": draw(st.sampled_from([1e-5, 1e-2])),
        },
    )


def freqs(tensors: Draw, batch: int, length: int, width: int) -> Tensor:
    shared = tensors.draw(st.booleans())
    angles = torch.randn(1 if shared else batch, length, width // 2, generator=tensors.generator, dtype=torch.float64)
    table = torch.stack((angles.cos(), angles.sin()), -1).to(tensors.device)
    return table if tensors.dtype == torch.float64 else table.float()


def _heads(draw: Any) -> tuple[int, int, int, int]:
    width = draw(st.sampled_from([2, 4, 6, 10, 16, 32, 34, 64, 96, 128, 130, 256]))
    return draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 5)), width


@st.composite
def qk_norm_rope(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, (batch, length, heads, width) = Draw(draw, dtype, device), _heads(draw)
    k_heads = draw(st.sampled_from([heads, 1]))
    return Case(
        "qk_norm_rope",
        {
            "q": tensors.activation(batch, length, heads, width),
            "k": tensors.activation(batch, length, k_heads, width),
            "q_weight": tensors.weight(width),
            "k_weight": tensors.weight(width),
            "freqs": freqs(tensors, batch, length, width),
        },
        {"eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2]))},
    )


@st.composite
def rope(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, (batch, length, heads, width) = Draw(draw, dtype, device), _heads(draw)
    x = tensors.activation(batch, length, heads, width)
    return Case("rope", {"x": x, "freqs": freqs(tensors, batch, length, width)})


@st.composite
def swiglu(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, (batch, length, width) = Draw(draw, dtype, device), _shape(draw)
    shape = draw(st.sampled_from([(width,), (length, width), (batch, length, width), (batch, length, 2, width)]))
    return Case("swiglu", {"gate": tensors.activation(*shape), "up": tensors.activation(*shape)})


NARROW = (torch.bfloat16, torch.float16)


def _samples(draw: Any) -> tuple[int, ...]:
    """[batch, ...] of any rank: latents, tokens, numbers; also longer than a piece of csrc/views.h's sample_piece."""
    sizes = st.sampled_from([1, 2, 3, 7, 8, 16, 33, 64])
    shape = draw(st.lists(sizes, min_size=0, max_size=3))
    return (draw(st.integers(1, 3)), *shape) if draw(st.booleans()) else (draw(st.integers(1, 3)), 3, 45, 67)


def network_dtype(draw: Any, dtype: torch.dtype) -> torch.dtype:
    """What the network gives beside a state of that dtype: the same, 16 bits beside float32, or something odd."""
    usual = [dtype, *NARROW] if dtype == torch.float32 else [dtype]
    return draw(st.sampled_from(usual * 3 + [torch.float32]))


def state(tensors: Draw, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """A state or a velocity: contiguous, channels last, some channels of more, one sample for all, every other one."""
    layout = tensors.draw(st.sampled_from(["contiguous", "channels last", "channels", "expanded", "every other"]))
    if layout == "channels last" and len(shape) > 2:
        return tensors.randn(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    if layout == "channels" and len(shape) > 1:
        return tensors.randn(shape[0], 3 * shape[1], *shape[2:], dtype=dtype)[:, shape[1] : 2 * shape[1]]
    if layout == "expanded":
        return tensors.randn(1, *shape[1:], dtype=dtype).expand(shape)
    if layout == "every other":
        return tensors.randn(2 * shape[0], *shape[1:], dtype=dtype)[::2]
    return tensors.randn(*shape, dtype=dtype)


@st.composite
def euler_step(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, shape = Draw(draw, dtype, device), _samples(draw)
    x, v = state(tensors, shape), state(tensors, shape, network_dtype(draw, dtype))
    form = draw(st.sampled_from(["number", "shared", "per sample"]))
    if form == "number":
        return Case("euler_step", {"x": x, "v": v}, {"delta": draw(st.sampled_from([-1.0, -0.25, 0.1, 0]))})
    delta = tensors.randn(*([shape[0]] if form == "per sample" else []), dtype=torch.float32)
    return Case("euler_step", {"x": x, "v": v, "delta": delta})


@st.composite
def two_step_split(draw: Any, dtype: torch.dtype, device: str = "cpu") -> Case:
    tensors, shape = Draw(draw, dtype, device), _samples(draw)
    noise, v = state(tensors, shape), state(tensors, shape, network_dtype(draw, dtype))
    options = {"mid": draw(st.sampled_from([0.75, 0.5, 0.9])), "inherit": draw(st.sampled_from([1.0, 0.1, 0.0]))}
    return Case("two_step_split", {"noise": noise, "v": v}, options)
