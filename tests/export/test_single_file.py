"""Single files: what diffusers reads from them are the student's weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twostep.cli import main
from twostep.export import ExportFailed, export_single_file, from_original, single_file, to_original
from twostep.export.merging import merged
from twostep.zoo import load_student

Runs = dict[tuple[str, str, bool], Path]
CLASSES = {"z-image": ZImageTransformer2DModel, "klein": Flux2Transformer2DModel}


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_files_hold_the_students_weights(family: str, weights: str, runs: Runs, tmp_path: Path) -> None:
    for per_step in (True, False):
        run = runs[family, weights, per_step]
        made = export_single_file(run, tmp_path / str(per_step), dtype=torch.float32)
        assert made.error == made.rounding == 0
        student = load_student(run, dtype=torch.float32, fused=False)
        files = ["transformer.safetensors", "transformer_2.safetensors"][: 1 + per_step]
        assert sorted(path.name for path in made.folder.glob("*.safetensors")) == files
        for file, network in zip(files, student.distinct_networks(), strict=True):
            found = from_original(load_file(made.folder / file), network.family)
            assert all(torch.equal(found[name], tensor) for name, tensor in merged(network).items())
            with safe_open(made.folder / file, "pt") as opened:
                assert json.loads(opened.metadata()["sigmas"]) == list(student.sigmas)


def test_the_check_sees_a_wrong_file(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(state: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
        made = to_original(state, family)
        name = next(name for name in made if name.endswith("qkv.weight"))
        return {**made, name: made[name].roll(1, 0)}

    monkeypatch.setattr(single_file, "to_original", exchanged)
    with pytest.raises(ExportFailed, match=r"as others than were written, such as .*to_"):
        export_single_file(runs["klein", "full", True], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_than_the_students_are_refused(
    dtype: torch.dtype, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is read as it was written, and is not the student."""
    monkeypatch.setattr(single_file, "merged", lambda network: {k: 1.3 * v for k, v in merged(network).items()})
    with pytest.raises(ExportFailed, match="the file's velocities differ from the student's"):
        export_single_file(runs["z-image", "lora", True], tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_are_refused(runs: Runs, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(runs["klein", "full", False] / "student", student)
    (file,) = student.glob("transformer/*.safetensors")
    tensors = load_file(file)
    tensors["x_embedder.weight"][0, 0] = 1e6
    save_file(tensors, file)
    with pytest.raises(ExportFailed, match=r"by a relative (nan|inf)"):
        export_single_file(student, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == [student]


def test_the_command(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(runs["z-image", "full", True]), "--out", str(tmp_path / "out"), "--as", "single-file"]
    assert main(words) == 0
    assert "diffusers reads the same bits; writing bfloat16 has changed weights by" in capsys.readouterr().out
    words = ["sample", "--model", str(tmp_path / "out"), "--prompt", "a ring", "--out", str(tmp_path / "images")]
    assert main(words) == 2  # what is no pipeline's folder is told apart from nothing
    assert "is an export in a form of its own" in capsys.readouterr().err and not (tmp_path / "images").exists()
