"""Every seed, purpose and rank has noise of its own, and a checkpoint continues it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from twostep.train.data import NoiseStreams, draw_noise, noise_generator, sample_noise
from twostep.train.data.noise import seed_everybody


def first_numbers(generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(2**62, (2,), generator=generator).tolist())


def test_no_two_streams_are_alike() -> None:
    purposes = ["student", "noise", "noise ", "", "1"]
    seeds = [0, 1, -1, 2**32, 2**32 + 1, 2**64, 12345]
    names = list(itertools.product(seeds, purposes, range(96)))
    assert len({first_numbers(noise_generator(*name)) for name in names}) == len(names)


def test_streams_hold_more_than_the_32_bits_that_manual_seed_reads() -> None:
    low, high = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert first_numbers(low) == first_numbers(high)  # why manual_seed is not enough
    stream = noise_generator(0, "student", 3)
    seeded = torch.Generator().manual_seed(stream.initial_seed())
    assert first_numbers(stream) != first_numbers(seeded)
    words = noise_generator(0, "student", 3).get_state()[24 : 24 + 8 * 624].view(624, 8)
    assert len({bytes(word[:4].tolist()) for word in words}) > 620 and not words[:, 4:].any()


def test_a_stream_is_always_the_same_and_normal() -> None:
    x = draw_noise((64, 4, 16, 16), noise_generator(7, "student", 2))
    assert torch.equal(x, draw_noise((64, 4, 16, 16), noise_generator(7, "student", 2)))
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5 and abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    others = torch.stack(
        [
            x,
            *(
                draw_noise(x.shape, noise_generator(*name))
                for name in [(7, "student", 3), (8, "student", 2), (7, "fake", 2)]
            ),
        ]
    )
    correlations = torch.corrcoef(others.flatten(1)) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / n**0.5


def test_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_noise((3,), noise_generator(0, "x"))
    sample_noise(0, [1, 2], (3,))
    assert torch.equal(before, torch.get_rng_state())


def test_a_samples_noise_depends_on_seed_and_index_alone() -> None:
    together = sample_noise(3, range(6), (4, 8, 8))
    alone = torch.cat([sample_noise(3, [index], (4, 8, 8)) for index in reversed(range(6))]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], sample_noise(4, [0], (4, 8, 8))[0])
    assert len(set(together[:, 0, 0, 0].tolist())) == 6


def test_noise_comes_in_the_dtype_that_is_asked_for() -> None:
    wide, narrow = (
        draw_noise((5, 2), noise_generator(0, "x"), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype == torch.bfloat16 and torch.equal(wide.to(torch.bfloat16), narrow)


def test_streams_go_on_where_a_checkpoint_left_them() -> None:
    running = NoiseStreams(1, rank=2)
    draw_noise((9,), running["student"])
    draw_noise((4,), running["fake score"])
    state = running.state_dict()
    rest = [draw_noise((20,), running[purpose]) for purpose in ("student", "fake score", "new")]
    resumed = NoiseStreams(1, rank=2)
    draw_noise((7,), resumed["new"])  # forgotten: the state does not know it
    resumed.load_state_dict(state)
    again = [draw_noise((20,), resumed[purpose]) for purpose in ("student", "fake score", "new")]
    assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


def test_refuses_the_state_of_another_rank_or_seed_and_names_that_are_none() -> None:
    state = NoiseStreams(1, rank=2).state_dict()
    for seed, rank in ((1, 3), (2, 2)):
        with pytest.raises(ValueError, match="the state is of seed 1 and rank 2"):
            NoiseStreams(seed, rank).load_state_dict(state)
    with pytest.raises(ValueError, match="rank is -1, expected an integer of at least 0"):
        noise_generator(0, "x", -1)
    with pytest.raises(ValueError, match=r"seed is 0\.5, expected an integer$"):
        noise_generator(0.5, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="purpose is int"):
        noise_generator(0, 1)  # type: ignore[arg-type]


def test_generators_that_belong_to_nobody_are_the_runs_too() -> None:
    """Dropout draws from torch's own: two processes of one seed agree, two ranks do not."""

    def drawn(seed: int, rank: int) -> list[float]:
        seed_everybody(seed, rank)
        return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002

    assert drawn(3, 0) == drawn(3, 0)
    for other in (drawn(3, 1), drawn(4, 0)):
        assert all(one != two for one, two in zip(drawn(3, 0), other, strict=True))
