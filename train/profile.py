"""`--profile`: a trace of a few iterations, for chrome://tracing or Perfetto, and a table of what took longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .ranks import Ranks

SKIPPED, TRACED = 2, 3  # iterations: the first ones compile, allocate and warm caches


class Profile:
    """Writes `profile/rank-<r>.json` and `.txt` of the run's folder once enough iterations are over."""

    def __init__(self, folder: Path, ranks: Ranks, *, wanted: bool) -> None:
        self.folder, self.ranks, self.wanted = folder / "profile", ranks, wanted
        self._profiler: Any = None

    def __enter__(self) -> Profile:
        if not self.wanted:
            return self
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.__enter__()
        return self

    def step(self) -> None:
        """An iteration is over."""
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(self, *failure: Any) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(*failure)

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"rank-{self.ranks.rank}"
        profiler.export_chrome_trace(str(self.folder / f"{stem}.json"))
        order = "self_cuda_time_total" if self.ranks.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40)
        (self.folder / f"{stem}.txt").write_text(table, encoding="utf-8")
