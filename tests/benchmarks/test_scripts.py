"""The benchmarks' scripts run, at their smallest: a number that nobody can measure again is worth nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twostep.bench import cases

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """From the root, as their headers say."""
    # pytest-benchmark measures nothing in a worker of xdist, which these variables name.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def results(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def test_stock_and_fused_models_are_timed_in_both_directions_and_dtypes(tmp_path: Path) -> None:
    run("benchmarks/stock_vs_fused.py", "--seconds", "0.01", "--batch", "2", "--out", str(tmp_path))
    rows = results(tmp_path / "stock_vs_fused.json")
    assert len(rows) == 8
    for row in rows:
        assert set(row["milliseconds"]) == {"stock", "fused"} and min(row["milliseconds"].values()) > 0
        assert row["floor"] > 0 and row["batch"] == 2


def test_a_whole_iteration_of_the_trainer_is_timed_full_and_lora(tmp_path: Path) -> None:
    small = ("--iterations", "1", "--batch", "2", "--dtype", "float32")
    run("benchmarks/train_speed.py", *small, "--out", str(tmp_path))
    rows = results(tmp_path / "train_speed.json")
    assert [row["weights"] for row in rows] == ["full", "lora"]
    assert all(row["ratio"] == pytest.approx(row["seconds"]["stock"] / row["seconds"]["fused"]) for row in rows)


def test_an_operator_is_timed_by_pytest_benchmark_beside_what_one_would_use_instead(tmp_path: Path) -> None:
    chosen = "32x96x128 and float32 and forward and (twostep or eager)"
    file = tmp_path / "found.json"
    quick = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.01", "--benchmark-warmup=off", "-p", "no:xdist")
    run("-m", "pytest", "benchmarks/bench_rope.py", "-k", chosen, *quick, f"--benchmark-json={file}")
    found = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    assert {entry["params"]["candidate"] for entry in found} == {"twostep", "eager"}
    assert len({entry["group"] for entry in found}) == 1 and found[0]["extra_info"]["floor_bytes"] > 0


def test_the_overhead_of_a_call_is_measured_for_every_operator(tmp_path: Path) -> None:
    run("-m", "twostep", "bench", "launch", "--no-compile", "--out", str(tmp_path))
    rows = results(tmp_path / "launch.json")
    assert {row["op"] for row in rows} == set(cases.OPS)
    assert all(row["microseconds"]["twostep"] > 0 and row["microseconds"]["eager"] > 0 for row in rows)


def test_the_full_size_update_holds_what_was_planned(tmp_path: Path) -> None:
    small = ("--small", "--device", "cpu", "--sizes", "128", "--times", "1")
    run("benchmarks/full_size.py", *small, "--only", "lora, recompute", "--out", str(tmp_path))
    rows = results(tmp_path / "full_size.json")
    assert len(rows) == 3 and not any(row["fault"] for row in rows)
    for row in rows:
        assert set(row["seconds"]) == {"generator", "guidance"} and min(row["seconds"].values()) > 0
        for update, peak in row["peak_gib"].items():
            assert peak == pytest.approx(row["planned_gib"][update], rel=0.1)
    kept, recomputed = (row["peak_gib"]["generator"] for row in (rows[1], rows[0]))
    assert kept > recomputed
