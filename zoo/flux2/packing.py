"""A batch through FLUX.2: tokens in, tokens out.

The sequence is stock's: text, then image, then reference images (klein's editing path). Positions are (t, h, w, l): an
image token stands at (0, h, w, 0), a token of reference i at (10 + 10 i, h, w, 0), text token l at (0, 0, 0, l).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpointing import run
from ..tables import cached_tables
from . import blocks

REFERENCE_STEP = 10


def ids(grids: Sequence[tuple[int, int]]) -> Tensor:
    """[tokens, 4]: positions of the image, and of the reference images after it."""
    axes = [(torch.tensor([REFERENCE_STEP * i]), torch.arange(h), torch.arange(w)) for i, (h, w) in enumerate(grids)]
    return torch.cat([torch.cartesian_prod(t, h, w, torch.zeros(1, dtype=torch.int64)) for t, h, w in axes])


def text_ids(tokens: int) -> Tensor:
    positions = torch.zeros(tokens, 4, dtype=torch.int64)
    positions[:, 3] = torch.arange(tokens)
    return positions


@cached_tables(64)
def _table(
    theta: float, axes: tuple[int, ...], tokens: int, grids: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    embed = Flux2PosEmbed(theta=theta, axes_dim=list(axes))
    return blocks.table(embed(torch.cat([text_ids(tokens), ids(grids)]))).to(device)


def table(model: Any, tokens: int, grids: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The real rotary table [1, text and image tokens, Dh/2, 2], built once per shape."""
    config = model.config
    return _table(config.rope_theta, tuple(config.axes_dims_rope), tokens, tuple(grids), device)


def stock_table(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (cos, sin) that stock blocks take."""
    cos, sin = freqs[0].repeat_interleave(2, dim=1).unbind(-1)
    return cos, sin


def mask(lengths: Sequence[int] | None, tokens: int, others: int, device: torch.device) -> Tensor | None:
    """[B, 1, 1, tokens + others]: which tokens attention sees; None where it sees all."""
    if lengths is None or all(length == tokens for length in lengths):
        return None
    seen = torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)
    seen = torch.cat([seen, seen.new_ones(len(seen), others)], dim=1)
    return seen[:, None, None, :].to(device, non_blocking=True)


def forward(
    model: Any,
    tokens: Tensor,
    timestep: Tensor,
    features: Tensor,
    rotary: Tensor | tuple[Tensor, Tensor],
    *,
    guidance: Tensor | None = None,
    attention_mask: Tensor | None = None,
    taps: Sequence[int] | None = None,
) -> Tensor | list[Tensor]:
    """The network on tokens [B, S, C] of images and references, timestep = sigma [B], features [B, L, C'] of captions.

    Returns eps - x of all S tokens; with `taps`, the S tokens [B, S, D] after those blocks instead (double blocks
    first, single blocks after them), and the blocks behind the last of them do not run.
    """
    # As stock has it, in the activations' dtype: published weights were trained and are run with times rounded so.
    time = timestep.to(tokens.dtype) * 1000
    temb = model.time_guidance_embed(time, None if guidance is None else guidance.to(tokens.dtype) * 1000)
    image_mod, text_mod = model.double_stream_modulation_img(temb), model.double_stream_modulation_txt(temb)
    single_mod = model.single_stream_modulation(temb)
    hidden, text = model.x_embedder(tokens), model.context_embedder(features)
    length, doubles = text.shape[1], len(model.transformer_blocks)
    kwargs = None if attention_mask is None else {"attention_mask": attention_mask}
    last = doubles + len(model.single_transformer_blocks) if taps is None else max(taps) + 1
    tapped: dict[int, Tensor] = {}
    for index, block in enumerate(model.transformer_blocks[:last]):
        text, hidden = run(model, block, hidden, text, image_mod, text_mod, rotary, kwargs)
        tapped[index] = hidden
    if last > doubles:
        hidden = torch.cat([text, hidden], dim=1)
        for index, block in enumerate(model.single_transformer_blocks[: last - doubles], start=doubles):
            hidden = run(model, block, hidden, None, single_mod, rotary, kwargs)
            tapped[index] = hidden[:, length:]
    if taps is not None:
        return [tapped[index] for index in taps]
    return model.proj_out(model.norm_out(hidden[:, length:], temb))
