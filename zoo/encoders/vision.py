"""Captions with their target images, for Z-Image's self-distillation (D-OPSD, arXiv 2605.05204).

The teacher's context: Qwen3-VL, whose language tower runs on the text encoder's own weights, reads one user turn, the
image before the text, in the very template of the text encoder, and hands out the same hidden state. The tower's
weights are the text encoder's tensors, not copies of them.

Rotary embedding: with text alone the three axes of Qwen3-VL's agree, so that the tower gives the text encoder's
features, as long as the base is the text encoder's too. Qwen3-VL-4B was trained with another base (5e6) than Qwen3-4B
(1e6). `rope="text"` takes the base that the weights were trained with; `rope="vision"` keeps Qwen3-VL's, as D-OPSD's
released code does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..context import Context
from ..place import fetched
from . import fingerprint, tokens, tower
from .zimage import ZImageTextEncoder

WHERE = "z-image-vision"
BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


class ZImageVisionEncoder:
    """Features of captions with images, in the text encoder's space.

    Args:
        text: the text encoder, which gives language weights, tokenizer, template and max_tokens.
        model: Qwen3VLForConditionalGeneration or Qwen3VLModel, in the text encoder's dtype; only its vision tower is
            used, and goes to the text encoder's device.
        image_processor: transformers' image processor of that model; its `size` decides how many tokens an image has.
        rope: "text" or "vision", see above.
    """

    family = WHERE

    def __init__(self, text: ZImageTextEncoder, model: Any, image_processor: Any, *, rope: str = "text") -> None:
        if rope not in ("text", "vision"):
            raise ValueError(f"{WHERE}: rope is {rope!r}, expected 'text' or 'vision'")
        full = model.model if hasattr(model, "lm_head") else model
        config = full.config
        self.text = text
        self.image_processor = image_processor
        self.rope = rope
        self.image_token = int(config.image_token_id)
        self.merge = int(config.vision_config.spatial_merge_size)
        self._check(config, full.visual.dtype)
        self.model = copy.copy(full)
        self.model._modules = dict(full._modules)
        self.model.language_model = _language(full.language_model, text, rope)
        self.model.visual.to(text.device)

    def _check(self, config: Any, dtype: torch.dtype) -> None:
        if dtype != self.text.model.dtype:  # module.to(dtype) would round the rotary frequencies as well
            raise ValueError(
                f"{WHERE}: the vision model is in {dtype}, the text encoder in {self.text.model.dtype}; load it with "
                f"from_pretrained(..., dtype={self.text.model.dtype})"
            )
        pad = self.text.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if pad != self.image_token:
            raise ValueError(
                f"{WHERE}: an image is token {self.image_token} to the vision model and {pad} to the text encoder's "
                f"tokenizer (<|image_pad|>); the two come from different families"
            )
        for name, mine in (("merge_size", self.merge), ("patch_size", config.vision_config.patch_size)):
            given = getattr(self.image_processor, name, None)
            if given != mine:
                raise ValueError(
                    f"{WHERE}: the image processor has {name} {given}, the vision model {mine}; load both from one "
                    f"folder"
                )

    @property
    def channels(self) -> int:
        return self.text.channels

    @property
    def max_tokens(self) -> int:
        return self.text.max_tokens

    @property
    def device(self) -> torch.device:
        return torch.device(self.text.model.device)

    @property
    def template(self) -> str:
        return self.text.render(BLOCK + "{prompt}")

    @cached_property
    def identity(self) -> dict[str, Any]:
        processor = self.image_processor.to_dict()
        kept = ("size", "image_mean", "image_std", "resample", "rescale_factor", "temporal_patch_size")
        vision = self.model.config.vision_config.to_dict()
        shape = ("depth", "hidden_size", "num_heads", "patch_size", "deepstack_visual_indexes", "spatial_merge_size")
        return {
            **self.text.identity,
            "family": self.family,
            "text encoder": self.text.fingerprint,
            "vision weights": fingerprint.weights(self.model.visual),
            "vision configuration": fingerprint.digest({name: vision.get(name) for name in shape}),
            "image processor": fingerprint.digest({name: _plain(processor.get(name)) for name in kept}),
            "template": fingerprint.digest(self.template),
            "rope": fingerprint.rope(self.model.language_model.config)["rope_theta"],
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint.join(self.identity)

    def encode(
        self, prompts: list[str], images: Tensor | Sequence[Any] | None = None, *, batch_size: int = 8
    ) -> Context:
        """Features [B, longest, C] with lengths [B], an image's tokens before its caption's.

        Args:
            images: [B, 3, H, W] in [0, 1], or a list of such [3, H, W] tensors or PIL images of any sizes; None for
                text alone. Values are rounded to 8 bits, which is what the vision tower was trained on.

        A caption is cut where the text encoder cuts it: max_tokens counts the text, image tokens come on top.
        """
        tokens.check_count(WHERE, "batch_size", batch_size)
        prompts = tokens.check_prompts(WHERE, prompts)
        pictures = None if images is None else _pictures(images, len(prompts))
        ids = self._text_ids(prompts, with_image=pictures is not None)
        rows: list[Tensor] = []
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            rows += self._encode(ids[chunk], None if pictures is None else pictures[chunk])
        lengths = torch.tensor([len(row) for row in rows])
        return Context(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, encoder=self.fingerprint)

    def _text_ids(self, prompts: list[str], with_image: bool) -> list[list[int]]:
        """Tokens of the template, one image token in them; the text's are at most max_tokens."""
        texts = [self.text.render(BLOCK * with_image + prompt) for prompt in prompts]
        block = len(self.text.tokenizer(BLOCK)["input_ids"]) * with_image
        ids = tokens.token_ids(WHERE, self.text.tokenizer, texts, self.max_tokens + block, prompts)
        for prompt, sample in zip(prompts, ids, strict=True):
            if sample.count(self.image_token) != with_image:
                raise ValueError(
                    f"{WHERE}: the caption {prompt[:60]!r} holds the image token <|image_pad|> itself; remove it"
                )
        return ids

    def _encode(self, ids: list[list[int]], pictures: list[Any] | None) -> list[Tensor]:
        device = self.text.model.device
        inputs: dict[str, Tensor] = {}
        if pictures is not None:
            seen = self.image_processor(images=pictures, return_tensors="pt")
            grids: Tensor = seen["image_grid_thw"]
            counts = (grids.prod(1) // self.merge**2).tolist()
            ids = [self._spread(sample, count) for sample, count in zip(ids, counts, strict=True)]
            inputs = {"pixel_values": seen["pixel_values"].to(device), "image_grid_thw": grids.to(device)}
        width = max(map(len, ids))
        input_ids = torch.zeros(len(ids), width, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(ids):
            input_ids[row, : len(sample)] = torch.tensor(sample)
            mask[row, : len(sample)] = 1
        inputs |= {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["mm_token_type_ids"] = (input_ids == self.image_token).int().to(device)
        with torch.no_grad():
            states = self.model(use_cache=False, **inputs).last_hidden_state
        return [state[: len(sample)] for state, sample in zip(states, ids, strict=True)]

    def _spread(self, sample: list[int], count: int) -> list[int]:
        """The one image token, as many times as the image has features."""
        at = sample.index(self.image_token)
        return sample[:at] + [self.image_token] * count + sample[at + 1 :]


def load_vision_encoder(
    vl_folder_or_hub_id: str | Path,
    text_encoder: ZImageTextEncoder,
    *,
    rope: str = "text",
    max_pixels: int | None = None,
) -> ZImageVisionEncoder:
    """Qwen3-VL's vision tower on top of a text encoder's language weights, on its device and in its dtype.

    Args:
        vl_folder_or_hub_id: a Qwen3-VL of the text encoder's size (Qwen/Qwen3-VL-4B-Instruct for Z-Image).
        max_pixels: larger images are made smaller before they are encoded; None keeps the folder's setting, which is
            far more than a target image needs: an image of 512 x 512 has 256 tokens, one of 1024 x 1024 has 1024.
    """
    from transformers import AutoConfig, AutoImageProcessor, Qwen3VLModel

    if not isinstance(text_encoder, ZImageTextEncoder):
        raise TypeError(
            f"load_vision_encoder: the text encoder is {type(text_encoder).__name__}, expected ZImageTextEncoder; "
            f"FLUX.2-klein sees images through klein_reference_context"
        )
    folder = fetched(vl_folder_or_hub_id, "load_vision_encoder", ["config.json", "*.safetensors"], ["*.json"])
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3_vl":
        raise ValueError(f"load_vision_encoder: {vl_folder_or_hub_id} holds a {config.model_type}, expected qwen3_vl")
    loaded: Any = Qwen3VLModel.from_pretrained(
        folder, dtype=text_encoder.model.dtype, use_safetensors=True, output_loading_info=True
    )
    model, report = loaded
    absent = [key for key in report["missing_keys"] if key.startswith("visual.")]
    if absent:
        raise ValueError(
            f"load_vision_encoder: {vl_folder_or_hub_id} lacks {len(absent)} weights of the vision tower, "
            f"{absent[0]} among them"
        )
    processor = AutoImageProcessor.from_pretrained(folder)
    if max_pixels is not None:
        tokens.check_count("load_vision_encoder", "max_pixels", max_pixels)
        smallest = min(processor.size["shortest_edge"], max_pixels)
        processor.size = type(processor.size)(shortest_edge=smallest, longest_edge=max_pixels)
    return ZImageVisionEncoder(text_encoder, model.eval().requires_grad_(False), processor, rope=rope)


def _language(language: Any, text: ZImageTextEncoder, rope: str) -> Any:
    """A language tower of the vision model's class, whose weights are the text encoder's own tensors."""
    _check_language(language.config, text)
    config = copy.deepcopy(language.config)
    if rope == "text":
        _set_rope_theta(config, fingerprint.rope(text.model.config)["rope_theta"])
    with torch.device("meta"):
        lower = tower.cut(type(language)(config), text.layers[0])
    mine, theirs = lower.state_dict(), text.model.state_dict()
    wrong = sorted(mine.keys() ^ theirs.keys()) + [
        f"{key} {list(mine[key].shape)} against {list(theirs[key].shape)}"
        for key in sorted(mine.keys() & theirs.keys())
        if mine[key].shape != theirs[key].shape
    ]
    if wrong:
        raise ValueError(
            f"{WHERE}: {len(wrong)} weights of the vision model's language tower and of the text encoder do not fit: "
            f"{'; '.join(wrong[:8])}; take a Qwen3-VL of the text encoder's size"
        )
    lower.load_state_dict(theirs, strict=True, assign=True)
    lower.rotary_emb = type(lower.rotary_emb)(config=config).to(text.model.device)  # its buffers were on meta
    return lower.eval().requires_grad_(False)


def _check_language(config: Any, text: ZImageTextEncoder) -> None:
    """Every number that is not a weight's shape, and yet decides what the weights compute."""
    other = text.model.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    differ = [
        f"{name} {getattr(config, name)} against {getattr(other, name)}"
        for name in (*names, "intermediate_size", "rms_norm_eps", "hidden_act", "attention_bias", "vocab_size")
        if getattr(config, name) != getattr(other, name)
    ]
    if differ:
        raise ValueError(
            f"{WHERE}: the vision model's language tower is not the text encoder's: {'; '.join(differ)}; take a "
            f"Qwen3-VL of the text encoder's size"
        )


def _set_rope_theta(config: Any, theta: float) -> None:
    if getattr(config, "rope_parameters", None) is not None:
        config.rope_parameters["rope_theta"] = theta
    else:
        config.rope_theta = theta


def _pictures(images: Tensor | Sequence[Any], count: int) -> list[Any]:
    """Images as RGB of 8 bits, one for each caption."""
    from PIL import Image

    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"{WHERE}: images have shape {list(images.shape)}, expected [batch, 3, height, width]")
    if isinstance(images, Image.Image) or not isinstance(images, (Tensor, Sequence)):
        raise TypeError(
            f"{WHERE}: images are one {type(images).__name__}, expected a tensor or a list, one for each caption"
        )
    if len(images) != count:
        raise ValueError(f"{WHERE}: {len(images)} images for {count} captions; each caption has one")
    return [image.convert("RGB") if isinstance(image, Image.Image) else _picture(image) for image in images]


def _picture(image: Any) -> Any:
    from ...images import pil_image

    if not isinstance(image, Tensor):
        raise TypeError(f"{WHERE}: an image is {type(image).__name__}, expected a torch.Tensor or a PIL image")
    if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"{WHERE}: an image has shape {list(image.shape)} and dtype {image.dtype}, expected floats [3, height, "
            f"width]"
        )
    values = image.detach().float().cpu()
    if not (float(values.min()) >= 0 and float(values.max()) <= 1):
        raise ValueError(
            f"{WHERE}: an image has values from {values.min().item():g} to {values.max().item():g}, expected [0, 1]"
        )
    return pil_image((values * 255).round().to(torch.uint8))


def _plain(value: Any) -> Any:
    """What json can hash: dict-like sizes and enumerations become plain."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return int(value) if hasattr(value, "value") else value
