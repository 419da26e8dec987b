"""Every CUDA kernel, run on the emulated device, computes what the header says, and touches no memory but its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from . import checks, launchers
from .checks import Heads, Rows, Samples
from .launchers import Emulator

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROW_OPS = {"norm_modulate": checks.norm_modulate, "gated_residual": checks.gated_residual, "seam": checks.seam}
EVERY_ROW_OP = pytest.mark.parametrize("op", ROW_OPS)


@EVERY_ROW_OP
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 16, 24, 127, 128, 129, 264, 520, 1040])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_any_width_and_dtype(emulator: Emulator, op: str, width: int, dtype: torch.dtype) -> None:
    norm = "layer" if width > 2 else "rms"  # the variance of two numbers says little about their error
    ROW_OPS[op](emulator, Rows(width=width, dtype=dtype, norm=norm, seed=width))
    ROW_OPS[op](emulator, Rows(width=width, dtype=dtype, parameters=F32, batch=3, length=9, seed=width + 1))


@EVERY_ROW_OP
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("width", [3072, 3840, 4096])
def test_widths_of_real_models(emulator: Emulator, op: str, dtype: torch.dtype, width: int) -> None:
    ROW_OPS[op](emulator, Rows(batch=1, length=9, width=width, dtype=dtype, splits=2, seed=width))


@EVERY_ROW_OP
@pytest.mark.parametrize(
    ("width", "offset"), [(8192, 0), (8200, 0), (16384, 0), (16383, 0), (6152, 1)], ids=lambda v: str(v)
)
def test_rows_too_wide_for_registers(emulator: Emulator, op: str, width: int, offset: int) -> None:
    ROW_OPS[op](emulator, Rows(batch=1, length=3, width=width, offset=offset, splits=2))


@EVERY_ROW_OP
@pytest.mark.parametrize("width", [128, 129, 520])
@pytest.mark.parametrize(
    "options",
    [
        {"weight": False},
        {"scale": "none", "shift": "none", "gate": "none"},
        {"weight": False, "scale": "none", "shift": "none", "gate": "none"},
        {"scale": "token", "shift": "token", "gate": "token"},
        {"scale": "token", "shift": "sample", "gate": "sample", "weight": False},
        {"scale": "sample", "shift": "token", "gate": "token", "norm": "layer"},
        {"scale": "chunk", "shift": "chunk", "gate": "chunk"},
        {"gate_act": "none", "post_norm": "none", "norm": "layer"},
        {"post_norm": "none", "gate": "none"},
        {"wants_dout": False},
        {"gap": 8},
        {"gap": 3},
        {"offset": 1},
        {"parameters": F32, "scale": "token", "shift": "token", "gate": "token"},
    ],
    ids=str,
)
def test_any_options(emulator: Emulator, op: str, width: int, options: dict[str, object]) -> None:
    ROW_OPS[op](emulator, replace(Rows(width=width, length=7, splits=3), **options))


@EVERY_ROW_OP
@pytest.mark.parametrize("length", [1, 2, 13, 40])
@pytest.mark.parametrize("splits", [None, 1, 2, 5, 7])
@pytest.mark.parametrize("width", [64, 520])
def test_any_cut_into_runs(emulator: Emulator, op: str, length: int, splits: int | None, width: int) -> None:
    """Empty runs too: 13 rows in 7 runs are six of two, one of one; 1 row in 5 is one run and four empty ones."""
    ROW_OPS[op](emulator, Rows(batch=3, length=length, width=width, splits=splits, dtype=F32))


@EVERY_ROW_OP
@pytest.mark.parametrize("width", [128, 520])
def test_gradients_that_nobody_wants_are_not_computed(emulator: Emulator, op: str, width: int) -> None:
    case = Rows(width=width, dtype=F32, weight=False, scale="none", shift="none", gate="none")

    class WithoutPartials:
        def __call__(self, name: str, inputs: dict[str, object], outputs: dict[str, object]) -> int:
            return emulator(name, inputs, {k: v for k, v in outputs.items() if k != "partials"})

        def splits(self, batch: int, length: int, width: int) -> int:
            return emulator.splits(batch, length, width)

    ROW_OPS[op](WithoutPartials(), case)


@EVERY_ROW_OP
@pytest.mark.parametrize(("batch", "length"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do_zeroes_the_gradients_of_parameters(emulator: Emulator, op: str, batch: int, length: int) -> None:
    ROW_OPS[op](emulator, Rows(batch=batch, length=length, width=16))


@EVERY_ROW_OP
@pytest.mark.parametrize("room", [100 * 1024, 40 * 1024, 12 * 1024])
@pytest.mark.parametrize("width", [520, 3840])
def test_devices_with_less_shared_memory(emulator: Emulator, op: str, room: int, width: int) -> None:
    with emulator.configured(shared_per_block=room - 1024, shared_per_multiprocessor=room):
        ROW_OPS[op](emulator, Rows(batch=1, length=6, width=width, splits=1))


def test_rows_are_read_and_written_as_16_byte_vectors_where_they_are_aligned(emulator: Emulator) -> None:
    def vectors(**options: int) -> int:
        before = emulator.module.counts()
        checks.norm_modulate(emulator, Rows(batch=1, length=4, width=256, splits=1, **options))
        after = emulator.module.counts()
        return after["vector_writes"] - before["vector_writes"]

    # y and dx: 4 rows of 32 vectors each; partials of two sums: 64 vectors each.
    assert vectors() == 2 * 4 * 32 + 2 * 64
    assert vectors(offset=1) == 0
    assert vectors(offset=8) == vectors(gap=8) == vectors()


@pytest.mark.parametrize("op", ["norm_modulate", "gated_residual", "gated_residual_norm_modulate"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_float64_and_overlong_rows_are_refused(emulator: Emulator, op: str, direction: str) -> None:
    x = torch.zeros(1, 1, 8)
    shape = {"batch": 1, "length": 1, "norm": 1, "post_norm": 1, "gate_act": 0, "eps": 1e-5}
    rows = dict.fromkeys(("x", "z", "dy", "dout", "dh"), x)
    for problem in ({"dtype": 3, "param_dtype": 3, "width": 8}, {"dtype": 0, "param_dtype": 0, "width": 16385}):
        assert emulator(f"{op}_{direction}", {**shape, **problem, **rows}, {}) == launchers.NOT_SUPPORTED


@pytest.mark.parametrize("op", [checks.qk_norm_rope, checks.rope], ids=["qk_norm_rope", "rope"])
@pytest.mark.parametrize("width", [2, 4, 6, 8, 32, 34, 64, 126, 128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_any_head(emulator: Emulator, op: object, width: int, dtype: torch.dtype) -> None:
    op(emulator, Heads(width=width, dtype=dtype, seed=width))


@pytest.mark.parametrize("op", [checks.qk_norm_rope, checks.rope], ids=["qk_norm_rope", "rope"])
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 30, "length": 2},
        {"heads": 1, "length": 11},
        {"heads": 5, "key_heads": 2, "length": 7},
        {"heads": 24, "key_heads": 8, "packed": True},
        {"shared_freqs": False, "length": 9},
        {"weight": False},
        {"parameters": F32, "dtype": F16},
        {"offset": 1},
        {"width": 30, "offset": 1, "packed": True},
        {"splits": 1, "length": 8},
        {"splits": 5, "length": 8},
        {"splits": 3, "length": 1, "batch": 1},
        {"batch": 0},
        {"length": 0},
    ],
    ids=str,
)
def test_any_arrangement_of_heads(emulator: Emulator, op: object, options: dict[str, object]) -> None:
    op(emulator, replace(Heads(width=64), **options))


@pytest.mark.parametrize("width", [1, 3, 8, 127, 520, 4104])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("joined", [False, True])
def test_swiglu(emulator: Emulator, width: int, dtype: torch.dtype, joined: bool) -> None:
    checks.swiglu(emulator, Rows(width=width, dtype=dtype, length=3, seed=width), joined=joined)


@pytest.mark.parametrize("options", [{"gap": 8}, {"gap": 5}, {"offset": 1}, {"batch": 0}, {"length": 1}], ids=str)
def test_swiglu_of_any_rows(emulator: Emulator, options: dict[str, int]) -> None:
    checks.swiglu(emulator, replace(Rows(width=264), **options))


SAMPLE_OPS = {
    "euler_step": checks.euler_step,
    "two_step_split": checks.two_step_split,
    "gradient_norms": checks.gradient_norms,
    "dmd_direction": checks.dmd_direction,
}
EVERY_SAMPLE_OP = pytest.mark.parametrize("op", SAMPLE_OPS)
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]


@EVERY_SAMPLE_OP
@pytest.mark.parametrize("size", [1, 7, 8, 64, 1001, 4096, 4097, 9000, 12288])
@pytest.mark.parametrize(("dtype", "network"), PAIRS, ids=str)
def test_samples_of_any_size_and_dtype(
    emulator: Emulator, op: str, size: int, dtype: torch.dtype, network: torch.dtype
) -> None:
    SAMPLE_OPS[op](emulator, Samples(size=size, dtype=dtype, network=network, seed=size))


@EVERY_SAMPLE_OP
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 1},
        {"batch": 5, "per_sample": False},
        {"gap": 8},
        {"gap": 3},
        {"offset": 1},
        {"offset": 8, "network": BF16},
        {"gap": 4, "network": BF16},
        {"per_sample": False, "gap": 8, "network": F16},
        {"batch": 70, "size": 24},
        {"batch": 0},
        {"size": 0},
    ],
    ids=str,
)
def test_any_arrangement_of_samples(emulator: Emulator, op: str, options: dict[str, object]) -> None:
    SAMPLE_OPS[op](emulator, replace(Samples(), **options))


@EVERY_SAMPLE_OP
@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_the_order_of_threads_changes_no_bit_of_samples(emulator: Emulator, op: str, order: str) -> None:
    case = Samples(size=9001, network=BF16)
    expected = SAMPLE_OPS[op](emulator, case)
    with emulator.configured(order=order, seed=3, multiprocessors=7):
        found = SAMPLE_OPS[op](emulator, case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_samples_are_moved_as_16_byte_vectors_where_they_are_aligned(emulator: Emulator) -> None:
    def vectors(case: Samples, *kinds: str) -> list[int]:
        (x,), (v,) = case.draw(1), case.draw(1, network=True)
        before = emulator.module.counts()
        launchers.euler_step_forward(emulator, x, v, -0.25)
        after = emulator.module.counts()
        return [after[f"vector_{kind}"] - before[f"vector_{kind}"] for kind in ("reads", "writes")]

    # 2 x 1024 elements: 512 vectors of float32, 256 of bfloat16.
    assert vectors(Samples(size=1024)) == [2 * 512, 512]
    assert vectors(Samples(size=1024, network=BF16)) == [512 + 256, 512]
    assert vectors(Samples(size=1024, dtype=BF16)) == [2 * 256, 256]
    assert vectors(Samples(size=1024, gap=8)) == [2 * 512, 512]
    # Samples of 1002 are no whole vectors, two of them in a row are; with a gap, or off 16 bytes, they go one by one.
    assert vectors(Samples(size=1002)) == [2 * 501, 501]
    assert vectors(Samples(size=1002, gap=2)) == vectors(Samples(size=1024, offset=1)) == [0, 0]


def test_without_a_norm_dz_does_not_look_at_z(emulator: Emulator) -> None:
    checks.gated_residual_of_a_broken_branch(emulator)


def test_the_dmd_direction_hides_nothing(emulator: Emulator) -> None:
    checks.dmd_direction_of_broken_samples(emulator)


@pytest.mark.parametrize(
    "launcher", ["euler_step_forward", "two_step_split_backward", "gradient_norms", "dmd_direction"]
)
def test_samples_in_float64_are_refused(emulator: Emulator, launcher: str) -> None:
    problem = {"dtype": 3, "velocity_dtype": 3, "prediction_dtype": 3, "batch": 1, "size": 8}
    assert emulator(launcher, problem, {}) == launchers.NOT_SUPPORTED
    narrow_state = {"dtype": 1, "velocity_dtype": 0, "prediction_dtype": 0, "batch": 1, "size": 8}
    if launcher != "gradient_norms":
        assert emulator(launcher, narrow_state, {}) == launchers.NOT_SUPPORTED
