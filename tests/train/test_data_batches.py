"""What a step gets is what the prompts, their contexts and the order say, and a checkpoint continues it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from twostep.train.data import Batch, Order, Prefetch, PromptBatches, Prompts, ShapesBatches, read_prompts
from twostep.zoo.context_cache import ContextCache, OnlineContexts
from twostep.zoo.encoders import ZImageTextEncoder
from twostep.zoo.miniature import miniature, samples


@pytest.fixture(scope="module")
def encoder() -> ZImageTextEncoder:
    mini = miniature(untrained_seed=0)
    return ZImageTextEncoder(mini.text_encoder.double(), mini.tokenizer)


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    (tmp_path / "p.txt").write_text("\n".join(f"{count} red circles" for count in range(7)))
    return read_prompts(tmp_path / "p.txt")


def check(batch: Batch, prompts: Prompts, encoder: ZImageTextEncoder) -> None:
    assert batch.prompts == [prompts[index] for index in batch.indices]
    expected = encoder.encode(batch.prompts)
    assert batch.context.encoder == encoder.fingerprint
    assert torch.equal(batch.context.token_lengths, expected.token_lengths)
    assert torch.equal(batch.context.features.float(), expected.features.float())


@pytest.mark.parametrize("cached", [True, False])
def test_prompts_come_with_their_contexts_and_resume(
    cached: bool, prompts: Prompts, encoder: ZImageTextEncoder, tmp_path: Path
) -> None:
    ContextCache.write(tmp_path / "c", encoder, list(prompts), dtype=torch.float32, progress=False)
    contexts = ContextCache(tmp_path / "c") if cached else OnlineContexts(encoder)

    def make() -> Prefetch[Batch]:
        return Prefetch(PromptBatches(prompts, contexts, Order(len(prompts), 2, seed=1, rank=1, world_size=2)))

    running = make()
    whole = list(itertools.islice(running, 6))
    running.close()
    for batch in whole:
        check(batch, prompts, encoder)
    first = make()
    head = list(itertools.islice(first, 2))
    state = first.state_dict()
    first.close()
    resumed = make()
    resumed.load_state_dict(state)
    again = [*head, *itertools.islice(resumed, 4)]
    resumed.close()
    assert [batch.indices for batch in again] == [batch.indices for batch in whole]
    assert len({tuple(batch.indices) for batch in whole}) > 3


def test_refuses_another_file_at_a_resume(prompts: Prompts, encoder: ZImageTextEncoder, tmp_path: Path) -> None:
    state = PromptBatches(prompts, OnlineContexts(encoder), Order(7, 1)).state_dict()
    (tmp_path / "q.txt").write_text("\n".join(reversed(prompts[:])))
    other = PromptBatches(read_prompts(tmp_path / "q.txt"), OnlineContexts(encoder), Order(7, 1))
    with pytest.raises(ValueError, match=r"the state is of other prompts than those of .*q\.txt"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="the order is over 6 items, and there are 7 prompts"):
        PromptBatches(prompts, OnlineContexts(encoder), Order(6, 1))


def test_drawn_shapes_are_the_stream_split_over_ranks_and_resume() -> None:
    whole = samples(4, 0, 26)
    seen: list[int] = []
    state = None
    for world_size, steps in ((2, 2), (4, 1), (1, 2)):
        ranks = [
            ShapesBatches(3 if world_size < 4 else 2, seed=4, rank=r, world_size=world_size) for r in range(world_size)
        ]
        for stream in ranks:
            if state is not None:
                stream.load_state_dict(state)
        for batch in [next(stream) for _ in range(steps) for stream in ranks]:
            places = batch.indices.tolist()
            assert torch.equal(batch.images, whole.images[places])
            assert batch.captions == [whole.captions[place] for place in places]
            seen += places
        state = ranks[0].state_dict()
    assert seen == list(range(26))[: len(seen)] and state == {"seed": 4, "position": len(seen)}
    with pytest.raises(ValueError, match="seed 4, not 5"):
        ShapesBatches(1, seed=5).load_state_dict(state)


def test_a_pool_of_shapes_comes_again_in_the_same_batches() -> None:
    ranks = [ShapesBatches(2, seed=4, rank=rank, world_size=2, pool=8) for rank in range(2)]
    seen = [[next(stream).indices.tolist() for _ in range(5)] for stream in ranks]
    assert seen == [[[0, 1], [4, 5]] * 2 + [[0, 1]], [[2, 3], [6, 7]] * 2 + [[2, 3]]]
    assert ranks[1].next == 6 == ranks[1].skip() and next(ranks[1]).indices.tolist() == [2, 3]
    for pool in (0, 7):
        with pytest.raises(ValueError, match=f"the pool is {pool} samples, expected a multiple of a batch, 2"):
            ShapesBatches(2, world_size=2, pool=pool)


@pytest.mark.parametrize(("batch", "ranks"), [(2, 2), (2, 3), (4, 1), (4, 2)])
def test_a_pool_stays_the_same_with_other_ranks_and_batches(batch: int, ranks: int) -> None:
    one = ShapesBatches(2, seed=4, pool=16)
    for _ in range(3):
        next(one)
    streams = [ShapesBatches(batch, seed=4, rank=rank, world_size=ranks, pool=16) for rank in range(ranks)]
    for stream in streams:
        stream.load_state_dict(one.state_dict())
    seen = [tuple(next(stream).indices.tolist()) for _ in range(16) for stream in streams]
    assert seen[0] == tuple(range(-(-6 // batch) * batch % 16, -(-6 // batch) * batch % 16 + batch))
    assert set(seen) == {tuple(range(start, start + batch)) for start in range(0, 16, batch)}
