"""What docs/miniature.md shows runs, and the sizes that it states are the sizes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from twostep.zoo.miniature import architecture, detector

PAGE = (Path(__file__).parents[2] / "docs" / "miniature.md").read_text()


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        with torch.no_grad():
            exec(compile(block, "docs/miniature.md", "exec"), {})


def test_the_sizes_are_those_of_the_parts() -> None:
    pieces = architecture.build(0)
    networks = {
        "transformer": pieces.transformer,
        "autoencoder": pieces.vae,
        "text encoder": pieces.text_encoder,
        "vision tower": pieces.vision_tower,
        "detector": detector.Detector(),
    }
    stated = re.findall(r"^\| ([a-z ]+) \| .* \| ([\d,]+) \| ([\d.]+) MiB \|$", PAGE, re.M)
    assert [name for name, _, _ in stated] == list(networks)
    total = 0.0
    for name, parameters, size in stated:
        count = sum(parameter.numel() for parameter in networks[name].parameters())
        assert int(parameters.replace(",", "")) == count, (name, count)
        assert f"{count * 2 / 2**20:.1f}" == size, name
        total += count * 2 / 2**20 * (2 if name == "transformer" else 1)
    assert f"that makes {total:.1f} MiB" in PAGE
