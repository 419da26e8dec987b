"""gated_residual_norm_modulate against float64, and what is particular to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops

from . import oracle, strategies
from .samples import sample


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    oracle.check(data.draw(strategies.gated_residual_norm_modulate(dtype)))


def _everything() -> dict:
    return dict(sample("gated_residual_norm_modulate").tensors)


@pytest.mark.parametrize("used", ["out", "h"])
def test_one_output_may_stay_unused(used: str) -> None:
    case = sample("gated_residual_norm_modulate")
    incoming = [torch.randn(2, 5, 24), torch.randn(2, 5, 24)]
    incoming[1 if used == "out" else 0] = None
    oracle.check(case, incoming=incoming)


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gives_the_bits_of_the_two_operators_that_it_fuses(cpu_isa: str, dtype: torch.dtype, norm: str) -> None:
    t = sample("gated_residual_norm_modulate", dtype, width=136, length=7).tensors
    out, h = ops.gated_residual_norm_modulate(**t, norm=norm)
    apart = ops.gated_residual(t["x"], t["z"], t["gate"], t["post_weight"])
    assert torch.equal(out, apart)
    assert torch.equal(h, ops.norm_modulate(apart, t["pre_weight"], t["scale"], t["shift"], norm=norm))


def test_positional_arguments_are_those_of_the_documentation() -> None:
    t = _everything()
    out, h = ops.gated_residual_norm_modulate(*t.values(), norm="rms", gate_act="tanh", eps=1e-5)
    named = ops.gated_residual_norm_modulate(**t)
    assert torch.equal(out, named[0]) and torch.equal(h, named[1])


@pytest.mark.parametrize("width", [1, 2047, 3840, 16384])
def test_takes_any_width(width: int) -> None:
    oracle.check(sample("gated_residual_norm_modulate", width=width, length=3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pre_weight": torch.ones(23)}, ValueError, r"pre_weight has shape \[23\], expected \[24\]"),
        ({"gate": torch.ones(3, 24)}, ValueError, r"gate has shape \[3, 24\]"),
        ({"norm": "none"}, ValueError, "norm is 'none', expected one of 'rms', 'layer'"),
        ({"post_norm": "layer"}, ValueError, "post_norm is 'layer', expected one of 'rms', 'none'"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.gated_residual_norm_modulate(**{**_everything(), **change})
