"""What goes wrong in a run: each fault is put in for real, and each ends in a message that says what to do."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from twostep.durable import sole
from twostep.train import tensor_file
from twostep.train.checkpoint import Store
from twostep.train.journal import read_events, read_metrics
from twostep.train.methods import DPDMD, FlowMatching
from twostep.train.watch import Watch
from twostep.train.watchdog import HANGS

from . import run_server, tiny_runs
from .run_server import Server

# Faults: each is called in the process of a run, in place of `run_server.train`, with the recipe; `fault` is the
# recipe's own key, taken out before it is read.


def _run_with(recipe: dict[str, Any], wrap: Any) -> int:
    """The run, with FlowMatching.run replaced by wrap(original, number of the call, self, *arguments)."""
    original, calls = FlowMatching.run, iter(range(10**9))

    def run(self: Any, *arguments: Any) -> Any:
        return wrap(original, next(calls), self, *arguments)

    FlowMatching.run = run  # type: ignore[method-assign]
    return run_server.train(recipe)


def not_finite(recipe: dict[str, Any]) -> int:
    """The gradient of one parameter, or the loss, is not finite in the updates that are listed."""
    fault = recipe.pop("fault")
    rank = int(os.environ.get("RANK", "0"))

    def wrap(original: Any, call: int, self: Any, *arguments: Any) -> Any:
        metrics = original(self, *arguments)
        if call in fault["calls"] and rank == fault.get("rank", 0):
            value = float(fault["value"])
            if fault["where"] == "loss":
                return {**metrics, "final_loss": torch.tensor(value)}
            self.parameters()["generator"][3].grad.view(-1)[0] = value
        return metrics

    return _run_with(recipe, wrap)


def out_of_memory(recipe: dict[str, Any]) -> int:
    """A real allocation that no machine grants."""

    def wrap(original: Any, call: int, self: Any, *arguments: Any) -> Any:
        if call == 2:
            torch.empty(1 << 60)
        return original(self, *arguments)

    return _run_with(recipe, wrap)


def hangs(recipe: dict[str, Any]) -> int:
    """One rank no longer moves."""

    def wrap(original: Any, call: int, self: Any, *arguments: Any) -> Any:
        if call == 2 and os.environ.get("RANK", "0") == recipe_rank:
            time.sleep(10**6)
        return original(self, *arguments)

    recipe_rank = str(recipe.pop("fault"))
    return _run_with(recipe, wrap)


def full_disk(recipe: dict[str, Any]) -> int:
    """The disk fills up while a checkpoint is written."""
    original, calls = tensor_file.Digested.write, iter(range(10**9))

    def write(self: Any, data: Any) -> None:
        if next(calls) >= full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, data)

    full = recipe.pop("fault")
    tensor_file.Digested.write = write  # type: ignore[method-assign]
    return run_server.train(recipe)


def ask(place: tiny_runs.Place, out: Path, **changes: Any) -> dict[str, Any]:
    return tiny_runs.recipe(place, "flow_matching", "full", out, **changes)


def events(folder: Path, word: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if word in event["event"]]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_named(
    server: Server, place: tiny_runs.Place, tmp_path: Path, where: str, value: str
) -> None:
    fault = {"calls": [1], "where": where, "value": value}
    recipe = ask(place, tmp_path, fault=fault)
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:not_finite")
    assert statuses == [0], printed
    skipped = events(tmp_path, "skipped")
    assert len(skipped) == 1
    named = skipped[0]["facts"]["faults"]
    assert ("final_loss is" in named) if where == "loss" else ("student: the gradient of networks.0." in named)
    rows = read_metrics(tmp_path)
    assert rows[-1]["skipped_updates"] == 1 and all(math.isfinite(row.get("final_loss", 0.0)) for row in rows)
    assert all(
        torch.isfinite(t).all() for t in Store(tmp_path / "checkpoints").load(signature=None).parts["student"].values()
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_skip_what_one_of_them_cannot_take(
    server: Server, place: tiny_runs.Place, tmp_path: Path, kind: str
) -> None:
    fault = {"calls": [1], "where": "loss", "value": "nan", "rank": 1}
    recipe = ask(place, tmp_path, fault=fault, parallel={"kind": kind})
    statuses, printed = server.run(recipe, ranks=2, call="tests.train.test_trouble:not_finite")
    assert statuses == [0, 0], printed
    assert len(events(tmp_path, "skipped")) == 1


def test_many_in_a_row_go_back_with_a_lower_rate(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    fault = {"calls": [2, 3, 4], "where": "gradient", "value": "nan"}
    recipe = ask(place, tmp_path, fault=fault, iterations=6, trouble={"in_a_row": 3, "lower": 0.5})
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:not_finite")
    assert statuses == [0], printed
    back = events(tmp_path, "went back")
    assert len(back) == 1 and "3 generator updates in a row" in back[0]["facts"]["because"]
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [event["iteration"] for event in back] == [2], "the last checkpoint before the first of them"
    assert rows[-1]["generator_rate"] == pytest.approx(0.5e-3)
    assert rows[0]["generator_rate"] == pytest.approx(1e-3)


def test_a_run_that_does_not_recover_stops_with_a_report(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    fault = {"calls": list(range(2, 100)), "where": "gradient", "value": "nan"}
    recipe = ask(place, tmp_path, fault=fault, iterations=8, trouble={"in_a_row": 2, "returns": 1})
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:not_finite")
    assert statuses == [1]
    assert (
        "2 generator updates in a row were not finite" in printed
        and "1 returns to a checkpoint did not help" in printed
    )
    assert "networks.0." in printed and "lower optimizers" in printed
    latest = Store(tmp_path / "checkpoints").latest()
    assert latest is not None and latest.step == 2


def generator_not_finite(recipe: dict[str, Any]) -> int:
    """The student's updates alone are not finite; those of guidance between them are."""
    original, first = DPDMD.run, recipe.pop("fault")
    calls = iter(range(10**9))

    def run(self: Any, update: str, *arguments: Any) -> Any:
        metrics = original(self, update, *arguments)
        if update == "generator" and next(calls) >= first:
            self.parameters()["generator"][3].grad.view(-1)[0] = math.nan
        return metrics

    DPDMD.run = run  # type: ignore[method-assign]
    return run_server.train(recipe)


@pytest.mark.parametrize("first", [0, 2])
def test_good_updates_of_another_kind_hide_nothing(
    server: Server, place: tiny_runs.Place, tmp_path: Path, first: int
) -> None:
    """Before the student's first step too: what its optimizer remembers since then is forgotten on the way back."""
    changes: dict[str, Any] = {"iterations": 20, "trouble": {"in_a_row": 2, "returns": 1}}
    recipe = tiny_runs.recipe(place, "dp_dmd", "lora", tmp_path, fault=first, **changes)
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:generator_not_finite")
    assert statuses == [1], printed
    assert "2 generator updates in a row were not finite" in printed
    assert ("no checkpoint to go back to" if first == 0 else "1 returns to a checkpoint did not help") in printed


def test_a_checkpoint_that_a_skipped_update_delays_is_made_up_for(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    fault = {"calls": [1], "where": "gradient", "value": "nan"}
    recipe = ask(place, tmp_path, fault=fault, iterations=6, checkpoints={"every": 2, "keep_last": 9})
    assert server.run(recipe, call="tests.train.test_trouble:not_finite")[0] == [0]
    assert [saved.step for saved in Store(tmp_path / "checkpoints").all()] == [3, 4, 6]


def slow(recipe: dict[str, Any]) -> int:
    """Sampling and updates of several batches take longer than the time-out, each for a good reason."""
    original = Watch.sample

    def sample(self: Any, *arguments: Any, **named: Any) -> Any:
        time.sleep(3.0)
        return original(self, *arguments, **named)

    Watch.sample = sample  # type: ignore[method-assign]

    def wrap(run: Any, call: int, self: Any, *arguments: Any) -> Any:
        time.sleep(1.2)
        return run(self, *arguments)

    return _run_with(recipe, wrap)


def test_what_is_slow_does_not_hang(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"iterations": 2, "accumulate": 2, "parallel": {"timeout": 2.0}}
    watch = {"every": 1, "samples_every": 1, "samples": 2, "tensorboard": False}
    recipe = ask(place, tmp_path, watch=watch, **changes)
    statuses, printed = server.run(recipe, ranks=2, call="tests.train.test_trouble:slow", limit=200)
    assert statuses == [0, 0], printed


def samples_out_of_memory(recipe: dict[str, Any]) -> int:
    def sample(self: Any, *arguments: Any, **named: Any) -> Any:
        return torch.empty(1 << 60)

    Watch.sample = sample  # type: ignore[method-assign]
    return run_server.train(recipe)


def test_a_sheet_that_does_not_fit_into_memory_ends_no_run(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    watch = {"every": 1, "samples_every": 1, "samples": 2, "tensorboard": False}
    recipe = ask(place, tmp_path, watch=watch, iterations=2)
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:samples_out_of_memory")
    assert statuses == [0], printed
    missed = events(tmp_path, "no samples: out of memory in sampling")
    assert [event["iteration"] for event in missed] == [0, 1, 2]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    fault = {"calls": list(range(100)), "where": "loss", "value": "inf"}
    recipe = ask(place, tmp_path, fault=fault, trouble={"in_a_row": 2}, checkpoints={"every": 50})
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:not_finite")
    assert statuses == [1] and "no checkpoint to go back to" in printed


def test_out_of_memory_says_what_to_change(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    statuses, printed = server.run(ask(place, tmp_path), call="tests.train.test_trouble:out_of_memory")
    assert statuses == [1]
    assert "out of memory in a generator update" in printed
    assert all(word in printed for word in ("checkpointing", "accumulate", "lora", "fsdp", "twostep plan"))
    latest = Store(tmp_path / "checkpoints").latest()
    assert latest is not None and latest.step == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(server: Server, place: tiny_runs.Place, tmp_path: Path, rank: int) -> None:
    recipe = ask(place, tmp_path, fault=rank, parallel={"timeout": 3.0})
    statuses, printed = server.run(recipe, ranks=2, call="tests.train.test_trouble:hangs", limit=100)
    assert HANGS in statuses, printed
    assert f"rank {rank} hangs (a generator update of iteration 3), and the others wait for it" in printed
    assert re.search(rf"rank {rank} is at \S*test_trouble.py:\d+ in wrap", printed), printed


def hangs_inside(recipe: dict[str, Any]) -> int:
    """One rank no longer moves, in the middle of a network, where with shards the others wait for it."""

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        trained = threading.current_thread() is threading.main_thread()  # and is no encoder of the loader's
        if trained and next(calls) == 40 and os.environ["RANK"] == recipe_rank:
            time.sleep(10**6)
        return original(self, *arguments, **options)

    recipe_rank, calls = str(recipe.pop("fault")), iter(range(10**9))
    original = torch.nn.Linear.forward
    torch.nn.Linear.forward = forward  # type: ignore[method-assign]
    return run_server.train(recipe)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_in_a_network_in_shards_is_named(
    server: Server, place: tiny_runs.Place, tmp_path: Path, rank: int
) -> None:
    recipe = ask(place, tmp_path, fault=rank, parallel={"kind": "fsdp", "timeout": 3.0})
    statuses, printed = server.run(recipe, ranks=2, call="tests.train.test_trouble:hangs_inside", limit=100)
    assert HANGS in statuses, printed
    assert f"rank {rank} hangs, and the others wait for it" in printed, printed
    assert re.search(rf"rank {rank} is at \S*test_trouble.py:\d+ in forward", printed), printed


def is_stopped(recipe: dict[str, Any]) -> int:
    """One rank's process is suspended, as a debugger, a job scheduler or a lost machine would have it."""

    def wrap(original: Any, call: int, self: Any, *arguments: Any) -> Any:
        if call == 2 and os.environ["RANK"] == recipe_rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *arguments)

    recipe_rank = str(recipe.pop("fault"))
    return _run_with(recipe, wrap)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_that_was_stopped_is_named(server: Server, place: tiny_runs.Place, tmp_path: Path, kind: str) -> None:
    """Under FSDP the others wait inside the networks, and have counted no further than it."""
    recipe = ask(place, tmp_path, fault=1, parallel={"kind": kind, "timeout": 3.0})
    statuses, printed = server.run(recipe, ranks=2, call="tests.train.test_trouble:is_stopped", limit=40)
    assert statuses[0] == HANGS, printed
    named = ("rank 1 gives no sign of life", "rank 1 hangs")
    assert any(f"{word}" in printed for word in named), printed


def test_an_evaluation_that_cannot_be_is_refused_before_anything_is_trained(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a cat\na dog on a beach\n")
    watch = {
        "every": 1,
        "samples_every": None,
        "tensorboard": False,
        "evaluate": {"every": 1, "prompts": 2, "seeds": 2},
    }
    data = {"kind": "prompts", "prompts": str(tmp_path / "prompts.txt"), "contexts": None, "teacher": None}
    recipe = tiny_runs.recipe(place, "dp_dmd", "full", tmp_path / "run", watch=watch, data=data)
    statuses, printed = server.run(recipe)
    assert statuses == [2] and not (tmp_path / "run" / "metrics.jsonl").exists(), printed
    said = "watch.evaluate.features is null, which is the miniature's detector, and 'a photo of a cat' is no caption"
    assert said in printed
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:dry")
    assert statuses == [2] and said in printed, printed


def dry(recipe: dict[str, Any]) -> int:
    return run_server.train(recipe, "--dry-run")


def evaluation_fails(recipe: dict[str, Any]) -> int:
    def _evaluate(self: Any, *_: Any) -> Any:
        raise ValueError("a covariance takes at least 2 images")

    Watch._evaluate = _evaluate  # type: ignore[method-assign]
    return run_server.train(recipe)


def test_an_evaluation_that_fails_ends_no_run(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    watch = {"every": 1, "samples_every": None, "tensorboard": False, "evaluate": {"every": 1, "prompts": 2}}
    recipe = ask(place, tmp_path, watch=watch, iterations=2)
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:evaluation_fails")
    assert statuses == [0], printed
    assert len(events(tmp_path, "no samples: a covariance takes at least 2 images")) == 2


def test_a_single_process_that_hangs_ends_too(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    recipe = ask(place, tmp_path, fault=0, parallel={"timeout": 2.0})
    statuses, printed = server.run(recipe, call="tests.train.test_trouble:hangs", limit=100)
    assert statuses == [HANGS] and "has not moved for" in printed


def test_data_that_cannot_be_read_end_the_run_and_lose_nothing(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    """An image is damaged behind its header, so that it shows only when it is read; then it is mended."""
    from . import tiny_pipelines

    images = tiny_pipelines.images(tmp_path)
    whole = {path: path.read_bytes() for path in sorted(images.glob("*.png"))}
    for path, content in list(whole.items())[3:]:
        path.write_bytes(content[:-40])
    changes: dict[str, Any] = {
        "data": {"kind": "images", "folder": str(images)},
        "iterations": 6,
        "checkpoints": {"every": 100},
    }
    statuses, printed = server.run(ask(place, tmp_path / "run", **changes))
    assert statuses == [1], printed
    assert "the data could not be read" in printed and "is damaged" in printed and ".png" in printed
    assert Store(tmp_path / "run" / "checkpoints").latest() is not None
    for path, content in whole.items():
        path.write_bytes(content)
    assert server.run(ask(place, tmp_path / "run", **changes))[0] == [0]
    assert server.run(ask(place, tmp_path / "true", **changes))[0] == [0]
    from .test_resume import check_same

    check_same(tmp_path / "run", tmp_path / "true")


def test_a_full_disk_leaves_the_checkpoints_before(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    first = ask(place, tmp_path, iterations=1)
    assert server.run(first)[0] == [0]
    statuses, printed = server.run(
        ask(place, tmp_path, iterations=3, fault=20), call="tests.train.test_trouble:full_disk"
    )
    assert statuses == [1] and "the disk is full" in printed, printed
    store = Store(tmp_path / "checkpoints")
    assert [saved.step for saved in store.all()] == [1]
    store.verify(store.all()[0])
    assert server.run(ask(place, tmp_path, iterations=3))[0] == [0]


def test_a_run_is_not_begun_over_another(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    assert server.run(ask(place, tmp_path, iterations=1))[0] == [0]
    statuses, printed = server.run(ask(place, tmp_path, iterations=1), call="tests.train.test_trouble:fresh")
    assert statuses == [2] and "holds a run already" in printed


def test_two_runs_do_not_share_a_folder(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    with sole(tmp_path / "run", "training"):
        statuses, printed = server.run(ask(place, tmp_path / "run"))
    assert statuses == [2] and "another process is training here" in printed
    assert server.run(ask(place, tmp_path / "run", iterations=1))[0] == [0]


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_an_impossible_folder_is_named(server: Server, place: tiny_runs.Place, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" if where == "a file" else tmp_path / "file" / "run"
    statuses, printed = server.run(ask(place, out))
    assert statuses == [1] and f"{tmp_path / 'file'}" in printed and "Traceback" not in printed


def fresh(recipe: dict[str, Any]) -> int:
    return run_server.train(recipe, "--fresh")
