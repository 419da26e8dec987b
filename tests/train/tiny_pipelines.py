"""Tiny pipelines of both families with everything that training needs, saved as diffusers saves them, and data for
them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from PIL import Image
from transformers import Qwen3ForCausalLM

from tests.zoo import tiny_encoders
from tests.zoo.models import Case, flux2, stock_model
from twostep.zoo.miniature import samples
from twostep.zoo.miniature.architecture import Sizes, build
from twostep.zoo.miniature.model import _assemble

CAPTIONS = (
    "a red circle",
    "two shapes",
    "a small star at the top left",
    "a gray background",
    "a blue square",
    "a ring",
)
SMALL = Sizes(
    autoencoder_channels=(8, 8, 8),
    width=48,
    blocks=2,
    rope_axes=(8, 8, 8),
    text_width=32,
    text_layers=2,
    text_heads=2,
    text_key_value_heads=1,
    vision_width=32,
    vision_layers=1,
)


def z_image(folder: Path, seed: int = 0) -> Path:
    """The miniature's classes, smaller: 4 x 16 x 16 latents, and a vision-language twin beside the pipeline."""
    pieces = build(seed, SMALL)
    _stir(pieces.transformer)
    _assemble(pieces, torch.float32, "cpu").save(folder)
    return folder


def klein(folder: Path, seed: int = 0) -> Path:
    """FLUX.2-klein's classes: 16 x 8 x 8 latents of 32 x 32 pixels, and as many layers of text as klein reads."""
    case = Case("flux2", flux2(in_channels=16, joint_attention_dim=96, num_layers=1, num_single_layers=2))
    text = tiny_encoders.qwen3(Qwen3ForCausalLM, num_hidden_layers=28)
    parts = (tiny_encoders.flux2_vae(), text, tiny_encoders.tokenizer(), stock_model(case, seed))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    Flux2KleinPipeline(scheduler, *parts).save_pretrained(folder)
    return folder


PIPELINES = {"z-image": z_image, "klein": klein}


def prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


def images(folder: Path, side: int = 64, count: int = 6) -> Path:
    """Drawn images with their captions beside them."""
    target = folder / "images"
    target.mkdir()
    drawn = samples(seed=7, start=0, count=count)
    for number, (image, caption) in enumerate(zip(drawn.images, drawn.captions, strict=True)):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).resize((side, side)).save(target / f"{number}.png")
        (target / f"{number}.txt").write_text(caption)
    return target


def _stir(transformer: torch.nn.Module) -> None:
    """Away from an initialisation in which whole branches are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


__all__ = ["CAPTIONS", "PIPELINES", "images", "klein", "prompts", "z_image"]
