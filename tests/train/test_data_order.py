"""The order loses nothing and repeats nothing, whatever ranks and interruptions there are; nor does prefetching."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep.train.data import BucketOrder, Order, Prefetch

sizes = st.integers(1, 7)
# Phases of a run: world size, batch, steps.
phases = st.lists(st.tuples(sizes, sizes, st.integers(0, 6)), min_size=1, max_size=4)


def taken(order: Any, count: int) -> list[Any]:
    return list(itertools.islice(order, count))


def run(make: Any, state: dict[str, Any] | None, world: int, steps: int) -> tuple[list[Any], dict[str, Any]]:
    """What all ranks take in some steps, in their order, and the state that all of them agree on."""
    orders = [make(rank, world) for rank in range(world)]
    for order in orders:
        if state is not None:
            order.load_state_dict(state)
    steps_of_ranks = [taken(order, steps) for order in orders]
    states = [order.state_dict() for order in orders]
    assert all(one == states[0] for one in states)
    return [batch for step in zip(*steps_of_ranks, strict=True) for batch in step], states[0]


def windows(items: list[int], count: int) -> list[list[int]]:
    return [items[start : start + count] for start in range(0, len(items), count)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 23), seed=st.integers(0, 3), phases=phases)
def test_every_epoch_has_every_item_once_however_often_the_world_changes(
    count: int, seed: int, phases: list[tuple[int, int, int]]
) -> None:
    seen: list[int] = []
    state = None
    for world, batch, steps in phases:

        def make(rank: int, world: int, batch: int = batch) -> Order:
            return Order(count, batch, seed=seed, rank=rank, world_size=world)

        batches, state = run(make, state, world, steps)
        assert all(len(one) == batch for one in batches)
        seen += itertools.chain.from_iterable(batches)
        assert state["position"] == len(seen)
    *whole, last = windows(seen, count) or [[]]
    assert all(sorted(epoch) == list(range(count)) for epoch in whole)
    assert len(set(last)) == len(last)
    # The sequence itself is that of one rank alone.
    alone = Order(count, 1, seed=seed)
    assert seen == [item for (item,) in taken(alone, len(seen))]


def test_epochs_and_seeds_are_in_different_orders() -> None:
    epochs = [tuple(epoch) for epoch in taken(Order(50, 50), 4)] + [tuple(next(Order(50, 50, seed=1)))]
    assert len({*epochs, tuple(range(50))}) == 6


def test_the_first_places_are_all_over_the_items() -> None:
    """Over many seeds each item comes first equally often: a chi-square of 9 degrees of freedom, at 1 in 10^5."""
    firsts = [next(Order(10, 1, seed=seed))[0] for seed in range(1000)]
    assert sum((firsts.count(item) - 100) ** 2 / 100 for item in range(10)) < 39.3


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch=st.integers(1, 5),
    phases=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 8)), min_size=1, max_size=4),
)
def test_batches_lie_in_one_bucket_and_no_item_is_lost(
    counts: list[int], batch: int, phases: list[tuple[int, int]]
) -> None:
    ends = list(itertools.accumulate(counts, initial=0))
    buckets = [list(range(*ends_of)) for ends_of in itertools.pairwise(ends)]
    seen: list[tuple[int, list[int]]] = []
    state = None
    for world, steps in phases:

        def make(rank: int, world: int) -> BucketOrder:
            return BucketOrder(buckets, batch, seed=5, rank=rank, world_size=world)

        batches, state = run(make, state, world, steps)
        seen += batches
    assert seen == taken(BucketOrder(buckets, batch, seed=5), len(seen))
    # As many batches of each bucket as its items fill, epoch by epoch.
    place = 0
    for epoch in itertools.count(1):
        due = [epoch * len(b) // batch - (epoch - 1) * len(b) // batch for b in buckets]
        part = [bucket for bucket, _ in seen[place : place + sum(due)]]
        if len(part) < sum(due) or place >= len(seen):
            assert all(part.count(bucket) <= number for bucket, number in enumerate(due))
            break
        assert [part.count(bucket) for bucket in range(len(buckets))] == due
        place += sum(due)
    for number, items in enumerate(buckets):
        own = [item for bucket, batch_items in seen if bucket == number for item in batch_items]
        *whole, last = windows(own, len(items)) or [[]]
        assert all(sorted(window) == items for window in whole) and len(set(last)) == len(last)
    assert all(len(items) == batch for _, items in seen)


def test_buckets_are_mixed() -> None:
    order = BucketOrder([range(40), range(40, 80)], 2)
    epochs = [[bucket for bucket, _ in taken(order, 40)] for _ in range(2)]
    assert epochs[0] != epochs[1] and all(10 < sum(epoch[:20]) + 5 < 25 for epoch in epochs)
    assert order.epoch == 2


def test_remembers_no_more_permutations_than_it_needs() -> None:
    order, buckets = Order(5, 3), BucketOrder([[0, 1], [2, 3, 4, 5]], 3)
    for _ in range(100):
        next(order)
        next(buckets)
        assert len(order._epochs) <= 2 and len(buckets._plans) <= 1 and len(buckets._orders) <= 6


def test_refuses_states_of_other_data() -> None:
    state = Order(10, 2, seed=1).state_dict()
    for other in (Order(11, 2, seed=1), Order(10, 2, seed=2)):
        with pytest.raises(ValueError, match="the state is of another order of the data: "):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="count 10, not 11"):
        Order(11, 2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"batch 2, not 3"):
        BucketOrder([[0, 1]], 3).load_state_dict(BucketOrder([[0, 1]], 2).state_dict())
    with pytest.raises(ValueError, match="position is -1"):
        Order(10, 2, seed=1).load_state_dict({**state, "position": -1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count is 0, expected an integer of at least 1"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected an integer from 0 to 1"),
        ({"world_size": 0}, "world_size is 0"),
    ],
)
def test_refuses_what_is_no_order(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(**{"count": 3, "batch": 1, **settings})
    with pytest.raises(ValueError, match="empty bucket"):
        BucketOrder([[1], []], 1)


class Slow(Order):
    """Counts what it made, and can be held up."""

    def __init__(self, *arguments: Any, fails_at: int | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.made = 0
        self.fails_at = fails_at

    def __next__(self) -> list[int]:
        if self.made == self.fails_at:
            raise OSError("the disk is gone")
        self.made += 1
        return super().__next__()


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_the_state_is_that_of_the_batches_taken_not_of_those_made(ahead: int, after: int) -> None:
    plain = taken(Order(7, 3, seed=2), 12)
    source = Slow(7, 3, seed=2)
    batches = Prefetch(source, ahead)
    assert taken(batches, after) == plain[:after]
    if after:
        until(lambda: source.made > after)  # something is ahead
    state = batches.state_dict()
    assert state["position"] == 3 * after
    rest = Prefetch(Order(7, 3, seed=2), ahead)
    rest.load_state_dict(state)
    assert taken(rest, 12 - after) == plain[after:]
    assert taken(batches, 12 - after) == plain[after:]  # asking for the state disturbed nothing
    batches.load_state_dict(state)  # backwards, in place
    assert taken(batches, 12 - after) == plain[after:]
    rest.close()
    batches.close()
    assert taken(batches, 2) == taken(Order(7, 3, seed=2), 14)[12:]  # closing loses nothing either
    batches.close()


def test_makes_no_more_than_it_was_told_to() -> None:
    source = Slow(7, 3)
    batches = Prefetch(source, 2)
    for count in range(1, 30):
        next(batches)
        until(lambda count=count: source.made >= count + 3)  # two ready, one waiting for a place
        assert source.made == count + 3
    batches.close()


def test_an_error_comes_at_its_batch_and_again() -> None:
    batches = Prefetch(Slow(7, 3, fails_at=2), 4)
    assert taken(batches, 2) == taken(Order(7, 3), 2)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    assert batches.state_dict()["position"] == 6
    batches.close()
    with pytest.raises(ValueError, match="ahead is 0"):
        Prefetch(Order(7, 3), 0)
