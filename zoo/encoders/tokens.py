"""Captions into tokens: checked, cut with a warning, in batches of similar length, padded as the tokenizer pads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SHOWN = 3  # captions named in a warning


class TruncatedPrompt(UserWarning):
    """A caption was longer than max_tokens, and the model saw its beginning only."""


def check_prompts(where: str, prompts: Any) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not all(isinstance(p, str) for p in prompts):
        given = "one str" if isinstance(prompts, str) else type(prompts).__name__
        raise TypeError(f"{where}: prompts are {given}, expected a list of str; one caption is a list of one")
    if not prompts:
        raise ValueError(f"{where}: prompts are an empty list, expected at least one; the unconditional caption is ''")
    return list(prompts)


def check_count(where: str, name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: {name} is {value!r}, expected an integer of at least {least}")
    return value


def chat(tokenizer: Any, content: str, *, enable_thinking: bool) -> str:
    """One turn of the user, and the beginning of the answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "text encoder: the tokenizer has no chat template, and captions are encoded as a user's turn of a chat; "
            "take the tokenizer folder of the diffusers pipeline as it is"
        )
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    return text


def token_ids(where: str, tokenizer: Any, texts: list[str], max_tokens: int, prompts: list[str]) -> list[list[int]]:
    """The tokens of each text, at most max_tokens of them. A warning names the captions that were cut."""
    whole: list[list[int]] = tokenizer(texts)["input_ids"]
    cut = [(p, len(ids) - max_tokens) for p, ids in zip(prompts, whole, strict=True) if len(ids) > max_tokens]
    if not cut:
        return whole
    named = "; ".join(f"{prompt[:60]!r} loses {lost}" for prompt, lost in cut[:SHOWN])
    more = f"; and {len(cut) - SHOWN} more" if len(cut) > SHOWN else ""
    warnings.warn(
        f"{where}: {len(cut)} of {len(texts)} captions have, in the template, more than {max_tokens} tokens and were "
        f"cut: {named}{more}; shorten them or raise max_tokens",
        TruncatedPrompt,
        stacklevel=3,
    )
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of similar lengths together, so that little padding is computed."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(tokenizer: Any, ids: Sequence[list[int]], width: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, width], int64 on the CPU, padded on the tokenizer's side."""
    if tokenizer.pad_token_id is None:
        raise ValueError("text encoder: the tokenizer has no padding token; set tokenizer.pad_token")
    tokens = torch.full((len(ids), width), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, sample in enumerate(ids):
        where = slice(0, len(sample)) if tokenizer.padding_side == "right" else slice(width - len(sample), width)
        tokens[row, where] = torch.tensor(sample, dtype=torch.int64)
        mask[row, where] = 1
    return tokens, mask
