"""What makes features what they are, as hashes: two encoders with one fingerprint give the same features, up to
rounding.

Weights count with every bit: a sum of all their 64-bit words (7 GB/s on one core of a CPU, so about a second for a 4B
model), and a sample of values in order, which sees what a sum does not. They are rounded to bfloat16 first: an encoder
that is loaded in another precision, or to another device, is the same encoder. So are versions of libraries: only what
changes features is hashed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 64  # values of each parameter, evenly spread
# A bit of everything that tokenizers differ in: case, numbers, blanks, accents composed and not, other scripts,
# special tokens.
PROBE = "A Red fox,  12345.67 \n\t caf\u00e9 cafe\u0301 造像 \U0001f98a isn't <|im_end|>"
CONFIGURATION = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "use_sliding_window",
    "sliding_window",
)


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rope(config: Any) -> dict[str, Any]:
    """Rotary parameters, which older versions of transformers keep in two places."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        found = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    return {"rope_type": "default", **found}


def configuration(config: Any) -> str:
    return digest({"rope": rope(config), **{name: getattr(config, name, None) for name in CONFIGURATION}})


def weights(model: nn.Module) -> str:
    names, sums, samples = [], [], []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            words = _bits(parameter)  # [n] of int16
            whole = len(words) // 4 * 4
            names.append([name, list(parameter.shape)])
            total = words[:whole].view(torch.int64).sum() + words[whole:].sum(dtype=torch.int64)
            sums.append(total.cpu())
            samples.append(words[:: max(1, len(words) // SAMPLED)].cpu())
    return digest([names, torch.stack(sums).tolist(), torch.cat(samples).tolist()])


def _bits(parameter: Tensor) -> Tensor:
    values = parameter.detach().reshape(-1)
    values = values.to(torch.bfloat16) if values.is_floating_point() else values.contiguous().view(torch.uint8)
    if values.dtype == torch.uint8:  # quantised
        values = torch.nn.functional.pad(values, (0, len(values) % 2)).view(torch.int16)
    else:
        values = values.contiguous().view(torch.int16)
    return values.clone() if values.storage_offset() % 4 else values


def tokenizer(tokenizer: Any) -> str:
    """Vocabulary, padding, and what becomes of a text with a bit of everything."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return digest([vocabulary, tokenizer(PROBE)["input_ids"], tokenizer.pad_token_id, tokenizer.padding_side])


def identity(encoder: Any, rendered: list[str]) -> dict[str, Any]:
    """The parts of a text encoder's fingerprint; `rendered` are a few captions in the template."""
    return {
        "family": encoder.family,
        "weights": weights(encoder.model),
        "configuration": configuration(encoder.model.config),
        "tokenizer": tokenizer(encoder.tokenizer),
        "template": digest(rendered),
        "layers": list(encoder.layers),
        "max_tokens": encoder.max_tokens,
    }


def join(identity: dict[str, Any]) -> str:
    return f"{identity['family']}:{digest(identity)}"
