"""Captions as FLUX.2-klein reads them, and the reference latents of its editing path.

A user's turn of a chat with Qwen3, thinking disabled, three hidden states side by side. The pipeline pads to 512 and
its transformer attends to the padding: lengths are None, and padding is part of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import Autoencoder
from ..context import Context
from . import tokens, tower
from .base import CaptionEncoder


class KleinTextEncoder(CaptionEncoder):
    """Flux2KleinPipeline.encode_prompt."""

    family = "flux2-klein"

    def __init__(
        self, model: Any, tokenizer: Any, *, layers: tuple[int, ...] = (9, 18, 27), max_tokens: int = 512
    ) -> None:
        if not layers or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in layers):
            raise ValueError(
                f"{self.family}: layers are {layers!r}, expected integers of at least 1, such as (9, 18, 27)"
            )
        super().__init__(model, tokenizer, tuple(layers), max_tokens)

    def render(self, prompt: str) -> str:
        return tokens.chat(self.tokenizer, prompt, enable_thinking=False)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        return [self.max_tokens] * len(self._token_ids(prompts))

    def encode(self, prompts: list[str], *, batch_size: int = 32) -> Context:
        """Features [B, max_tokens, layers x C], padding among them."""
        tokens.check_count(self.family, "batch_size", batch_size)
        ids = self._token_ids(prompts)
        encoded = [self._encode(ids[start : start + batch_size]) for start in range(0, len(ids), batch_size)]
        return Context(torch.cat(encoded), encoder=self.fingerprint)

    def _encode(self, ids: list[list[int]]) -> Tensor:
        device = self.model.device
        input_ids, mask = tokens.pad(self.tokenizer, ids, self.max_tokens)
        inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        return torch.cat(tower.hidden_states(self.model, self.layers, **inputs), dim=2)

    def _token_ids(self, prompts: list[str]) -> list[list[int]]:
        texts = [self.render(prompt) for prompt in tokens.check_prompts(self.family, prompts)]
        return tokens.token_ids(self.family, self.tokenizer, texts, self.max_tokens, prompts)


def klein_reference_context(context: Context, latents: Tensor | Sequence[Tensor]) -> Context:
    """The context with reference images beside its caption: klein's editing path, and self-distillation's teacher.

    Args:
        latents: one reference [B, C, H, W] or several, clean, normalised and packed as encode_reference gives them; for
            self-distillation the target's own latents. They come after the references that are there already.
    """
    added = (latents,) if isinstance(latents, Tensor) else tuple(latents)
    if not added:
        raise ValueError(
            "klein_reference_context: latents are empty, expected one tensor [batch, channels, height, width]"
        )
    return replace(context, references=context.references + added)


@torch.no_grad()
def encode_reference(vae: Any, images: Tensor) -> Tensor:
    """Packed and normalised latents [B, 4C, H/16, W/16] of images [B, 3, H, W] in [0, 1], as Flux2KleinPipeline makes
    them.

    `vae` is an AutoencoderKLFlux2; `Autoencoder(vae).encode` says the same of images in [-1, 1].
    """
    if not images.is_floating_point() or float(images.min()) < 0 or float(images.max()) > 1:
        raise ValueError(
            f"encode_reference: images are {images.dtype} with values from {images.min().item():g} to "
            f"{images.max().item():g}, expected floats in [0, 1]"
        )
    return Autoencoder(vae).encode(2 * images - 1)
