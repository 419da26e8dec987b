"""Students that cannot leave, places that have moved, and what must not be lost when one leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train import tiny_runs
from twostep.cli import main
from twostep.durable import TEMPORARY
from twostep.export import export_folder, export_lora

Runs = dict[tuple[str, str, bool], Path]
Places = dict[str, tiny_runs.Place]


def _copied(run: Path, to: Path) -> Path:
    shutil.copytree(run / "student", to)
    return to


def test_mixed_precision_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a step's network, of one tensor, and of an adapter."""
    for number, (weights, file) in enumerate((("full", "transformer_2/*.safetensors"), ("lora", "step_2.safetensors"))):
        student = _copied(runs["z-image", weights, True], tmp_path / str(number))
        (path,) = student.glob(file)
        tensors = load_file(path)
        for some in (tensors, {min(tensors): tensors[min(tensors)]}):
            save_file(tensors | {name: tensor.bfloat16() for name, tensor in some.items()}, path)
            assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 2
            told = capsys.readouterr().err
            assert (
                "the student's tensors are of mixed precision: F32 (" in told and "BF16 (" in told and path.name in told
            )
    assert not (tmp_path / "out").exists()


def test_steps_of_two_models_are_refused(runs: Runs, tmp_path: Path) -> None:
    student = _copied(runs["z-image", "full", True], tmp_path / "student")
    config = json.loads((student / "transformer_2" / "config.json").read_text())
    (student / "transformer_2" / "config.json").write_text(json.dumps(config | {"t_scale": 500.0}))
    with pytest.raises(ValueError, match=r"disagree: t_scale is 1000\.0 in transformer and 500\.0 in transformer_2"):
        export_folder(student, tmp_path / "out")


def test_a_student_that_is_damaged_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = _copied(runs["klein", "lora", False], tmp_path / "student")
    facts = (student / "student.json").read_text()
    whole = json.loads(facts)
    for text, message in (
        (facts[:100], "student.json is not JSON"),
        ("[]", "does not say pipeline, sigmas, steps"),
        (json.dumps(whole | {"steps": 5}), "does not say steps"),
        (json.dumps({k: v for k, v in whole.items() if k != "rank"}), "does not say rank"),
    ):
        (student / "student.json").write_text(text)
        assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    (student / "student.json").write_text(facts)
    (file,) = student.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 2
    assert f"{file} is not a whole safetensors file" in capsys.readouterr().err


# Places


def test_what_it_stands_on_is_not_overwritten(
    runs: Runs, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is a folder that is no export: --overwrite is for exports alone."""
    teacher = tmp_path / "teacher"
    shutil.copytree(places["klein"].model, teacher)
    for folder in (teacher, teacher / "transformer"):
        (folder / "export.json").touch()  # a teacher that was an export itself
    run, moved = str(runs["klein", "lora", True]), ["--base", str(teacher), "--pipeline", str(teacher)]
    for form in ("lora", "diffusers", "onnx"):
        assert main(["export", run, "--as", form, *moved, "--out", str(teacher), "--overwrite"]) == 2
        assert "the student's pipeline, are in one another; give another folder" in capsys.readouterr().err
    words = ["--as", "single-file", *moved[:2], "--out", str(teacher / "transformer"), "--overwrite"]
    assert main(["export", run, *words]) == 2
    assert "the student's base, are in one another" in capsys.readouterr().err
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "picture").touch()
    assert main(["export", run, *moved, "--out", str(tmp_path / "album"), "--overwrite"]) == 2
    assert "holds no export, and --overwrite replaces nothing else" in capsys.readouterr().err
    assert (tmp_path / "album" / "picture").exists() and (teacher / "model_index.json").exists()


def test_places_are_found_again_from_anywhere(
    runs: Runs, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student whose pipeline has moved, which is named by a relative path; and whole weights whose base has."""
    student = _copied(runs["klein", "full", False], tmp_path / "student")
    facts = json.loads((student / "student.json").read_text())
    gone = {"pipeline": "/gone/model", "began_as": ["/gone/model", "transformer"]}
    (student / "student.json").write_text(json.dumps(facts | gone))
    (tmp_path / "moved").symlink_to(places["klein"].model, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    made = export_folder("student", "folder", pipeline="moved", parts="reference", dtype=torch.float32)
    where = str(places["klein"].model)
    assert json.loads((made.folder / "export.json").read_text())["teacher"] == where
    assert json.loads((made.folder / "student.json").read_text())["pipeline"] == where
    made = export_lora("student", "lora", rank=4, pipeline="moved", dtype=torch.float32)
    assert json.loads((made.folder / "export.json").read_text())["base"] == [where, "transformer"]
    made = export_lora("student", "again", rank=4, pipeline="moved", base="moved", dtype=torch.float32)
    assert made.error <= 1e-5


def test_an_export_is_exported_again(runs: Runs, tmp_path: Path) -> None:
    """It knows what it began as, so adapters can still be taken from it."""
    made = export_folder(runs["z-image", "full", True], tmp_path / "folder", dtype=torch.float32)
    again = export_lora(made.folder, tmp_path / "lora", rank=16, dtype=torch.float32)
    direct = export_lora(runs["z-image", "full", True], tmp_path / "direct", rank=16, dtype=torch.float32)
    assert again.rounding == pytest.approx(direct.rounding, rel=1e-3)
    assert json.loads((again.folder / "export.json").read_text())["iteration"] == 2
    once_more = export_folder(made.folder, tmp_path / "once more", dtype=torch.float32)
    assert (once_more.folder / "pipeline.py").is_file()


# What is left when it fails


def test_folders_on_the_way_are_removed_again(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostep.export.folder._verify", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_folder(runs["klein", "full", False], tmp_path / "x" / "y" / "z")
    assert not list(tmp_path.iterdir())


def test_a_signal_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    """SIGTERM while its images are being compared."""
    words = [str(runs["klein", "full", False]), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "twostep", "export", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"{TEMPORARY}out-*/student.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted; nothing was left" in told, told
    assert not list(tmp_path.iterdir())
