"""A student as LoRA files on its base, by the names that diffusers or ComfyUI look for.

    pytorch_lora_weights.safetensors      one adapter for all steps
    step_1.safetensors step_2.safetensors steps with parameters of their own
    export.json                           rank, base, and what was lost

Adapters leave as they were trained. Of whole weights the difference to the base is taken apart by singular values: of
each layer that adapters stand on (TARGETS) the best product of that rank; what is in other parameters stays behind, and
how much both leave behind is said. Scales are multiplied into the factors, so that no file needs an alpha.

    diffusers   transformer.layers.0.attention.to_q.lora_A.weight        pipeline.load_lora_weights(file)
    comfyui     diffusion_model.layers.0.attention.to_q.lora_A.weight    Z-Image
                diffusion_model.double_blocks.0.img_attn.qkv.lora_A...   FLUX.2: the original's names, q, k and v joined

diffusers reads both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..disk import check_space
from ..zoo import Backbone, Student, load_backbone
from ..zoo.adapters import TARGETS
from ..zoo.place import repository
from . import fresh_process
from .fresh_process import hold, relative
from .merging import Product, added, plain, products, with_weights
from .new_folder import new_folder, target_of
from .original import joined_factors, place
from .probes import FLOAT32, PROMPTS, Probes
from .quantizing import rounded
from .source import Exported, Source, found

KEYS = ("diffusers", "comfyui")
SEARCHED = 16  # directions beyond the rank that the search for singular vectors starts with
_PROBE = """
import diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
base = getattr(diffusers, facts["class"]).from_pretrained(
    facts["base"], revision=facts["revision"], subfolder=facts["subfolder"], torch_dtype=torch.float32)
pipeline = DiffusionPipeline.from_pretrained(facts["pipeline"], transformer=base, torch_dtype=torch.float32)
pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
pipeline.set_progress_bar_config(disable=True)
for number, file in enumerate(facts["files"]):
    pipeline.load_lora_weights(file, adapter_name=f"file_{number}")

def use(step):
    if step < len(facts["order"]):
        pipeline.set_adapters(f"file_{facts['order'][step]}")

def next_step(pipeline, step, timestep, tensors):
    use(step + 1)
    return tensors

images = []
for prompt, noise in zip(facts["prompts"], tensors["noise"], strict=True):
    use(0)
    result = pipeline(prompt=[prompt], latents=noise[None].clone(), output_type="pt", sigmas=facts["sigmas"],
                      callback_on_step_end=next_step, **facts["settings"])
    images.append(result.images.float())
made["images"] = torch.cat(images)
"""


def export_lora(
    student: str | Path,
    out: str | Path,
    *,
    keys: str = "diffusers",
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    base: str | Path | None = None,
    pipeline: str | Path | None = None,
) -> Exported:
    """Writes the folder, or raises and leaves nothing.

    Args:
        keys: whose names, "diffusers" or "comfyui".
        rank: of the products that whole weights are taken apart into; adapters have a rank, and take none.
        base: of adapters, where it lies now.
        pipeline: that the student was made for, where it lies now.
    """
    if keys not in KEYS:
        raise ValueError(f"export: keys are {keys!r}, expected one of {', '.join(KEYS)}")
    target = target_of(out, overwrite, found(student))
    source = Source.read(student, base=base, pipeline=pipeline, extracting=rank is not None)
    _check_rank(source, rank)
    source.guard(target)
    where, subfolder = source.base_transformer()
    state = plain(source.networks[0] if source.adapters else _began_as(where, subfolder))
    factors, left = _factors(source, state, rank)
    written = [{name: Product(*(part.to(dtype) for part in one)) for name, one in step.items()} for step in factors]
    check_space(target.parent, sum(p.nbytes for step in written for one in step.values() for p in one), "export")
    with new_folder(target, lambda: target_of(target, overwrite)) as new:
        files = [f"step_{number}.safetensors" for number in range(1, len(written) + 1)]
        files = files if source.per_step else ["pytorch_lora_weights.safetensors"]
        with source.phase("writing"):
            metadata = {"format": "pt", "base": where, "subfolder": subfolder}
            metadata["sigmas"] = json.dumps(source.model.sigmas)
            for file, step in zip(files, written, strict=True):
                save_file(named(step, source.family, keys), new / file, metadata=metadata)
        with source.phase("checking"):
            error, lost = _verify(source, [new / file for file in files], (where, subfolder), state, written)
        errors: dict[str, Any] = {
            "of images, against the written factors": error,
            "of images, against the student": lost,
        }
        if left:
            errors["share of the weights' change that is left behind, by step"] = left
        return source.leave(
            new,
            target,
            error=error,
            rounding=lost,
            base=[where, subfolder],
            keys=keys,
            rank=rank or source.facts["rank"],
            dtype=str(dtype).removeprefix("torch."),
            errors=errors,
        )


def _check_rank(source: Source, rank: int | None) -> None:
    """Layers of fewer dimensions than the rank take all of theirs."""
    if source.adapters and rank is not None:
        raise ValueError(f"export: --rank is {rank}, and the student's adapters have one: {source.facts['rank']}")
    if source.adapters:
        return
    if rank is None:
        raise ValueError("export: the student has whole weights; say the rank of the product to take from them: --rank")
    if rank < 1:
        raise ValueError(f"export: --rank is {rank}, expected at least 1")
    weights = plain(source.networks[0]).items()
    most = max(min(tensor.shape) for name, tensor in weights if _is_target(name, tensor, source.family))
    if rank > most:
        raise ValueError(f"export: --rank is {rank}, and no layer has more than {most} dimensions to take apart")


def _factors(
    source: Source, base: Mapping[str, Tensor], rank: int | None
) -> tuple[list[dict[str, Product]], list[float]]:
    """Of each network; and what whole weights have besides, as a share of their change."""
    if rank is None:
        return [products(network) for network in source.networks], []
    pairs = [taken_apart(plain(network), base, source.family, rank) for network in source.networks]
    return [step for step, _ in pairs], [behind for _, behind in pairs]


def _is_target(name: str, tensor: Tensor, family: str) -> bool:
    module = name.removesuffix(".weight")
    return module != name and tensor.dim() == 2 and re.fullmatch(TARGETS[family], module) is not None


def _began_as(where: str, subfolder: str) -> Backbone:
    return load_backbone(where, dtype=torch.float32, fused=False, subfolder=subfolder)


def taken_apart(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], family: str, rank: int
) -> tuple[dict[str, Product], float]:
    """Products of this rank whose sum with the base is nearest the weights, and the part of their difference's norm
    that is not in them."""
    if weights.keys() != base.keys() or any(tensor.shape != base[name].shape for name, tensor in weights.items()):
        raise ValueError("export: the student's network and its base are of different architectures")
    found: dict[str, Product] = {}
    whole = behind = 0.0
    for name, tensor in weights.items():
        change = (tensor - base[name]).float()
        whole += float(change.square().sum())
        if _is_target(name, change, family):
            module = name.removesuffix(".weight")
            found[module] = _nearest(change, rank)
            change = change - found[module]()
        behind += float(change.square().sum())
    if whole == 0:
        raise ValueError("export: the student's weights are those of its base: there is nothing to take apart")
    return found, (behind / whole) ** 0.5


def _nearest(matrix: Tensor, rank: int) -> Product:
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):  # the search starts in random directions, the same ones every time
        torch.manual_seed(0)
        up, values, down = torch.svd_lowrank(matrix, min(rank + SEARCHED, *matrix.shape), niter=8)
    root = values[:rank].sqrt()
    return Product((down[:, :rank] * root).T.contiguous(), (up[:, :rank] * root).contiguous())


def named(factors: Mapping[str, Product], family: str, keys: str) -> dict[str, Tensor]:
    """Tensors of a file."""
    if keys == "diffusers" or family != "flux2":
        prefix = "transformer" if keys == "diffusers" else "diffusion_model"
        return {f"{prefix}.{module}.{name}": t for module, one in factors.items() for name, t in _two(one).items()}
    whole: dict[str, list[Product | None]] = {}
    for module, one in factors.items():
        at = place(module, family)
        whole.setdefault(at.module, [None] * at.parts)[at.part] = one
    made: dict[str, Tensor] = {}
    for module, parts in whole.items():
        rows = next(len(part.up) for part in parts if part is not None)
        one = Product(*joined_factors(parts, rows))
        made |= {f"diffusion_model.{module}.{name}": tensor for name, tensor in _two(one).items()}
    return made


def _two(one: Product) -> dict[str, Tensor]:
    return {"lora_A.weight": one.down.contiguous(), "lora_B.weight": one.up.contiguous()}


def _verify(
    source: Source,
    files: list[Path],
    base: tuple[str, str],
    state: Mapping[str, Tensor],
    factors: list[dict[str, Product]],
) -> tuple[float, float]:
    """Images of stock diffusers with these files against those of the base with these products, which are held against
    the student's: adapters lose nothing in float32, and otherwise at most thrice what rounding their own factors does.
    Of whole weights a rank leaves behind what it leaves behind."""
    one = source.networks[0]
    made = [with_weights(one, added(state, step)) for step in factors]
    order = source.order()
    again = Student([made[number] for number in order], source.model.sigmas)
    probes = Probes(source.pipeline, again)
    true, exact = probes.images(again), probes.images(source.model)
    lost = relative(true, exact)
    if source.adapters:
        dtype = next(iter(factors[0].values())).up.dtype
        allowed = FLOAT32
        if dtype != torch.float32:
            own = rounded(source.model, dtype, among=lambda name: ".lora_" in name)
            allowed += 3 * relative(probes.images(own), exact)
        what = "images of the factors that were written differ from the student's"
        hold(lost, allowed, what, "the scaling of the factors")
    name, revision = repository(base[0])
    facts = {
        "pipeline": str(source.pipeline),
        "base": name,
        "revision": revision,
        "subfolder": base[1],
        "class": type(one.model).__name__,
        "files": [str(file) for file in files],
        "order": order,
        "sigmas": list(source.model.sigmas[:-1]),
        "prompts": PROMPTS,
        "settings": probes.settings,
    }
    what = "stock diffusers could not run the base with these files"
    noise = probes.noise
    del made, again, probes  # the other process loads all of it
    drawn = fresh_process.run(_PROBE, facts, {"noise": noise}, what=what)["images"]
    likeliest = "a diffusers that reads LoRA files in another way than the tested one"
    what = "stock diffusers' images differ from the written factors'"
    return hold(relative(drawn, true), FLOAT32, what, likeliest), lost
