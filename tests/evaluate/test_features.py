"""Feature networks give what the detector's heads read, and what transformers' own models and processors give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.evaluate import folders
from twostep.evaluate import FeatureStatistics, MiniatureFeatures, frechet_distance, load_features, pairwise_distance
from twostep.evaluate.preprocessing import read_preprocessing
from twostep.zoo.miniature import detector, render, samples, scenes

DETECTOR = detector.load()


def smooth(seed: int, count: int, height: int, width: int) -> Tensor:
    """Images in [-1, 1] that survive resizing, in whole 8-bit steps."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (images * 255).round() / 127.5 - 1


def as_files(images: Tensor) -> list[Any]:
    return [((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for image in images]


@pytest.mark.parametrize(("layout", "width"), [("mean", 224), ("each", 1248)])
def test_the_miniatures_features_are_what_the_detectors_heads_read(layout: str, width: int) -> None:
    images = samples(seed=3, start=0, count=5).images
    network = MiniatureFeatures(DETECTOR, layout, batch=2)
    found = network(images)
    assert found.shape == (5, network.width) == (5, width) and found.dtype == torch.float32
    cells, whole = found[:, :-96], found[:, -96:]
    logits = DETECTOR(images)
    torch.testing.assert_close(DETECTOR.background(whole), logits.background)
    head = DETECTOR.cells[2]  # linear: of the mean over cells it gives the mean of its outputs
    read = head(cells.view(5, 128, -1, 1)).squeeze(3).transpose(1, 2)
    expected = torch.cat([logits.occupied[:, :, None], logits.shape, logits.colour, logits.size], 2)
    torch.testing.assert_close(read, expected if layout == "each" else expected.mean(1, keepdim=True))


def test_an_images_cells_are_samples_of_what_stands_in_one() -> None:
    images = samples(seed=3, start=0, count=5).images
    network = MiniatureFeatures(DETECTOR, "each")
    cells = network.cells_of(network(images))
    logits = DETECTOR(images)
    read = DETECTOR.cells[2](cells[:, :, :128].reshape(45, 128, 1, 1)).view(5, 9, -1)
    torch.testing.assert_close(read[..., 0], logits.occupied)
    torch.testing.assert_close(read[..., 1:9], logits.shape)
    torch.testing.assert_close(DETECTOR.background(cells[:, 4, 128:]), logits.background)
    with pytest.raises(ValueError, match="in layout 'each', and this is 'mean'"):
        MiniatureFeatures(DETECTOR).cells_of(torch.zeros(1, 224))


def test_only_the_cells_one_by_one_see_where_things_stand() -> None:
    known = scenes(0, 0, 2000)
    alone = (known.count == 1) & (known.shape[:, 0] == 0) & (known.background == 0) & (known.size[:, 0] == 1)
    known = known[alone]
    assert len(known.cell[:, 0].unique()) > 4
    images = render(replace(known, colour=torch.where(known.colour < 0, -1, 0)))  # large red circles on black
    each, mean = (pairwise_distance(MiniatureFeatures(DETECTOR, layout)(images)) for layout in ("each", "mean"))
    assert each > 0.1 > 0.02 > mean


def test_worse_images_are_further_from_drawings_than_drawings_are() -> None:
    network = MiniatureFeatures(DETECTOR)
    reference = FeatureStatistics(network.name, network.width)
    reference.update(network(samples(seed=0, start=0, count=400).images))
    images = samples(seed=0, start=400, count=300).images
    generator = torch.Generator().manual_seed(0)
    noisy = images + 0.5 * torch.randn(images.shape, generator=generator)
    assert frechet_distance(network(noisy), reference) > 2 * frechet_distance(network(images), reference)


@pytest.mark.parametrize("make", [folders.dinov2, folders.dinov3, folders.clip_vision, folders.clip])
def test_a_folders_features_are_those_of_transformers(make: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    images = smooth(0, 5, 50, 40)
    network = load_features(tmp_path, batch=2)
    found = network(images)
    assert found.shape == (5, network.width) and found.dtype == torch.float32 and not found.requires_grad
    kind = model.config.model_type
    assert network.name == f"{kind} {tmp_path.name}, float32"
    # The oracle: the folder's own weights on the pixels that the network was given.
    pixels = read_preprocessing(tmp_path)(images)
    with torch.no_grad():
        if kind == "clip":
            tokens = torch.tensor([[0, 5, 1]])
            expected = model(input_ids=tokens, pixel_values=pixels).image_embeds  # normalised
            found = torch.nn.functional.normalize(found)
        elif kind == "clip_vision_model":
            expected = model(pixels).image_embeds
        else:
            expected = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.std(0).mean() > 1e-3, "all images look alike: the test sees nothing"


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (32, 32), (20, 90)])
@pytest.mark.parametrize("make", [folders._bit, folders._clip])
def test_pixels_are_those_of_transformers_processor(
    make: Callable[[], Any], size: tuple[int, int], tmp_path: Path
) -> None:
    processor = make()
    processor.save_pretrained(tmp_path)
    images = smooth(1, 3, *size)
    expected = processor(as_files(images), return_tensors="pt").pixel_values
    found = read_preprocessing(tmp_path)(images)
    assert found.shape == expected.shape
    # Two roundings to 8 bits, one for each direction of the resize, over the least deviation.
    assert (found - expected).abs().max() < 2 / 255 / 0.22
    assert (found - expected).abs().mean() < 0.5 / 255 / 0.22


def test_a_fixed_size_is_read_and_a_processors_own_file_as_well(tmp_path: Path) -> None:
    settings = {"size": {"height": 16, "width": 24}, "resample": 2, "do_normalize": False}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    found = read_preprocessing(tmp_path)(torch.full((1, 3, 40, 40), 0.5))
    torch.testing.assert_close(found, torch.full((1, 3, 16, 24), 0.75))


def test_mistaken_images_are_named() -> None:
    network = MiniatureFeatures(DETECTOR)
    images = torch.zeros(2, 3, 64, 64)
    for given, error in [
        (images[0], r"shape \[3, 64, 64\], expected \[N, 3, H, W\]"),
        (images[:, :, :32], r"images are 32 x 64, expected 64 x 64"),
        (images + 255, r"pixels reach 255, expected \[-1, 1\]"),
        (images / 0, r"images has NaN or infinity in 2 of 2 rows \(0, 1\)"),
        (images[:0], r"N, H, W above 0"),
    ]:
        with pytest.raises(ValueError, match=error):
            network(given)
    with pytest.raises(TypeError, match=r"dtype torch.uint8"):
        network(images.byte())
    with pytest.raises(ValueError, match=r"layout is 'cells', expected one of mean, each"):
        MiniatureFeatures(DETECTOR, "cells")


def test_mistaken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        load_features(tmp_path / "missing")
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'bert', known are clip, "):
        load_features(tmp_path)
    folders.dinov2(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"resample": 1}))
    with pytest.raises(ValueError, match=r"resample is 1 in .*, expected 2 \(bilinear\) or 3"):
        load_features(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"does not say how its model reads images"):
        load_features(tmp_path)


def test_a_folder_that_lacks_weights_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folders.dinov2(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["layernorm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of Dinov2Model \(layernorm\.weight"):
        load_features(tmp_path)


class Inception(torch.nn.Module):
    """What is asked of inception-2015-12-05.pt: pixels of 0 to 255 in, 2048 features out."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(3, width)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8 and return_features
        return self.linear(images.float().mean((2, 3)))


def test_fids_network_is_given_whole_pixels(tmp_path: Path) -> None:
    network, file = Inception().eval(), tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(network).save(file)
    images = smooth(1, 5, 40, 32)
    found = load_features(file, batch=2)
    assert found.name == "inception-2015-12-05" and found.width == 2048
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in as_files(images)])
    with torch.no_grad():
        torch.testing.assert_close(found(images), network(pixels, return_features=True))
    with pytest.raises(ValueError, match="in float32"):
        load_features(file, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"there is no .*other\.pt"):
        load_features(tmp_path / "other.pt")
    torch.jit.script(Inception(8)).save(tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match=r"gives \[2, 8\], expected \[n, 2048\]"):
        load_features(tmp_path / "narrow.pt", batch=2)(images)
