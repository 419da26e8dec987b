"""Do images show what their captions say? Each alignment is a callable: images and captions in, named numbers out.

`MiniatureAlignment` reads images with the miniature's detector and checks every claim of the caption. `ClipScore` is
100 max(cos(image, caption), 0) of CLIP's embeddings, the mean over images (arXiv 2104.08718, there with 2.5 for 100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twostep.zoo.miniature.captions import claims_of
from twostep.zoo.miniature.detector import Detector, check

from . import arguments
from .features import check_miniature_images, clip_image_embedding, load_model
from .preprocessing import Preprocessing, read_preprocessing


class Alignment(Protocol):
    def __call__(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """images: [N, 3, H, W] in [-1, 1], with a caption each."""
        ...


@dataclass(frozen=True)
class MiniatureAlignment:
    """`aligned`: the part of images that show all that is said. One number for each attribute that is claimed at all:
    the part of its claims that hold. `psnr`, dB: the mean distance to the drawing of what was seen, how cleanly it is
    drawn; the detector takes a blob for the nearest shape, so read the two together."""

    detector: Detector

    def __call__(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        check_miniature_images("MiniatureAlignment", images)
        arguments.check_labels("MiniatureAlignment", "captions", captions, len(images))
        found = check(self.detector, images, claims_of(captions).to(images.device))
        return {
            "aligned": found.aligned.double().mean().item(),
            **found.accuracies,
            "psnr": found.psnr.double().mean().item(),
        }


@dataclass(frozen=True)
class ClipScore:
    """`clip_score`: see the top of the file; `load_clip_score` makes it from a folder."""

    model: Any  # transformers' CLIPModel
    tokenizer: Any
    preprocessing: Preprocessing
    truncate: bool
    batch: int

    def __call__(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        return {"clip_score": self.scores(images, captions).double().mean().item()}

    @torch.no_grad()
    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """[N], float32: of each image."""
        arguments.check_images("ClipScore", images)
        arguments.check_labels("ClipScore", "captions", captions, len(images))
        parts = zip(images.split(self.batch), range(0, len(images), self.batch), strict=True)
        return torch.cat([self._scores(part, captions[start : start + len(part)]) for part, start in parts])

    def _scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        model = self.model
        pixels = self.preprocessing(images.to(model.device)).to(model.dtype)
        tokens = self._tokens(captions).to(model.device)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
        return 100 * F.cosine_similarity(clip_image_embedding(model, pixels).float(), text.float()).clamp_min(0)

    def _tokens(self, captions: Sequence[str]) -> Any:
        most = self.model.config.text_config.max_position_embeddings
        if not self.truncate:
            lengths = [len(ids) for ids in self.tokenizer(list(captions))["input_ids"]]
            if (longest := max(lengths)) > most:
                raise ValueError(
                    f"ClipScore: {captions[lengths.index(longest)]!r} has {longest} tokens and the model reads {most}; "
                    f"load_clip_score(..., truncate=True) judges images by the beginnings of such captions"
                )
        return self.tokenizer(list(captions), padding=True, truncation=True, max_length=most, return_tensors="pt")


def load_clip_score(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    truncate: bool = False,
    batch: int = 64,
) -> ClipScore:
    """CLIP score from a local folder of a CLIPModel, with its tokenizer and preprocessor.

    Args:
        truncate: cut captions that are longer than the model reads (77 tokens); otherwise they are an error.
        batch: images that go through the model at a time.
    """
    import transformers

    arguments.check_count("load_clip_score", "batch", batch)
    model, _ = load_model("load_clip_score", folder, {"clip": "CLIPModel"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ClipScore(model.to(device, dtype), tokenizer, read_preprocessing(folder), truncate, batch)
