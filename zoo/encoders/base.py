"""What encoders of captions have in common: a Qwen3 up to the layers that are read, its tokenizer, its identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch

from . import fingerprint, tokens, tower


class CaptionEncoder(ABC):
    """`model` is a Qwen3 of transformers, which keeps its weights and stays as it is."""

    family: ClassVar[str]
    files: str | None = None  # what it was loaded from, and how: see `text_encoder_files`

    def __init__(self, model: Any, tokenizer: Any, layers: tuple[int, ...], max_tokens: int) -> None:
        self.max_tokens = tokens.check_count(self.family, "max_tokens", max_tokens)
        self.tokenizer = tokenizer
        self.layers = layers
        self.model = tower.cut(model, max(layers))

    @property
    def channels(self) -> int:
        return len(self.layers) * int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @abstractmethod
    def render(self, prompt: str) -> Any:
        """What the model reads: a text, or one for each segment."""

    @property
    def template(self) -> str:
        return "".join(self.render("{prompt}"))

    def _probes(self) -> list[str]:
        """A few captions as the model reads them."""
        return [self.render(prompt) for prompt in ("{prompt}", " {prompt}\n", "")]

    @cached_property
    def identity(self) -> dict[str, Any]:
        return fingerprint.identity(self, self._probes())

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint.join(self.identity)
