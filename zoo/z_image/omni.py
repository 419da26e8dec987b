"""Z-Image's omni path on a batch: clean images beside the noisy one, and a modulation per token.

A caption comes in segments that stand around the images: segment j ends where image j begins. The sequence is captions,
images (references, then the noisy image), vision features; each part is padded to a multiple of 32 with its learned
token. Tokens of a reference, of its segment and of its vision features are modulated as clean (t = 1), the others as
noisy.

Stock appends a sample's parts to each other and pads at the end; here every part is padded to the batch's longest and
attention does not see the padding. Positions stand in the rotary table, so both compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checkpointing import run
from ..context import Context
from ..tables import cached_tables
from . import packing


@dataclass(frozen=True)
class Captions:
    """Where the captions' tokens come from and stand; all [B, L]."""

    source: Tensor  # index into the features, -1 for the pad token
    position: Tensor
    noisy: Tensor  # 1 where the token belongs to the noisy image, 0 where to a clean one
    seen: Tensor  # False beyond a sample's own end
    ends: Tensor  # [B, S]: the position behind each segment, where its image stands
    uneven: bool  # whether some sample is shorter than the longest
    last: int  # the highest position


@cached_tables(64)
def _captions(lengths: tuple[tuple[int, ...], ...], references: int, device: torch.device) -> Captions:
    columns: dict[str, list[Tensor]] = {"source": [], "position": [], "noisy": []}
    ends = []
    for segments in lengths:
        parts: dict[str, list[Tensor]] = {name: [] for name in columns}
        read, start, stops = 0, 1, []
        for index, length in enumerate(segments):
            padded = packing.round_up(length)
            parts["source"].append(torch.cat([torch.arange(read, read + length), torch.full((padded - length,), -1)]))
            # Stock gives a padded segment positions for its padding twice, and cuts the surplus off at the end of all
            # segments, so later segments stand shifted. Parity wants the same.
            parts["position"].append(torch.arange(start, start + padded))
            parts["position"].append(torch.zeros(padded - length, dtype=torch.int64))
            parts["noisy"].append(torch.full((padded,), int(index >= references)))
            read += length
            stops.append(start + length)
            start += length + 2  # the image and its vision features stand in between
        total = sum(map(packing.round_up, segments))
        for name, column in columns.items():
            column.append(torch.cat(parts[name])[:total])
        ends.append(stops)
    tensors = {name: pad_sequence(column, batch_first=True).to(device) for name, column in columns.items()}
    seen = pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in columns["source"]], batch_first=True)
    last = max(max(int(column.max()) for column in columns["position"]), max(map(max, ends)) + 1)
    return Captions(
        **tensors, seen=seen.to(device), ends=torch.tensor(ends, device=device), uneven=not bool(seen.all()), last=last
    )


def _pad_positions(positions: Tensor) -> Tensor:
    """[B, n, 3] up to a multiple of 32, with padding at (0, 0, 0)."""
    return torch.nn.functional.pad(positions, (0, 0, 0, packing.round_up(positions.shape[1]) - positions.shape[1]))


def _grid_positions(start: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, n, 3]: a grid of an image that stands at `start` [B]."""
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([start.view(-1, 1, 1).expand(-1, len(grid), 1), grid.expand(len(start), -1, -1)], dim=2)


def _vision_axis(tokens: int, size: int, device: torch.device) -> Tensor:
    """Vision tokens spread over the image's latent positions, as stock rounds them."""
    return (torch.arange(tokens, device=device).float() / max(tokens - 1, 1) * (size - 1)).to(torch.int64)


def _check_positions(model: Any, plan: Captions, images: Sequence[Tensor], context: Context, patch_size: int) -> None:
    """The rotary tables are long enough: vision tokens are spread over latent positions, image tokens over patches."""
    step = 1 if context.vision else patch_size
    needed = (plan.last + 1, *(max(image.shape[axis] for image in images) // step for axis in (-2, -1)))
    for axis, (positions, length) in enumerate(zip(needed, model.config.axes_lens, strict=True)):
        if positions > length:
            raise ValueError(
                f"Z-Image: {positions} positions are needed on axis {axis} of the rotary embedding, and this model has "
                f"{length} (axes_lens in its config)"
            )


def _table(model: Any, positions: Tensor, real_tables: bool) -> Tensor:
    """positions [B, L, 3] -> the rotary table, in the form that the blocks take."""
    config = model.config
    axes = packing.axis_tables(
        tuple(config.axes_dims), tuple(config.axes_lens), float(config.rope_theta), positions.device
    )
    freqs = torch.cat([rows[ids] for rows, ids in zip(axes, positions.unbind(-1), strict=True)], dim=-2)
    return freqs if real_tables else torch.view_as_complex(freqs)


def forward(
    model: Any,
    x: Tensor,
    t: Tensor,
    context: Context,
    *,
    patch_size: int = 2,
    taps: Sequence[int] | None = None,
    real_tables: bool = True,
) -> Tensor | list[Tensor]:
    """As packing.forward, with the context's references: x [B, C, 1, H, W] is the noisy image."""
    count = len(context.references)
    _check(model, context, count)
    key = f"{patch_size}-1"
    noisy_temb = model.t_embedder(t * model.t_scale).to(x.dtype)
    clean_temb = model.t_embedder(torch.ones_like(t) * model.t_scale).to(x.dtype)
    assert context.lengths is not None
    plan = _captions(tuple(map(tuple, context.lengths.tolist())), count, x.device)
    table_of = functools.partial(_table, model, real_tables=real_tables)
    images = [*(reference.unsqueeze(2) for reference in context.references), x]
    _check_positions(model, plan, images, context, patch_size)
    tokens, positions, noisy = [], [], []
    for index, image in enumerate(images):
        patches, (_, height, width) = packing.patchify(image, patch_size, 1)
        tokens.append(packing.pad_tokens(model.all_x_embedder[key](patches), model.x_pad_token))
        rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
        positions.append(_pad_positions(_grid_positions(plan.ends[:, index], rows, columns)))
        noisy.append(torch.full((len(x), positions[-1].shape[1]), int(index == count), device=x.device))
    hidden, image_positions, image_noisy = torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(noisy, 1)
    own = hidden.shape[1] - tokens[-1].shape[1]  # where the noisy image begins
    table = table_of(image_positions)
    for block in model.noise_refiner:
        hidden = run(model, block, hidden, None, table, None, image_noisy, noisy_temb, clean_temb)

    caption = _embed(model, context.features, plan)
    caption_positions = torch.nn.functional.pad(plan.position.unsqueeze(-1), (0, 2))
    caption_mask = plan.seen if plan.uneven else None
    table = table_of(caption_positions)
    for block in model.context_refiner:
        caption = run(model, block, caption, caption_mask, table)

    sequence = [caption, hidden]
    all_positions, all_noisy = [caption_positions, image_positions], [plan.noisy, image_noisy]
    if context.vision:
        vision, vision_positions = _refine_vision(model, context, plan, table_of)
        sequence.append(vision)
        all_positions.append(vision_positions)
        last = torch.arange(vision.shape[1], device=x.device) >= vision.shape[1] - SEQ_MULTI_OF
        all_noisy.append(last.to(torch.int64).expand(len(x), -1))
    joint, noise_mask = torch.cat(sequence, 1), torch.cat(all_noisy, 1)
    mask = None
    if caption_mask is not None:
        mask = torch.cat([plan.seen, plan.seen.new_ones(len(x), joint.shape[1] - caption.shape[1])], 1)
    table = table_of(torch.cat(all_positions, 1))
    own += caption.shape[1]
    patches, grid = packing.patchify(x, patch_size, 1)
    tapped = {}
    for index, block in enumerate(model.layers if taps is None else model.layers[: max(taps) + 1]):
        joint = run(model, block, joint, mask, table, None, noise_mask, noisy_temb, clean_temb)
        if taps is not None and index in taps:
            tapped[index] = joint[:, own : own + patches.shape[1]]
    if taps is not None:
        return [tapped[index] for index in taps]
    out = model.all_final_layer[key](joint[:, own : own + patches.shape[1]], c=noisy_temb)
    return packing.unpatchify(out, grid, patch_size, 1)


def _check(model: Any, context: Context, count: int) -> None:
    segments = 0 if context.lengths is None or context.lengths.dim() == 1 else context.lengths.shape[1]
    if segments < count + 1:
        raise ValueError(
            f"Z-Image: a context with {count} references has captions of {segments or 'unknown'} segments, expected "
            f"lengths [{context.batch}, {count + 1} or more]: a segment before each reference and before the noisy "
            f"image"
        )
    if context.vision and model.siglip_embedder is None:
        raise ValueError(
            "Z-Image: the context has vision features, and this model takes none (siglip_feat_dim in its config)"
        )
    if context.vision and len(context.vision) != count:
        raise ValueError(f"Z-Image: the context has {count} references and vision features of {len(context.vision)}")


def _embed(model: Any, features: Tensor, plan: Captions) -> Tensor:
    ends = plan.source.amax(1, keepdim=True)
    beyond = torch.arange(features.shape[1], device=features.device) > ends
    hidden = model.cap_embedder(features.masked_fill(beyond.unsqueeze(-1), 0))
    source = plan.source.clamp_min(0).unsqueeze(-1).expand(-1, -1, hidden.shape[2])
    pad = model.cap_pad_token.to(hidden.dtype)
    return torch.where((plan.source < 0).unsqueeze(-1), pad, hidden.gather(1, source))


def _refine_vision(
    model: Any, context: Context, plan: Captions, table_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The references' vision features, embedded and refined, and their positions."""
    tokens, positions = [], []
    for index, (features, reference) in enumerate(zip(context.vision, context.references, strict=True)):
        height, width = features.shape[1:3]
        # Stock flattens the features of a [H, W, C] map as if they were [C, H, W]; the weights were trained with that.
        flat = features.permute(0, 3, 1, 2).reshape(len(features), height * width, -1)
        tokens.append(packing.pad_tokens(model.siglip_embedder(flat), model.siglip_pad_token))
        rows = _vision_axis(height, reference.shape[2], flat.device)
        columns = _vision_axis(width, reference.shape[3], flat.device)
        positions.append(_pad_positions(_grid_positions(plan.ends[:, index] + 1, rows, columns)))
    # The noisy image has no vision features: 32 pad tokens at (0, 0, 0) stand for them, and count as noisy.
    absent = tokens[0].new_zeros(len(tokens[0]), 0, tokens[0].shape[2])
    tokens.append(packing.pad_tokens(absent, model.siglip_pad_token, at_least=1))
    positions.append(torch.zeros(*tokens[-1].shape[:2], 3, dtype=torch.int64, device=absent.device))
    hidden, where = torch.cat(tokens, 1), torch.cat(positions, 1)
    table = table_of(where)
    for block in model.siglip_refiner:
        hidden = run(model, block, hidden, None, table)
    return hidden, where
