"""`twostep plan` says, from shapes alone, what the same update really holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twostep.cli import main
from twostep.zoo.plan import ARRANGEMENTS, Setting, make_roles, plan, run_updates

from .models import CASES, batch_of, fused_backbone, stock_model

CONFIG = {
    "_class_name": "ZImageTransformer2DModel",
    "in_channels": 4,
    "dim": 128,
    "n_layers": 2,
    "n_refiner_layers": 0,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 64,
    "axes_dims": [8, 12, 12],
    "axes_lens": [256, 64, 64],
}


class MallocState(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def bytes_in_use() -> int:
    """What malloc has handed out and not got back: torch's CPU tensors, and everything else of the process."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = MallocState
    state = libc.mallinfo2()
    return int(state.uordblks + state.hblkhd)


class WatchMalloc(TorchDispatchMode):
    """Asks malloc after every operator."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.start, self.peak = bytes_in_use(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, bytes_in_use() - self.start)
        return out


@contextlib.contextmanager
def no_phase(_: str) -> Iterator[None]:
    yield


@pytest.fixture(scope="module", autouse=True)
def _everything_is_imported() -> None:
    """Updates that nobody counts: modules that are loaded on first use, and oneDNN's programs, are memory too."""
    for arrangement in ARRANGEMENTS:
        setting = Setting(16, 16, 16, 32, arrangement, rank=8)
        run_updates(make_roles(CONFIG, setting), setting, no_phase)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("checkpointing", "mode"), [(True, "recompute"), (False, "plain")])
def test_the_plan_is_what_malloc_sees(arrangement: str, checkpointing: bool, mode: str) -> None:
    """Within 10 %; the oracle is the C library's own book-keeping while the update runs with real tensors."""
    setting = Setting(16, 16, 16, 32, arrangement, mode=mode, checkpointing=checkpointing, rank=8)
    predicted = plan(CONFIG, setting).peak
    with WatchMalloc() as malloc:
        run_updates(make_roles(CONFIG, setting), setting, no_phase)
    assert 0.9 <= predicted / malloc.peak <= 1.1


def test_a_plan_takes_no_memory_and_leaves_nothing_behind() -> None:
    """Blocks of the full size, whose weights alone are gigabytes; afterwards real models still compute."""
    before = bytes_in_use()
    one = plan({"_class_name": "ZImageTransformer2DModel", "n_layers": 1}, Setting(arrangement="one base"))
    assert one.parameters["teacher"] > 9e8 and one.held > 1.8e9
    gc.collect()
    assert bytes_in_use() - before < 64 << 20
    small = fused_backbone(CASES["z-image"])
    batch = batch_of(CASES["z-image"])
    assert bool(small.velocity(batch.x, batch.sigma, batch.context).isfinite().all())


def test_one_base_needs_less_and_recompute_less_than_plain() -> None:
    def peak(**changes: Any) -> int:
        return plan(CONFIG, Setting(16, 16, 8, 32, **{"checkpointing": False, "rank": 8, **changes})).peaks["generator"]

    assert peak() < peak(arrangement="networks")
    assert peak() < peak(mode="plain")
    assert peak(checkpointing=True) < peak()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["z-image, odd width, no refiners, nothing to pad"]
    stock_model(case).save_pretrained(tmp_path / "transformer")
    small = ["--height", "64", "--width", "64", "--caption", "16", "--rank", "4"]
    assert main(["plan", str(tmp_path), *small]) == 0
    table = capsys.readouterr().out
    assert "peak of a generator update: MiB" in table and "one base" in table and "networks" in table
    assert main(["plan", str(tmp_path), *small, "--arrangement", "one base", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in stock_model(case).parameters())
    assert facts["parameters"]["teacher"] == parameters
    assert facts["peak_bytes"]["generator"] >= facts["held_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "neither one of z-image, klein-4b, klein-9b, miniature nor a folder"),
        (["z-image", "--height", "1000"], "--height is 1000, expected a multiple of 16"),
        (["klein-4b", "--width", "48"], "--width is 48, expected a multiple of 32"),
        (["z-image", "--pixels-per-latent", "0"], "--pixels-per-latent is 0, expected at least 1"),
        (["z-image", "--batch", "0"], "--batch is 0, expected at least 1"),
        (["z-image", "--caption", "0"], "--caption is 0, expected at least 1"),
        (["miniature", "--height", "64", "--width", "64", "--caption", "800"], "802 positions are needed on axis 0"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_miniature_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "miniature", "--height", "64", "--width", "64", "--arrangement", "one base"]) == 0
    assert "480 caption tokens" in capsys.readouterr().out


def test_an_unknown_arrangement() -> None:
    with pytest.raises(ValueError, match="arrangement is 'all', expected one of 'networks', 'one base'"):
        plan(CONFIG, Setting(arrangement="all"))


def test_float32_is_planned_without_autocast() -> None:
    found = plan(CONFIG, Setting(16, 16, 2, 32, "networks", dtype=torch.float32))
    weights_and_moments = 3 * sum(found.trainable.values()) + found.parameters["teacher"]
    assert found.held == pytest.approx(4 * weights_and_moments, rel=0.01)


def test_trained_networks_are_float32_beside_a_bfloat16_teacher() -> None:
    found = plan(CONFIG, Setting(16, 16, 2, 32, "networks"))
    assert found.held == pytest.approx(12 * sum(found.trainable.values()) + 2 * found.parameters["teacher"], rel=0.01)


def test_a_plan_leaves_no_table_of_its_own_for_a_real_model_of_the_same_shapes() -> None:
    """Tables are kept by shape; a fake one that was kept would end the training run after its plan."""
    setting = Setting(8, 8, 2, 7, "one base", rank=4, dtype=torch.float32)
    plan(CONFIG, setting)
    run_updates(make_roles(CONFIG, setting), setting, no_phase)
