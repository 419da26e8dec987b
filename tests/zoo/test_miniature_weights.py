"""The weights that ship: small, what stock diffusers loads, and as good as is stated beside them."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline

from twostep.evaluate import MiniatureAlignment
from twostep.train.miniature.stages import MEASURED
from twostep.zoo import load_text_to_image
from twostep.zoo.miniature import detector, miniature, samples
from twostep.zoo.miniature.model import WEIGHTS

STREAM, COUNT = 0x5417, 64  # nothing is trained or tuned on these


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 16 << 20


def test_stock_diffusers_loads_them() -> None:
    pipeline = DiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    assert type(pipeline) is ZImagePipeline
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", height=64, width=64, num_inference_steps=8, guidance_scale=0.0).images[0]
    assert image.size == (64, 64)


def test_the_autoencoder_is_as_good_as_stated() -> None:
    stated = json.loads((WEIGHTS / "measured.json").read_text())["autoencoder, psnr on fresh images"]
    mini, images = miniature(), samples(STREAM, 0, COUNT).images
    with torch.no_grad():
        again = mini.decode_latents(mini.encode_images(images)).clamp(-1, 1)
    psnr = -10 * ((again - images) / 2).square().mean((1, 2, 3)).log10().mean().item()
    assert psnr == pytest.approx(stated, abs=1.0)


@pytest.mark.parametrize("name", MEASURED)
def test_images_are_as_good_as_stated(name: str) -> None:
    """Within what 64 images can tell (three standard errors)."""
    stated = json.loads((WEIGHTS / "measured.json").read_text())["images"]["value, low, high"][name]["aligned"][0]
    model = load_text_to_image("miniature", dtype=torch.float32, **MEASURED[name])
    captions = samples(STREAM, 0, COUNT).captions
    images = model.draw(captions, range(COUNT))
    found = MiniatureAlignment(detector.load())(images, captions)["aligned"]
    assert found == pytest.approx(stated, abs=3 * 0.5 / COUNT**0.5)
