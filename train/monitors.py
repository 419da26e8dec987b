"""What to watch in distillation besides losses, which alone do not tell whether it works: images, critic, time, memory.

    colour_statistics, Drift    guided distillation oversaturates: how the samples' colours have moved since the start
    CriticLag                   the fake score falls behind the student whose samples it is to know
    PhaseClock                  seconds and peak memory of each part of an iteration
    Averages                    running means of metrics, which wait on their device until somebody asks

What has to outlive a checkpoint has `state_dict` and `load_state_dict`, of plain numbers.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709, of the encoded values
GIB = 2.0**30


def colour_statistics(images: Tensor) -> dict[str, Tensor]:  # [N, 3, H, W] in [-1, 1]
    """Means over the images as they are seen: in [0, 1], what is out of range at its end. Left on their device.

    saturation   a pixel's largest channel less its smallest. HSV divides that by the largest, and so would call the
                 noise in near-black pixels saturated.
    contrast     the standard deviation of an image's luma, so that bright beside dark images are no contrast
    brightness   the mean luma
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"colour_statistics: images are {images.dtype} {list(images.shape)}, expected floating point "
            "[N, 3, height, width] in [-1, 1]"
        )
    seen = images.detach()
    seen = (seen if seen.dtype == torch.float64 else seen.float()).clamp(-1, 1).add(1).div(2)
    luma = torch.einsum("nchw,c->nhw", seen, seen.new_tensor(LUMA))
    return {
        "saturation": (seen.amax(1) - seen.amin(1)).mean(),
        "contrast": luma.flatten(1).std(dim=1, correction=0).mean(),
        "brightness": luma.mean(),
    }


class Drift:
    """Ratios of numbers to the first that were seen, mostly of iteration 0: `saturation` becomes `saturation_drift`."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}

    def update(self, statistics: Mapping[str, float | Tensor]) -> dict[str, float]:
        """A number that is not finite is shown, and never kept as the first."""
        now = {name: float(value) for name, value in statistics.items()}
        for name, value in now.items():
            if math.isfinite(value):
                self.first.setdefault(name, value)
        return {f"{name}_drift": _ratio(value, self.first.get(name, math.nan)) for name, value in now.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = {name: float(value) for name, value in state["first"].items()}


class CriticLag:
    """The fake score's mean loss over its best so far: 1 while it keeps up with the student.

    Over the best, and not over the first window: there the fake score is a copy of the teacher before blurred samples,
    and what it reaches says nothing; the best is a level that this network has kept on this student's samples.

    Read its trend. A sharper student has a higher floor, so it may settle a little above 1; a rise that goes on asks
    for more guidance updates per generator update, or a higher rate. A collapse makes it fall to 1: samples all alike
    are easy to denoise.
    """

    def __init__(self) -> None:
        self.best: float | None = None

    def update(self, mean_loss: float) -> float:
        """`mean_loss` is a mean over a window (`Averages`); the best of single losses would be the luckiest batch."""
        if math.isfinite(mean_loss):
            self.best = mean_loss if self.best is None else min(self.best, mean_loss)
        return _ratio(mean_loss, math.nan if self.best is None else self.best)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = None if state["best"] is None else float(state["best"])


class Averages:
    """Running means of metrics. `add` only queues sums on the metrics' device; `take` reads them, in one copy a device.

    Sums are float64. A metric counts as often as it was given; one NaN makes its mean NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"averages: {name} has shape {list(value.shape)}, expected one number")
            given = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            number = given.to(torch.float64).reshape(())
            kept = self._sums.get(name)
            # A clone, since what was given in float64 is the caller's own memory; not in place after it, since a sum
            # that a checkpoint brought back is on the CPU, and moves to the metric's device with the first addition.
            self._sums[name] = number.clone() if kept is None else kept + number
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: total / self._counts[name] for name, total in self._read().items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._read(), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
        self._counts = {name: int(count) for name, count in state["counts"].items()}

    def _read(self) -> dict[str, float]:
        devices: dict[torch.device, list[str]] = {}
        for name, total in self._sums.items():
            devices.setdefault(total.device, []).append(name)
        read: dict[str, float] = {}
        for names in devices.values():
            read.update(zip(names, torch.stack([self._sums[name] for name in names]).tolist(), strict=True))
        return {name: read[name] for name in self._sums}


class PhaseClock:
    """Seconds and peak memory of named phases, which may be nested and may come several times.

    On CUDA, time is the device's, between two events in the current stream, and nothing waits for it before `take`.
    The peak is the allocator's (`max_memory_allocated`): the clock resets that counter at each phase, and nobody else
    should. Elsewhere, time is the host's, and the peak is the process's resident set since its start, which knows no
    phases: it says that a phase came to need more, and never that it needs less.
    """

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self._clock = clock
        self._spans: dict[str, list[Callable[[], float]]] = {}
        self._peaks: dict[str, float] = {}
        self._open: list[float] = []  # the peaks, so far, of the phases that we are in

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that ends in an exception is not counted."""
        self._enter()
        started = self._mark()
        try:
            yield
        except BaseException:
            self._leave()
            raise
        ended = self._mark()
        self._peaks[name] = max(self._peaks.get(name, 0.0), self._leave())
        self._spans.setdefault(name, []).append(lambda: self._between(started, ended))

    def take(self) -> dict[str, float]:
        """Since the last call: the mean of <phase>_seconds, and the largest <phase>_peak_gib."""
        found: dict[str, float] = {}
        for name, spans in self._spans.items():
            found[f"{name}_seconds"] = sum(span() for span in spans) / len(spans)
            found[f"{name}_peak_gib"] = self._peaks[name] / GIB
        self._spans, self._peaks = {}, {}
        return found

    # The allocator has one counter: a phase inside another resets it, so each hands its peak on to the one around it.

    def _enter(self) -> None:
        if self._open:
            self._open[-1] = max(self._open[-1], self._peak())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._open.append(0.0)

    def _leave(self) -> float:
        peak = max(self._open.pop(), self._peak())
        if self._open:
            self._open[-1] = max(self._open[-1], peak)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, started: Any, ended: Any) -> float:
        if self.device.type != "cuda":
            return float(ended - started)
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1000


def _ratio(value: float, to: float) -> float:
    """value / to, where x / 0 is infinite and 0 / 0 is NaN: a zero is shown, and stops nothing."""
    if to:
        return value / to
    return math.copysign(math.inf, value) if value and not math.isnan(value) else math.nan
