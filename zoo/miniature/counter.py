"""Randomness by counting: the draw for (seed, index, field) is a hash of the three, so that any sample of a stream can
be had without its predecessors, alone or in a batch of any size, with the same result. A loader's whole state is one
index.

The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), in int64 arithmetic that wraps around.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15: one step of splitmix64's counter
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical: int64's own shift would drag the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    for bits, factor in _MIX:
        x = (x ^ _shift_right(x, bits)) * factor
    return x ^ _shift_right(x, 31)


def draw(seed: int, index: Tensor, field: int, choices: int | Tensor) -> Tensor:
    """An even draw from 0 .. choices - 1 for every index; `choices` may differ from index to index."""
    key = mix(torch.tensor(_wrap(seed), device=index.device) + GOLDEN)
    bits = mix(mix(index * GOLDEN + key) + _wrap((field + 1) * GOLDEN))
    return (_shift_right(bits, 32) * choices) >> 32


def chance(seed: int, index: Tensor, field: int, probability: float) -> Tensor:
    """True with this probability, to one part in 2**24."""
    return draw(seed, index, field, 1 << 24) < round(probability * (1 << 24))


def _wrap(number: int) -> int:
    """The number's low 64 bits, as int64 holds them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
