"""The miniature is what stock diffusers and transformers say it is: they sample it, save it, reload it and get the
same image.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from PIL import Image
from torch import Tensor

from twostep.zoo.miniature import Miniature, architecture, miniature, model, samples

MIB = 1 << 20


@pytest.fixture(scope="module")
def mini() -> Miniature:
    return miniature(untrained_seed=0)


@pytest.fixture(scope="module")
def saved(mini: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("miniature")
    mini.save(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def sample(pipeline: ZImagePipeline, output_type: str = "pt") -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images: Tensor = pipeline(
        ["a red circle", "two shapes on a blue background"],
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=32,
        generator=generator,
        output_type=output_type,
    ).images
    return images


def test_stock_diffusers_samples_saves_and_reloads_it(mini: Miniature, saved: Path) -> None:
    images = sample(mini.pipeline())
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all() and images.std() > 0
    assert not torch.equal(images[0], images[1])
    stock = DiffusionPipeline.from_pretrained(saved)
    assert type(stock) is ZImagePipeline
    assert torch.equal(sample(stock), images)
    assert torch.equal(sample(miniature(saved).pipeline()), images)


def test_the_same_seed_builds_the_same_weights_and_disturbs_no_other_draw(mini: Miniature) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again, other = miniature(untrained_seed=0), miniature(untrained_seed=1)
    assert torch.equal(torch.rand(3), expected)
    for name in ("transformer", "vae", "text_encoder", "vision_language_encoder"):
        state = getattr(mini, name).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(again, name).state_dict().items())
        assert any(not torch.equal(tensor, state[key]) for key, tensor in getattr(other, name).state_dict().items())


def test_latents_are_those_of_the_pipeline(mini: Miniature) -> None:
    latents = sample(mini.pipeline(), "latent")
    assert latents.shape == (2, 4, 16, 16)
    with torch.no_grad():
        images = mini.decode_latents(latents)
    assert torch.allclose((images / 2 + 0.5).clamp(0, 1), sample(mini.pipeline()), atol=1e-6)


def test_calibrated_latents_have_mean_0_and_variance_1_and_decode_to_the_same_image() -> None:
    mini, images = miniature(untrained_seed=3), samples(0, 0, 16).images
    with torch.no_grad():
        before = mini.decode_latents(mini.encode_images(images))
        plain = mini.encode_images(images)
        architecture.calibrate_latents(mini.vae, images)
        latents = mini.encode_images(images)
        assert abs(latents.mean()) < 1e-5 and abs(latents.std() - 1) < 1e-4
        assert not torch.allclose(latents, plain, atol=0.1)
        assert torch.allclose(mini.decode_latents(latents), before, atol=1e-4)
        drawn = [mini.encode_images(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # The pipeline reads the same two numbers.
    latents = sample(mini.pipeline(), "latent")
    with torch.no_grad():
        decoded = (mini.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoded, sample(mini.pipeline()), atol=1e-5)


def hidden_states(encoder: torch.nn.Module, **inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        states: tuple[Tensor, ...] = encoder(**inputs, output_hidden_states=True).hidden_states
    return states


@pytest.mark.parametrize("source", ["built", "loaded"])
def test_the_twin_reads_text_as_the_text_encoder_does(mini: Miniature, saved: Path, source: str) -> None:
    mini = mini if source == "built" else miniature(saved)
    text = mini.tokenizer(samples(0, 0, 6).captions, padding=True, return_tensors="pt")
    ours, twins = hidden_states(mini.text_encoder, **text), hidden_states(mini.vision_language_encoder, **text)
    assert len(ours) == len(twins) == mini.text_encoder.config.num_hidden_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))


def test_the_twins_language_weights_are_the_text_encoders_own() -> None:
    mini = miniature(untrained_seed=0)
    text = dict(mini.text_encoder.named_parameters())
    language = dict(mini.vision_language_encoder.language_model.named_parameters())
    assert text.keys() == language.keys() and all(text[name] is language[name] for name in text)
    with torch.no_grad():
        text["layers.0.mlp.up_proj.weight"].zero_()
    tokens = mini.tokenizer(["a red circle"], return_tensors="pt")
    ours, twins = hidden_states(mini.text_encoder, **tokens), hidden_states(mini.vision_language_encoder, **tokens)
    assert torch.equal(ours[-2], twins[-2])


def test_the_twin_sees_the_image_before_the_text(mini: Miniature) -> None:
    batch = samples(0, 0, 3)
    inputs = mini.processor(["a shape"] * 3, batch.images)
    is_image = inputs["mm_token_type_ids"].bool()
    assert is_image.sum(1).tolist() == [16, 16, 16]
    features = hidden_states(mini.vision_language_encoder, **inputs)[-2]
    before = is_image.long().cumsum(1) == 0
    assert torch.equal(features[0][before[0]], features[1][before[1]])
    assert not torch.allclose(features[0, -1], features[1, -1], atol=1e-4)  # the last word knows which image it was
    text = mini.tokenizer.decode(inputs["input_ids"][0])
    assert text.index("<|vision_end|>") < text.index("a shape")


def test_tensors_become_the_patches_that_qwens_own_image_processor_makes(mini: Miniature) -> None:
    batch = samples(0, 0, 3)
    bytes_ = ((batch.images + 1) * 127.5).round().byte()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in bytes_]
    ours = mini.processor(batch.captions, bytes_.float() / 127.5 - 1)
    stock = mini.processor(batch.captions, pictures)
    assert ours.keys() == stock.keys()
    for name in ours:
        assert ours[name].shape == stock[name].shape and torch.allclose(ours[name], stock[name], atol=1e-6), name


def test_two_transformers_and_the_rest_stay_below_16_mib(mini: Miniature, tmp_path: Path) -> None:
    mini.save(tmp_path, torch.bfloat16)
    weights = {path.parent.name: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert set(weights) == {"transformer", "vae", "text_encoder", "vision_tower"}
    assert sum(weights.values()) + weights["transformer"] < 14 * MIB
    assert 1.5e6 < sum(p.numel() for p in mini.transformer.parameters()) < 4e6
    assert mini.transformer.dtype == torch.float32  # saving rounds a copy
    loaded = miniature(tmp_path, dtype=torch.bfloat16)
    assert loaded.vae.dtype == loaded.text_encoder.dtype == loaded.vision_language_encoder.dtype == torch.bfloat16
    for name, tensor in mini.transformer.state_dict().items():
        assert torch.equal(tensor.bfloat16(), loaded.transformer.state_dict()[name])


def test_takes_the_transformer_from_another_subfolder(mini: Miniature, saved: Path) -> None:
    other = miniature(untrained_seed=9)
    other.transformer.save_pretrained(saved / "teacher")
    loaded = miniature(saved, transformer="teacher")
    expected = other.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.transformer.state_dict().items())
    assert torch.equal(loaded.vae.decoder.conv_in.weight, mini.vae.decoder.conv_in.weight)


def test_says_where_weights_are_missing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match=r"comes without trained weights .* train one .* or pass untrained_seed=0"):
        miniature()
    with pytest.raises(ValueError, match="no miniature is saved"):
        miniature(tmp_path)
    with pytest.raises(ValueError, match="no subfolder 'student' to take the transformer from"):
        miniature(saved, transformer="student")
    with pytest.raises(ValueError, match="untrained_seed 0 exclude each other"):
        miniature(saved, untrained_seed=0)
    mini = miniature(untrained_seed=0)
    with pytest.raises(ValueError, match="2 captions and 1 images, expected one each"):
        mini.processor(["a", "b"], torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="images are 60 x 64, expected multiples of 16"):
        mini.processor(["a"], torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="tokens, the text encoder room for 8"):
        architecture.build(0, architecture.Sizes(vocabulary=8))
