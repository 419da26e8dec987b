"""Images [B, 3, H, W] in [-1, 1] and the latents [B, C, H / factor, W / factor] that backbones speak, for each family.

    AutoencoderKL         Z-Image, the miniature    x = (z - shift) * scale                  z [C, H / 8, W / 8]
    AutoencoderKLFlux2    FLUX.2                    x = (pack(z) - mean) / sqrt(var + eps)   z [C / 4, H / 8, W / 8]

z is the mode of the posterior, or a draw from it. pack moves 2 x 2 latent pixels into channels; mean and var are the
running statistics of the autoencoder's batch norm, a number a packed channel. Everything is computed in the
autoencoder's dtype and in the order in which diffusers' pipelines compute it: the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

from .place import check_loaded, fetched
from .variant import variant_of

KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLFlux2": AutoencoderKLFlux2}
ROUNDING = 2.0**-8  # half of bfloat16's spacing just above 1: what lies further out was not rounded there


@dataclass(frozen=True)
class LatentSpace:
    channels: int  # of what a backbone sees
    factor: int  # pixels of a latent, in each direction
    sample_size: int  # pixels of a side of the square that the model was made for

    @staticmethod
    def of(config: Mapping[str, Any]) -> LatentSpace:
        """From an autoencoder's configuration alone."""
        name = config.get("_class_name")
        if name not in KINDS:
            raise ValueError(f"autoencoder: it is a {name or 'model of unknown class'}; known are {', '.join(KINDS)}")
        packed = 2 if name == "AutoencoderKLFlux2" else 1
        factor = packed * 2 ** (len(config["block_out_channels"]) - 1)
        return LatentSpace(packed**2 * int(config["latent_channels"]), factor, int(config["sample_size"]))


class Autoencoder:
    """A pipeline's autoencoder with what that pipeline does to latents. Gradients flow where grad is on."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.space = LatentSpace.of({"_class_name": type(vae).__name__, **_public(vae.config)})

    @property
    def channels(self) -> int:
        return self.space.channels

    @property
    def factor(self) -> int:
        return self.space.factor

    @property
    def sample_size(self) -> int:
        return self.space.sample_size

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.vae.device)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of images in [-1, 1]: the posterior's mode, or, with a generator, a draw from it."""
        self._check_images(images)
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
        latents: Tensor
        if isinstance(self.vae, AutoencoderKLFlux2):
            mean, deviation = self._statistics()
            latents = (pack(z) - mean) / deviation
        else:
            latents = (z - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about in [-1, 1] and not clamped, of latents."""
        if latents.dim() != 4 or latents.shape[1] != self.channels or 0 in latents.shape[2:]:
            raise ValueError(
                f"autoencoder: latents have shape {list(latents.shape)}, expected [batch, {self.channels}, height, "
                f"width] of at least 1 x 1"
            )
        latents = latents.to(self.device, self.dtype)
        if isinstance(self.vae, AutoencoderKLFlux2):
            mean, deviation = self._statistics()
            z = unpack(latents * deviation + mean)
        else:  # None is diffusers' word for no shift
            z = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        images: Tensor = self.vae.decode(z).sample
        return images

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every packed channel, [1, C, 1, 1]."""
        norm = self.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(self.device, self.dtype)
        deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        return mean, deviation.to(self.device, self.dtype)

    def _check_images(self, images: Tensor) -> None:
        shape, step = list(images.shape), self.factor
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or shape[2] % step or shape[3] % step:
            raise ValueError(
                f"autoencoder: images have shape {shape}, expected [batch, 3, height, width] with height and width "
                f"divisible by {step}"
            )
        if not images.is_floating_point():
            raise ValueError(f"autoencoder: images are {images.dtype}, expected floats in [-1, 1]")
        least, most = (float(bound) for bound in torch.aminmax(images.detach()))
        if not (least >= -1 - ROUNDING and most <= 1 + ROUNDING):  # not: a NaN is no number in between either
            raise ValueError(
                f"autoencoder: images have values from {least:g} to {most:g}, expected [-1, 1]; what a decoder made "
                f"is to be clamped first"
            )


def load_autoencoder(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    subfolder: str = "vae",
) -> Autoencoder:
    """The autoencoder of a diffusers pipeline, frozen.

    Args:
        path_or_hub_id: a pipeline's folder, or its name on the Hugging Face hub; only safetensors are read.
        subfolder: where it lies in there.
    """
    config = autoencoder_config(path_or_hub_id, subfolder)
    LatentSpace.of(config)  # or an error that says which classes are known
    weights, rest = f"{subfolder}/*.safetensors", f"{subfolder}/*.json"
    folder = fetched(path_or_hub_id, "load_autoencoder", [weights], [rest]) / subfolder
    vae, report = KINDS[config["_class_name"]].from_pretrained(
        folder,
        variant=variant_of(folder),
        torch_dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    check_loaded(report, "load_autoencoder", f"{path_or_hub_id}/{subfolder}")
    return Autoencoder(vae.to(device).eval().requires_grad_(False))


def autoencoder_config(path_or_hub_id: str | Path, subfolder: str = "vae") -> dict[str, Any]:
    """Its configuration, without its weights."""
    folder = fetched(path_or_hub_id, "load_autoencoder", [f"{subfolder}/config.json"])
    if not (folder / subfolder / "config.json").is_file():
        raise ValueError(
            f"load_autoencoder: {folder} has no {subfolder}/ with a config.json; give a diffusers pipeline's folder "
            f"that holds its autoencoder"
        )
    config: dict[str, Any] = AutoencoderKL.load_config(folder / subfolder)  # any class's reads any
    return config


def pack(z: Tensor) -> Tensor:
    """[B, C, H, W] to [B, 4C, H / 2, W / 2]: the pixels of a 2 x 2 square stand one behind the other."""
    batch, channels, height, width = z.shape
    squares = z.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return squares.reshape(batch, channels * 4, height // 2, width // 2)


def unpack(latents: Tensor) -> Tensor:
    """What pack undoes."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return squares.reshape(batch, channels // 4, height * 2, width * 2)


def _public(config: Any) -> dict[str, Any]:
    """Without diffusers' own entries, among them the class's name as it was when the folder was written."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
