"""Images to latents and back as diffusers' own pipelines do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    ZImagePipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from twostep.zoo import Autoencoder, load_autoencoder, miniature
from twostep.zoo.autoencoder import LatentSpace, autoencoder_config, pack, unpack
from twostep.zoo.encoders import encode_reference

from . import tiny_encoders
from .models import Case, flux2, relative_error, stock_model, z_image

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FAMILIES = pytest.mark.parametrize("family", ["z-image", "flux2"])


def z_image_vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    settings = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, **changes}
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        sample_size=32,
        use_post_quant_conv=False,
        **blocks,
        **settings,
    ).eval()


def vae_of(family: str) -> Any:
    return z_image_vae() if family == "z-image" else tiny_encoders.flux2_vae()


def pipeline_of(family: str) -> Any:
    if family == "z-image":
        model = stock_model(Case("z-image", z_image(cap_feat_dim=32)))
        parts = (vae_of(family), tiny_encoders.qwen3(), tiny_encoders.tokenizer(), model)
        return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), *parts)
    model = stock_model(Case("flux2", flux2(in_channels=16, joint_attention_dim=96)))
    parts = (vae_of(family), tiny_encoders.qwen3(Qwen3ForCausalLM), tiny_encoders.tokenizer(), model)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    return Flux2KleinPipeline(scheduler, *parts)


def images_of(height: int = 16, width: int = 24, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def last_latents_and_images(pipeline: Any, family: str) -> tuple[Tensor, Tensor]:
    """Of a whole run: the latents that the sampler ended with, and the images [0, 1] that became of them."""
    seen: list[Tensor] = []

    def keep(_: Any, __: int, ___: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(kwargs["latents"])
        return kwargs

    pipeline.set_progress_bar_config(disable=True)
    size = (16, 24) if family == "z-image" else (32, 48)
    noise = torch.randn(2, 4 if family == "z-image" else 16, 8, 12, generator=torch.Generator().manual_seed(1))
    more = {} if family == "z-image" else {"text_encoder_out_layers": (1, 2, 3)}
    images = pipeline(
        prompt=["a fox", "a whale"],
        height=size[0],
        width=size[1],
        num_inference_steps=2,
        guidance_scale=0.0 if family == "z-image" else 1.0,
        latents=noise,
        output_type="pt",
        callback_on_step_end=keep,
        **more,
    ).images
    latents = seen[-1]
    return latents if latents.dim() == 4 else latents.transpose(1, 2).unflatten(2, (8, 12)), images


@DTYPES
@FAMILIES
@torch.no_grad()
def test_decodes_latents_to_the_images_of_the_pipeline(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit on the pipeline's own network; frozen, as it is loaded, torch may choose other kernels for it."""
    pipeline_of(family).save_pretrained(tmp_path)
    pipeline = type(pipeline_of(family)).from_pretrained(tmp_path, dtype=dtype)
    latents, expected = last_latents_and_images(pipeline, family)
    images = Autoencoder(pipeline.vae).decode(latents)
    assert images.dtype == dtype and images.std() > 0.01
    assert torch.equal((images / 2 + 0.5).clamp(0, 1), expected.to(dtype))
    again = load_autoencoder(tmp_path, dtype=dtype).decode(latents)
    assert relative_error(again, images) <= 10 * torch.finfo(dtype).eps


@FAMILIES
@torch.no_grad()
def test_encoding_undoes_what_decoding_does_to_latents(family: str) -> None:
    """With the network itself cut out, latents -> z -> latents is the identity: float64, to rounding."""
    vae = vae_of(family).double()
    autoencoder = Autoencoder(vae)
    latents = torch.randn(2, autoencoder.channels, 4, 6, dtype=torch.float64)
    seen: list[Tensor] = []

    class Decoded:
        def __init__(self, z: Tensor) -> None:
            seen.append(z)
            self.sample = z

    class Encoded:
        @property
        def latent_dist(self) -> Encoded:
            return self

        def mode(self) -> Tensor:
            return seen[-1]

    with _replaced(vae, decode=Decoded, encode=lambda _: Encoded()):
        autoencoder.decode(latents)
        again = autoencoder.encode(torch.zeros(1, 3, 4, 4))
    assert float((seen[-1].flatten() - latents.flatten()).abs().max()) > 0.1  # z is something else
    assert torch.allclose(again, latents, rtol=0, atol=1e-13)


@contextmanager
def _replaced(vae: Any, **methods: Any) -> Iterator[None]:
    """An instance's methods for a while."""
    vae.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vae.__dict__[name]


@DTYPES
@torch.no_grad()
def test_encodes_kleins_references(dtype: torch.dtype) -> None:
    pipe = Flux2KleinPipeline.from_pretrained(tiny_encoders.klein(), transformer=None, dtype=dtype)
    images = images_of()
    latents = load_autoencoder(tiny_encoders.klein(), dtype=dtype).encode(images)
    assert latents.shape == (2, 16, 4, 6)
    assert torch.equal(latents, pipe._encode_vae_image(images.to(dtype), generator=None))
    assert torch.equal(encode_reference(pipe.vae, images / 2 + 0.5), latents)


@torch.no_grad()
def test_encodes_the_miniatures_images_as_it_does(tmp_path: Path) -> None:
    mini = miniature(untrained_seed=0)
    mini.vae.register_to_config(shift_factor=0.25, scaling_factor=1.7)
    mini.save(tmp_path)
    autoencoder, images = load_autoencoder(tmp_path), images_of(64, 64)
    posterior = mini.vae.encode(images).latent_dist
    latents = autoencoder.encode(images)
    assert torch.allclose(latents, (posterior.mean - 0.25) * 1.7, rtol=0, atol=1e-6)
    assert torch.equal(latents, mini.encode_images(images))
    drawn = autoencoder.encode(images, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, (posterior.sample(torch.Generator().manual_seed(3)) - 0.25) * 1.7)
    assert torch.equal(autoencoder.decode(latents), mini.decode_latents(latents))
    assert (autoencoder.channels, autoencoder.factor, autoencoder.sample_size) == (4, 4, 64)


def test_the_space_of_published_models_comes_from_their_configurations() -> None:
    levels = {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}
    z_image = LatentSpace.of({"_class_name": "AutoencoderKL", "latent_channels": 16, **levels})
    klein = LatentSpace.of({"_class_name": "AutoencoderKLFlux2", "latent_channels": 32, **levels})
    assert z_image == LatentSpace(16, 8, 1024) and klein == LatentSpace(128, 16, 1024)
    for family in ("z-image", "flux2"):
        autoencoder = Autoencoder(vae_of(family))
        latents = autoencoder.encode(images_of(count=1))
        assert latents.shape == (1, autoencoder.channels, 16 // autoencoder.factor, 24 // autoencoder.factor)
        assert autoencoder.decode(latents).shape == (1, 3, 16, 24)


def test_packing_puts_the_pixels_of_a_square_one_behind_the_other() -> None:
    z = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    packed = pack(z)
    for channel, row, column in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (1, 1, 1)):
        assert torch.equal(packed[:, channel * 4 + row * 2 + column], z[:, channel, row::2, column::2])
    assert torch.equal(unpack(packed), z)


def test_is_frozen_and_lets_gradients_through() -> None:
    autoencoder = load_autoencoder(tiny_encoders.klein())
    assert not autoencoder.vae.training and not any(p.requires_grad for p in autoencoder.vae.parameters())
    latents = torch.randn(1, 16, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(autoencoder.decode(latents).sum(), latents)
    assert gradient.abs().sum() > 0


@FAMILIES
def test_says_what_is_wrong_with_images_and_latents(family: str) -> None:
    autoencoder = Autoencoder(vae_of(family))
    step, wrong = autoencoder.factor, 16 + autoencoder.factor // 2
    for shape in ([1, 3, 16, wrong], [1, 4, 16, 16], [3, 16, 16], [0, 3, 16, 16]):
        with pytest.raises(ValueError, match=rf"images have shape .*{shape[-1]}\], expected .* divisible by {step}"):
            autoencoder.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"torch\.uint8, expected floats in \[-1, 1\]"):
        autoencoder.encode(torch.ones(1, 3, 16, 16, dtype=torch.uint8))
    for value in (1.01, -1.01, float("nan"), float("inf")):
        images = torch.zeros(1, 3, 16, 16)
        images[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"images have values from .*, expected \[-1, 1\]"):
            autoencoder.encode(images)
    rounded = torch.full((1, 3, 16, 16), 1 + 2.0**-9)
    assert torch.isfinite(autoencoder.encode(rounded)).all()
    for latents in (torch.zeros(1, 5, 4, 4), torch.zeros(autoencoder.channels, 4, 4)):
        with pytest.raises(ValueError, match=rf"latents have shape .* expected \[batch, {autoencoder.channels}, heig"):
            autoencoder.decode(latents)


def test_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no vae/ with a config\.json"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="does not exist; expected a diffusers folder, or a hub id"):
        load_autoencoder(tmp_path / "no")
    z_image_vae().save_pretrained(tmp_path / "vae")
    assert LatentSpace.of(autoencoder_config(tmp_path)) == LatentSpace(4, 2, 32)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["encoder.conv_in.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, for instance encoder\.conv_in\.weight"):
        load_autoencoder(tmp_path)
    stock_model(Case("z-image", z_image())).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="ZImageTransformer2DModel; known are AutoencoderKL, AutoencoderKLFlux2"):
        load_autoencoder(tmp_path, subfolder="other")


def test_a_model_without_a_shift_has_none() -> None:
    vae = z_image_vae(shift_factor=None)
    with torch.no_grad():
        latents = Autoencoder(vae).encode(images_of())
        assert torch.allclose(latents, vae.encode(images_of()).latent_dist.mean * 0.3611)
    assert isinstance(tiny_encoders.flux2_vae(), AutoencoderKLFlux2)
