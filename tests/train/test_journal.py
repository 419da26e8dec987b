"""The journal of a run: for strict parsers, whole after a kill, and after going back that of an uninterrupted run."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from twostep.train.journal import ANEW, Journal, NullJournal, read_events, read_metrics
from twostep.train.journal.display import EVERY, Display, main_values
from twostep.train.journal.line_file import LineFile, read_lines
from twostep.train.journal.sinks import Wandb
from twostep.train.recipe import WandbSettings

TIMES = ("seconds", "time")


def plain(folder: Path, **others: Any) -> Journal:
    return Journal(folder, **{"total": 100, "tensorboard": False, "progress": False, **others})


def values(iteration: int) -> dict[str, float]:
    return {"loss": 1 / iteration, "logit_gap": math.inf if iteration % 7 == 0 else -0.1 * iteration}


def picture(iteration: int) -> torch.Tensor:
    return torch.full((3, 4, 5), iteration, dtype=torch.uint8)


def train(journal: Journal, first: int, last: int) -> None:
    for iteration in range(first, last + 1):
        journal.numbers(iteration, values(iteration))
        if iteration % 5 == 0:
            journal.picture(iteration, "fixed", picture(iteration))


def content(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What does not depend on when it was written."""
    lines = [{name: line[name] for name in line if name not in TIMES} for line in read_metrics(folder)]
    return lines, {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Path:
    journal = plain(tmp_path / "uninterrupted")
    train(journal, 1, 30)
    journal.close()
    return tmp_path / "uninterrupted"


# What a line says


def test_reads_what_was_written(tmp_path: Path) -> None:
    before = time.time()
    journal = plain(tmp_path)
    journal.numbers(3, {"loss": 0.1, "count": 2, "tensor": torch.tensor(0.5)})
    journal.numbers(4, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    third, fourth = read_metrics(tmp_path)  # while the journal is open
    assert (third["iteration"], third["loss"], third["count"], third["tensor"]) == (3, 0.1, 2.0, 0.5)
    assert before - 1 <= third["time"] <= time.time() + 1 and 0 <= third["seconds"] <= fourth["seconds"]
    assert math.isnan(fourth["nan"]) and (fourth["up"], fourth["down"]) == (math.inf, -math.inf)
    journal.close()
    journal.close()


def test_strict_parsers_read_every_line(tmp_path: Path) -> None:
    journal = plain(tmp_path)
    journal.numbers(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    journal.event(1, "skipped", loss=math.nan, norms=[1.0, -math.inf], path=tmp_path, seen=np.float32(0.5))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    metrics, event = (
        json.loads((tmp_path / name).read_text(), parse_constant=refuse) for name in ("metrics.jsonl", "events.jsonl")
    )
    assert [metrics[name] for name in ("nan", "up", "down")] == ["NaN", "Infinity", "-Infinity"]
    facts = {"loss": "NaN", "norms": [1.0, "-Infinity"], "path": str(tmp_path), "seen": 0.5}
    assert event["event"] == "skipped" and event["facts"] == facts


def test_a_metric_may_not_take_the_lines_own_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a metric is called 'time'"):
        plain(tmp_path).numbers(1, {"time": 1.0})
    assert read_metrics(tmp_path) == []


# Going back


def test_a_resumed_journal_is_that_of_an_uninterrupted_run(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "resumed"
    journal = plain(folder)
    train(journal, 1, 17)  # the checkpoint is of iteration 12
    journal.close()
    journal = plain(folder, resumed_at=12)
    train(journal, 13, 30)
    assert content(folder) == content(uninterrupted)


def test_a_rolled_back_journal_is_that_of_an_uninterrupted_run(tmp_path: Path, uninterrupted: Path) -> None:
    journal = plain(tmp_path / "rolled back")
    train(journal, 1, 22)
    journal.rewind(9)
    train(journal, 10, 30)
    assert content(tmp_path / "rolled back") == content(uninterrupted)


def test_seconds_go_on_after_a_pause(tmp_path: Path) -> None:
    journal = plain(tmp_path)
    journal.numbers(1, {})
    journal.close()
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**line, "seconds": 1000.0}) + "\n")
    plain(tmp_path, resumed_at=1).numbers(2, {})
    assert 1000.0 <= read_metrics(tmp_path)[1]["seconds"] < 1000.0 + (time.time() - line["time"] + 1)


def test_events_are_history(tmp_path: Path) -> None:
    journal = plain(tmp_path)
    for iteration in (10, 20):
        journal.numbers(iteration, {})
        journal.event(iteration, "saved")
    journal.rewind(10)
    journal.event(20, "saved")
    kept = [(line["iteration"], line["event"], "undone" in line) for line in read_events(tmp_path)]
    dropped = (10, "dropped from the journal what lay behind", False)
    assert kept == [(10, "saved", False), (20, "saved", True), dropped, (20, "saved", False)]
    assert read_events(tmp_path)[2]["facts"] == {"lines": 1}


def test_a_new_run_leaves_another_runs_numbers_alone(tmp_path: Path) -> None:
    journal = plain(tmp_path)
    train(journal, 1, 3)
    journal.close()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="holds one already, up to iteration 3"):
        plain(tmp_path)
    assert content(tmp_path) == before
    plain(tmp_path, resumed_at=0).close()
    assert read_metrics(tmp_path) == []


def test_what_stands_at_iteration_0_stays_unless_the_run_begins_anew(tmp_path: Path) -> None:
    """The sheet of the student as it begins: a run that was stopped inside its first iteration draws no other."""
    journal = plain(tmp_path)
    journal.numbers(0, {"loss": 1.0})
    journal.picture(0, "samples", picture(5))
    journal.close()
    plain(tmp_path, resumed_at=0).close()
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["samples-00000000.png"]
    plain(tmp_path, resumed_at=ANEW).close()
    assert read_metrics(tmp_path) == [] and not list((tmp_path / "samples").iterdir())


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": \n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is b'\{\"iteration\": "):
        plain(tmp_path, resumed_at=1)


# Death


def test_a_torn_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    whole = b'{"iteration": 1, "loss": 0.5}\n'
    line = b'{"iteration": 2, "loss": 0.25}\n'
    path = tmp_path / "metrics.jsonl"
    for length in range(len(line)):
        for before in (whole, b""):
            path.write_bytes(before + line[:length])
            assert read_lines(path) == ([{"iteration": 1, "loss": 0.5}] if before else [])
            file = LineFile(path)
            file.append({"iteration": 3})
            file.close()
            assert path.read_bytes() == before + b'{"iteration": 3}\n'


def test_a_torn_line_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 1}\n{"x": "' + b"x" * 200_000)
    LineFile(tmp_path / "metrics.jsonl").close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"iteration": 1}\n'


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_going_back_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class Died(Exception):
        pass

    def die(*arguments: Any) -> None:
        raise Died

    journal = plain(tmp_path)
    train(journal, 1, 20)
    before = content(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, step, die)
        with pytest.raises(Died):
            journal.rewind(10)
    assert content(tmp_path) == before
    plain(tmp_path, resumed_at=20)
    assert content(tmp_path) == before and not list(tmp_path.glob(".tmp-*"))


# Each line forks a process that writes, and goes back to the iteration that it says, again and again until killed.
LIVES = """
import os, sys
from pathlib import Path
from JOURNAL_TESTS import plain, train

folder = Path(sys.argv[1])
for command in sys.stdin:
    child = os.fork()
    if child == 0:
        kept = int(command)
        journal = plain(folder, resumed_at=kept)
        while True:
            train(journal, kept + 1, 3000)
            journal.rewind(kept)
    print(child, flush=True)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    code = LIVES.replace("JOURNAL_TESTS", Path(__file__).stem)
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_killed_run_resumes_with_the_journal_of_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Path, lives: subprocess.Popen[str]
) -> None:
    assert lives.stdin is not None and lives.stdout is not None
    folder, moments = tmp_path / "killed", random.Random(0)
    kills = met = 0
    # On a slow disk a life may end before it has come anywhere: more lives then, until the kills met something.
    while kills < 12 or met < 3:
        kept = min(12, len(read_metrics(folder)))
        lives.stdin.write(f"{kept}\n")
        lives.stdin.flush()
        child = int(lives.stdout.readline())
        # Not to wait for anything: a moment that nothing in the child determines.
        time.sleep(moments.uniform(0.005, 0.2))
        os.kill(child, signal.SIGKILL)
        assert int(lives.stdout.readline()) == signal.SIGKILL
        kills += 1
        assert kills < 240, "the lives make no progress"
        left = read_metrics(folder)
        assert [line["iteration"] for line in left] == list(range(1, len(left) + 1))
        assert len(left) >= kept  # what had been kept is never lost
        met += len(left) > 30
    journal = plain(folder, resumed_at=12)
    train(journal, 13, 30)
    assert content(folder) == content(uninterrupted)


# Pictures


def test_pictures_are_what_was_given(tmp_path: Path) -> None:
    journal = plain(tmp_path)
    given = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    journal.picture(7, "as-tensor", given)
    journal.picture(7, "as_image", Image.fromarray(given.permute(1, 2, 0).contiguous().numpy()))
    for name in ("as-tensor", "as_image"):
        with Image.open(tmp_path / "samples" / f"{name}-00000007.png") as image:
            assert np.array_equal(np.asarray(image), given.permute(1, 2, 0).numpy())
    assert len(list((tmp_path / "samples").iterdir())) == 2


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(3, 4, 5), r"torch.float32 \[3, 4, 5\]"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"torch.uint8 \[4, 5, 3\]"),
        (np.zeros((4, 5, 3), dtype=np.uint8), "ndarray"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, image: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"a picture is {said}, expected"):
        plain(tmp_path).picture(1, "x", image)


@pytest.mark.parametrize("name", ["../x", "a b", "", ".hidden"])
def test_a_picture_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a picture is called"):
        plain(tmp_path).picture(1, name, picture(1))


def test_a_picture_that_a_killed_process_was_writing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = plain(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *arguments: None)
        patched.setattr(Path, "unlink", lambda *arguments, **others: None)  # the process is gone
        journal.picture(5, "fixed", picture(5))
    assert len(list((tmp_path / "samples").iterdir())) == 1
    plain(tmp_path, resumed_at=5)
    assert not list((tmp_path / "samples").iterdir())


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0, IMAGES: 0})
    events.Reload()
    tags = events.Tags()
    shown = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags["scalars"]}
    return shown | {tag: [(point.step, point.width) for point in events.Images(tag)] for tag in tags["images"]}


def test_tensorboard_shows_what_the_files_hold(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    journal = plain(folder, tensorboard=True, settings={"lr": 1e-5, "path": tmp_path})
    train(journal, 1, 22)
    journal.rewind(15)
    train(journal, 16, 20)
    journal.close()
    assert [step for step, _ in scalars(folder)["loss"]] == list(range(1, 21))
    journal = plain(folder, tensorboard=True, resumed_at=12)
    train(journal, 13, 30)
    journal.close()
    lines = read_metrics(folder)
    expected = {
        name: [(line["iteration"], float(np.float32(line[name]))) for line in lines] for name in ("loss", "logit_gap")
    }
    assert [step for step, _ in expected["loss"]] == list(range(1, 31))
    assert scalars(folder) == expected | {"fixed": [(iteration, 5) for iteration in range(5, 31, 5)]}


def test_without_tensorboard_an_event_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    plain(tmp_path, tensorboard=True).numbers(1, {"loss": 1.0})
    (event,) = read_events(tmp_path)
    assert "pip install tensorboard" in event["event"] and len(read_metrics(tmp_path)) == 1


# wandb


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.defined: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.finished = False
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def define_metric(self, name: str, **others: Any) -> None:
        self.defined[name] = others

    def finish(self) -> None:
        self.finished = True


def fake_wandb() -> Any:
    module = SimpleNamespace(runs=[], Image=lambda image: ("image", image.size))

    def init(**arguments: Any) -> FakeRun:
        run = FakeRun()
        module.runs.append((arguments, run))
        return run

    module.init = init
    return module


CONFIG = WandbSettings(project="project", entity="us", mode="offline")


def test_wandb_is_resumed_under_its_id(tmp_path: Path) -> None:
    module = fake_wandb()
    for resumed_at in (None, 5, None):
        Wandb(CONFIG, tmp_path, resumed_at, None, module).close()
    (first, run), (second, _), (third, _) = module.runs
    assert first["id"] == second["id"] != third["id"]
    assert first["resume"] == "allow" and run.finished
    assert (first["project"], first["entity"], first["mode"]) == ("project", "us", "offline")
    with pytest.raises(ValueError, match=r"is in \{'project': 'project', 'entity': 'us'\}, the recipe says"):
        Wandb(WandbSettings(project="another", entity="us"), tmp_path, 5, None, module)


def test_wandb_draws_over_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    journal = plain(tmp_path, wandb=CONFIG, settings={"lr": 1e-5})
    journal.numbers(1, {"loss": 0.5})
    journal.picture(1, "fixed", picture(1))
    journal.rewind(0)
    journal.close()
    ((_, run),) = module.runs
    assert run.logged == [{"loss": 0.5, "iteration": 1}, {"fixed": ("image", (5, 4)), "iteration": 1}]
    assert run.defined == {"iteration": {}, "*": {"step_metric": "iteration"}}
    assert run.settings == {"lr": 1e-5} and run.finished


def test_wandb_that_is_configured_and_missing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    journal = plain(tmp_path)
    train(journal, 1, 3)
    journal.close()
    with pytest.raises(ValueError, match="pip install wandb"):
        plain(tmp_path, resumed_at=1, wandb=CONFIG)
    assert len(read_metrics(tmp_path)) == 3


# Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_log_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = Display(1000, 600, clock=clock)  # resumed: what was done before says nothing of the rate
    for iteration in range(601, 1001):
        clock.now += 0.5
        display.advance(iteration, {"sample_std": 1.0, "first_loss": 0.25} if iteration == 610 else {})
    lines = lines_of(capsys)
    assert lines[0] == "iteration 601 of 1000"
    assert lines[1] == f"iteration {601 + 2 * EVERY:.0f} of 1000, 2.00 it/s, 0:02:50 left, first_loss 0.25"
    assert lines[-1] == "iteration 1000 of 1000, 2.00 it/s, 0:00:00 left, first_loss 0.25"
    assert len(lines) == 1 + int(200 // EVERY) + 1


def test_slow_iterations_have_a_rate_and_a_rewind_forgets_it(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = Display(10, clock=clock)
    for iteration in (1, 2):
        clock.now += 40
        display.advance(iteration, {})
    display.rewind(0)
    clock.now += 80
    display.advance(1, {})
    assert [line.split(", ", 1)[1] for line in lines_of(capsys)] == [
        "40.00 s/it, 0:06:00 left",
        "40.00 s/it, 0:05:20 left",
        "80.00 s/it, 0:12:00 left",
    ]


def test_the_bar_shows_numbers_at_any_width(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    for width in (60, 100):
        screen = io.StringIO()
        clock = Clock()
        display = Display(
            1000, 600, clock=clock, console=Console(file=screen, force_terminal=True, width=width, color_system=None)
        )
        clock.now += 50
        display.advance(700, {"first_loss": 0.25, "final_loss": 0.5})
        display.say("iteration 700: saved ([brackets] stay)")
        display.close()
        for part in ("700/1000", "2.00 it/s", "0:02:30 left", "first_loss 0.25, final_loss 0.5", "([brackets] stay)"):
            assert part in screen.getvalue(), (part, width)
    assert lines_of(capsys) == []


def test_events_are_told_on_stderr_even_without_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = plain(tmp_path)
    journal.advance(1, {"loss": 1.0})
    journal.event(20, "saved", path="step-00000020")
    assert lines_of(capsys) == ["iteration 20: saved (path step-00000020)"]


def test_losses_come_before_other_values() -> None:
    assert list(main_values({"a": 1, "b_loss": 2, "loss": 3})) == ["b_loss", "loss"]
    assert list(main_values(dict.fromkeys("abcdef", 0.0))) == list("abcd")


def test_the_null_journal_takes_the_same_calls(tmp_path: Path) -> None:
    def methods(kind: type) -> dict[str, str]:
        functions = inspect.getmembers(kind, inspect.isfunction)
        return {name: str(inspect.signature(f)) for name, f in functions if not name.startswith("_")}

    assert methods(NullJournal) == methods(Journal) and len(methods(Journal)) == 7
