"""The emulated device reports the faults that a GPU leaves to chance, and its schedules change no result."""

from __future__ import annotations

import pytest
import torch

from . import checks, launchers
from .checks import Heads, Rows
from .launchers import Emulator
from .test_ops import ROW_OPS


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("divergent barrier", "different barriers"),
        ("missed barrier", "a barrier waits for threads that have ended"),
        ("ended lane", "names a lane that has ended"),
        ("lanes that do not come", "a shuffle waits for lanes"),
        ("divergent shuffle", "lanes of one mask wait in different shuffles"),
        ("mask without caller", "leaves out the calling lane"),
        ("unwritten shared", "read before it was written"),
        ("shared out of bounds", "out of bounds shared write"),
        ("misaligned shared", "misaligned shared write"),
        ("shared race", "race: shared memory written by another thread"),
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_a_fault_is_reported(emulator: Emulator, fault: str, report: str, order: str) -> None:
    with emulator.configured(order=order), pytest.raises(RuntimeError, match=report):
        emulator.module.provoke(fault)
    with emulator.configured(order=order):
        emulator.module.provoke("none")


def test_memory_outside_the_tensors_of_a_call_is_out_of_bounds(emulator: Emulator) -> None:
    gate, up = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    shape = {"dtype": 0, "batch": 2, "length": 3, "width": 16}
    with pytest.raises(RuntimeError, match="out of bounds write"):
        emulator("swiglu_forward", {**shape, "gate": gate, "up": up}, {"y": torch.empty(2, 3, 16)[:, :2].contiguous()})
    with pytest.raises(RuntimeError, match="out of bounds read"):
        emulator("swiglu_forward", {**shape, "length": 4, "gate": gate, "up": up}, {"y": torch.empty(2, 4, 16)})
    with pytest.raises(RuntimeError, match="write to an input"):
        emulator("swiglu_forward", {**shape, "gate": gate, "up": up, "y": gate}, {})


def test_two_threads_that_write_one_element_are_a_race(emulator: Emulator) -> None:
    dy, gate, up, both = (torch.randn(1, 2, 16) for _ in range(4))
    shape = {"dtype": 0, "batch": 1, "length": 2, "width": 16}
    overlapping = {"dgate": both.expand(1, 2, 16), "dup": torch.empty(1, 1, 16).expand(1, 2, 16)}
    with pytest.raises(RuntimeError, match="written by two threads"):
        emulator("swiglu_backward", {**shape, "dy": dy, "gate": gate, "up": up}, overlapping)


SCHEDULES = [{"order": "reverse"}, *({"order": "shuffled", "seed": seed} for seed in range(3))]


@pytest.mark.parametrize("op", [*ROW_OPS, "qk_norm_rope", "rope", "swiglu"])
@pytest.mark.parametrize("multiprocessors", [1, 7])
def test_schedules_change_no_bit(emulator: Emulator, op: str, multiprocessors: int) -> None:
    def results() -> list[torch.Tensor]:
        if op in ROW_OPS:
            return [
                t
                for width in (64, 520)
                for t in ROW_OPS[op](emulator, Rows(width=width, length=9, dtype=torch.float32, norm="layer"))
            ]
        if op == "swiglu":
            return checks.swiglu(emulator, Rows(width=1032))
        return getattr(checks, op)(emulator, Heads(heads=5, length=6))

    with emulator.configured(multiprocessors=multiprocessors):
        expected = results()
    for schedule in SCHEDULES:
        with emulator.configured(multiprocessors=multiprocessors, **schedule):
            for actual, first in zip(results(), expected, strict=True):
                assert torch.equal(actual, first)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4608), (4, 4608), (7, 100), (1000, 3)])
@pytest.mark.parametrize("width", [128, 3840, 16384])
def test_runs_cover_the_rows_and_none_is_empty(
    emulator: Emulator, multiprocessors: int, batch: int, length: int, width: int
) -> None:
    with emulator.configured(multiprocessors=multiprocessors):
        splits = emulator.splits(batch, length, width)
    rows = -(-length // splits)
    assert 1 <= splits <= length and (splits - 1) * rows < length
    if width >= 3840:  # two blocks a multiprocessor at most, and a run for each sample
        assert batch * splits <= max(2 * multiprocessors, batch)


def test_a_launch_counts_its_blocks(emulator: Emulator) -> None:
    with emulator.configured(multiprocessors=2):
        before = emulator.module.counts()["blocks"]
        x = torch.randn(1, 64, 4096).to(torch.bfloat16)
        launchers.norm_modulate_forward(emulator, x, None, None, None, norm="rms", eps=1e-5, parameters=torch.bfloat16)
        assert emulator.module.counts()["blocks"] - before == 2 * 3  # three blocks of 256 threads each reside
