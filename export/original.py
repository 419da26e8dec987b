"""Z-Image's and FLUX.2's own names for their weights, in which single files are published, and diffusers' names.

    to_original(state, family)      from_original(state, family)      inverse of each other, bit for bit

q, k and v are one matrix there, FLUX.2's last modulation has shift before scale, and the weight of a norm in its
attention is called scale. What the table does not name keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Names:
    """Pairs of modules, diffusers' and the original; {n} stands for a number."""

    modules: tuple[tuple[str, str], ...]
    joined: tuple[tuple[tuple[str, ...], str], ...]  # modules that are one in the original, its rows in this order
    scales: tuple[str, ...] = ()  # originals whose weight is called scale
    swapped: tuple[str, ...] = ()  # originals that have shift before scale


def _flux2_double() -> tuple[tuple[str, str], ...]:
    ours, theirs = "transformer_blocks.{n}.", "double_blocks.{n}."
    pairs = (
        ("attn.to_out.0", "img_attn.proj"),
        ("attn.to_add_out", "txt_attn.proj"),
        ("attn.norm_q", "img_attn.norm.query_norm"),
        ("attn.norm_k", "img_attn.norm.key_norm"),
        ("attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k", "txt_attn.norm.key_norm"),
        ("ff.linear_in", "img_mlp.0"),
        ("ff.linear_out", "img_mlp.2"),
        ("ff_context.linear_in", "txt_mlp.0"),
        ("ff_context.linear_out", "txt_mlp.2"),
    )
    return tuple((ours + a, theirs + b) for a, b in pairs)


def _z_image_blocks() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[tuple[str, ...], str], ...]]:
    pairs = (("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"))
    stacks = [f"{stack}.{{n}}.attention." for stack in ("layers", "noise_refiner", "context_refiner")]
    modules = tuple((stack + a, stack + b) for stack in stacks for a, b in pairs)
    return modules, tuple((tuple(stack + part for part in QKV), stack + "qkv") for stack in stacks)


_BLOCKS, _JOINED = _z_image_blocks()
FAMILIES = {
    "z-image": Names(
        (
            *_BLOCKS,
            ("all_x_embedder.2-1", "x_embedder"),
            ("all_final_layer.2-1.linear", "final_layer.linear"),
            ("all_final_layer.2-1.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
        ),
        _JOINED,
    ),
    "flux2": Names(
        (
            *_flux2_double(),
            ("single_transformer_blocks.{n}.attn.to_qkv_mlp_proj", "single_blocks.{n}.linear1"),
            ("single_transformer_blocks.{n}.attn.to_out", "single_blocks.{n}.linear2"),
            ("single_transformer_blocks.{n}.attn.norm_q", "single_blocks.{n}.norm.query_norm"),
            ("single_transformer_blocks.{n}.attn.norm_k", "single_blocks.{n}.norm.key_norm"),
            ("x_embedder", "img_in"),
            ("context_embedder", "txt_in"),
            ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
            ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
            ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
            ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
            ("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
            ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
            ("single_stream_modulation.linear", "single_stream_modulation.lin"),
            ("norm_out.linear", "final_layer.adaLN_modulation.1"),
            ("proj_out", "final_layer.linear"),
        ),
        (
            (tuple(f"transformer_blocks.{{n}}.attn.{part}" for part in QKV), "double_blocks.{n}.img_attn.qkv"),
            (
                tuple(f"transformer_blocks.{{n}}.attn.add_{part}_proj" for part in "qkv"),
                "double_blocks.{n}.txt_attn.qkv",
            ),
        ),
        scales=(".query_norm", ".key_norm"),
        swapped=("final_layer.adaLN_modulation.1",),
    ),
}


class Place(NamedTuple):
    """Where a module of diffusers is in the original: the whole of one, or a part of its rows."""

    module: str
    part: int = 0
    parts: int = 1


def place(module: str, family: str) -> Place:
    names = _names(family)
    for theirs, original in names.modules:
        if (found := _match(theirs, module)) is not None:
            return Place(original.replace("{n}", found))
    for parts, original in names.joined:
        for number, theirs in enumerate(parts):
            if (found := _match(theirs, module)) is not None:
                return Place(original.replace("{n}", found), number, len(parts))
    return Place(module)


def modules_of(original: str, family: str) -> tuple[str, ...]:
    """The modules of diffusers that an original one is."""
    names = _names(family)
    for theirs, known in names.modules:
        if (found := _match(known, original)) is not None:
            return (theirs.replace("{n}", found),)
    for parts, known in names.joined:
        if (found := _match(known, original)) is not None:
            return tuple(part.replace("{n}", found) for part in parts)
    return (original,)


def to_original(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """diffusers' tensors by the original's names."""
    names = _names(family)
    made: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        module, dot, parameter = key.rpartition(".")
        if not dot:
            made[key] = tensor  # a parameter of the model itself, such as a pad token
            continue
        if family == "z-image" and re.match(r"all_(x_embedder|final_layer)\.(?!2-1\.)", key):
            raise ValueError(f"to_original: {key} belongs to patches of another size than 2, which has no other name")
        at = place(module, family)
        if parameter == "weight" and at.module.endswith(names.scales):
            parameter = "scale"
        name = f"{at.module}.{parameter}"
        if at.parts == 1:
            made[name] = _swapped(tensor) if at.module in names.swapped else tensor
        else:
            parts.setdefault(name, {})[at.part] = tensor
    for name, found in parts.items():
        if len(found) != 3:
            raise ValueError(f"to_original: {name} is made of q, k and v, and {len(found)} of them are there")
        made[name] = torch.cat([found[number] for number in range(3)])
    return made


def from_original(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The original's tensors by diffusers' names. ComfyUI's prefix is taken off, and so is Z-Image's norm_final, which
    published files hold and no code reads."""
    names = _names(family)
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if family == "z-image" and key.endswith("norm_final.weight"):
            continue
        module, dot, parameter = key.removeprefix("model.diffusion_model.").rpartition(".")
        if not dot:
            made[parameter] = tensor
            continue
        theirs = modules_of(module, family)
        tensor = _swapped(tensor) if module in names.swapped else tensor
        parameter = "weight" if parameter == "scale" and module.endswith(names.scales) else parameter
        for one, rows in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            made[f"{one}.{parameter}"] = rows
    return made


def _names(family: str) -> Names:
    if family not in FAMILIES:
        raise ValueError(f"original names: the family is {family!r}, known are {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _match(template: str, name: str) -> str | None:
    """The number that stands at {n}, "" where there is none; None where the name is another."""
    found = re.fullmatch(re.escape(template).replace(r"\{n\}", r"(\d+)"), name)
    return None if found is None else "".join(found.groups())


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def joined_factors(parts: Sequence[tuple[Tensor, Tensor] | None], rows: int) -> tuple[Tensor, Tensor]:
    """One product up @ down for matrices that stand above one another, from a product for each (None: zero).

    Args:
        rows: of each of the matrices.
    """
    there = [(number, part) for number, part in enumerate(parts) if part is not None]
    down = torch.cat([down for _, (down, _) in there])
    up = down.new_zeros(rows * len(parts), len(down))
    column = 0
    for number, (own, above) in there:
        up[number * rows : (number + 1) * rows, column : column + len(own)] = above
        column += len(own)
    return down, up
