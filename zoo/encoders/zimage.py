"""Captions as Z-Image reads them: a user's turn of a chat with Qwen3, thinking enabled, hidden_states[-2], real
tokens only.

The pipelines pad to 512. Attention is causal and padding stands on the right, so the real tokens' features do not
know how far a batch is padded: it is padded to its longest only, and the features are those of the pipelines up to
the last bits that another width of a matrix product may round differently.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..context import Context
from . import tokens, tower
from .base import CaptionEncoder


class ZImageTextEncoder(CaptionEncoder):
    """ZImagePipeline.encode_prompt."""

    family = "z-image"

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int = 512) -> None:
        super().__init__(model, tokenizer, _layers(model), max_tokens)

    def render(self, prompt: str) -> str:
        return tokens.chat(self.tokenizer, prompt, enable_thinking=True)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        return [len(ids) for ids in self._token_ids(prompts)]

    def encode(self, prompts: list[str], *, batch_size: int = 32) -> Context:
        """Features [B, longest, C] with lengths [B]; zeros beyond a caption's length."""
        features, lengths = _encode(self, self._token_ids(prompts), batch_size)
        return Context(features, lengths, encoder=self.fingerprint)

    def _token_ids(self, prompts: list[str]) -> list[list[int]]:
        texts = [self.render(prompt) for prompt in tokens.check_prompts(self.family, prompts)]
        return tokens.token_ids(self.family, self.tokenizer, texts, self.max_tokens, prompts)


class ZImageOmniTextEncoder(CaptionEncoder):
    """ZImageOmniPipeline.encode_prompt: a caption in segments, between which the condition images stand.

    With `images` of them a caption has images + 2 segments, without any it has one. Each segment is read by itself, and
    max_tokens is for each. The pipeline writes its template out, so the tokenizer's chat template plays no part.
    """

    family = "z-image-omni"

    def __init__(self, model: Any, tokenizer: Any, *, images: int = 0, max_tokens: int = 512) -> None:
        super().__init__(model, tokenizer, _layers(model), max_tokens)
        self.images = tokens.check_count(self.family, "images", images, least=0)

    def render(self, prompt: str) -> list[str]:
        turn, answer = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        if not self.images:
            return [turn + prompt + answer]
        return [
            turn + "<|vision_start|>",
            *["<|vision_end|><|vision_start|>"] * (self.images - 1),
            "<|vision_end|>" + prompt + answer + "<|vision_start|>",
            "<|vision_end|><|im_end|>",
        ]

    def _probes(self) -> list[str]:
        return self.render("{prompt}")

    def count_tokens(self, prompts: list[str]) -> list[int]:
        return [sum(map(len, segments)) for segments in self._token_ids(prompts)]

    def encode(self, prompts: list[str], *, batch_size: int = 32) -> Context:
        """Features [B, longest, C], a caption's segments one after the other, with lengths [B, segments]."""
        ids = self._token_ids(prompts)
        features, lengths = _encode(self, [segment for sample in ids for segment in sample], batch_size)
        lengths = lengths.view(len(ids), -1)
        joined = features.new_zeros(len(ids), int(lengths.sum(1).max()), features.shape[2])
        segments = iter(features)
        for sample, counts in zip(joined, lengths.tolist(), strict=True):
            for end, count in zip(accumulate(counts), counts, strict=True):
                sample[end - count : end] = next(segments)[:count]
        return Context(joined, lengths, encoder=self.fingerprint)

    def _token_ids(self, prompts: list[str]) -> list[list[list[int]]]:
        texts = [self.render(prompt) for prompt in tokens.check_prompts(self.family, prompts)]
        segments = [segment for sample in texts for segment in sample]
        names = [prompt for prompt, sample in zip(prompts, texts, strict=True) for _ in sample]
        ids = iter(tokens.token_ids(self.family, self.tokenizer, segments, self.max_tokens, names))
        return [[next(ids) for _ in sample] for sample in texts]


def _layers(model: Any) -> tuple[int]:
    return (model.config.num_hidden_layers - 1,)  # hidden_states[-2]


def _encode(encoder: Any, ids: list[list[int]], batch_size: int) -> tuple[Tensor, Tensor]:
    """Features [B, longest, C] of tokens, and lengths [B]."""
    tokens.check_count(encoder.family, "batch_size", batch_size)
    lengths = torch.tensor([len(sample) for sample in ids])
    device, right = encoder.model.device, encoder.tokenizer.padding_side == "right"
    features = torch.zeros(len(ids), int(lengths.max()), encoder.channels, dtype=encoder.model.dtype, device=device)
    for rows in tokens.batches(lengths.tolist(), batch_size):
        # Left padding moves positions, so it has to be the pipelines': up to max_tokens.
        width = int(lengths[rows].max()) if right else encoder.max_tokens
        input_ids, mask = tokens.pad(encoder.tokenizer, [ids[row] for row in rows], width)
        inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device).bool()}
        (states,) = tower.hidden_states(encoder.model, encoder.layers, **inputs)
        for row, state in zip(rows, states, strict=True):
            count = len(ids[row])
            features[row, :count] = state[:count] if right else state[width - count :]
    return features, lengths
