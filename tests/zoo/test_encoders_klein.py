"""FLUX.2-klein's captions and reference latents: diffusers' own pipeline is the oracle."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from twostep.zoo.context import Context
from twostep.zoo.encoders import (
    KleinTextEncoder,
    TruncatedPrompt,
    encode_reference,
    klein_reference_context,
    load_text_encoder,
)

from . import tiny_encoders

PROMPTS = ["a red fox in the snow", "", "造像「Z-IMAGE」 café", "many words " * 12, "a red fox in the snow, at night"]


def pipeline(dtype: torch.dtype = torch.float32) -> Flux2KleinPipeline:
    return Flux2KleinPipeline.from_pretrained(tiny_encoders.klein(), transformer=None, dtype=dtype)


@torch.no_grad()
def of_pipeline(pipe: Flux2KleinPipeline, prompts: list[str], layers: tuple[int, ...], length: int = 512) -> Tensor:
    features, _ = pipe.encode_prompt(prompts, max_sequence_length=length, text_encoder_out_layers=layers)
    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [(1, 2, 3), (3, 1), (2,), (2, 4)], ids=str)
def test_features_are_the_pipelines_bit_for_bit(layers: tuple[int, ...], dtype: torch.dtype) -> None:
    encoder = load_text_encoder(tiny_encoders.klein(), dtype=dtype, layers=layers)
    context = encoder.encode(PROMPTS)
    assert torch.equal(context.features, of_pipeline(pipeline(dtype), PROMPTS, layers))
    assert context.features.shape == (5, 512, encoder.channels)


def test_batches_change_nothing() -> None:
    encoder = load_text_encoder(tiny_encoders.klein(), dtype=torch.float64, layers=(1, 2, 3))
    whole = of_pipeline(pipeline(torch.float64), PROMPTS, (1, 2, 3))
    torch.testing.assert_close(encoder.encode(PROMPTS, batch_size=2).features, whole, rtol=0, atol=1e-12)


def test_padding_is_part_of_the_features() -> None:
    context = load_text_encoder(tiny_encoders.klein(), dtype=torch.float32, layers=(1, 2, 3)).encode(["a fox"])
    assert context.lengths is None
    assert context.features[0, -1].any()


def test_cuts_like_the_pipeline_and_says_so() -> None:
    prompts = ["short", "x" * 90]
    encoder = load_text_encoder(tiny_encoders.klein(), dtype=torch.float32, layers=(1, 3), max_tokens=64)
    with pytest.warns(TruncatedPrompt, match="1 of 2 captions have, in the template, more than 64 tokens"):
        features = encoder.encode(prompts).features
    assert torch.equal(features, of_pipeline(pipeline(), prompts, (1, 3), length=64))
    with pytest.warns(TruncatedPrompt):
        assert encoder.count_tokens(prompts) == [64, 64]


def test_the_template_says_that_thinking_is_off() -> None:
    encoder = load_text_encoder(tiny_encoders.klein(), layers=(1,))
    ending = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert encoder.template == "<|im_start|>user\n{prompt}<|im_end|>\n" + ending


def test_keeps_the_layers_it_needs() -> None:
    encoder = load_text_encoder(tiny_encoders.klein(), layers=(1, 2))
    assert isinstance(encoder, KleinTextEncoder)
    assert len(encoder.model.layers) == 2


@pytest.mark.parametrize("layers", [(), (0, 1), (True,), (1.0,)], ids=str)
def test_says_which_layers_there_are(layers: tuple) -> None:
    with pytest.raises(ValueError, match=r"layers are .*, expected integers of at least 1"):
        load_text_encoder(tiny_encoders.klein(), layers=layers)
    with pytest.raises(ValueError, match="hidden state 27 is asked for, but Qwen3ForCausalLM has 4 layers"):
        load_text_encoder(tiny_encoders.klein())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_reference_latents_are_the_pipelines(dtype: torch.dtype) -> None:
    pipe = pipeline(dtype)
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = encode_reference(pipe.vae, images)
    expected = pipe._encode_vae_image((2 * images - 1).to(dtype), generator=None)
    assert latents.shape == (2, 16, 4, 6)
    assert torch.equal(latents, expected)


def test_says_what_is_wrong_with_images() -> None:
    vae = pipeline().vae
    with pytest.raises(ValueError, match=r"images have shape \[1, 3, 16, 18\].* divisible by 4"):
        encode_reference(vae, torch.rand(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"values from -1 to 1, expected floats in \[0, 1\]"):
        encode_reference(vae, torch.rand(1, 3, 16, 16).round() * 2 - 1)
    with pytest.raises(ValueError, match=r"torch.uint8"):
        encode_reference(vae, torch.ones(1, 3, 16, 16, dtype=torch.uint8))


def test_references_join_the_caption() -> None:
    context = load_text_encoder(tiny_encoders.klein(), dtype=torch.float32, layers=(1,)).encode(["a", "b"])
    first, second = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 2, 2)
    teacher = klein_reference_context(klein_reference_context(context, first), [second])
    assert teacher.references[0] is first and teacher.references[1] is second
    assert teacher.features is context.features and teacher.encoder == context.encoder
    assert context.references == ()
    with pytest.raises(ValueError, match="a batch of 2"):
        klein_reference_context(context, torch.randn(3, 16, 4, 6))
    with pytest.raises(ValueError, match="latents are empty"):
        klein_reference_context(context, [])
    assert isinstance(teacher[[1]], Context) and torch.equal(teacher[[1]].references[0], first[1:])
