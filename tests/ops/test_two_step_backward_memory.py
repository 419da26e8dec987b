"""Activations of one step at a time: peaks of what is held, counted tensor by tensor, and on a GPU by the allocator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from twostep import cli
from twostep.bench import unroll
from twostep.bench.unroll import SavedBytes, Setting, Workload
from twostep.memory import LiveBytes

KIB = 1024


def _workload(checkpointed: bool, device: str = "cpu", length: int = 64, depth: int = 6) -> Workload:
    return Workload(Setting(2, length, 256, depth, checkpointed, torch.float32, device))


def test_saved_bytes_counts_each_storage_once_until_its_graph_is_gone() -> None:
    weight = torch.ones(256, requires_grad=True)
    meter = SavedBytes([weight])
    with meter.measured():
        a = (torch.ones(256) * weight).exp()  # saves the ones, 1 KiB, and its own result, 1 KiB; the weight is left out
        b = (a * a).sum()  # saves that result again
        assert meter.now == meter.peak == 2 * KIB
        b.backward()
        del a, b
        assert (meter.now, meter.peak) == (0, 2 * KIB)
        assert (torch.ones(256) * weight).exp().requires_grad  # a graph that was dropped has gone as well
        assert (meter.now, meter.peak) == (0, 2 * KIB)


def test_live_bytes_counts_every_tensor_while_it_lives() -> None:
    before = torch.ones(256)
    with LiveBytes() as meter:
        a = before + 1
        view, before[0] = a.view(2, 128), 5.0  # neither allocates
        assert meter.live == KIB
        b = view * 2
        assert meter.live == 2 * KIB
        del b
        b = a.double()
        assert (meter.live, meter.peak) == (3 * KIB, 3 * KIB)
        del a, b, view
    assert (meter.live, meter.peak) == (0, 3 * KIB)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recompute_holds_the_activations_of_one_step(checkpointed: bool) -> None:
    """Of checkpointed blocks those are their inputs."""
    work = _workload(checkpointed)
    peaks = {candidate: unroll.peak_saved_bytes(work, candidate) for candidate in unroll.CANDIDATES}
    activation = 2 * 64 * 256 * 4
    assert peaks["single"] > 6 * activation * (1 if checkpointed else 10)  # six blocks
    assert peaks["recompute"] <= 1.10 * peaks["single"]
    assert all(1.9 <= peaks[mode] / peaks["single"] <= 2.1 for mode in ("retain", "plain"))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recompute_needs_the_memory_of_one_step(checkpointed: bool) -> None:
    """All tensors, the temporary ones too."""
    work = _workload(checkpointed)
    peaks = {candidate: unroll.peak_live_bytes(work, candidate) for candidate in unroll.CANDIDATES}
    assert peaks["recompute"] <= 1.10 * peaks["single"]
    assert peaks["plain"] >= peaks["retain"] > (1.15 if checkpointed else 1.8) * peaks["single"]


@pytest.mark.parametrize("options", [{"first_pass": "grad"}, {"verify": True}, {"clip": 1e-3, "inherit": 0.1}])
def test_options_keep_it_at_one_step(options: dict[str, Any]) -> None:
    work = _workload(checkpointed=False)
    meter = SavedBytes([*work.parameters(), work.noise])
    with meter.measured():
        unroll.two_step_backward(
            work.first, work.second, work.noise, (1, 0.75, 0), torch.mean, lambda x: x.square().mean(), **options
        )
    assert meter.peak <= 1.10 * unroll.peak_saved_bytes(work, "single")


def test_every_layer_of_depth_costs_recompute_what_it_costs_one_step() -> None:
    """So that the ratio tends to 1 however large the model is; plain's slope over depth is double."""
    shallow, deep = _workload(checkpointed=False, depth=2), _workload(checkpointed=False, depth=6)
    slope = {c: unroll.peak_saved_bytes(deep, c) - unroll.peak_saved_bytes(shallow, c) for c in unroll.CANDIDATES}
    assert slope["recompute"] == slope["single"] and slope["plain"] == slope["retain"] == 2 * slope["single"]


def test_gradients_of_shared_parameters_wait_once() -> None:
    """Where `.grad` holds something already they cannot go there yet; they wait without a copy, as within one graph."""
    net = torch.nn.Linear(1024, 1024)
    noise, size = torch.randn(2, 1024), net.weight.numel() * 4
    net.weight.grad = torch.zeros_like(net.weight)
    peaks = {}
    for mode in ("plain", "retain", "recompute"):
        with LiveBytes() as meter:
            unroll.two_step_backward(
                net, net, noise, (1, 0.75, 0), lambda x: x.mean(), lambda x: x.square().mean(), mode=mode
            )
        peaks[mode] = meter.peak / size
    assert peaks["retain"] == pytest.approx(peaks["plain"], abs=0.1)
    assert peaks["recompute"] == pytest.approx(peaks["plain"], abs=0.1)


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_gradients_that_waited_become_grad_without_a_copy(mode: str) -> None:
    first, second = torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024)
    noise, size = torch.randn(2, 1024), first.weight.numel() * 4
    with LiveBytes() as meter:
        unroll.two_step_backward(
            first, second, noise, (1, 0.75, 0), lambda x: x.mean(), lambda x: x.mean(), mode=mode, sync="last"
        )
    assert meter.live / size == pytest.approx(2, abs=0.1)  # what stays is the two .grad
    assert meter.peak / size == pytest.approx(2, abs=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [False, True])
def test_recompute_needs_the_memory_of_one_step_on_a_gpu(checkpointed: bool) -> None:
    work = _workload(checkpointed, "cuda", length=2048, depth=12)
    for candidate in unroll.CANDIDATES:
        work.call(candidate)
    peaks = {candidate: unroll.peak_live_bytes(work, candidate) for candidate in unroll.CANDIDATES}
    assert peaks["recompute"] <= 1.10 * peaks["single"]
    assert peaks["plain"] >= (1.15 if checkpointed else 1.8) * peaks["single"]


def test_the_benchmark_prints_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    command = [
        "bench",
        "--out",
        str(tmp_path),
        "unroll",
        "--depths",
        "1",
        "2",
        "--shape",
        "1x8x32",
        "--repetitions",
        "1",
    ]
    assert cli.main([*command, "--device", "cpu", "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2 * 2 * len(unroll.CANDIDATES)
    assert (tmp_path / "unroll.md").read_text().count("\n| ") == len(rows)
    content = json.loads((tmp_path / "unroll.json").read_text())
    forwards = {(row["mode"], row["first_forwards"]) for row in content["rows"]}
    assert forwards == {("single", 1), ("plain", 1), ("retain", 1), ("recompute", 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depths", "0"], "--depths has 0"),
        (["--repetitions", "0"], "--repetitions is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--shape", "8x8"], "expected BATCHxLENGTHxWIDTH"),
        (["--shape", "1x8x200"], "multiple of 64"),
    ],
)
def test_the_benchmark_names_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "unroll", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_of_the_kernels_is_still_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--device",
        "cpu",
        "--ops",
        "rope",
        "--shapes",
        "1x4x64",
        "--dtypes",
        "float32",
        "--directions",
        "forward",
    ]
    assert cli.main(["bench", *options, "--seconds", "0.01", "--no-compile", "--system-allocator"]) == 0
    assert "| rope | 1x4x64" in capsys.readouterr().out
