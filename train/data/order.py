"""Which items a step takes: an endless order whose state is one integer.

Every epoch is another permutation, from the seed and the epoch's number. The epochs stand one behind the other in a
single sequence, and the position is how much of it all ranks together have taken. A step takes the next batch *
world_size entries, rank r the r-th part of them; the end of an epoch is not special, and a step may reach over it (so
one step may hold an item twice: as the last of an epoch and as one of the first of the next). What was taken is always
a beginning of the sequence, whatever the world size and the batch have been; so after a change of either at a resume
no item comes twice in an epoch, and none is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .noise import noise_generator


def permutation(seed: int, purpose: str, epoch: int, count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=noise_generator(seed, purpose, epoch)).tolist()
    return order


def check_ranks(where: str, rank: int, world_size: int, **counts: int) -> None:
    for name, value in {**counts, "world_size": world_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} is {value!r}, expected an integer of at least 1")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ValueError(f"{where}: rank is {rank!r}, expected an integer from 0 to {world_size - 1}")


def check_state(where: str, state: dict[str, Any], mine: dict[str, Any]) -> int:
    """The position in a state; ValueError if the state is of another sequence."""
    differ = [f"{key} {state.get(key)!r}, not {value!r}" for key, value in mine.items() if state.get(key) != value]
    if differ:
        raise ValueError(
            f"{where}: the state is of another order of the data: {'; '.join(differ)}; resume with the data and the "
            f"seed that the run began with, or begin a new run"
        )
    position = state.get("position")
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise ValueError(f"{where}: the state's position is {position!r}, expected an integer of at least 0")
    return position


class Order:
    """Batches of item numbers for one rank, without end.

    Args:
        count: how many items there are.
        batch: items of a batch, on this rank.
    """

    def __init__(self, count: int, batch: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        check_ranks("Order", rank, world_size, count=count, batch=batch)
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0  # items that all ranks have taken
        self._epochs: dict[int, Sequence[int]] = {}

    @property
    def epoch(self) -> int:
        return self.position // self.count

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        start = self.position + self.rank * self.batch
        taken = [self._at(place) for place in range(start, start + self.batch)]
        self.position += self.batch * self.world_size
        self._epochs = {epoch: order for epoch, order in self._epochs.items() if epoch >= self.epoch}
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = check_state("Order", state, self._identity())
        self._epochs = {}

    def _identity(self) -> dict[str, Any]:
        return {"count": self.count, "seed": self.seed}

    def _at(self, place: int) -> int:
        epoch, item = divmod(place, self.count)
        if epoch not in self._epochs:
            self._epochs[epoch] = permutation(self.seed, "order", epoch, self.count)
        return self._epochs[epoch][item]


class BucketOrder:
    """Batches of item numbers that lie in one bucket each, for one rank, without end.

    Every bucket has an endless order of its own, cut into batches. An epoch holds as many of a bucket's batches as its
    items fill, the rest of them opens its next epoch: after e epochs a bucket of n items has given floor(e n / batch)
    batches. So every batch is full, and every item comes once in every n items of its bucket. A bucket of fewer items
    than a batch repeats them within it. The batches of an epoch come in an order from the seed; a step takes the next
    world_size of them, one a rank, and the position counts batches.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int]], batch: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        check_ranks("BucketOrder", rank, world_size, batch=batch)
        if not buckets or not all(buckets):
            raise ValueError("BucketOrder: there is an empty bucket, or none at all; every bucket has items")
        self.buckets, self.batch, self.seed = [list(bucket) for bucket in buckets], batch, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0  # batches that all ranks have taken
        self._plans: dict[int, list[tuple[int, int]]] = {}
        self._orders: dict[tuple[int, int], list[int]] = {}

    @property
    def epoch(self) -> int:
        return self._epoch_of(self.position)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return self

    def __next__(self) -> tuple[int, list[int]]:
        """The bucket, and items of it."""
        place = self.position + self.rank
        epoch = self._epoch_of(place)
        bucket, number = self._plan(epoch)[place - self._before(epoch)]
        items = [self._at(bucket, k) for k in range(number * self.batch, (number + 1) * self.batch)]
        self.position += self.world_size
        self._forget(self.epoch)
        return bucket, items

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = check_state("BucketOrder", state, self._identity())
        self._plans, self._orders = {}, {}

    def _identity(self) -> dict[str, Any]:
        return {"counts": [len(bucket) for bucket in self.buckets], "batch": self.batch, "seed": self.seed}

    def _before(self, epoch: int) -> int:
        """Batches in all epochs before this one."""
        return sum(epoch * len(bucket) // self.batch for bucket in self.buckets)

    def _epoch_of(self, place: int) -> int:
        low, high = 0, 1
        while self._before(high) <= place:
            low, high = high, 2 * high
        while high - low > 1:  # the last epoch with _before(epoch) <= place: those without a batch are passed over
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= place else (low, middle)
        return low

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, which of its batches) of an epoch, in order."""
        if epoch not in self._plans:
            first = [epoch * len(items) // self.batch for items in self.buckets]
            ends = [(epoch + 1) * len(items) // self.batch for items in self.buckets]
            due = [bucket for bucket in range(len(first)) for _ in range(first[bucket], ends[bucket])]
            plan = []
            for place in permutation(self.seed, "batches", epoch, len(due)):
                bucket = due[place]  # which bucket is by chance; its own batches come in their order
                plan.append((bucket, first[bucket]))
                first[bucket] += 1
            self._plans[epoch] = plan
        return self._plans[epoch]

    def _at(self, bucket: int, place: int) -> int:
        items = self.buckets[bucket]
        epoch, item = divmod(place, len(items))
        if (bucket, epoch) not in self._orders:
            self._orders[bucket, epoch] = permutation(self.seed, f"bucket {bucket}", epoch, len(items))
        return items[self._orders[bucket, epoch][item]]

    def _forget(self, epoch: int) -> None:
        """Drops what no later batch needs: a batch of this epoch begins at most `batch` items before it."""
        self._plans = {known: plan for known, plan in self._plans.items() if known >= epoch}
        oldest = {b: max(0, epoch * len(items) - self.batch) // len(items) for b, items in enumerate(self.buckets)}
        self._orders = {key: order for key, order in self._orders.items() if key[1] >= oldest[key[0]]}
