"""What every encoder of captions can do; caches, trainers and samplers know no more of it than this."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..context import Context


class TextEncoder(Protocol):
    @property
    def family(self) -> str:
        """Which backbones read these features: "z-image", "z-image-omni", "flux2-klein"."""

    @property
    def channels(self) -> int:
        """Width of the features."""

    @property
    def device(self) -> torch.device:
        """Where the features are made; moving `model` moves it."""

    @property
    def max_tokens(self) -> int:
        """A caption (a segment of one, where captions have segments) of more tokens is cut, with a warning."""

    @property
    def template(self) -> str:
        """What a caption looks like when the model reads it, `{prompt}` in its place."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the features depend on, part by part: weights, configuration, tokenizer, template, layers and
        max_tokens."""

    @property
    def fingerprint(self) -> str:
        """A short hash of the identity; stands in Context.encoder."""

    def encode(self, prompts: list[str], *, batch_size: int = 32) -> Context:
        """Features of the captions, on the encoder's device and in its dtype; "" is the unconditional caption."""

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens the context of each caption will have, without running the model."""
