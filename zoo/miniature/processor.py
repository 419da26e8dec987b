"""Text and image for the vision-language twin, as Qwen3-VL's own processor prepares them.

transformers' `Qwen3VLProcessor` cannot be made without torchvision (its video half needs it), so its image half and the
tokenizer are joined here: one <|image_pad|> becomes as many as the image has merged patches, and they are marked for
M-RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature, PreTrainedTokenizerBase

from .tokenizer import IMAGE

FOLDER = "processor"


@dataclass(frozen=True)
class ImageTextProcessor:
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any  # Qwen2-VL's, which is Qwen3-VL's

    def __call__(self, captions: Sequence[str], images: Tensor | Sequence[Any]) -> BatchFeature:
        """What the twin's forward takes, for one user turn each: the image, then the caption.

        Args:
            captions: one for each image.
            images: [n, 3, height, width] in [-1, 1], or anything that the image processor takes, such as PIL images.
        """
        if len(captions) != len(images):
            raise ValueError(
                f"ImageTextProcessor: {len(captions)} captions and {len(images)} images, expected one each"
            )
        vision = (
            self._patches(images) if isinstance(images, Tensor) else self.image_processor(images, return_tensors="pt")
        )
        merged = self.image_processor.merge_size**2
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": caption}]}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            ).replace(IMAGE, IMAGE * (patches // merged), 1)
            for caption, patches in zip(captions, vision["image_grid_thw"].prod(1).tolist(), strict=True)
        ]
        text = self.tokenizer(texts, padding=True, return_tensors="pt")
        is_image = (text["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)).long()
        return BatchFeature({**text, **vision, "mm_token_type_ids": is_image})

    def _patches(self, images: Tensor) -> dict[str, Tensor]:
        """The image processor's arithmetic on a tensor, without its rounding to 8 bits and differentiable."""
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        n, channels, height, width = images.shape
        if height % (patch * merge) or width % (patch * merge):
            raise ValueError(
                f"ImageTextProcessor: images are {height} x {width}, expected multiples of {patch * merge}"
            )
        mean, std = (
            torch.tensor(moment, device=images.device, dtype=images.dtype).view(-1, 1, 1)
            for moment in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        pixels = (images / 2 + 0.5 - mean) / std
        rows, columns = height // patch, width // patch
        split = pixels.view(n, channels, rows // merge, merge, patch, columns // merge, merge, patch)
        # [n, row, column, row in merge, column in merge, channel, y, x]
        ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7)
        frames = ordered.unsqueeze(6).expand(*[-1] * 6, self.image_processor.temporal_patch_size, -1, -1)
        grid = torch.tensor([[1, rows, columns]]).repeat(n, 1)
        return {"pixel_values": frames.reshape(n * rows * columns, -1), "image_grid_thw": grid}

    def save(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder / FOLDER)

    @classmethod
    def load(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> ImageTextProcessor:
        return cls(tokenizer, AutoImageProcessor.from_pretrained(folder / FOLDER))
