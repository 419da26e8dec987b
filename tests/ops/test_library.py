"""Which backend runs, what is said when it is not the one expected, and what a raw operator refuses."""

from __future__ import annotations

import warnings

import pytest
import torch

from twostep import ops
from twostep.ops import library


def test_cpu_tensors_run_on_the_cpu_kernels() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert ops.backend(torch.ones(2, 3, 4, dtype=dtype)) == "cpu"
    assert ops.backend(torch.ones(2, 3, 4, dtype=torch.int32)) == "reference"
    assert ops.backend(torch.ones(2, 3, 4, device="meta")) == "reference"


def test_a_fallback_warns_once_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the binary is missing for this test"
    monkeypatch.setattr(
        library, "_status", library._status.__class__(usable=False, reason=reason, path=None, stamp=None)
    )
    monkeypatch.setattr(library, "_warned", set())
    x = torch.randn(2, 3, 8)
    with pytest.warns(RuntimeWarning, match=f"norm_modulate: {reason}; running the plain PyTorch reference"):
        y = ops.norm_modulate(x)
    assert torch.equal(y, ops.reference.norm_modulate(x)) and ops.backend(x) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.norm_modulate(x)


def test_build_info_tells_what_was_built_and_what_runs() -> None:
    info = ops.build_info()
    assert info["usable"] and info["cpu_isa"] in ("avx512", "avx2", "portable")
    assert {"torch", "cuda", "archs", "path"} <= info.keys()


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'sse9' is not an instruction set"):
        library.select_cpu_isa("sse9")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch.ops.twostep.norm_modulate(torch.ones(2, 3), None, None, None, False, 1e-5), "2 dimensions"),
        (
            lambda: torch.ops.twostep.norm_modulate(torch.ones(2, 3, 4), torch.ones(3), None, None, False, 1e-5),
            r"weight must be \[width\]",
        ),
        (
            lambda: torch.ops.twostep.norm_modulate(
                torch.ones(2, 3, 4).bfloat16(), torch.ones(4), torch.ones(2, 4).bfloat16(), None, False, 1e-5
            ),
            "the parameters must share one dtype",
        ),
        (lambda: torch.ops.twostep.swiglu(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "first tensor's shape"),
        (lambda: torch.ops.twostep.rope(torch.ones(2, 3, 1, 5), torch.ones(1, 3, 2, 2), False), "even number"),
        (lambda: torch.ops.twostep.rope(torch.ones(2, 3, 1, 4), torch.ones(1, 2, 2, 2), False), "freqs must be"),
        (
            lambda: torch.ops.twostep.norm_modulate(torch.ones(1, 1, 4).int(), None, None, None, False, 1e-5),
            "is not supported",
        ),
        (
            lambda: torch.ops.twostep.norm_modulate_backward(
                *(torch.ones(2, 5, 64).double(),) * 2,
                None,
                None,
                torch.empty(0).double(),
                torch.ones(2, 5).double(),
                False,
                torch.float32,
                False,
                False,
                True,
            ),
            "param_dtype is",
        ),
        (
            lambda: torch.ops.twostep.swiglu_backward(torch.ones(2, 3, 5), *(torch.ones(2, 3, 4),) * 2),
            "dy must have the first tensor's shape",
        ),
        (
            lambda: torch.ops.twostep.swiglu_halves_backward(torch.ones(2, 3, 4), torch.ones(2, 3, 7)),
            r"halves must be \[batch, length, 2 \* width\]",
        ),
        (
            lambda: torch.ops.twostep.gated_residual_backward(
                *(torch.ones(2, 3, 4),) * 2, None, None, torch.ones(2, 2), True, True, False, False
            ),
            r"rstd must be \[batch, length\]",
        ),
        (
            lambda: torch.ops.twostep.qk_norm_rope_backward(
                *(torch.ones(2, 3, 2, 4), torch.ones(2, 3, 1, 4)) * 2,
                None,
                None,
                torch.ones(1, 3, 1, 2),
                1e-5,
                False,
                False,
            ),
            "freqs must be",
        ),
    ],
)
def test_a_raw_operator_never_reads_past_its_tensors(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
