"""Tiny random text encoders, of transformers' own classes, in the folders that diffusers' own pipelines write.

Everything is built once per process and lives in one temporary folder. Weights are large enough for attention and the
feed-forward to matter: at the usual 0.02 a tiny model would hand its embeddings through.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "initializer_range": 0.2,
}


@cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="twostep-tiny-encoders-")


def folder(name: str) -> Path:
    return Path(scratch().name) / name


def tokenizer(**changes: Any) -> Qwen2Tokenizer:
    """Byte-level BPE without merges: every byte of a text is a token, special tokens are one each."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[], **changes)
    made.add_tokens(SPECIAL, special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def qwen3(kind: Any = Qwen3Model, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {**TEXT, "vocab_size": len(tokenizer()), "rope_parameters": ROPE, **changes}
    return kind(Qwen3Config(**settings)).eval()


def qwen3_vl(seed: int = 1, **changes: Any) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    names = tokenizer()
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": len(names), "rope_parameters": rope, **changes},
        vision_config=VISION,
        image_token_id=names.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=names.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=names.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=names.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )


def flux2_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(2)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    ).eval()
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


@cache
def zimage() -> Path:
    return _saved(
        "z-image",
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=qwen3(),
            tokenizer=tokenizer(),
            transformer=None,
        ),
    )


@cache
def zimage_omni() -> Path:
    return _saved(
        "z-image-omni",
        ZImageOmniPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=qwen3(),
            tokenizer=tokenizer(),
            transformer=None,
            siglip=None,
            siglip_processor=None,
        ),
    )


@cache
def klein() -> Path:
    return _saved(
        "klein",
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=flux2_vae(),
            text_encoder=qwen3(Qwen3ForCausalLM),
            tokenizer=tokenizer(),
            transformer=None,
        ),
    )


@cache
def vision() -> Path:
    path = folder("qwen3-vl")
    qwen3_vl().save_pretrained(path)
    image_processor().save_pretrained(path)
    return path


def _saved(name: str, pipeline: DiffusionPipeline) -> Path:
    path = folder(name)
    pipeline.save_pretrained(path)
    return path
