"""`load_backbone`: a diffusers folder or hub id becomes a Backbone. config.json says which class it is.

Loading is diffusers' own: meta-device initialisation, sharded safetensors, any dtype. Only safetensors are read;
pickled weights could run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel, ZImageTransformer2DModel
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .backbone import Backbone
from .flux2.backbone import Flux2Backbone
from .fuse import fuse
from .place import check_loaded, folder_or_hub_id
from .variant import variant_of
from .z_image.backbone import ZImageBackbone

# The classes that can be loaded. Adding a backbone is described in docs/zoo.md.
FAMILIES: dict[str, tuple[Any, type[Backbone]]] = {
    "ZImageTransformer2DModel": (ZImageTransformer2DModel, ZImageBackbone),
    "Flux2Transformer2DModel": (Flux2Transformer2DModel, Flux2Backbone),
}


def load_backbone(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    fused: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    embedded_guidance: float | None = None,
) -> Backbone:
    """The transformer in a diffusers folder or hub repository, as a Backbone on `device` in `dtype`.

    Args:
        path: a transformer's folder (config.json beside safetensors), a pipeline's folder (model_index.json; its
            `transformer` is taken), or a hub id "owner/name". A folder may hold the weights as one variant (fp16).
        fused: run on twostep.ops; False keeps the stock modules.
        subfolder: where the transformer lies, if not in `transformer`: "transformer_2" of an exported student.
        revision: of the hub repository.
        embedded_guidance: for FLUX.2 models that were distilled with a guidance input.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"load_backbone: dtype is {dtype!r}, expected a torch.dtype such as torch.bfloat16")
    path = folder_or_hub_id(path, "load_backbone")
    local = isinstance(path, Path)
    if subfolder is None and (not local or Path(path, "model_index.json").is_file()):
        subfolder = "transformer"
    stock, backbone = family_of(path, config_of(path, subfolder, revision, local))
    model = _weights(stock, path, subfolder, revision, local, dtype)
    if fused:
        fuse(model)
    keywords: dict[str, Any] = {}
    if embedded_guidance is not None:
        if backbone is not Flux2Backbone:
            raise ValueError(f"load_backbone: embedded_guidance is for FLUX.2, and {path} is a {stock.__name__}")
        keywords["embedded_guidance"] = embedded_guidance
    if backbone is ZImageBackbone:
        keywords.update(shift_of(path, subfolder, revision, local))
    return backbone(model.to(device), **keywords).eval()


def config_of(path: str | Path, subfolder: str | None, revision: str | None, local: bool) -> dict[str, Any]:
    if not local:
        try:  # any model's class reads the config of any: they have the name of the file in common
            return ZImageTransformer2DModel.load_config(str(path), subfolder=subfolder, revision=revision)
        except OSError as error:
            where = f"{path}/{subfolder}" if subfolder else str(path)
            raise OSError(
                f"load_backbone: there is no folder {path} here, and config.json of {where} could not be had from the "
                f"hub or its cache. {error}"
            ) from error
    file = Path(path, subfolder or "", "config.json")
    if not file.is_file():
        inside = sorted(entry.name for entry in Path(path).iterdir())[:8]
        raise ValueError(
            f"load_backbone: {file} is missing, so {path} is no diffusers model; it holds "
            f"{', '.join(inside) or 'nothing'}"
        )
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"load_backbone: {file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"load_backbone: {file} holds a {type(found).__name__}, expected a JSON object")
    return found


def shift_of(path: str | Path, subfolder: str | None, revision: str | None, local: bool) -> dict[str, float]:
    """The scheduler's shift, where the transformer lies in a pipeline, also if its own folder was given."""
    own = Path(path).resolve()
    if subfolder is None and (own.parent / "model_index.json").is_file():
        path, subfolder = own.parent, own.name
    if subfolder is None or (local and not Path(path, "scheduler", "scheduler_config.json").is_file()):
        return {}
    try:
        config = FlowMatchEulerDiscreteScheduler.load_config(str(path), subfolder="scheduler", revision=revision)
    except OSError as error:
        absent = error.__context__
        if not isinstance(absent, EntryNotFoundError) or isinstance(absent, LocalEntryNotFoundError):
            raise  # the hub could not be asked
        return {}
    return {} if config.get("use_dynamic_shifting") else {"shift": float(config.get("shift", 1.0))}


def family_of(path: str | Path, config: dict[str, Any]) -> tuple[Any, type[Backbone]]:
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"load_backbone: {path} is a {name or 'model of unknown class (no _class_name in config.json)'}; supported "
            f"are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def _weights(
    stock: Any, path: str | Path, subfolder: str | None, revision: str | None, local: bool, dtype: torch.dtype
) -> torch.nn.Module:
    variant = None
    if local:
        weights = Path(path, subfolder or "")
        variant = variant_of(weights)
        _check_shards(weights, variant)
    before = torch.get_default_dtype()
    try:
        model, report = stock.from_pretrained(
            path,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except AssertionError as error:
        raise ValueError(
            f"load_backbone: diffusers makes no {stock.__name__} of the config in {path}"
            f"{f': {error}' if str(error) else ', whose numbers contradict each other'}"
        ) from error
    finally:
        torch.set_default_dtype(before)  # diffusers changes it on the way, and leaves it so where it fails
    check_loaded(report, "load_backbone", str(path))
    return model


def _check_shards(folder: Path, variant: str | None) -> None:
    """Names every shard that the index wants and the folder lacks."""
    indices = list(folder.glob(f"*.safetensors.index{'' if variant is None else f'.{variant}'}.json"))
    if not indices:
        if not list(folder.glob("*.safetensors")):
            raise ValueError(f"load_backbone: {folder} has a config.json and no .safetensors beside it")
        return
    listed = _read_json(indices[0]).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"load_backbone: {indices[0]} has no weight_map, so it is no index of shards")
    wanted = set(listed.values())
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        raise ValueError(
            f"load_backbone: {folder} lacks {len(missing)} of {len(wanted)} shards that {indices[0].name} lists: "
            f"{', '.join(missing[:4])}; the download or copy is not complete"
        )
