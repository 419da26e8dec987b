"""The miniature's autoencoder: L1 + 2 L2 of the pixels, and a little KL, on drawn images that never come twice.

Edges are sharp and colours flat, so that L1 is what keeps them so; the KL is just enough for latents that a small
error leaves readable.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...zoo.miniature import samples
from ...zoo.miniature.architecture import calibrate_latents
from .fit import Fit, fit

KL = 1e-6  # for a nat of a whole latent's; at 1e-4 images stay blurred, at 21 dB
CALIBRATION = (0xCA11, 2048)  # a stream of its own, and how many of its images say where latents lie


def train_autoencoder(vae: AutoencoderKL, plan: Fit, folder: Path) -> None:
    """Trains it, and sets its shift and scaling factor."""

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = samples(plan.seed, step * plan.batch, plan.batch).images
        posterior = vae.encode(images).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - images
        error, nats = difference.square().mean(), posterior.kl().mean()
        return {
            "loss": difference.abs().mean() + 2 * error + KL * nats,
            "psnr": -10 * (error.detach() / 4).log10(),
            "nats": nats.detach(),
        }

    vae.train().requires_grad_(True)
    fit("autoencoder", dict(vae.named_parameters()), loss, plan, folder)
    vae.eval().requires_grad_(False)
    stream, count = CALIBRATION
    calibrate_latents(vae, samples(stream, 0, count).images)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, seed: int, count: int, at_once: int = 64) -> float:
    """The mean over images, in dB, from the posterior's mode."""
    found = []
    for start in range(0, count, at_once):
        images = samples(seed, start, min(at_once, count - start)).images
        again = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        found.append(-10 * ((again - images) / 2).square().mean((1, 2, 3)).log10())
    return float(torch.cat(found).mean())
