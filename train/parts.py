"""What a run takes from its pipeline beside the transformer: encoders of text and images, and contexts made with them.

Each part is loaded when it is first asked for: a run on cached contexts and latents loads no large encoder of text, as
long as they were made by the model's own files.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..zoo.autoencoder import Autoencoder, LatentSpace, autoencoder_config, load_autoencoder
from ..zoo.context import Context
from ..zoo.context_cache import ContextCache, OnlineContexts
from ..zoo.encoders import (
    TextEncoder,
    ZImageTextEncoder,
    ZImageVisionEncoder,
    klein_reference_context,
    load_text_encoder,
    load_vision_encoder,
    text_encoder_files,
)
from ..zoo.saved_student import pipeline_path

TWIN = ("vision_tower", "processor")  # what a pipeline's folder has where it brings its own vision
CHEAP = 1 << 28  # bytes of a text encoder that is loaded just to check a cache: about a second from a disk


class TargetEncoder(Protocol):
    """Captions with the images that they belong to, as D-OPSD's teacher is conditioned on them."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def reads_images(self) -> bool:
        """It looks at pixels, which takes time; otherwise it is made of the context and the latents, at no cost."""

    def __call__(
        self, captions: Sequence[str], images: Tensor | None, context: Context, latents: Tensor | None
    ) -> Context:
        """Images [B, 3, H, W] in [-1, 1], or their latents where it reads none; the context is the captions' alone."""


class SharedContexts:
    """Contexts for several threads, one at a time; the text encoder is loaded when the first of them are wanted.

    Batches are made ahead in a thread while another one encodes captions for samples. An encoder that hands out several
    hidden states hooks its layers, and would take those of the other thread's captions for its own.
    """

    def __init__(self, parts: Parts, stored: ContextCache | None) -> None:
        self.stored = stored  # None: encoded as they are asked for
        self._parts = parts

    @property
    def encoder(self) -> str:
        """The fingerprint of what the contexts are made with."""
        with self._parts.lock:
            return self._source.encoder

    def __getitem__(self, captions: list[str]) -> Context:
        with self._parts.lock:
            return self._source[captions]

    @cached_property
    def _source(self) -> ContextCache | OnlineContexts:
        return OnlineContexts(self._parts.text_encoder) if self.stored is None else self.stored


class Parts:
    """
    Args:
        model: a pipeline's folder, its name on the Hugging Face hub (owner/name[@revision]), or "miniature" for the
            package's own.
        cache: contexts that `twostep cache` wrote; the empty caption's is taken from there, if it has it.
    """

    def __init__(
        self, model: str, *, dtype: torch.dtype, device: torch.device | str, cache: Path | None = None
    ) -> None:
        self.model, self.dtype, self.device, self.cache = model, dtype, torch.device(device), cache
        self.lock = threading.Lock()  # of the text encoder's use
        self._compared: set[Path] = set()  # caches whose encoder is known to be the model's

    @cached_property
    def path(self) -> str:
        """What loaders take: a folder or a hub id."""
        return pipeline_path(self.model)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return load_text_encoder(self.path, dtype=self.dtype, device=self.device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.path, dtype=self.dtype, device=self.device)

    @cached_property
    def latent_space(self) -> LatentSpace:
        """Channels and factor of latents, and the size of the model's images, from configurations alone."""
        return LatentSpace.of(autoencoder_config(self.path))

    def contexts(self, cache: Path | None) -> SharedContexts:
        """Contexts from a cache, or encoded as they are asked for."""
        if cache is None:
            return SharedContexts(self, None)
        stored = ContextCache(cache)
        if "text_encoder" in self.__dict__ or self._text_encoder_is_small():
            stored.check(self.text_encoder)
        elif cache not in self._compared:
            self._compare_files(stored)
            self._compared.add(cache)
        return SharedContexts(self, stored)

    @cached_property
    def empty(self) -> Context:
        """Of the empty caption, a batch of one."""
        contexts = self.contexts(self.cache)
        if contexts.stored is not None and "" not in contexts.stored:
            contexts = self.contexts(None)
        return contexts[[""]].to(self.device)

    def target_encoder(self, vision: str | None, max_pixels: int) -> TargetEncoder:
        """
        Args:
            vision: Z-Image: the Qwen3-VL that reads caption and image; None for a pipeline that brings its own.
            max_pixels: larger images are made smaller before it reads them.
        """
        text = self.text_encoder
        if text.family == "flux2-klein":
            if vision is not None:
                raise ValueError(
                    f"data.vision is {vision!r}, and {self.model} is a FLUX.2-klein, which sees images as references "
                    f"of its own: leave data.vision null"
                )
            return _References(text)
        if not isinstance(text, ZImageTextEncoder):
            raise ValueError(
                f"contexts of captions with images are known for z-image and flux2-klein, and {self.model} is a "
                f"{text.family}"
            )
        if vision is not None:
            return _Vision(load_vision_encoder(vision, text, max_pixels=max_pixels))
        if not all(Path(self.path, part).is_dir() for part in TWIN):
            raise ValueError(
                f"data.vision is null, and {self.model} has no {'/ and '.join(TWIN)}/ of its own: set data.vision to "
                f"the Qwen3-VL that reads captions with their images, such as Qwen/Qwen3-VL-4B-Instruct"
            )
        return _Vision(_twin(Path(self.path), text, max_pixels))

    def _text_encoder_is_small(self) -> bool:
        weights = Path(self.path, "text_encoder").glob("*.safetensors")
        return 0 < sum(file.stat().st_size for file in weights) <= CHEAP

    def _compare_files(self, stored: ContextCache) -> None:
        """ValueError where the contexts are another encoder's than the model's, which is loaded only if its files are
        not those that they were made by. A cache of before knows of no files."""
        if stored.files is None:
            return
        why, files = "it is not on this machine", text_encoder_files(self.path)
        if files == stored.files:
            return
        if files is not None:
            try:
                encoder = load_text_encoder(self.path)
            except (OSError, ValueError, SafetensorError) as error:
                why = f"it does not load: {error}"
            else:
                stored.check(encoder)
                return
        warnings.warn(
            f"contexts in {stored.folder} are taken for those of {self.model}'s text encoder, unseen: {why}",
            stacklevel=3,
        )


@dataclass(frozen=True)
class _References:
    """FLUX.2-klein's editing path: the images' own latents beside the captions."""

    text: TextEncoder
    reads_images: ClassVar[bool] = False

    @property
    def fingerprint(self) -> str:
        return self.text.fingerprint

    def __call__(
        self, captions: Sequence[str], images: Tensor | None, context: Context, latents: Tensor | None
    ) -> Context:
        assert latents is not None
        return klein_reference_context(context, latents)


@dataclass(frozen=True)
class _Vision:
    """Z-Image: a vision-language model on the text encoder's weights."""

    encoder: ZImageVisionEncoder
    reads_images: ClassVar[bool] = True

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint

    def __call__(
        self, captions: Sequence[str], images: Tensor | None, context: Context, latents: Tensor | None
    ) -> Context:
        assert images is not None
        return self.encoder.encode(list(captions), images / 2 + 0.5)


def _twin(folder: Path, text: ZImageTextEncoder, max_pixels: int) -> ZImageVisionEncoder:
    """The vision tower that lies in a pipeline's folder, on the text encoder's weights."""
    from transformers import Qwen3Model
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    from ..zoo.miniature.architecture import join_twin
    from ..zoo.miniature.processor import ImageTextProcessor

    dtype = text.model.dtype
    language = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=dtype)  # whole: `text` is cut
    tower = Qwen3VLVisionModel.from_pretrained(folder / TWIN[0], dtype=dtype)
    processor = ImageTextProcessor.load(folder, text.tokenizer).image_processor
    size = processor.size
    processor.size = type(size)(
        shortest_edge=min(size["shortest_edge"], max_pixels), longest_edge=min(size["longest_edge"], max_pixels)
    )
    twin = join_twin(language, tower, text.tokenizer).requires_grad_(False)
    return ZImageVisionEncoder(text, twin, processor)
