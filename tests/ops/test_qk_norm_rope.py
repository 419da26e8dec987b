"""qk_norm_rope against float64, and what is particular to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops

from . import oracle, strategies
from .oracle import Case


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    oracle.check(data.draw(strategies.qk_norm_rope(dtype)))


def _inputs() -> dict:
    return {
        "q": torch.randn(2, 5, 3, 16),
        "k": torch.randn(2, 5, 3, 16),
        "q_weight": torch.randn(16),
        "k_weight": torch.randn(16),
        "freqs": torch.randn(1, 5, 8, 2),
    }


def test_reads_a_fused_projection_in_place() -> None:
    qkv = torch.randn(2, 5, 3 * 3 * 16)
    q, k, _ = (part.unflatten(-1, (3, 16)) for part in qkv.chunk(3, -1))
    oracle.check(Case("qk_norm_rope", {**_inputs(), "q": q, "k": k}))


def test_saves_nothing_but_its_inputs() -> None:
    t = {name: value if name == "freqs" else value.requires_grad_() for name, value in _inputs().items()}
    own = {value.untyped_storage().data_ptr() for value in t.values()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        ops.qk_norm_rope(**t)
    assert saved and all(s.untyped_storage().data_ptr() in own for s in saved)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.randn(2, 5, 3, 18)}, ValueError, r"k has shape \[2, 5, 3, 18\], expected \[2, 5, heads, 16\]"),
        ({"k": torch.randn(2, 5, 3, 16).bfloat16()}, TypeError, "k has dtype torch.bfloat16, expected torch.float32"),
        ({"q_weight": torch.randn(8)}, ValueError, r"q_weight has shape \[8\], expected \[16\]"),
        ({"freqs": torch.randn(1, 5, 16)}, ValueError, r"freqs has shape \[1, 5, 16\]"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.qk_norm_rope(**{**_inputs(), **change})
