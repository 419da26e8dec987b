"""Do images show what their captions say? Each alignment is a callable: images and captions in, named numbers out.

`MiniatureAlignment` reads images with the miniature's detector and checks every claim of the caption. `ClipScore` is
100 max(cos(image, caption), 0) of CLIP's embeddings, the mean over images (arXiv 2104.08718, there with 2.5 for 100).
`VqaScore` asks a model of vision and language whether the image shows the caption, and takes the probability of "Yes"
(VQAScore, arXiv 2404.01291): unlike CLIP it minds counts, places and relations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twostep.zoo.miniature.captions import claims_of
from twostep.zoo.miniature.detector import Detector, check

from ..images import pil_image, to_bytes
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


def _in_batches(
    name: str, score: Callable[[Tensor, Sequence[str]], Tensor], images: Tensor, captions: Sequence[str], batch: int
) -> Tensor:
    arguments.check_images(name, images)
    arguments.check_labels(name, "captions", captions, len(images))
    starts = range(0, len(images), batch)
    return torch.cat([score(images[start : start + batch], captions[start : start + batch]) for start in starts])


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
        return _in_batches("ClipScore", self._scores, images, captions, self.batch)

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


QUESTION = 'Does this figure show "{}"? Please answer yes or no.'  # the paper's, and the answer that is looked for
ANSWER = "Yes"


@dataclass(frozen=True)
class VqaScore:
    """`vqa_score`: see the top of the file; `load_vqa_score` makes it from a folder."""

    model: Any  # transformers' model for image and text to text
    processor: Any
    question: str
    answer: int  # the token
    batch: int

    def __call__(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        return {"vqa_score": self.scores(images, captions).double().mean().item()}

    @torch.no_grad()
    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """[N], float32: of each image, from 0 to 1."""
        return _in_batches("VqaScore", self._scores, images, captions, self.batch)

    def _scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        pixels = to_bytes(images.float())
        asked, start = [self._asked(caption) for caption in captions], self.processor.tokenizer.bos_token
        given = self.processor(
            text=asked,
            images=[[pil_image(image)] for image in pixels],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (start and asked[0].startswith(start)),  # many templates begin with it
        )
        model = self.model
        given = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in given.items()
            if torch.is_tensor(tensor)
        }
        logits = model(**given).logits[:, -1].float()  # padding stands on the left
        return logits.softmax(1)[:, self.answer].cpu()

    def _asked(self, caption: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.question.format(caption)}]
        asked: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return asked


def load_vqa_score(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    question: str = QUESTION,
    answer: str = ANSWER,
    batch: int = 16,
) -> VqaScore:
    """VQAScore from a local folder of a model that reads images and answers (Qwen-VL, LLaVA, ...), with its processor.

    Args:
        question: {} stands for the caption.
        answer: whose first token's probability is the score.
        batch: images that go through the model at a time.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    arguments.check_count("load_vqa_score", "batch", batch)
    if question.count("{}") != 1:
        raise ValueError(f"load_vqa_score: the question is {question!r}, expected one {{}} in it, for the caption")
    model, _ = load_model("load_vqa_score", folder, dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    if processor.chat_template is None:
        raise ValueError(f"load_vqa_score: {folder} has no chat template, by which questions are put to the model")
    processor.tokenizer.padding_side = "left"
    tokens = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"load_vqa_score: the answer {answer!r} has no tokens")
    return VqaScore(model.to(device, dtype), processor, question, tokens[0], batch)
