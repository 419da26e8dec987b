"""A run that is killed at any moment, and started again, ends in the bits of one that nobody touched."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.train.checkpoint import Store
from twostep.train.engine import Run
from twostep.train.journal import read_events, read_metrics
from twostep.train.result import gone_on
from twostep.train.update import Updater

from . import run_server, tiny_runs
from .run_server import KILLED, Server

CASES = [(method, weights) for method in tiny_runs.METHODS for weights in tiny_runs.WEIGHTS]


def contents(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint, of all ranks, and of the student."""
    latest = Store(folder / "checkpoints").latest()
    assert latest is not None
    found = {}
    for root in (latest.path, folder / "student"):
        for file in sorted(root.rglob("*.safetensors")):
            name = str(file.relative_to(root.parent))
            found |= {f"{name}:{key}": value for key, value in load_file(file).items()}
    return found


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The journal without the clock."""
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "time", "_gib"))} for row in rows]


def check_same(found: Path, true: Path) -> None:
    mine, theirs = contents(found), contents(true)
    assert mine.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    assert not different, different[:5]
    assert numbers(found) == numbers(true)


@pytest.mark.parametrize(("method", "weights"), CASES)
def test_killed_at_random_and_started_again(
    server: Server, place: tiny_runs.Place, tmp_path: Path, method: str, weights: str
) -> None:
    true, found = tmp_path / "true", tmp_path / "found"
    statuses, printed = server.run(tiny_runs.recipe(place, method, weights, true))
    assert statuses == [0], printed
    seconds = max(event["seconds"] for event in read_events(true))
    chance, kills = random.Random(f"{method} {weights}"), 0
    for _ in range(40):
        # From before the first checkpoint to after the last; the start, which no run can be killed out of, on top.
        limit = None if kills == 4 else 0.3 + chance.uniform(0, 1.2) * seconds
        statuses, printed = server.run(tiny_runs.recipe(place, method, weights, found), kill_after=limit)
        if statuses == [0] and not kills:  # a machine that was busy during the first run, and is not now
            shutil.rmtree(found)
            seconds /= 2
            continue
        if statuses == [0]:
            break
        assert statuses == [KILLED], printed
        kills += 1
    assert statuses == [0] and kills
    check_same(found, true)


def test_prompts_to_keep_go_on_where_they_stood(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    """Stopped at an iteration in the middle of an epoch of images, and of one of prompts."""
    data = {"kind": "images", "folder": str(place.images), "keep": {"prompts": str(place.prompts), "share": 0.6}}
    true, found = tmp_path / "true", tmp_path / "found"
    whole = tiny_runs.recipe(place, "d_opsd", "lora", true, data=data, batch=5, iterations=5)
    assert server.run(whole)[0] == [0]
    part = {**whole, "out": str(found), "fault": ["run", 2]}
    statuses, printed = server.run(part, call="tests.train.test_resume:stopped_at")
    assert statuses == [0] and "stopped by SIGTERM" in printed, printed
    del part["fault"]
    assert server.run(part)[0] == [0]
    check_same(found, true)
    statuses, printed = server.run({**part, "data": {**data, "keep": None}})
    assert statuses == [2] and "data.keep: " in printed, printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_run_which_goes_on(
    server: Server, place: tiny_runs.Place, tmp_path: Path, number: signal.Signals
) -> None:
    """In the middle of an iteration too: there are checkpoints between its updates."""
    true, found = tmp_path / "true", tmp_path / "found"
    long: dict[str, Any] = {"iterations": 10, "checkpoints": {"every": 1000}}
    ask = tiny_runs.recipe(place, "turbo_pp", "lora", found, **long)
    statuses, printed = server.run(ask, send=(int(number), str(found / "metrics.jsonl")))
    assert statuses == [0 if number == signal.SIGTERM else 130], printed
    stopped = Store(found / "checkpoints").latest()
    assert stopped is not None and stopped.step < 10, "it was over before the signal came"
    assert "the same command goes on" in printed
    assert server.run(ask)[0] == [0]
    assert server.run(tiny_runs.recipe(place, "turbo_pp", "lora", true, **long))[0] == [0]
    check_same(found, true)


def stopped_at(recipe: dict[str, Any]) -> int:
    """SIGTERM at one exact place: while a method of the engine runs, in an iteration."""
    place, iteration = recipe.pop("fault")
    owner = Updater if place == "run" else Run
    original, calls = getattr(owner, place), iter(range(1, 10**9))

    def wrapped(self: Any, *arguments: Any) -> Any:
        if next(calls) == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    setattr(owner, place, wrapped)
    return run_server.train(recipe)


@pytest.mark.parametrize("where", ["run", "_look", "_save"])
def test_a_signal_counts_wherever_it_comes(server: Server, place: tiny_runs.Place, tmp_path: Path, where: str) -> None:
    """In the only update of an iteration, while its results are looked at, while a checkpoint is written."""
    recipe = tiny_runs.recipe(place, "flow_matching", "lora", tmp_path, iterations=6, fault=[where, 2])
    statuses, printed = server.run(recipe, call="tests.train.test_resume:stopped_at")
    assert statuses == [0] and "stopped by SIGTERM" in printed, printed
    latest = Store(tmp_path / "checkpoints").latest()
    assert latest is not None and latest.step in (2, 3)


def fresh(recipe: dict[str, Any]) -> int:
    return run_server.train(recipe, "--fresh")


def raising(recipe: dict[str, Any]) -> int:
    """A first update that fails before anything is saved."""

    def wrapped(self: Any, *arguments: Any) -> Any:
        raise ValueError("a fault in the first update")

    Updater.run = wrapped  # type: ignore[method-assign]
    return run_server.train(recipe)


def test_the_first_sheet_stays_where_a_run_stops_inside_its_first_iteration(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    recipe = tiny_runs.recipe(place, "turbo_pp", "lora", tmp_path, iterations=1)
    recipe["watch"] |= {"samples_every": 1, "samples": 2}
    first = tmp_path / "samples" / "samples-00000000.png"
    statuses, printed = server.run({**recipe, "fault": ["run", 1]}, call="tests.train.test_resume:stopped_at")
    assert statuses == [0] and Store(tmp_path / "checkpoints").latest().step == 0, printed  # type: ignore[union-attr]
    drawn = first.read_bytes()
    assert server.run(recipe)[0] == [0]
    assert first.read_bytes() == drawn and len(list(first.parent.iterdir())) == 2
    assert [row["iteration"] for row in read_metrics(tmp_path)].count(0) == 1


def test_a_run_that_failed_before_it_learnt_anything_begins_anew(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    recipe = tiny_runs.recipe(place, "flow_matching", "lora", tmp_path, iterations=1)
    recipe["watch"] |= {"samples_every": 1, "samples": 2}
    for _ in range(2):
        assert server.run(recipe, call="tests.train.test_resume:raising")[0] == [2]
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [0]
    statuses, printed = server.run(recipe, call="tests.train.test_resume:fresh")
    assert statuses == [0], printed
    assert {row["iteration"] for row in read_metrics(tmp_path)} == {0, 1}


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    recipe = tiny_runs.recipe(place, "flow_matching", "lora", tmp_path, iterations=2, checkpoints={"keep_last": 1})
    assert server.run(recipe)[0] == [0]
    rows = numbers(tmp_path)
    (tmp_path / "checkpoints" / "step-00000002" / "student.safetensors").unlink()
    statuses, printed = server.run(recipe)
    assert statuses == [2] and "student.safetensors is missing" in printed
    shutil.rmtree(tmp_path / "checkpoints")
    statuses, printed = server.run(recipe)
    assert statuses == [2] and "its checkpoints are gone" in printed
    assert numbers(tmp_path) == rows


def test_other_weights_under_the_same_path_do_not_go_on(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    """And the same weights under another path do."""
    shutil.copytree(place.model, tmp_path / "model")
    recipe = tiny_runs.recipe(place, "d_opsd", "lora", tmp_path / "run", iterations=1)
    assert server.run({**recipe, "model": str(tmp_path / "model")})[0] == [0]
    assert server.run({**recipe, "iterations": 2})[0] == [0]
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * value for name, value in load_file(file).items()}, file, {"format": "pt"})
    statuses, printed = server.run({**recipe, "model": str(tmp_path / "model"), "iterations": 3})
    assert statuses == [2] and "sources.student" in printed


def test_a_finished_run_is_finished(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    ask = tiny_runs.recipe(place, "flow_matching", "full", tmp_path / "run", iterations=2)
    assert server.run(ask)[0] == [0]
    before = contents(tmp_path / "run")
    assert server.run(ask)[0] == [0]
    after = contents(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_more_iterations_go_on(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    short = tiny_runs.recipe(place, "dp_dmd", "full", tmp_path / "found", iterations=2)
    assert server.run(short)[0] == [0]
    assert server.run({**short, "iterations": 4})[0] == [0]
    assert server.run(tiny_runs.recipe(place, "dp_dmd", "full", tmp_path / "true"))[0] == [0]
    check_same(tmp_path / "found", tmp_path / "true")


def test_another_method_does_not_go_on(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    assert server.run(tiny_runs.recipe(place, "dp_dmd", "full", tmp_path, iterations=1))[0] == [0]
    other = tiny_runs.recipe(place, "dp_dmd", "full", tmp_path, seed=1)
    statuses, printed = server.run(other)
    assert statuses == [2] and "seed: 0 in the checkpoint, 1 now" in printed


def test_a_student_whose_run_has_gone_on_is_said_to_be_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "student.json").write_text('{"iteration": 60}')
    assert gone_on(tmp_path) is None, "an export, with no journal beside it"
    events = ['{"event": "saved", "iteration": 60}', '{"event": "finished", "iteration": 60}']
    for later, expected in (("", None), ('{"event": "saved", "iteration": 72}', "has gone on to iteration 72")):
        (tmp_path / "events.jsonl").write_text("".join(f"{line}\n" for line in [*events, later] if line))
        found = gone_on(tmp_path / "student")
        assert found == expected or (found is not None and expected in found and "still that of 60" in found)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    server: Server, place: tiny_runs.Place, tmp_path: Path
) -> None:
    ask = tiny_runs.recipe(place, "dp_dmd", "full", tmp_path / "run", iterations=3)
    assert server.run(ask)[0] == [0]
    store = Store(tmp_path / "run" / "checkpoints")
    last = store.latest()
    assert last is not None
    file = last.path / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    statuses, printed = server.run({**ask, "iterations": 4})
    assert statuses == [2] and "damaged" in printed and "the last good checkpoint is" in printed
    good = store.all()[-2]
    # What the message offers is what --checkpoint takes; what is damaged, in whatever way, is out of the way then.
    (last.path / "manifest.json").write_text("{")
    long = {**ask, "iterations": 5, "checkpoints": {"every": 1000, "keep_last": 2}}
    statuses, printed = server.run(long, call="tests.train.test_resume:killed_after_its_first_save")
    assert statuses == [KILLED], printed
    assert len(list((tmp_path / "run" / "checkpoints").glob(f"damaged-{last.path.name}-*"))) == 1
    assert server.run(long)[0] == [0]
    events = read_events(tmp_path / "run")
    resumed = [event for event in events if event["event"] == "resumed"]
    assert [event["facts"]["checkpoint"] for event in resumed] == [good.path.name] * 2
    assert sum(event["event"] == "damaged, and set aside" for event in events) == 1


def killed_after_its_first_save(recipe: dict[str, Any]) -> int:
    """--checkpoint 2, and SIGKILL in the iteration after it."""

    def run(self: Any, *_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    Updater.run = run  # type: ignore[method-assign]
    return run_server.train(recipe, "--checkpoint", "2")


def test_steps_that_were_never_drawn_come_back(server: Server, place: tiny_runs.Place, tmp_path: Path) -> None:
    """decoupled_dmd draws the step that it trains: with parameters for each, some have no optimizer state yet."""
    student = {"student": {"steps": 4, "per_step": True}}
    whole = tiny_runs.recipe(place, "decoupled_dmd", "full", tmp_path / "true", roles=student)
    assert server.run(whole)[0] == [0]
    for iterations in (1, 4):
        part = {**whole, "out": str(tmp_path / "found"), "iterations": iterations}
        statuses, printed = server.run(part)
        assert statuses == [0], printed
    check_same(tmp_path / "found", tmp_path / "true")
