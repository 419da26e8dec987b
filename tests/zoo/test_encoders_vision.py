"""Captions with their target image: transformers' own Qwen3-VL, given the text encoder's weights, is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, Qwen3Model, Qwen3VLForConditionalGeneration

from twostep.zoo.encoders import (
    TruncatedPrompt,
    ZImageTextEncoder,
    ZImageVisionEncoder,
    load_text_encoder,
    load_vision_encoder,
)

from . import tiny_encoders

PROMPTS = ["a red fox in the snow", "", "造像 café " * 4]
SIZES = [(16, 24), (64, 40), (30, 33)]  # the last is resized to multiples of 8


def images(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator) / 255 for size in SIZES]


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def text_encoder(dtype: torch.dtype = torch.float64) -> ZImageTextEncoder:
    encoder = load_text_encoder(tiny_encoders.zimage(), dtype=dtype)
    assert isinstance(encoder, ZImageTextEncoder)
    return encoder


def whole_model(rope_theta: float, dtype: torch.dtype = torch.float64) -> Qwen3VLForConditionalGeneration:
    """A whole Qwen3-VL into which the text encoder's weights were loaded."""
    config = AutoConfig.from_pretrained(tiny_encoders.vision())
    config.text_config.rope_parameters["rope_theta"] = rope_theta
    model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_encoders.vision(), config=config, dtype=dtype)
    weights = Qwen3Model.from_pretrained(tiny_encoders.zimage() / "text_encoder", dtype=dtype).state_dict()
    loaded = model.model.language_model.load_state_dict(weights)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    return model


@torch.no_grad()
def by_hand(model: Qwen3VLForConditionalGeneration, prompt: str, image: Image.Image) -> Tensor:
    names = tiny_encoders.tokenizer()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = names.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    seen = tiny_encoders.image_processor()(images=[image], return_tensors="pt")
    count = int(seen["image_grid_thw"].prod()) // 4
    inputs = names(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
    types = (inputs["input_ids"] == names.convert_tokens_to_ids("<|image_pad|>")).int()
    output = model(**inputs, **seen, mm_token_type_ids=types, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-2][0]


@pytest.mark.parametrize(("rope", "theta"), [("text", 1e6), ("vision", 5e6)])
def test_features_are_those_of_qwen3_vl_on_the_text_encoders_weights(rope: str, theta: float) -> None:
    encoder = load_vision_encoder(tiny_encoders.vision(), text_encoder(), rope=rope)
    context = encoder.encode(PROMPTS, images())  # images of three sizes in one batch
    model = whole_model(theta)
    assert context.lengths is not None
    for row, length, prompt, image in zip(context.features, context.lengths.tolist(), PROMPTS, images(), strict=True):
        expected = by_hand(model, prompt, pil(image))
        assert length == len(expected)
        torch.testing.assert_close(row[:length], expected, rtol=0, atol=1e-10)
        assert not row[length:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_of_one_caption_are_the_same_bits(dtype: torch.dtype) -> None:
    encoder = load_vision_encoder(tiny_encoders.vision(), text_encoder(dtype))
    model = whole_model(1e6, dtype)
    for prompt, image in zip(PROMPTS, images(), strict=True):
        assert torch.equal(encoder.encode([prompt], [image]).features[0], by_hand(model, prompt, pil(image)))


def test_without_images_it_is_the_text_encoder() -> None:
    text = text_encoder()
    encoder = load_vision_encoder(tiny_encoders.vision(), text)
    context, expected = encoder.encode(PROMPTS), text.encode(PROMPTS)
    torch.testing.assert_close(context.features, expected.features, rtol=0, atol=1e-12)
    assert context.lengths is not None and expected.lengths is not None
    assert context.lengths.tolist() == expected.lengths.tolist()


def test_the_language_weights_are_the_text_encoders_own_tensors() -> None:
    text = text_encoder(torch.float32)
    encoder = load_vision_encoder(tiny_encoders.vision(), text)
    mine = dict(encoder.model.language_model.named_parameters())
    theirs = dict(text.model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)


def test_leaves_the_vision_model_as_it_was() -> None:
    model = tiny_encoders.qwen3_vl()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ZImageVisionEncoder(text_encoder(torch.float32), model, tiny_encoders.image_processor()).encode(PROMPTS, images())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_image_matters_and_its_neighbours_do_not() -> None:
    encoder = load_vision_encoder(tiny_encoders.vision(), text_encoder())
    together = encoder.encode(PROMPTS, images(), batch_size=2)
    for row, (prompt, image) in enumerate(zip(PROMPTS, images(), strict=True)):
        alone = encoder.encode([prompt], [image]).features[0]
        torch.testing.assert_close(together.features[row, : len(alone)], alone, rtol=0, atol=1e-10)
    other = encoder.encode(PROMPTS, images(seed=1))
    assert (other.features - together.features).abs().amax((1, 2)).min() > 0.1


def test_takes_tensors_and_pil_images_alike() -> None:
    encoder = load_vision_encoder(tiny_encoders.vision(), text_encoder(torch.float32))
    tensors = encoder.encode(PROMPTS, images())
    assert torch.equal(tensors.features, encoder.encode(PROMPTS, [pil(image) for image in images()]).features)
    batch = torch.stack([images()[0]] * 3)
    assert torch.equal(encoder.encode(PROMPTS, batch).features, encoder.encode(PROMPTS, list(batch)).features)
    grey = Image.fromarray(np.full((16, 24), 128, dtype=np.uint8))
    same = encoder.encode(["a"], [grey.convert("RGB")]).features
    assert torch.equal(encoder.encode(["a"], [grey]).features, same)


def test_a_caption_is_cut_where_the_text_encoder_cuts_it() -> None:
    text = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float64, max_tokens=30)
    encoder = load_vision_encoder(tiny_encoders.vision(), text)
    with pytest.warns(TruncatedPrompt):
        context = encoder.encode(["x" * 50, "x" * 60], images()[:2])
    patches = torch.tensor([2 * 3, 8 * 5])
    assert context.token_lengths.tolist() == (30 + patches + 2).tolist()  # and the two marks around the image


def test_one_turn_the_image_before_the_text() -> None:
    encoder = load_vision_encoder(tiny_encoders.vision(), text_encoder(torch.float32))
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    assert encoder.template == f"<|im_start|>user\n{block}{{prompt}}<|im_end|>\n<|im_start|>assistant\n"


def test_max_pixels_makes_images_smaller() -> None:
    text = text_encoder(torch.float32)
    image = torch.rand(1, 3, 64, 64)
    lengths = [
        int(load_vision_encoder(tiny_encoders.vision(), text, max_pixels=pixels).encode([""], image).token_lengths)
        for pixels in (None, 32 * 32)
    ]
    assert lengths[0] - lengths[1] == 64 - 16


def test_fingerprints_tell_what_features_depend_on() -> None:
    text = text_encoder(torch.float32)
    one, two = (load_vision_encoder(tiny_encoders.vision(), text) for _ in range(2))
    assert one.fingerprint == two.fingerprint == one.encode(["a"]).encoder
    different = [
        load_vision_encoder(tiny_encoders.vision(), text, rope="vision"),
        load_vision_encoder(tiny_encoders.vision(), text, max_pixels=32 * 32),
        load_vision_encoder(
            tiny_encoders.vision(), load_text_encoder(tiny_encoders.zimage(), dtype=torch.float32, max_tokens=77)
        ),
        ZImageVisionEncoder(text, tiny_encoders.qwen3_vl(seed=5), tiny_encoders.image_processor()),
    ]
    assert len({text.fingerprint, one.fingerprint, *(each.fingerprint for each in different)}) == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], torch.rand(3, 16, 16)), ValueError, r"images have shape \[3, 16, 16\], expected \[batch, 3"),
        ((["a"], torch.rand(2, 3, 16, 16)), ValueError, "2 images for 1 captions"),
        ((["a"], pil(torch.rand(3, 16, 16))), TypeError, "images are one Image"),
        ((["a"], ["fox.png"]), TypeError, "an image is str"),
        ((["a"], [torch.rand(1, 16, 16)]), ValueError, r"an image has shape \[1, 16, 16\]"),
        ((["a"], [torch.ones(3, 16, 16, dtype=torch.uint8)]), ValueError, "dtype torch.uint8, expected floats"),
        ((["a"], torch.rand(1, 3, 16, 16).round() * 2 - 1), ValueError, r"values from -1 to 1, expected \[0, 1\]"),
        ((["a"], torch.full((1, 3, 16, 16), float("nan"))), ValueError, r"values from nan"),
        ((["an <|image_pad|>"], torch.rand(1, 3, 16, 16)), ValueError, "holds the image token"),
        (("a", torch.rand(1, 3, 16, 16)), TypeError, "prompts are one str"),
    ],
)
def test_says_what_is_wrong(arguments: tuple, error: type[Exception], message: str) -> None:
    encoder = load_vision_encoder(tiny_encoders.vision(), text_encoder(torch.float32))
    with pytest.raises(error, match=message):
        encoder.encode(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers 6 against 4"),
        ({"hidden_size": 32, "intermediate_size": 64}, "intermediate_size 64 against 48"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 against 1e-06"),
        ({"vocab_size": 300}, "vocab_size 300 against 263"),
    ],
)
def test_refuses_another_language_tower(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"not the text encoder's: {message}"):
        ZImageVisionEncoder(
            text_encoder(torch.float32), tiny_encoders.qwen3_vl(**changes), tiny_encoders.image_processor()
        )


def test_names_the_weights_that_do_not_fit() -> None:
    text = text_encoder(torch.float32)
    del text.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"1 weights .* do not fit: layers\.1\.mlp\.up_proj\.weight"):
        ZImageVisionEncoder(text, tiny_encoders.qwen3_vl(), tiny_encoders.image_processor())


def test_refuses_other_parts() -> None:
    text, processor = text_encoder(torch.float32), tiny_encoders.image_processor()
    with pytest.raises(ValueError, match="rope is 'both', expected 'text' or 'vision'"):
        load_vision_encoder(tiny_encoders.vision(), text, rope="both")
    with pytest.raises(ValueError, match="holds a qwen3, expected qwen3_vl"):
        load_vision_encoder(tiny_encoders.zimage() / "text_encoder", text)
    with pytest.raises(TypeError, match="is KleinTextEncoder, expected ZImageTextEncoder"):
        load_vision_encoder(tiny_encoders.vision(), load_text_encoder(tiny_encoders.klein(), layers=(1,)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vision model is in torch.bfloat16, the text encoder in torch.float32; load"):
        ZImageVisionEncoder(text, tiny_encoders.qwen3_vl().bfloat16(), processor)
    processor.patch_size = 8
    with pytest.raises(ValueError, match="image processor has patch_size 8, the vision model 4"):
        ZImageVisionEncoder(text, tiny_encoders.qwen3_vl(), processor)
    other = tiny_encoders.qwen3_vl()
    other.config.image_token_id = 5
    with pytest.raises(ValueError, match="an image is token 5 to the vision model and 261 to"):
        ZImageVisionEncoder(text, other, tiny_encoders.image_processor())
