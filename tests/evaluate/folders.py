"""Tiny random vision models with their preprocessors, in folders as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from tests.zoo.tiny_encoders import tokenizer

PIXELS = 32
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": PIXELS, "patch_size": 8}


def dinov2(folder: Path) -> Any:
    return _saved(transformers.Dinov2Model, transformers.Dinov2Config(**SMALL), folder, _bit())


def dinov3(folder: Path) -> Any:
    config = transformers.DINOv3ViTConfig(**SMALL, intermediate_size=48, num_register_tokens=2)
    return _saved(transformers.DINOv3ViTModel, config, folder, _bit())


def clip_vision(folder: Path) -> Any:
    config = transformers.CLIPVisionConfig(**SMALL, intermediate_size=48, projection_dim=20)
    return _saved(transformers.CLIPVisionModelWithProjection, config, folder, _clip())


def clip(folder: Path) -> Any:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SMALL, "intermediate_size": 48, "projection_dim": 20}, projection_dim=20
    )
    model = _saved(transformers.CLIPModel, config, folder, _clip())
    _tokenizer(folder)
    return model


def llava(folder: Path, template: str | None = "", start: bool = False) -> Any:
    """LLaVA on bytes, whose Yes is the token of Y. With `start` a token begins every text, and the template too."""
    vision = transformers.CLIPVisionConfig(**SMALL, intermediate_size=48)
    names = tokenizer()
    names.add_tokens(["<image>"], special_tokens=True)
    names.pad_token, names.chat_template = names.eos_token, None
    if start:
        names.bos_token = "<|im_start|>"
        token = (names.bos_token, names.bos_token_id)
        names.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    text = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=len(names),
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=names.convert_tokens_to_ids("<image>")
    )
    ask = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    processor = transformers.LlavaProcessor(
        _clip(), names, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="<|im_start|>" * start + ask + "{% endfor %}A:" if template == "" else template,
    )  # fmt: skip
    return _saved(transformers.LlavaForConditionalGeneration, config, folder, processor, std=0.8)


def _saved(kind: Any, config: Any, folder: Path, processor: Any, std: float = 0.2) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():  # the library's own start is so small that all images look alike
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def _bit() -> Any:
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": PIXELS, "width": PIXELS}, resample=3
    )


def _clip() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=PIXELS)


def _tokenizer(folder: Path) -> None:
    """Letters, alone and at the end of a word: CLIP's byte pairs without any merge."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
