"""The miniature's networks: diffusers' and transformers' own classes, small. Every size is chosen here.

64 x 64 pixels -> 16 x 16 latents of 4 channels -> 8 x 8 = 64 image tokens of 16 values, beside 32 caption tokens: 96 in
all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

try:
    from transformers import Qwen2VLImageProcessorPil
except ImportError:  # before transformers 5 the one that runs on numpy bore the plain name
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

from .processor import ImageTextProcessor
from .shapes import SIDE
from .tokenizer import IMAGE, PAD, VIDEO, VISION_END, VISION_START, build_tokenizer

SHIFT = 3.0  # Z-Image-Turbo's


@dataclass(frozen=True)
class Sizes:
    latent_channels: int = 4
    autoencoder_channels: tuple[int, ...] = (16, 32, 64)  # three levels: the latents are a quarter as wide and high
    width: int = 128
    blocks: int = 4
    refiner_blocks: int = 1
    rope_axes: tuple[int, int, int] = (8, 12, 12)  # caption position, row, column; their sum is the width of a head
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_key_value_heads: int = 2
    vocabulary: int = 64
    vision_width: int = 64
    vision_layers: int = 2
    vision_patch: int = 8  # merged 2 x 2: 16 image tokens


LARGE = Sizes(width=384, blocks=10, refiner_blocks=2)  # 30 million parameters in the transformer, for a GPU


@dataclass(frozen=True)
class Pieces:
    transformer: ZImageTransformer2DModel
    vae: AutoencoderKL
    text_encoder: Qwen3Model
    vision_tower: Qwen3VLVisionModel
    tokenizer: PreTrainedTokenizerBase
    processor: ImageTextProcessor
    scheduler: FlowMatchEulerDiscreteScheduler


def build(seed: int, sizes: Sizes = Sizes()) -> Pieces:
    """All parts with random weights that depend on the seed alone; the process's own random state stays as it was."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = build_transformer(sizes)
        vae = build_autoencoder(sizes)
        text_encoder = Qwen3Model(_text_config(sizes, tokenizer))
        vision_tower = Qwen3VLVisionModel(_vision_config(sizes))
    return Pieces(
        transformer.eval(),
        vae.eval(),
        text_encoder.eval(),
        vision_tower.eval(),
        tokenizer,
        ImageTextProcessor(tokenizer, _image_processor(sizes)),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
    )


def build_transformer(sizes: Sizes) -> ZImageTransformer2DModel:
    heads = sizes.width // sum(sizes.rope_axes)
    return ZImageTransformer2DModel(
        in_channels=sizes.latent_channels,
        dim=sizes.width,
        n_layers=sizes.blocks,
        n_refiner_layers=sizes.refiner_blocks,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=sizes.text_width,
        axes_dims=list(sizes.rope_axes),
        axes_lens=[512, 64, 64],
    )


def build_autoencoder(sizes: Sizes) -> AutoencoderKL:
    levels = len(sizes.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.autoencoder_channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _language(sizes: Sizes) -> dict[str, int]:
    """What the text encoder and its twin share."""
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.text_width,
        "intermediate_size": 2 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": sizes.text_key_value_heads,
        "head_dim": sizes.text_width // sizes.text_heads,
        "max_position_embeddings": 512,
    }


def _text_config(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    if len(tokenizer) > sizes.vocabulary:
        raise ValueError(
            f"build: the tokenizer has {len(tokenizer)} tokens, the text encoder room for {sizes.vocabulary}"
        )
    return Qwen3Config(
        **_language(sizes),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        use_cache=False,
    )


def _vision_config(sizes: Sizes) -> Qwen3VLVisionConfig:
    return Qwen3VLVisionConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_width,
        intermediate_size=2 * sizes.vision_width,
        num_heads=2,
        patch_size=sizes.vision_patch,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=sizes.text_width,
        num_position_embeddings=(SIDE // sizes.vision_patch) ** 2,
        deepstack_visual_indexes=[0],
    )


def _image_processor(sizes: Sizes) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=sizes.vision_patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=SIDE * SIDE,
        max_pixels=SIDE * SIDE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def join_twin(
    text_encoder: Qwen3Model, vision_tower: Qwen3VLVisionModel, tokenizer: PreTrainedTokenizerBase
) -> Qwen3VLModel:
    """The vision-language twin: the text encoder's very parameters, seen by Qwen3-VL's class, behind a vision tower.

    The language weights are shared, not copied: they exist once in memory and once on disk, and stay the text encoder's
    whatever happens to it.
    """
    text = text_encoder.config
    half = text.head_dim // 2  # Qwen3-VL divides a head's rotations among time, height and width
    section = [half - 2 * (half // 3), half // 3, half // 3]
    shared = {name: getattr(text, name) for name in _language(Sizes())}
    config = Qwen3VLConfig(
        text_config=Qwen3VLTextConfig(
            **shared,
            rms_norm_eps=text.rms_norm_eps,
            pad_token_id=text.pad_token_id,
            rope_parameters={**text.rope_parameters, "mrope_section": section, "mrope_interleaved": True},
            use_cache=False,
        ).to_dict(),
        vision_config=vision_tower.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which the next lines replace
        twin = Qwen3VLModel(config)
    twin.visual = vision_tower
    twin.language_model.load_state_dict(text_encoder.state_dict(keep_vars=True), assign=True)
    # Buffers (RoPE's frequencies) are not in the state; the device is the only thing of theirs that can differ.
    return twin.to(text_encoder.device).eval()


def calibrate_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Sets the autoencoder's shift and scaling factor so that these images' latents have mean 0 and variance 1."""
    with torch.no_grad():
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode().float()
    shift, spread = latents.mean().item(), latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / spread)
