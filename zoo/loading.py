"""`load_backbone`: a diffusers folder or hub id becomes a Backbone. config.json says which class it is.

Loading is diffusers' own: meta-device initialisation, sharded safetensors, any dtype. Only safetensors are read;
pickled weights could run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel

from .backbone import Backbone
from .flux2.backbone import Flux2Backbone
from .fuse import fuse
from .place import check_loaded, fetched, inside
from .variant import variant_of
from .z_image.backbone import ZImageBackbone

# The classes that can be loaded. Adding a backbone is described in docs/zoo.md.
FAMILIES: dict[str, tuple[Any, type[Backbone]]] = {
    "ZImageTransformer2DModel": (ZImageTransformer2DModel, ZImageBackbone),
    "Flux2Transformer2DModel": (Flux2Transformer2DModel, Flux2Backbone),
}


BESIDE = ("model_index.json", "scheduler/*")  # what tells of a transformer in a pipeline, beside its own folder
# Settings of a scheduler that change a pipeline's sigma grid and are not followed here.
UNKNOWN = (
    *("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "stochastic_sampling"),
)


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
            `transformer` is taken), or a hub id "owner/name" or "owner/name@revision". A folder may hold the weights
            as one variant (fp16).
        fused: run on twostep.ops; False keeps the stock modules.
        subfolder: where the transformer lies, if not in `transformer`: "transformer_2" of an exported student.
        revision: of the hub repository, instead of behind its name.
        embedded_guidance: for FLUX.2 models that were distilled with a guidance input.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"load_backbone: dtype is {dtype!r}, expected a torch.dtype such as torch.bfloat16")
    of_hub = not Path(path).expanduser().is_dir()
    part = "transformer" if subfolder is None and of_hub else subfolder
    weights = [inside(part, name) for name in ("config.json", "*.safetensors")]
    folder = fetched(path, "load_backbone", weights, [inside(part, "*.json"), *BESIDE], revision)
    if part is None and (folder / "model_index.json").is_file():
        part = "transformer"
    stock, backbone = family_of(path, config_of(folder, part))
    model = _weights(stock, folder, part, dtype)
    if fused:
        fuse(model)
    keywords: dict[str, Any] = {}
    if embedded_guidance is not None:
        if backbone is not Flux2Backbone:
            raise ValueError(f"load_backbone: embedded_guidance is for FLUX.2, and {path} is a {stock.__name__}")
        keywords["embedded_guidance"] = embedded_guidance
    if backbone is ZImageBackbone:
        keywords.update(shift_of(folder, part))
    return backbone(model.to(device), **keywords).eval()


def config_of(folder: Path, subfolder: str | None) -> dict[str, Any]:
    file = Path(folder, subfolder or "", "config.json")
    if not file.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(
            f"load_backbone: {file} is missing, so {folder} is no diffusers model; it holds "
            f"{', '.join(there) or 'nothing'}"
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


def shift_of(folder: Path, subfolder: str | None) -> dict[str, Any]:
    """The scheduler's shift, where the transformer lies in a pipeline, also if its own folder was given; and why that
    may not be the pipeline's sigma grid."""
    own = folder.resolve()
    if not subfolder and (own.parent / "model_index.json").is_file():
        folder, subfolder = own.parent, own.name
    if not subfolder:
        return {}  # a transformer alone
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {"doubt": f"{folder} has no scheduler/, and the sigma grid is Z-Image-Turbo's"}
    config = _read_json(file)
    other = [name for name in UNKNOWN if config.get(name)]
    found: dict[str, Any] = {} if "use_dynamic_shifting" in other else {"shift": float(config.get("shift", 1.0))}
    if other:
        instead = f"shift {found['shift']:g} alone" if found else "Z-Image-Turbo's shift"
        found["doubt"] = f"{file} has {', '.join(other)}, and the sigma grid is that of {instead}"
    return found


def family_of(path: str | Path, config: dict[str, Any]) -> tuple[Any, type[Backbone]]:
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"load_backbone: {path} is a {name or 'model of unknown class (no _class_name in config.json)'}; supported "
            f"are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def _weights(stock: Any, folder: Path, subfolder: str | None, dtype: torch.dtype) -> torch.nn.Module:
    path = folder / (subfolder or "")
    variant = variant_of(path)
    _check_shards(path, variant)
    before = torch.get_default_dtype()
    try:
        model, report = stock.from_pretrained(
            path,
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
