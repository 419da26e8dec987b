"""A batch through Z-Image: patches in, patches out, as whole tensors.

Stock code walks over lists, sample by sample; here every step is one operation on the batch. Images of one size share a
batch; captions may differ in length. The sequence is stock's: image tokens padded to a multiple of 32, then each
caption padded to a multiple of 32, then, for the shorter captions, rows that attention does not see.

Positions, (1 + i, 0, 0) for caption token i and (padded caption length + 1, h, w) for an image token, depend on shapes
and lengths alone, which live on the CPU. What is kept are the tables of one padded length; a batch of several is put
together from those, since its lengths hardly ever come again, and a table for each of its samples is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, RopeEmbedder
from torch import Tensor

from ..checkpointing import run
from ..tables import cached_tables


def round_up(n: int) -> int:
    # Not -(-n // 32): ONNX divides integers towards zero.
    return (n + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF


@dataclass(frozen=True)
class Layout:
    """What shapes and lengths decide. Tables are real, [B or 1, L, Dh/2, 2]; a mask is None where all is seen."""

    image_tokens: int
    caption_tokens: int  # padded
    image_freqs: Tensor
    caption_freqs: Tensor
    joint_freqs: Tensor
    caption_mask: Tensor | None  # [B, L] bool
    joint_mask: Tensor | None


@cached_tables(16)
def axis_tables(
    axes_dims: tuple[int, ...], axes_lens: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, ...]:
    """Stock's table of each axis, [positions, pairs, 2], as (cos, sin)."""
    tables = RopeEmbedder.precompute_freqs_cis(list(axes_dims), list(axes_lens), theta=theta)
    return tuple(torch.view_as_real(table).to(device) for table in tables)


@cached_tables(16)
def _layout(
    grid: tuple[int, int, int],
    padded: int,
    axes_dims: tuple[int, ...],
    axes_lens: tuple[int, ...],
    theta: float,
    device: torch.device,
) -> Layout:
    """The layout for captions of this padded length."""
    frames, height, width = grid
    for axis, needed in enumerate((padded + frames + 1, height, width)):
        if needed > axes_lens[axis]:
            room = (axes_lens[0] - frames - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF
            mend = f"shorten what is longer than {max(room, 0)} tokens" if axis == 0 else "draw smaller images"
            raise ValueError(
                f"Z-Image: {needed} positions are needed on axis {axis} (captions of up to {padded} tokens, {height} "
                f"x {width} image tokens), and this model has {axes_lens[axis]} (axes_lens in its config): {mend}"
            )
    axes = axis_tables(axes_dims, axes_lens, theta, device)

    def count(n: int) -> Tensor:
        return torch.arange(n, device=device)

    def rows(*ids: Tensor) -> Tensor:
        return torch.cat([axis[positions] for axis, positions in zip(axes, ids, strict=True)], dim=-2)

    t, h, w = torch.cartesian_prod(count(frames), count(height), count(width)).reshape(-1, 3).unbind(1)
    zeros = torch.zeros(max(padded, SEQ_MULTI_OF), dtype=torch.int64, device=device)
    unused = zeros[: round_up(len(t)) - len(t)]  # padding of the image stands at (0, 0, 0)
    image = torch.cat([rows(t + padded + 1, h, w), rows(unused, unused, unused)]).unsqueeze(0)
    caption = rows(count(padded) + 1, zeros[:padded], zeros[:padded]).unsqueeze(0)
    return Layout(
        image_tokens=len(t),
        caption_tokens=padded,
        image_freqs=image,
        caption_freqs=caption,
        joint_freqs=torch.cat([image, caption], dim=1),
        caption_mask=None,
        joint_mask=None,
    )


def layout(model: Any, grid: tuple[int, int, int], lengths: Sequence[int], device: torch.device) -> Layout:
    config = model.config
    axes = tuple(config.axes_dims), tuple(config.axes_lens), float(config.rope_theta)
    padded = [round_up(length) for length in lengths]
    different = sorted(set(padded))
    layouts = [_layout(grid, length, *axes, device) for length in reversed(different)]  # an error is of the longest
    longest = layouts[0]
    if len(different) == 1:
        return longest
    which = torch.tensor([len(different) - 1 - different.index(length) for length in padded])
    images = torch.cat([one.image_freqs for one in layouts])[which.to(device, non_blocking=True)]
    caption_mask = (torch.arange(longest.caption_tokens) < torch.tensor(padded).unsqueeze(1)).to(
        device, non_blocking=True
    )
    return Layout(
        image_tokens=longest.image_tokens,
        caption_tokens=longest.caption_tokens,
        image_freqs=images,
        caption_freqs=longest.caption_freqs,
        joint_freqs=torch.cat([images, longest.caption_freqs.expand(len(images), -1, -1, -1)], dim=1),
        caption_mask=caption_mask,
        joint_mask=torch.cat([caption_mask.new_ones(len(padded), images.shape[1]), caption_mask], dim=1),
    )


def grid_of(x: Tensor, patch: int, frame_patch: int) -> tuple[int, int, int]:
    """Tokens along frames, height and width of x [B, C, F, H, W]."""
    frames, height, width = x.shape[2:]
    return frames // frame_patch, height // patch, width // patch


def patchify(x: Tensor, patch: int, frame_patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    """[B, C, F, H, W] -> [B, tokens, values of a patch], and the grid of tokens."""
    batch, channels = x.shape[:2]
    grid = grid_of(x, patch, frame_patch)
    x = x.reshape(batch, channels, grid[0], frame_patch, grid[1], patch, grid[2], patch)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, grid[0] * grid[1] * grid[2], -1), grid


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int, frame_patch: int) -> Tensor:
    """The inverse: [B, tokens, values of a patch] -> [B, C, F, H, W]."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, *grid, frame_patch, patch, patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, grid[0] * frame_patch, grid[1] * patch, grid[2] * patch)


def pad_tokens(tokens: Tensor, pad_token: Tensor, at_least: int = 0) -> Tensor:
    """Tokens with the learned pad token up to a multiple of 32. Where there is nothing to pad, the token still takes
    part, with no rows: it then gets the zero gradient that stock gives it, and no data-parallel wrapper waits for
    it."""
    missing = round_up(max(tokens.shape[1], at_least)) - tokens.shape[1]
    return torch.cat([tokens, pad_token.to(tokens.dtype).expand(tokens.shape[0], missing, -1)], dim=1)


def _embed_captions(model: Any, features: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
    """[B, tokens, D]: captions embedded, with the learned pad token from each one's own end."""
    features = features[:, : min(max(lengths), tokens)]
    if len(set(lengths)) == 1:
        hidden = model.cap_embedder(features)
        pad = model.cap_pad_token.to(hidden.dtype)
        return torch.cat([hidden, pad.expand(len(hidden), tokens - hidden.shape[1], -1)], dim=1)
    ends = torch.tensor(lengths).to(features.device, non_blocking=True)
    beyond = (torch.arange(tokens, device=features.device) >= ends.unsqueeze(1)).unsqueeze(-1)  # [B, tokens, 1]
    # Whatever stands in the padding, a NaN too, gets no further than this, nor into a gradient.
    hidden = model.cap_embedder(features.masked_fill(beyond[:, : features.shape[1]], 0))
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, tokens - hidden.shape[1]))
    return torch.where(beyond, model.cap_pad_token.to(hidden.dtype), hidden)


def forward(
    model: Any,
    x: Tensor,
    t: Tensor,
    features: Tensor,
    lengths: Sequence[int],
    *,
    patch_size: int = 2,
    f_patch_size: int = 1,
    taps: Sequence[int] | None = None,
    residuals: dict[int, Tensor] | None = None,
    real_tables: bool = True,
) -> Tensor | list[Tensor]:
    """The network on a batch: x [B, C, F, H, W], t = 1 - sigma [B], features [B, L, C] of captions with these lengths.

    Returns the network's x - eps [B, C, F, H, W]; with `taps`, the image tokens [B, tokens, D] after those main blocks
    instead, and the blocks behind the last of them do not run. `residuals` are added after their blocks (ControlNet).
    """
    grid = grid_of(x, patch_size, f_patch_size)
    plan = layout(model, grid, lengths, x.device)
    caption = _embed_captions(model, features, lengths, plan.caption_tokens)
    return through(
        model,
        x,
        t,
        caption,
        plan,
        patch_size=patch_size,
        f_patch_size=f_patch_size,
        taps=taps,
        residuals=residuals,
        real_tables=real_tables,
    )


def through(
    model: Any,
    x: Tensor,
    t: Tensor,
    caption: Tensor,
    plan: Layout,
    *,
    patch_size: int = 2,
    f_patch_size: int = 1,
    taps: Sequence[int] | None = None,
    residuals: dict[int, Tensor] | None = None,
    real_tables: bool = True,
    pad: Callable[[Tensor, Tensor], Tensor] = pad_tokens,
) -> Tensor | list[Tensor]:
    """`forward` behind its layout: caption [B, tokens, D] is embedded and padded; `pad` does that to the image."""
    key = f"{patch_size}-{f_patch_size}"
    temb = model.t_embedder(t * model.t_scale).to(x.dtype)
    patches, grid = patchify(x, patch_size, f_patch_size)

    def table(freqs: Tensor) -> Tensor:
        freqs = freqs if real_tables else torch.view_as_complex(freqs)
        return freqs if real_tables else freqs.expand(len(x), -1, -1)

    hidden = pad(model.all_x_embedder[key](patches), model.x_pad_token)
    image_table = table(plan.image_freqs)
    for block in model.noise_refiner:
        hidden = run(model, block, hidden, None, image_table, temb)

    caption_table = table(plan.caption_freqs)
    for block in model.context_refiner:
        caption = run(model, block, caption, plan.caption_mask, caption_table)

    joint, joint_table = torch.cat([hidden, caption], dim=1), table(plan.joint_freqs)
    tapped: dict[int, Tensor] = {}
    for index, block in enumerate(model.layers if taps is None else model.layers[: max(taps) + 1]):
        joint = run(model, block, joint, plan.joint_mask, joint_table, temb)
        if residuals is not None and index in residuals:
            joint = joint + residuals[index]
        if taps is not None and index in taps:
            tapped[index] = joint[:, : plan.image_tokens]
    if taps is not None:
        return [tapped[index] for index in taps]
    # Only the image's rows are read; stock projects the caption's too.
    out = model.all_final_layer[key](joint[:, : plan.image_tokens], c=temb)
    return unpatchify(out, grid, patch_size, f_patch_size)
