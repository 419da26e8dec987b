"""Random streams: one for every seed, purpose and rank, and none of them alike.

torch's CPU generator is MT19937 and takes 32 bits of its seed: manual_seed(5) and manual_seed(5 + 2**32) draw the same
numbers, and among 65,000 seeds that are hashes two are expected to agree. So the generator's whole state, 19937 bits,
is filled from SHAKE-256 of (seed, purpose, rank). Noise is drawn on the CPU and then moved: it is the same on every
device.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The state that torch hands out: seed (8 bytes), two int32, position (8 bytes), then MT19937's words, 8 bytes each.
_WORDS_AT, _WORDS = 24, 624


def noise_generator(seed: int, purpose: str, rank: int = 0) -> torch.Generator:
    """A CPU generator for one purpose on one rank; its `get_state()` is what a checkpoint keeps."""
    if not isinstance(purpose, str):
        raise TypeError(f"noise_generator: purpose is {type(purpose).__name__}, expected a str such as 'student'")
    return _generator("rank", _whole("seed", seed), purpose, _whole("rank", rank, least=0))


def sample_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Normal noise [samples, *shape] in float32, each sample's from the seed and its index alone."""
    seed = _whole("seed", seed)
    return torch.stack(
        [torch.randn(*shape, generator=_generator("sample", seed, "", _whole("index", i, least=0))) for i in indices]
    )


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise from a generator, where and as it is wanted."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(device, dtype)


def seed_everybody(seed: int, rank: int = 0) -> None:
    """The generators that belong to nobody as well: dropout inside a network draws from torch's own."""
    number = int(torch.randint(2**62, (), generator=noise_generator(seed, "everybody", rank)))
    torch.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - libraries draw from it whether we like it or not
    random.seed(number)


class NoiseStreams:
    """The streams of one rank by purpose, made when they are first asked for, and kept in checkpoints together.

    A rank that a checkpoint does not know (there are more ranks than there were) starts its streams at their
    beginning: nobody has drawn from them.
    """

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = _whole("seed", seed), _whole("rank", rank, least=0)
        self._streams: dict[str, torch.Generator] = {}

    def __getitem__(self, purpose: str) -> torch.Generator:
        if purpose not in self._streams:
            self._streams[purpose] = noise_generator(self.seed, purpose, self.rank)
        return self._streams[purpose]

    def state_dict(self) -> dict[str, Any]:
        states = {purpose: stream.get_state() for purpose, stream in self._streams.items()}
        return {"seed": self.seed, "rank": self.rank, "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["seed"], state["rank"]) != (self.seed, self.rank):
            raise ValueError(
                f"noise: the state is of seed {state['seed']} and rank {state['rank']}, and these streams are of seed "
                f"{self.seed} and rank {self.rank}; give every rank its own state, and keep the seed of the run"
            )
        self._streams = {}
        for purpose, known in state["states"].items():
            self[purpose].set_state(known)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"noise: {name} is {value!r}, expected an integer{bound}")
    return value


def _generator(kind: str, seed: int, purpose: str, number: int) -> torch.Generator:
    _check_layout()
    name = repr((kind, seed, purpose, number)).encode()
    words = torch.frombuffer(bytearray(hashlib.shake_256(name).digest(4 * _WORDS)), dtype=torch.uint8)
    # The seed shows in initial_seed(), for whoever looks at a generator; what is drawn depends on the words.
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
    state = generator.get_state()
    wide = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(_WORDS, 8)
    wide[:, :4] = words.view(_WORDS, 4)
    generator.set_state(state)
    return generator


@functools.cache
def _check_layout() -> None:
    """That the words stand where they are written: MT19937's own seeding, recomputed."""
    seed = 0x1234567
    state = torch.Generator().manual_seed(seed).get_state()
    found = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].clone().view(torch.int64).tolist()
    expected = [seed]
    for i in range(1, _WORDS):
        expected.append((1812433253 * (expected[-1] ^ (expected[-1] >> 30)) + i) % 2**32)
    assert found == expected, f"torch {torch.__version__} lays the state of a CPU generator out differently"
