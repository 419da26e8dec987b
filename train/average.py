"""The moving average of the student: what is sampled, judged and exported. In shards where the student is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import local


class Average:
    """average = decay * average + (1 - decay) * parameter after each step of the student; it begins as the student."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def follow(self) -> None:
        averages = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The student is its average inside, and itself again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            mine, theirs = local(self.values[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
