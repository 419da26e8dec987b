"""Z-Image's captions: diffusers' own pipelines are the oracle."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import ZImageOmniPipeline, ZImagePipeline
from torch import Tensor
from transformers import Qwen3ForCausalLM

from twostep.zoo.encoders import TruncatedPrompt, ZImageOmniTextEncoder, ZImageTextEncoder, load_text_encoder

from . import tiny_encoders

PROMPTS = ["a red fox in the snow", "", "造像「Z-IMAGE」 café", "many words " * 12, "a red fox in the snow, at night"]
TOO_LONG = "word " * 120  # 600 tokens of the tiny tokenizer


def pipeline(dtype: torch.dtype = torch.float32) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(tiny_encoders.zimage(), vae=None, transformer=None, dtype=dtype)


@torch.no_grad()
def of_pipeline(pipe: ZImagePipeline, prompts: list[str], **settings: int) -> list[Tensor]:
    features, _ = pipe.encode_prompt(list(prompts), device="cpu", do_classifier_free_guidance=False, **settings)
    return features


def rows(context) -> list[Tensor]:
    return [row[:length] for row, length in zip(context.features, context.token_lengths.tolist(), strict=True)]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_features_are_the_pipelines(batch_size: int) -> None:
    encoder = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float64)
    context = encoder.encode(PROMPTS, batch_size=batch_size)
    expected = of_pipeline(pipeline(torch.float64), PROMPTS)
    assert context.lengths is not None and context.lengths.tolist() == [len(row) for row in expected]
    assert context.lengths.device.type == "cpu" and context.lengths.dtype == torch.int64
    for row, other in zip(rows(context), expected, strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_are_as_exact_as_the_pipelines(dtype: torch.dtype) -> None:
    rounded = load_text_encoder(tiny_encoders.zimage(), dtype=dtype)
    # Weights are rounded to the dtype first, so that arithmetic alone is compared.
    exact_pipe = pipeline(dtype)
    exact_pipe.text_encoder.double()
    exact = of_pipeline(exact_pipe, PROMPTS)
    theirs = of_pipeline(pipeline(dtype), PROMPTS)
    for row, other, truth in zip(rows(rounded.encode(PROMPTS)), theirs, exact, strict=True):
        assert row.dtype == dtype
        assert (row - truth).norm() <= 2 * (other - truth).norm()


def test_features_are_the_pipelines_bit_for_bit_at_the_same_padding() -> None:
    prompts = [*PROMPTS, TOO_LONG]  # which makes the batch as wide as the pipeline's
    with pytest.warns(TruncatedPrompt):
        context = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float32).encode(prompts)
    for row, other in zip(rows(context), of_pipeline(pipeline(), prompts), strict=True):
        assert torch.equal(row, other)


def test_a_batch_is_padded_to_its_longest_with_zeros() -> None:
    context = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float32).encode(PROMPTS)
    assert context.features.shape[1] == int(context.token_lengths.max()) < 512
    for row, length in zip(context.features, context.token_lengths.tolist(), strict=True):
        assert not row[length:].any() and row[:length].any(1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_follows_the_tokenizers_padding_side(side: str) -> None:
    pipe = pipeline(torch.float64)
    pipe.tokenizer.padding_side = side
    encoder = ZImageTextEncoder(pipe.text_encoder, pipe.tokenizer, max_tokens=96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncatedPrompt)
        context = encoder.encode(PROMPTS, batch_size=2)
    for row, other in zip(rows(context), of_pipeline(pipe, PROMPTS, max_sequence_length=96), strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=1e-12)


def test_says_what_it_cuts() -> None:
    encoder = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float64, max_tokens=40)
    prompts = ["short", "x" * 30, "y" * 25]
    frame = encoder.count_tokens([""])[0]
    with pytest.warns(TruncatedPrompt) as warned:
        context = encoder.encode(prompts)
    (message,) = {str(one.message) for one in warned}
    assert "2 of 3 captions have, in the template, more than 40 tokens" in message
    assert f"'{'x' * 30}' loses {frame + 30 - 40}; '{'y' * 25}' loses {frame + 25 - 40};" in message
    for row, other in zip(
        rows(context), of_pipeline(pipeline(torch.float64), prompts, max_sequence_length=40), strict=True
    ):
        torch.testing.assert_close(row, other, rtol=0, atol=1e-12)


def test_what_fits_is_not_warned_about() -> None:
    encoder = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float32)
    room = encoder.max_tokens - encoder.count_tokens([""])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.encode(["x" * room]).token_lengths.tolist() == [512]
    with pytest.warns(TruncatedPrompt, match="loses 1;"):
        encoder.encode(["x" * (room + 1)])


def test_counts_tokens_without_the_model() -> None:
    encoder = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float32)
    assert encoder.count_tokens(PROMPTS) == encoder.encode(PROMPTS).token_lengths.tolist()


def test_the_template_is_what_the_model_reads() -> None:
    encoder = load_text_encoder(tiny_encoders.zimage())
    assert encoder.template == "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", [None, Qwen3ForCausalLM], ids=["Qwen3Model", "Qwen3ForCausalLM"])
def test_leaves_the_model_as_it_was_and_computes_no_layer_too_many(kind) -> None:
    model = tiny_encoders.qwen3(kind) if kind else tiny_encoders.qwen3()
    pipe = ZImagePipeline(None, None, model, tiny_encoders.tokenizer(), None)
    before = of_pipeline(pipe, PROMPTS)
    encoder = ZImageTextEncoder(model, pipe.tokenizer)
    first = encoder.encode(PROMPTS)
    after = of_pipeline(pipe, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # The last layer, the norm and the head could be anything.
    kept = {id(parameter) for parameter in encoder.model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.fill_(float("nan"))
    assert torch.equal(encoder.encode(PROMPTS).features, first.features)
    assert len(encoder.model.layers) == 3 and len(model.base_model.layers) == 4


def test_records_no_graph() -> None:
    encoder = ZImageTextEncoder(tiny_encoders.qwen3(), tiny_encoders.tokenizer())
    assert next(encoder.model.parameters()).requires_grad
    assert not encoder.encode(["a fox"]).features.requires_grad


@pytest.mark.parametrize("images", [0, 1, 2])
def test_omni_segments_are_the_pipelines(images: int) -> None:
    pipe = ZImageOmniPipeline.from_pretrained(
        tiny_encoders.zimage_omni(),
        vae=None,
        transformer=None,
        siglip=None,
        siglip_processor=None,
        dtype=torch.float64,
    )
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(
            list(PROMPTS), device="cpu", do_classifier_free_guidance=False, num_condition_images=images
        )
    encoder = load_text_encoder(tiny_encoders.zimage_omni(), dtype=torch.float64, images=images)
    assert isinstance(encoder, ZImageOmniTextEncoder)
    context = encoder.encode(PROMPTS, batch_size=3)
    assert context.lengths is not None
    assert context.lengths.tolist() == [[len(segment) for segment in sample] for sample in expected]
    assert encoder.count_tokens(PROMPTS) == context.token_lengths.tolist()
    for row, segments in zip(rows(context), expected, strict=True):
        torch.testing.assert_close(row, torch.cat(segments), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "a fox"}, TypeError, "prompts are one str, expected a list of str"),
        ({"prompts": 3}, TypeError, "prompts are int"),
        ({"prompts": ["a fox", None]}, TypeError, "prompts are list, expected a list of str"),
        ({"prompts": []}, ValueError, "an empty list, expected at least one; the unconditional caption is ''"),
        ({"prompts": ["a fox"], "batch_size": 0}, ValueError, "batch_size is 0, expected an integer of at least 1"),
    ],
)
def test_says_what_is_wrong(arguments: dict, error: type[Exception], message: str) -> None:
    encoder = load_text_encoder(tiny_encoders.zimage())
    with pytest.raises(error, match=message):
        encoder.encode(**arguments)


def test_says_what_a_tokenizer_lacks() -> None:
    model, tokenizer = tiny_encoders.qwen3(), tiny_encoders.tokenizer()
    with pytest.raises(ValueError, match="max_tokens is 0"):
        ZImageTextEncoder(model, tokenizer, max_tokens=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        ZImageTextEncoder(model, tokenizer).encode(["a fox"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ZImageTextEncoder(model, tokenizer).encode(["a fox"])
