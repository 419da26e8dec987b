"""The example runs as its first lines say, on the miniature's folder, and what it saves is what diffusers loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel

from twostep.zoo import load_backbone
from twostep.zoo.miniature import miniature

ROOT = Path(__file__).resolve().parents[2]


def test_the_loop_distils_and_saves(tmp_path: Path) -> None:
    miniature(untrained_seed=0).save(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red circle\n\na large blue square on a green background\n")
    command = [
        *(sys.executable, str(ROOT / "examples" / "own_loop.py"), str(tmp_path / "teacher")),
        *("--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "student")),
        *("--iterations", "2", "--batch", "2"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0: final" in done.stdout and "1: final" in done.stdout
    teacher = load_backbone(tmp_path / "teacher", dtype=torch.float32).model.state_dict()
    for name in ("transformer", "transformer_2"):
        student = ZImageTransformer2DModel.from_pretrained(tmp_path / "student" / name).state_dict()
        assert student.keys() == teacher.keys()
        moved = sum(not torch.equal(student[key], teacher[key]) for key in teacher)
        assert moved > 0.8 * len(teacher)  # pad tokens that nothing pads, for instance, stay
        assert all(bool(value.isfinite().all()) for value in student.values())
