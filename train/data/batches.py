"""What a training step gets.

    PromptBatches    prompts and their contexts, in an Order: distillation without images
    ShapesBatches    the miniature's drawn images and captions: pre-training; every sample is new, or comes again
                     after as many as are wanted

Both are endless iterators with `state_dict` and `load_state_dict`, and Prefetch takes any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twostep.zoo import Context
from twostep.zoo.miniature import samples

from .order import Order, check_ranks, check_state
from .pairs import Contexts
from .prompts import Prompts


@dataclass(frozen=True)
class Batch:
    context: Context  # on the device of its source: the CPU for a cache, the encoder's for OnlineContexts
    indices: list[int]  # the prompts' numbers: what a TeacherCache is asked for
    prompts: list[str]


class PromptBatches:
    """Batches of prompts with contexts.

    Args:
        contexts: a ContextCache that has all the prompts, or OnlineContexts.
        order: over len(prompts) items.
    """

    def __init__(self, prompts: Prompts, contexts: Contexts, order: Order) -> None:
        if order.count != len(prompts):
            raise ValueError(
                f"PromptBatches: the order is over {order.count} items, and there are {len(prompts)} prompts; make it "
                f"with Order(len(prompts), ...)"
            )
        self.prompts, self.contexts, self.order = prompts, contexts, order

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        indices = next(self.order)
        prompts = self.prompts[indices]
        return Batch(self.contexts[prompts], indices, prompts)

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self.prompts.fingerprint, "order": self.order.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["prompts"] != self.prompts.fingerprint:
            raise ValueError(
                f"PromptBatches: the state is of other prompts than those of {self.prompts.source} (or of another "
                f"order of them); resume with the file that the run began with, or begin a new run"
            )
        self.order.load_state_dict(state["order"])


@dataclass(frozen=True)
class ShapesBatch:
    images: Tensor  # [B, 3, 64, 64] in [-1, 1]
    captions: list[str]
    indices: Tensor  # [B], in the stream of the seed


class ShapesBatches:
    """Batches of the miniature's stream; a step takes the next batch * world_size samples, rank r the r-th part.

    Args:
        pool: after so many samples the stream begins again, in the very same batches; None: never. A run that goes on
            with another batch begins at the next whole one.
    """

    def __init__(
        self, batch: int, *, seed: int = 0, rank: int = 0, world_size: int = 1, pool: int | None = None
    ) -> None:
        check_ranks("ShapesBatches", rank, world_size, batch=batch)
        if pool is not None and (pool < 1 or pool % batch):
            raise ValueError(f"ShapesBatches: the pool is {pool} samples, expected a multiple of a batch, {batch}")
        self.batch, self.seed, self.rank, self.world_size, self.pool = batch, seed, rank, world_size, pool
        self.position = 0  # samples that all ranks have taken

    def __iter__(self) -> Iterator[ShapesBatch]:
        return self

    def __next__(self) -> ShapesBatch:
        start = self.skip()
        drawn = samples(self.seed, start, self.batch)
        return ShapesBatch(drawn.images, drawn.captions, torch.arange(start, start + self.batch))

    @property
    def next(self) -> int:
        """The first sample of the next batch."""
        start = self.position + self.rank * self.batch
        return start if self.pool is None else start % self.pool

    def skip(self) -> int:
        """Goes past the next batch without drawing it, and says which was its first sample."""
        start = self.next
        self.position += self.batch * self.world_size
        return start

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = check_state("ShapesBatches", state, {"seed": self.seed})
        if self.pool is not None:
            self.position = -(-self.position // self.batch) * self.batch
