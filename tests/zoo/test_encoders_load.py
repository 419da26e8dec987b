"""Which encoder a folder gives, and what its fingerprint tells apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from twostep.zoo.encoders import (
    KleinTextEncoder,
    ZImageOmniTextEncoder,
    ZImageTextEncoder,
    load_text_encoder,
)

from . import tiny_encoders


@pytest.mark.parametrize(
    ("folder", "kind", "settings"),
    [
        (tiny_encoders.zimage, ZImageTextEncoder, {}),
        (tiny_encoders.zimage_omni, ZImageOmniTextEncoder, {"images": 1}),
        (tiny_encoders.klein, KleinTextEncoder, {"layers": (1, 2)}),
    ],
)
def test_the_pipelines_class_names_the_family(folder, kind, settings: dict) -> None:
    encoder = load_text_encoder(str(folder()), max_tokens=100, **settings)
    assert type(encoder) is kind and encoder.max_tokens == 100
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    context = encoder.encode(["a fox"])
    assert context.encoder == encoder.fingerprint and context.encoder.startswith(encoder.family + ":")
    assert context.features.shape[2] == encoder.channels and context.features.dtype == torch.bfloat16
    assert context.features.device == encoder.device == torch.device("cpu")


def test_says_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; expected a diffusers folder"):
        load_text_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist; expected a diffusers folder, or a hub id"):
        load_text_encoder("nowhere")
    with pytest.raises(ValueError, match=r"has no model_index.json"):
        load_text_encoder(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_text_encoder(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="names no pipeline class"):
        load_text_encoder(tmp_path)
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(
        ValueError, match=r"holds a StableDiffusionPipeline; text encoders are known for .*ZImagePipeline"
    ):
        load_text_encoder(tmp_path)
    index.write_text(json.dumps({"_class_name": "ZImagePipeline", "text_encoder": ["here", "Mine"]}))
    with pytest.raises(ValueError, match="text encoder is Mine of here, expected a class of transformers"):
        load_text_encoder(tmp_path)
    shutil.copy(tiny_encoders.zimage() / "model_index.json", index)
    with pytest.raises(ValueError, match="has no folder text_encoder/"):
        load_text_encoder(tmp_path)


def test_takes_nothing_from_the_hub_but_the_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_encoders.zimage())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_text_encoder("owner/name").family == "z-image"
    encoder = ["text_encoder/config.json", "text_encoder/*.safetensors", "text_encoder/*.json"]
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert sorted(patterns) == sorted(["model_index.json", *encoder, "tokenizer/*.json", "tokenizer/*"])


def reference(**changes) -> ZImageTextEncoder:
    parts = {"model": tiny_encoders.qwen3(), "tokenizer": tiny_encoders.tokenizer(), "max_tokens": 512, **changes}
    return ZImageTextEncoder(parts.pop("model"), parts.pop("tokenizer"), **parts)


def test_one_encoder_has_one_fingerprint() -> None:
    fingerprint = load_text_encoder(tiny_encoders.zimage(), dtype=torch.float32).fingerprint
    used = reference()
    used.encode(["a", "a longer caption"], batch_size=1)
    assert used.fingerprint == fingerprint
    # The precision of loading, and what the features do not depend on.
    assert load_text_encoder(tiny_encoders.zimage(), dtype=torch.bfloat16).fingerprint == fingerprint
    model = tiny_encoders.qwen3()
    with torch.no_grad():
        model.layers[-1].mlp.up_proj.weight.zero_()
        model.norm.weight.zero_()
    assert reference(model=model).fingerprint == fingerprint


def _one_value():
    model = tiny_encoders.qwen3()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[7, 9] *= 1.01  # two steps of bfloat16
    return {"model": model}


def _other_order():
    model = tiny_encoders.qwen3()
    weight = model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    return {"model": model}


def _template(text: str):
    tokenizer = tiny_encoders.tokenizer()
    tokenizer.chat_template = text
    return {"tokenizer": tokenizer}


def _another_token():
    tokenizer = tiny_encoders.tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    return {"tokenizer": tokenizer}


def _another_padding():
    tokenizer = tiny_encoders.tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    return {"tokenizer": tokenizer}


CHANGES = {
    "one value of one weight": _one_value,
    "the same values in another order": _other_order,
    "another rotary base": lambda: {
        "model": tiny_encoders.qwen3(rope_parameters={**tiny_encoders.ROPE, "rope_theta": 1e4})
    },
    "another epsilon": lambda: {"model": tiny_encoders.qwen3(rms_norm_eps=1e-5)},
    "a system prompt": lambda: _template("<|im_start|>system\nDraw.<|im_end|>\n" + tiny_encoders.TEMPLATE),
    "trimmed captions": lambda: _template(
        tiny_encoders.TEMPLATE.replace("{{ message.content }}", "{{ message.content | trim }}")
    ),
    "another token": _another_token,
    "another padding": _another_padding,
    "another maximum": lambda: {"max_tokens": 256},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_encoder_has_another_fingerprint(change) -> None:
    assert reference(**change()).fingerprint != reference().fingerprint


def test_families_and_layers_have_their_own_fingerprints() -> None:
    model, tokenizer = tiny_encoders.qwen3(), tiny_encoders.tokenizer()
    encoders = [
        ZImageTextEncoder(model, tokenizer),
        *(ZImageOmniTextEncoder(model, tokenizer, images=images) for images in (0, 1, 2)),
        *(KleinTextEncoder(model, tokenizer, layers=layers) for layers in ((3,), (1, 3), (3, 1), (2, 3))),
    ]
    assert len({encoder.fingerprint for encoder in encoders}) == len(encoders)


def test_thinking_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference().fingerprint
    off = KleinTextEncoder.render
    monkeypatch.setattr(ZImageTextEncoder, "render", off)
    assert reference().fingerprint != expected
