"""Features of odd shapes, drawn from a seed, so that a failing example is two or three small numbers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, width: int) -> Tensor:
    return torch.linalg.qr(normal(seed, width, width)).Q


def permutation(seed: int, rows: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
