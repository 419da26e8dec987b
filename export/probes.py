"""The same few images from a student here and from what was written elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..zoo import Student, load_text_encoder
from ..zoo.autoencoder import load_autoencoder
from ..zoo.text_to_image import TextToImage

PROMPTS = ("a red circle above a green square", "two shapes", "")
FLOAT32 = 1e-5  # largest relative error of images computed in float32
NO_GUIDANCE = {"z-image": 0.0, "flux2": 1.0}  # as the pipelines count it


class Probes:
    def __init__(self, pipeline: Path, student: Student, dtype: torch.dtype = torch.float32) -> None:
        self._text = load_text_encoder(pipeline, dtype=dtype)
        self._autoencoder = load_autoencoder(pipeline, dtype=dtype)
        model = TextToImage(self._text, self._autoencoder, student)
        height, width = model.size()
        self.noise = model.noise(range(len(PROMPTS)), (height, width))
        self.context = model.contexts(PROMPTS)
        guidance = NO_GUIDANCE[student.distinct_networks()[0].family]
        self.settings: dict[str, Any] = {
            "height": height, "width": width, "num_inference_steps": student.steps, "guidance_scale": guidance
        }  # fmt: skip

    def images(self, student: Student) -> Tensor:
        """[N, 3, H, W] in [0, 1]."""
        model = TextToImage(self._text, self._autoencoder, student)
        return (model.images(model.latents(self.noise, self.context)) + 1) / 2
