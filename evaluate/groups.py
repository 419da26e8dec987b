"""Rows that belong together: images of one prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def rows_by_label(labels: Sequence[Hashable]) -> dict[Hashable, Tensor]:
    """For each label, in the order of first appearance, the numbers of its rows [n]."""
    found: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        found.setdefault(label, []).append(row)
    return {label: torch.tensor(rows) for label, rows in found.items()}
