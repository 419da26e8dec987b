"""A text encoder from a diffusers pipeline: the pipeline's class says which family it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..file_identity import identity_of
from ..place import fetched, here
from ..variant import variant_of
from .fingerprint import digest
from .klein import KleinTextEncoder
from .protocol import TextEncoder
from .zimage import ZImageOmniTextEncoder, ZImageTextEncoder

FAMILIES: dict[str, Any] = {
    "ZImagePipeline": ZImageTextEncoder,
    "TwoStepZImagePipeline": ZImageTextEncoder,
    "ZImageImg2ImgPipeline": ZImageTextEncoder,
    "ZImageInpaintPipeline": ZImageTextEncoder,
    "ZImageControlNetPipeline": ZImageTextEncoder,
    "ZImageControlNetInpaintPipeline": ZImageTextEncoder,
    "ZImageOmniPipeline": ZImageOmniTextEncoder,
    "Flux2KleinPipeline": KleinTextEncoder,
    "TwoStepFlux2KleinPipeline": KleinTextEncoder,
    "Flux2KleinInpaintPipeline": KleinTextEncoder,
    "Flux2KleinKVPipeline": KleinTextEncoder,
}

WHO = "load_text_encoder"
NEEDED = ("model_index.json", "text_encoder/config.json", "text_encoder/*.safetensors", "tokenizer/*.json")
ALSO = ("text_encoder/*.json", "tokenizer/*")
WHOLE = 1 << 26  # bytes of a file that is read whole to tell it: a tokenizer's


def load_text_encoder(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> TextEncoder:
    """The text encoder of a diffusers pipeline, as that pipeline uses it.

    Args:
        folder_or_hub_id: a pipeline's folder (model_index.json, text_encoder/, tokenizer/), or its name on the
            Hugging Face hub, owner/name[@revision]; nothing but these three is downloaded.
        settings: what the family's encoder takes: max_tokens; layers for klein; images for the omni model.

    Only the layers that the features need are kept, and only they reach the device.
    """
    import transformers

    folder = fetched(folder_or_hub_id, WHO, NEEDED, ALSO)
    index, pipeline = _pipeline_index(folder), _pipeline_class(folder)
    if pipeline not in FAMILIES:
        raise ValueError(
            f"load_text_encoder: {folder} holds a {pipeline}; text encoders are known for {', '.join(sorted(FAMILIES))}"
        )
    library, name = index.get("text_encoder") or ("", "")
    if library != "transformers" or not hasattr(transformers, name):
        raise ValueError(
            f"load_text_encoder: model_index.json of {folder} says that the text encoder is {name} of {library}, "
            f"expected a class of transformers such as Qwen3Model"
        )
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise ValueError(f"load_text_encoder: {folder} has no folder {part}/; download the pipeline again")
    weights = folder / "text_encoder"
    model = getattr(transformers, name).from_pretrained(
        weights, variant=variant_of(weights, "model"), dtype=dtype, use_safetensors=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = FAMILIES[pipeline](model.eval().requires_grad_(False), tokenizer, **settings)
    encoder.files = _identity(folder, pipeline, settings)
    encoder.model.to(device)
    return encoder


def text_encoder_files(folder_or_hub_id: str | Path) -> str | None:
    """`files` of the encoder that `load_text_encoder` would give, without settings; it is not loaded. None where the
    files are not on this machine.

    Equal ones tell the same encoder. Others may still be the same: weights in other shards.
    """
    folder = here(folder_or_hub_id, WHO, NEEDED, ALSO)
    return None if folder is None else _identity(folder, _pipeline_class(folder), {})


def _identity(folder: Path, pipeline: str, settings: Mapping[str, Any]) -> str:
    read = {path for pattern in (*NEEDED[1:], *ALSO) for path in folder.glob(pattern)}
    files = identity_of((path for path in read if path.is_file() and path.name[0] != "."), WHOLE)
    family = FAMILIES[pipeline].family if pipeline in FAMILIES else pipeline
    return digest([files, family, {name: repr(value) for name, value in settings.items()}])


def _pipeline_class(folder: Path) -> str:
    found = _pipeline_index(folder)["_class_name"]
    return found[-1] if isinstance(found, list) else found  # a file in the folder, and a class in it: an export


def _pipeline_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"load_text_encoder: {folder} has no model_index.json, so it is no diffusers pipeline"
        ) from None
    except ValueError as error:
        raise ValueError(f"load_text_encoder: {path} is not JSON: {error}") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"load_text_encoder: {path} names no pipeline class (_class_name)")
    return index
