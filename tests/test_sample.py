"""`twostep sample`: images of prompts, that say what they are, and a command that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train import tiny_pipelines
from twostep.cli import main
from twostep.images import to_bytes
from twostep.zoo import TextToImage, load_text_to_image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.z_image(tmp_path_factory.mktemp("model"))


def command(model: Path, out: Path, *more: str) -> list[str]:
    return ["sample", "--model", str(model), "--out", str(out), "--steps", "2", *more]


def test_images_are_the_models_and_say_what_they_are(model: Path, tmp_path: Path) -> None:
    words = ["--prompt", "a red circle", "--prompt", "Ein  Käse/Brot?", "--seed", "7", "--count", "2", "--batch", "3"]
    assert main(command(model, tmp_path, *words)) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "0000-a-red-circle-7.png",
        "0000-a-red-circle-8.png",
        "0001-ein-k-se-brot-7.png",
        "0001-ein-k-se-brot-8.png",
        "sheet.png",
    ]
    with Image.open(tmp_path / names[3]) as image:
        assert image.size == (64, 64)
        text = image.info
    assert (text["prompt"], text["seed"], text["model"]) == ("Ein  Käse/Brot?", "8", str(model))
    assert json.loads(text["twostep"])["steps"] == 2
    expected = to_bytes(load_text_to_image(model, steps=2, dtype=torch.float32).draw(["a red circle"], [7]))[0]
    with Image.open(tmp_path / names[0]) as image:
        found = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    assert (found.int() - expected.int()).abs().max() <= 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 128


def test_the_same_command_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ring\na star\n\ntwo shapes\n", encoding="utf-8")
    out = tmp_path / "out"
    words = command(model, out, "--prompts", str(prompts), "--size", "32", "48")
    assert main(words) == 0
    (out / "0001-a-star-0.png").unlink()
    drawn: list[str] = []
    draw = TextToImage.draw

    def counted(self: TextToImage, captions: list[str], *rest: object) -> torch.Tensor:
        drawn.extend(captions)
        return draw(self, captions, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TextToImage, "draw", counted)
    assert main(words) == 0
    assert set(drawn) == {"a star"} and "3 images" in capsys.readouterr().out
    with Image.open(out / "0001-a-star-0.png") as image:
        assert image.size == (48, 32)
    whole = (out / "0001-a-star-0.png").read_bytes()
    (out / "0001-a-star-0.png").write_bytes(whole[:300])  # damaged: drawn anew
    assert main([*words, "--count", "2"]) == 0  # and two of each
    assert (out / "0001-a-star-0.png").read_bytes() == whole
    assert len(list(out.glob("*.png"))) == 7, "three prompts, twice, and the sheet"
    (out / "sheet.png").unlink()
    limited = ["--guidance", "3", "--guidance-interval", ".5", "1"]
    renewed = ["--eta", "1", "--eta-interval", ".5", "1"]
    for other in (["--guidance", "3"], limited, renewed[:2], renewed, ["--dtype", "bfloat16"]):  # other images
        assert main([*words, *other]) == 2
        assert "is there, and is another image" in capsys.readouterr().err
    assert main([*words, "--guidance", "3", "--overwrite"]) == 0


def test_defaults_are_the_same_said_or_not(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--model", str(model), "--out", str(tmp_path), "--prompt", "a ring"]
    assert main(words) == 0
    assert main([*words, "--steps", "8", "--subfolder", "transformer"]) == 0
    assert "(1 were there)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --prompt TEXT"),
        (["--prompt", "a", "--prompts", "x.txt"], "give --prompt TEXT"),
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["--prompt", "a", "--count", "0"], "--count is 0"),
        (["--prompt", "a", "--size", "60", "64"], "the size is 60 x 64, expected multiples of 8"),
        (["--prompt", "a", "--subfolder", "other"], "other"),
        (["--prompt", "a", "--device", "foo"], "--device is 'foo', expected cpu, cuda or cuda:N"),
        (["--prompt", "a", "--device", "cuda:99"], "--device is 'cuda:99', "),
        (["--prompt", "a", "--seed", "99999999999999999999"], "--seed is 99999999999999999999, expected a number"),
        (["--prompt", "a", "--guidance", "nan"], "guidance is nan, expected a number"),
        (["--prompt", "a \udcff"], "is 'a \\udcff', which is not UTF-8"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1, expected a number from 0"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, *words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_a_line_that_is_not_text_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a ring\n\xff\xfe\n")
    assert main(command(model, tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"))) == 2
    assert "line 2 is not UTF-8" in capsys.readouterr().err
