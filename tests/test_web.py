"""The page of `twostep demo --web`, on a tiny pipeline: its server is asked, and a browser looks at it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.browser import document, needs_browser, screenshot
from tests.train import tiny_pipelines
from twostep.cli import main
from twostep.images import to_bytes
from twostep.web import COUNT, SHOWN, page, serve
from twostep.zoo import TextToImage, load_text_to_image

pytest.importorskip("gradio", reason="needs gradio: the extra [web]")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextToImage]:
    folder = tiny_pipelines.z_image(tmp_path_factory.mktemp("pipeline"))
    return {
        name: load_text_to_image(folder, steps=steps, dtype=torch.float32)
        for name, steps in (("Teacher", 8), ("Student", 2))
    }


@pytest.fixture(scope="module")
def address(models: dict[str, TextToImage]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = page(models, "a title")
    yield serve(made, host="127.0.0.1", port=port)
    made.close(verbose=False)


def test_both_draw_the_same_captions_and_seeds(models: dict[str, TextToImage], address: str) -> None:
    from gradio_client import Client

    answer: list[Any] = list(Client(address, verbose=False).predict("a blue star", 3, 2, api_name="/draw"))
    for (name, model), images, said in zip(models.items(), answer[::2], answer[1::2], strict=True):
        expected = to_bytes(model.draw(["a blue star"] * 2, [3, 4])).permute(0, 2, 3, 1).numpy()
        assert len(images) == 2 and said.endswith("ms an image"), name
        for one, pixels in zip(images, expected, strict=True):
            with Image.open(one["image"]) as found:
                times = SHOWN // pixels.shape[1]
                assert found.size == (times * pixels.shape[1], times * pixels.shape[0])
                small = np.asarray(found.convert("RGB"))[::times, ::times]
            assert np.abs(small.astype(int) - pixels.astype(int)).max() <= 1


@pytest.mark.parametrize(("seed", "count", "message"), [(-1, 2, "less than minimum"), (0, 99, "greater than maximum")])
def test_wrong_numbers_are_explained(address: str, seed: int, count: int, message: str) -> None:
    from gradio_client import Client

    with pytest.raises(Exception, match=message):
        Client(address, verbose=False).predict("a star", seed, count, api_name="/draw")


@needs_browser
def test_a_browser_shows_both(address: str, tmp_path: Path) -> None:
    """Images are there before anybody asks, and no host but this one is needed for it."""
    found = document(address, tmp_path, (1280, 1000), budget=20000)
    assert "a title" in found and found.count("ms an image") >= 2
    assert found.count("<img") >= 2 * COUNT
    with Image.open(screenshot(address, tmp_path, (1280, 1000), budget=20000)) as seen:
        colours = seen.convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 200  # pictures, not a blank page


def test_without_a_student_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--web", "--out", str(tmp_path)]) == 2
    assert f"there is no student in {tmp_path / 'run'} yet:  twostep demo --out {tmp_path}" in capsys.readouterr().err
