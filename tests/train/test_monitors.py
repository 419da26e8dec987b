"""Monitors: what they measure, by closed forms; what they keep, over a checkpoint; and that watching does not wait."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twostep.train.monitors import GIB, Averages, CriticLag, Drift, PhaseClock, colour_statistics


def one_colour(red: float, green: float, blue: float) -> Tensor:
    """[1, 3, 4, 4] of a colour given in [0, 1]."""
    return (torch.tensor([red, green, blue], dtype=torch.float64) * 2 - 1).view(1, 3, 1, 1).expand(1, 3, 4, 4)


def statistics(images: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in colour_statistics(images).items()}


def over_a_checkpoint(state: Any) -> Any:
    return json.loads(json.dumps(state))


# Colours


@pytest.mark.parametrize(
    ("colour", "saturation", "brightness"),
    [
        ((0, 0, 0), 0, 0),
        ((1, 1, 1), 0, 1),
        ((0.3, 0.3, 0.3), 0, 0.3),
        ((1, 0, 0), 1, 0.2126),
        ((0, 0.5, 0), 0.5, 0.3576),
    ],
)
def test_a_plain_colour(colour: tuple[float, float, float], saturation: float, brightness: float) -> None:
    expected = {"saturation": saturation, "contrast": 0, "brightness": brightness}
    assert statistics(one_colour(*colour)) == pytest.approx(expected, abs=1e-12)


def test_contrast_is_within_an_image() -> None:
    black, white = one_colour(0, 0, 0), one_colour(1, 1, 1)
    assert statistics(torch.cat([black, white]))["contrast"] == 0
    assert statistics(torch.cat([black, white], dim=3))["contrast"] == pytest.approx(0.5)


def test_statistics_scale_with_colour_and_contrast() -> None:
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.4
    before, after = statistics(images), statistics(2 * images)  # around mid-grey
    assert after["saturation"] == pytest.approx(2 * before["saturation"])
    assert after["contrast"] == pytest.approx(2 * before["contrast"])
    assert after["brightness"] - 0.5 == pytest.approx(2 * (before["brightness"] - 0.5))


def test_statistics_are_of_images_as_they_are_seen() -> None:
    assert statistics(one_colour(3, -2, -2)) == pytest.approx(statistics(one_colour(1, 0, 0)))
    broken = one_colour(0.5, 0.5, 0.5).clone()
    broken[0, 0, 0, 0] = math.nan
    assert all(math.isnan(value) for value in statistics(broken).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_counted_in_float32(dtype: torch.dtype) -> None:
    images = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    assert statistics(images) == pytest.approx(statistics(images.double()), rel=1e-5)


@pytest.mark.parametrize("images", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4).byte()])
def test_statistics_of_what_is_no_batch_of_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match="colour_statistics: images are"):
        colour_statistics(images)


# Ratios


def test_drift_is_since_the_first_and_outlives_a_checkpoint() -> None:
    drift = Drift()
    assert drift.update({"saturation": torch.tensor(0.25)}) == {"saturation_drift": 1.0}
    assert drift.update({"saturation": 0.5}) == {"saturation_drift": 2.0}
    resumed = Drift()
    resumed.load_state_dict(over_a_checkpoint(drift.state_dict()))
    assert resumed.update({"saturation": 0.125, "contrast": 3.0}) == {"saturation_drift": 0.5, "contrast_drift": 1.0}


def test_drift_shows_what_is_broken_and_does_not_keep_it() -> None:
    drift = Drift()
    assert math.isnan(drift.update({"contrast": math.nan})["contrast_drift"])
    assert drift.update({"contrast": 0.5}) == {"contrast_drift": 1.0}
    assert math.isnan(drift.update({"contrast": math.nan})["contrast_drift"])
    zero = Drift()
    assert math.isnan(zero.update({"saturation": 0.0})["saturation_drift"])
    assert zero.update({"saturation": 0.1}) == {"saturation_drift": math.inf}


def test_the_critic_lags_when_it_has_done_better() -> None:
    lag = CriticLag()
    assert [lag.update(loss) for loss in (0.5, 0.25, 0.375, 0.125)] == [1.0, 1.0, 1.5, 1.0]
    resumed = CriticLag()
    resumed.load_state_dict(over_a_checkpoint(lag.state_dict()))
    assert resumed.update(0.25) == 2.0
    assert math.isnan(resumed.update(math.nan)) and resumed.update(math.inf) == math.inf
    assert resumed.update(0.125) == 1.0
    fresh = CriticLag()
    fresh.load_state_dict(over_a_checkpoint(CriticLag().state_dict()))
    assert fresh.update(3.0) == 1.0


# Averages


def test_adding_never_reads() -> None:
    averages = Averages()
    for _ in range(3):  # a tensor on this device has no value: to read it is an error
        averages.add({"loss": torch.ones((), device="meta", requires_grad=True)})
    with pytest.raises(NotImplementedError):
        averages.take()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_means_are_those_of_float64(numbers: list[float]) -> None:
    averages = Averages()
    for index, number in enumerate(numbers):
        averages.add({"tensor": torch.tensor(number), "float": number})
        if index % 2 == 0:
            averages.add({"sometimes": torch.tensor([number])})
    expected = {"tensor": numbers, "float": numbers, "sometimes": numbers[::2]}
    taken = averages.take()
    assert taken == {name: pytest.approx(math.fsum(of) / len(of), rel=1e-12, abs=1e-9) for name, of in expected.items()}
    assert list(taken) == ["tensor", "float", "sometimes"]
    assert averages.take() == {}


def test_floats_keep_their_precision() -> None:
    averages = Averages()
    averages.add({"x": 0.1})
    assert averages.take() == {"x": 0.1}


def test_one_nan_is_visible_and_only_where_it_was() -> None:
    averages = Averages()
    for number in (1.0, math.nan, 3.0):
        averages.add({"bad": torch.tensor(number), "good": torch.tensor(2.0)})
    taken = averages.take()
    assert math.isnan(taken["bad"]) and taken["good"] == 2.0
    averages.add({"bad": torch.tensor(1.0)})
    assert averages.take() == {"bad": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_buffer_may_be_used_again(dtype: torch.dtype) -> None:
    averages, buffer = Averages(), torch.zeros((), dtype=dtype)
    for number in (1.0, 3.0):
        averages.add({"loss": buffer.fill_(number)})
    assert averages.take() == {"loss": 2.0} and buffer == 3.0


def test_averages_outlive_a_checkpoint_within_a_window() -> None:
    whole, first = Averages(), Averages()
    for number in (0.1, 0.7):
        whole.add({"loss": torch.tensor(number)})
        first.add({"loss": torch.tensor(number)})
    resumed = Averages()
    resumed.load_state_dict(over_a_checkpoint(first.state_dict()))
    for averages in (whole, first, resumed):
        averages.add({"loss": torch.tensor(0.3)})
    assert whole.take() == first.take() == resumed.take()


def test_a_metric_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"averages: logits has shape \[2\], expected one number"):
        Averages().add({"logits": torch.zeros(2)})


# Phases


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_are_averaged_between_takes() -> None:
    clock = Clock()
    phases = PhaseClock("cpu", clock)
    for seconds in (1.0, 3.0):
        with phases.phase("guidance"):
            clock.now += seconds
            with phases.phase("data"):
                clock.now += 0.5
        clock.now += 100
    taken = phases.take()
    assert {name: value for name, value in taken.items() if name.endswith("seconds")} == {
        "data_seconds": 0.5,
        "guidance_seconds": 2.5,
    }
    assert phases.take() == {}


def test_a_phase_that_failed_is_not_counted() -> None:
    clock = Clock()
    phases = PhaseClock("cpu", clock)
    with pytest.raises(KeyError), phases.phase("generator"):
        raise KeyError
    with phases.phase("generator"):
        clock.now += 2
    assert phases.take()["generator_seconds"] == 2


def test_the_hosts_peak_is_at_least_what_is_held() -> None:
    phases = PhaseClock("cpu")
    with phases.phase("data"):
        held = torch.ones(64 << 20, dtype=torch.uint8)
    peak = phases.take()["data_peak_gib"] * GIB
    assert held.nbytes < peak < 1 << 40


class Allocator:
    """CUDA's counters, with what PhaseClock asks of them; a GPU's own are below."""

    held = peak = 0

    def use(self, size: int) -> None:
        self.peak = max(self.peak, self.held + size)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.held

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak


def test_each_phase_has_its_own_peak_and_that_of_the_phases_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset_peak_memory_stats)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocator.max_memory_allocated)
    phases = PhaseClock("cuda")
    monkeypatch.setattr(phases, "_mark", lambda: 0.0)
    monkeypatch.setattr(phases, "_between", lambda started, ended: 0.0)
    unit = 1 << 30
    allocator.use(99 * unit)  # before: nobody's
    with phases.phase("early"):
        allocator.use(9 * unit)
        with phases.phase("inner"):
            allocator.use(3 * unit)
        with pytest.raises(KeyError), phases.phase("failed"):
            raise KeyError
        allocator.use(1 * unit)
    with phases.phase("late"):
        with phases.phase("inner"):
            allocator.use(5 * unit)
        with phases.phase("inner"):
            allocator.use(2 * unit)
        allocator.use(4 * unit)
    peaks = {name: value for name, value in phases.take().items() if name.endswith("gib")}
    assert peaks == {"inner_peak_gib": 5.0, "early_peak_gib": 9.0, "late_peak_gib": 5.0}


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_until_it_is_read() -> None:
    phases, averages = PhaseClock("cuda"), Averages()
    x = torch.randn(2048, 2048, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with phases.phase("multiply"):
            for _ in range(20):
                averages.add({"loss": (x @ x).mean()})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = phases.take()
    assert taken["multiply_seconds"] > 0
    assert taken["multiply_peak_gib"] * GIB >= 2 * x.nbytes
    assert math.isfinite(averages.take()["loss"])
