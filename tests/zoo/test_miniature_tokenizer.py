"""The tokenizer knows every word of the captions, speaks Qwen3's chat template, and any caption fits into 32 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from twostep.zoo.miniature import captions, claims_of, shapes, write
from twostep.zoo.miniature.tokenizer import MAX_CAPTION_TOKENS, UNKNOWN, build_tokenizer, words


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def chat(tokenizer: PreTrainedTokenizerBase, content: object, **settings: bool) -> str:
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, **settings)
    assert isinstance(text, str)
    return text


def longest_captions() -> list[str]:
    """Everything said: every relation and every place, with the wordiest of the rest."""
    caption, ground = "a small orange triangle", "on a checkered background"
    pairs = [f"{caption} {relation} {caption} {ground}" for relation in (*captions.RELATIONS, "and")]
    return pairs + [f"{caption} at the {cell} {ground}" for cell in captions.CELLS]


def test_the_template_is_qwen3s(tokenizer: PreTrainedTokenizerBase) -> None:
    turn = "<|im_start|>user\na red circle<|im_end|>\n"
    assert chat(tokenizer, "a red circle") == turn
    prompt = turn + "<|im_start|>assistant\n"
    assert chat(tokenizer, "a red circle", add_generation_prompt=True, enable_thinking=True) == prompt
    silent = chat(tokenizer, "a red circle", add_generation_prompt=True, enable_thinking=False)
    assert silent == prompt + "<think>\n\n</think>\n\n"
    parts = [{"type": "image"}, {"type": "text", "text": "a red circle"}]
    seen = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a red circle<|im_end|>\n"
    assert chat(tokenizer, parts) == seen
    messages = [{"role": role, "content": "a circle"} for role in ("system", "user", "assistant")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(
        f"<|im_start|>{role}\na circle<|im_end|>\n" for role in ("system", "user", "assistant")
    )


def test_any_caption_fits_in_its_template(tokenizer: PreTrainedTokenizerBase) -> None:
    longest = longest_captions()
    assert write(claims_of(longest)) == longest
    drawn = shapes.scenes(1, 0, 2000)
    common = write(captions.say(drawn, 1, torch.arange(2000)))
    assert max(len(caption.split()) for caption in common) <= max(len(caption.split()) for caption in longest)
    for caption in longest:
        for thinking in (True, False):
            text = chat(tokenizer, caption, add_generation_prompt=True, enable_thinking=thinking)
            assert len(tokenizer(text).input_ids) <= MAX_CAPTION_TOKENS


def test_a_word_is_a_token_and_every_word_is_known(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) <= 64 and len(words()) < 50
    drawn = shapes.scenes(2, 0, 2000)
    for caption in [*write(captions.say(drawn, 2, torch.arange(2000))), *longest_captions()]:
        assert tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids) == caption.split()
    text = chat(tokenizer, "a circle", add_generation_prompt=True, enable_thinking=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokens[:6] == ["<|im_start|>", "user", "\n", "a", "circle", "<|im_end|>"]
    assert tokens[-4:] == ["<think>", "\n\n", "</think>", "\n\n"] and UNKNOWN not in tokens
    assert tokenizer.convert_ids_to_tokens(tokenizer("a turquoise circle").input_ids) == ["a", UNKNOWN, "circle"]
    used = {word for caption in longest_captions() for word in caption.split()}
    assert used <= set(words()) and len(words()) == len(set(words()))


def test_reloads_offline_as_any_tokenizer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [chat(tokenizer, caption, add_generation_prompt=True) for caption in ("", "two shapes", "a red star")]
    assert [chat(loaded, caption, add_generation_prompt=True) for caption in ("", "two shapes", "a red star")] == texts
    ours, theirs = (t(texts, padding="max_length", max_length=32, return_tensors="pt") for t in (tokenizer, loaded))
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.attention_mask, theirs.attention_mask)
    assert ours.input_ids.shape == (3, 32) and ours.attention_mask[0].tolist() == [1] * 8 + [0] * 24
