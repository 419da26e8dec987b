"""`twostep demo`, on a tiny pipeline with a tiny base: every stage is the real one, and what was done is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.train import tiny_pipelines
from twostep import demo
from twostep.cli import main
from twostep.evaluate import Interval
from twostep.evaluate.study import Measured


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_pipelines.z_image(tmp_path / "model")
    shutil.copytree(folder / "transformer", folder / "base")
    return folder


def test_it_distils_compares_and_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROMPTS", (demo.PROMPTS[0], 8))
    monkeypatch.setattr(demo, "VARIETY", (2, 2))
    out = tmp_path / "out"
    command = ["demo", "--out", str(out), "--model", str(model), "--images", "8", "iterations=2", "batch=2"]
    command += ["compute.threads=1", "compute.device=cpu", "watch.samples_every=null"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "student at 2" in printed and "stock diffusers draws the same images" in printed
    facts = json.loads((out / "report" / "report.json").read_text())
    names = ["real images", "base at 28", "teacher at 8", "teacher at 2", "student at 2"]
    assert [row["name"] for row in facts["measured"]] == names
    assert [row["evaluations"] for row in facts["measured"]] == [None, 43, 8, 2, 2]
    assert len(facts["verdicts"]) == 7
    assert (out / "student" / "pipeline.py").is_file() and (out / "student" / "transformer_2").is_dir()
    assert "Training of student at 2" in (out / "report" / "report.html").read_text()

    assert "iterations=1000     a longer training goes on from here" in printed

    assert main(command) == 0  # all of it is there, and nothing is drawn or trained again
    again = json.loads((out / "report" / "report.json").read_text())["measured"]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in facts["measured"]]
    longer = [word.replace("iterations=2", "iterations=3") for word in command]
    assert main(longer) == 0 and "Training of student at 2" in (out / "report" / "report.html").read_text()
    assert json.loads((out / "student" / "export.json").read_text())["iteration"] == 3


def test_mistakes_are_told_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for words, message, status in (
        (["--images", "4"], "--images is 4, expected at least 8", 2),
        (["iterations=x"], "iterations", 2),
        (["--out", str(tmp_path / "file")], "File exists", 1),
    ):
        assert main(["demo", "--out", str(tmp_path / "out"), *words]) == status
        said = capsys.readouterr()
        assert message in said.err and not (tmp_path / "out").exists() and "1 of 3" not in said.out + said.err


def rows(student: dict[str, float], seconds: float) -> dict[str, Measured]:
    def row(name: str, values: dict[str, float], seconds: float) -> Measured:
        metrics = {metric: Interval(value, value, value, 0.95) for metric, value in values.items()}
        return Measured(name, metrics, 8, 2, 2, seconds, seconds)

    eight = {"frechet": 10, "aligned": 0.9, "precision": 0.9, "psnr": 33, "diversity": 0.2, "coverage": 0.8}
    two = {"frechet": 110, "aligned": 0.3, "precision": 0.4, "psnr": 30, "diversity": 0.1, "coverage": 0.3}
    made = [row("teacher at 8", eight, 0.8), row("teacher at 2", two, 0.2), row("student at 2", student, seconds)]
    return {one.name: one for one in made}


def test_the_bars_are_what_they_say() -> None:
    good = {"frechet": 30, "aligned": 0.81, "precision": 0.4, "psnr": 30, "diversity": 0.17, "coverage": 0.68}
    found = ["80%", "90%", "100%", "100%", "85%", "85%", "4.0"]
    assert [verdict.met for verdict in demo.verdicts(rows(good, 0.2))] == [True] * 7
    assert [verdict.found for verdict in demo.verdicts(rows(good, 0.2))] == found
    bad = {"frechet": 31, "aligned": 0.80, "precision": 0.39, "psnr": 29, "diversity": 0.16, "coverage": 0.67}
    assert [verdict.met for verdict in demo.verdicts(rows(bad, 0.24))] == [False] * 7


def test_a_bar_is_shown_with_the_interval_of_what_was_found() -> None:
    """What both rows share does not widen it, and a gap that may be nothing leaves it open."""
    drawn = rows({"frechet": 30, "aligned": 0.81, "precision": 0.4, "psnr": 30, "diversity": 0.2, "coverage": 0.8}, 0.2)
    common = torch.linspace(-0.1, 0.1, 101).tolist()

    def shaken(name: str, metric: str, by: Sequence[float]) -> None:
        value = drawn[name].metrics[metric].value
        values = tuple(value + one for one in by)
        drawn[name].metrics[metric] = Interval(value, min(values), max(values), 0.95, values)

    shaken("student at 2", "aligned", common)
    shaken("teacher at 8", "aligned", common)
    shaken("teacher at 2", "frechet", [1000 * one for one in common])
    gap, kept, *others = demo.verdicts(drawn)
    assert (gap.found, gap.sure) == ("80%, -150% to 90%", False)
    assert kept.found == "90%, 89% to 91%" and kept.met and not kept.sure
    assert all(verdict.sure for verdict in others)
    shaken("teacher at 2", "frechet", [-200.0, *[0.0] * 100])
    assert demo.verdicts(drawn)[0].found == "80%, 80% to 80%"
    drawn["teacher at 2"].metrics["frechet"] = Interval(9, 9, 9, 0.95)
    assert not demo.verdicts(drawn)[0].met
    shaken("teacher at 2", "precision", [-0.4, *[0.0] * 100])  # a resample with nothing to compare with
    assert demo.verdicts(drawn)[2].found == "100%, nan% to nan%" and not demo.verdicts(drawn)[2].sure


def test_a_model_without_weights_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
