"""A text encoder from a diffusers pipeline: the pipeline's class says which family it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..file_identity import identity_of
from ..place import fetched, here
from ..variant import variant_of
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
NEEDED, ALSO = ("model_index.json", "text_encoder/*.safetensors", "tokenizer/*"), ("text_encoder/*.json",)


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
            Hugging Face hub; nothing but these three is downloaded.
        settings: what the family's encoder takes: max_tokens; layers for klein; images for the omni model.

    Only the layers that the features need are kept, and only they reach the device.
    """
    import transformers

    folder = fetched(folder_or_hub_id, WHO, NEEDED, ALSO)
    index = _pipeline_index(folder)
    pipeline = index["_class_name"]
    if isinstance(pipeline, list):  # a file in the folder, and a class in it: an exported student's
        pipeline = pipeline[-1]
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
    encoder.files = _identity(folder)
    encoder.model.to(device)
    return encoder


def text_encoder_files(folder_or_hub_id: str | Path) -> str | None:
    """`TextEncoder.files` of what `load_text_encoder` would give, which is not loaded; None where a hub's files are not
    on this machine."""
    folder = here(folder_or_hub_id, WHO, NEEDED, ALSO)
    return None if folder is None else _identity(folder)


def _identity(folder: Path) -> str:
    read = [path for pattern in (*NEEDED[1:], *ALSO) for path in folder.glob(pattern)]
    return identity_of(path for path in read if path.is_file())


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
