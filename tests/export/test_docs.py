"""The Python of docs/export.md, as it stands there, on tiny pipelines of both families."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.train import tiny_runs
from twostep.cli import main
from twostep.export.fresh_process import relative
from twostep.zoo import load_text_to_image

Runs = dict[tuple[str, str, bool], Path]
ROOT = Path(__file__).resolve().parents[2]
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
GUIDANCE = {"z-image": "0.0", "klein": "1.0"}


@pytest.mark.parametrize("family", ["z-image", "klein"])
def test_lora_files_draw_the_students_images(
    family: str,
    runs: Runs,
    places: dict[str, tiny_runs.Place],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = [one for one in CODE if "load_lora_weights" in one]
    monkeypatch.chdir(tmp_path)
    run = runs[family, "lora", True]
    assert main(["export", str(run), "--out", "lora", "--as", "lora", "--dtype", "float32"]) == 0
    student = load_text_to_image(run, dtype=torch.float32)
    height, width = student.size()
    pipeline = DiffusionPipeline.from_pretrained(places[family].model)
    given = f'"guidance_scale": {GUIDANCE[family]}, "height": {height}, "width": {width}'
    given += ', "output_type": "pt", "latents": noise'
    names: dict[str, Any] = {"pipeline": pipeline, "prompt": ["a red circle"], "noise": student.noise([3])}
    exec(code.replace('"guidance_scale": 0.0', given), names)
    assert relative(names["images"] * 2 - 1, student.draw(["a red circle"], [3])) <= 1e-4
    assert json.loads(Path("lora/export.json").read_text())["sigmas"][:-1] == names["sigmas"]


def test_the_folder_is_loaded(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [one for one in CODE if "trust_remote_code" in one]
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(runs["z-image", "full", True]), "--out", "student"]) == 0
    names: dict[str, Any] = {}
    exec(code.replace('"a red circle"', '"a red circle", height=64, width=64'), names)
    assert names["image"].size == (64, 64)


@pytest.mark.slow
def test_the_program_is_loaded(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [one for one in CODE if "aoti_load_package" in one]
    monkeypatch.chdir(tmp_path)
    words = ["--out", "sampler", "--as", "program", "--device", "cpu"]
    assert main(["export", str(runs["z-image", "full", False]), *words]) == 0
    width = json.loads(Path("sampler/export.json").read_text())["inputs"]["features"]["shape"][2]
    given = f"noise, features, lengths = torch.randn(1, 4, 16, 16), torch.randn(1, 32, {width}), torch.tensor([7])\n"
    # In a process of its own: the kernels are loaded once.
    script = f"import torch\n{given}{code}\nassert latents.shape == noise.shape"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
