"""From the words of a prompt to latents: text encoder, backbone and teacher against the pipeline that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, ZImageOmniPipeline, ZImagePipeline
from torch import Tensor
from transformers import Qwen3ForCausalLM

from twostep.zoo import Teacher, fuse, load_backbone, load_text_encoder, miniature
from twostep.zoo.encoders import encode_reference, klein_reference_context

from . import tiny_encoders
from .models import Case, flux2, relative_error, stock_model, z_image
from .test_teacher import vae_of

PROMPTS = ("a red fox", "a much longer caption about a blue whale in the sea at night")
SIZE = (8, 12)


def last_latents(pipeline: Any, **arguments: Any) -> Tensor:
    seen: list[Tensor] = []

    def keep(_: Any, __: int, ___: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(kwargs["latents"])
        return kwargs

    pipeline.set_progress_bar_config(disable=True)
    # The pipelines write their template into the list that they are given.
    prompts = {name: list(value) for name, value in arguments.items() if "prompt" in name}
    pipeline(**{**arguments, **prompts}, output_type="latent", callback_on_step_end=keep)
    return seen[-1]


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_z_image(guidance: float, tmp_path: Path) -> None:
    case = Case("z-image", z_image(cap_feat_dim=32))
    parts = (vae_of(case), tiny_encoders.qwen3(), tiny_encoders.tokenizer(), stock_model(case))
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), *parts)
    pipeline.save_pretrained(tmp_path)
    noise = torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(0))
    arguments = {"height": 16, "width": 24, "num_inference_steps": 4, "guidance_scale": guidance - 1, "latents": noise}
    true = last_latents(pipeline, prompt=PROMPTS, negative_prompt=["", ""], **arguments)
    encoder = load_text_encoder(tmp_path, dtype=torch.float32)
    teacher = Teacher(
        load_backbone(tmp_path, dtype=torch.float32), guidance=guidance, negative=encoder.encode([""]), steps=4
    )
    assert relative_error(teacher.sample(noise, encoder.encode(list(PROMPTS))), true) <= 1e-5


def test_the_omni_model_without_an_image(tmp_path: Path) -> None:
    """What load_text_encoder gives for it by default: captions of one segment."""
    case = Case("z-image", z_image(cap_feat_dim=32, in_channels=16))
    parts = (vae_of(case), tiny_encoders.qwen3(), tiny_encoders.tokenizer(), stock_model(case), None, None)
    pipeline = ZImageOmniPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), *parts)
    pipeline.save_pretrained(tmp_path)
    noise = torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(0))
    arguments = {"height": 16, "width": 24, "num_inference_steps": 2, "guidance_scale": 2.0, "latents": noise}
    true = last_latents(pipeline, prompt=PROMPTS, negative_prompt=["", ""], **arguments)
    encoder = load_text_encoder(tmp_path, dtype=torch.float32)
    teacher = Teacher(
        load_backbone(tmp_path, dtype=torch.float32), guidance=3.0, negative=encoder.encode([""]), steps=2
    )
    assert relative_error(teacher.sample(noise, encoder.encode(list(PROMPTS))), true) <= 1e-5


@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_klein(guidance: float, referenced: bool, tmp_path: Path) -> None:
    """With a reference image as well: the editing path, by the teacher and by the pipeline on a fused model."""
    case = Case("flux2", flux2(in_channels=16, joint_attention_dim=96))
    vae = tiny_encoders.flux2_vae()
    parts = (vae, tiny_encoders.qwen3(Qwen3ForCausalLM), tiny_encoders.tokenizer(), stock_model(case))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    pipeline = Flux2KleinPipeline(scheduler, *parts)
    pipeline.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path, dtype=torch.float32, layers=(1, 2, 3))
    context, negative = encoder.encode(list(PROMPTS)), encoder.encode([""])
    noise = torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(0))
    arguments = {"height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": guidance, "latents": noise}
    if referenced:
        image = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(1)) / 255
        arguments["image"] = picture(image)
        reference = encode_reference(vae, image)
        context = klein_reference_context(context, reference.expand(2, -1, -1, -1))
        negative = klein_reference_context(negative, reference)
    arguments["text_encoder_out_layers"] = (1, 2, 3)
    true = last_latents(pipeline, prompt=PROMPTS, **arguments)
    teacher = Teacher(load_backbone(tmp_path, dtype=torch.float32), guidance=guidance, negative=negative, steps=4)
    found = teacher.sample(noise, context)
    assert relative_error(found.flatten(2).transpose(1, 2), true) <= 1e-5
    fuse(pipeline.transformer)
    assert relative_error(last_latents(pipeline, prompt=PROMPTS, **arguments), true) <= 1e-5


def picture(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def test_the_miniature(tmp_path: Path) -> None:
    mini = miniature(untrained_seed=0)
    mini.save(tmp_path)
    prompts = ("a red circle above a green square", "a circle")
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    arguments = {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 2.0, "latents": noise}
    true = last_latents(mini.pipeline(), prompt=prompts, negative_prompt=["", ""], **arguments)
    encoder = load_text_encoder(tmp_path, dtype=torch.float32)
    teacher = Teacher(load_backbone(tmp_path, dtype=torch.float32), guidance=3.0, negative=encoder.encode([""]))
    assert relative_error(teacher.sample(noise, encoder.encode(list(prompts))), true) <= 1e-5
