"""The fake score: a trained copy of the teacher (or an adapter on it) that follows what the student makes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .adapters import AdapterBase
from .backbone import Backbone, need_backbone
from .context import Context


class FakeScore(nn.Module):
    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_teacher(
        cls,
        teacher: Backbone | AdapterBase,
        *,
        rank: int = 64,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> FakeScore:
        """A trainable copy of a backbone, or the adapter "fake_score" on an AdapterBase."""
        if isinstance(teacher, AdapterBase):
            return cls(teacher.add("fake_score", rank=rank, alpha=alpha, generator=generator))
        need_backbone("FakeScore", teacher)
        return cls(copy.deepcopy(teacher).requires_grad_(True))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.network.parameters() if p.requires_grad)

    def velocity(self, x: Tensor, sigma: Tensor | float, context: Context) -> Tensor:
        return self.network.velocity(x, sigma, context)

    def clean(self, x: Tensor, sigma: Tensor | float, context: Context) -> Tensor:
        return self.network.clean(x, sigma, context)
