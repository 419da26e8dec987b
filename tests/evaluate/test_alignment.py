"""Drawings of the miniature hold all that their captions claim; CLIP scores are those of CLIP's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.evaluate import folders
from tests.evaluate.test_features import smooth
from twostep.evaluate import MiniatureAlignment, VqaScore, load_clip_score, load_vqa_score
from twostep.evaluate.preprocessing import read_preprocessing
from twostep.zoo.miniature import detector, render, samples, scenes

ALIGNMENT = MiniatureAlignment(detector.load())


def test_drawings_show_what_their_captions_say() -> None:
    batch = samples(seed=5, start=0, count=64)
    found = ALIGNMENT(batch.images, batch.captions)
    assert found.pop("psnr") > 60
    assert found == dict.fromkeys(("aligned", "count", "shape", "colour", "size", "cell", "relation", "background"), 1)


def test_captions_are_judged_by_what_they_say_of_their_own_image() -> None:
    known = scenes(0, 0, 200)
    circle = known[(known.count == 1) & (known.shape[:, 0] == 0) & (known.colour[:, 0] == 0)][:1]  # a red one
    image = render(circle)
    found = ALIGNMENT(torch.cat([image, image]), ["a red circle", "a red square"])
    assert (found["aligned"], found["count"], found["colour"], found["shape"]) == (0.5, 1, 1, 0.5)
    assert "background" not in found, "nothing was said about it"


def test_noise_shows_nothing_cleanly() -> None:
    noise = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = ALIGNMENT(noise, ["a red circle on a black background"] * 16)
    assert found["aligned"] < 0.2 and found["psnr"] < 15


def test_clip_scores_are_those_of_transformers(tmp_path: Path) -> None:
    model = folders.clip(tmp_path)
    images, captions = smooth(0, 5, 40, 32), ["a cat", "red", "green dog", "a", "b c d"]
    score = load_clip_score(tmp_path, batch=2)
    found = score.scores(images, captions)
    # The oracle: one image with one caption at a time, so that no padding is about.
    pixels = read_preprocessing(tmp_path)(images)
    logits = []
    for image, caption in zip(pixels, captions, strict=True):
        tokens = score.tokenizer([caption], return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**tokens, pixel_values=image[None]).logits_per_image / model.logit_scale.exp())
    cosines = torch.cat(logits).flatten()
    assert cosines.std() > 1e-3, "all pairs look alike: the test sees nothing"
    torch.testing.assert_close(found, 100 * cosines.clamp_min(0), rtol=1e-4, atol=1e-3)
    assert score(images, captions) == {"clip_score": pytest.approx(float(found.double().mean()))}
    # An embedding turned round turns the cosines' signs, and one below 0 counts as 0.
    score.model.visual_projection.weight.neg_()
    torch.testing.assert_close(score.scores(images, captions), -100 * cosines.clamp_max(0), rtol=1e-4, atol=1e-3)


def names_begin(score: VqaScore) -> bool:
    """Whether the tokenizer puts a token before every text."""
    names = score.processor.tokenizer
    return len(names("a")["input_ids"]) == 2


@pytest.mark.parametrize("start", [False, True])
def test_vqa_scores_are_the_probability_of_yes(tmp_path: Path, start: bool) -> None:
    model = folders.llava(tmp_path, start=start)
    images, captions = smooth(0, 5, 40, 32), ["a cat", "red", "a very green dog", "a", "b c d"]
    score = load_vqa_score(tmp_path, batch=2)
    found = score.scores(images, captions)
    # The oracle: one image with one caption at a time, put together by hand; each patch is a token.
    assert names_begin(score) == start
    names, places = score.processor.tokenizer, (32 // 8) ** 2
    expected = []
    for image, caption in zip(images, captions, strict=True):
        asked = f'Does this figure show "{caption}"? Please answer yes or no.'
        text = "<|im_start|>" * start + "<image>" * places + f"{asked}A:"
        seen = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        pixels = score.processor.image_processor(Image.fromarray(seen.permute(1, 2, 0).numpy()), return_tensors="pt")
        with torch.no_grad():
            logits = model(**names(text, add_special_tokens=False, return_tensors="pt"), **pixels).logits[0, -1]
        expected.append(logits.softmax(0)[names.convert_tokens_to_ids("Y")])
    true = torch.stack(expected)
    assert true.std() > 0.1 * true.mean(), "all pairs look alike: the test sees nothing"
    torch.testing.assert_close(found, true, rtol=1e-3, atol=0)
    assert score(images, captions) == {"vqa_score": pytest.approx(float(found.double().mean()))}
    other = load_vqa_score(tmp_path, question="Is this {}?", answer="N").scores(images, captions)
    assert not torch.allclose(other, found)


def test_vqa_mistakes_are_named(tmp_path: Path) -> None:
    folders.llava(tmp_path / "mute", template=None)
    with pytest.raises(ValueError, match="no chat template"):
        load_vqa_score(tmp_path / "mute")
    folders.clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="holds a model of type 'clip', known are"):
        load_vqa_score(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"expected one \{\} in it"):
        load_vqa_score(tmp_path / "mute", question="Is it?")


def test_mistakes_are_named(tmp_path: Path) -> None:
    batch = samples(seed=5, start=0, count=2)
    with pytest.raises(ValueError, match=r"1 captions and 2 images"):
        ALIGNMENT(batch.images, batch.captions[:1])
    with pytest.raises(ValueError, match=r"'a cat' is not a caption of the miniature"):
        ALIGNMENT(batch.images, ["a cat", "a star"])
    folders.clip(tmp_path)
    images, long = smooth(0, 2, 32, 32), "a very long caption"
    with pytest.raises(ValueError, match=r"'a very long caption' has 18 tokens and the model reads 12; .*truncate"):
        load_clip_score(tmp_path)(images, ["a", long])
    cut = load_clip_score(tmp_path, truncate=True)
    torch.testing.assert_close(cut.scores(images, [long] * 2), cut.scores(images, [long + " indeed"] * 2))
    folders.dinov2(tmp_path / "dino")
    with pytest.raises(ValueError, match=r"type 'dinov2', known are clip$"):
        load_clip_score(tmp_path / "dino")
